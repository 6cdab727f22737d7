"""Several modelled objectives at once, as MoA does it (arXiv 2406.14909, equation 5 and appendix E.3).

Divergence at 1k, 2k and 4k tokens are different objectives, be they named in the job or the profiled parts of
one: a plan that is best at one may be poor at another. Each is minimised alone, which gives the range of all;
then each in turn under a grid of bounds on the others (the epsilon-constraint method; Haimes et al., IEEE
Trans. SMC 1, 1971). A grain of the other objectives in what is minimised rules out plans that are equal in it
and worse in them (Mavrotas, Applied Mathematics and Computation 213, 2009).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import numpy as np

from autocomp.errors import InfeasibleError
from autocomp.objective import Objective
from autocomp.pareto import non_dominated
from autocomp.searchers.base import Problem
from autocomp.searchers.common import Floats, loss_tables, seen_fingerprints, spread_order, summed
from autocomp.searchers.ilp import Allocator, hard_budgets, next_best, space_reasons
from autocomp.searchers.mckp import Row
from autocomp.space import AdditiveTable, Candidate
from autocomp.trial import Trial

GRAIN = 1e-4
"""Share of the other objectives' ranges that weighs as much as the whole range of the minimised one."""
MOST_SOLVES = 120
"""A grid that takes more solves is not made finer."""


class EpsilonSearcher:
    """Proposes the front of all objectives' tables, spread out so that every prefix covers it.

    When all of the grid was proposed it gets finer, as long as that is cheap; then the next best candidates
    within what planned ones reach follow.

    Args:
        intervals: parts of each objective's range; with m objectives at most ``m * (intervals + 1)**(m - 1)``
            solves.
        gap: optimality gap of a solve, see ``Solution``.
        time_limit: seconds a solve.
    """

    def __init__(
        self, problem: Problem, *, intervals: int = 4, gap: float = 5e-3, time_limit: float = 10.0
    ) -> None:
        self.problem, self.intervals = problem, max(1, intervals)
        self.gap, self.time_limit = gap, time_limit
        self._plans: dict[int, list[Candidate]] = {}  # a pure function of the problem, kept

    @staticmethod
    def unsupported(problem: Problem) -> list[str]:
        reasons = space_reasons(problem.space)
        lacking = [o.metric for o in problem.objectives if o.metric not in problem.tables]
        if lacking:
            remedy = "profile sensitivities, or use hybrid or evolution"
            reasons.append(f"no additive table for {', '.join(lacking)}; {remedy}")
        return reasons

    @cached_property
    def grid(self) -> Grid:
        """Raises ``InfeasibleError`` when the budgets on exact tables can't be met."""
        losses = loss_tables(self._objectives(), self.problem.tables)
        allocator = Allocator(self.problem.space, losses[0])
        rows = [allocator.row(b) for b in hard_budgets(self.problem, self.problem.tables)]
        return Grid.of(allocator, losses, rows, self.gap, self.time_limit)

    def _objectives(self) -> list[Objective]:
        """The job's objectives, each at every length that was profiled: where a job minimises ``kl``, the
        mean over lengths, these are ``kl_1024`` and ``kl_2048``."""
        found = []
        for objective in self.problem.objectives:
            pattern = re.compile(re.escape(objective.metric) + r"_\d+")
            modelled = not self.problem.tables[objective.metric].exact
            at = [m for m in self.problem.tables if modelled and pattern.fullmatch(m)]
            found += [replace(objective, metric=m) for m in at] or [objective]
        return found

    def ask(self, n: int, history: Sequence[Trial], pending: Sequence[Candidate]) -> list[Candidate]:
        """See ``Searcher.ask``.

        Raises:
            InfeasibleError: the budgets on exact tables can't be met.
        """
        if n <= 0:
            return []
        seen = seen_fingerprints(history, pending)
        fresh: list[Candidate] = []
        plan: list[Candidate] = []
        for finer in (1, 2, 4):
            if finer > 1 and self.grid.solves(self.intervals * finer) > MOST_SOLVES:
                break
            plan = self._plan(self.intervals * finer)
            fresh = [c for c in plan if c.fingerprint not in seen]
            if len(fresh) >= n:
                return fresh[:n]
        known = [*(t.candidate for t in history), *pending, *fresh]
        turns = [self.grid.within(c, i % self.grid.size) for i, c in enumerate(plan)]
        turns.append(self.grid.anywhere)
        return fresh + next_best(n - len(fresh), turns, known, self.gap, self.time_limit)

    def _plan(self, intervals: int) -> list[Candidate]:
        if intervals not in self._plans:
            self._plans[intervals] = self.grid.front(intervals)
        return self._plans[intervals]


