#!/bin/bash
# Detectors on a distilled SwinV2-G (3.0B), 1536 px, under ZeRO-3 with hpZ on 96 GPUs: Mask R-CNN, or
# with the recipes of a cascade on Objects365 and then HTC++ on COCO.
#
#   COCO_ROOT=/data/coco STUDENT_INIT=runs/fd_swinv2g sbatch slurm/coco_swinv2g.sh
#   COCO_ROOT=/data/objects365 STUDENT_INIT=runs/fd_swinv2g \
#       sbatch slurm/coco_swinv2g.sh --recipe o365_cascade_swinv2_giant
#   COCO_ROOT=/data/coco STUDENT_INIT=runs/o365_cascade_swinv2_giant \
#       sbatch slurm/coco_swinv2g.sh --recipe coco_htc_swinv2_giant
#   COCO_ROOT=/data/coco STUDENT_INIT=runs/fd_swinv2_base \
#       sbatch --nodes=2 slurm/coco_swinv2g.sh --recipe coco_mask_rcnn_swinv2_base
#
# Submit from the repository's root, or from a folder that `fd-large init` wrote; data, weights and
# the rest of the site: site.sh. The options below are explained in slurm/fd_swinv2g.sh, what
# happens at an interruption in docs/clusters.md.

#SBATCH --job-name=coco_swinv2g
#SBATCH --nodes=12
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
learns_from=(data.root COCO_ROOT student.init STUDENT_INIT)
launch --recipe coco_mask_rcnn_swinv2_giant --deepspeed_config zero3_hpz \
    --runtime.notice_seconds 300 "$@"
