"""Exact allocation: one option a decision, the least summed cost under linear budgets, with a proven gap."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from autocomp.errors import CapabilityError, InfeasibleError, ObjectiveError
from autocomp.pareto import non_dominated
from autocomp.searchers.base import Problem
from autocomp.searchers.branch import solve_knapsack
from autocomp.searchers.common import (
    Budget,
    loss_tables,
    seen_fingerprints,
    span,
    spread_order,
    summed,
    table_budgets,
)
from autocomp.searchers.mckp import Groups, Knapsack, Row, Structure, merged
from autocomp.space import AdditiveTable, Candidate, LinearBudget, SearchSpace
from autocomp.trial import Trial


@dataclass(frozen=True)
class Solution:
    """A candidate and how good it is known to be.

    Attributes:
        candidate: meets every budget and structural constraint.
        objective: ``cost.total(candidate)``.
        bound: no feasible candidate has a smaller total.
        gap: ``(objective - bound) / (objective - floor)``, where the floor is the total of the cheapest
            option everywhere: the share of the avoidable cost that might still be saved. 0 is optimal.
        seconds: wall time of this solve.
    """

    candidate: Candidate
    objective: float
    bound: float
    gap: float
    seconds: float


@dataclass(frozen=True)
class Allocator:
    """A space and a cost table, compiled once for many solves with different budgets."""

    space: SearchSpace
    cost: AdditiveTable

    def minimising(self, cost: AdditiveTable) -> Allocator:
        """An allocator of the same space for another cost; what was compiled is shared."""
        other = replace(self, cost=cost)
        other.__dict__.update(groups=self.groups, structure=self.structure, own_rows=self.own_rows)
        return other

    @cached_property
    def groups(self) -> Groups:
        check_additive(self.space)
        return Groups.of(self.space)

    @cached_property
    def structure(self) -> Structure:
        return Structure.of(self.space, self.groups)

    @cached_property
    def own_rows(self) -> tuple[Row, ...]:
        budgets = [(c.table, c.upper) for c in self.space.constraints if isinstance(c, LinearBudget)]
        return tuple(self.row(b) for b in budgets)

    def row(self, budget: Budget) -> Row:
        table, upper = budget
        return Row(self.groups.costs(table), upper - table.base, table.metric, table.base)

    def near(self, center: Candidate, changes: int) -> Row:
        """At most ``changes`` groups may differ from ``center``.

        Raises:
            InfeasibleError: the centre is not in the space.
        """
        at = self.groups.positions(center)
        if at is None:
            raise InfeasibleError(f"the trust region's centre {center.fingerprint} is not in the space")
        weight = np.ones(len(self.groups.owner))
        weight[at] = 0.0
        return Row(weight, float(changes), "changes")

    def solve(
        self,
        rows: Sequence[Row] = (),
        exclude: Iterable[Candidate] = (),
        gap: float = 1e-3,
        time_limit: float = 60.0,
        explain: bool = True,
    ) -> Solution:
        """See the function ``solve``. Without ``explain`` the error does not say what can be reached."""
        began = time.perf_counter()
        problem, floor = self._knapsack(merged((*self.own_rows, *rows)), exclude)
        x, bound = solve_knapsack(problem, gap, time_limit, explain)
        excess = problem.value(x)
        bound = min(bound, excess)
        left = excess - bound
        share = 0.0 if left <= 1e-9 * max(float(problem.cost.max(initial=0.0)), 1e-300) else left / excess
        candidate = self.groups.candidate(x)
        seconds = time.perf_counter() - began
        return Solution(candidate, self.cost.total(candidate), floor + bound, share, seconds)

    def _knapsack(self, rows: tuple[Row, ...], exclude: Iterable[Candidate]) -> tuple[Knapsack, float]:
        """The instance with costs above each group's cheapest option, and the sum of those."""
        groups = self.groups
        raw = groups.costs(self.cost)
        allowed = np.isfinite(raw)
        for row in rows:
            allowed &= np.isfinite(row.weight)
        blocked = np.setdiff1d(np.arange(len(groups)), groups.owner[allowed])
        if len(blocked):
            name = groups.names[int(blocked[0])][0]
            tables = ", ".join([self.cost.metric, *(str(r) for r in rows)])
            raise InfeasibleError(
                f"no option of {name} has a known cost in every table ({tables}); profile it"
            )
        safe = tuple(replace(r, weight=np.where(allowed, r.weight, 0.0)) for r in rows)
        found = (groups.positions(c) for c in exclude)
        unwanted = tuple(p for p in found if p is not None)
        least = Knapsack(groups, np.where(allowed, raw, 0.0), allowed=allowed).cheapest(raw)[1]
        cost = np.where(allowed, raw - least[groups.owner], 0.0)
        return Knapsack(groups, cost, safe, self.structure, unwanted, allowed), self.cost.base + float(
            least.sum()
        )


