"""Attention plans by the threshold greedy of DiTFastAttn (arXiv 2406.08552, section 3.4), as a baseline.

Step by step and layer by layer, the first rule in a fixed order is taken whose whole-model error at that
step, given all that was decided before, stays under ``theta * (layer + 1) / layers``. Writes one JSON line a
threshold: the plan, its quality on the proxy split and its latency.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autocomp.diffusion import attention
from autocomp.diffusion.attention_plan import ImageAttentionPlan
from autocomp.trial import Fidelity
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
                "sampler": {"name": "ddim", "steps": args.steps},
                "features": str(CHECKPOINTS / "classifier"),
                "data": {
                    "real": str(CHECKPOINTS / "real.npz"), "calibration": args.calibration,
                    "proxy": args.images, "selection": args.images, "report": args.images,
                },
                "scenario": {"batch": args.batch, "threads": args.threads, "repeats": args.repeats},
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


def measured(workload: Diffusion, built: Built, rows: Rows) -> dict[str, Any]:
    """Quality and latency of a plan."""
    attention.remove(built.model)
    built.changed.discard("attention")
    level = Fidelity("proxy", "proxy", 0, timing=False)
    workload.ensure_teacher(built, level.split, level.sequences)
    attention.install(built.model, plan_of(rows))
    built.changed.add("attention")
    found = {**workload.score(built, level)[0], **workload.time(built)[0]}
    attention.remove(built.model)
    built.changed.discard("attention")
    return {name: [estimate.value, estimate.stderr] for name, estimate in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="fine")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.2)
    parser.add_argument("--thetas", type=float, nargs="+", default=[0.025, 0.05, 0.1, 0.2])
    parser.add_argument("--options", nargs="+", default=["reuse", "w12/cfg", "w12", "full/cfg"])
    parser.add_argument("--calibration", type=int, default=8)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "greedy.jsonl")
    args = parser.parse_args()
    workload = workload_of(args)
    built = workload.load("cpu")
    full = {p.path: ["full"] * args.steps for p in built.site.image_attention}
    with args.out.open("w") as out:
        for theta in [0.0, *args.thetas]:
            started = time.perf_counter()
            rows = greedy(workload, built, args.options, theta) if theta else full
            record_ = {
                "theta": theta, "seconds": time.perf_counter() - started, "rows": rows,
                "counts": {label: sum(row.count(label) for row in rows.values())
                           for label in ("full", *args.options)},
                "metrics": measured(workload, built, rows),
            }  # fmt: skip
            out.write(json.dumps(record_) + "\n")
            out.flush()
            shown = {m: round(record_["metrics"][m][0], 5) for m in ("mse", "fd", "noise", "image_ms")}
            print(f"theta {theta}: {record_['counts']}, {shown}, {record_['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
