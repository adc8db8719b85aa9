#!/bin/bash
# UPerNet on a distilled SwinV2-G (3.0B), 640 px, under ZeRO-3 with hpZ on 32 GPUs.
#
#   ADE_ROOT=/data/ade20k STUDENT_INIT=runs/fd_swinv2g sbatch slurm/ade20k_swinv2g.sh
#   ADE_ROOT=/data/ade20k STUDENT_INIT=runs/fd_swinv2_base \
#       sbatch --nodes=1 slurm/ade20k_swinv2g.sh --recipe ade20k_upernet_swinv2_base
#
# Submit from the repository's root, or from a folder that `fd-large init` wrote; data, weights and
# the rest of the site: site.sh. The options below are explained in slurm/fd_swinv2g.sh, what
# happens at an interruption in docs/clusters.md.

#SBATCH --job-name=ade20k_swinv2g
#SBATCH --nodes=4
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
learns_from=(data.root ADE_ROOT student.init STUDENT_INIT)
launch --recipe ade20k_upernet_swinv2_giant --deepspeed_config zero3_hpz \
    --runtime.notice_seconds 300 "$@"
