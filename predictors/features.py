"""Candidates as numbers: effects of options at four levels of sharing, and a distance for a GP.

With a table, an effect is a share of the table's own cost: if option ``o`` of decision ``d`` costs ``c`` of
a total ``T``, a relative error ``e`` of that entry moves ``log(T)`` by ``e * c / T``. Every level (all
decisions that take the same option, a block, a decision, one entry) has its own effects, so that what is
learned at one layer carries over to its neighbours before they were ever measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import SpaceError
from autocomp.space import AdditiveTable, Candidate, Choice, Decision, Interval, SearchSpace, Value

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Entry:
    """One (decision, option) pair; ``scale`` is what a relative error of 1 adds to the total."""

    name: str
    option: Value
    scale: float
    effects: tuple[int, ...]


@dataclass(frozen=True)
class Encoder:
    """Feature layout of a space, with a table's costs as scales where there is one."""

    space: SearchSpace
    table: AdditiveTable | None

    @cached_property
    def _layout(self) -> tuple[list[list[Entry]], int]:
        effects: dict[object, int] = {}

        def effect(*key: object) -> int:
            return effects.setdefault(key, len(effects))

        rows = []
        floor = self._floor
        for d in sorted(self.space.decisions, key=lambda d: d.name):
            row = []
            for o in d.options:
                shared = [
                    effect("option", repr(o)),
                    effect("decision", d.name),
                    effect("entry", d.name, repr(o)),
                ]
                if d.block is not None:
                    shared.append(effect("block", d.block))
                row.append(Entry(d.name, o, self._scale(d, o, floor), tuple(shared)))
            rows.append(row)
        return rows, len(effects)

    @property
    def entries(self) -> list[list[Entry]]:
        """Entries of each decision in name order; empty for intervals."""
        return self._layout[0]

    @property
    def size(self) -> int:
        """Number of effects."""
        return self._layout[1]

    @property
    def relative(self) -> bool:
        return self.table is not None

    @cached_property
    def _floor(self) -> float:
        """A small cost, so that an entry the table calls free can still be corrected."""
        if self.table is None:
            return 0.0
        costs = [abs(c) for row in self.table.costs.values() for c in row.values() if c and math.isfinite(c)]
        return 0.05 * float(np.median(costs)) if costs else 1.0

    def _scale(self, decision: Decision, option: Value, floor: float) -> float:
        if self.table is None:
            return 1.0 / math.sqrt(len(self.space))
        cost = self.table.cost(decision.name, option)
        return max(abs(cost), floor) if math.isfinite(cost) else floor

    @cached_property
    def _codes(self) -> list[dict[tuple[type, Value], int]]:
        return [{(type(e.option), e.option): i for i, e in enumerate(row)} for row in self.entries]

    @cached_property
    def _named(self) -> list[tuple[str, Interval | None]]:
        ordered = sorted(self.space.decisions, key=lambda d: d.name)
        return [(d.name, d.domain if isinstance(d.domain, Interval) else None) for d in ordered]

    def codes(self, candidate: Candidate) -> Floats:
        """Option numbers of choices and raw values of intervals (NaN for ``None``), ``[decisions]``.

        Raises:
            SpaceError: a value is missing or is not an option.
        """
        values, row = candidate.values, np.empty(len(self._named))
        try:
            for i, (name, interval) in enumerate(self._named):
                value = values[name]
                if interval is None:
                    row[i] = self._codes[i][type(value), value]
                else:
                    row[i] = math.nan if value is None else float(value)
        except KeyError:
            self.space.check(candidate)
            raise SpaceError(f"candidate {candidate.fingerprint} has a value of the wrong type") from None
        return row

    def effects(self, codes: Floats, totals: Floats) -> Floats:
        """Effects ``[n, size + interval features]`` of coded candidates ``[n, decisions]``.

        ``totals [n]`` divides the scales: the table's totals under a logarithmic link, else ones.
        """
        matrix = np.zeros((len(codes), self.size))
        lines = np.arange(len(codes))
        for i, row in enumerate(self.entries):
            if not row:
                continue
            chosen = codes[:, i].astype(np.intp)
            share = np.array([e.scale for e in row])[chosen] / totals
            targets = np.array([e.effects for e in row])[chosen]
            for column in targets.T:
                matrix[lines, column] += share
        return np.hstack([matrix, self.intervals(codes)])

    def intervals(self, codes: Floats) -> Floats:
        """Position, its square and use of each interval, each within [-1, 1], ``[n, 3 * intervals]``."""
        columns = []
        for i, (_, interval) in enumerate(self._named):
            if interval is None:
                continue
            used = ~np.isnan(codes[:, i])
            width = (interval.high - interval.low) or 1.0
            at = np.where(used, 2.0 * (np.nan_to_num(codes[:, i]) - interval.low) / width - 1.0, 0.0)
            columns += [at, at**2, used.astype(float)]
        return np.column_stack(columns) if columns else np.zeros((len(codes), 0))

    def places(self, codes: Floats) -> Floats:
        """Coordinates ``[n, p]`` whose squared distance is a weighted share of differing decisions."""
        columns = []
        for i, (name, interval) in enumerate(self._named):
            if interval is None:
                domain = self.space.by_name[name].domain
                assert isinstance(domain, Choice)
                columns.append(_one_hot(codes[:, i].astype(np.intp), len(domain.options), domain.ordered))
        blocks = [*columns, self.intervals(codes)]
        return np.hstack(blocks) / math.sqrt(len(self.space))


def _one_hot(codes: NDArray[np.intp], size: int, ordered: bool) -> Floats:
    """One column an option; on an ordinal scale one column with the position, neighbours being alike."""
    if ordered and size > 1:
        return (codes / (size - 1.0))[:, None]
    hot = np.zeros((len(codes), size))
    hot[np.arange(len(codes)), codes] = math.sqrt(0.5)
    return hot
