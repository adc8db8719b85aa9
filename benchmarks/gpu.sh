#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes on one card; the table comes last.
#
#     bash benchmarks/gpu.sh             FD_GPU_DRY=1 bash benchmarks/gpu.sh   # the plan alone
#
# 1. the tests of the Triton kernels, on the card;
# 2. training steps through fd_large/train.py: SwinV2-G (3.0B) with a random 3.0B teacher, every block
#    checkpointed, by each fused Adam that is there, then in modes that keep more; ViT-B and Swin-B
#    with the fused kernels and with plain torch;
# 3. benchmarks/kernels.py.
#
# MFU counts the student's forward and backward and the teacher's forward over the card's peak (989
# TFLOP/s for an H100, bfloat16), the optimiser's time included, recomputation not credited:
# fd_large/plan/utilisation.py. A run's figure is the median over its updates from the fourth on.
# Runs are killed once they have enough updates, so that none writes its 50 GB checkpoint.
# Writes benchmarks/results/gpu.json, kernels.json and kernels.png.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
DRY=${FD_GPU_DRY:-}
BUDGET=${FD_GPU_SECONDS:-525}
UPDATES=12
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

left() { echo $((BUDGET - SECONDS)); }

# step NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, or for what is left.
step() {
  local name=$1 limit=$2
  shift 2
  if [ -n "$DRY" ]; then
    printf '%4s s  %-34s %s\n' "$limit" "$name" "$*"
    return
  fi
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  if [ "$limit" -lt 15 ]; then
    echo "== $name: no time left"
    return
  fi
  echo "== $name (at $SECONDS s, at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$WORK/$name.log" 2>&1
  local code=$?
  tail -n 4 "$WORK/$name.log"
  echo "$name $code" >>"$WORK/codes"
}

# train NAME LIMIT KERNELS FLAGS...: a run until it has UPDATES rows of metrics, then killed.
train() {
  local name=$1 limit=$2 kernels=$3
  shift 3
  local folder=$WORK/run_$name
  local command=("$PYTHON" fd_large/train.py --deepspeed_config ds_configs/zero1.json "$@"
    --teacher.source random --data.root "$WORK/pictures" --runtime.run_dir "$folder"
    --runtime.log_every 1 --runtime.save_every 100000 --optim.max_steps 100000
    --optim.warmup_epochs 0)
  if [ -n "$DRY" ]; then
    printf '%4s s  %-34s FD_KERNELS=%s %s\n' "$limit" "$name" "$kernels" "${command[*]}"
    return
  fi
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  if [ "$limit" -lt 15 ]; then
    echo "== $name: no time left"
    return
  fi
  echo "== $name (at $SECONDS s, at most $limit s)"
  local until=$((SECONDS + limit))
  # A group of its own, so that its loader's workers end with it.
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
    echo "gpu.sh: no CUDA device here; FD_GPU_DRY=1 prints what would run."
    exit 0
  fi
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
  "$PYTHON" - "$WORK/pictures" <<'PY'
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

G="--recipe fd_swinv2g --batch.global_batch_size 32 --batch.micro_batch_size 32 --teacher.placement replicated"
EVERY="--student.activation_checkpointing every"
OFF="--student.activation_checkpointing off"
VIT="--recipe fd_clip_vit_base --batch.global_batch_size 128 --batch.micro_batch_size 128"
SWIN="--recipe fd_esvit_swin_base --batch.global_batch_size 64 --batch.micro_batch_size 64"

# shellcheck disable=SC2086,SC2046  # Words of the flags are meant to be split.
{
  step kernel_tests 100 env FD_KERNELS=triton "$PYTHON" -m pytest -p no:cacheprovider \
    $(ls tests/unit/kernels/triton_*.py)
  train G_every_block_deepspeed 110 triton $G $EVERY --optim.fused deepspeed
  train G_every_block_apex 60 triton $G $EVERY --optim.fused apex
  train G_every_block_torch 60 triton $G $EVERY --optim.fused torch
  train G_every_block_reference 60 reference $G $EVERY --optim.fused auto
  train G_every_second_block 60 triton $G $EVERY --student.checkpoint_every 2
  train G_keeps_all_8_images 60 triton ${G//32/8} $OFF
  step kernels 90 "$PYTHON" benchmarks/kernels.py --quick
  train ViT-B_fused 35 triton $VIT
  train ViT-B_plain 35 reference $VIT
  train Swin-B_fused 35 triton $SWIN
  train Swin-B_plain 35 reference $SWIN
}
[ -n "$DRY" ] && {
  echo "All of it within $BUDGET s: a step gets its seconds or what is left, in this order."
  exit 0
}

[ -f "$WORK/kernels.log" ] && cat "$WORK/kernels.log"
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
    if log.stem in ("kernels", "kernel_tests"):
        continue
    found = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    timed = found[3:]
    row = {"run": log.stem, "updates": len(found)}
    if timed:
        for key in ("images_per_second", "mfu", "hardware_utilisation", "data_wait"):
            values = [line[key] for line in timed if line.get(key) is not None]
            row[key] = statistics.median(values) if values else None
        row["memory_gigabytes"] = timed[-1]["memory_bytes"] / 1e9
        row["chosen"] = re.findall(r"(?:optimiser: .*|\S+ on cuda: .*)", text)
    else:
        row["failed"] = (text.strip().splitlines() or ["no output"])[-1][:200]
    rows.append(row)
codes = dict(line.split() for line in (work / "codes").read_text().splitlines())
tests = (work / "kernel_tests.log").read_text().strip().splitlines()[-1]
result = {
    "command": "bash benchmarks/gpu.sh",
    "machine": torch.cuda.get_device_name(),
    "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
    "seconds": int(sys.argv[2]),
    "kernel_tests": tests,
    "runs": rows,
}
Path("benchmarks/results/gpu.json").write_text(json.dumps(result, indent=1) + "\n")
print(f"\n{result['machine']}, torch {torch.__version__}, {sys.argv[2]} s; exit codes {codes}")
print(f"kernel tests: {tests}\n")
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
