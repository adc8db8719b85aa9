#!/usr/bin/env bash
# How fast is a step on this machine's GPUs? Ten minutes; each line decides something as it ends.
#
#     bash benchmarks/gpu.sh                 # all GPUs of the machine; one is enough
#     FD_DRY_RUN=1 bash benchmarks/gpu.sh    # every line on CPUs, small
#
# 1. `doctor` as the ranks meet, and DeepSpeed's fused AdamW built where runs look for it;
# 2. ViT-B under ZeRO-1 and ZeRO-3: images per second, and in a trace of three steps how often the
#    host waited for the device;
# 3. the fused kernels against plain torch: ViT-B, Swin-B; what each run chose stands in its log;
# 4. SwinV2-G (3.0B) with a random 3.0B teacher: every block checkpointed, none, plain torch, and
#    with several GPUs ZeRO-3 and hpZ;
# 5. two equal runs: whether their losses have the same bits, and whether the first one is also
#    that of ZeRO-3;
# 6. ViT-B with its teacher on a stream of its own; a step of 3.0B parameters by each fused AdamW.
#
# MFU is the student's forward and backward and the teacher's forward over the card's peak (989
# TFLOP/s for an H100, bfloat16); the time includes the optimizer, and recomputation does not count
# (fd_large/plan/utilisation.py). A run's figure is the median over its steps from the fourth on.
# Runs are killed once they have enough steps, so that none writes its 50 GB checkpoint. Writes
# benchmarks/results/gpu.json after each run. The kernels themselves are timed by gpu_kernels.sh.
source "$(dirname "$0")/gpu_shared.sh"
UPDATES=12
IMAGES=512
VIT="--recipe fd_clip_vit_base"
SWIN="--recipe fd_esvit_swin_base"
G="--recipe fd_swinv2g --teacher.placement replicated"
VIT_IMAGES=128 SWIN_IMAGES=64 G_IMAGES=32 G_IMAGES_KEPT=16
if [ -n "$DRY" ]; then
  UPDATES=10
  IMAGES=16
  VIT="--recipe quickstart --eval.every 0"
  SWIN=$VIT
  G="$VIT --teacher.placement replicated"
  VIT_IMAGES=2 SWIN_IMAGES=2 G_IMAGES=2 G_IMAGES_KEPT=1
fi

# train NAME LIMIT KERNELS CONFIG IMAGES FLAGS...: trains until there are UPDATES rows of metrics,
# with so many images on each GPU, and says what was measured.
train() {
  local name=$1 seconds=$2 kernels=$3 config=$4 images=$5
  shift 5
  begins "$name" "$seconds" || return 0
  local folder=$WORK/run_$name until=$((SECONDS + limit))
  # In a process group of its own, so that its loader workers are killed with it.
  FD_KERNELS=$kernels setsid "${LAUNCH[@]}" benchmarks/gpu_train.py \
    --deepspeed_config "ds_configs/$config.json" "$@" --batch.micro_batch_size "$images" \
    --batch.global_batch_size $((images * RANKS)) --teacher.source random \
    --data.root "$WORK/images" --runtime.run_dir "$folder" --runtime.log_every 1 \
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

"$PYTHON" - "$WORK/images" "$IMAGES" <<'PY'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

folder = Path(sys.argv[1]) / "noise"
folder.mkdir(parents=True)
draws = np.random.default_rng(0)
for i in range(int(sys.argv[2])):
    low = draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(low).resize((256, 256), Image.BICUBIC).save(folder / f"{i:03}.jpg")
PY

# shellcheck disable=SC2086  # The flags are meant to be split.
{
  step doctor 30 "${LAUNCH[@]}" "$([ "$RANKS" -gt 1 ] && echo --module || echo -m)" fd_large doctor
  step build 90 "$PYTHON" benchmarks/gpu_adam.py --build
  train ViT-B_zero1 40 auto zero1 $VIT_IMAGES $VIT --profile 3
  train ViT-B_zero3 40 auto zero3 $VIT_IMAGES $VIT --profile 3
  train ViT-B_plain 40 reference zero1 $VIT_IMAGES $VIT
  train Swin-B_fused 35 auto zero1 $SWIN_IMAGES $SWIN
  train Swin-B_plain 35 reference zero1 $SWIN_IMAGES $SWIN
  train G_every_block 60 auto zero2 $G_IMAGES $G --student.activation_checkpointing every
  train G_keeps_all 60 auto zero2 $G_IMAGES_KEPT $G --student.activation_checkpointing off
  train G_every_block_plain 50 reference zero2 $G_IMAGES $G \
    --student.activation_checkpointing every
  if [ "$RANKS" -gt 1 ]; then
    train G_zero3 60 auto zero3 $G_IMAGES $G --student.activation_checkpointing every
    train G_zero3_hpz 60 auto zero3_hpz $G_IMAGES $G --student.activation_checkpointing every \
      --engine.node_size $((RANKS > 3 ? RANKS / 2 : RANKS))
  fi
  train ViT-B_zero1_again 35 auto zero1 $VIT_IMAGES $VIT --profile 3
  train ViT-B_teacher_stream 35 auto zero1 $VIT_IMAGES $VIT \
    --teacher.placement replicated --task.distillation.teacher_stream True
  step adam 30 "$PYTHON" benchmarks/gpu_adam.py
}
ends
