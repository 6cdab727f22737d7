"""The multiple-choice knapsack as arrays: compile a space, bound it by duality, drop options exactly.

Minimise ``sum_g cost[x_g]`` with one option ``x_g`` a group and rows ``sum_g weight[r, x_g] <= upper[r]``.
For any multipliers ``lam >= 0``

    L(lam) = sum_g min_o (cost[o] + lam . weight[:, o]) - lam . upper

is a lower bound, and ``L(lam)`` plus the reduced cost of an option bounds every solution that takes the
option. An option whose bound is above a known solution can be dropped without losing the optimum
(Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83, 1995).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import InfeasibleError, SpaceError
from autocomp.repair import moving_groups
from autocomp.searchers.blocks import Block, Limit, blocks_of
from autocomp.space import AdditiveTable, AtMostDistinct, Candidate, Choice, SearchSpace, Value

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


@dataclass(frozen=True)
class Groups:
    """Decisions that move together, and their options laid end to end.

    Attributes:
        names: decision names of each group; tied decisions share one.
        options: values that every member of the group may take.
    """

    names: tuple[tuple[str, ...], ...]
    options: tuple[tuple[Value, ...], ...]

    @classmethod
    def of(cls, space: SearchSpace) -> Groups:
        """Raises ``SpaceError`` for an interval, ``InfeasibleError`` when tied decisions share no option."""
        names, options = [], []
        for group in moving_groups(space):
            domains = [space.by_name[n].domain for n in group]
            if not all(isinstance(d, Choice) for d in domains):
                raise SpaceError(f"{group[0]} is an interval; an ILP takes finite choices only")
            shared = tuple(o for o in space.by_name[group[0]].options if all(d.contains(o) for d in domains))
            if not shared:
                raise InfeasibleError(f"tied decisions {list(group[:3])} have no option in common")
            names.append(group)
            options.append(shared)
        return cls(tuple(names), tuple(options))

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def start(self) -> Ints:
        """First position of each group's options, ``[groups]``."""
        sizes = [len(o) for o in self.options]
        return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.intp) if sizes else np.zeros(0, np.intp)

    @cached_property
    def owner(self) -> Ints:
        """Group of each position, ``[positions]``."""
        return np.repeat(np.arange(len(self)), [len(o) for o in self.options])

    @cached_property
    def group_of(self) -> dict[str, int]:
        return {n: g for g, names in enumerate(self.names) for n in names}

    def costs(self, table: AdditiveTable) -> Floats:
        """Cost of each position, ``[positions]``; NaN where the table knows nothing."""
        flat: list[float] = []
        for names, options in zip(self.names, self.options, strict=True):
            rows = [table.costs[n] for n in names if n in table.costs]
            if len(rows) == 1:
                flat += [rows[0].get(o, math.nan) for o in options]
            else:
                flat += [math.fsum(row.get(o, math.nan) for row in rows) for o in options]
        return np.array(flat, dtype=np.float64)

    def candidate(self, positions: Ints) -> Candidate:
        """The candidate that takes one position a group, ``[groups]``."""
        values: dict[str, Value] = {}
        for g, position in enumerate(positions):
            values.update(dict.fromkeys(self.names[g], self.options[g][int(position - self.start[g])]))
        return Candidate.of(values)

    def positions(self, candidate: Candidate) -> Ints | None:
        """Inverse of ``candidate``; ``None`` when the candidate unties a group or has a foreign value."""
        found = []
        for names, options, start in zip(self.names, self.options, self.start, strict=True):
            values = {repr(candidate.values.get(n)) for n in names}
            texts = [repr(o) for o in options]
            if len(values) != 1 or (text := values.pop()) not in texts:
                return None
            found.append(int(start) + texts.index(text))
        return np.array(found, dtype=np.intp)


