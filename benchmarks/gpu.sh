#!/usr/bin/env bash
# Everything that needs a GPU, most valuable first: the tests marked gpu, then the benchmarks.
#   bash benchmarks/gpu.sh [FOLDER]        tables go to FOLDER, benchmarks/results by default
# Needs torch, triton, numpy, huggingface_hub and pytest; neither tyro nor wandb nor deepspeed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
status=0
run() { echo "+ $*"; timeout 540 "$@" || status=1; }
run python -m pytest -q -m gpu tests/kernels tests/models
run python benchmarks/ops.py --device cuda --csv "$out/ops.csv"
exit $status