def check_additive(space: SearchSpace) -> None:
    """Raise ``CapabilityError`` when the space has something that an ILP here can't express."""
    reasons = space_reasons(space)
    if reasons:
        raise CapabilityError(f"the ILP can't take this space: {'; '.join(reasons)}")


def space_reasons(space: SearchSpace) -> list[str]:
    """What in the space an ILP here can't express; empty when it can."""
    reasons = []
    intervals = [d.name for d in space.decisions if not d.options]
    if intervals:
        reasons.append(f"{len(intervals)} decisions are intervals ({intervals[0]}); use hybrid or evolution")
    other = {type(c).__name__ for c in space.constraints} - {"Tied", "AtMostDistinct", "LinearBudget"}
    if other:
        reasons.append(f"constraints of kind {', '.join(sorted(other))} are not linear in the options")
    if not space.decisions:
        reasons.append("there is nothing to decide")
    return reasons


def solve(
    space: SearchSpace,
    cost: AdditiveTable,
    budgets: Sequence[Budget] = (),
    *,
    gap: float = 1e-3,
    time_limit: float = 60.0,
    exclude: Iterable[Candidate] = (),
    trust: tuple[Candidate, int] | None = None,
) -> Solution:
    """The candidate of least ``cost.total`` that meets the space's constraints and ``budgets``.

    Args:
        space: finite choices; its own ``LinearBudget`` constraints hold as well.
        cost: what to minimise, in its metric's unit.
        budgets: (table, upper) pairs: ``table.total(candidate) <= upper``.
        gap: relative optimality gap that may be left, see ``Solution``.
        time_limit: seconds for branch and bound; the best solution so far is returned with its gap.
        exclude: candidates that must not be returned.
        trust: (centre, k): at most k decisions (tied ones count once) differ from the centre.

    Raises:
        InfeasibleError: nothing meets the constraints; names the smallest reachable total.
        CapabilityError: the space has intervals, or no solver is installed.
    """
    allocator = Allocator(space, cost)
    rows = [allocator.row(b) for b in budgets]
    if trust is not None:
        rows.append(allocator.near(*trust))
    return allocator.solve(rows, exclude, gap, time_limit)


def sweep(
    space: SearchSpace,
    cost: AdditiveTable,
    by: AdditiveTable,
    points: int | None = 16,
    *,
    budgets: Sequence[Budget] = (),
    gap: float = 1e-3,
    time_limit: float = 60.0,
) -> list[Solution]:
    """The front of ``cost`` against ``by``, by the epsilon-constraint method (Haimes et al., 1971).

    With ``points`` the cost is minimised under that many evenly spaced bounds on ``by``, from its smallest
    reachable total to the total of the unconstrained optimum. With ``None`` every point of the front is
    found, those off its convex hull included: after each optimum ``by`` is minimised at that cost, and
    the next bound lies just below (for small spaces; solves are then exact).

    Returns:
        Solutions with rising ``by`` and falling cost, none dominated in (cost, by).

    Raises:
        InfeasibleError: nothing meets the other constraints.
    """
    main = Allocator(space, cost)
    side = main.minimising(by)
    rows = [main.row(b) for b in budgets]
    if points is None:
        return _every_point(main, side, rows, time_limit)
    low = side.solve(rows, (), gap, time_limit)
    best = main.solve(rows, (), gap, time_limit)
    bounds = np.linspace(low.objective, max(low.objective, by.total(best.candidate)), max(points, 2))
    found = [main.solve([*rows, main.row((by, float(b)))], (), gap, time_limit) for b in bounds[:-1]]
    return _front([*found, best], by)


