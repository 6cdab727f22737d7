"""Changes of many decisions at once that keep what a row is: falling times, the options of layer after layer.

A single mutation can't turn ten good steps into eight good ones, nor a whole stretch of layers down by a bit;
both lie many bad candidates away. So some children have, in place of a few mutations,

- a row of floats read at another number of points, with what stands beside each (ten steps, then eight),
- a row of floats bent by a power towards one of its ends (Karras et al., arXiv 2206.00364, equation 5, space
  their noise levels by such a power),
- one option, or one step up or down, for the same decision of neighbouring blocks (in spaces with such rows).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocomp.space import Choice, Decision, Interval, Ordered, SearchSpace, Value

BEND = 0.35
"""Standard deviation of the logarithm of the power."""
FEWER = 3
"""At most so many slots are switched on or off at once."""
SHORTEST = 3
"""Rows of fewer decisions are left to single mutations."""


@dataclass(frozen=True)
class Row:
    """An ordered row of floats and what stands beside each of them.

    Attributes:
        names: of the floats, in order.
        beside: other decisions of each float's block.
        low, high: bounds that all of the floats share, ``low < high``.
        least: slots that can't be switched off; the first ones of the row.
    """

    names: tuple[str, ...]
    beside: tuple[tuple[str, ...], ...]
    low: float
    high: float
    least: int

    def bent(self, values: dict[str, Value], rng: np.random.Generator) -> bool:
        """Bend the row by a power; whether it changed."""
        used = [n for n in self.names if values[n] is not None]
        if not used:
            return False
        power = float(np.exp(BEND * rng.standard_normal()))
        share = (np.array([float(values[n] or 0.0) for n in used]) - self.low) / (self.high - self.low)
        share = np.clip(share, 0.0, 1.0)
        share = share**power if rng.random() < 0.5 else 1.0 - (1.0 - share) ** power
        values.update(zip(used, (self.low + (self.high - self.low) * share).tolist(), strict=True))
        return True

    def resampled(self, values: dict[str, Value], rng: np.random.Generator) -> bool:
        """Read the row at a few points more or fewer; whether it changed."""
        used = [i for i, n in enumerate(self.names) if values[n] is not None]
        counts = [
            n
            for n in range(max(self.least, len(used) - FEWER, 2), min(len(self.names), len(used) + FEWER) + 1)
            if n != len(used)
        ]
        if len(used) < 2 or not counts:
            return False
        count = counts[int(rng.integers(len(counts)))]
        places = np.linspace(0.0, len(used) - 1.0, count)
        found = np.interp(places, np.arange(len(used)), [float(values[self.names[i]] or 0.0) for i in used])
        old = dict(values)
        for i, name in enumerate(self.names):
            values[name] = float(found[i]) if i < count else None
            if i < count:
                source = self.beside[used[int(np.rint(places[i]))]]
                values.update({n: old[o] for n, o in zip(self.beside[i], source, strict=False)})
        return True


class RowChanges:
    """Changes of rows that a space has; see the module.

    Args:
        space: what may vary.
        groups: names of decisions that move together, those that can vary.
    """

    def __init__(self, space: SearchSpace, groups: Sequence[tuple[str, ...]]) -> None:
        self.space = space
        ordered = [c.names for c in space.constraints if isinstance(c, Ordered)]
        self.rows = [r for names in ordered if (r := _row(space, names)) is not None]
        self.columns = _columns(space, groups)

    def __bool__(self) -> bool:
        # Where all decisions are options, single mutations found better fronts than stretches did.
        return bool(self.rows)

    def change(self, values: dict[str, Value], rng: np.random.Generator) -> bool:
        """Make one change in ``values``, which may need repair after it; whether there was one to make."""
        if self.rows and (not self.columns or rng.random() < 2 / 3):
            row = self.rows[int(rng.integers(len(self.rows)))]
            if row.least < len(row.names) and rng.random() < 0.5 and row.resampled(values, rng):
                return True
            return row.bent(values, rng)
        return bool(self.columns) and self._stretch(values, rng)

    def _stretch(self, values: dict[str, Value], rng: np.random.Generator) -> bool:
        """One option, or one step up or down, for the same decision of neighbouring blocks."""
        column = self.columns[int(rng.integers(len(self.columns)))]
        first, last = np.sort(rng.integers(len(column) + 1, size=2))
        domain = self.space.by_name[column[0][0]].domain
        assert isinstance(domain, Choice)
        options, step = domain.options, 1 if rng.random() < 0.5 else -1
        option = options[int(rng.integers(len(options)))]
        by_steps = domain.ordered and rng.random() < 0.5
        changed = False
        for names in column[first : max(last, first + 1)]:
            old = values[names[0]]
            new = option
            if by_steps and domain.contains(old):
                new = options[min(max(domain.index(old) + step, 0), len(options) - 1)]
            changed |= new != old
            values.update(dict.fromkeys(names, new))
        return changed


def _row(space: SearchSpace, names: tuple[str, ...]) -> Row | None:
    """``None`` for a row that is too short or not of varying floats with common bounds."""
    domains = [space.by_name[n].domain for n in names]
    floats = [d for d in domains if isinstance(d, Interval)]
    if len(names) < SHORTEST or len(floats) < len(domains):
        return None
    low, high = max(d.low for d in floats), min(d.high for d in floats)
    if low >= high:
        return None
    fixed = [i for i, d in enumerate(floats) if not d.nullable]
    least = max(fixed, default=-1) + 1
    by_block: dict[int | None, list[str]] = {}
    for d in space.decisions:
        by_block.setdefault(d.block, []).append(d.name)
    beside = [_others(space.by_name[n], by_block, names) for n in names]
    return Row(names, tuple(beside), low, high, least)


def _others(
    decision: Decision, by_block: Mapping[int | None, list[str]], row: Sequence[str]
) -> tuple[str, ...]:
    """Names in the decision's block that are not in the row."""
    if decision.block is None:
        return ()
    return tuple(n for n in by_block[decision.block] if n not in row)


def _columns(space: SearchSpace, groups: Sequence[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
    """Groups with the same options at the same place of their blocks, in the order of the blocks."""
    places = _places(space)
    found: dict[tuple[object, ...], list[tuple[str, ...]]] = {}
    for names in groups:
        if names[0] in places:
            found.setdefault(places[names[0]], []).append(names)
    return [column for column in found.values() if len(column) >= SHORTEST]


def _places(space: SearchSpace) -> dict[str, tuple[object, ...]]:
    """What a categorical decision has in common with those of other blocks: space, options, place there."""
    found: dict[str, tuple[object, ...]] = {}
    seen: Counter[tuple[object, ...]] = Counter()
    for d in space.decisions:
        if d.block is not None and isinstance(d.domain, Choice):
            found[d.name] = (d.space, d.domain, seen[d.space, d.domain, d.block])
            seen[d.space, d.domain, d.block] += 1
    return found
