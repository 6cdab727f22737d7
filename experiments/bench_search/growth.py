"""How an ask of a searcher grows with the history: seconds on one core, and memory, up to 20,000 trials.

python growth.py                 # hybrid, 224 decisions of 6 options, two objectives
python growth.py --searcher evolution --trials 100 1000

Every row is a fresh searcher that sees its history for the first time (the price of a resume), then two more
asks with four more trials each (the price of going on). Memory is what the process holds at most during the
asks beyond what it held before.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import multiprocessing
import platform
import resource
import time
from pathlib import Path
from typing import Any

from autocomp.registry import SEARCHERS
from autocomp.searchers.base import Problem
from autocomp.testing.searchers import toy_problem, toy_trial
from autocomp.trial import Trial

RESULTS = Path(__file__).parent / "results"
OPTIONS = (2, 3, 4, 5, 6, 8)


def history_of(problem: Problem, trials: int) -> list[Trial]:
    """Half of it random candidates, half neighbours of earlier ones, as a search leaves behind."""
    from autocomp.searchers.evolution import Breeder

    rng, breeder = problem.rng(10**6), Breeder(problem.space)
    found = [toy_trial(problem, i, c, "baseline") for i, c in enumerate(problem.baselines)]
    while len(found) < trials:
        parents = [t.candidate for t in found[-20:]]
        candidate = breeder.child(parents, rng) if len(found) % 2 else problem.space.sample(rng)
        found.append(toy_trial(problem, len(found), candidate))
    return found


def measure(searcher: str, decisions: int, trials: int) -> dict[str, Any]:
    """One row: seconds of the first and of the next asks, and megabytes."""
    problem = toy_problem(decisions, options=OPTIONS, budget=None)
    history = history_of(problem, trials)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    asker, seconds = SEARCHERS.get(searcher)(problem), []
    for _ in range(3):
        started = time.process_time()
        batch = asker.ask(4, history, [])
        seconds.append(time.process_time() - started)
        history = history + [toy_trial(problem, len(history) + i, c) for i, c in enumerate(batch)]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "searcher": searcher, "decisions": decisions, "trials": trials, "first_s": seconds[0],
        "next_s": min(seconds[1:]), "grown_mb": grown / 1024,
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(r["searcher"] for r in rows):
        mine = [r for r in rows if r["searcher"] == name]
        at = [r["trials"] for r in mine]
        left.plot(at, [r["first_s"] for r in mine], marker="o", label=f"{name}, first ask")
        left.plot(at, [r["next_s"] for r in mine], marker=".", ls="--", label=f"{name}, next asks")
        right.plot(at, [r["grown_mb"] for r in mine], marker="o", label=name)
    left.axhline(0.5, color="0.6", lw=0.8)
    left.set(xlabel="trials in the history", ylabel="CPU seconds an ask", xscale="log", yscale="log")
    right.set(xlabel="trials in the history", ylabel="MB held at most", xscale="log")
    left.legend()
    right.legend()
    figure.savefig(out, dpi=130)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--searcher", nargs="+", default=["hybrid"])
    parser.add_argument("--decisions", type=int, default=224)
    parser.add_argument("--trials", type=int, nargs="+", default=[50, 200, 500, 2000, 5000, 20_000])
    args = parser.parse_args()
    rows = []
    for name in args.searcher:
        for trials in args.trials:
            # A process each: what one left behind must not hide what the next one needs.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (name, args.decisions, trials)))
            print(rows[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    machine = {"machine": platform.machine(), "python": platform.python_version()}
    (RESULTS / "growth.json").write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    draw(rows, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
