#!/usr/bin/env bash
# Measures everything that needs a GPU, in under ten minutes on one card; prints a table at the end.
#
#     bash benchmarks/gpu.sh
#     FD_GPU_DRY=1 bash benchmarks/gpu.sh    # prints what would run
#
# 1. the tests of the Triton kernels on the card, several processes at once, because they mostly
#    compile; DeepSpeed's fused Adam is built at the same time;
# 2. benchmarks/kernels.py --blocks: whole blocks in plain torch, through torch.compile and with our
#    kernels side by side, and which kernels to delete;
# 3. a step of 3.0B parameters by each fused AdamW that is installed;
# 4. training steps through fd_large/train.py: SwinV2-G (3.0B) with a random 3.0B teacher, with every
#    block checkpointed and with none; ViT-B and Swin-B with the fused kernels and with plain torch,
#    ViT-B also with its teacher on a stream of its own; last, SwinV2-G with plain torch;
# 5. benchmarks/kernels.py: single operations.
#
# Most of the time of a SwinV2-G run passes before its first step, because 6.0B random numbers are
# drawn on the CPU.
#
# MFU is the student's forward and backward and the teacher's forward over the card's peak (989
# TFLOP/s for an H100, bfloat16); the time includes the optimizer, and recomputation does not count
# (fd_large/plan/utilisation.py). A run's figure is the median over its steps from the fourth on.
# Runs are killed once they have enough steps, so that none writes its 50 GB checkpoint. Writes
# benchmarks/results/gpu.json, kernels_blocks.json, kernels.json and kernels.png.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
DRY=${FD_GPU_DRY:-}
BUDGET=${FD_GPU_SECONDS:-570}
UPDATES=12
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

left() { echo $((BUDGET - SECONDS)); }

# begins NAME LIMIT: sets `limit` to LIMIT seconds, or the time that is left, and says what begins;
# fails where too little is left.
begins() {
  limit=$2
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  if [ "$limit" -lt 15 ]; then
    echo "== $1: no time left"
    return 1
  fi
  echo "== $1 (at $SECONDS s, at most $limit s)"
}

# step NAME LIMIT COMMAND...: runs COMMAND for at most LIMIT seconds, or the time that is left.
step() {
  local name=$1 limit=$2
  shift 2
  if [ -n "$DRY" ]; then
    printf '%4s s  %-34s %s\n' "$limit" "$name" "$*"
    return
  fi
  begins "$name" "$limit" || return 0
  timeout --kill-after=5 "$limit" "$@" >"$WORK/$name.log" 2>&1 || echo "exit code $?"
  tail -n 4 "$WORK/$name.log"
}

# tests LIMIT: runs the kernels' tests and builds an optimizer, at the same time.
tests() {
  local limit=$1 folder=tests/unit/kernels index=0
  local groups=(
    "triton_models.py|"
    "triton_residual_norm.py|test_residual_norm"
    "triton_residual_norm.py|test_layer_norm"
    "triton_residual_norm.py|test_add_norm"
    "triton_residual_norm.py|not test_residual_norm and not test_layer_norm and not test_add_norm"
    "triton_window_attention.py|test_windows and not large_nets"
    "triton_window_attention.py|large_nets or largest_scale"
    "triton_window_attention.py|not test_windows and not largest_scale"
  )
  if [ -n "$DRY" ]; then
    printf '%4s s  %s\n' "$limit" "tests of the kernels, ${#groups[@]} processes at once:"
    printf '          %s\n' "${groups[@]}"
    return
  fi
  echo "== tests of the kernels (at $SECONDS s, at most $limit s)"
  for group in "${groups[@]}"; do
    index=$((index + 1))
    FD_KERNELS=triton timeout --kill-after=5 "$limit" "$PYTHON" -m pytest -p no:cacheprovider -m "" \
      "$folder/${group%%|*}" -k "${group#*|}" >"$WORK/tests_$index.txt" 2>&1 &
  done
  timeout --kill-after=5 "$limit" "$PYTHON" -c \
    'from deepspeed.ops.op_builder import FusedAdamBuilder; FusedAdamBuilder().load()' \
    >"$WORK/build.txt" 2>&1 &
  wait
  for index in $(seq "${#groups[@]}"); do
    grep -E "passed|failed|error" "$WORK/tests_$index.txt" | tail -n 1 |
      sed "s#^#${groups[index - 1]}: #" >>"$WORK/tests"
    grep -qE "passed|failed|error" "$WORK/tests_$index.txt" ||
      echo "${groups[index - 1]}: not done in $limit s" >>"$WORK/tests"
  done
  cat "$WORK/tests"
}

