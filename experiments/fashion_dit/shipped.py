"""Samplers as diffusers ships them: each solver's best spacing for each number of steps, and how good it is.

Every option that decides where the steps lie is tried on few images; the best of each solver is measured on
many, from other seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from common import CHECKPOINTS, labels_of, noise_of, reference
from transformers import ResNetForImageClassification

from autocomp.measure.images import fd_estimate

SPACINGS = ("linspace", "leading", "trailing")
SHAPES = ({"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})


def settings(solver: str) -> list[dict[str, Any]]:
    """Keyword options of a scheduler class that are worth trying."""
    if solver == "DDIMScheduler":
        return [{"timestep_spacing": s} for s in SPACINGS]
    multistep = solver == "DPMSolverMultistepScheduler"
    places = (
        [{"timestep_spacing": s} for s in SPACINGS] + list(SHAPES) + [{"use_lu_lambdas": True}] * multistep
    )
    kinds = ([(2, "midpoint"), (2, "heun"), (3, "midpoint")] if multistep
             else [(order, kind) for order in (2, 3) for kind in ("bh1", "bh2")])  # fmt: skip
    found = [
        {"solver_order": n, "solver_type": kind, **place}
        for (n, kind), place in itertools.product(kinds, places)
    ]
    return found + [{"final_sigmas_type": "sigma_min", **place} for place in places]


@torch.inference_mode()
def sample(
    model: Any, scheduler: Any, steps: int, seeds: range, guidance: float, batch: int = 64
) -> torch.Tensor:
    images = []
    for rows in [seeds[i : i + batch] for i in range(0, len(seeds), batch)]:
        x, labels = noise_of(rows), labels_of(rows)
        scheduler.set_timesteps(steps)
        both = torch.cat([labels, torch.full_like(labels, 10)])
        x = x * scheduler.init_noise_sigma
        plan = getattr(scheduler, "schedule", None)  # a searched one may leave out guidance at some steps
        for i, t in enumerate(scheduler.timesteps):
            inputs = scheduler.scale_model_input(torch.cat([x, x]), t)
            given, free = model(inputs, timestep=t.expand(len(both)), class_labels=both).sample.chunk(2)
            scale = guidance if plan is None or plan.steps[i].guidance else 1.0
            x = scheduler.step(free + scale * (given - free), t, x).prev_sample
        images.append(x.clamp(-1, 1))
    return torch.cat(images)


@torch.inference_mode()
def features(extractor: Any, images: torch.Tensor) -> np.ndarray:
    return np.concatenate([extractor.resnet(x).pooler_output.flatten(1).numpy() for x in images.split(500)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 6, 8, 10, 20])
    parser.add_argument("--tune", type=int, default=250)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--guidance", type=float, default=1.2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/shipped.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = CHECKPOINTS / args.model
    model = diffusers.DiTTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.float32
    ).eval()
    extractor = ResNetForImageClassification.from_pretrained(CHECKPOINTS / "classifier").eval()
    real, rows, start = reference(extractor), [], time.time()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for steps in args.steps:
        for solver in ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
            tried = []
            for options in settings(solver):
                try:
                    scheduler = getattr(diffusers, solver).from_pretrained(folder / "scheduler", **options)
                    images = sample(model, scheduler, steps, range(args.tune), args.guidance)
                except (ValueError, NotImplementedError, IndexError, AssertionError) as error:
                    print(f"{solver} {options}: {error}", flush=True)
                    continue
                if torch.isfinite(images).all():
                    tried.append((fd_estimate(features(extractor, images), real).value, options))
            best = min(tried, key=lambda x: x[0])
            scheduler = getattr(diffusers, solver).from_pretrained(folder / "scheduler", **best[1])
            seeds = range(10**6, 10**6 + args.images)
            found = fd_estimate(
                features(extractor, sample(model, scheduler, steps, seeds, args.guidance)), real
            )
            rows.append(
                {"steps": steps, "solver": solver, "options": best[1], "tried": len(tried), "fd": found.value,
                 "stderr": found.stderr, "images": args.images}
            )  # fmt: skip
            print(f"{time.time() - start:.0f} s", rows[-1], flush=True)
            whole = {"model": args.model, "guidance": args.guidance, "rows": rows}
            args.out.write_text(json.dumps(whole, indent=1) + "\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"model": args.model, "guidance": args.guidance, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
