"""Feasible random candidates without repeats, spread over the budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autocomp.errors import InfeasibleError
from autocomp.searchers.base import Problem
from autocomp.searchers.common import admissible, seen_fingerprints
from autocomp.space import AdditiveTable, Candidate, Choice, Decision, SearchSpace, Value
from autocomp.trial import Trial


class RandomSearcher:
    """Draws options tilted towards cheap or dear ones by a random amount a candidate.

    Uniform draws of many decisions all have nearly the same size (the sum concentrates); the tilt
    ``p(option) ~ exp(t * cost)``, with ``t`` drawn anew for each candidate, covers the whole range of an
    exact table. Without exact tables, or for intervals, draws are uniform.

    Args:
        patience: draws for each wanted candidate before giving up (small or tight spaces run out).
    """

    def __init__(self, problem: Problem, *, patience: int = 40) -> None:
        self.problem, self.patience = problem, patience
        self.tables = [t for t in problem.tables.values() if t.exact]

    @staticmethod
    def unsupported(problem: Problem) -> list[str]:
        return [] if len(problem.space) else ["there is nothing to decide"]

    def ask(self, n: int, history: Sequence[Trial], pending: Sequence[Candidate]) -> list[Candidate]:
        """See ``Searcher.ask``.

        Raises:
            InfeasibleError: nothing was proposed yet and no draw meets the constraints.
        """
        rng = self.problem.rng(len(history) + len(pending))
        seen = seen_fingerprints(history, pending)
        found: list[Candidate] = []
        rejected = 0
        for _ in range(self.patience * max(n, 1)):
            if len(found) >= n:
                break
            candidate = draw(self.problem.space, rng, self.tables)
            if candidate.fingerprint in seen:
                continue
            if not admissible(self.problem, candidate):
                rejected += 1
                continue
            seen.add(candidate.fingerprint)
            found.append(candidate)
        if rejected and not found and not history and not pending:
            raise InfeasibleError(
                f"none of {rejected} random candidates meets the constraints; loosen a bound"
            )
        return found


def draw(space: SearchSpace, rng: np.random.Generator, tables: Sequence[AdditiveTable]) -> Candidate:
    """One repaired random candidate, tilted along a random one of ``tables``."""
    table = tables[int(rng.integers(len(tables)))] if tables else None
    tilt = float(rng.uniform(-5.0, 5.0)) if table is not None else 0.0
    values = {d.name: _draw_option(d, rng, table, tilt) for d in space.decisions}
    return space.repair(values, rng)


def _draw_option(d: Decision, rng: np.random.Generator, table: AdditiveTable | None, tilt: float) -> Value:
    """An option with probability proportional to ``exp(tilt * cost)``, costs scaled to 0..1.

    Plain floats: rows have a few options, and arrays of that size cost more than they save.
    """
    row = None if table is None else table.costs.get(d.name)
    if row is None or not isinstance(d.domain, Choice):
        return d.domain.sample(rng)
    known = [(o, row[o]) for o in d.options if math.isfinite(row.get(o, math.nan))]
    low = min((c for _, c in known), default=0.0)
    width = max((c for _, c in known), default=0.0) - low
    if width <= 0:
        return d.domain.sample(rng)
    weights = [math.exp(tilt * (cost - low) / width) for _, cost in known]
    left = rng.random() * sum(weights)
    for (option, _), weight in zip(known, weights):
        left -= weight
        if left < 0:
            return option
    return known[-1][0]
