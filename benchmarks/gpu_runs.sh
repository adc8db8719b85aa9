#!/usr/bin/env bash
# Do runs on this machine's GPUs save, stop, go on and hold their memory as they should? Ten minutes.
#
#     bash benchmarks/gpu_runs.sh                 # all GPUs of the machine; one is enough
#     FD_DRY_RUN=1 bash benchmarks/gpu_runs.sh    # every line on CPUs, small
#
# 1. a run of 0.7B parameters (SwinV2-G on 8 GPUs) saves under training, is killed and goes on: how
#    long it stands still, whether the losses go on to the bit, and whether half of the ranks do it;
# 2. with several GPUs, a rank that is stopped in its course: whether the watchdog names where the
#    others wait; one that is killed: how soon they leave;
# 3. the micro batch that `auto` finds for SwinV2-L, and whether twice as many images fit;
# 4. a detector with HTC's heads on whole images of many sizes, and a segmentation: memory over time,
#    waits of the host;
# 5. with several GPUs, heads that are fewer than the ranks: the same losses with contiguous
#    gradients and without;
# 6. two equal runs: whether their losses have the same bits, and whether the first one is also that
#    of ZeRO-3; a stream of its own for the teacher.
#
# Each line decides something as it ends, as in gpu.sh. Writes benchmarks/results/gpu_runs.json.
source "$(dirname "$0")/gpu_shared.sh"
"$PYTHON" benchmarks/gpu_images.py "$WORK" "$IMAGES" --dense

SAVED=$HUGE
[ "$RANKS" -ge 8 ] && SAVED=$G
# A block's temperatures have an element for each head: fewer than there are ranks.
TWIN="$VIT"
[ -z "$DRY" ] && TWIN="--recipe fd_swinv2_base --teacher.source random"
sed 's/"contiguous_gradients": false/"contiguous_gradients": true/' ds_configs/zero3.json \
  >"$WORK/contiguous.json"

# shellcheck disable=SC2086  # The flags are meant to be split.
{
  step save 190 "$PYTHON" benchmarks/gpu_stops.py save "$WORK/save" "$RANKS" --data.root \
    "$WORK/images" --deepspeed_config zero2 --batch.micro_batch_size $G_IMAGES_KEPT \
    --batch.global_batch_size $((G_IMAGES_KEPT * RANKS)) $SAVED
  if [ "$RANKS" -gt 1 ]; then
    step lost 80 "$PYTHON" benchmarks/gpu_stops.py lost "$WORK/lost" "$RANKS" --data.root \
      "$WORK/images" --deepspeed_config zero3 --batch.micro_batch_size $VIT_IMAGES \
      --batch.global_batch_size $((VIT_IMAGES * RANKS)) $VIT
  fi
  train Swin-L_auto 60 auto zero2 auto $LARGE
  chosen=$(sed -n 's/.*"train_micro_batch_size_per_gpu": \([0-9]*\).*/\1/p' \
    "$WORK/run_Swin-L_auto/deepspeed.json")
  train Swin-L_twice 40 auto zero2 $((2 * ${chosen:-1})) $LARGE
  DATA=$WORK/coco UPDATES=20 train HTC 60 auto zero1 2 $HTC --profile 3
  DATA=$WORK/ade UPDATES=20 train UPerNet 50 auto zero1 2 $UPER --profile 3
  if [ "$RANKS" -gt 1 ]; then
    train twin 30 auto zero3 $VIT_IMAGES $TWIN
    train twin_contiguous 30 auto "$WORK/contiguous.json" $VIT_IMAGES $TWIN
  fi
  train ViT-B_zero1 35 auto zero1 $VIT_IMAGES $VIT --profile 3
  train ViT-B_zero1_again 35 auto zero1 $VIT_IMAGES $VIT --profile 3
  train ViT-B_zero3 35 auto zero3 $VIT_IMAGES $VIT
  train ViT-B_teacher_stream 35 auto zero1 $VIT_IMAGES $VIT \
    --teacher.placement replicated --task.distillation.teacher_stream True
}
ends
