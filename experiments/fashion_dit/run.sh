#!/usr/bin/env bash
# Everything in this folder: training some 35 minutes, searches and tables some two hours on two cores.
# Latency is measured on an otherwise idle machine.
set -euo pipefail
cd "$(dirname "$0")"
python=../../.venv/bin/python
autocomp=../../.venv/bin/autocomp
runs=../../runs

if [ ! -d checkpoints/small-snapshots ]; then
    $python train_classifier.py
    $python train.py small --snapshots 12
    $python train.py fine
    $python train.py medium
    $python train.py tiny
fi
$python prepare.py

# Few samples that rank as 5,000 do; used by the searches below.
$python flash_eval.py measure
$python flash_eval.py search --repeats 3

# Times, then times and formulas of the steps, against diffusers' solvers with their best spacing.
$python shipped.py
formulas='space.0.schedules.search=[time, order, prediction, corrector, relax]'
with_guidance='space.0.schedules.search=[time, order, prediction, corrector, relax, guidance]'
found=()
for steps in 4 6 8 10; do
    fixed=(-o space.0.schedules.steps=$steps -o workload.dtype=bfloat16 -o workload.data.report=1000 -o validation.promote=5)
    $autocomp search steps.yaml "${fixed[@]}" -o budget.trials=70 --run-dir $runs/steps-$steps-times
    $autocomp search steps.yaml "${fixed[@]}" -o budget.trials=140 -o "$formulas" --run-dir $runs/steps-$steps-solver
    $autocomp search steps.yaml "${fixed[@]}" -o budget.trials=140 -o "$with_guidance" --run-dir $runs/steps-$steps-guidance
    found+=(times=$runs/steps-$steps-times solver=$runs/steps-$steps-solver guidance=$runs/steps-$steps-guidance)
done
$python compare.py "${found[@]}"

$python predictor.py measure
$python predictor.py compare

$autocomp search joint.yaml --run-dir $runs/joint
$autocomp search joint.yaml -o budget.trials=100 --run-dir $runs/only-schedules \
    -o 'space=[{schedules: {slots: 10, min_steps: 4, search: [time, order, corrector]}}]'
$autocomp search joint.yaml -o budget.trials=40 --run-dir $runs/only-attention \
    -o 'space=[{diffusion_attention: {ranges: 2}}]'
$autocomp search joint.yaml -o budget.trials=25 --run-dir $runs/only-weights \
    -o 'space=[{bitwidths: {options: [w4g64, w8g64a, w8g64, w16], granularity: block, method: mse}}]'
$python summary.py fronts joint joint=$runs/joint schedules=$runs/only-schedules attention=$runs/only-attention \
    weights=$runs/only-weights
$python summary.py winner --run $runs/joint --select 'fd <= 4, min image_ms'

$autocomp search attention.yaml --run-dir $runs/image-attention
$python greedy.py
$python summary.py attention --run $runs/image-attention

$python precision.py --images 5000 --steps 10 --front 0
$autocomp search checkpoints.yaml --run-dir $runs/checkpoints
$python summary.py winner --run $runs/checkpoints --select 'min fd' --name checkpoints
$autocomp search models.yaml --run-dir $runs/models
found=()
for name in '' tiny fine medium; do
    $autocomp search models.yaml -o "space.0.schedules.models=['$name']" -o budget.trials=40 \
        --run-dir $runs/model-${name:-small}
    found+=(${name:-small}=$runs/model-${name:-small})
done
$python summary.py fronts models models=$runs/models "${found[@]}" --metrics fd image_ms
