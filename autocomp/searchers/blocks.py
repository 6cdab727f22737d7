"""Groups that "at most k distinct" limits bind together, priced and enumerated exactly.

Once it is fixed which keys a limit lets through (a *pattern*: two span rules and one bit width, say), the
groups of a block are independent again. So for any prices the best joint choice is a minimum over patterns
of a sum of minima. That makes limits part of the dual bound (the subproblem of a Dantzig-Wolfe
decomposition, Operations Research 8, 1960) instead of weak rows of an ILP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Mask = NDArray[np.bool_]

MOST_CELLS = 20_000_000
"""Patterns times positions of a block; limits beyond that are left to the ILP."""


@dataclass(frozen=True)
class Limit:
    """The chosen options of ``groups`` carry at most ``k`` different keys.

    ``keys[i][o]`` is the key of option ``o`` of group ``groups[i]``.
    """

    groups: tuple[int, ...]
    k: int
    keys: tuple[tuple[str, ...], ...]

    def holds(self, options: Sequence[int]) -> bool:
        """``options [groups]``: index of the option that each of the limit's groups takes."""
        return len({keys[o] for keys, o in zip(self.keys, options, strict=True)}) <= self.k

    @property
    def choices(self) -> list[frozenset[str]]:
        """Sets of ``k`` keys."""
        every = list(dict.fromkeys(key for keys in self.keys for key in keys))
        return [frozenset(c) for c in combinations(every, min(self.k, len(every)))]

    @property
    def size(self) -> int:
        """Number of ``choices``."""
        every = len({key for keys in self.keys for key in keys})
        return math.comb(every, min(self.k, every))


@dataclass(frozen=True)
class Block:
    """Groups that share limits. Positions count through the options of all groups of a problem.

    Attributes:
        groups: group numbers.
        at: positions of their options, group after group, ``[m]``.
        start: where each group begins in ``at``.
        allowed: places in ``at`` that a pattern lets through in a group, ``[patterns, groups, most]``;
            filled up with ``m``, which is no place.
        exact: false when some limit was left out, so that a priced choice may break it.
    """

    groups: Ints
    at: Ints
    start: Ints
    allowed: Ints
    exact: bool

    def _seen(self, flat: Floats) -> tuple[Floats, Floats]:
        """Prices of what patterns let through ``[patterns, groups, most]`` and their minima over the last."""
        priced = np.append(flat[self.at], np.inf)[self.allowed]
        return priced, priced.min(axis=2)

    def best_by_pattern(self, flat: Floats) -> tuple[Ints, Floats]:
        """For each pattern the cheapest positions ``[patterns, groups]`` and their sum; ``flat [all]``.

        The sum is infinite, and the positions mean nothing, where a group has no option that is let through.
        """
        priced, least = self._seen(flat)
        best = np.take_along_axis(self.allowed, priced.argmin(axis=2)[:, :, None], axis=2)[:, :, 0]
        return self.at[np.minimum(best, len(self.at) - 1)], np.asarray(least.sum(axis=1))

    def cheapest(self, flat: Floats) -> tuple[Ints, float]:
        """The cheapest positions ``[groups]`` that meet the limits, and their sum (infinite: none do)."""
        priced, least = self._seen(flat)
        totals = least.sum(axis=1)
        p = int(totals.argmin())
        best = self.allowed[p, np.arange(len(self.groups)), priced[p].argmin(axis=1)]
        return self.at[np.minimum(best, len(self.at) - 1)], float(totals[p])

    def reduced(self, flat: Floats) -> Floats:
        """What it costs at least to take each position of the block instead of the best choice, ``[m]``."""
        priced, least = self._seen(flat)
        totals = least.sum(axis=1)
        possible = np.isfinite(totals)
        forced = priced[possible] + (totals[possible, None] - least[possible])[:, :, None]
        found = np.full(len(self.at) + 1, np.inf)
        np.minimum.at(found, self.allowed[possible].ravel(), forced.ravel())
        return np.asarray(found[:-1] - totals.min())

    def columns(self, flat: Floats, ceiling: float, most: int) -> Ints | None:
        """All choices ``[n, groups]`` whose prices sum to at most ``ceiling``; ``None`` for over ``most``."""
        priced, least = self._seen(flat)
        found = [np.zeros((0, len(self.groups)), dtype=np.intp)]
        count = 0
        for p in np.flatnonzero(least.sum(axis=1) <= ceiling):
            rest = np.append(np.cumsum(least[p][::-1])[::-1], 0.0)
            partial, total = np.zeros((1, 0), dtype=np.intp), np.zeros(1)
            for g, part in enumerate(priced[p]):
                sums = total[:, None] + part
                keep, option = np.nonzero(sums + rest[g + 1] <= ceiling)
                if count + len(keep) > most:
                    return None
                partial = np.column_stack([partial[keep], self.allowed[p, g, option]])
                total = sums[keep, option]
            found.append(partial)
            count += len(partial)
        return self.at[np.unique(np.vstack(found), axis=0)]


