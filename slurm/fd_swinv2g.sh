#!/bin/bash
# SwinV2-G (3.0B) distils a frozen teacher on 64 GPUs of 40 GB or more.
#
#   sbatch slurm/fd_swinv2g.sh [--section.field VALUE ...]
#
#   nodes  arguments                          images a step
#   1, 2, 4, 8                                2,048, on fewer than 8 nodes in several passes of 32
#   16     --batch.micro_batch_size 16        2,048
#   32     --batch.micro_batch_size 8         2,048
#   64     --batch.global_batch_size 16384    16,384
#
#   sbatch --nodes=64 slurm/fd_swinv2g.sh --batch.global_batch_size 16384
#   SBATCH_GRES=gpu:4 sbatch --nodes=16 slurm/fd_swinv2g.sh         # where nodes have 4 GPUs
#   FD_CONFIG=zero3 sbatch slurm/fd_swinv2g.sh                      # ZeRO-3, the teacher sharded
#
# It runs ZeRO-2 with the whole teacher on each GPU and no activation checkpoints: of all settings
# that 40 GB hold this is the one that `plan` expects to be the fastest on 8, 64 and 512 GPUs alike,
# in nodes of 8 with a network card per GPU: 33 GB and two thirds to three quarters of the GPU-hours
# of ZeRO-3 with checkpoints (docs/scaling.md has the table, and what suits a slower network). No GPU
# has confirmed that. FD_CONFIG names another of ds_configs/: zero3 splits
# the teacher over all ranks and checkpoints every block (9 GB), zero3_hpz splits it over the ranks
# of a node.
#
# One node of 40 GB needs --batch.micro_batch_size 16. At 2,048 images more than 32 nodes would wait
# for the network, so 64 take a larger step. The learning rate grows with it (optim.base_lr is per
# 512 images); nobody has shown that it still is right there. A batch that does not divide is refused
# before the ranks start.
#
# Submit from the repository's root, or from a folder that `fd-large init` wrote; data, teacher and
# the rest of the site: site.sh. Arguments after the script go to train.py and win over the recipe;
# options of sbatch before it win over the lines below. What happens at a time limit, a crash or a
# pre-emption: docs/clusters.md.

#SBATCH --job-name=fd_swinv2g
#SBATCH --nodes=8
# One rank for each of these, which share the node's cores (launch.sh). Every rank sees all GPUs of
# its node: with --gpus-per-task=1 each would see one, and the local rank, by which torch and
# DeepSpeed choose a device, would name none. --gres, since --gpus-per-node needs a Slurm that
# schedules by cons_tres.
#SBATCH --gres=gpu:8
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

config=${FD_CONFIG:-zero2}
case ${config##*/} in
    zero3_hpz*) memory=(--teacher.placement node) ;;
    zero3*) memory=(--teacher.placement sharded) ;;
    *) memory=(--teacher.placement replicated --student.activation_checkpointing off) ;;
esac
launch --recipe fd_swinv2g --deepspeed_config "$config" "${memory[@]}" \
    --runtime.notice_seconds 300 "$@"
