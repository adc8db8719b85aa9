#!/usr/bin/env bash
# How fast is a step on this machine's GPUs? Ten minutes; each line decides something as it ends.
#
#     bash benchmarks/gpu.sh                 # all GPUs of the machine; one is enough
#     FD_DRY_RUN=1 bash benchmarks/gpu.sh    # every line on CPUs, small
#
# 1. `doctor` as the ranks meet; how they sum gradients fastest; DeepSpeed's fused AdamW built where
#    runs look for it;
# 2. ViT-B under ZeRO-1 and ZeRO-3: images per second, and in a trace of three steps how often the
#    host waited for the device;
# 3. SwinV2-G (3.0B) with a random 3.0B teacher: no checkpoints, every block checkpointed, plain
#    torch, and with several GPUs ZeRO-3 and hpZ;
# 4. ZeRO-3 with DeepSpeed's clock on, as it comes, and without the event that orders its gathers
#    after the optimiser's write: speed, and whether the losses are the same;
# 5. the fused kernels against plain torch: ViT-B, Swin-B; what each run chose stands in its log;
# 6. a step of 3.0B parameters by each fused AdamW.
#
# MFU is the student's forward and backward and the teacher's forward over the card's peak (989
# TFLOP/s for an H100, bfloat16); the time includes the optimizer, and recomputation does not count
# (fd_large/plan/utilisation.py). A run's figure is the median over its steps from the fourth on.
# Runs are killed once they have enough steps, so that none writes its 50 GB checkpoint. Writes
# benchmarks/results/gpu.json after each run. How runs stop, go on and hold memory: gpu_runs.sh. The
# kernels themselves: gpu_kernels.sh.
source "$(dirname "$0")/gpu_shared.sh"
"$PYTHON" benchmarks/gpu_images.py "$WORK" "$IMAGES"

# shellcheck disable=SC2086  # The flags are meant to be split.
{
  step doctor 30 "${LAUNCH[@]}" "$([ "$RANKS" -gt 1 ] && echo --module || echo -m)" fd_large doctor
  [ "$RANKS" -gt 1 ] && step collectives 25 "${LAUNCH[@]}" benchmarks/gpu_collectives.py
  step build 90 "$PYTHON" benchmarks/gpu_adam.py --build
  train ViT-B_zero1 40 auto zero1 $VIT_IMAGES $VIT --profile 3
  train ViT-B_zero3 40 auto zero3 $VIT_IMAGES $VIT --profile 3
  train G_keeps_all 60 auto zero2 $G_IMAGES_KEPT $G --student.activation_checkpointing off
  train G_every_block 60 auto zero2 $G_IMAGES $G --student.activation_checkpointing every
  if [ "$RANKS" -gt 1 ]; then
    train G_zero3 60 auto zero3 $G_IMAGES $G --student.activation_checkpointing every
    train G_zero3_hpz 60 auto zero3_hpz $G_IMAGES $G --student.activation_checkpointing every \
      --engine.node_size $((RANKS > 3 ? RANKS / 2 : RANKS))
  fi
  train G_every_block_plain 50 reference zero2 $G_IMAGES $G \
    --student.activation_checkpointing every
  FD_GPU_TRAIN=clock train ViT-B_clock 40 auto zero3 $VIT_IMAGES $VIT --profile 3
  FD_GPU_TRAIN=unordered train ViT-B_unordered 40 auto zero3 $VIT_IMAGES $VIT --profile 3
  train ViT-B_plain 35 reference zero1 $VIT_IMAGES $VIT
  train Swin-B_fused 35 auto zero1 $SWIN_IMAGES $SWIN
  train Swin-B_plain 35 reference zero1 $SWIN_IMAGES $SWIN
  step adam 30 "$PYTHON" benchmarks/gpu_adam.py
}
ends