@dataclass(frozen=True)
class Row:
    """``weight . x <= upper`` over positions, ``weight [positions]``.

    ``metric`` and ``base`` are for messages: the metric's own total is ``base + weight . x``.
    """

    weight: Floats
    upper: float
    metric: str
    base: float = 0.0

    def __str__(self) -> str:
        return f"{self.metric} <= {self.base + self.upper:.6g}"

    @property
    def slack(self) -> float:
        """What rounding may add to a sum that meets the bound exactly (as ``LinearBudget`` has it)."""
        return 1e-9 * max(1.0, abs(self.upper))


def merged(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Of rows with the same weights the tightest (a sweep's bound on what has a budget already)."""
    kept: dict[bytes, Row] = {}
    for row in rows:
        other = kept.setdefault(row.weight.tobytes(), row)
        if row.upper < other.upper:
            kept[row.weight.tobytes()] = row
    return tuple(kept.values())


@dataclass(frozen=True)
class Structure:
    """Limits on different values and the blocks that they make of the groups, built once for many solves."""

    limits: tuple[Limit, ...] = ()
    blocks: tuple[Block, ...] = ()

    @classmethod
    def of(cls, space: SearchSpace, groups: Groups) -> Structure:
        """The ``AtMostDistinct`` constraints of a space, without those that always hold."""
        limits = []
        for c in space.constraints:
            if not isinstance(c, AtMostDistinct):
                continue
            members = tuple(sorted({groups.group_of[n] for n in c.names}))
            keys = tuple(tuple(c.key(o) for o in groups.options[g]) for g in members)
            if len(members) > c.k and len({key for row in keys for key in row}) > c.k:
                limits.append(Limit(members, c.k, keys))
        return cls(tuple(limits), blocks_of(limits, groups.start, len(groups.owner)))


@dataclass(frozen=True)
class Knapsack:
    """One instance over ``groups``.

    Attributes:
        cost: ``[positions]``, at least 0, with 0 the cheapest option of each group.
        rows: budgets that are worth a multiplier.
        structure: limits on different values, and the blocks of groups that they bind.
        exclude: assignments ``[groups]`` that are not wanted.
        allowed: ``[positions]``, false where an option is unknown to a table.
    """

    groups: Groups
    cost: Floats
    rows: tuple[Row, ...] = ()
    structure: Structure = field(default_factory=lambda: Structure())
    exclude: tuple[Ints, ...] = ()
    allowed: NDArray[np.bool_] | None = None

    @property
    def mask(self) -> NDArray[np.bool_]:
        return np.ones(len(self.cost), dtype=bool) if self.allowed is None else self.allowed

    def value(self, x: Ints) -> float:
        return float(self.cost[x].sum())

    def feasible(self, x: Ints) -> bool:
        """Every row within its rounding slack, distinctness and exclusions; ``x [groups]``."""
        return (
            all(float(r.weight[x].sum()) <= r.upper + r.slack for r in self.rows)
            and all(
                c.holds([int(x[g] - self.groups.start[g]) for g in c.groups]) for c in self.structure.limits
            )
            and not any(np.array_equal(x, e) for e in self.exclude)
        )

    def cheapest(self, flat: Floats) -> tuple[Ints, Floats]:
        """Position and value of each group's smallest allowed entry of ``flat [positions]``."""
        start, owner = self.groups.start, self.groups.owner
        masked = np.where(self.mask, flat, np.inf)
        best = np.minimum.reduceat(masked, start)
        hits = np.flatnonzero(masked == best[owner])
        first = np.unique(owner[hits], return_index=True)[1]
        return hits[first], best

    def optimum(self, flat: Floats) -> tuple[Ints, float]:
        """The cheapest assignment ``[groups]`` within the limits, without rows, and its sum of ``flat``.

        The sum is infinite where the limits of a block can't be met.
        """
        x, best = self.cheapest(flat)
        masked, together = np.where(self.mask, flat, np.inf), 0.0
        for block in self.structure.blocks:
            x[block.groups], total = block.cheapest(masked)
            best[block.groups] = 0.0
            together += total
        return x, float(best.sum()) + together

    def reduced(self, flat: Floats) -> Floats:
        """What it costs at least to take each position instead of ``optimum(flat)``, ``[positions]``."""
        _, best = self.cheapest(flat)
        above = np.asarray(flat - best[self.groups.owner])
        masked = np.where(self.mask, flat, np.inf)
        for block in self.structure.blocks:
            above[block.at] = block.reduced(masked)
        return above


@dataclass(frozen=True)
class Dual:
    """Multipliers ``[rows]``, the lower bound that they prove, and what it costs at least to take each
    position (``Knapsack.reduced`` of the priced costs)."""

    multipliers: Floats
    bound: float
    reduced: Floats


def solve_dual(problem: Knapsack, rounds: int = 200, tolerance: float = 1e-7) -> Dual:
    """Maximise ``L`` by Kelley's cutting planes: each solved subproblem is one plane above it.

    The master has one variable a row, so its LP is tiny; the subproblem is a vectorised minimum.
    Rows and costs are scaled to order one inside.
    """
    from scipy.optimize import linprog

    weights = np.array([r.weight for r in problem.rows]).reshape(len(problem.rows), len(problem.cost))
    upper = np.array([r.upper for r in problem.rows])
    if len(upper) < 2:
        return _dual_of_one(problem, weights, upper, rounds)
    scale = _scale(problem.cost[problem.mask]) / np.array([_spread(problem, w) for w in weights])
    planes: list[Floats] = []
    lam = np.zeros(len(upper))
    best: tuple[float, Floats] | None = None
    for _ in range(rounds):
        x, bound = _relaxed(problem, lam * scale, weights, upper)
        best = (bound, lam) if best is None or bound > best[0] else best
        overrun = (weights[:, x].sum(axis=1) - upper) * scale
        planes.append(np.array([problem.value(x), *overrun]))
        stacked = np.array(planes)
        master = linprog(
            [*np.zeros(len(lam)), -1.0],
            A_ub=np.column_stack([-stacked[:, 1:], np.ones(len(planes))]),
            b_ub=stacked[:, 0],
            bounds=[(0.0, 1e6)] * len(lam) + [(None, None)],
        )
        if master.x is None or -master.fun - best[0] <= tolerance * max(1e-12, abs(best[0])):
            break
        lam = np.asarray(master.x[:-1])
    assert best is not None
    return dual_at(problem, best[1] * scale)


def _dual_of_one(problem: Knapsack, weights: Floats, upper: Floats, rounds: int) -> Dual:
    """At most one row: the next multiplier is where the planes on either side of the optimum meet."""
    if not len(upper):
        return dual_at(problem, np.zeros(0))
    best = -math.inf, 0.0

    def plane(lam: float) -> tuple[float, float]:
        nonlocal best
        x, bound = _relaxed(problem, np.array([lam]), weights, upper)
        best = max(best, (bound, lam), key=lambda b: b[0])
        return problem.value(x), float(weights[0, x].sum()) - float(upper[0])

    steep = 1e6 * _scale(problem.cost[problem.mask]) / _spread(problem, weights[0])
    left, right = plane(0.0), plane(steep)
    for _ in range(rounds):
        if left[1] <= 0 or right[1] > 0:  # the row does not bind, or can't be met
            break
        lam = (right[0] - left[0]) / (left[1] - right[1])
        middle = plane(lam)
        if middle in (left, right) or middle[1] == 0:
            break
        left, right = (middle, right) if middle[1] > 0 else (left, middle)
    return dual_at(problem, np.array([best[1]]))


def _relaxed(problem: Knapsack, multipliers: Floats, weights: Floats, upper: Floats) -> tuple[Ints, float]:
    """The cheapest assignment at these multipliers, and the bound that it proves."""
    x, total = problem.optimum(problem.cost + multipliers @ weights)
    return x, total - float(multipliers @ upper)


def dual_at(problem: Knapsack, multipliers: Floats) -> Dual:
    """What the given multipliers ``[rows]`` prove."""
    weights = np.array([r.weight for r in problem.rows]).reshape(len(problem.rows), len(problem.cost))
    upper = np.array([r.upper for r in problem.rows])
    bound = _relaxed(problem, multipliers, weights, upper)[1]
    return Dual(multipliers, bound, problem.reduced(problem.cost + multipliers @ weights))


def _scale(values: Floats) -> float:
    positive = values[np.isfinite(values) & (values > 0)]
    return float(positive.mean()) if len(positive) else 1.0


def _spread(problem: Knapsack, weight: Floats) -> float:
    """Mean difference between the options of a group in one row: the row's natural unit."""
    masked = np.where(problem.mask, weight, np.nan)
    start = problem.groups.start
    gap = np.fmax.reduceat(masked, start) - np.fmin.reduceat(masked, start)
    return max(float(np.nanmean(gap)), 1e-12) if len(gap) else 1.0


def greedy(problem: Knapsack, dual: Dual, rounds: int = 400) -> Ints | None:
    """A feasible assignment near the relaxed optimum, or ``None`` when the greedy finds none.

    Starts at the priced optimum, first takes the moves that repair the overrun at the least reduced
    cost, then those that lower the cost and still fit.
    """
    x = problem.cheapest(dual.reduced)[0].copy()
    if problem.rows:
        weights = np.array([r.weight for r in problem.rows])
        upper = np.array([r.upper + 0.5 * r.slack for r in problem.rows])
        units = np.array([_spread(problem, w) for w in weights])
        weights, upper = weights / units[:, None], upper / units
        if not _repair(problem, dual.reduced, weights, upper, x, rounds):
            return None
        _improve(problem, weights, upper, x, rounds)
    return x if problem.feasible(x) else None


def _repair(problem: Knapsack, priced: Floats, weights: Floats, upper: Floats, x: Ints, rounds: int) -> bool:
    owner, mask = problem.groups.owner, problem.mask
    for _ in range(rounds):
        over = weights[:, x].sum(axis=1) - upper
        if np.all(over <= 0):
            return True
        delta = weights - weights[:, x][:, owner]
        gain = np.maximum(over, 0).sum() - np.maximum(over[:, None] + delta, 0).sum(axis=0)
        useful = mask & (gain > 0)
        if not useful.any():
            return False
        price = np.where(useful, (priced - priced[x][owner]) / np.where(useful, gain, 1.0), np.inf)
        move = int(np.argmin(price))
        x[owner[move]] = move
    return False


def _improve(problem: Knapsack, weights: Floats, upper: Floats, x: Ints, rounds: int) -> None:
    owner, mask, cost = problem.groups.owner, problem.mask, problem.cost
    for _ in range(rounds):
        room = upper - weights[:, x].sum(axis=1)
        fits = np.all(weights - weights[:, x][:, owner] <= room[:, None], axis=0)
        gain = np.where(mask & fits, cost[x][owner] - cost, 0.0)
        move = int(np.argmax(gain))
        if gain[move] <= 0:
            return
        x[owner[move]] = move


def undominated(problem: Knapsack) -> NDArray[np.bool_]:
    """Allowed positions without those that another option of the group beats in cost and in every row.

    Only exact where nothing but the rows looks at the option: with limits or exclusions all
    allowed positions are kept.
    """
    keep = problem.mask.copy()
    if problem.structure.limits or problem.exclude:
        return keep
    columns = np.column_stack([problem.cost, *(r.weight for r in problem.rows)])
    sizes = np.diff(np.append(problem.groups.start, len(columns)))
    for size in np.unique(sizes):  # all groups of one size at a time: [groups, options, columns]
        starts = problem.groups.start[sizes == size]
        where = starts[:, None] + np.arange(size)
        block, alive = columns[where], problem.mask[where]
        for o in range(size):
            no_worse = np.all(block <= block[:, [o]], axis=2) & alive
            better = np.any(block < block[:, [o]], axis=2) | (np.arange(size) < o)
            better[:, o] = False
            keep[where[:, o]] &= ~np.any(no_worse & better, axis=1)
    return keep
