"""Searched schedules against the best shipped ones, on fresh noise that is the same for all.

Reads ``results/shipped.json`` and the run folders of searches (``NAME=RUN``), samples each winner through
diffusers' own scheduler interface, and gives the Frechet distance with its standard error and the difference
to the best shipped solver of as many steps with the standard error of that difference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from common import CHECKPOINTS, reference
from shipped import features, sample
from transformers import ResNetForImageClassification

from autocomp.api import front_of
from autocomp.diffusion.schedule import Schedule
from autocomp.diffusion.scheduler import UnifiedScheduler
from autocomp.job import Job
from autocomp.measure.images import fd_estimate, influence
from autocomp.run_files import read_description
from autocomp.search_spaces.schedules import Schedules

FIRST_SEED = 2 * 10**6


def winner(run: Path) -> Schedule:
    """The schedule of a finished run's best point."""
    job = Job.from_yaml(run / "job.yaml")
    options = next(e["schedules"] for e in job.space if "schedules" in e)
    space = Schedules(Schedules.Config.model_validate(options))
    space.decisions(read_description(run).site)
    found = space.schedule(front_of(run).select("min fd").candidate.values)
    assert found is not None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", help="NAME=RUN_FOLDER")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 6, 8, 10])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/steps.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shipped = json.loads(Path("results/shipped.json").read_text())
    folder = CHECKPOINTS / shipped["model"]
    model = diffusers.DiTTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.float32
    ).eval()
    extractor = ResNetForImageClassification.from_pretrained(CHECKPOINTS / "classifier").eval()
    real, config = (
        reference(extractor),
        dict(diffusers.DDPMScheduler.from_pretrained(folder / "scheduler").config),
    )
    entries: list[tuple[str, int, Any]] = [
        (row["solver"], row["steps"], getattr(diffusers, row["solver"]).from_config(config, **row["options"]))
        for row in shipped["rows"]
        if row["steps"] in args.steps
    ]
    for text in args.runs:
        name, _, run = text.partition("=")
        schedule = winner(Path(run))
        entries.append((name, len(schedule), UnifiedScheduler.of(config, schedule)))
    seeds, rows, effects = range(FIRST_SEED, FIRST_SEED + args.images), [], {}
    for name, steps, scheduler in entries:
        made = features(extractor, sample(model, scheduler, steps, seeds, shipped["guidance"]))
        found = fd_estimate(made, real)
        effects[name, steps] = influence(made, real)
        rows.append({"sampler": name, "steps": steps, "fd": found.value, "stderr": found.stderr})
        best = min(
            (r for r in rows if r["steps"] == steps and r["sampler"] in SHIPPED), key=lambda r: r["fd"]
        )
        apart = effects[name, steps] - effects[best["sampler"], steps]
        rows[-1] |= {"against": best["sampler"], "difference": found.value - best["fd"],
                     "difference_stderr": float(apart.std() / np.sqrt(args.images))}  # fmt: skip
        print(rows[-1], flush=True)
    args.out.write_text(json.dumps({"images": args.images, "rows": rows}, indent=1) + "\n")


SHIPPED = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


if __name__ == "__main__":
    main()
