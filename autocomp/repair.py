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
    Slots,
    SpaceConstraint,
    SumTo,
    Tied,
    Value,
)

Values = dict[str, Value]


def repair_values(space: SearchSpace, values: Values, rng: np.random.Generator) -> Values:
    """Repair in the order domain, slots, order/sum, distinctness, ties, budgets.

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
    ties = [Tied(names) for names in tied_groups(space)]
    # Distinctness twice: where not all pieces combine, one constraint's repair may undo another's.
    for kind in (Slots, Ordered, SumTo, Tied, AtMostDistinct, Tied, AtMostDistinct):
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
    rising = sorted(float(values[n]) for n in used)  # type: ignore[arg-type]
    if c.gap and used:
        domains = [d for n in used if isinstance(d := space.by_name[n].domain, Interval)]
        rising = spaced(rising, c.gap, max(d.low for d in domains), min(d.high for d in domains))
    values.update(zip(used, rising[::-1] if c.descending else rising, strict=True))


def spaced(rising: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The rising numbers within ``[low, high]``, at least ``gap`` apart: pushed up, then down from ``high``.
    Where there is no room for all of them, the first ones stay at ``low`` together.
    """
    found = [max(low, x) for x in rising]
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + gap)
    ceiling = high
    for i in reversed(range(len(found))):
        found[i] = max(low, min(found[i], ceiling))
        ceiling = found[i] - gap
    return found


def _repair_slots(c: Slots, values: Values, rng: np.random.Generator, space: SearchSpace) -> None:
    """Bring used slots to the front as wholes (where they are packed) and unused ones to rest."""
    del rng
    rows = [[values[n] for n in group] for group in c.groups]
    used = [row for row in rows if row[0] is not None]
    if c.packed:
        rows = used + [row for row in rows if row[0] is None]
    for group, row in zip(c.groups, rows, strict=True):
        wanted = row if row[0] is not None else [None, *c.rest]
        for name, value in zip(group, wanted, strict=True):
            domain = space.by_name[name].domain
            # A slot that moved may bring an option that its new place lacks: the last one there is nearest.
            lacking = isinstance(domain, Choice) and not domain.contains(value)
            values[name] = domain.options[-1] if lacking and isinstance(domain, Choice) else value


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
    """Keep ``k`` of the keys and move what has others to its nearest option with one of those.

    They are drawn by how often they occur: the most common ones would leave a mutation no chance.
    """
    counts = Counter(c.key(values[n]) for n in c.names)
    if len(counts) <= c.k:
        return
    share = np.array(list(counts.values()), dtype=float) / len(c.names)
    drawn = rng.choice(len(counts), size=c.k, replace=False, p=share)
    kept = {list(counts)[int(i)] for i in drawn}
    for n, partners in _partners(c, space):
        if c.key(values[n]) in kept:
            continue
        allowed = [v for v in _shared(partners, space) if c.key(v) in kept]
        if allowed:
            values.update(dict.fromkeys(partners, _nearest(space.by_name[n].domain, values[n], allowed)))


def _partners(c: AtMostDistinct, space: SearchSpace) -> list[tuple[str, tuple[str, ...]]]:
    """Each name of the constraint, and all that are tied to it: one that moved alone would be moved back."""
    group_of = {n: group for group in moving_groups(space) for n in group}
    return [(n, group_of[n]) for n in c.names]


def _shared(names: Sequence[str], space: SearchSpace) -> list[Value]:
    """Options that all of the named decisions have."""
    first, *others = [space.by_name[n] for n in names]
    return [o for o in first.options if all(d.domain.contains(o) for d in others)]


def _nearest(domain: Choice | Interval, value: Value, allowed: list[Value]) -> Value:
    """The allowed option that differs from ``value`` in the fewest pieces, then by its place in the list."""
    if isinstance(domain, Choice):
        at = domain.index(value)
        return min(allowed, key=lambda v: (_changed(v, value), abs(domain.index(v) - at)))
    return min(allowed, key=lambda v: abs(float(v or 0) - float(value or 0)))


