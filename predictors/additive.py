"""An additive table as a predictor, with its scale and offset corrected by what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from autocomp.predictors.base import Prediction
from autocomp.space import AdditiveTable, Candidate
from autocomp.trial import Trial

Floats = NDArray[np.float64]


def usable_trials(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Trials with a finite value of the metric, in the order given."""
    return [t for t in trials if t.ok and math.isfinite(t.value(metric))]


class AdditivePredictor:
    """``metric = exp(a) * total^(1 + b)`` where totals and values are positive, else ``a + (1 + b) * total``.

    ``a`` and ``b`` have normal priors around 0 (the table as it stands) and are updated by Bayesian
    linear regression, so that two trials shift the scale and fifty may bend it. Exact tables stay as
    they are: their sum is the truth.

    Args:
        table: the additive model.
        spread: prior relative error of a total (one standard deviation).
    """

    def __init__(self, table: AdditiveTable, spread: float = 0.3) -> None:
        self.table, self.metric, self.spread = table, table.metric, spread
        self._log = False
        self._center = 0.0
        self._weights: Floats = np.zeros(2)
        self._covariance: Floats = np.zeros((2, 2))
        self._noise = spread
        self._unit = 1.0
        self._fitted = False

    def fit(self, trials: Sequence[Trial]) -> Self:
        """Learn scale, offset and noise. Failed trials and NaN are ignored; no trials, no change."""
        used = [t for t in usable_trials(trials, self.metric) if math.isfinite(self.table.total(t.candidate))]
        self._fitted = bool(used) and not self.table.exact
        if not self._fitted:
            return self
        totals = np.array([self.table.total(t.candidate) for t in used])
        values = np.array([t.value(self.metric) for t in used])
        self._log = bool(np.all(totals > 0) and np.all(values > 0))
        x, y = (np.log(totals), np.log(values)) if self._log else (totals, values)
        self._center = float(x.mean())
        self._unit = 1.0 if self._log else max(float(np.std(values)), 1e-12, 0.1 * abs(float(values.mean())))
        self._regress(x - self._center, y - x)
        return self

    def _regress(self, x: Floats, residual: Floats) -> None:
        """Conjugate normal regression of the residual on ``[1, x]``, twice, to settle the noise."""
        design = np.column_stack([np.ones_like(x), x])
        slope = 0.3 if self._log else 1.0
        prior = np.diag([1.0 / self._unit**2, 1.0 / slope**2])
        noise = self.spread * self._unit
        for _ in range(3):
            self._covariance = np.asarray(np.linalg.inv(prior + design.T @ design / noise**2), np.float64)
            self._weights = self._covariance @ (design.T @ residual) / noise**2
            # The table's order is kept: what ranks backwards is for an audit to say, not for a fit to turn.
            self._weights[1] = max(float(self._weights[1]), -0.95)
            errors = residual - design @ self._weights
            guess = (self.spread * self._unit) ** 2
            noise = math.sqrt((2.0 * guess + float(errors @ errors)) / (2.0 + len(x)))
        self._noise = noise

    def predict(self, candidates: Sequence[Candidate]) -> Prediction:
        """Mean and standard deviation, shape ``[candidates]``, in the metric's unit."""
        totals = np.array([self.table.total(c) for c in candidates], dtype=np.float64)
        errors = [self._table_error(c) for c in candidates] if self.table.stderr else [0.0] * len(totals)
        own = np.array(errors, dtype=np.float64)
        if not self._fitted:
            relative = 1e-6 if self.table.exact else self.spread
            varying = np.maximum(np.abs(totals - self.table.base), 1e-9 * (1.0 + np.abs(totals)))
            return Prediction(totals, np.hypot(relative * varying, own) + 1e-12)
        positive = totals > 0
        x = np.log(np.where(positive, totals, 1.0)) if self._log else totals
        design = np.column_stack([np.ones_like(x), x - self._center])
        mean = x + design @ self._weights
        variance = np.einsum("ni,ij,nj->n", design, self._covariance, design) + self._noise**2
        if not self._log:
            return Prediction(mean, np.sqrt(variance + own**2))
        variance = variance + (own / np.where(positive, totals, 1.0)) ** 2
        middle = np.where(positive, np.exp(mean), totals)
        return Prediction(middle, np.abs(middle) * np.sqrt(np.expm1(np.minimum(variance, 4.0))) + 1e-12)

    def _table_error(self, candidate: Candidate) -> float:
        """Standard error of the total from the errors of its entries, taken as independent."""
        errors = (self.table.stderr.get(n, {}).get(v, 0.0) for n, v in candidate.items)
        return math.sqrt(sum(e * e for e in errors))
