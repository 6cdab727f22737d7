"""Attention plans by the threshold greedy of DiTFastAttn (arXiv 2406.08552, section 3.4), as a baseline.

Step by step and layer by layer, the first rule in a fixed order is taken whose whole-model error at that
step, given all that was decided before, stays under ``theta * (layer + 1) / layers``. Writes one JSON line a
threshold: the plan and the seconds that it took. ``summary.py attention`` measures the plans.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from autocomp.diffusion import attention
from autocomp.diffusion.attention_plan import ImageAttentionPlan
from autocomp.workloads.base import Built
from autocomp.workloads.diffusion import Diffusion
from autocomp.workloads.diffusion_teacher import Call, Trajectories

HERE = Path(__file__).parent
CHECKPOINTS = HERE / "checkpoints"
Rows = dict[str, list[str]]


def workload_of(args: argparse.Namespace) -> Diffusion:
    return Diffusion(
        Diffusion.Config.model_validate(
            {
                "model": str(CHECKPOINTS / args.model),
                "guidance": args.guidance,
                "sampler": {"name": args.sampler, "steps": args.steps},
                "data": {"calibration": args.calibration},
            }
        )
    )  # fmt: skip


def plan_of(rows: Mapping[str, Sequence[str]]) -> ImageAttentionPlan:
    return ImageAttentionPlan.from_json({path: [[label] for label in row] for path, row in rows.items()})


def record(workload: Diffusion, built: Built, rows: Rows) -> list[Call]:
    """The model's calls on the calibration images under ``rows``."""
    attention.install(built.model, plan_of(rows))
    indices, found = workload.indices("calibration"), Trajectories()
    found.begin()
    conditions = built.state["conditions"].of(indices, built.device)
    workload.sampler(built)(workload.noise(built, "calibration", indices), conditions, found.observe)
    return found.batches[0]


def output_at(built: Built, calls: Sequence[Call], rows: Rows, step: int) -> torch.Tensor:
    """The model's output at ``step`` under ``rows``, from the inputs since the last step that was full in all
    layers."""
    attention.install(built.model, plan_of(rows))
    denoiser = built.state["denoisers"][""]
    state = denoiser.state
    state.started += 1
    start = max(s for s in range(step + 1) if s == 0 or all(row[s] == "full" for row in rows.values()))
    output = calls[step].output
    with torch.inference_mode():
        for call in calls[start : step + 1]:
            state.index, state.time, state.total = call.state.index, call.state.time, call.state.total
            state.guided, state.model = call.state.guided, call.state.model
            output = denoiser(call.x, call.model_time, call.conditions)
    return output


def distance(raw: torch.Tensor, found: torch.Tensor) -> float:
    """Mean relative difference, each clipped at 10, over the larger of the two sizes."""
    larger = torch.maximum(raw.abs(), found.abs())
    return float(((raw - found).abs() / (larger + 1e-6)).clamp(max=10).mean())


def greedy(workload: Diffusion, built: Built, options: Sequence[str], theta: float) -> Rows:
    """Labels by layer and step."""
    steps, paths = built.site.steps, [p.path for p in built.site.image_attention]
    rows: Rows = {path: ["full"] * steps for path in paths}
    for step in range(1, steps):
        calls = record(workload, built, rows)  # from here on all is full, as in `raw`
        raw = calls[step].output
        for i, path in enumerate(paths):
            for label in options:
                rows[path][step] = label
                if distance(raw, output_at(built, calls, rows, step)) < theta * (i + 1) / len(paths):
                    break
                rows[path][step] = "full"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="fine")
    parser.add_argument("--sampler", default="dpmsolver++")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.2)
    parser.add_argument("--thetas", type=float, nargs="+", default=[0.025, 0.05, 0.1, 0.2])
    parser.add_argument("--options", nargs="+", default=["reuse", "w12/cfg", "w12", "full/cfg"])
    parser.add_argument("--calibration", type=int, default=8)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "greedy.jsonl")
    args = parser.parse_args()
    workload = workload_of(args)
    built = workload.load("cpu")
    with args.out.open("w") as out:
        for theta in args.thetas:
            started = time.perf_counter()
            rows = greedy(workload, built, args.options, theta)
            seconds = time.perf_counter() - started
            out.write(json.dumps({"theta": theta, "seconds": seconds, "rows": rows}) + "\n")
            out.flush()
            labels = [label for row in rows.values() for label in row]
            print(f"theta {theta}: {dict(Counter(labels))}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
