# shellcheck shell=bash
# The site: all that differs between clusters, in one place. Every batch script sources it on the
# job's first node. Where a line reads NAME=${NAME:-...}, what is set already wins, and sbatch hands
# your environment on:
#
#   DATA_ROOT=/data/imagenet22k sbatch slurm/fd_swinv2g.sh
#
# Other lines, such as `export NCCL_SOCKET_IFNAME=ib0` and the `unset` below, win over what is set.

# ---- data and weights ---------------------------------------------------------------------------
# Images that every node sees: a folder or tar files (docs/data.md).
DATA_ROOT=${DATA_ROOT:-}
# The teacher's weights (docs/weights.md); "random" for a test of throughput. No weights of the 3B
# SwinV2-G are public. The largest SwinV2 that is, 1.06B parameters, is SimMIM's "SwinV2-giant" of
# the model hub of microsoft/Swin-Transformer; it is a model of another size, so name that as well:
#   TEACHER_SOURCE=/weights/swinv2_giant_22k_500k.pth sbatch slurm/fd_swinv2g.sh \
#       --teacher.model swinv2_1b
TEACHER_SOURCE=${TEACHER_SOURCE:-}

# For slurm/coco_swinv2g.sh, slurm/ade20k_swinv2g.sh and slurm/nyuv2_swinv2g.sh: a dataset in COCO's
# layout (docs/detection.md), ADE20K's (docs/segmentation.md) or NYUv2's (docs/depth.md). For these
# and for slurm/finetune_swinv2g.sh: the run or file of weights that the backbone comes from.
COCO_ROOT=${COCO_ROOT:-}
ADE_ROOT=${ADE_ROOT:-}
NYU_ROOT=${NYU_ROOT:-}
STUDENT_INIT=${STUDENT_INIT:-}

# A folder on each node's own disk to which the folder of images is copied before the ranks start;
# empty: they read it where it is (docs/clusters.md).
STAGE_TO=${STAGE_TO:-}

# ---- queue --------------------------------------------------------------------------------------
# sbatch has read its options before it runs a script. It also reads these two variables: set them
# here and `source slurm/site.sh` in the shell that you submit from.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=vision

# ---- software -----------------------------------------------------------------------------------
# A Python with fd_large's packages, at the same path on every node (or in the container). One on a
# network file system starts slowly; these lines copy a virtual environment to each node's own disk,
# and at later starts only what is newer:
# if [[ ${SLURM_JOB_ID:-} ]]; then
#     srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 cp -au /shared/env /local/
#     PYTHON=/local/env/bin/python
# fi
PYTHON=${PYTHON:-python}
# Names for `module load`, separated by blanks. Where batch scripts do not know `module`, source its
# script here first, such as /etc/profile.d/modules.sh.
MODULES=${MODULES:-}
# An image of the Dockerfile: IMAGE.sif runs under apptainer, all else is given to srun as
# --container-image (pyxis with enroot: IMAGE.sqsh or a registry's name). Mounts, SOURCE:TARGET
# separated by commas; the repository and LOG_DIR are mounted anyway.
CONTAINER=${CONTAINER:-}
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-}

# ---- files --------------------------------------------------------------------------------------
# The output of each rank, and how often a job was restarted; on a file system that all nodes share.
LOG_DIR=${LOG_DIR:-logs}

# ---- restarts -----------------------------------------------------------------------------------
# A job that was restarted this often without a newer checkpoint than before is given up.
MAX_RESTARTS=${MAX_RESTARTS:-3}

# ---- network ------------------------------------------------------------------------------------
# NCCL finds the fast fabric by itself; these are for where it does not. A node with several
# networks: the interface over which ranks first meet. gloo carries the small messages of the CPU.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# The InfiniBand cards to use, by the beginning of their names. Without it storage's may be taken.
# export NCCL_IB_HCA=mlx5
# RoCE: the index of the address (show_gids) that the switches route, often 3. InfiniBand: leave it.
# export NCCL_IB_GID_INDEX=3
# A start that hangs: what NCCL chose, in every rank's log. "NET/Socket" means that it found no fast
# fabric, "NET/IB ... GDRDMA" that cards read the GPU's memory directly.
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
# The address of the job's first node, where its name leads to another network than the ranks'.
# export MASTER_ADDR=10.0.0.1

# Which collective a run hung in. torch keeps the last ones in memory: the watchdog writes those that
# have not ended into the rank's log, and where torch gives up first it writes all of them beside
# that log (slurm/launch.sh). Both are torch 2.13's defaults; older ones keep none.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# Leave TORCH_NCCL_ASYNC_ERROR_HANDLING alone. Its default, 3, ends the process after an error; 1,
# which older guides set, first aborts NCCL's communicators, which may itself hang. Likewise
# CUDA_DEVICE_MAX_CONNECTIONS: 1 puts the collectives of several groups in one queue.
unset TORCH_NCCL_ASYNC_ERROR_HANDLING NCCL_ASYNC_ERROR_HANDLING

# ---- memory and cores ---------------------------------------------------------------------------
# GPU memory in segments that grow. Images of many sizes and ZeRO-3's gathering leave gaps in fixed
# ones: out of memory with gigabytes free. Where a driver refuses it: PYTORCH_CUDA_ALLOC_CONF=
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}

# Data workers are processes; threads beside them would compete for the same cores. With optimiser
# states on the host (offload_optimizer) the step itself runs on the CPU: give it the cores that the
# workers leave, for example OMP_NUM_THREADS=6 of 12 of a rank.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
