#!/bin/bash
# MIM-Depth's decoder on a distilled SwinV2-G (3.0B), 480 px, under ZeRO-3 on 8 GPUs.
#
#   NYU_ROOT=/data/nyu_depth_v2 STUDENT_INIT=runs/fd_swinv2g sbatch slurm/nyuv2_swinv2g.sh
#   NYU_ROOT=/data/nyu_depth_v2 STUDENT_INIT=runs/fd_swinv2_base \
#       sbatch slurm/nyuv2_swinv2g.sh --recipe nyuv2_swinv2_base
#
# Submit from the repository's root, or from a folder that `fd-large init` wrote; data, weights and
# the rest of the site: site.sh. The options below are explained in slurm/fd_swinv2g.sh, what
# happens at an interruption in docs/clusters.md.

#SBATCH --job-name=nyuv2_swinv2g
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
learns_from=(data.root NYU_ROOT student.init STUDENT_INIT)
launch --recipe nyuv2_swinv2_giant --deepspeed_config zero3 \
    --runtime.notice_seconds 300 "$@"
