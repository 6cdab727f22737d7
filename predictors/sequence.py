"""Candidates as sequences: decisions grouped into slots, unused slots closed up, neighbours in view.

A slot is all decisions of one ``Decision.block`` (a step of a sampler). The same thing decided in each slot
(``schedules/order.0``, ``schedules/order.1``) is one kind and shares its columns, so that what is learned at
one step carries over to the others. A slot whose clock or any option is ``None`` is not run at all; the
others keep their order.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autocomp.predictors.features import Encoder
from autocomp.space import Candidate, Choice, Decision, Interval, Ordered, SearchSpace, Value

Floats = NDArray[np.float64]
Traits = Callable[[Candidate], Sequence[float]]

WAVES = (1.0, 2.0, 4.0)
"""Half periods over an interval's range of its sine and cosine features."""
SPARSEST = 4
"""Slots times kinds are at most so many times the decisions in slots; else kinds are taken by their place."""
_EDGE = 0.02
"""Keeps the logit of a clock finite at both ends of its range."""


@dataclass(frozen=True)
class Sequences:
    """Encoded candidates.

    Attributes:
        steps: features of the used slots, moved to the front, zeros behind them, ``[n, slots, f]``.
        used: which of them are there, ``[n, slots]``.
        whole: features of the candidate as one, ``[n, g]``.
    """

    steps: Floats
    used: NDArray[np.bool_]
    whole: Floats

    def __getitem__(self, rows: NDArray[np.intp]) -> Sequences:
        return Sequences(self.steps[rows], self.used[rows], self.whole[rows])


@dataclass
class _Kind:
    """One thing decided in many slots: its options or its range, and its column of codes in each slot."""

    decisions: dict[int, Decision] = field(default_factory=dict)
    columns: dict[int, int] = field(default_factory=dict)

    @cached_property
    def options(self) -> list[Value]:
        """Every option that some slot offers; empty for intervals."""
        found = {repr(o): o for d in self.decisions.values() for o in d.options}
        return list(found.values())

    @cached_property
    def range(self) -> tuple[float, float]:
        domains = [d.domain for d in self.decisions.values()]
        ranges = [(d.low, d.high) for d in domains if isinstance(d, Interval)]
        low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
        return low, high if high > low else low + 1.0


def kind_name(decision: Decision) -> str:
    """The name without its block's number: equal for what is decided alike in every slot."""
    if decision.block is None:
        return decision.name
    return re.sub(rf"(?<!\d){decision.block}(?!\d)", "#", decision.name)