@dataclass
class Grid:
    """The objectives' tables over one space, and what is known of their ranges.

    Attributes:
        losses: one table an objective, smaller is better.
        minimise: an allocator for each objective, with a grain of the others.
        rows: budgets that always hold.
        low, high: range of each objective over the plans that are best for one, ``[objectives]``.
        gap, time_limit: of a solve.
    """

    losses: list[AdditiveTable]
    minimise: list[Allocator]
    rows: list[Row]
    low: Floats
    high: Floats
    gap: float
    time_limit: float
    solved: list[tuple[int, Floats, Candidate | None]] = field(default_factory=list)

    @classmethod
    def of(
        cls, base: Allocator, losses: list[AdditiveTable], rows: list[Row], gap: float, time_limit: float
    ) -> Grid:
        """Solve each objective alone. Raises ``InfeasibleError``."""
        alone = [base.minimising(t).solve(rows, (), gap, time_limit).candidate for t in losses]
        reached = np.array([[t.total(c) for t in losses] for c in alone])
        low, high = reached.min(axis=0), reached.max(axis=0)
        width = np.where(high > low, high - low, 1.0)
        minimise = []
        for primary, table in enumerate(losses):
            grains = [1.0 if i == primary else GRAIN * width[primary] / width[i] for i in range(len(losses))]
            minimise.append(base.minimising(summed(losses, grains, table.metric)))
        return cls(losses, minimise, rows, low, high, gap, time_limit)

    @property
    def size(self) -> int:
        return len(self.losses)

    @property
    def anywhere(self) -> tuple[Allocator, list[Row]]:
        return self.minimise[0], self.rows

    def solves(self, intervals: int) -> int:
        """Most solves that a front takes."""
        return self.size * int((intervals + 1) ** (self.size - 1))

    def within(self, candidate: Candidate, primary: int) -> tuple[Allocator, list[Row]]:
        """What to solve for the best in one objective that is no worse than ``candidate`` in the others."""
        caps = [t.total(candidate) if i != primary else math.inf for i, t in enumerate(self.losses)]
        return self.minimise[primary], [*self.rows, *self._caps(np.array(caps))]

    def front(self, intervals: int) -> list[Candidate]:
        """What is not dominated among the solutions of the grid, farthest point first."""
        found: dict[str, Candidate] = {}
        for primary in range(self.size):
            axes = [self._bounds(i, intervals) if i != primary else [math.inf] for i in range(self.size)]
            for bounds in product(*axes):
                best = self._best(primary, np.array(bounds))
                if best is not None:
                    found[best.fingerprint] = best
        candidates = list(found.values())
        reached = np.array([[t.total(c) for t in self.losses] for c in candidates])
        kept = np.flatnonzero(non_dominated(reached))
        return [candidates[kept[i]] for i in spread_order(reached[kept])]

    def _bounds(self, objective: int, intervals: int) -> list[float]:
        """From none down to the best that is reachable. The top of the range is no bound: with three
        objectives the front may go beyond it."""
        low, high = float(self.low[objective]), float(self.high[objective])
        if high <= low:
            return [math.inf]
        return [math.inf, *np.linspace(low, high, intervals + 1)[-2::-1].tolist()]

    def _best(self, primary: int, bounds: Floats) -> Candidate | None:
        """The solution under ``bounds [objectives]``; ``None``: there is none.

        A looser solve whose solution meets these bounds is the answer, and so is one without a solution.
        """
        for other, wider, candidate in self.solved:
            if other != primary or np.any(wider < bounds):
                continue
            if candidate is None:
                return None
            if all(t.total(candidate) <= b for t, b in zip(self.losses, bounds, strict=True)):
                return candidate
        rows = [*self.rows, *self._caps(bounds)]
        try:
            best = self.minimise[primary].solve(rows, (), self.gap, self.time_limit, explain=False)
            found: Candidate | None = best.candidate
        except InfeasibleError:
            found = None
        self.solved.append((primary, bounds, found))
        return found

    def _caps(self, bounds: Floats) -> list[Row]:
        base = self.minimise[0]
        capped = [(t, float(b)) for t, b in zip(self.losses, bounds, strict=True) if math.isfinite(b)]
        return [base.row((t, b + 1e-9 * max(1.0, abs(b)))) for t, b in capped]
