"""Scales of the regression's priors, by the marginal likelihood, and what left-out trials say of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from autocomp.predictors.posterior import Data, Kind, Scales, smooth

Floats = NDArray[np.float64]

FOLDS = 5
"""Parts of the trials, each of which is predicted from the others."""


@dataclass(frozen=True)
class Tuned:
    """Scales of the largest marginal likelihood, its logarithm, and predictions of left-out trials.

    ``mean`` and ``std`` (of a measurement) ``[n]`` are of each fifth of the trials from the others.
    """

    scales: Scales
    likelihood: float
    mean: Floats
    std: Floats


def tune(data: Data, kind: Kind) -> Tuned:
    """Search a small grid of scales; a mild prior pulls to the defaults. Of order ``n^3``."""
    search = _Search(data)
    lengths = [(0.0, 0.5)]
    if kind == "gp":
        lengths = [(0.03, 0.8), (0.1, 0.25), (0.1, 0.8), (0.4, 0.25), (0.4, 0.8)]
    curves = (0.0, 0.5) if data.inputs.curves.shape[1] else (0.0,)
    for (share, length), curve in product(lengths, curves):
        search.try_all([0.03, 0.1, 0.2, 0.4], share, length, curve)
    return Tuned(search.best, search.score, *_left_out(search.kernel, data.target))


class _Search:
    """The best scales so far, and their kernel with the noise."""

    def __init__(self, data: Data) -> None:
        self.data, self.best, self.score = data, Scales(), -math.inf
        inputs = data.inputs
        self.line, self.effects, self.curves = (x @ x.T for x in (inputs.line, inputs.effects, inputs.curves))
        self.kernel = self.line

    def try_all(self, effects: Sequence[float], share: float, length: float, curve: float) -> None:
        """Every noise with these effects, at one shape."""
        rough, places = self.line + curve**2 * self.curves, self.data.inputs.places
        if share:
            rough = rough + share**2 * smooth(places, places, length)
        for effect, noise in product(effects, (0.01, 0.03, 0.1, 0.3)):
            kernel = rough + effect**2 * self.effects
            kernel[np.diag_indices_from(kernel)] += noise**2 + self.data.errors
            found = _likelihood(kernel, self.data.target)
            found -= 0.2 * math.log(effect / 0.3) ** 2 + 0.25 * math.log(noise / 0.1) ** 2
            if found > self.score:
                self.best = Scales(effect, noise, share, length, curve)
                self.score, self.kernel = found, kernel


def _likelihood(kernel: Floats, target: Floats) -> float:
    """Logarithm of the marginal likelihood but for a constant; the kernel's noise is in it."""
    factor, _ = cho_factor(kernel, lower=True, check_finite=False)
    solved = cho_solve((factor, True), target, check_finite=False)
    return -0.5 * float(target @ solved) - float(np.log(np.diag(factor)).sum())


def _left_out(kernel: Floats, target: Floats) -> tuple[Floats, Floats]:
    """Mean and deviation of each fold given the others, with no fit but one inverse.

    Of the precision ``Q = K^-1``, a fold's conditional mean is ``y - Q_ff^-1 (Q y)_f`` and its covariance
    ``Q_ff^-1`` (Rasmussen and Williams, eq. 5.12, for blocks in place of single points).
    """
    n = len(target)
    precision = np.linalg.inv(kernel)
    pulled, mean, variance = precision @ target, np.empty(n), np.empty(n)
    for fold in range(FOLDS):
        rows = np.arange(fold, n, FOLDS)
        covariance = np.linalg.inv(precision[np.ix_(rows, rows)])
        mean[rows] = target[rows] - covariance @ pulled[rows]
        variance[rows] = np.diag(covariance)
    return mean, np.sqrt(np.maximum(variance, 1e-300))
