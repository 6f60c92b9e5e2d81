#!/usr/bin/env bash
# Everything that needs a GPU, most valuable first: the tests marked gpu, then the benchmarks.
#   bash benchmarks/gpu.sh                       tables go to benchmarks/results
#   bash benchmarks/gpu.sh FOLDER language       to another folder, and only one of: tests language ops
# Needs torch, triton, numpy, huggingface_hub, pytest and transformers; neither tyro nor wandb nor deepspeed. Mamba-2 and
# Gated DeltaNet take part where fla is installed. No command takes longer than nine minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
parts=${2:-tests language ops}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
status=0
run() { echo "+ $*"; timeout 540 "$@" || status=1; }
lm() { run python benchmarks/language.py "$2" --device cuda --precision bf16 --csv "$out/language-$1.csv" "${@:3}"; }

tests() { run python -m pytest -q -m gpu tests/kernels tests/models; }
language() {
  lm gpu-nano speed --tokens 65536 --seconds 15 --memory
  lm gpu-xlarge speed --preset xlarge --lengths 2048 --tokens 16384 --seconds 20 --memory --peers ten hten llama_our_head
  lm gpu-xlarge-compiled speed --preset xlarge --lengths 2048 --tokens 16384 --seconds 20 --compile --peers hten llama
  lm gpu-xlarge-decode decode --preset xlarge --prompts 512 8192 --seconds 10 --peers ten hten llama
  lm gpu-medium speed --preset medium --tokens 32768 --seconds 15 --memory
  lm gpu-nano-compiled speed --lengths 2048 --tokens 65536 --seconds 15 --compile
  lm gpu-nano-decode decode --prompts 512 8192 32768 --seconds 10
  lm gpu-bytes speed --vocab bytes --tokens 65536 --seconds 15
}
ops() { run python benchmarks/ops.py --device cuda --csv "$out/ops.csv"; }

for part in $parts; do "$part"; done
exit $status
