"""Feasible random candidates without repeats, spread over the budgets."""

from __future__ import annotations

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
    if table is None or not isinstance(d.domain, Choice) or d.name not in table.costs:
        return d.domain.sample(rng)
    costs = np.array([table.cost(d.name, o) for o in d.options])
    known = np.isfinite(costs)
    width = float(np.ptp(costs[known])) if known.any() else 0.0
    if width <= 0:
        return d.domain.sample(rng)
    weight = np.where(known, np.exp(tilt * (np.where(known, costs, 0.0) - costs[known].min()) / width), 0.0)
    return d.options[int(rng.choice(len(costs), p=weight / weight.sum()))]
