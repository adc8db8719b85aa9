#!/usr/bin/env bash
# Are the Triton kernels right on this GPU, and which of them are worth keeping? Ten minutes.
#
#     bash benchmarks/gpu_kernels.sh                 # one GPU
#     FD_DRY_RUN=1 bash benchmarks/gpu_kernels.sh    # every line on CPUs, small
#
# 1. benchmarks/kernels.py --blocks: whole blocks in plain torch, through torch.compile and with our
#    kernels side by side; after each block, which kernels to delete by what was timed so far;
# 2. the tests of the kernels on the card, several processes at once, because they mostly compile;
# 3. benchmarks/kernels.py --quick: single operations beside the bandwidth of a copy.
#
# Writes benchmarks/results/kernels_blocks.json, kernels.json and kernels.png.
source "$(dirname "$0")/gpu_shared.sh"

# tests LIMIT: runs the kernels' tests; a dry run collects them.
tests() {
  local folder=tests/unit/kernels index=0 group
  local groups=(
    "triton_models.py|"
    "triton_residual_norm.py|test_residual_norm"
    "triton_residual_norm.py|test_layer_norm"
    "triton_residual_norm.py|test_add_norm"
    "triton_residual_norm.py|not test_residual_norm and not test_layer_norm and not test_add_norm"
    "triton_window_attention.py|test_windows_of_every_class"
    "triton_window_attention.py|test_windows and not every_class"
    "triton_window_attention.py|not test_windows"
  )
  begins "tests of the kernels" "$1" || return 0
  for group in "${groups[@]}"; do
    index=$((index + 1))
    FD_KERNELS=triton timeout --kill-after=5 "$limit" "$PYTHON" -m pytest -p no:cacheprovider \
      -m "" "$folder/${group%%|*}" -k "${group#*|}" ${DRY:+--collect-only} \
      >"$WORK/tests_$index.txt" 2>&1 &
  done
  wait
  for index in $(seq "${#groups[@]}"); do
    echo "${groups[index - 1]}: $(grep -E "passed|failed|error|collected" "$WORK/tests_$index.txt" |
      tail -n 1 | grep . || { echo "not done in $limit s"; })"
    [ -n "$DRY" ] && ! grep -q "collected" "$WORK/tests_$index.txt" && FAILED=1
  done
}

[ -n "$DRY" ] && export TRITON_INTERPRET=1
step blocks 300 "$PYTHON" benchmarks/kernels.py --blocks ${DRY:+--dry}
tests 150
step kernels 110 "$PYTHON" benchmarks/kernels.py --quick ${DRY:+--dry}
ends
