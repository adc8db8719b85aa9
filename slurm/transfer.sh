#!/bin/bash
# A training of the table that `fd-large transfer --slurm` submits, on the 8 GPUs of a node.
#
#   python -m fd_large transfer runs/mine --imagenet /data/imagenet --coco /data/coco --slurm
#   python -m fd_large transfer runs/fd_swinv2g --ade20k /data/ade20k --slurm \
#       --deepspeed_config zero3_hpz --sbatch nodes=4 time=48:00:00
#
# Submit from the repository's root, or from a folder that `fd-large init` wrote; software and queue
# of the site: site.sh. The options below, which --sbatch wins over, are explained in
# slurm/fd_swinv2g.sh, what happens at an interruption in docs/clusters.md.

#SBATCH --job-name=transfer
#SBATCH --nodes=1
#SBATCH --gres=gpu:8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue

cd "${SLURM_SUBMIT_DIR:-$PWD}" || exit 2
scripts=slurm
[[ -f slurm/launch.sh ]] || scripts=.
if [[ ! -f $scripts/launch.sh ]]; then
    echo "slurm: got $PWD, expected the folder of launch.sh, or the repository. Submit from there." >&2
    exit 2
fi
source "$scripts/launch.sh"

# shellcheck disable=SC2034 # launch reads it
learns_from=(data.root DATA_ROOT)
launch --runtime.notice_seconds 300 "$@"
