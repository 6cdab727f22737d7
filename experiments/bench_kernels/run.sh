#!/usr/bin/env bash
# All of this benchmark: kernels one by one, then a whole model beside llama.cpp. About a quarter of an hour.
#
#   experiments/bench_kernels/run.sh MODEL_DIR WORK_DIR
#
# PYTHON is autocomp's interpreter. WORK_DIR gets the GGUF file (93 MB) and node-llama-cpp (90 MB); without
# npm, or on a machine for which npm has no binaries of it, llama.cpp is left out.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=$(cd "$1" && pwd)
mkdir -p "$2/llama"
work=$(cd "$2" && pwd)
python=${PYTHON:-python}
export GOMP_SPINCOUNT=0 HF_HUB_OFFLINE=1
"$python" "$here/bench.py"

gguf=$work/model.gguf
if [ ! -f "$gguf" ]; then
  PYTHONPATH=$here/../smollm2_bitwidths "$python" -c "
import pathlib, sys, get_model
work = pathlib.Path(sys.argv[1])
get_model.download(work).rename(work / 'model.gguf')" "$work"
fi
cp "$here"/llama/* "$work/llama/"
llama=()
# No install scripts: the binaries are in the packages, and nothing is to be compiled or downloaded further.
if npm install --prefix "$work/llama" --ignore-scripts --omit=optional --no-audit --no-fund; then
  llama=(--llama "$work/llama" --gguf "$gguf")
fi
"$python" "$here/decode.py" --model "$model" "${llama[@]}"
