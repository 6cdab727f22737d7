"""Tables and pictures of the searches here, from their run folders; numbers go to ``results/``.

python summary.py joint --joint RUN --schedules RUN --attention RUN --weights RUN
python summary.py attention --run RUN --greedy results/greedy.jsonl
python summary.py winner --run RUN --select "fd <= 3.4, min image_ms"
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autocomp.api import front_of, load
from autocomp.job import Job
from autocomp.journal import read_records
from autocomp.measure.images import fd_estimate, influence
from autocomp.pareto import hypervolume, non_dominated
from autocomp.trial import Fidelity, Trial
from autocomp.worker import open_worker

RESULTS = Path(__file__).parent / "results"
METRICS = ("fd", "image_ms", "memory_mb")


def trials_of(run: Path, split: str) -> list[Trial]:
    trials = [Trial.from_json(r["trial"]) for r in read_records(run) if r["kind"] == "trial"]
    return [t for t in trials if t.ok and t.fidelity.name == split]


def keep(name: str, data: Mapping[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def joint(args: argparse.Namespace) -> None:
    """Fronts on images that no search saw (the selection split), under one reference point."""
    runs = {
        "joint": args.joint,
        "schedules": args.schedules,
        "attention": args.attention,
        "weights": args.weights,
    }
    points = {
        n: np.array([[t.value(m) for m in METRICS] for t in trials_of(r, "selection")])
        for n, r in runs.items()
    }
    every = np.concatenate(list(points.values()))
    corner, ideal = every.max(axis=0) * 1.01, np.array([0.0, 0.0, 0.0])
    volumes = {n: float(hypervolume(p, corner) / np.prod(corner - ideal)) for n, p in points.items()}
    beaten = {
        n: sum(bool(np.any(np.all(points["joint"] <= p, axis=1))) for p in rows[non_dominated(rows)])
        for n, rows in points.items()
    }
    sizes = {n: int(non_dominated(rows).sum()) for n, rows in points.items()}
    box = {"metrics": METRICS, "corner": corner.tolist(), "hypervolume_share": volumes}
    counts = {"front": sizes, "dominated_by_joint": beaten}
    keep("joint", box | counts | {"points": {n: p.tolist() for n, p in points.items()}})
    for name in runs:
        share = f"{beaten[name]} of {sizes[name]} points"
        print(f"{name}: {volumes[name]:.3f} of the box; joint dominates {share}")
    draw(points)


def draw(points: Mapping[str, np.ndarray]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2, sharey=True), (1, 2), ("ms an image", "MB of weights")
    ):
        for (name, rows), marker in zip(points.items(), "osd^"):
            axes.scatter(
                rows[:, column], rows[:, 0], marker=marker, label=name, s=60 if name == "joint" else 28
            )
        axes.set(xlabel=label, xscale="log")
    figure.axes[0].set_ylabel("Frechet distance")
    figure.axes[0].legend()
    figure.savefig(RESULTS / "joint.png", dpi=130)


def attention(args: argparse.Namespace) -> None:
    """Latency and drift of searched plans, of one rule everywhere, and of the greedy threshold's plans."""
    rows = []
    for trial in trials_of(args.run, "report"):
        labels = {str(v) for v in trial.candidate.values.values()}
        name = f"uniform {labels.pop()}" if trial.origin == "baseline" else "searched"
        rows.append({"plan": name, **{m: trial.value(m) for m in ("image_ms", "mse", "psnr", "ssim", "fd")},
                     "fd_stderr": trial.stderr("fd")})  # fmt: skip
    if args.greedy.is_file():
        for line in args.greedy.read_text().splitlines():
            found = json.loads(line)
            metrics = {m: found["metrics"][m][0] for m in ("image_ms", "mse", "psnr", "ssim", "fd")}
            rows.append(
                {"plan": f"greedy {found['theta']}", **metrics, "fd_stderr": found["metrics"]["fd"][1]}
            )
    rows.sort(key=lambda r: r["image_ms"])
    keep("attention", {"rows": rows})
    print("| plan | ms an image | MSE | PSNR | FD |\n|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['plan']} | {r['image_ms']:.2f} | {r['mse']:.5f} | {r['psnr']:.1f} | {r['fd']:.2f} |")


def winner(args: argparse.Namespace) -> None:
    """Export a point, load it, and compare it with the uncompressed model's own sampling."""
    torch.set_num_threads(args.threads)
    trial = front_of(args.run).select(args.select)
    job = Job.from_yaml(args.run / "job.yaml", [f"workload.data.report={args.images}"])
    with open_worker(job, args.threads) as worker, tempfile.TemporaryDirectory() as folder:
        workload, built, out = worker.workload, worker.built, Path(folder) / "winner"
        worker.export(trial.candidate.to_json(), "diffusers", str(out))
        loaded = load(out)
        worker.apply(trial.candidate, serving=True)
        first = torch.cat([x.clone() for _, x in workload.pictures(built, "report", range(64))])
        same = bool(torch.equal(first, loaded.sample(64)))
        times: dict[str, list[float]] = {"winner": [], "uncompressed": []}
        for _ in range(args.repeats):
            for name in times:
                worker.apply(trial.candidate if name == "winner" else worker.uncompressed, serving=True)
                times[name].append(float(workload.time(built)[0]["image_ms"].value))
        features, level = {}, {"name": "report", "split": "report", "sequences": 0, "timing": False}
        for name in times:
            worker.apply(
                trial.candidate if name == "winner" else worker.uncompressed, serving=name == "winner"
            )
            features[name] = workload.features_of(built, Fidelity(**level))
        real = workload.reference(built, "report", args.images)
        loaded.save_grid(RESULTS / "winner.png", 60)
        worker.restore()
    found = {n: fd_estimate(f, real) for n, f in features.items()}
    difference = found["winner"].value - found["uncompressed"].value
    apart = influence(features["winner"], real) - influence(features["uncompressed"], real)
    data = {
        "select": args.select, "candidate": trial.candidate.to_json(), "bit_identical_after_reload": same,
        "image_ms": {n: float(np.median(t)) for n, t in times.items()}, "all_image_ms": times,
        "memory_mb": trial.value("memory_mb"), "images": args.images,
        "fd": {n: [e.value, e.stderr] for n, e in found.items()},
        "fd_difference": [difference, float(apart.std() / len(apart) ** 0.5)],
            }  # fmt: skip
    keep("winner", data)
    print(json.dumps({k: v for k, v in data.items() if k not in ("candidate", "all_image_ms")}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("joint")
    for name in ("joint", "schedules", "attention", "weights"):
        one.add_argument(f"--{name}", type=Path, required=True)
    one.set_defaults(run_part=joint)
    two = parts.add_parser("attention")
    two.add_argument("--run", type=Path, required=True)
    two.add_argument("--greedy", type=Path, default=RESULTS / "greedy.jsonl")
    two.set_defaults(run_part=attention)
    three = parts.add_parser("winner")
    three.add_argument("--run", type=Path, required=True)
    three.add_argument("--select", required=True)
    three.add_argument("--images", type=int, default=5000)
    three.add_argument("--threads", type=int, default=1)
    three.add_argument("--repeats", type=int, default=3)
    three.set_defaults(run_part=winner)
    args = parser.parse_args()
    args.run_part(args)


if __name__ == "__main__":
    main()