# train NAME LIMIT KERNELS CONFIG FLAGS...: trains until there are UPDATES rows of metrics.
train() {
  local name=$1 limit=$2 kernels=$3 config=$4
  shift 4
  local folder=$WORK/run_$name
  local command=("$PYTHON" fd_large/train.py --deepspeed_config "ds_configs/$config.json" "$@"
    --teacher.source random --data.root "$WORK/images" --runtime.run_dir "$folder"
    --runtime.log_every 1 --runtime.save_every 100000 --optim.max_steps 100000
    --optim.warmup_epochs 0)
  if [ -n "$DRY" ]; then
    printf '%4s s  %-34s FD_KERNELS=%s %s\n' "$limit" "$name" "$kernels" "${command[*]}"
    return
  fi
  begins "$name" "$limit" || return 0
  local until=$((SECONDS + limit))
  # In a process group of its own, so that its loader workers are killed with it.
  FD_KERNELS=$kernels setsid "${command[@]}" >"$WORK/$name.log" 2>&1 &
  local group=$!
  while kill -0 "$group" 2>/dev/null && [ $SECONDS -lt $until ]; do
    [ "$(cat "$folder/metrics.jsonl" 2>/dev/null | wc -l)" -ge $UPDATES ] && break
    sleep 1
  done
  kill -KILL -- "-$group" 2>/dev/null
  wait "$group" 2>/dev/null
  tail -n 2 "$WORK/$name.log"
}

if [ -z "$DRY" ]; then
  if ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    echo "gpu.sh: no CUDA device; FD_GPU_DRY=1 prints what would run."
    exit 0
  fi
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
  "$PYTHON" - "$WORK/images" <<'PY'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

folder = Path(sys.argv[1]) / "noise"
folder.mkdir(parents=True)
draws = np.random.default_rng(0)
for i in range(512):
    low = draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(low).resize((256, 256), Image.BICUBIC).save(folder / f"{i:03}.jpg")
PY
fi

cat >"$WORK/adam.py" <<'PY'
"""Prints the milliseconds of a step of SwinV2-G's masters by each fused AdamW."""

import sys
from dataclasses import replace

import torch

sys.path.insert(0, ".")
from fd_large.engine.zero.optimizer import make_optimizer
from fd_large.errors import ConfigError
from fd_large.cli.plan import workload
from fd_large.recipes import registry

run = registry.get("fd_swinv2g")
masters = [torch.zeros(n, device="cuda", requires_grad=True) for n in workload(run).student_sizes]
for master in masters:
    master.grad = torch.full_like(master, 1e-3)
for kind in ("deepspeed", "apex", "torch"):
    try:
        optimizer = make_optimizer([{"params": masters}], replace(run.optim, fused=kind), on_gpu=True)
    except ConfigError as error:
        print(f"{kind}: did not run: {error}")
        continue
    times = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        optimizer.step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    print(f"{kind}: {sorted(times[1:])[2]:.1f} ms for {sum(m.numel() for m in masters) / 1e9:.2f}B")
    optimizer.state.clear()
    del optimizer
PY

