"""A recorded search space as a problem: what was measured once is the truth, so an exhaustive recording knows
its front exactly.

    recorded_problem("lm/table.json.gz", seed=0, objectives=("min kl", "min decode_ms", "min memory_mb"))
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from bench_problem import BenchProblem, Floats, judge

from autocomp.history import PROXY
from autocomp.objective import Objective
from autocomp.pareto import is_feasible, loss_row, non_dominated
from autocomp.plan import make_plan, make_problem
from autocomp.predictors.latency import latency_table, rebase
from autocomp.recorded import Recording
from autocomp.searchers.base import Problem
from autocomp.space import AdditiveTable, Candidate
from autocomp.trial import Estimate, Failure, Trial

DECADE = 10.0


def recorded_problem(
    path: str | Path,
    seed: int = 0,
    *,
    name: str = "",
    objectives: Sequence[str] = ("min kl", "min memory_mb"),
    level: str = PROXY.name,
    budget: int = 300,
) -> BenchProblem:
    """The problem that a recording was made of, with the tables that a study would give a searcher.

    A measurement is the recorded one, with its standard errors; a candidate that was not recorded fails, as
    one that can't be built would. An objective that spans more than a decade on the front is judged by its
    logarithm.

    Args:
        path: what ``autocomp record`` wrote.
        seed: the searcher's; there is one instance.
        name: the file's name without its endings, unless given.
        objectives: as in a job.
        level: fidelity whose trials count.

    Raises:
        RunError: the file is no recording.
        ObjectiveError: an objective names a metric that was not recorded.
        ValueError: no trial of that fidelity has finite values of all objectives.
    """
    path = Path(path)
    recording = loaded(path)
    wanted = tuple(Objective.parse(o) for o in objectives)
    trials = {t.candidate.fingerprint: t for t in usable(recording, wanted, level)}
    if not trials:
        raise ValueError(f"{path.name} has no measured trial at {level!r}; recorded: {recording.levels}")
    front = np.array([loss_row(t, wanted) for t in trials.values()])
    front = front[non_dominated(front)]
    log = logarithmic(front)

    def measure(candidate: Candidate, rng: np.random.Generator) -> dict[str, Estimate] | Failure:
        del rng  # the noise is in the recording
        trial = trials.get(candidate.fingerprint)
        if trial is None or trial.measurement is None:
            return Failure("unmeasured", f"{candidate.fingerprint} is not in {path.name}")
        return dict(trial.measurement.metrics)

    def truth(candidate: Candidate) -> Floats:
        trial = trials.get(candidate.fingerprint)
        return np.full(len(wanted), np.inf) if trial is None else np.array(loss_row(trial, wanted))

    problem = problem_of(recording, wanted, list(trials.values()), seed)
    known = [c for c in problem.baselines if c.fingerprint in trials]
    corner, volume = judge(front, np.array([truth(c) for c in known]).reshape(-1, len(wanted)), log)
    name = name or path.name.partition(".")[0]
    return BenchProblem(name, problem, measure, truth, corner, volume, budget, log, True, front)


@lru_cache(maxsize=4)
def loaded(path: Path) -> Recording:
    """The recording; read once. Raises ``RunError``."""
    return Recording.load(path)


def usable(recording: Recording, objectives: tuple[Objective, ...], level: str = PROXY.name) -> list[Trial]:
    """Measured trials of a fidelity with finite values of all objectives."""
    return [t for t in recording.at(level) if is_feasible(t, objectives)]


def logarithmic(losses: Floats) -> tuple[bool, ...]:
    """Objectives that span more than a decade among ``losses [points, objectives]``."""
    return tuple(bool(c.min() > 0 and c.max() > DECADE * c.min()) for c in losses.T)


def problem_of(
    recording: Recording, objectives: tuple[Objective, ...], trials: Sequence[Trial], seed: int
) -> Problem:
    """A searcher's problem as a study makes it from the description and the profiles."""
    description = recording.description
    plan = make_plan(description, objectives, ())
    tables: dict[str, AdditiveTable] = {}
    for profile in recording.profiles:
        if profile.kind.startswith("sensitivity:"):
            tables["sensitivity"] = profile.table("sensitivity")
        if profile.kind == "operations":
            first = next((t for t in trials if t.candidate == description.baselines[0]), None)
            for metric in set(plan.timing) & set(description.rows):
                table = latency_table(description, profile, metric)
                known = first is not None and np.isfinite(first.value(metric))
                tables[metric] = rebase(table, description, first.value(metric)) if first and known else table
    return make_problem(plan, description, objectives, (), tables, seed)
