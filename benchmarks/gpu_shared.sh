# shellcheck shell=bash
# What gpu.sh and gpu_kernels.sh share; they read this file.
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
export FD_GPU_SESSION FD_BENCHMARK_RESULTS=benchmarks/results PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
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
