# shellcheck shell=bash
# What gpu.sh, gpu_runs.sh and gpu_kernels.sh share; they read this file.
#
# Each part of a script gets its seconds, or the time that is left, in the order of the script. With
# FD_DRY_RUN=1 all lines run on CPUs: the quick start's model on two ranks in place of the large
# ones, operations of a few rows in Triton's interpreter. Its figures mean nothing, and
# benchmarks/results stays as it is.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
DRY=${FD_DRY_RUN:-}
BUDGET=${FD_GPU_SECONDS:-$([ -n "$DRY" ] && echo 3600 || echo 570)}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
FD_GPU_SESSION=$(date -u +%FT%TZ)
FD_GPU_SCRIPT=$(basename "$0" .sh)
export FD_GPU_SESSION FD_GPU_SCRIPT FD_BENCHMARK_RESULTS=benchmarks/results PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$DRY" ]; then
  export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES='' FD_BENCHMARK_RESULTS=$WORK/results
  mkdir "$FD_BENCHMARK_RESULTS"
  RANKS=2
else
  RANKS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
  if [ "${RANKS:-0}" -lt 1 ]; then
    echo "$(basename "$0"): no CUDA device; FD_DRY_RUN=1 goes through it on CPUs."
    exit 0
  fi
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
fi
LAUNCH=("$PYTHON")
[ "$RANKS" -gt 1 ] &&
  LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$RANKS")

# begins NAME LIMIT: sets `limit` to LIMIT seconds (ten times as many in a dry run), or the time
# that is left, and says what begins; fails where too little is left.
begins() {
  limit=$2
  [ -n "$DRY" ] && limit=$(($2 * 10))
  [ $((BUDGET - SECONDS)) -lt "$limit" ] && limit=$((BUDGET - SECONDS))
  if [ "$limit" -lt 15 ]; then
    echo "== $1: no time left"
    return 1
  fi
  echo "== $1 (at $SECONDS s, at most $limit s)"
}

# step NAME LIMIT COMMAND...: runs COMMAND for at most LIMIT seconds and shows all that it prints.
step() {
  local name=$1
  begins "$name" "$2" || return 0
  shift 2
  timeout --kill-after=5 "$limit" "$@" 2>"$WORK/$name.err" && return
  local code=$?
  echo "$name: exit code $code"
  tail -n 4 "$WORK/$name.err"
  # What a limit cuts short on a GPU is told; a dry run has the time for everything.
  [ -n "$DRY" ] && FAILED=1
}

# ends: fails where a part of a dry run did.
FAILED=
ends() {
  echo "== done (at $SECONDS s)"
  [ -z "$FAILED" ]
}

# What is trained, small in a dry run. A teacher's weights are random.
UPDATES=12
IMAGES=512
VIT="--recipe fd_clip_vit_base --teacher.source random"
SWIN="--recipe fd_esvit_swin_base --teacher.source random"
LARGE="--recipe fd_swinv2_large --teacher.source random"
HUGE="--recipe fd_swinv2h --teacher.source random"
G="--recipe fd_swinv2g --teacher.source random --teacher.placement replicated"
# The head of SwinV2-G's detector and of its segmentation, on a SwinV2-B.
HTC="--recipe coco_mask_rcnn_swinv2_base --task.detection.heads htc"
HTC+=" --task.detection.whole_size 480 800 1333 --task.detection.num_classes 3"
UPER="--recipe ade20k_upernet_swinv2_base"
VIT_IMAGES=128 SWIN_IMAGES=64 G_IMAGES=32 G_IMAGES_KEPT=16 PROBED=512
if [ -n "$DRY" ]; then
  UPDATES=10
  IMAGES=16
  VIT="--recipe quickstart --teacher.source random --eval.every 0"
  SWIN=$VIT LARGE=$VIT HUGE=$VIT
  G="$VIT --teacher.placement replicated"
  small="--student.architecture.embed_dim 16 --student.architecture.depths 1 1 2 1"
  small+=" --student.architecture.num_heads 1 1 2 4 --student.architecture.window_size 4"
  small+=" --data.image_size 64 --data.workers 1 --eval.every 0"
  HTC+=" $small --task.detection.whole_size 48 64 96 --task.detection.head_width 16"
  UPER+=" $small --task.segmentation.head_width 16"
  VIT_IMAGES=2 SWIN_IMAGES=2 G_IMAGES=2 G_IMAGES_KEPT=1 PROBED=4
fi

# train NAME LIMIT KERNELS CONFIG IMAGES FLAGS...: trains until there are UPDATES rows of metrics,
# with so many images on each GPU (auto: what a probe finds, of PROBED), and says what was measured.
# What FD_GPU_TRAIN is for: gpu_train.py.
train() {
  local name=$1 seconds=$2 kernels=$3 config=$4 images=$5
  shift 5
  [ -f "$config" ] || config=ds_configs/$config.json
  begins "$name" "$seconds" || return 0
  local folder=$WORK/run_$name until=$((SECONDS + limit))
  # In a process group of its own, so that its loader workers are killed with it.
  FD_KERNELS=$kernels FD_GPU_MEMORY=$WORK/$name.memory setsid "${LAUNCH[@]}" benchmarks/gpu_train.py \
    --deepspeed_config "$config" "$@" --batch.micro_batch_size "$images" \
    --batch.global_batch_size $((${images/auto/$PROBED} * RANKS)) \
    --data.root "${DATA:-$WORK/images}" --runtime.run_dir "$folder" --runtime.log_every 1 \
    --runtime.save_every 100000 --optim.max_steps 100000 --optim.warmup_epochs 0 \
    >"$WORK/$name.log" 2>&1 &
  local group=$!
  while kill -0 "$group" 2>/dev/null && [ $SECONDS -lt $until ]; do
    [ "$(cat "$folder/metrics.jsonl" 2>/dev/null | wc -l)" -ge $UPDATES ] && break
    sleep 1
  done
  # The launcher starts each rank in a group of its own. One that outlived it would save.
  local leader
  for leader in $(pgrep -P "$group") "$group"; do
    kill -KILL -- "-$leader" 2>/dev/null
  done
  wait "$group" 2>/dev/null
  "$PYTHON" benchmarks/gpu_rows.py "$name" "$folder" "$WORK/$name.log" || FAILED=1
}

