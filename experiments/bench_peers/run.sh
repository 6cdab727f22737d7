#!/usr/bin/env bash
# All of this benchmark: assignments of every tool for three seeds, then their KL on held-out text.
#
#   experiments/bench_peers/run.sh MODEL_DIR WORK_DIR
#
# PYTHON is autocomp's interpreter, PEERS_PYTHON that of an environment made from requirements-peers.txt.
# Takes about two CPU hours; every step that left its file in WORK_DIR is skipped.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=$(cd "$1" && pwd)
mkdir -p "$2"
work=$(cd "$2" && pwd)
python=${PYTHON:-python}
peers=${PEERS_PYTHON:?set PEERS_PYTHON to an interpreter with requirements-peers.txt installed}
export OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 HF_HUB_OFFLINE=1 PYTHONPATH=$here
text=$work/topics.txt
"$python" -c "from pydoc_data import topics; print('\n\n'.join(topics.topics.values()), end='')" >"$text"
budgets=3.5,4,4.5,5,6
for seed in 0 1 2; do
  out=$work/ours_seed$seed.json
  [ -f "$out" ] || "$python" "$here/ours.py" --model "$model" --text "$text" --budgets $budgets --seed $seed --out "$out"
  for tool in modelopt-gradient auto-round; do
    out=$work/${tool}_seed$seed.json
    [ -f "$out" ] || "$peers" "$here/peers.py" --model "$model" --text "$text" --budgets $budgets --tool $tool \
      --seed $seed --out "$out"
  done
done
# One forward pass a layer group and format: two sequences are what the time allows on a CPU.
out=$work/modelopt-kl_seed0.json
[ -f "$out" ] || "$peers" "$here/peers.py" --model "$model" --text "$text" --budgets $budgets --tool modelopt-kl \
  --seed 0 --sequences 2 --out "$out"
"$python" "$here/evaluate.py" "$work"/{ours,modelopt-gradient,auto-round,modelopt-kl}_seed*.json --model "$model" \
  --text "$text" --out "$here/results.json"
