#!/usr/bin/env bash
# Everything that needs a GPU, most valuable first: the tests marked gpu, then the ops, the molecule and the language models.
#   bash benchmarks/gpu.sh                       tables go to benchmarks/results
#   bash benchmarks/gpu.sh FOLDER "ops tests"    to another folder, and only some of: tests ops molecule language
# Run it again after an interruption: what FOLDER has of the same sources is not done again. No command takes longer than
# nine minutes. Needs torch, triton, numpy, huggingface_hub, pytest and transformers; neither tyro nor wandb nor deepspeed.
# Peers that are not installed are rows that say so (pip install -e ".[bench]").
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
parts=${2:-tests ops molecule language}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
sources=$(find benchmarks kernels models tasks tests -name '*.py' -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c1-12)
status=0
run() { echo "+ $*"; timeout 540 "$@" || { status=1; return 1; }; }
once() { # a name, and a command that leaves nothing to go on from
  if grep -qsxF "$sources $1" "$out/gpu-done.txt"; then echo "$1: done"; return; fi
  run "${@:2}" && echo "$sources $1" >>"$out/gpu-done.txt"
}

tests() {
  once test-kernels python -m pytest -q -m "gpu and not slow" tests/kernels
  once test-models python -m pytest -q -m "gpu and not slow" tests/models
  if python -c "import tyro" 2>/dev/null; then
    once test-resume python -m pytest -q -m gpu tests/train/test_gpu.py
  else
    echo "exact resume is not tested: there is no tyro"
  fi
}

# ops.py itself goes on where its table ends.
op() { run python benchmarks/ops.py --device cuda --csv "$out/ops-gpu.csv" --png --op "$1" --shape "${2:-}"; }
ops() {
  op linear_cross_entropy "N 4096, D 4096, V 128256"
  op linear_cross_entropy "N 8192, D 2304, V 256000"
  op eigen_scan "B 16, T 4096"
  op masked_cross_entropy "N 49152, C 900"
  op neighbor_cross_entropy
  op multiscale_pool
  op linear_cross_entropy "D 512"
  op eigen_scan "T 32768"
  op eigen_scan "T 2048"
  op linear_cross_entropy "N 2048, D 4096"
  op linear_cross_entropy "D 768"
  op linear_cross_entropy "V 32000"
  op masked_cross_entropy "N 262144"
  op masked_cross_entropy "C 144"
  op masked_cross_entropy "C 4096"
  op eigen_scan "T 65536"
}

molecule() {
  once molecule python benchmarks/molecule.py --device cuda --batch 256 4096 65536 --csv "$out/molecule-gpu.csv"
}

lm() { once "language-$1" python benchmarks/language.py "$2" --device cuda --precision bf16 --csv "$out/language-$1.csv" "${@:3}"; }
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

for part in $parts; do "$part"; done
exit $status
