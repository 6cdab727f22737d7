"""What an additive table misses, learned from measured trials by Bayesian regression.

The model, with ``T`` the table's total and a logarithmic link where everything is positive::

    log y = a + (1 + b) log T + sum over effects (share * relative error) [+ GP] + noise

All unknowns have normal priors, so the posterior is one Cholesky factor of an ``[n, n]`` kernel, whatever
the number of options (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, eq. 2.25-2.26).
The kernel's scales maximise the marginal likelihood over a small grid. Without a table, or where values are
not positive, the same regression works on ``y`` itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular

from autocomp.errors import SpaceError
from autocomp.predictors.additive import usable_trials
from autocomp.predictors.base import Prediction
from autocomp.predictors.features import Encoder
from autocomp.space import AdditiveTable, Candidate, SearchSpace, Value
from autocomp.trial import Trial

Floats = NDArray[np.float64]
Kind = Literal["ridge", "gp"]

_TUNED_ON = 400
"""Trials that choose the scales; all trials enter the posterior."""


@dataclass(frozen=True)
class Scales:
    """Prior standard deviations, in units of the (log) metric.

    Attributes:
        effect: of a relative error of an entry.
        noise: of what no effect explains.
        smooth: of the GP part (0: none).
        length: of the GP, as a share of differing decisions.
    """

    effect: float = 0.3
    noise: float = 0.1
    smooth: float = 0.0
    length: float = 0.5


@dataclass(frozen=True)
class _Inputs:
    """Line ``[n, 2]`` (1 and the centred total), effects ``[n, p]`` and places ``[n, q]`` of candidates."""

    line: Floats
    effects: Floats
    places: Floats

    def __getitem__(self, rows: NDArray[np.intp]) -> _Inputs:
        return _Inputs(self.line[rows], self.effects[rows], self.places[rows])


class ResidualPredictor:
    """Learns one metric around an additive table (or from nothing), with uncertainty.

    Args:
        metric: what to predict.
        table: additive prior, or ``None``.
        space: decisions of the candidates.
        kind: ``ridge`` has effects only; ``gp`` adds a Gaussian process over the share of decisions
            that differ.
    """

    def __init__(
        self, metric: str, table: AdditiveTable | None, space: SearchSpace, kind: Kind = "ridge"
    ) -> None:
        self.metric, self.table, self.space, self.kind = metric, table, space, kind
        self.encoder = Encoder(space, table)
        self.scales = Scales(smooth=0.1 if kind == "gp" else 0.0)
        self._codes: dict[str, Floats] = {}
        self._reset()

    def _reset(self) -> None:
        self._used: list[Trial] = []
        self._log = self._starts_positive()
        self._unit, self._offset, self._center = 1.0, 0.0, 0.0
        self._factor: Floats | None = None
        self._weights = np.zeros(0)
        self._likelihood = -math.inf
        self._inputs: _Inputs | None = None

    def _starts_positive(self) -> bool:
        """Whether the table can only give positive totals."""
        if self.table is None:
            return False
        least = [
            min((c for c in r.values() if math.isfinite(c)), default=0.0) for r in self.table.costs.values()
        ]
        return self.table.base + sum(least) > 0

    # --- fitting ------------------------------------------------------------------------------------------

    def fit(self, trials: Sequence[Trial]) -> Self:
        """Forget what was learned and learn from ``trials``; failed and NaN ones are ignored."""
        self._reset()
        used = [t for t in usable_trials(trials, self.metric) if self._knows(t.candidate)]
        totals = self._totals([t.candidate for t in used])
        known = np.isfinite(totals)
        used, totals = [t for t, k in zip(used, known, strict=True) if k], totals[known]
        if not used:
            return self
        positive = all(t.value(self.metric) > 0 for t in used) and (self.table is None or np.all(totals > 0))
        self._learn(used, totals, log=bool(positive))
        if positive and self.table is None and len(used) > 2:
            self._keep_better_link(used, totals)
        return self

    def _learn(self, used: list[Trial], totals: Floats, log: bool) -> None:
        values = np.array([t.value(self.metric) for t in used])
        self._log, self._used = log, used
        y = np.log(values) if log else values
        self._set_units(y, totals)
        errors = np.array([t.stderr(self.metric) for t in used])
        errors = np.nan_to_num(errors / (values if log else 1.0)) / self._unit
        inputs = self._encode([t.candidate for t in used], totals)
        self._condition(inputs, (y - self._prior_mean(totals)) / self._unit, errors**2)

    def _keep_better_link(self, used: list[Trial], totals: Floats) -> None:
        """Without a table nothing says whether effects multiply or add; the likelihood of ``y`` does."""
        n = min(len(used), _TUNED_ON)  # as many trials as the likelihood is of
        logs = n * float(np.mean([math.log(t.value(self.metric)) for t in used]))
        multiply = self._likelihood - n * math.log(self._unit) - logs
        self._learn(used, totals, log=False)
        if self._likelihood - n * math.log(self._unit) < multiply:
            self._learn(used, totals, log=True)

    def _knows(self, candidate: Candidate) -> bool:
        """False for a candidate outside the space (a baseline that was measured for comparison)."""
        try:
            self._codes.setdefault(candidate.fingerprint, self.encoder.codes(candidate))
        except SpaceError:
            return False
        return True

    def _set_units(self, y: Floats, totals: Floats) -> None:
        """Offset and unit of the regression target, and the centre of the totals."""
        spread = float(np.std(y)) or 0.1 * abs(float(y.mean())) or 1.0
        self._unit = 1.0 if self._log and self.table is not None else spread
        if self.table is None:
            self._offset = float(y.mean())
        else:
            self._center = float(np.mean(np.log(totals) if self._log else totals))

    def _prior_mean(self, totals: Floats) -> Floats:
        if self.table is None:
            return np.full(len(totals), self._offset)
        return np.log(np.maximum(totals, 1e-300)) if self._log else totals

    def _condition(self, inputs: _Inputs, target: Floats, errors: Floats) -> None:
        subset = np.arange(len(target))
        if len(subset) > _TUNED_ON:
            subset = np.linspace(0, len(target) - 1, _TUNED_ON).astype(np.intp)
        self.scales, self._likelihood = _tune(inputs[subset], target[subset], errors[subset], self.kind)
        kernel = _kernel(inputs, inputs, self.scales)
        kernel[np.diag_indices_from(kernel)] += self.scales.noise**2 + errors
        self._factor = cholesky(kernel, lower=True)
        self._weights = cho_solve((self._factor, True), target)
        self._inputs = inputs

    # --- predicting ---------------------------------------------------------------------------------------

    def predict(self, candidates: Sequence[Candidate]) -> Prediction:
        """Median and standard deviation of a measurement, shape ``[candidates]``, in the metric's unit.

        Raises:
            SpaceError: a candidate is not in the space.
        """
        totals = self._totals(candidates)
        inputs = self._encode(candidates, totals)
        mean = np.zeros(len(candidates))
        variance = _kernel_diagonal(inputs, self.scales) + self.scales.noise**2
        if self._factor is not None and self._inputs is not None:
            cross = _kernel(inputs, self._inputs, self.scales)
            mean = cross @ self._weights
            solved = solve_triangular(self._factor, cross.T, lower=True)
            variance = np.maximum(variance - np.sum(solved**2, axis=0), self.scales.noise**2)
        middle = self._prior_mean(totals) + self._unit * mean
        deviation = self._unit * np.sqrt(variance)
        if not self._log:
            floor = 1e-12 * (1.0 + np.abs(middle))
            return Prediction(middle, np.nan_to_num(deviation, nan=1e6) + floor)
        value = np.exp(np.clip(middle, -600, 600))
        return Prediction(value, value * np.sqrt(np.expm1(np.minimum(deviation**2, 4.0))) + 1e-300)

    def _totals(self, candidates: Sequence[Candidate]) -> Floats:
        if self.table is None:
            return np.zeros(len(candidates))
        return np.array([self.table.total(c) for c in candidates], dtype=np.float64)

    def _encode(self, candidates: Sequence[Candidate], totals: Floats) -> _Inputs:
        for c in candidates:
            if c.fingerprint not in self._codes:
                self._codes[c.fingerprint] = self.encoder.codes(c)
        codes = np.array([self._codes[c.fingerprint] for c in candidates]).reshape(-1, len(self.space))
        relative = self._log and self.table is not None
        ones = np.ones(len(codes))
        divisor = np.maximum(np.abs(totals), 1e-300) if relative else ones
        if self.table is not None and not relative:
            divisor = ones * self._unit
        line = np.zeros((len(codes), 2))
        line[:, 0] = 1.0
        if self.table is not None:
            x = np.log(np.maximum(totals, 1e-300)) if self._log else totals / self._unit
            line[:, 1] = 0.3 * (x - (self._center if self._log else self._center / self._unit))
        places = self.encoder.places(codes) if self.kind == "gp" else np.zeros((len(codes), 0))
        return _Inputs(line, self.encoder.effects(codes, divisor), places)

    # --- the learned table --------------------------------------------------------------------------------

    def corrected(self, rng: np.random.Generator | None = None) -> AdditiveTable:
        """The table with every entry corrected by its effects: their posterior mean, or one posterior
        sample when ``rng`` is given (Thompson sampling; Matheron's rule). Costs that were positive stay so,
        and the whole is scaled so that totals match the measured trials in the median.

        Raises:
            ValueError: there is no table to correct.
        """
        if self.table is None:
            raise ValueError("this predictor has no table to correct")
        effects = self._effects(rng)
        costs: dict[str, dict[Value, float]] = {}
        for row in self.encoder.entries:
            for e in row:
                old = self.table.cost(e.name, e.option)
                if e.name not in self.table.costs or not math.isfinite(old):
                    continue
                costs.setdefault(e.name, {})[e.option] = _moved(old, e.scale, effects[list(e.effects)])
        table = AdditiveTable(self.metric, self.table.base, costs)
        return table if not self._log or not self._used else self._rescaled(table)

    def _effects(self, rng: np.random.Generator | None) -> Floats:
        size, tau = self.encoder.size, self.scales.effect
        prior = np.zeros(size) if rng is None else tau * rng.standard_normal(size)
        if self._inputs is None or self._factor is None:
            return prior
        weights = self._weights
        if rng is not None:
            n = len(weights)
            drawn = self._inputs.effects[:, :size] @ prior
            drawn += self._inputs.line @ rng.standard_normal(2) + self.scales.noise * rng.standard_normal(n)
            weights = weights - cho_solve((self._factor, True), drawn)
        posterior = prior + tau**2 * (self._inputs.effects[:, :size].T @ weights)
        return np.asarray(posterior)

    def _rescaled(self, table: AdditiveTable) -> AdditiveTable:
        ratios = [t.value(self.metric) / table.total(t.candidate) for t in self._used]
        factor = float(np.median(ratios))
        costs = {n: {o: factor * c for o, c in row.items()} for n, row in table.costs.items()}
        return AdditiveTable(table.metric, factor * table.base, costs)


def _moved(cost: float, scale: float, effects: Floats) -> float:
    """The cost after its relative errors; to first order ``cost + scale * effects``, but never past zero."""
    relative = float(np.clip(effects.sum(), -2.0, 2.0))
    if abs(cost) < scale:  # an entry at the floor: nothing to scale, so the error is added
        return (
            max(cost + scale * relative, 0.05 * cost)
            if cost >= 0
            else min(cost + scale * relative, 0.05 * cost)
        )
    return cost * math.exp(relative if cost > 0 else -relative)


def _kernel(a: _Inputs, b: _Inputs, scales: Scales) -> Floats:
    kernel = a.line @ b.line.T + scales.effect**2 * (a.effects @ b.effects.T)
    if scales.smooth:
        kernel += scales.smooth**2 * _smooth(a.places, b.places, scales.length)
    return np.asarray(kernel)


def _smooth(a: Floats, b: Floats, length: float) -> Floats:
    squares = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None] - 2.0 * (a @ b.T)
    return np.asarray(np.exp(-np.maximum(squares, 0.0) / (2.0 * length**2)))


def _kernel_diagonal(a: _Inputs, scales: Scales) -> Floats:
    diagonal = np.sum(a.line**2, axis=1) + scales.effect**2 * np.sum(a.effects**2, axis=1)
    return np.asarray(diagonal + scales.smooth**2)


def _tune(inputs: _Inputs, target: Floats, errors: Floats, kind: Kind) -> tuple[Scales, float]:
    """Scales of the largest marginal likelihood (a mild prior pulls to the defaults), and its logarithm."""
    line = inputs.line @ inputs.line.T
    effects = inputs.effects @ inputs.effects.T
    smooths = [(0.0, 0.5)] if kind == "ridge" else [(s, n) for s in (0.1, 0.4) for n in (0.25, 0.8)]
    best, score = Scales(), -math.inf
    for smooth, length in smooths:
        rough = line + smooth**2 * _smooth(inputs.places, inputs.places, length) if smooth else line
        for effect, noise in product((0.1, 0.2, 0.4), (0.01, 0.03, 0.1, 0.3)):
            kernel = rough + effect**2 * effects
            kernel[np.diag_indices_from(kernel)] += noise**2 + errors
            factor, _ = cho_factor(kernel, lower=True, check_finite=False)
            fit = target @ cho_solve((factor, True), target, check_finite=False)
            likelihood = -0.5 * float(fit) - float(np.log(np.diag(factor)).sum())
            likelihood -= 0.5 * math.log(effect / 0.3) ** 2 + 0.25 * math.log(noise / 0.1) ** 2
            if likelihood > score:
                best, score = Scales(effect, noise, smooth, length), likelihood
    return best, score
