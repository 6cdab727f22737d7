"""Whether predicted standard deviations are what errors turn out to be, and the factor that makes them so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_PRIOR = 10.0
"""Trials that the prior is worth which says that a predictor's own deviations are right."""
_CLIP = 4.0
"""Standardised errors are cut here: one outlier must not widen everything."""


def std_factor(standardised: Floats) -> float:
    """What to multiply standard deviations by, given errors of left-out trials in units of them.

    The root of the mean square (Kuleshov, Fenner and Ermon, arXiv 1807.00263, recalibrate whole
    distributions; of normal ones that is the width), drawn to 1 where errors are few. NaN is ignored.
    """
    squares = np.minimum(np.abs(standardised[np.isfinite(standardised)]), _CLIP) ** 2
    return math.sqrt((_PRIOR + float(squares.sum())) / (_PRIOR + len(squares)))


@dataclass(frozen=True)
class Calibration:
    """How predicted normal distributions fit what was measured.

    Attributes:
        n: predictions compared.
        within68, within95: share of the measured values in the central 68 % and 95 % intervals.
        mean_square: mean of the squared standardised errors; 1 where they are of the size predicted.
    """

    n: int
    within68: float
    within95: float
    mean_square: float


def calibration(measured: Floats, mean: Floats, std: Floats) -> Calibration:
    """Compare values ``[n]`` with predicted means and standard deviations ``[n]``, all in one unit.

    Pairs with NaN are ignored; NaN everywhere for no pairs.
    """
    errors = np.abs(np.asarray((measured - mean) / std))
    errors = errors[np.isfinite(errors)]
    if not len(errors):
        return Calibration(0, math.nan, math.nan, math.nan)
    inside = [float(np.mean(errors <= q)) for q in (0.9945, 1.96)]
    return Calibration(len(errors), inside[0], inside[1], float(np.mean(errors**2)))
