"""Run searchers on the problems, with measured trials as the currency; writes ``results/PROBLEM.json``.

    python run.py --problems additive interaction --searchers hybrid random --seeds 10 --trials 300

Runs that are in the results already (with as many trials) are not run again. A run stops early at 99.5 % of
the reference hypervolume. CPU seconds are those of ``ask``, by one thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: runs go side by side

import argparse
import json
import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from baselines import SEARCHERS, refusal
from bench_problem import BenchProblem, Floats
from problems import PROBLEMS

from autocomp.pareto import hypervolume, non_dominated
from autocomp.space import Candidate
from autocomp.trial import Failure, Fidelity, Measurement, Trial

RESULTS = Path(__file__).parent / "results"
POINTS = (4, 8, 12, 16, 20, 24, 32, 40, 50, 64, 80, 100, 125, 160, 200, 250, 300, 400, 500, 600, 800, 1000)
"""Numbers of measured trials, baselines included, at which the hypervolume is kept."""
LEVELS = (0.9, 0.95, 0.98, 0.99)
ENOUGH = 0.995
BATCH = 4


class Progress:
    """Share of the reference hypervolume that the true losses of the trials so far cover."""

    def __init__(self, bench: BenchProblem) -> None:
        self.bench = bench
        self.rows: Floats = np.zeros((0, len(bench.corner)))
        self.share, self.count = 0.0, 0
        self.at: dict[int, float] = {}
        self.reached: dict[str, int] = {}

    def add(self, candidate: Candidate, counts: bool) -> None:
        """A measured trial; a failed one (``counts`` false) costs as much and covers nothing."""
        self.count += 1
        row = self.bench.judged(self.bench.truth(candidate)[None])
        if counts and not (self.rows <= row).all(axis=1).any():
            rows = np.vstack([self.rows, row])
            self.rows = rows[non_dominated(rows)]
            self.share = hypervolume(self.rows, self.bench.corner) / self.bench.reference_volume
        if self.count in POINTS:
            self.at[self.count] = round(self.share, 5)
        for level in LEVELS:
            if self.share >= level:
                self.reached.setdefault(str(level), self.count)


def run(problem: str, searcher: str, seed: int, trials: int) -> dict[str, Any]:
    """One search; a record for the results."""
    bench = PROBLEMS[problem](seed)
    reason = refusal(searcher, bench.problem)
    record: dict[str, Any] = {"searcher": searcher, "seed": seed, "trials": trials}
    if reason:
        return {**record, "refused": reason}
    made, progress = SEARCHERS[searcher](bench.problem), Progress(bench)
    history: list[Trial] = []

    def measure(candidate: Candidate, origin: str) -> None:
        # Noise depends on the seed and the candidate, not on when or by whom it was asked for.
        rng = np.random.default_rng(np.random.SeedSequence([seed, int(candidate.fingerprint, 16)]))
        found = bench.measure(candidate, rng)
        failed = isinstance(found, Failure)
        measurement = None if isinstance(found, Failure) else Measurement(found, "bench")
        failure = found if isinstance(found, Failure) else None
        history.append(Trial(len(history), candidate, Fidelity(), origin, measurement, failure))
        progress.add(candidate, not failed)

    for candidate in bench.problem.baselines:
        measure(candidate, "baseline")
    cpu, slowest = 0.0, 0.0
    while len(history) < trials and progress.share < ENOUGH:
        began = time.process_time()
        asked = made.ask(min(BATCH, trials - len(history)), history, [])
        took = time.process_time() - began
        cpu, slowest = cpu + took, max(slowest, took)
        if not asked:
            break
        for candidate in asked:
            bench.problem.space.check(candidate)
            measure(candidate, searcher)
    return {
        **record,
        "measured": len(history),
        "final": round(progress.share, 5),
        "volume": {str(k): v for k, v in progress.at.items()},
        "reached": progress.reached,
        "cpu_s": round(cpu, 2),
        "slowest_ask_s": round(slowest, 3),
    }


# --- results ----------------------------------------------------------------------------------------------


def load(problem: str) -> dict[str, Any]:
    """Records by ``searcher/seed``."""
    path = RESULTS / f"{problem}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def save(problem: str, record: dict[str, Any]) -> None:
    """Add a record to the problem's results, one line a record."""
    known = {**load(problem), f"{record['searcher']}/{record['seed']}": record}
    lines = [f"{json.dumps(k)}: {json.dumps(known[k])}" for k in sorted(known)]
    RESULTS.mkdir(exist_ok=True)
    temporary = RESULTS / f".{problem}.{os.getpid()}"
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    temporary.replace(RESULTS / f"{problem}.json")


def is_done(record: dict[str, Any] | None, trials: int) -> bool:
    return record is not None and ("refused" in record or record["trials"] >= trials)


def _wanted(given: argparse.Namespace) -> Iterator[tuple[str, str, int, int]]:
    for searcher in given.searchers:
        for problem in given.problems:
            known = load(problem)
            for seed in range(given.seeds):
                if given.again or not is_done(known.get(f"{searcher}/{seed}"), given.trials):
                    yield problem, searcher, seed, given.trials


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--searchers", nargs="+", default=list(SEARCHERS), choices=list(SEARCHERS))
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 to this, not included")
    parser.add_argument("--trials", type=int, default=300, help="measured trials, baselines included")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="also run what is in the results")
    given = parser.parse_args()
    wanted = list(_wanted(given))
    failed = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.processes, mp_context=context) as pool:
        futures = {pool.submit(run, *task): task for task in wanted}
        for done, future in enumerate(as_completed(futures), 1):
            problem, searcher, seed, _ = futures[future]
            try:
                record = future.result()
            except Exception:  # one broken run must not stop the others
                traceback.print_exc()
                failed += 1
                continue
            save(problem, record)
            reached = record.get("reached", {}).get("0.95", math.inf)
            shown = record.get("refused") or (
                f"{record['final']:.4f} after {record['measured']}, 95 % at {reached}, {record['cpu_s']} s"
            )
            print(f"[{done}/{len(wanted)}] {problem} {searcher} {seed}: {shown}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