def _every_point(main: Allocator, side: Allocator, rows: list[Row], limit: float) -> list[Solution]:
    found: list[Solution] = []
    by = side.cost
    span = sum(max(r.values()) - min(r.values()) for r in by.costs.values() if r) or 1.0
    bound = math.inf
    while True:
        capped = [*rows, main.row((by, bound))] if found else rows
        try:
            best = main.solve(capped, (), 0.0, limit)
        except InfeasibleError:
            if not found:
                raise
            return _front(found, by)
        same_cost = main.row((main.cost, best.objective + 1e-9 * max(1.0, abs(best.objective))))
        least = side.solve([*rows, same_cost], (), 0.0, limit).candidate
        found.append(replace(best, candidate=least, objective=main.cost.total(least)))
        bound = by.total(least) - 1e-6 * span


def _front(found: Iterable[Solution], by: AdditiveTable) -> list[Solution]:
    unique = list({s.candidate.fingerprint: s for s in found}.values())
    pairs = np.array([[s.objective, by.total(s.candidate)] for s in unique])
    kept = [s for s, keep in zip(unique, non_dominated(pairs), strict=True) if keep]
    return sorted(kept, key=lambda s: by.total(s.candidate))


# --- the searcher -----------------------------------------------------------------------------------------


class IlpSearcher:
    """Proposes the front that the problem's tables predict, spread out so that every prefix covers it.

    One objective's table is the cost: the first that is a model (a sensitivity), else the first. It is
    minimised under a sweep of bounds on the other objectives' tables, one at a time and in equal parts;
    with one objective the exact tables (bytes) take that place, those with a bound first. When all points
    of the sweep were proposed the sweep gets finer, then next-best candidates follow.

    Args:
        points: bounds of the coarsest sweep.
        gap: optimality gap of a solve, see ``Solution``.
        time_limit: seconds a solve.
    """

    def __init__(
        self, problem: Problem, *, points: int = 12, gap: float = 1e-3, time_limit: float = 20.0
    ) -> None:
        self.problem = problem
        self.points, self.gap, self.time_limit = points, gap, time_limit
        self._plans: dict[int, list[Candidate]] = {}  # a pure function of the problem, kept

    @staticmethod
    def unsupported(problem: Problem) -> list[str]:
        reasons = space_reasons(problem.space)
        if not loss_tables(problem.objectives, problem.tables):
            wanted = ", ".join(o.metric for o in problem.objectives)
            reasons.append(f"no additive table for {wanted}; profile sensitivities or use evolution")
        return reasons

    def ask(self, n: int, history: Sequence[Trial], pending: Sequence[Candidate]) -> list[Candidate]:
        """See ``Searcher.ask``.

        Raises:
            InfeasibleError: the budgets on exact tables can't be met.
        """
        seen = seen_fingerprints(history, pending)
        fresh: list[Candidate] = []
        for finer in (1, 2, 4):
            plan = self._plan(max(self.points, min(n, 64)) * finer)
            fresh = [c for c in plan if c.fingerprint not in seen]
            if len(fresh) >= n:
                return fresh[:n]
        known = [t.candidate for t in history] + list(pending)
        return fresh + self._next_best(n - len(fresh), known + fresh, plan)

    def _plan(self, points: int) -> list[Candidate]:
        if points not in self._plans:
            self._plans[points] = front_plan(
                self.problem, self.problem.tables, points, self.gap, self.time_limit
            )
        return self._plans[points]

    def _next_best(self, n: int, known: list[Candidate], plan: list[Candidate]) -> list[Candidate]:
        """The best left within each planned point's total of the first side, in turn; then anywhere."""
        cost, sides = cost_and_sides(self.problem, self.problem.tables)
        allocator = Allocator(self.problem.space, cost)
        rows = [allocator.row(b) for b in hard_budgets(self.problem, self.problem.tables)]
        caps = [[allocator.row((sides[0], sides[0].total(p)))] for p in plan if sides]
        turns = [(allocator, [*rows, *cap]) for cap in [*caps, []]]
        return next_best(n, turns, known, self.gap, self.time_limit)