G="--recipe fd_swinv2g --teacher.placement replicated"
EVERY="--student.activation_checkpointing every --batch.global_batch_size 32 --batch.micro_batch_size 32"
OFF="--student.activation_checkpointing off --batch.global_batch_size 16 --batch.micro_batch_size 16"
VIT="--recipe fd_clip_vit_base --batch.global_batch_size 128 --batch.micro_batch_size 128"
SWIN="--recipe fd_esvit_swin_base --batch.global_batch_size 64 --batch.micro_batch_size 64"

# shellcheck disable=SC2086  # The flags are meant to be split.
{
  tests 90
  step blocks 150 "$PYTHON" benchmarks/kernels.py --blocks
  step adam 30 "$PYTHON" "$WORK/adam.py"
  train G_every_block 110 triton zero2 $G $EVERY
  train G_keeps_all 90 triton zero2 $G $OFF
  step kernels 60 "$PYTHON" benchmarks/kernels.py --quick
  train ViT-B_fused 30 triton zero1 $VIT
  train ViT-B_teacher_stream 30 triton zero1 $VIT --task.distillation.teacher_stream true
  train ViT-B_plain 30 reference zero1 $VIT
  train Swin-B_fused 30 triton zero1 $SWIN
  train Swin-B_plain 30 reference zero1 $SWIN
  train G_every_block_plain 90 reference zero2 $G $EVERY
}
[ -n "$DRY" ] && {
  echo "All within $BUDGET s: each part gets its seconds or the time that is left, in this order."
  exit 0
}

for log in blocks kernels; do
  [ -f "$WORK/$log.log" ] && cat "$WORK/$log.log"
done
"$PYTHON" - "$WORK" "$SECONDS" <<'PY'
import json
import re
import statistics
import sys
from pathlib import Path

import torch

work, rows = Path(sys.argv[1]), []
for log in sorted(work.glob("*.log"), key=lambda path: path.stat().st_mtime):
    metrics = work / f"run_{log.stem}" / "metrics.jsonl"
    text = log.read_text(errors="replace")
    if log.stem in ("blocks", "kernels", "adam"):
        continue
    found = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    timed = found[3:]
    row = {"run": log.stem, "updates": len(found)}
    if timed:
        for key in ("images_per_second", "mfu", "hardware_utilisation", "data_wait"):
            values = [line[key] for line in timed if line.get(key) is not None]
            row[key] = statistics.median(values) if values else None
        row["memory_gigabytes"] = timed[-1]["memory_bytes"] / 1e9
        row["chosen"] = re.findall(r"(?:optimi[sz]er: .*|\S+ on cuda: .*)", text)
    else:
        row["failed"] = (text.strip().splitlines() or ["no output"])[-1][:200]
    rows.append(row)
tests, adam = (
    path.read_text().splitlines() if path.exists() else ["did not run"]
    for path in (work / "tests", work / "adam.log")
)
adam = [line for line in adam if line.startswith(("deepspeed:", "apex:", "torch:", "did not"))]
result = {
    "command": "bash benchmarks/gpu.sh",
    "machine": torch.cuda.get_device_name(),
    "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
    "seconds": int(sys.argv[2]),
    "kernel_tests": tests,
    "adam": adam,
    "runs": rows,
}
Path("benchmarks/results/gpu.json").write_text(json.dumps(result, indent=1) + "\n")
print(f"\n{result['machine']}, torch {torch.__version__}, {sys.argv[2]} s")
print("kernel tests:", *tests, sep="\n  ")
print("AdamW:", *adam, "", sep="\n  ")
print(f"{'run':26} {'images/s':>9} {'MFU':>7} {'hardware':>9} {'waited':>7} {'memory':>8}")
for row in rows:
    if "failed" in row:
        print(f"{row['run']:26} did not run: {row['failed']}")
        continue
    share = {k: "-" if row[k] is None else f"{100 * row[k]:.1f}%"
             for k in ("mfu", "hardware_utilisation", "data_wait")}
    print(f"{row['run']:26} {row['images_per_second']:9.1f} {share['mfu']:>7} "
          f"{share['hardware_utilisation']:>9} {share['data_wait']:>7} "
          f"{row['memory_gigabytes']:5.1f} GB")
PY
