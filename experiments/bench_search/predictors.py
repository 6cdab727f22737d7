"""How well predictors rank held-out configurations, and whether their uncertainty is to be believed.

    python predictors.py --problems additive interaction --seeds 5 --processes 2
    python predictors.py --table

For the metrics of a problem that have to be learned: trials to learn from are drawn half at random and half
around a front (what NSGA-II asked for in 400 trials), as a search sees them, and as many to test on. Writes
``results/predictors.json``, means over seeds; ``--table`` writes ``PREDICTORS.md``.

- Kendall's tau of predictions and true values, of all held-out candidates and of those around the front;
- the root mean square error, of logarithms where all values are positive, else in standard deviations;
- of measured values: shares in the central 68 % and 95 % intervals, and the mean squared standardised error
  (of log-normal predictions where all values are positive).

``best`` is one of the others, chosen by left-out trials, so it costs what all of them cost together.
``schedules+`` (``schedules``): the 300 measured schedules of ``experiments/fashion_dit``, with (without) what
theory says of a candidate.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: tasks go side by side

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import recorded_schedules
from bench_problem import BenchProblem, Floats
from problems import PROBLEMS

from autocomp.predictors.audit import rank_correlations
from autocomp.predictors.base import Prediction, Predictor
from autocomp.predictors.calibration import calibration
from autocomp.predictors.choose import KINDS, BestOf, make_predictor, members_of_best
from autocomp.predictors.sequence import Traits
from autocomp.searchers.evolution import EvolutionSearcher
from autocomp.space import AdditiveTable, Candidate, SearchSpace
from autocomp.trial import Failure, Fidelity, Measurement, Trial

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results" / "predictors.json", HERE / "PREDICTORS.md"
SIZES = (25, 50, 100, 200)
HELD_OUT = 200
EVOLVED = 400
LEARNED = {"mixed": "error", "schedule": "error", "zdt1": "f2", "zdt3": "f2", "dtlz2": "f3"}
"""The metric that is hard to predict, where a problem has no tables."""


@dataclass(frozen=True)
class Task:
    """Trials of one metric to learn from and to test on.

    Attributes:
        train: in random order: a part from the start is a smaller sample.
        test, truth: held-out trials, as measured, and their true values ``[n]``.
        near: which of those are around the front ``[n]``.
    """

    metric: str
    table: AdditiveTable | None
    space: SearchSpace
    train: Sequence[Trial]
    test: Sequence[Trial]
    truth: Floats
    near: np.ndarray
    traits: Traits | None = None


# --- trials -----------------------------------------------------------------------------------------------


def measured(bench: BenchProblem, candidates: Sequence[Candidate], seed: int) -> list[Trial]:
    """Trials of these but for failures; the noise depends on the seed and the candidate."""
    found = []
    for candidate in candidates:
        rng = np.random.default_rng(np.random.SeedSequence([seed, int(candidate.fingerprint, 16)]))
        metrics = bench.measure(candidate, rng)
        if not isinstance(metrics, Failure):
            found.append(Trial(len(found), candidate, Fidelity(), "bench", Measurement(metrics, "bench")))
    return found


def evolved(bench: BenchProblem, seed: int) -> list[Candidate]:
    """What NSGA-II asks for, a tenth of it at a time."""
    searcher, history = EvolutionSearcher(bench.problem), measured(bench, bench.problem.baselines, seed)
    own: list[Candidate] = []
    while len(own) < EVOLVED:
        asked = searcher.ask(20, history, [])
        own += asked
        history += measured(bench, asked, seed)
    return own


def tasks_of(problem: str, seed: int) -> list[Task]:
    """One for each metric that has to be learned."""
    if problem in recorded_schedules.NAMES:
        return [_recorded(problem, seed)]
    bench, rng = PROBLEMS[problem](seed), np.random.default_rng(seed)
    half = (SIZES[-1] + HELD_OUT) // 2
    front = evolved(bench, seed)
    front = [front[i] for i in rng.permutation(len(front))[:half]]
    random = [bench.problem.space.sample(rng) for _ in range(half)]
    trials = measured(bench, [c for pair in zip(front, random, strict=True) for c in pair], seed)
    train, test = trials[:-HELD_OUT], trials[-HELD_OUT:]
    around = {c.fingerprint for c in front}
    near = np.array([t.candidate.fingerprint in around for t in test])
    tasks = []
    for i, objective in enumerate(bench.problem.objectives):
        table = bench.problem.tables.get(objective.metric)
        exact = table is not None and table.exact
        if not exact and objective.metric == LEARNED.get(problem, objective.metric):
            sign = 1.0 if objective.minimize else -1.0
            truth = sign * np.array([bench.truth(t.candidate)[i] for t in test])
            tasks.append(Task(objective.metric, table, bench.problem.space, train, test, truth, near))
    return tasks


def _recorded(problem: str, seed: int) -> Task:
    space, trials, traits = recorded_schedules.load(problem)
    order = np.random.default_rng(seed).permutation(len(trials))
    held = len(trials) - SIZES[-1]
    test, train = [trials[i] for i in order[:held]], [trials[i] for i in order[held:]]
    truth = np.array([t.value(recorded_schedules.METRIC) for t in test])
    near = truth <= np.median(truth)
    return Task(recorded_schedules.METRIC, None, space, train, test, truth, near, traits)


# --- predictors -------------------------------------------------------------------------------------------


class Timed:
    """A predictor that notes how long its last fit took, CPU seconds of one thread."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.seconds = predictor, math.nan

    def fit(self, trials: Sequence[Trial]) -> Timed:
        began = time.process_time()
        self.predictor.fit(trials)
        self.seconds = time.process_time() - began
        return self

    def predict(self, candidates: Sequence[Candidate]) -> Prediction:
        return self.predictor.predict(candidates)

    @property
    def cross_validated(self) -> float | None:
        return getattr(self.predictor, "cross_validated", None)


