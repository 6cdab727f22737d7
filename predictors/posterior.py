"""Bayesian linear regression with an optional Gaussian process, in whichever form is smaller.

With features ``W [n, p]`` of unit prior variance, noise variances ``D`` and no GP, predictions are the same
from the kernel ``W W' + D [n, n]`` (dual) as from the precision ``I + W' D^-1 W [p, p]`` (primal). The cost
is the cube of the smaller side, and the primal's memory grows with the trials as ``n p`` (Rasmussen and
Williams, Gaussian Processes for Machine Learning, 2006, eq. 2.8, 2.11, 2.25 and 2.26). All arrays are
float64 and in units of the regression target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular

Floats = NDArray[np.float64]
Integers = NDArray[np.intp]
Kind = Literal["ridge", "gp"]

FOLDS = 5
"""Parts of the trials, each of which is predicted from the others."""


@dataclass(frozen=True)
class Scales:
    """Prior standard deviations, in units of the (log) metric.

    Attributes:
        effect: of a relative error of an entry.
        noise: of what no effect explains.
        curve: of each bump of a curve (0: none).
        smooth: of the GP part (0: none).
        length: of the GP, as a share of differing decisions.
    """

    effect: float = 0.3
    noise: float = 0.1
    smooth: float = 0.0
    length: float = 0.5
    curve: float = 0.0


@dataclass(frozen=True)
class Inputs:
    """Line ``[n, 2]`` (1 and the centred total), effects ``[n, p]``, curves ``[n, c]``, places ``[n, q]``."""

    line: Floats
    effects: Floats
    curves: Floats
    places: Floats

    def __getitem__(self, rows: Integers) -> Inputs:
        return Inputs(self.line[rows], self.effects[rows], self.curves[rows], self.places[rows])

    def __len__(self) -> int:
        return len(self.line)

    def whitened(self, scales: Scales) -> Floats:
        """Features whose weights have unit prior variance: line, effects, curves, ``[n, 2 + p (+ c)]``."""
        curves = [scales.curve * self.curves] if scales.curve else []
        return np.hstack([self.line, scales.effect * self.effects, *curves])


@dataclass(frozen=True)
class Data:
    """What is regressed: ``target [n]`` and the variances ``errors [n]`` that it was measured with."""

    inputs: Inputs
    target: Floats
    errors: Floats

    def __getitem__(self, rows: Integers) -> Data:
        return Data(self.inputs[rows], self.target[rows], self.errors[rows])

    def __len__(self) -> int:
        return len(self.target)


class Posterior(Protocol):
    """What is known after the data."""

    def predict(self, inputs: Inputs) -> tuple[Floats, Floats]:
        """Mean and variance ``[m]`` of the function (without the noise of a measurement)."""
        ...

    def weights(self, rng: np.random.Generator | None) -> Floats:
        """Whitened weights ``[2 + p (+ c)]``: their mean, or a sample of the posterior (Matheron's rule: a
        sample of the prior, moved by what the data say of its error)."""
        ...


def condition(data: Data, scales: Scales) -> Posterior:
    """The posterior, in the primal form where there are more trials than features and no GP."""
    features = data.inputs.whitened(scales).shape[1]
    return Primal(data, scales) if not scales.smooth and len(data) > features else Dual(data, scales)


class Dual:
    """By the Cholesky factor of the ``[n, n]`` kernel: any number of features, and a GP if there is one."""

    def __init__(self, data: Data, scales: Scales) -> None:
        self.scales, self.inputs, self.target = scales, data.inputs, data.target
        self.features = data.inputs.whitened(scales)
        self.noise = scales.noise**2 + data.errors
        kernel = self.features @ self.features.T
        if scales.smooth:
            kernel += scales.smooth**2 * smooth(data.inputs.places, data.inputs.places, scales.length)
        kernel[np.diag_indices_from(kernel)] += self.noise
        self.factor = cholesky(kernel, lower=True, overwrite_a=True, check_finite=False)
        self.solved = cho_solve((self.factor, True), data.target, check_finite=False)

    def predict(self, inputs: Inputs) -> tuple[Floats, Floats]:
        own = inputs.whitened(self.scales)
        cross = own @ self.features.T
        if self.scales.smooth:
            near = smooth(inputs.places, self.inputs.places, self.scales.length)
            cross += self.scales.smooth**2 * near
        known = solve_triangular(self.factor, cross.T, lower=True, check_finite=False)
        prior = np.sum(own**2, axis=1) + self.scales.smooth**2
        return cross @ self.solved, prior - np.sum(known**2, axis=0)

    def weights(self, rng: np.random.Generator | None) -> Floats:
        if rng is None:
            return np.asarray(self.features.T @ self.solved)
        prior = rng.standard_normal(self.features.shape[1])
        drawn = self.features @ prior + self._rest(rng)
        moved = cho_solve((self.factor, True), self.target - drawn, check_finite=False)
        return np.asarray(prior + self.features.T @ moved)

    def _rest(self, rng: np.random.Generator) -> Floats:
        """A sample of what the weights don't say at the trials: noise, and the GP."""
        normal = rng.standard_normal(len(self.noise))
        if not self.scales.smooth:
            return np.asarray(np.sqrt(self.noise) * normal)
        kernel = self.scales.smooth**2 * smooth(self.inputs.places, self.inputs.places, self.scales.length)
        kernel[np.diag_indices_from(kernel)] += self.noise
        return np.asarray(cholesky(kernel, lower=True, check_finite=False) @ normal)


class Primal:
    """By the Cholesky factor of the ``[p, p]`` precision: any number of trials."""

    def __init__(self, data: Data, scales: Scales) -> None:
        self.scales, self.target = scales, data.target
        self.features = data.inputs.whitened(scales)
        self.noise = scales.noise**2 + data.errors
        scaled = self.features / np.sqrt(self.noise)[:, None]
        precision = scaled.T @ scaled
        precision[np.diag_indices_from(precision)] += 1.0
        self.factor = cholesky(precision, lower=True, overwrite_a=True, check_finite=False)
        self.mean = self._solve(data.target)

    def _solve(self, target: Floats) -> Floats:
        """Weights that the data give for ``target [n]``."""
        moment = self.features.T @ (target / self.noise)
        return np.asarray(cho_solve((self.factor, True), moment, check_finite=False))

    def predict(self, inputs: Inputs) -> tuple[Floats, Floats]:
        own = inputs.whitened(self.scales)
        spread = solve_triangular(self.factor, own.T, lower=True, check_finite=False)
        return own @ self.mean, np.sum(spread**2, axis=0)

    def weights(self, rng: np.random.Generator | None) -> Floats:
        if rng is None:
            return self.mean
        prior = rng.standard_normal(self.features.shape[1])
        noise = np.sqrt(self.noise) * rng.standard_normal(len(self.noise))
        return np.asarray(prior + self._solve(self.target - self.features @ prior - noise))


def smooth(a: Floats, b: Floats, length: float) -> Floats:
    """Squared-exponential kernel ``[n, m]`` of places ``[n, q]`` and ``[m, q]``."""
    squares = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None] - 2.0 * (a @ b.T)
    return np.asarray(np.exp(-np.maximum(squares, 0.0) / (2.0 * length**2)))


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
