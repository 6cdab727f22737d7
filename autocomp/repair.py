"""Greedy repair: bring an assignment back inside its space after random sampling, crossover or mutation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from autocomp.space import (
    AtMostDistinct,
    Choice,
    Interval,
    LinearBudget,
    Ordered,
    SearchSpace,
    SpaceConstraint,
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
    ties = [Tied(names) for names in moving_groups(space) if len(names) > 1]
    for kind in (Ordered, SumTo, Tied, AtMostDistinct, Tied):
        among: Sequence[SpaceConstraint] = ties if kind is Tied else space.constraints
        for constraint in among:
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
    group_of = {n: group for group in moving_groups(space) for n in group}
    for n in c.names:
        if values[n] in kept:
            continue
        partners = group_of[n]  # tied decisions come along, or the next repair of ties would undo this
        allowed = [v for v in kept if all(space.by_name[m].domain.contains(v) for m in partners)]
        if allowed:
            values.update(dict.fromkeys(partners, _nearest(space.by_name[n].domain, values[n], allowed)))


def _nearest(domain: Choice | Interval, value: Value, allowed: list[Value]) -> Value:
    if isinstance(domain, Choice):
        return min(allowed, key=lambda v: abs(domain.index(v) - domain.index(value)))
    return min(allowed, key=lambda v: abs(float(v or 0) - float(value or 0)))


_REPAIRS: dict[type, Callable[[Any, Values, np.random.Generator, SearchSpace], None]] = {
    Ordered: _repair_order,
    SumTo: _repair_sum,
    Tied: _repair_tied,
    AtMostDistinct: _repair_distinct,
}


def moving_groups(space: SearchSpace) -> list[tuple[str, ...]]:
    """Names that must change together: tied groups (joined where they share a name), others alone."""
    joined: list[dict[str, None]] = []
    for c in space.constraints:
        if isinstance(c, Tied):
            group = dict.fromkeys(c.names)
            for other in [g for g in joined if g.keys() & group.keys()]:
                joined.remove(other)
                group = {**other, **group}
            joined.append(group)
    tied = {n for g in joined for n in g}
    return [tuple(g) for g in joined if g] + [(d.name,) for d in space.decisions if d.name not in tied]


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
        if not moved and (saved := _cheaper_together(c, values, space, structural)) > 0:
            total, moved = total - saved, True
        if not moved:
            return


def _cheaper_together(
    c: LinearBudget, values: Values, space: SearchSpace, structural: list[AtMostDistinct]
) -> float:
    """Move all decisions of a distinctness constraint to one cheaper option; returns what that saves.

    Where few values are allowed no single move may be left, though all together could go down. Decisions
    tied to a member come along.
    """
    for limit in structural:
        members = {n for g in moving_groups(space) if set(g) & set(limit.names) for n in g}
        now = sum(c.table.cost(n, values[n]) for n in members)
        shared = [o for o in space.by_name[limit.names[0]].options
                  if all(space.by_name[n].domain.contains(o) for n in members)]  # fmt: skip
        costs = {o: sum(c.table.cost(n, o) for n in members) for o in shared}
        option = min(costs, key=lambda o: costs[o], default=None)
        if costs and costs[option] < now:
            after = {**values, **dict.fromkeys(members, option)}
            if all(k.violation(after) <= k.violation(values) for k in structural):
                values.update(after)
                return now - costs[option]
    return 0.0


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
