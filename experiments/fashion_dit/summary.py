"""Tables and pictures of the searches here, from their run folders; numbers go to ``results/``.

python summary.py fronts joint joint=RUN schedules=RUN attention=RUN weights=RUN
python summary.py attention --run RUN --greedy results/greedy.jsonl
python summary.py winner --run RUN --select "fd <= 4, min image_ms"
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autocomp.api import front_of, load
from autocomp.job import Job
from autocomp.journal import read_records
from autocomp.measure.images import fd_estimate, influence
from autocomp.pareto import hypervolume, non_dominated
from autocomp.space import Candidate
from autocomp.trial import Fidelity, Trial
from autocomp.worker import ModelWorker, open_worker

RESULTS = Path(__file__).parent / "results"
METRICS = ("fd", "image_ms", "memory_mb")
LABELS = {"fd": "Frechet distance", "image_ms": "ms an image", "memory_mb": "MB of weights and caches"}


def trials_of(run: Path, split: str) -> list[Trial]:
    trials = [Trial.from_json(r["trial"]) for r in read_records(run) if r["kind"] == "trial"]
    return [t for t in trials if t.ok and t.fidelity.name == split]


def keep(name: str, data: Mapping[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def fronts(args: argparse.Namespace) -> None:
    """The fronts of several searches, measured anew in one process, under one reference point.

    Front points of the selection split are sampled from fresh noise that is the same for all, and timed in
    turns, both through the kernels that serve them. What a run has not searched is as in the uncompressed
    model.
    """
    torch.set_num_threads(args.threads)
    runs = {name: Path(run) for name, _, run in (text.partition("=") for text in args.runs)}
    job = Job.from_yaml(next(iter(runs.values())) / "job.yaml", [f"workload.data.report={args.images}"])
    found: list[tuple[str, Trial | None]] = [("uncompressed", None)]
    found += [(name, trial) for name, run in runs.items() for trial in front(run, args.metrics)]
    with open_worker(job, args.threads) as worker:
        plain = worker.uncompressed
        candidates = [plain.replace(t.candidate.values) if t else plain for _, t in found]
        rows = compared(worker, candidates, args.images, args.rounds)
    for row, (name, _) in zip(rows, found, strict=True):
        row["search"] = name
    keep(args.name, {"images": args.images, "rows": rows} | volumes(rows, args.metrics))
    draw(rows, args.metrics, RESULTS / f"{args.name}.png")


def front(run: Path, metrics: Sequence[str]) -> list[Trial]:
    """Front points of a run on the selection split."""
    trials = trials_of(run, "selection")
    losses = np.array([[t.value(m) for m in metrics] for t in trials])
    return [t for t, best in zip(trials, non_dominated(losses), strict=True) if best]


def compared(
    worker: ModelWorker, candidates: Sequence[Candidate], images: int, rounds: int
) -> list[dict[str, Any]]:
    """Frechet distance on ``images`` fresh images, milliseconds an image (in ``rounds`` turns), bytes."""
    workload, built = worker.workload, worker.built
    times = timed_in_turns(worker, candidates, rounds)
    real, level = workload.reference(built, "report", images), Fidelity("report", "report", 0, False)
    rows, features = [], []
    for candidate, measured in zip(candidates, times, strict=True):
        worker.apply(candidate, serving=True)
        features.append(workload.features_of(built, level))
        fd, apart = fd_estimate(features[-1], real), influence(features[-1], real)
        apart_stderr = float((apart - influence(features[0], real)).std() / images**0.5)
        exact = workload.exact(built, worker.exact(candidate))
        rows.append(
            {
                "fd": fd.value, "fd_stderr": fd.stderr, "fd_difference_stderr": apart_stderr,
                "image_ms": float(np.median(measured)), "image_ms_all": measured,
                "memory_mb": exact["memory_mb"].value, "candidate": candidate.to_json(),
            }
        )  # fmt: skip
        print({k: v for k, v in rows[-1].items() if k in METRICS}, flush=True)
    worker.restore()
    return rows


def volumes(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """Shares of one box that the searches' points dominate, and how many points of each the first one does.

    The box reaches from the best value of each metric to 1 % beyond its worst, on logarithmic axes.
    """
    names = [n for n in dict.fromkeys(r["search"] for r in rows) if n != "uncompressed"]
    losses = {n: np.log([[r[m] for m in metrics] for r in rows if r["search"] == n]) for n in names}
    every = np.concatenate(list(losses.values()))
    corner, ideal = every.max(axis=0) + 0.01, every.min(axis=0)
    size, (first, *others) = float(np.prod(corner - ideal)), names
    shares = {n: hypervolume(p, corner) / size for n, p in losses.items()}
    shares["all but the first"] = hypervolume(np.concatenate([losses[n] for n in others]), corner) / size
    ours = losses[first]
    beaten = {n: sum(bool(np.any(np.all(ours <= p, axis=1))) for p in losses[n]) for n in others}
    sizes = {n: len(p) for n, p in losses.items()}
    print(f"| search | points | dominated by {first} | share of the box |\n|---|---:|---:|---:|")
    for name, share in shares.items():
        print(f"| {name} | {sizes.get(name, '')} | {beaten.get(name, '')} | {share:.3f} |")
    box = {"metrics": list(metrics), "corner": np.exp(corner).tolist(), "ideal": np.exp(ideal).tolist()}
    return {"box": box, "hypervolume_share": shares, "points": sizes, "dominated_by_first": beaten}


def draw(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], out: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(4.5 * (len(metrics) - 1), 4), layout="constrained")
    sides = np.ravel(figure.subplots(1, len(metrics) - 1, sharey=True))
    for axes, metric in zip(sides, metrics[1:], strict=True):
        for name, marker in zip(dict.fromkeys(r["search"] for r in rows), "*osd^v<>"):
            mine = [r for r in rows if r["search"] == name]
            axes.scatter(
                [r[metric] for r in mine], [r[metrics[0]] for r in mine], marker=marker, label=name,
                s=60 if name == "uncompressed" else 30,
            )  # fmt: skip
        axes.set(xlabel=LABELS.get(metric, metric), xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    sides[0].set_ylabel(LABELS[metrics[0]])
    sides[0].legend()
    figure.savefig(out, dpi=130)


def attention(args: argparse.Namespace) -> None:
    """Searched plans, one rule everywhere, and the greedy threshold's plans, in one process: drift from the
    uncompressed model on fresh noise that is the same for all, and latency in turns."""
    torch.set_num_threads(args.threads)
    job = Job.from_yaml(args.run / "job.yaml", [f"workload.data.report={args.images}"])
    metrics = ("mse", "psnr", "ssim", "content", "fd")
    with open_worker(job, args.threads) as worker:
        plans = {"full": worker.uncompressed}
        uniform = [t.candidate for t in trials_of(args.run, "report") if t.origin == "baseline"]
        plans |= {f"{set(c.values.values()).pop()} everywhere": c for c in uniform}
        for trial in trials_of(args.run, "selection"):
            plans.setdefault(f"searched #{trial.number}", trial.candidate)
        plans |= greedy_plans(args.greedy, worker.uncompressed)
        times = timed_in_turns(worker, list(plans.values()), args.rounds)
        rows: list[dict[str, Any]] = []
        for (name, candidate), measured in zip(plans.items(), times, strict=True):
            worker.ensure_teacher(level := Fidelity("report", "report", 0, False))
            worker.apply(candidate, serving=True)
            found = worker.workload.score(worker.built, level)[0]
            rows.append({"plan": name, "image_ms": float(np.median(measured)), "image_ms_all": measured})
            rows[-1] |= {m: found[m].value for m in metrics} | {
                f"{m}_stderr": found[m].stderr for m in metrics
            }
            rows[-1]["candidate"] = candidate.to_json()
            print({k: v for k, v in rows[-1].items() if k in ("plan", "image_ms", *metrics)}, flush=True)
        worker.restore()
    rows.sort(key=lambda r: r["image_ms"])
    keep("attention", {"images": args.images, "rows": rows})
    print("| plan | ms an image | MSE | PSNR | FD |\n|---|---:|---:|---:|---:|")
    for r in rows:
        mse = f"{r['mse']:.5f} ± {r['mse_stderr']:.5f}"
        print(f"| {r['plan']} | {r['image_ms']:.2f} | {mse} | {r['psnr']:.1f} | {r['fd']:.2f} |")


def greedy_plans(path: Path, full: Candidate) -> dict[str, Candidate]:
    """The plans of ``greedy.py``; the first step is full in all of them, as the space has it."""
    plans = {}
    for found in map(json.loads, path.read_text().splitlines()):
        labels = {
            f"diffusion_attention/{layer}.{step}": label
            for layer, row in found["rows"].items()
            for step, label in enumerate(row)
            if step
        }
        plans[f"greedy, threshold {found['theta']}"] = full.replace(labels)
    return plans


def timed_in_turns(worker: ModelWorker, candidates: Sequence[Candidate], rounds: int) -> list[list[float]]:
    """Milliseconds an image ``[candidates][rounds]``, all candidates once in each round."""
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(rounds):
        for i, candidate in enumerate(candidates):
            worker.apply(candidate, serving=True)
            times[i].append(float(worker.workload.time(worker.built)[0]["image_ms"].value))
    return times


def winner(args: argparse.Namespace) -> None:
    """Export a point, load it, and compare it with the uncompressed model's own sampling."""
    torch.set_num_threads(args.threads)
    trial = front_of(args.run).select(args.select)
    job = Job.from_yaml(args.run / "job.yaml", [f"workload.data.report={args.images}"])
    with open_worker(job, args.threads) as worker, tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "winner"
        worker.export(trial.candidate.to_json(), "diffusers", str(out))
        loaded = load(out)
        worker.apply(trial.candidate, serving=True)
        first = torch.cat([x.clone() for _, x in worker.workload.pictures(worker.built, "report", range(64))])
        same = bool(torch.equal(first, loaded.sample(64)))
        plain, best = compared(worker, [worker.uncompressed, trial.candidate], args.images, args.rounds)
        loaded.save_grid(RESULTS / f"{args.name}.png", 60)
    data = {
        "select": args.select, "images": args.images, "bit_identical_after_reload": same,
        "uncompressed": plain, "winner": best, "faster": plain["image_ms"] / best["image_ms"],
        "fd_difference": [best["fd"] - plain["fd"], best["fd_difference_stderr"]],
    }  # fmt: skip
    keep(args.name, data)
    for row in (plain, best):
        row.pop("candidate")
    print(json.dumps(data, indent=1))


def measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=2, help="for sampling; the scenario's for timing")
    parser.add_argument("--rounds", type=int, default=3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("fronts")
    one.add_argument("name", help="of the files in results/")
    one.add_argument("runs", nargs="+", help="NAME=RUN_FOLDER; the first one is compared with the others")
    one.add_argument("--metrics", nargs="+", default=list(METRICS))
    measuring(one)
    one.set_defaults(run_part=fronts)
    two = parts.add_parser("attention")
    two.add_argument("--run", type=Path, required=True)
    two.add_argument("--greedy", type=Path, default=RESULTS / "greedy.jsonl")
    measuring(two)
    two.set_defaults(run_part=attention)
    three = parts.add_parser("winner")
    three.add_argument("--run", type=Path, required=True)
    three.add_argument("--select", required=True)
    three.add_argument("--name", default="winner", help="of the files in results/")
    measuring(three)
    three.set_defaults(run_part=winner)
    args = parser.parse_args()
    args.run_part(args)


if __name__ == "__main__":
    main()
