#!/bin/bash
# SwinV2-G (3.0B) distils a frozen teacher under ZeRO-3 with hpZ on 64 GPUs.
#
#   sbatch slurm/fd_swinv2g.sh
#   sbatch --nodes=32 slurm/fd_swinv2g.sh --optim.base_lr 2e-4 [--section.field VALUE ...]
#
# Submit from the repository's root, or from a folder that `fd-large init` wrote; data, teacher and
# the rest of the site: site.sh. Arguments after the script go to train.py and win over the recipe;
# options of sbatch before it win over the lines below. What happens at a time limit, a crash or a
# pre-emption: docs/clusters.md.

#SBATCH --job-name=fd_swinv2g
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
# One task per GPU, but every task sees all GPUs of its node: with --gpus-per-task=1 each sees one,
# and the local rank, by which torch and DeepSpeed choose a device, would name none. --gres, since
# --gpus-per-node needs a Slurm that schedules by cons_tres.
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
# Five minutes before the time limit the ranks save and the job requeues itself. 12 bytes a
# parameter are 36 GB in all, 4.5 GB a node: ten seconds at 0.5 GB/s, after the step under way.
# runtime.notice_seconds below says the same number to the ranks, who warn where it is too little.
#SBATCH --signal=B:USR1@300
# Slurm starts the job again after a pre-emption or the loss of a node.
#SBATCH --requeue

# slurmd runs a copy of this script: its own path says nothing about where the repository is.
cd "${SLURM_SUBMIT_DIR:-$PWD}" || exit 2
scripts=slurm
[[ -f slurm/launch.sh ]] || scripts=.
if [[ ! -f $scripts/launch.sh ]]; then
    echo "slurm: got $PWD, expected the folder of launch.sh, or the repository. Submit from there." >&2
    exit 2
fi
source "$scripts/launch.sh"

launch --recipe fd_swinv2g --deepspeed_config zero3_hpz \
    --runtime.notice_seconds 300 "$@"
