"""How measured values become targets of a regression, and what is expected of them before any trial."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Link:
    """How values become regression targets.

    Attributes:
        log: whether logarithms are regressed.
        relative: whether there is a table to be relative to.
        unit, offset: of the target: ``(y - prior) / unit``; the prior is ``offset`` without a table.
        center: of the (log) totals.
        stretch: what multiplies totals in the regression: their slope is known within 30 % where logarithms
            are taken; else the unit may be another one altogether.
    """

    log: bool
    relative: bool
    unit: float = 1.0
    offset: float = 0.0
    center: float = 0.0
    stretch: float = 0.3

    @classmethod
    def of(cls, values: Floats, totals: Floats, log: bool, relative: bool) -> Link:
        """The link for trials with these values and table totals, both ``[n]`` with ``n`` at least 1."""
        y = np.log(values) if log else values
        spread = float(np.std(y)) or 0.1 * abs(float(y.mean())) or 1.0
        if not relative:
            return cls(log, relative, spread, float(y.mean()))
        if log:
            return cls(log, relative, 1.0, 0.0, float(np.mean(np.log(totals))))
        return cls(log, relative, spread, 0.0, float(totals.mean()), 1.0 / (float(np.std(totals)) or spread))

    def prior(self, totals: Floats) -> Floats:
        """What is expected before the trials, ``[n]``."""
        if not self.relative:
            return np.full(len(totals), self.offset)
        return np.log(np.maximum(totals, 1e-300)) if self.log else totals

    def target(self, values: Floats, totals: Floats) -> Floats:
        """What is regressed, ``[n]``: values less what was expected, in units."""
        return ((np.log(values) if self.log else values) - self.prior(totals)) / self.unit

    def errors(self, values: Floats, stderr: Floats) -> Floats:
        """Variances of targets by the standard errors of the values."""
        return np.asarray((np.nan_to_num(stderr / (values if self.log else 1.0)) / self.unit) ** 2)

    def volume(self, values: Floats) -> float:
        """What the logarithm of a density gains when targets become values again."""
        return -len(values) * math.log(self.unit) - (float(np.log(values).sum()) if self.log else 0.0)
