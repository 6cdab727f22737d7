"""Greedy repair: bring an assignment back inside its space after random sampling, crossover or mutation."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from autocomp.space import (
    AtMostDistinct,
    Choice,
    Interval,
    LinearBudget,
    Ordered,
    SearchSpace,
    SumTo,
    Tied,
    Value,
)

Values = dict[str, Value]


def repair_values(space: SearchSpace, values: Values, rng: np.random.Generator) -> Values:
    """Repair in the order domain, order/sum, distinctness, ties, budgets.

    Budgets come last and move tied decisions together, so that they keep what was repaired before.
    A budget that no assignment can meet is left violated; callers ask ``space.violations``.
    """
    for d in space.decisions:
        value = values.get(d.name)
        if isinstance(d.domain, Interval) and isinstance(value, float) and math.isfinite(value):
            values[d.name] = min(max(value, d.domain.low), d.domain.high)
        elif d.name not in values or not d.domain.contains(value):
            values[d.name] = d.domain.sample(rng)
    # Ties before distinctness: a decision may stand in both kinds.
    for kind in (Ordered, SumTo, Tied, AtMostDistinct, Tied):
        for constraint in space.constraints:
            if isinstance(constraint, kind):
                _REPAIRS[kind](constraint, values, rng, space)
    for constraint in space.constraints:
        if isinstance(constraint, LinearBudget):
            _repair_budget(constraint, values, rng, space)
    return values


def _repair_order(c: Ordered, values: Values, rng: np.random.Generator, space: SearchSpace) -> None:
    used = [n for n in c.names if values[n] is not None]
    ranked = sorted((float(values[n]) for n in used), reverse=c.descending)  # type: ignore[arg-type]
    values.update(zip(used, ranked, strict=True))


def _repair_sum(c: SumTo, values: Values, rng: np.random.Generator, space: SearchSpace) -> None:
    """Move the difference into the coordinates that still have room (a few rounds of water filling)."""
    for _ in range(len(c.names) + 1):
        gap = c.total - sum(float(values[n] or 0.0) for n in c.names)
        if abs(gap) <= 1e-9:
            return
        room: dict[str, float] = {}
        for n in c.names:
            domain = space.by_name[n].domain
            assert isinstance(domain, Interval), f"SumTo needs float decisions; {n} is categorical"
            limit = domain.high if gap > 0 else domain.low
            room[n] = limit - float(values[n] or 0.0)
        total = sum(room.values())
        if abs(total) <= 1e-12:
            return
        step = min(1.0, gap / total)
        for n in c.names:
            values[n] = float(values[n] or 0.0) + step * room[n]


def _repair_tied(c: Tied, values: Values, rng: np.random.Generator, space: SearchSpace) -> None:
    shared = [values[n] for n in c.names if all(space.by_name[m].domain.contains(values[n]) for m in c.names)]
    if shared:
        chosen = shared[int(rng.integers(len(shared)))] if len(set(map(repr, shared))) > 1 else shared[0]
        values.update(dict.fromkeys(c.names, chosen))


def _repair_distinct(c: AtMostDistinct, values: Values, rng: np.random.Generator, space: SearchSpace) -> None:
    counts = Counter(values[n] for n in c.names)
    if len(counts) <= c.k:
        return
    kept = [value for value, _ in counts.most_common(c.k)]
    for n in c.names:
        if values[n] in kept:
            continue
        domain = space.by_name[n].domain
        allowed = [v for v in kept if domain.contains(v)]
        if allowed:
            values[n] = _nearest(domain, values[n], allowed)


def _nearest(domain: Choice | Interval, value: Value, allowed: list[Value]) -> Value:
    if isinstance(domain, Choice):
        return min(allowed, key=lambda v: abs(domain.index(v) - domain.index(value)))
    return min(allowed, key=lambda v: abs(float(v or 0) - float(value or 0)))


_REPAIRS = {
    Ordered: _repair_order,
    SumTo: _repair_sum,
    Tied: _repair_tied,
    AtMostDistinct: _repair_distinct,
}


def moving_groups(space: SearchSpace) -> list[tuple[str, ...]]:
    """Names that must change together: each tied group once, every other decision alone."""
    groups = [c.names for c in space.constraints if isinstance(c, Tied)]
    tied = {n for g in groups for n in g}
    return groups + [(d.name,) for d in space.decisions if d.name not in tied]


def _repair_budget(c: LinearBudget, values: Values, rng: np.random.Generator, space: SearchSpace) -> None:
    """Take random cheaper moves until the budget holds; structural constraints are never broken."""
    total = c.table.base + sum(c.table.cost(n, values[n]) for n in c.table.costs)
    if total <= c.upper:
        return
    structural = [k for k in space.constraints if isinstance(k, AtMostDistinct)]
    groups = [g for g in moving_groups(space) if any(n in c.table.costs for n in g)]
    while total > c.upper:
        moved = False
        for index in rng.permutation(len(groups)):
            names = groups[int(index)]
            cheaper = _cheaper_moves(c, names, values, space, structural)
            if not cheaper:
                continue
            option, saved = cheaper[0]
            values.update(dict.fromkeys(names, option))
            total, moved = total - saved, True
            if total <= c.upper:
                return
        if not moved:
            return


def _cheaper_moves(
    c: LinearBudget,
    names: tuple[str, ...],
    values: Values,
    space: SearchSpace,
    structural: list[AtMostDistinct],
) -> list[tuple[Value, float]]:
    """Options that cost less for the whole group, the smallest saving first."""
    now = sum(c.table.cost(n, values[n]) for n in names)
    moves = []
    for option in space.by_name[names[0]].options:
        if not all(space.by_name[n].domain.contains(option) for n in names):
            continue
        saved = now - sum(c.table.cost(n, option) for n in names)
        if not saved > 0:
            continue
        after = {**values, **dict.fromkeys(names, option)}
        if all(k.violation(after) <= k.violation(values) for k in structural if set(names) & set(k.names)):
            moves.append((option, saved))
    return sorted(moves, key=lambda m: m[1])
