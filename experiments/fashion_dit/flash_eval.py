"""Which few (noise, label) pairs rank compressed models as thousands do? FlashEval's question, on this model.

``measure`` samples ``--images`` images with each of ``--configs`` configurations (schedule, solver, weight
bits) into a cache of float16 features. ``search`` looks for subsets on half of the configurations, over
several random halves, and writes how they rank the other half to ``results/flash_eval.json``, and one subset
of a tenth of the images, searched on all configurations, to ``flash_eval_subset.json``: a job's
``data.subset``.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path

import numpy as np
from lab import Lab

from autocomp.diffusion.schedule import Schedule, uniform_schedule
from autocomp.measure.images import Gaussian
from autocomp.predictors.proxy_scores import FrechetScore, MeanScore, Score
from autocomp.predictors.proxy_set import ProxySet, choose_samples
from autocomp.search_spaces.schedules import SOLVERS, SPACINGS, spaced_times

HERE = Path(__file__).parent
WEIGHTS = ("w16", "w8g64", "w6g64", "w4g64", "w3g64")
STEPS = (4, 5, 6, 8, 10, 14, 20)


def configurations(count: int, scheduler: dict[str, object]) -> list[tuple[str, str, Schedule]]:
    """Names, weight schemes and schedules, drawn without replacement, every scheme as often."""
    every = list(product(STEPS, SPACINGS, range(len(SOLVERS))))
    order = np.random.default_rng(0).permutation(len(every))
    found = []
    for i in range(count):
        steps, spacing, solver = every[order[i % len(every)]]
        weights, settings = WEIGHTS[i % len(WEIGHTS)], SOLVERS[solver]
        schedule = uniform_schedule(spaced_times(spacing, steps, scheduler), **settings)  # type: ignore[arg-type]
        found.append((f"{weights}-{steps}-{spacing}-{solver}", weights, schedule))
    return found


def measure(args: argparse.Namespace) -> None:
    """One file for each configuration; those that are there already are kept."""
    lab = Lab(args.checkpoints, args.size)
    args.cache.mkdir(parents=True, exist_ok=True)
    np.savez(args.cache / "real.npz", mean=lab.real.mean, cov=lab.real.cov, n=lab.real.n)
    began = time.time()
    for name, weights, schedule in configurations(args.configs, lab.config):
        path = args.cache / f"{args.images}-{name}.npz"
        if path.is_file():
            continue
        lab.weigh(weights)
        features, right = lab.sample(schedule, args.images)
        np.savez(path, features=features.astype(np.float16), right=right)
        print(f"{name}: {time.time() - began:.0f} s", flush=True)


def load(args: argparse.Namespace) -> dict[str, Score]:
    """The Frechet distance and the share of images seen as their label, of all cached configurations."""
    files = sorted(args.cache.glob(f"{args.images}-*.npz"))
    if len(files) < 6:
        raise SystemExit(
            f"{len(files)} configurations of {args.images} images in {args.cache}: run measure first"
        )
    found = [np.load(f) for f in files]
    real = np.load(args.cache / "real.npz")
    features = np.stack([f["features"] for f in found])
    right = np.stack([f["right"].astype(np.float64) for f in found])
    return {
        "fd": FrechetScore(features, Gaussian(real["mean"], real["cov"], int(real["n"]))),
        "content": MeanScore(right),
    }


def search(args: argparse.Namespace) -> None:
    rows = []
    for metric, score in load(args).items():
        low, high = float(score.full.min()), float(score.full.max())
        print(f"{metric}: {score.models} configurations, {low:.3f} to {high:.3f}", flush=True)
        for share, method in product((10, 20, 50), ("match", "frequency")):
            size = args.images // share
            sets = [choose_samples(score, size, method=method, seed=s, draws=40) for s in range(args.repeats)]  # type: ignore[arg-type]
            rows.append({"metric": metric, "size": size, "method": method, **summary(sets)})
            print(rows[-1], flush=True)
        if metric == "fd":
            best = choose_samples(score, args.images // 10, draws=40, final=True)
            best.save(HERE / "flash_eval_subset.json")
    data = {"images": args.images, "repeats": args.repeats, "results": rows}
    args.out.write_text(json.dumps(data, indent=1) + "\n")


def summary(sets: list[ProxySet]) -> dict[str, float | None]:
    """Means over random halves, and the spread of what counts; none where no half had a value."""
    names = ("tau_train", "tau_test", "random_mean", "random_sd", "random_large", "plain_test")
    found: dict[str, float | None] = {}
    for name in names:
        values = [v for v in (getattr(s, name) for s in sets) if np.isfinite(v)]
        found[name] = round(float(np.mean(values)), 3) if values else None
    return found | {"tau_test_sd": round(float(np.nanstd([s.tau_test for s in sets])), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["measure", "search"])
    parser.add_argument("--checkpoints", type=Path, default=HERE / "checkpoints")
    parser.add_argument("--size", default="small")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--configs", type=int, default=30)
    parser.add_argument("--cache", type=Path, default=HERE / "flash_eval_cache")
    parser.add_argument("--repeats", type=int, default=5, help="random halves of the configurations")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "flash_eval.json")
    args = parser.parse_args()
    {"measure": measure, "search": search}[args.action](args)


if __name__ == "__main__":
    main()
