"""Tables and pictures of ``results/*.json``: writes ``TABLE.md`` and ``curves_PROBLEM.png``.

    python table.py [PROBLEM ...]

Trials are measured ones, baselines included; medians are over seeds.
"""

from __future__ import annotations

import argparse
import heapq
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from baselines import LABELS, SEARCHERS
from bench_problem import BenchProblem
from problems import PROBLEMS
from run import POINTS, load

from autocomp.pareto import hypervolume

HERE = Path(__file__).parent
OURS = ("hybrid", "evolution")
Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def runs_of(problem: str) -> Runs:
    """Finished runs by searcher, in the searchers' order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in load(problem).values():
        if "refused" not in record:
            found.setdefault(record["searcher"], []).append(record)
    return {name: found[name] for name in SEARCHERS if name in found}


def trials_to(records: Sequence[Mapping[str, Any]], level: float) -> float:
    """Median number of trials to a share of the reference volume; infinite when most runs never got there."""
    return float(statistics.median(r["reached"].get(str(level), math.inf) for r in records))


def curve(record: Mapping[str, Any], points: Sequence[int]) -> list[float]:
    """Share of the reference volume at these numbers of trials; a run that ended stays where it was."""
    return [record["volume"].get(str(n), record["final"] if n > record["measured"] else 0.0) for n in points]


def budget_of(*several: Sequence[Mapping[str, Any]]) -> int:
    """The least number of trials that a run of these searchers was given."""
    return min(int(r["trials"]) for records in several for r in records)


def sampled(*several: Sequence[Mapping[str, Any]]) -> list[int]:
    """Points that every run of these has passed, or would have, had it not stopped early."""
    return [n for n in POINTS if n <= budget_of(*several)]


def shown(value: float, budget: int) -> str:
    return f"{value:.0f}" if math.isfinite(value) else f"not in {budget}"


def ratio(ours: float, theirs: float, budget: int) -> str:
    """``ours / theirs``; a bound where the other one never got there."""
    if not math.isfinite(ours):
        return "–"
    return f"{ours / theirs:.2f}" if math.isfinite(theirs) else f"< {ours / budget:.2f}"


def floor_of(bench: BenchProblem, level: float = 0.95) -> float:
    """Trials that perfect knowledge would need: points of the reference front, best next one first.

    What a point adds never grows as others come, so that gains of earlier rounds are bounds (Minoux's
    accelerated greedy, 1978).
    """
    if bench.front is None:
        return math.nan
    rows = bench.judged(np.array([bench.truth(c) for c in bench.problem.baselines]))
    volume, wanted = hypervolume(rows, bench.corner), level * bench.reference_volume
    queue = [(-math.inf, -1, tuple(row)) for row in bench.judged(bench.front)]  # (-gain, round, point)
    while queue and volume < wanted:
        gain, found_in, point = heapq.heappop(queue)
        if found_in == len(rows):
            rows, volume = np.vstack([rows, point]), volume - gain
            continue
        gain = hypervolume(np.vstack([rows, point]), bench.corner) - volume
        heapq.heappush(queue, (-gain, len(rows), point))
    return float(len(rows)) if volume >= wanted else math.nan


def behind_random(runs: Runs, name: str = "hybrid") -> list[int]:
    """Numbers of trials at which a searcher's median lies below random's."""
    points = sampled(runs[name], runs["random"])
    ours, random = (np.median([curve(r, points) for r in runs[n]], axis=0) for n in (name, "random"))
    return [n for n, a, b in zip(points, ours, random, strict=True) if a < b - 1e-9]


def row_of(problem: str, runs: Runs, level: float) -> list[str]:
    """One line of a summary."""
    budget = budget_of(runs["hybrid"])
    hybrid = trials_to(runs["hybrid"], level)
    others = {n: trials_to(r, level) for n, r in runs.items() if n not in OURS}
    best = min(others, key=lambda n: others[n])
    floor = floor_of(PROBLEMS[problem](0), level)
    worse = behind_random(runs) if "random" in runs else None
    return [
        problem,
        shown(hybrid, budget),
        f"{LABELS[best]}: {shown(others[best], budget)}" if math.isfinite(others[best]) else "none",
        ratio(hybrid, others["nsga2"], budget_of(runs["nsga2"])) if "nsga2" in others else "–",
        ratio(hybrid, others[best], budget_of(runs[best])),
        "–" if math.isnan(floor) else f"{floor:.0f}",
        "–" if worse is None else ("never" if not worse else f"at {', '.join(map(str, worse))}"),
    ]


def detail(problem: str, runs: Runs) -> list[str]:
    """A table of all searchers on one problem."""
    lines = ["| searcher | seeds | to 90 % | to 95 % | to 99 % | final | CPU s a run | slowest ask, s |"]
    lines.append("|" + "---|" * 8)
    for name, records in runs.items():
        budget = budget_of(records)
        reached = [shown(trials_to(records, level), budget) for level in (0.9, 0.95, 0.99)]
        final = statistics.median(r["final"] for r in records)
        cpu = statistics.median(r["cpu_s"] for r in records)
        slowest = statistics.median(r["slowest_ask_s"] for r in records)
        cells = [LABELS[name], str(len(records)), *reached, f"{final:.4f}", f"{cpu:.1f}", f"{slowest:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(problem: str, runs: Runs) -> None:
    """Median and quartiles of the share of the reference volume against measured trials."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = sampled(*[runs[n] for n in runs if n == "hybrid"] or list(runs.values()))
    figure, axes = plt.subplots(figsize=(8.5, 4.5))
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for i, (name, records) in enumerate(runs.items()):
        least = len(PROBLEMS[problem](0).problem.baselines)
        start = [n for n in sampled(records) if least <= n <= points[-1]]
        rows = np.array([curve(r, start) for r in records])
        low, middle, high = np.quantile(rows, [0.25, 0.5, 0.75], axis=0)
        colour = "black" if name == "hybrid" else colours[i]
        axes.plot(start, middle, label=LABELS[name], color=colour, lw=2.2 if name in OURS else 1.2)
        axes.fill_between(start, low, high, color=colour, alpha=0.12, lw=0)
    axes.axhline(0.95, color="grey", lw=0.8, ls=":")
    axes.set(xscale="log", xlabel="measured trials", ylabel="share of the reference hypervolume")
    axes.set_xticks([n for n in (4, 8, 16, 32, 64, 125, 250, 500, 1000) if n <= points[-1]])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set_title(problem)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(HERE / f"curves_{problem}.png", dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("problems", nargs="*", default=[], help="all with results, if none is named")
    given = parser.parse_args()
    chosen = {p: runs_of(p) for p in given.problems or PROBLEMS}
    known = {p: runs for p, runs in chosen.items() if "hybrid" in runs and set(runs) - set(OURS)}
    head = ["problem", "hybrid", "best baseline", "hybrid / NSGA-II", "hybrid / best", "floor"]
    lines: list[str] = []
    for level in (0.95, 0.99):
        lines += [f"Trials to {level:.0%} of the reference hypervolume:", ""]
        lines += [f"| {' | '.join([*head, 'hybrid worse than random'])} |", "|" + "---|" * (len(head) + 1)]
        lines += [f"| {' | '.join(row_of(p, runs, level))} |" for p, runs in known.items()] + [""]
    for p, runs in known.items():
        lines += [f"## {p}", "", *detail(p, runs), ""]
        plot(p, runs)
    text = "\n".join(lines) + "\n"
    (HERE / "TABLE.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
