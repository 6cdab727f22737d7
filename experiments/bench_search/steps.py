"""A sampler's steps: how many, when, and by which formula, on an ODE whose solution is known. No tables.

Normal data of variance ``v`` flow from noise along ``x' = x (t - (1 - t) v) / s(t)^2`` with
``s(t)^2 = (1 - t)^2 v + t^2`` (the probability flow of rectified flows, arXiv 2209.03003, for normal data);
from noise of deviation 1 at time 1 the exact solution at time 0 has deviation ``sqrt(v)``. A candidate has up
to ten slots with a time (falling, or null: the slot is unused) and a formula: ``euler``, ``heun`` (two
evaluations a step) or ``ab2`` (Adams-Bashforth with the slope before). Objectives are the relative error
of the deviation, a root mean square over 12 variances, with the model's own error added in squares, and
the evaluations of the velocity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from bench_problem import BenchProblem, Floats, judge, stored_reference

from autocomp.objective import Objective
from autocomp.searchers.base import Problem
from autocomp.space import Candidate, Choice, Decision, Interval, Ordered, SearchSpace, Slots, Value
from autocomp.trial import Estimate

SLOTS, LEAST = 10, 2
SOLVERS = ("euler", "heun", "ab2")
VARIANCES = np.logspace(-3.0, 1.0, 12)
GAP = 1e-3
MODEL_ERROR = 5e-3
"""What no schedule can mend: beyond some eight evaluations only this is left."""


def velocity(x: Floats, time: Floats) -> Floats:
    """Of samples ``x [n, variances]`` with the variances' deviations at ``time [n, 1]``."""
    return x * (time - (1.0 - time) * VARIANCES) / ((1.0 - time) ** 2 * VARIANCES + time**2)


def solve_errors(times: Floats, solvers: Sequence[str]) -> Floats:
    """Root mean squares ``[n]`` over ``VARIANCES`` of the solvers' relative error at time 0.

    ``times [n, steps]``: schedules with the same solvers.
    """
    x = np.ones((len(times), len(VARIANCES)))
    slope = np.zeros_like(x)
    ends = np.column_stack([times[:, 1:], np.zeros(len(times))])
    for i, solver in enumerate(solvers):
        time, end, before = times[:, i : i + 1], ends[:, i : i + 1], slope
        slope, h = velocity(x, time), end - time
        step = slope
        if solver == "heun":
            step = 0.5 * (slope + velocity(x + h * slope, end))
        elif solver == "ab2" and i:
            step = slope + 0.5 * h / (time - times[:, i - 1 : i]) * (slope - before)
        x = x + h * step
    return np.asarray(np.sqrt(np.mean((x / np.sqrt(VARIANCES) - 1.0) ** 2, axis=1)))


def evaluations(solvers: Sequence[str]) -> int:
    return sum(2 if s == "heun" else 1 for s in solvers)


def make_space() -> SearchSpace:
    """A time and a solver for each slot; unused slots come last, times fall."""
    decisions: list[Decision] = []
    for i in range(SLOTS):
        decisions.append(
            Decision(f"time.{i}", Interval(GAP, 1.0, nullable=i >= LEAST), space="steps", block=i)
        )
        decisions.append(Decision(f"solver.{i}", Choice(SOLVERS), space="steps", block=i))
    slots = Slots(tuple(d.name for d in decisions), (SOLVERS[0],), packed=True)
    return SearchSpace(tuple(decisions), (slots, Ordered(tuple(f"time.{i}" for i in range(SLOTS)), gap=GAP)))


def steps_candidate(times: Sequence[float], solvers: Sequence[str]) -> Candidate:
    """The candidate with these steps; other slots unused."""
    values: dict[str, Value] = {}
    for i in range(SLOTS):
        used = i < len(times)
        values[f"time.{i}"] = float(times[i]) if used else None
        values[f"solver.{i}"] = solvers[i] if used else SOLVERS[0]
    return Candidate.of(values)


def steps_of(candidate: Candidate) -> tuple[list[float], list[str]]:
    """Times and solvers of the used slots."""
    used = [i for i in range(SLOTS) if candidate[f"time.{i}"] is not None]
    return [float(candidate[f"time.{i}"] or 0.0) for i in used], [str(candidate[f"solver.{i}"]) for i in used]


def even_steps(count: int, solver: str) -> Candidate:
    return steps_candidate([1.0 - i / count for i in range(count)], [solver] * count)


def schedule_problem(seed: int) -> BenchProblem:
    """20 decisions: ten nullable times and ten solvers. Measuring is free of noise; one instance."""
    baselines = [
        even_steps(n, s) for n, s in ((SLOTS, "heun"), (SLOTS, "euler"), (5, "euler"), (LEAST, "euler"))
    ]
    problem = Problem(
        space=make_space(),
        objectives=(Objective("error"), Objective("evaluations")),
        baselines=tuple(baselines),
        seed=seed,
    )

    def truth(candidate: Candidate) -> Floats:
        times, solvers = steps_of(candidate)
        error = float(np.hypot(solve_errors(np.array([times]), solvers)[0], MODEL_ERROR))
        return np.array([error, float(evaluations(solvers))])

    def measure(candidate: Candidate, rng: np.random.Generator) -> dict[str, Estimate]:
        del rng
        error, count = truth(candidate)
        return {"error": Estimate(float(error)), "evaluations": Estimate(float(count))}

    front, log = np.array(stored_reference("schedule", 0)["front"]), (True, False)
    corner, volume = judge(front, np.array([truth(c) for c in baselines]), log)
    return BenchProblem("schedule", problem, measure, truth, corner, volume, 300, log, False, front)
