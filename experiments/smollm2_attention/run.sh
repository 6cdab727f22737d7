#!/usr/bin/env bash
# Everything in this folder: some 75 minutes on two cores. Latency is measured on an otherwise idle machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=experiments/smollm2_attention
bin=.venv/bin
for job in group group25 layer layer25 joint weights spans kv; do
    $bin/autocomp search $here/$job.yaml --run-dir runs/attention-$job
done
$bin/python $here/summary.py quality --group runs/attention-group \
    --group25 runs/attention-group25 --layer runs/attention-layer --layer25 runs/attention-layer25
$bin/python $here/summary.py joint --joint runs/attention-joint --weights runs/attention-weights \
    --spans runs/attention-spans --kv runs/attention-kv
$bin/python $here/latency.py --plan "per group 50%=$here/plans/group_0.5.json" "per group 25%=$here/plans/group_0.25.json"
$bin/python $here/summary.py latency