def blocks_of(limits: Sequence[Limit], start: Ints, count: int) -> tuple[Block, ...]:
    """One block for each set of limits that share groups; ``start [groups]`` of ``count`` positions."""
    joined: list[tuple[set[int], list[Limit]]] = []
    for limit in limits:
        groups, members = set(limit.groups), [limit]
        for other in [j for j in joined if j[0] & groups]:
            joined.remove(other)
            groups, members = groups | other[0], [*other[1], *members]
        joined.append((groups, members))
    ends = np.append(start[1:], count)
    known: dict[tuple[tuple[Limit, ...], tuple[int, ...]], tuple[Ints, bool]] = {}
    blocks = []
    for together, members in joined:
        order = sorted(together)
        sizes = tuple(int(ends[g] - start[g]) for g in order)
        # By place in the block: the layers of a model are alike, and so are their patterns.
        place = {g: i for i, g in enumerate(order)}
        key = tuple(Limit(tuple(place[g] for g in c.groups), c.k, c.keys) for c in members), sizes
        if key not in known:
            known[key] = _patterns(*key)
        at = np.concatenate([np.arange(start[g], ends[g]) for g in order]).astype(np.intp)
        begin = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.intp)
        blocks.append(Block(np.array(order, dtype=np.intp), at, begin, *known[key]))
    return tuple(blocks)


def _patterns(limits: Sequence[Limit], sizes: Sequence[int]) -> tuple[Ints, bool]:
    """``Block.allowed``, and whether all limits went into it; groups of limits count within the block."""
    kept: list[Limit] = []
    for limit in sorted(limits, key=lambda c: c.size):
        if math.prod(c.size for c in [*kept, limit]) * sum(sizes) <= MOST_CELLS:
            kept.append(limit)
    masks = [_let_through(kept, g, size) for g, size in enumerate(sizes)]
    possible = np.logical_and.reduce([mask.any(axis=1) for mask in masks])
    if possible.any():
        masks = [mask[possible] for mask in masks]
    most = max(int(mask.sum(axis=1).max()) for mask in masks)
    allowed = np.full((len(masks[0]), len(sizes), most), sum(sizes), dtype=np.intp)
    for g, mask in enumerate(masks):
        pattern, option = np.nonzero(mask)
        first = np.searchsorted(pattern, np.arange(len(mask)))
        allowed[pattern, g, np.arange(len(pattern)) - first[pattern]] = option + sum(sizes[:g])
    return allowed, len(kept) == len(limits)


def _let_through(limits: Sequence[Limit], group: int, size: int) -> Mask:
    """Options of one group that each combination of the limits' choices lets through, ``[patterns, size]``:
    the last limit's choices vary fastest."""
    found = np.ones((1, size), dtype=bool)
    for limit in limits:
        choices = limit.choices
        if group in limit.groups:
            keys = limit.keys[limit.groups.index(group)]
            names = {key: i for i, key in enumerate(dict.fromkeys(keys))}
            carried = np.array([[key in choice for key in names] for choice in choices], dtype=bool)
            mask = carried[:, [names[key] for key in keys]]
        else:
            mask = np.ones((len(choices), size), dtype=bool)
        found = (found[:, None, :] & mask[None, :, :]).reshape(-1, size)
    return found
