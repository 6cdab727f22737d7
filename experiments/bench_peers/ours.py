"""Bit assignments of autocomp and of plain baselines, on the terms of ``peers.py``.

    python ours.py --model DIR --text FILE --budgets 3.5,4 --seed 0 --out FILE.json

Same 210 linears, same options (3, 4, 6, 8 bits, symmetric round-to-nearest, groups of 64), same calibration
tokens. No method sees more than those tokens: candidates are measured on them as well.

- ``uniform``: the widest option within the budget, everywhere;
- ``random``: the best of 20 random feasible assignments by KL on two of the sequences;
- ``ilp``: Fisher sensitivities, solved; nothing is measured;
- ``hybrid``: ``autocomp.search`` with the default searcher: solve, measure, profile around the incumbent,
  solve again; the measured candidate with the lowest KL.

``hybrid-tied`` and ``ilp-tied`` share a choice within q/k/v and gate/up, as serving engines want it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import Stopwatch, average_bits, draw_calibration

import autocomp
from autocomp.job import Job
from autocomp.plan import make_plan, make_problem
from autocomp.profile import ProfileResult
from autocomp.quantize.scheme import Scheme
from autocomp.searchers.ilp import solve
from autocomp.space import Candidate
from autocomp.testing.fakes import InlineExecutor
from autocomp.trial import Trial
from autocomp.worker import ModelWorker

OPTIONS = ["w3g64", "w4g64", "w6g64", "w8g64"]
RANDOM_DRAWS = 20
RANDOM_SEQUENCES = 2


class CalibrationWorker(ModelWorker):
    """A worker whose proxy split is the calibration split, and which does nothing twice: profiles of the
    uncompressed model and candidates that several budgets measure (the uniform ones) are kept."""

    def use(self, tokens: torch.Tensor) -> None:
        """Replace calibration and proxy data by ``tokens`` (int64 ``[n, L]``)."""
        self.built.state["splits"] |= {"calibration": tokens, "proxy": tokens}
        self.workload.prepare(self.built)  # type: ignore[attr-defined]
        self._teachers = set()
        self._profiles: dict[str, dict[str, Any]] = {}
        self._measured: dict[str, dict[str, Any]] = {}

    def profile(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request["kind"] not in self._profiles:
            found = super().profile(request)
            if request["kind"] == "neighbourhood":
                return found
            self._profiles[request["kind"]] = found
        return self._profiles[request["kind"]]

    def measure(self, candidate: Mapping[str, Any], fidelity: Mapping[str, Any]) -> dict[str, Any]:
        key = json.dumps([dict(candidate), dict(fidelity)], sort_keys=True)
        if key not in self._measured:
            self._measured[key] = super().measure(candidate, fidelity)
        return self._measured[key]


def make_job(
    model: str, granularity: str, seed: int, sequences: int, length: int, trials: int
) -> dict[str, Any]:
    return {
        "workload": {
            "model": model,
            "dtype": "bfloat16",
            "data": {
                "sequence_length": length, "calibration": sequences, "teacher_mb": 2000,
                "proxy": 1, "selection": 1, "report": 1,
            },
            "scenario": {"prompt_tokens": 8, "context_tokens": 8, "decode_tokens": 1},
        },
        "space": [{"bitwidths": {"options": OPTIONS, "granularity": granularity, "method": "rtn"}}],
        "objectives": ["min kl"],
        "sensitivity": {"method": "fisher", "sequences": sequences},
        "searcher": {"name": "hybrid", "seed": seed, "options": {"profiles": 2}},
        "budget": {"trials": trials},
        "validation": {"audit": 0, "promote": 1, "report": 1},
        "tracking": {"uri": "", "optuna": False},
        "device": "cpu",
    }  # fmt: skip


def bits_of(worker: ModelWorker, candidate: Candidate) -> dict[str, int]:
    return {
        path: Scheme.parse(str(candidate[d.name])).bits
        for row in worker.decisions.values()
        for d in row
        for path in d.sites
    }


def ilp(worker: ModelWorker, job: Job, budget: float) -> Candidate:
    """Fisher sensitivities and one solve."""
    from autocomp.description import Description

    description = Description.from_json(worker.describe())
    objectives = job.parsed_objectives()
    limited = Job.of({**job.resolved(), "constraints": [f"avg_bits <= {budget}"]}).parsed_constraints()
    plan = make_plan(description, objectives, limited)
    result = ProfileResult.from_json(worker.profile({"kind": "sensitivity:fisher", "shard": 0, "shards": 1}))
    problem = make_problem(plan, description, objectives, limited, {"sensitivity": result.table("kl")}, 0)
    return solve(problem.space, problem.tables["kl"], [], gap=1e-4).candidate


def hybrid(worker: ModelWorker, job: Job, budget: float) -> tuple[Candidate, list[float]]:
    """``autocomp.search``; the best measured candidate and all measured KL in order."""
    limited = Job.of({**job.resolved(), "constraints": [f"avg_bits <= {budget}"]})
    with tempfile.TemporaryDirectory() as folder:
        autocomp.search(
            limited, run_dir=Path(folder) / "run", executor=InlineExecutor(worker, slots=1), trackers=[]
        )
        lines = (Path(folder) / "run" / "journal.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    trials = [Trial.from_json(r["trial"]) for r in records if r["kind"] == "trial"]
    fitting = [t for t in trials if t.fidelity.name == "proxy" and t.value("avg_bits") <= budget + 1e-9]
    best = min(fitting, key=lambda t: t.value("kl"))
    return best.candidate, [t.value("kl") for t in fitting]


def random_best(worker: ModelWorker, job: Job, budget: float, seed: int) -> tuple[Candidate, list[float]]:
    """The best of ``RANDOM_DRAWS`` random feasible assignments by KL on the calibration tokens."""
    from autocomp.description import Description

    description = Description.from_json(worker.describe())
    limited = Job.of({**job.resolved(), "constraints": [f"avg_bits <= {budget}"]}).parsed_constraints()
    space = make_plan(description, job.parsed_objectives(), limited).space
    rng = np.random.default_rng(seed)
    level = {"name": "proxy", "split": "proxy", "sequences": RANDOM_SEQUENCES, "timing": False}
    drawn = [space.sample(rng) for _ in range(RANDOM_DRAWS)]
    scores = [worker.measure(c.to_json(), level)["metrics"]["kl"]["value"] for c in drawn]
    return drawn[int(np.argmin(scores))], scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budgets", default="3.5,4,4.5,5,6")
    parser.add_argument("--methods", default="uniform,ilp,hybrid,random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--trials", type=int, default=14, help="measured candidates, the four uniform included"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    methods = args.methods.split(",")
    budgets = [float(b) for b in args.budgets.split(",")]
    result: dict[str, Any] = {"seed": args.seed, "methods": {m: {} for m in methods}, "phases": {}}
    for granularity in ("linear", "tied"):
        wanted = [m for m in methods if m.endswith("-tied") == (granularity == "tied")]
        if wanted:
            run_granularity(args, granularity, wanted, budgets, result)
    args.out.write_text(json.dumps(result))


def run_granularity(
    args: argparse.Namespace,
    granularity: str,
    methods: list[str],
    budgets: list[float],
    result: dict[str, Any],
) -> None:
    job = Job.of(make_job(args.model, granularity, args.seed, args.sequences, args.length, args.trials))
    worker = CalibrationWorker(job.resolved(), threads=torch.get_num_threads())
    tokenizer = worker.built.state["tokenizer"]
    calibration = draw_calibration(args.text.read_text(), tokenizer, args.seed, args.sequences, args.length)
    worker.use(calibration.tokens)
    result["calibration"] = calibration.describe()
    scope = {p.path: p.numel for p in worker.built.site.parts if p.kind == "linear" and p.role == "body"}
    watch = Stopwatch()
    with watch.phase(f"score {granularity}"):
        worker.profile({"kind": "sensitivity:fisher", "shard": 0, "shards": 1})
    for budget in budgets:
        for method in methods:
            scores: list[float] = []
            with watch.phase(f"{method} {budget:g}"):
                if method == "uniform":
                    widest = max(b for b in (3, 4, 6, 8) if b <= budget)
                    candidate = Candidate.of({d.name: f"w{widest}g64" for d in worker.decisions["bitwidths"]})
                elif method == "random":
                    candidate, scores = random_best(worker, job, budget, args.seed)
                elif method.startswith("ilp"):
                    candidate = ilp(worker, job, budget)
                else:
                    candidate, scores = hybrid(worker, job, budget)
            bits = bits_of(worker, candidate)
            answer = {"bits": bits, "average_bits": average_bits(bits, scope), "scores": scores}
            result["methods"][method][f"{budget:g}"] = answer
            spent = watch.phases[f"{method} {budget:g}"]["cpu_seconds"]
            best = f", best KL {min(scores):.4f} of {len(scores)}" if scores else ""
            print(f"{time.strftime('%X')} {method} {budget:g}: {spent:.0f} CPU s{best}", flush=True)
    result["phases"] |= watch.phases


if __name__ == "__main__":
    main()
