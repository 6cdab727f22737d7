"""Candidates as numbers: effects of options at four levels of sharing, and a distance for a GP.

With a table, an effect is a share of the table's own cost: if option ``o`` of decision ``d`` costs ``c`` of
a total ``T``, a relative error ``e`` of that entry moves ``log(T)`` by ``e * c / T``. Every level (all
decisions that take the same option, a block, a decision, one entry) has its own effects, so that what is
learned at one layer carries over to its neighbours before they were ever measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import SpaceError
from autocomp.repair import moving_groups
from autocomp.space import AdditiveTable, Candidate, Choice, Interval, SearchSpace

Floats = NDArray[np.float64]
Integers = NDArray[np.intp]

_SPACES, _ROWS = 8, 50_000
"""Spaces whose layout is kept, and coded candidates of each: a searcher asks for the same ones again and
again, and makes its predictors anew every time."""
_CHUNK = 2048
"""Candidates whose effects are laid out at once."""
_KNOTS = np.linspace(0.0, 1.0, 9)
_WIDTH = 0.15
"""Where the bumps of curves are, and their deviation."""


class Layout:
    """Where each (decision, option) pair of a space stands; made once a space and shared by its predictors.

    Attributes:
        names: decisions in name order: the columns of codes.
        intervals: the interval of each decision, ``None`` for a choice.
        choices: columns of choices ``[c]``; ``starts [c]`` numbers the first entry of each.
        entries: (decision, option) pairs.
        shared: effects that an entry shares with others ``[entries, 2]``: of its option and its block
            (``shared_size``, their number, for none).
        levels: all effects of an entry ``[entries, 4]``: these (``size`` for none), its decision, its own.
        options: number of different options; their effects come first.
        size: number of effects: shared ones, decisions, entries.
    """

    def __init__(self, space: SearchSpace) -> None:
        ordered = sorted(space.decisions, key=lambda d: d.name)
        self.names = [d.name for d in ordered]
        self.intervals = [d.domain if isinstance(d.domain, Interval) else None for d in ordered]
        self.choices: Integers = np.flatnonzero([i is None for i in self.intervals])
        self.entries = [(d.name, o) for d in ordered for o in d.options]
        counts = [len(ordered[i].options) for i in self.choices]
        self.starts: Integers = np.cumsum([0, *counts])[:-1].astype(np.intp)
        self.widths = [(len(d.options), isinstance(d.domain, Choice) and d.domain.ordered) for d in ordered]
        self._numbers = [{(type(o), o): i for i, o in enumerate(d.options)} for d in ordered]
        keys: list[object] = [("option", repr(o)) for _, o in self.entries]
        keys += [("block", d.block) for d in ordered if d.options and d.block is not None]
        shared = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.options = len({repr(o) for _, o in self.entries})
        self.shared_size = k = len(shared)
        self.size = k + len(self.choices) + len(self.entries)
        rows = []
        for d in ordered:
            block = shared.get(("block", d.block), k)
            rows += [(shared["option", repr(o)], block) for o in d.options]
        self.shared: Integers = np.array(rows, dtype=np.intp).reshape(-1, 2)
        every = np.arange(len(self.entries))
        decision = np.repeat(np.arange(len(self.choices)), counts)
        common = np.where(self.shared == k, self.size, self.shared)
        self.levels: Integers = np.column_stack([common, k + decision, k + len(self.choices) + every])
        self._rows: dict[str, Floats] = {}

    @classmethod
    def of(cls, space: SearchSpace) -> Layout:
        """The layout of a space, from memory where an equal one was asked for lately."""
        key = repr(sorted((d.name, repr(d.domain), d.block) for d in space.decisions))
        if key not in _LAYOUTS:
            while len(_LAYOUTS) >= _SPACES:
                del _LAYOUTS[next(iter(_LAYOUTS))]
            _LAYOUTS[key] = cls(space)
        return _LAYOUTS[key]

    def code(self, candidate: Candidate, keep: bool = False) -> Floats | None:
        """Option numbers and interval values ``[decisions]``; ``None`` if a value is missing or no option.

        With ``keep`` the row is remembered: for trials, which come back, and not for every proposal.
        """
        known = self._rows.get(candidate.fingerprint)
        if known is not None:
            return known
        values, row = candidate.values, np.empty(len(self.names))
        try:
            for i, (name, interval) in enumerate(zip(self.names, self.intervals, strict=True)):
                value = values[name]
                if interval is None:
                    row[i] = self._numbers[i][type(value), value]
                else:
                    row[i] = math.nan if value is None else float(value)
        except KeyError:
            return None
        row.flags.writeable = False
        if keep:
            while len(self._rows) >= _ROWS:
                del self._rows[next(iter(self._rows))]
            self._rows[candidate.fingerprint] = row
        return row

    def __deepcopy__(self, memo: object) -> Self:
        """Copies of a predictor share it: nothing in it depends on what was learned."""
        return self


_LAYOUTS: dict[str, Layout] = {}


class Encoder:
    """Features of candidates, with a table's costs as scales where there is one."""

    def __init__(self, space: SearchSpace, table: AdditiveTable | None) -> None:
        self.space, self.table = space, table
        self.layout = Layout.of(space)

    @property
    def size(self) -> int:
        """Number of effects."""
        return self.layout.size

    @cached_property
    def costs(self) -> Floats:
        """The table's cost of each entry; zeros without a table, NaN where it has none."""
        table = self.table
        return np.array([0.0 if table is None else table.cost(n, o) for n, o in self.layout.entries])

    @cached_property
    def scales(self) -> Floats:
        """What a relative error of 1 of each entry adds to the total.

        Never quite nothing, so that an entry which the table calls free can still be corrected.
        """
        if self.table is None:
            return np.full(len(self.layout.entries), 1.0 / math.sqrt(max(len(self.space), 1)))
        costs = [abs(c) for row in self.table.costs.values() for c in row.values() if c and math.isfinite(c)]
        floor = 0.05 * float(np.median(costs)) if costs else 1.0
        return np.where(np.isfinite(self.costs), np.maximum(np.abs(self.costs), floor), floor)

    @cached_property
    def _free(self) -> Integers:
        """Places among the choices of those that vary by themselves, one of each tied group."""
        first = {names[0] for names in moving_groups(self.space)}
        names = [self.layout.names[i] for i in self.layout.choices]
        return np.flatnonzero([n in first for n in names])

    def codes(self, candidate: Candidate) -> Floats:
        """Option numbers of choices and raw values of intervals (NaN for ``None``), ``[decisions]``.

        Raises:
            SpaceError: a value is missing or is not an option.
        """
        row = self.layout.code(candidate)
        if row is None:
            self.space.check(candidate)
            raise SpaceError(f"candidate {candidate.fingerprint} has a value of the wrong type")
        return row

    def rows(self, candidates: Sequence[Candidate]) -> Floats:
        """Codes of many, ``[n, decisions]``; raises as ``codes`` does."""
        return np.array([self.codes(c) for c in candidates]).reshape(-1, len(self.layout.names))

    def chosen(self, codes: Floats) -> Integers:
        """Number of the entry that each choice takes, ``[n, choices]``."""
        return codes[:, self.layout.choices].astype(np.intp) + self.layout.starts

    def totals(self, codes: Floats) -> Floats:
        """The table's totals ``[n]``, NaN where it lacks an entry; zeros without a table."""
        if self.table is None:
            return np.zeros(len(codes))
        totals = self.table.base + self.costs[self.chosen(codes)].sum(axis=1)
        for i, (name, interval) in enumerate(zip(self.layout.names, self.layout.intervals, strict=True)):
            if interval is not None and name in self.table.costs:
                values = [None if math.isnan(x) else float(x) for x in codes[:, i]]
                totals = totals + np.array([self.table.cost(name, v) for v in values])
        return np.asarray(totals)

    def effects(self, codes: Floats, totals: Floats) -> Floats:
        """Effects ``[n, size + interval features]`` of coded candidates ``[n, decisions]``.

        ``totals [n]`` divides the scales: the table's totals under a logarithmic link, else ones.
        """
        layout, floats = self.layout, self.intervals(codes)
        k, own = layout.shared_size, layout.shared_size + len(layout.choices)
        matrix = np.zeros((len(codes), self.size + floats.shape[1]))
        matrix[:, self.size :] = floats
        for start in range(0, len(codes), _CHUNK):
            part = matrix[start : start + _CHUNK]
            entries = self.chosen(codes[start : start + _CHUNK])
            share = self.scales[entries] / totals[start : start + _CHUNK, None]
            lines = np.arange(len(part))[:, None]
            targets = (
                layout.shared[entries] + (lines * (k + 1))[:, :, None]
            )  # the last takes what has no block
            sums = np.bincount(targets.ravel(), np.repeat(share.ravel(), 2), minlength=len(part) * (k + 1))
            part[:, :k] = sums.reshape(len(part), k + 1)[:, :k]
            part[:, k:own] = share
            part[lines, own + entries] = share
        return matrix

    def shares(self, codes: Floats) -> Floats:
        """Share of the choices that take each option, whatever it costs, ``[n, options]``; and where slots
        can be empty, the share that is in use. Tied choices count once."""
        options, size = self.layout.shared[:, 0], self.layout.options
        chosen = self.chosen(codes)[:, self._free]
        rows = options[chosen] + (np.arange(len(codes)) * size)[:, None]
        counts = np.bincount(rows.ravel(), minlength=len(codes) * size).reshape(len(codes), size)
        found: Floats = counts / max(len(self._free), 1)
        slots = [i for i, x in enumerate(self.layout.intervals) if x is not None and x.nullable]
        if not slots:
            return found
        return np.column_stack([found, np.mean(~np.isnan(codes[:, slots]), axis=1)])

    def curves(self, codes: Floats) -> Floats:
        """Bumps along each share, whose sums are smooth functions of it, ``[n, shares * bumps]``.

        What happens when half of a model is at its lowest width is no sum over decisions.
        """
        bumps = _bumps(self.shares(codes))
        return bumps.reshape(len(codes), bumps.shape[1] * len(_KNOTS))

    def curve_slopes(self, codes: Floats, weights: Floats) -> Floats:
        """What one more choice of each entry's option adds to the curves near ``codes [decisions]``.

        Args:
            weights: of the bumps, ``[shares * bumps]``; none for no curves.

        Returns:
            ``[entries]``; 0 for all but one of tied choices.
        """
        found, options = np.zeros(len(self.layout.entries)), self.layout.options
        if not len(weights) or not len(self._free):
            return found
        half = 0.5 / len(self._free)
        shares = self.shares(codes[None])[0, :options]
        ends = _bumps(shares + half) - _bumps(shares - half)
        slopes = np.sum(ends * weights.reshape(-1, len(_KNOTS))[:options], axis=1)
        owner = np.repeat(np.arange(len(self.layout.choices)), np.diff([*self.layout.starts, len(found)]))
        free = np.isin(owner, self._free)
        found[free] = slopes[self.layout.shared[free, 0]]
        return found

    def intervals(self, codes: Floats) -> Floats:
        """Position, its square and use of each interval, each within [-1, 1], ``[n, 3 * intervals]``."""
        columns = []
        for i, interval in enumerate(self.layout.intervals):
            if interval is None:
                continue
            used = ~np.isnan(codes[:, i])
            width = (interval.high - interval.low) or 1.0
            at = np.where(used, 2.0 * (np.nan_to_num(codes[:, i]) - interval.low) / width - 1.0, 0.0)
            columns += [at, at**2, used.astype(float)]
        return np.column_stack(columns) if columns else np.zeros((len(codes), 0))

    def places(self, codes: Floats) -> Floats:
        """Coordinates ``[n, p]`` whose squared distance is a weighted share of differing decisions."""
        columns = [_one_hot(codes[:, i].astype(np.intp), *self.layout.widths[i]) for i in self.layout.choices]
        blocks = [*columns, self.intervals(codes)]
        return np.hstack(blocks) / math.sqrt(max(len(self.space), 1))

    @cached_property
    def owners(self) -> Integers:
        """Number of the decision that each coordinate of ``places`` is of, ``[p]``."""
        widths = [(i, *self.layout.widths[i]) for i in self.layout.choices]
        owners = [np.full(1 if ordered and size > 1 else size, i) for i, size, ordered in widths]
        floats = [np.full(3, i) for i, x in enumerate(self.layout.intervals) if x is not None]
        return np.concatenate([*owners, *floats, np.zeros(0)]).astype(np.intp)


def _bumps(shares: Floats) -> Floats:
    """Height of each bump at each share, with a further axis."""
    return np.asarray(np.exp(-0.5 * ((shares[..., None] - _KNOTS) / _WIDTH) ** 2))


def _one_hot(codes: Integers, size: int, ordered: bool) -> Floats:
    """One column an option; on an ordinal scale one column with the position, neighbours being alike."""
    if ordered and size > 1:
        return (codes / (size - 1.0))[:, None]
    hot = np.zeros((len(codes), size))
    hot[np.arange(len(codes)), codes] = math.sqrt(0.5)
    return hot