def scored(task: Task, size: int) -> dict[str, dict[str, float]]:
    """Scores of every kind that learned from ``size`` trials."""
    kinds = members_of_best(task.table, task.space)
    made = {k: Timed(make_predictor(k, task.metric, task.table, task.space, task.traits)) for k in kinds}
    best = Timed(BestOf(task.metric, made))
    best.fit(task.train[:size])
    return {name: score(task, p) for name, p in {**made, "best": best}.items()}


def score(task: Task, predictor: Timed) -> dict[str, float]:
    began = time.process_time()
    found = predictor.predict([t.candidate for t in task.test])
    took = time.process_time() - began
    values = np.array([t.value(task.metric) for t in task.test])
    mean, std, truth, scale = found.mean, found.std, task.truth, float(task.truth.std())
    if np.all(truth > 0) and np.all(values > 0):  # relative errors, and a normal logarithm
        mean = np.maximum(mean, 1e-3 * truth.min())
        std = np.sqrt(np.log1p((std / mean) ** 2))
        mean, values, truth, scale = np.log(mean), np.log(values), np.log(truth), 1.0
    fit, errors = calibration(values, mean, std), (mean - truth) / scale
    return {
        "tau": rank_correlations(found.mean, task.truth)[1],
        "near": rank_correlations(found.mean[task.near], task.truth[task.near])[1],
        "rmse": float(np.sqrt(np.mean(errors**2))),
        "within68": fit.within68,
        "within95": fit.within95,
        "mean_square": fit.mean_square,
        "fit_s": predictor.seconds,
        "predict_s": took,
    }


def run(problem: str, seed: int) -> list[dict[str, Any]]:
    """All scores on one instance."""
    rows = []
    for task in tasks_of(problem, seed):
        for size in SIZES:
            for kind, scores in scored(task, size).items():
                rows.append(
                    {"problem": problem, "metric": task.metric, "trials": size, "kind": kind, **scores}
                )
    return rows


# --- results ----------------------------------------------------------------------------------------------


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of each (metric, trials, kind), and the spread of tau."""
    cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["problem"], row["metric"], row["trials"], row["kind"]), []).append(row)
    found = []
    for (problem, metric, trials, kind), group in sorted(cells.items()):
        names = [n for n in group[0] if n not in ("problem", "metric", "trials", "kind")]
        means = {n: round(float(np.nanmean([r[n] for r in group])), 4) for n in names}
        spread = round(float(np.nanstd([r["tau"] for r in group])), 4)
        head = {"problem": problem, "metric": metric, "trials": trials, "kind": kind, "seeds": len(group)}
        found.append({**head, **means, "tau_sd": spread})
    return found


def save(found: Sequence[Mapping[str, Any]]) -> None:
    """Put the problems' rows in place of older ones, one line a row."""
    mine = {row["problem"] for row in found}
    rows = [*[r for r in load() if r["problem"] not in mine], *found]
    rows.sort(key=lambda r: (r["problem"], r["metric"], r["trials"], KINDS.index(r["kind"])))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


def load() -> list[dict[str, Any]]:
    return list(json.loads(RESULTS.read_text())) if RESULTS.exists() else []


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: tau by kind and size for each metric, and the calibration at 100 trials."""
    lines = []
    for problem, metric in dict.fromkeys((r["problem"], r["metric"]) for r in rows):
        mine = {(r["kind"], r["trials"]): r for r in rows if (r["problem"], r["metric"]) == (problem, metric)}
        seeds = max(r["seeds"] for r in mine.values())
        lines += [f"### {problem}: {metric} ({seeds} seeds)", ""]
        head = [f"tau, {n}" for n in SIZES] + ["near the front, 100", "error, 100"]
        lines += [f"| predictor | {' | '.join(head)} | in 68 % | in 95 % | mean z^2 | fit, s | predict, s |"]
        lines += ["|" + "---|" * (len(head) + 6)]
        best = {n: max(mine[k, n]["tau"] for k in KINDS if (k, n) in mine) for n in SIZES}
        for kind in [k for k in KINDS if (k, 100) in mine]:
            taus = [_bold(mine[kind, n]["tau"], best[n]) for n in SIZES]
            at = mine[kind, 100]
            cells = [*taus, f"{at['near']:.3f}", f"{at['rmse']:.3f}", f"{at['within68']:.2f}"]
            cells += [f"{at['within95']:.2f}", f"{at['mean_square']:.2f}", f"{at['fit_s']:.2f}"]
            cells += [f"{at['predict_s']:.3f}"]
            lines += [f"| {kind} | {' | '.join(cells)} |"]
        lines += [""]
    return "\n".join(lines)


def _bold(tau: float, best: float) -> str:
    return f"**{tau:.3f}**" if tau >= best - 5e-4 else f"{tau:.3f}"


def main() -> None:
    names = [*PROBLEMS, *recorded_schedules.NAMES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problems", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only write the table of what is known")
    given = parser.parse_args()
    if not given.table:
        rows: dict[str, list[dict[str, Any]]] = {}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(given.processes, mp_context=context) as pool:
            futures = {pool.submit(run, p, s): (p, s) for s in range(given.seeds) for p in given.problems}
            for future in as_completed(futures):
                problem, seed = futures[future]
                rows.setdefault(problem, []).extend(future.result())
                save(summary(rows[problem]))
                print(f"{problem}, seed {seed}", flush=True)
    text = table(load())
    TABLE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
