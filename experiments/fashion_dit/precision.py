"""Weight bits of every layer by three rules at equal bytes, and the front between noise and content.

Single changes are measured once (relative noise power of the model's output; how far a classifier's
probabilities move). Then, within the bytes of uniform 3 and 4 bits (scales counted), the same integer program
minimises the sum of noise powers, or maximises the sum of SQNR in dB (MixDQ, arXiv 2405.17873), or
minimises the content loss; an epsilon-constraint front over noise and content stands for MixDQ's two groups.
All are sampled from fresh noise.

    python precision.py --model small --images 5000 --steps 20
    python precision.py --activations --out results/activations.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import CHECKPOINTS

from autocomp.description import Description
from autocomp.job import Job
from autocomp.plan import make_plan, make_problem
from autocomp.profile import ProfileResult
from autocomp.searchers.base import Problem
from autocomp.searchers.epsilon import EpsilonSearcher
from autocomp.searchers.ilp import solve
from autocomp.space import AdditiveTable, Candidate
from autocomp.worker import ModelWorker, open_worker


def make_job(args: argparse.Namespace) -> Job:
    return Job.of(
        {
            "workload": {
                "kind": "diffusion",
                "model": str(CHECKPOINTS / args.model),
                "features": str(CHECKPOINTS / "classifier"),
                "guidance": args.guidance,
                "sampler": {"name": args.sampler, "steps": args.steps},
                "data": {
                    "real": str(CHECKPOINTS / "real.npz"), "calibration": args.calibration, "proxy": 64,
                    "selection": 64, "report": args.images, "batch": 64, "seed": args.seed,
                },
            },
            "space": [space(args)],
            "objectives": ["min noise", "max content"],
            "sensitivity": {"method": "measured", "sequences": args.calibration},
            "device": "cpu",
            "seed": args.seed,
        }
    )  # fmt: skip


def space(args: argparse.Namespace) -> dict[str, Any]:
    if args.activations:
        return {"activations": {"bits": args.bits, "ranges": args.ranges}}
    return {"bitwidths": {"bits": args.bits, "group": args.group, "method": args.method}}


def label(args: argparse.Namespace, bits: int) -> str:
    return f"a{bits}" if args.activations else f"w{bits}g{args.group}"


def in_decibels(noise: AdditiveTable) -> AdditiveTable:
    """Minus the SQNR of each single change: what a sum over layers then adds up is dB."""
    costs = {
        name: {o: 10.0 * math.log10(max(cost, 1e-12)) for o, cost in row.items()}
        for name, row in noise.costs.items()
    }
    return AdditiveTable("minus_sqnr_db", 0.0, costs)


def within(problem: Problem, size: AdditiveTable, limit: float) -> dict[str, Candidate]:
    """Name -> the candidate that each rule picks with at most ``limit`` of ``size``."""
    noise, content = problem.tables["noise"], problem.tables["content"]
    loss = AdditiveTable(
        "content_loss", 0.0, {n: {o: -c for o, c in row.items()} for n, row in content.costs.items()}
    )
    budget = [(size, limit)]
    found = {
        "ilp noise power": solve(problem.space, noise, budget).candidate,
        "ilp summed dB": solve(problem.space, in_decibels(noise), budget).candidate,
        "ilp content": solve(problem.space, loss, budget).candidate,
    }
    return found


def front(
    job: Job, description: Description, profiles: Mapping[str, Any], metric: str, limit: float, points: int
) -> list[Candidate]:
    """Candidates between least noise and least content loss within the bytes (or activation bits)."""
    bounded = job.resolved() | {"constraints": [f"{metric} <= {limit:.9f}"]}
    checked = Job.of(bounded)
    objectives, constraints = checked.parsed_objectives(), checked.parsed_constraints()
    plan = make_plan(description, objectives, constraints)
    problem = make_problem(plan, description, objectives, constraints, profiles, job.seed)
    return EpsilonSearcher(problem).ask(points, [], [])


def evaluate(worker: ModelWorker, candidate: Candidate) -> dict[str, Any]:
    level = {"name": "report", "split": "report", "sequences": 0, "timing": False}
    began = time.perf_counter()
    metrics = worker.measure(candidate.values, level)["metrics"]
    kept = ("fd", "psnr", "mse", "content", "noise", "memory_mb", "avg_bits", "act_bits")
    row = {m: {"value": metrics[m]["value"], "stderr": metrics[m]["stderr"]} for m in kept if m in metrics}
    return row | {"seconds": time.perf_counter() - began}


def profile(worker: ModelWorker, file: Path) -> AdditiveTable:
    """Measured single changes; kept in a file, since they do not depend on what is evaluated."""
    if not file.is_file():
        found = worker.profile({"kind": "sensitivity:measured", "shard": 0, "shards": 1})
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return ProfileResult.from_json(json.loads(file.read_text())).table("sensitivity")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default="dpmsolver++")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--guidance", type=float, default=1.2)
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--activations", action="store_true", help="bits of activations, not of weights")
    parser.add_argument("--ranges", type=int, default=4, help="of time, for activations")
    parser.add_argument("--bits", type=int, nargs="+", default=[])
    parser.add_argument("--average", type=int, nargs="+", default=[])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--method", default="mse")
    parser.add_argument("--front", type=int, default=4, help="points between noise and content")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/precision.json"))
    args = parser.parse_args()
    args.bits = args.bits or ([4, 6, 8] if args.activations else [2, 3, 4, 6, 8])
    args.average = args.average or ([5, 6] if args.activations else [3, 4])
    job = make_job(args)
    with open_worker(job, args.threads) as worker:
        description = Description.from_json(worker.describe())
        table = profile(worker, args.out.with_suffix(".sensitivity.json"))
        plan = make_plan(description, job.parsed_objectives(), ())
        profiles = {"sensitivity": table}
        problem = make_problem(plan, description, job.parsed_objectives(), (), profiles, job.seed)
        metric = "act_bits" if args.activations else "memory_mb"
        size = description.exact[metric]
        rows: list[dict[str, Any]] = []

        def add(rule: str, bits: int, candidate: Candidate) -> None:
            expected = {m: problem.tables[m].total(candidate) for m in ("noise", "content")}
            found = evaluate(worker, candidate)
            rows.append(
                {"rule": rule, "bits": bits, "expected": expected, "candidate": candidate.to_json(), **found}
            )
            print(
                f"{rule:16} {bits}",
                {m: round(found[m]["value"], 4) for m in found if m != "seconds"},
                flush=True,
            )
            args.out.write_text(
                json.dumps({"job": job.resolved(), "rows": rows}, indent=1).replace(
                    f"{CHECKPOINTS.parent}/", ""
                )
                + "\n"
            )

        names = [d.name for d in plan.space]
        uniform = {b: Candidate.of(dict.fromkeys(names, label(args, b))) for b in args.bits}
        add("uniform", max(args.bits), uniform[max(args.bits)])
        for bits in args.average:
            if bits in uniform:
                add("uniform", bits, uniform[bits])
            limit = size.total(uniform[bits]) if bits in uniform else float(bits)
            for rule, candidate in within(problem, size, limit).items():
                add(rule, bits, candidate)
            for i, candidate in enumerate(front(job, description, profiles, metric, limit, args.front)):
                add(f"front {i}", bits, candidate)


if __name__ == "__main__":
    main()
