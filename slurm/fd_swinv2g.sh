#!/bin/bash
# SwinV2-G distils a frozen teacher under ZeRO-3 with hpZ: one Python per GPU, all started by srun.
#
#   sbatch --export=ALL,DATA_ROOT=/data/images,TEACHER_SOURCE=/weights/teacher.pth \
#       slurm/fd_swinv2g.sh [--section.field VALUE ...]
#
# Submit it from the repository root. Words after the script go to train.py and win over the
# recipe; options of sbatch before the script win over the lines below (other sizes:
# --nodes=4; a partition or account: --partition=... --account=...). On nodes without GPUs:
# --gpus-per-node=0 --ntasks-per-node=2 --cpus-per-task=1.

#SBATCH --job-name=fd_swinv2g
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
# One task per GPU, yet every task sees all GPUs of its node: with --gpus-per-task=1 each sees one,
# and the local rank, by which torch and DeepSpeed choose a device, would name none.
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
# The folder of the run keeps what is needed to go on; a second start is the user's decision.
#SBATCH --no-requeue

set -euo pipefail

# ---- the site ---------------------------------------------------------------------------------
# Each can also come from the environment (see above).
DATA_ROOT=${DATA_ROOT:-}            # a folder of images, readable from all nodes
TEACHER_SOURCE=${TEACHER_SOURCE:-}  # the teacher's weights, or "random" for a throughput run
PYTHON=${PYTHON:-python}            # of an environment that all nodes see
LOG_DIR=${LOG_DIR:-logs}            # gets one file per rank

if [[ -z $DATA_ROOT ]]; then
    echo "slurm/fd_swinv2g.sh: DATA_ROOT is empty, expected a folder of images. Set it at the top of the script, or submit with sbatch --export=ALL,DATA_ROOT=FOLDER." >&2
    exit 2
fi
if [[ -z $TEACHER_SOURCE ]]; then
    echo "slurm/fd_swinv2g.sh: TEACHER_SOURCE is empty, expected a weights file or \"random\". Set it at the top of the script, or submit with sbatch --export=ALL,TEACHER_SOURCE=FILE." >&2
    exit 2
fi

# slurmd runs a copy of this script: its own path says nothing about where the repository is.
cd "${SLURM_SUBMIT_DIR:-$PWD}"
if [[ ! -f fd_large/train.py ]]; then
    echo "slurm/fd_swinv2g.sh: no fd_large/train.py in $PWD. Submit from the repository root." >&2
    exit 2
fi

# ---- the network ------------------------------------------------------------------------------
# NCCL finds the fast fabric by itself. Where a node has several networks, name the interface over
# which ranks first meet (gloo needs the same), and the InfiniBand cards:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#   export NCCL_IB_HCA=mlx5
# When a start hangs, this tells which way NCCL chose:
#   export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
# A rank that dies must end the others' collectives instead of leaving them waiting.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Cores not given to data workers would be fought over by every rank's thread pool.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# ---- the ranks --------------------------------------------------------------------------------
# MASTER_ADDR and MASTER_PORT may be set; otherwise the ranks meet on the job's first node, at a
# port made from the job id. srun does not take --cpus-per-task over from sbatch by itself.
mkdir -p "$LOG_DIR"
exec srun \
    --export=ALL \
    --kill-on-bad-exit=1 \
    --distribution=block \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    --output="$LOG_DIR/slurm-%x-%j-rank_%t.log" \
    "$PYTHON" fd_large/train.py \
    --recipe fd_swinv2g \
    --deepspeed_config ds_configs/zero3_hpz.json \
    --data.root "$DATA_ROOT" \
    --teacher.source "$TEACHER_SOURCE" \
    "$@"
