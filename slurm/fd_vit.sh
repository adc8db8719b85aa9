#!/bin/bash
# CLIP ViT-B/16 into a ViT-B/16 under ZeRO-1 on 16 GPUs; any other recipe of that size by its name.
#
#   TEACHER_SOURCE=/weights/ViT-B-16.pt sbatch slurm/fd_vit.sh
#   TEACHER_SOURCE=/weights/dino_vitbase16_pretrain.pth \
#       sbatch slurm/fd_vit.sh --recipe fd_dino_vit_base
#
# Submit from the repository's root, or from a folder that `fd-large init` wrote; data, teacher and
# the rest of the site: site.sh. The options below are explained in slurm/fd_swinv2g.sh, what
# happens at an interruption in docs/clusters.md.

#SBATCH --job-name=fd_vit
#SBATCH --nodes=2
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

launch --recipe fd_clip_vit_base --deepspeed_config zero1 \
    --runtime.notice_seconds 300 "$@"