class SequenceEncoder:
    """Layout of a space as a sequence.

    The clock of a slot is the kind that an ``Ordered`` constraint names (times), or else one whose values are
    given and fall from slot to slot, or else the slot's own place.

    Args:
        space: decisions of the candidates.
        traits: further features of a candidate as a whole (``Problem.traits``), always as many.
    """

    def __init__(self, space: SearchSpace, traits: Traits | None = None) -> None:
        self.space, self.traits = space, traits
        self._encoder = Encoder(space, None)
        ordered = sorted(space.decisions, key=lambda d: d.name)
        self.blocks = sorted({d.block for d in ordered if d.block is not None})
        columns = list(enumerate(ordered))
        self._single = [(column, d) for column, d in columns if d.block is None]
        blocked = [(column, d) for column, d in columns if d.block is not None]
        self._kinds = self._grouped(blocked, kind_name)
        # Names that say nothing of a common kind would need a column each, at every slot.
        if len(self._kinds) * len(self.blocks) > SPARSEST * len(blocked):
            self._kinds = self._grouped(blocked, lambda d: d.space)
        named = {n for c in space.constraints if isinstance(c, Ordered) for n in c.names}
        kinds = self._kinds.items()
        self._clocks = [name for name, kind in kinds if {d.name for d in kind.decisions.values()} & named]
        self._clocks = self._clocks or [name for name, kind in kinds if self._falls(kind)]

    @property
    def timed(self) -> bool:
        """Whether slots have a clock of their own: then their order matters."""
        return bool(self._clocks)

    def _falls(self, kind: _Kind) -> bool:
        """Whether every slot has one given value that is below the slot's before."""
        domains = [d.domain for _, d in sorted(kind.decisions.items())]
        points = [d.low for d in domains if isinstance(d, Interval) and d.low == d.high]
        return len(points) == len(self.blocks) and all(b < a for a, b in pairwise(points))

    def _grouped(
        self, blocked: Sequence[tuple[int, Decision]], name: Callable[[Decision], str]
    ) -> dict[str, _Kind]:
        """Decisions (with their columns) of the same name and type; what a slot has twice (two layers of one
        block) is told apart by its turn."""
        slots = {block: i for i, block in enumerate(self.blocks)}
        turns: Counter[tuple[str, int]] = Counter()
        kinds: dict[str, _Kind] = {}
        for column, decision in blocked:
            domain, slot = decision.domain, slots[decision.block or 0]
            known = f"{name(decision)}|{type(domain).__name__}|{getattr(domain, 'ordered', False)}"
            kind = kinds.setdefault(f"{known}|{turns[known, slot]}", _Kind())
            turns[known, slot] += 1
            kind.decisions[slot], kind.columns[slot] = decision, column
        return kinds

    def __call__(self, candidates: Sequence[Candidate]) -> Sequences:
        """Encode; raises ``SpaceError`` for a candidate that is not of the space."""
        rows = [self.codes(c) for c in candidates]
        codes = np.array(rows).reshape(len(rows), len(self.space))
        n, slots = len(codes), len(self.blocks)
        used = self._used(codes)
        blocks = [self._features(codes, kind) for kind in self._kinds.values()]
        place = 1.0 - np.broadcast_to(np.arange(slots) / max(slots, 1), (n, slots))
        own = np.concatenate([*blocks, np.zeros((n, slots, 0))], axis=2)
        clock = self._clock(codes, place)
        order = np.argsort(~used, axis=1, kind="stable")
        own = np.take_along_axis(own, order[:, :, None], axis=1)
        clock, present = np.take_along_axis(clock, order, axis=1), np.take_along_axis(used, order, axis=1)
        steps = np.concatenate([own, _clock_features(clock, present)], axis=2) * present[:, :, None]
        whole = self._whole(codes, own, present)
        if self.traits is not None and n:
            whole = np.concatenate([whole, [self.traits(c) for c in candidates]], axis=1)
        return Sequences(steps, present, whole)

    def codes(self, candidate: Candidate) -> Floats:
        """One row of option numbers and values, ``[decisions]``; raises ``SpaceError`` for a foreign one."""
        return self._encoder.codes(candidate)

    def knows(self, candidate: Candidate) -> bool:
        """False for a candidate outside the space (a baseline that was measured for comparison)."""
        return self._encoder.layout.code(candidate, keep=True) is not None

    def _used(self, codes: Floats) -> NDArray[np.bool_]:
        """Slots that run: the clock is there and no option is ``None``, ``[n, slots]``."""
        used = np.ones((len(codes), len(self.blocks)), bool)
        for name, kind in self._kinds.items():
            for slot, column in kind.columns.items():
                decision = kind.decisions[slot]
                if isinstance(decision.domain, Choice):
                    if None in decision.options:
                        used[:, slot] &= codes[:, column] != decision.options.index(None)
                elif name in self._clocks:
                    used[:, slot] &= ~np.isnan(codes[:, column])
        return used

    def _clock(self, codes: Floats, place: Floats) -> Floats:
        """Position of each slot on its clock, within [0, 1], ``[n, slots]``."""
        if not self._clocks:
            return place
        kind, clock = self._kinds[self._clocks[0]], place.copy()
        low, high = kind.range
        for slot, column in kind.columns.items():
            clock[:, slot] = (codes[:, column] - low) / (high - low)
        return np.nan_to_num(clock)

    def _features(self, codes: Floats, kind: _Kind) -> Floats:
        """Columns of one kind, ``[n, slots, f]``; zeros in slots that don't decide it."""
        parts = [
            _columns(codes[:, kind.columns[s]], kind.decisions[s], kind) if s in kind.columns else None
            for s in range(len(self.blocks))
        ]
        width = next(p.shape[1] for p in parts if p is not None)
        empty = np.zeros((len(codes), width))
        return np.stack([empty if p is None else p for p in parts], axis=1)

    def _whole(self, codes: Floats, own: Floats, used: NDArray[np.bool_]) -> Floats:
        """Decisions outside of slots, the number of used slots, and what they decide on average."""
        single = [_columns(codes[:, c], d, _Kind({0: d}, {0: c})) for c, d in self._single]
        count = used.sum(axis=1, keepdims=True).astype(float)
        mean = (own * used[:, :, None]).sum(axis=1) / np.maximum(count, 1.0)
        number = [count / max(len(self.blocks), 1), 1.0 / np.maximum(count, 1.0)]
        return np.concatenate([*single, *number, mean], axis=1)


def _columns(codes: Floats, decision: Decision, kind: _Kind) -> Floats:
    """Features ``[n, f]`` of one decision: which option, or where in the interval and whether at all."""
    if isinstance(decision.domain, Choice):
        names = [repr(o) for o in kind.options]
        to = np.array([names.index(repr(o)) for o in decision.options])
        chosen = to[codes.astype(np.intp)]
        hot = np.zeros((len(codes), len(names)))
        hot[np.arange(len(codes)), chosen] = 1.0
        if not decision.domain.ordered:
            return hot
        return np.column_stack([hot, chosen / max(len(names) - 1, 1)])
    low, high = kind.range
    there = ~np.isnan(codes)
    at = np.where(there, (np.nan_to_num(codes) - low) / (high - low), 0.5)
    waves = [f(math.pi * w * at) for w in WAVES for f in (np.sin, np.cos)]
    return np.column_stack([2.0 * at - 1.0, there, *waves]) * np.where(there, 1.0, 0.0)[:, None]


def _clock_features(clock: Floats, used: NDArray[np.bool_]) -> Floats:
    """Of each used slot: place, logit of the clock, and the moves from the one before and to the one after.

    The logit stands for half the log-SNR, in which a sampler's local error is a power of the step.
    """
    slots = clock.shape[1]
    if not slots:
        return np.zeros((*clock.shape, 0))
    count = used.sum(axis=1, keepdims=True)
    rank = np.broadcast_to(np.arange(slots), clock.shape)
    last = rank == count - 1
    after = np.where(last, 0.0, np.roll(clock, -1, axis=1))
    before = np.where(rank == 0, 1.0, np.roll(clock, 1, axis=1))
    level, later, earlier = (_logit(x) for x in (clock, after, before))
    step, past = np.maximum(level - later, 0.0), np.maximum(earlier - level, 0.0)
    ratio = np.log((step + 0.1) / (past + 0.1))
    columns = [
        clock, level / 2.0, clock - after, before - clock, step, past, np.log(step + 0.1), ratio,
        rank == 0, rank == 1, last, rank / np.maximum(count, 1), (count - rank) / slots,
    ]  # fmt: skip
    return np.stack([np.asarray(c, dtype=np.float64) for c in columns], axis=2)


def _logit(share: Floats) -> Floats:
    inside = (np.clip(share, 0.0, 1.0) + _EDGE) / (1.0 + 2.0 * _EDGE)
    return np.asarray(np.log(inside / (1.0 - inside)))
