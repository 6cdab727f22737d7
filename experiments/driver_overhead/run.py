"""How many trials a second the driver manages when measuring costs nothing, and how fast the ILP solves.

Executors alone, whole studies (random searcher, journal, no tracker) through them, and one ILP of 10,000
decisions with 6 options each under a budget.

    python experiments/driver_overhead/run.py

Writes ``results.json`` beside this file and prints the table of the README.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from autocomp.executors.base import Executor, WorkerSpec, WorkItem
from autocomp.job import Job
from autocomp.searchers.ilp import solve
from autocomp.searchers.random import RandomSearcher
from autocomp.space import AdditiveTable, Choice, Decision, SearchSpace
from autocomp.study import Event, Study

SPEC = WorkerSpec("autocomp.testing.workers:NoopWorker")
CANDIDATE = {f"layers.{n}.bits": (2, 3, 4, 8)[n % 4] for n in range(96)}  # a mid-size model's worth
FIDELITY = {"name": "proxy", "split": "proxy", "sequences": 8, "timing": True}


STUDY_SPEC = WorkerSpec("autocomp.testing.fakes:FakeWorker", {"decisions": 96})


def local(spec: WorkerSpec, workers: int) -> Executor:
    from autocomp.executors.local import LocalExecutor

    return LocalExecutor(spec, workers)


def on_ray(spec: WorkerSpec, workers: int) -> Executor:
    from autocomp.executors.ray import RayExecutor

    return RayExecutor(spec, workers)


EXECUTORS: dict[str, Callable[[WorkerSpec, int], Executor]] = {"local": local, "ray": on_ray}


def run_batch(executor: Executor, items: int, first: int) -> float:
    """Seconds to get ``items`` measurements back, never more than twice the slots under way."""
    began = time.perf_counter()
    sent = came = 0
    while came < items:
        while sent < items and executor.busy() < 2 * executor.slots:
            kwargs = {"candidate": CANDIDATE, "fidelity": FIDELITY}
            executor.submit(WorkItem(f"t{first + sent}", "measure", kwargs))
            sent += 1
        for outcome in executor.completed(10.0):
            if outcome.failure is not None:
                raise SystemExit(f"a no-op failed: {outcome.failure}")
            came += 1
    return time.perf_counter() - began


def time_executor(
    make: Callable[[WorkerSpec, int], Executor], workers: int, items: int, rounds: int
) -> dict[str, Any]:
    """Start-up seconds until the first answer, then items a second in each round."""
    began = time.perf_counter()
    executor = make(SPEC, workers)
    try:
        run_batch(executor, 1, 0)
        start_s = time.perf_counter() - began
        run_batch(executor, 50, 1)  # the other workers come up
        rates = [items / run_batch(executor, items, 51 + r * items) for r in range(rounds)]
    finally:
        executor.close()
    return {
        "start_s": round(start_s, 2),
        "items_per_s": round(statistics.median(rates), 1),
        "rounds": [round(rate, 1) for rate in rates],
        "ms_per_item": round(1e3 / statistics.median(rates), 3),
    }


def time_study(make: Callable[[WorkerSpec, int], Executor], workers: int, trials: int) -> dict[str, float]:
    """Trials a second of a study's search phase: ask, submit, measure (a formula), journal, events."""
    job = Job.of(
        {
            "workload": {"model": "none"},
            "space": [{"bitwidths": {}}],
            "searcher": {"name": "random"},
            "budget": {"trials": trials},
            "validation": {"audit": 0, "promote": 1, "report": 1},
            "tracking": {"uri": "", "optuna": False},
        }
    )
    stamps: list[float] = []

    def on_event(event: Event) -> None:
        if event.trial is not None and event.trial.origin == "random":
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        executor = make(STUDY_SPEC, workers)
        Study(job, Path(folder), executor=executor, searcher=RandomSearcher, on_event=on_event).run()
    return {"trials": trials, "trials_per_s": round((len(stamps) - 1) / (stamps[-1] - stamps[0]), 1)}


def time_ilp(decisions: int = 10_000, options: int = 6, rounds: int = 5) -> dict[str, Any]:
    """Seconds and proven gap of a random budgeted allocation (costs fall and sizes rise with the option)."""
    rng = np.random.default_rng(0)
    names = [f"d{i}" for i in range(decisions)]
    labels = tuple(f"w{i}" for i in range(options))
    size = np.sort(rng.uniform(1, 10, (decisions, options)), axis=1)
    loss = -np.sort(-rng.exponential(1.0, (decisions, options)) * rng.lognormal(0, 1, (decisions, 1)), axis=1)
    space = SearchSpace(tuple(Decision(n, Choice(labels, ordered=True)) for n in names))
    cost = AdditiveTable("loss", 0.0, {n: dict(zip(labels, map(float, row))) for n, row in zip(names, loss)})
    bytes_ = AdditiveTable("mb", 0.0, {n: dict(zip(labels, map(float, row))) for n, row in zip(names, size)})
    budget = float(size.mean(axis=1).sum())
    found = [solve(space, cost, [(bytes_, budget)], gap=1e-3) for _ in range(rounds)]
    return {
        "decisions": decisions,
        "options": options,
        "seconds": round(statistics.median(f.seconds for f in found), 3),
        "rounds": [round(f.seconds, 3) for f in found],
        "proven_gap": max(f.gap for f in found),
    }


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {"cpu": model, "cores": os.cpu_count(), "load_1min": round(os.getloadavg()[0], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--items", type=int, default=1000, help="items a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    before = machine()
    results = {
        name: time_executor(make, arguments.workers, arguments.items, arguments.rounds)
        for name, make in EXECUTORS.items()
    }
    studies = {
        name: time_study(make, arguments.workers, 2 * arguments.items) for name, make in EXECUTORS.items()
    }
    ilp = time_ilp()
    record = {
        "command": " ".join(["python", "experiments/driver_overhead/run.py", *sys.argv[1:]]),
        "workers": arguments.workers,
        "items_per_round": arguments.items,
        "decisions_per_candidate": len(CANDIDATE),
        "machine": before,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("autocomp", "ray", "pulp", "highspy")},
        },
        "executors": results,
        "studies": studies,
        "ilp": ilp,
    }
    path = Path(__file__).with_name("results.json")
    path.write_text(json.dumps(record, indent=2) + "\n")
    print("| executor | start, s | items/s (median) | slowest-fastest round | ms an item |")
    print("|---|---|---|---|---|")
    for name, row in results.items():
        low, high = min(row["rounds"]), max(row["rounds"])
        print(
            f"| {name} | {row['start_s']} | {row['items_per_s']} | {low:g}-{high:g} | {row['ms_per_item']} |"
        )
    for name, study in studies.items():
        print(f"study through {name}: {study['trials_per_s']} trials/s over {study['trials']} trials")
    print(
        f"ILP {ilp['decisions']} x {ilp['options']}: {ilp['seconds']} s, proven gap {ilp['proven_gap']:.2g}"
    )


if __name__ == "__main__":
    main()
