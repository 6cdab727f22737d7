"""How many items a second the executors can hand out and take back when the work itself costs nothing.

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
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from autocomp.executors.base import Executor, WorkerSpec, WorkItem

SPEC = WorkerSpec("autocomp.testing.workers:NoopWorker")
CANDIDATE = {f"layers.{n}.bits": (2, 3, 4, 8)[n % 4] for n in range(96)}  # a mid-size model's worth
FIDELITY = {"name": "proxy", "split": "proxy", "sequences": 8, "timing": True}


def local(workers: int) -> Executor:
    from autocomp.executors.local import LocalExecutor

    return LocalExecutor(SPEC, workers)


def on_ray(workers: int) -> Executor:
    from autocomp.executors.ray import RayExecutor

    return RayExecutor(SPEC, workers)


EXECUTORS: dict[str, Callable[[int], Executor]] = {"local": local, "ray": on_ray}


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


def time_executor(make: Callable[[int], Executor], workers: int, items: int, rounds: int) -> dict[str, Any]:
    """Start-up seconds until the first answer, then items a second in each round."""
    began = time.perf_counter()
    executor = make(workers)
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
    record = {
        "command": " ".join(["python", "experiments/driver_overhead/run.py", *sys.argv[1:]]),
        "workers": arguments.workers,
        "items_per_round": arguments.items,
        "decisions_per_candidate": len(CANDIDATE),
        "machine": before,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("autocomp", "ray")},
        },
        "executors": results,
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


if __name__ == "__main__":
    main()
