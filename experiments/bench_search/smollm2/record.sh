#!/usr/bin/env bash
# Some 1,600 measured configurations of SmolLM2's block bits: a third random, a third each by two searchers. Half
# an hour to three quarters on two cores. Needs the model (`make model` in the repository's root).
set -euo pipefail
cd "$(dirname "$0")/.."
autocomp=../../.venv/bin/autocomp
runs=../../runs
for searcher in random evolution hybrid; do
    $autocomp search smollm2/table.yaml -o searcher.name=$searcher --run-dir $runs/table-smollm2-$searcher
done
$autocomp record $runs/table-smollm2-{random,evolution,hybrid} --out smollm2/table.json.gz