def _changed(a: Value, b: Value) -> int:
    """Pieces between slashes in which two options differ; options of another form differ in one."""
    if a == b:
        return 0
    if not (isinstance(a, str) and isinstance(b, str)) or a.count("/") != b.count("/"):
        return 1
    return sum(x != y for x, y in zip(a.split("/"), b.split("/"), strict=True))


_REPAIRS: dict[type, Callable[[Any, Values, np.random.Generator, SearchSpace], None]] = {
    Slots: _repair_slots,
    Ordered: _repair_order,
    SumTo: _repair_sum,
    Tied: _repair_tied,
    AtMostDistinct: _repair_distinct,
}


def moving_groups(space: SearchSpace) -> list[tuple[str, ...]]:
    """Names that must change together: tied groups, others alone."""
    groups = tied_groups(space)
    tied = {n for g in groups for n in g}
    return groups + [(d.name,) for d in space.decisions if d.name not in tied]


def tied_groups(space: SearchSpace) -> list[tuple[str, ...]]:
    """Names of the ``Tied`` constraints, joined where they share one."""
    joined: list[dict[str, None]] = []
    for c in space.constraints:
        if isinstance(c, Tied):
            group = dict.fromkeys(c.names)
            for other in [g for g in joined if g.keys() & group.keys()]:
                joined.remove(other)
                group = {**other, **group}
            joined.append(group)
    return [tuple(g) for g in joined if g]


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
            cheaper = _cheaper_move(c, names, values, space, structural)
            if cheaper is None:
                continue
            option, saved = cheaper
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
    """Move all decisions of a distinctness constraint to one key that costs less; returns what that saves.

    Where few values are allowed no single move may be left, though all together could go down. Of an option
    only the piece that is counted changes where it can. Decisions tied to a member come along.
    """
    for limit in structural:
        partners = dict(_partners(limit, space))
        members = {n for group in partners.values() for n in group}
        now = sum(c.table.cost(n, values[n]) for n in members)
        found: tuple[float, Values] | None = None
        for key in dict.fromkeys(limit.key(o) for o in space.by_name[limit.names[0]].options):
            after = _with_key(limit, key, partners, values, space)
            if after is None:
                continue
            saved = now - sum(c.table.cost(n, after[n]) for n in members)
            better = saved > 0 and (found is None or saved > found[0])
            if better and all(k.violation(after) <= k.violation(values) for k in structural):
                found = saved, after
        if found is not None:
            values.update(found[1])
            return found[0]
    return 0.0


def _with_key(
    limit: AtMostDistinct,
    key: str,
    partners: dict[str, tuple[str, ...]],
    values: Values,
    space: SearchSpace,
) -> Values | None:
    """``values`` with the limit's decisions at their nearest options with ``key``; ``None``: one has none."""
    after = dict(values)
    for n, group in partners.items():
        if limit.key(after[n]) == key:
            continue
        allowed = [o for o in _shared(group, space) if limit.key(o) == key]
        if not allowed:
            return None
        after.update(dict.fromkeys(group, _nearest(space.by_name[n].domain, after[n], allowed)))
    return after


def _cheaper_move(
    c: LinearBudget,
    names: tuple[str, ...],
    values: Values,
    space: SearchSpace,
    structural: list[AtMostDistinct],
) -> tuple[Value, float] | None:
    """The option that saves the least for the whole group (but something), and what it saves."""
    now = sum(c.table.cost(n, values[n]) for n in names)
    savings = [(now - sum(c.table.cost(n, o) for n in names), o) for o in _shared(names, space)]
    mine = [(k, k.violation(values)) for k in structural if not set(names).isdisjoint(k.names)]
    for saved, option in sorted((s for s in savings if s[0] > 0), key=lambda s: s[0]):
        after = {**values, **dict.fromkeys(names, option)} if mine else values
        if all(k.violation(after) <= before for k, before in mine):
            return option, saved
    return None