def next_best(
    n: int,
    turns: Iterable[tuple[Allocator, list[Row]]],
    known: Sequence[Candidate],
    gap: float,
    time_limit: float,
) -> list[Candidate]:
    """At most ``n`` candidates that are not ``known``: the best left within each turn's rows, round and
    round."""
    left = deque(turns)
    found: list[Candidate] = []
    while left and len(found) < n:
        allocator, rows = left.popleft()
        try:
            best = allocator.solve(rows, [*known, *found], gap, time_limit, explain=False)
        except InfeasibleError:
            continue  # everything within these rows was proposed
        found.append(best.candidate)
        left.append((allocator, rows))
    return found


def cost_and_sides(
    problem: Problem, tables: Mapping[str, AdditiveTable]
) -> tuple[AdditiveTable, list[AdditiveTable]]:
    """The table to minimise and those to bound, all as losses (see ``IlpSearcher``).

    Objectives with the same costs (divergence and accuracy by one profile) are one: nothing is traded there.
    Where that leaves no side it is the bounded exact tables, or all exact ones when none is bounded.
    """
    losses = loss_tables(problem.objectives, tables)
    if not losses:
        raise ObjectiveError(f"no table for any of {[o.metric for o in problem.objectives]}")
    cost = next((t for t in losses if not t.exact), losses[0])
    sides: list[AdditiveTable] = []
    for table in losses:
        if all(table.costs != other.costs for other in (cost, *sides)):
            sides.append(table)
    if sides:
        return cost, sides
    exact = [t for t in tables.values() if t.exact and t.metric != cost.metric]
    bounded = {c.metric for c in problem.constraints}
    return cost, [t for t in exact if t.metric in bounded] or exact


def hard_budgets(problem: Problem, tables: Mapping[str, AdditiveTable]) -> list[Budget]:
    """Bounds on tables: all of them when they can be met, otherwise only the exact ones.

    A modelled total (a sum of sensitivities) that misses its bound may still be measured within it.
    """
    exact = table_budgets(problem.constraints, tables, exact=True)
    modelled = table_budgets(problem.constraints, tables, exact=False)
    if not modelled:
        return exact
    cost, _ = cost_and_sides(problem, tables)
    try:
        solve(problem.space, cost, [*exact, *modelled], gap=0.1, time_limit=10.0)
    except InfeasibleError:
        return exact
    return [*exact, *modelled]


def side_mixes(sides: Sequence[AdditiveTable]) -> list[AdditiveTable]:
    """Each side table by itself and, when there are several, all of them in equal parts of their ranges."""
    if len(sides) < 2:
        return list(sides)
    return [*sides, summed(sides, [1.0 / span(s) for s in sides], "+".join(s.metric for s in sides))]


def front_plan(
    problem: Problem, tables: Mapping[str, AdditiveTable], points: int, gap: float, time_limit: float
) -> list[Candidate]:
    """Candidates on the front that ``tables`` predict, farthest point first.

    Raises:
        InfeasibleError: the budgets on exact tables can't be met.
    """
    cost, sides = cost_and_sides(problem, tables)
    budgets = hard_budgets(problem, tables)
    found: dict[str, Candidate] = {}
    for mix in side_mixes(sides):
        for s in sweep(problem.space, cost, mix, points, budgets=budgets, gap=gap, time_limit=time_limit):
            found[s.candidate.fingerprint] = s.candidate
    if not sides:
        best = solve(problem.space, cost, budgets, gap=gap, time_limit=time_limit).candidate
        return [best]
    candidates = list(found.values())
    losses = np.array([[t.total(c) for t in [cost, *sides]] for c in candidates])
    kept = np.flatnonzero(non_dominated(losses))
    return [candidates[kept[i]] for i in spread_order(losses[kept])]
