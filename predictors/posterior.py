"""Bayesian linear regression with an optional Gaussian process, in whichever form is smaller.

With features ``W [n, p]`` of unit prior variance, noise variances ``D`` and no GP, predictions are the same
from the kernel ``W W' + D [n, n]`` (dual) as from the precision ``I + W' D^-1 W [p, p]`` (primal). The cost
is the cube of the smaller side, and the primal's memory grows with the trials as ``n p`` (Rasmussen and
Williams, Gaussian Processes for Machine Learning, 2006, eq. 2.8, 2.11, 2.25 and 2.26). All arrays are
float64 and in units of the regression target.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular

Floats = NDArray[np.float64]
Integers = NDArray[np.intp]
Kind = Literal["ridge", "gp"]


@dataclass(frozen=True)
class Scales:
    """Prior standard deviations, in units of the (log) metric.

    Attributes:
        effect: of a relative error of an entry.
        noise: of what no effect explains.
        curve: of each bump of a curve (0: none).
        smooth: of the GP part (0: none).
        length: of the GP, as a share of differing decisions.
        relevance: of each place for the GP, ``[q]``; ``None``: all alike.
    """

    effect: float = 0.3
    noise: float = 0.1
    smooth: float = 0.0
    length: float = 0.5
    curve: float = 0.0
    relevance: Floats | None = field(default=None, compare=False)

    def gp(self, a: Inputs, b: Inputs) -> Floats:
        """Covariance ``[n, m]`` of the GP part."""
        at = 1.0 if self.relevance is None else self.relevance
        return self.smooth**2 * smooth(at * a.places, at * b.places, self.length)


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
            kernel += scales.gp(data.inputs, data.inputs)
        kernel[np.diag_indices_from(kernel)] += self.noise
        self.factor = cholesky(kernel, lower=True, overwrite_a=True, check_finite=False)
        self.solved = cho_solve((self.factor, True), data.target, check_finite=False)

    def predict(self, inputs: Inputs) -> tuple[Floats, Floats]:
        own = inputs.whitened(self.scales)
        cross = own @ self.features.T
        if self.scales.smooth:
            cross += self.scales.gp(inputs, self.inputs)
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
        kernel = self.scales.gp(self.inputs, self.inputs)
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
