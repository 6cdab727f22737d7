"""Audit before trust: how well a predictor ranks candidates that were measured."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autocomp.predictors.additive import AdditivePredictor, usable_trials
from autocomp.predictors.base import Predictor
from autocomp.space import AdditiveTable
from autocomp.trial import Trial

Verdict = Literal["trust", "weak", "distrust"]

TRUST, WEAK = 0.5, 0.3
"""Spearman correlations from which a predictor is trusted, or at least of some use."""
ENOUGH = 6
"""Fewer trials than this never earn trust: a correlation of so few points says little."""


@dataclass(frozen=True)
class Audit:
    """Rank agreement of predicted and measured values.

    Attributes:
        metric: what was predicted.
        n: trials compared.
        spearman: of the predictor as it stands.
        kendall: tau-b of the same.
        cross_validated: Spearman of predictions for trials that were left out of the fit (5 folds);
            NaN below ``ENOUGH`` trials.
        verdict: by the cross-validated correlation where there is one: the other may only recall
            what it was fitted on.
    """

    metric: str
    n: int
    spearman: float
    kendall: float
    cross_validated: float
    verdict: Verdict

    def __str__(self) -> str:
        advice = {
            "trust": "the ranking can be relied on",
            "weak": "measure more trials before relying on it",
            "distrust": "do not rely on it; use another sensitivity or measured trials only",
        }[self.verdict]
        return (
            f"{self.metric}: Spearman {self.spearman:.2f}, Kendall {self.kendall:.2f}, cross-validated "
            f"{self.cross_validated:.2f} on {self.n} trials: {self.verdict}; {advice}"
        )


def audit(model: AdditiveTable | Predictor, trials: Sequence[Trial], metric: str | None = None) -> Audit:
    """Compare a table or a predictor with measured trials.

    Use trials that were drawn at random among feasible candidates: those that a searcher picked by the
    same predictor understate its errors. The model itself is not changed.

    Args:
        model: a table, or a predictor as it stands (fitted or not).
        trials: failed ones and NaN are ignored.
        metric: needed only for a predictor without a ``metric`` attribute.

    Raises:
        ValueError: the metric is not known.
    """
    predictor = AdditivePredictor(model) if isinstance(model, AdditiveTable) else model
    name = metric or getattr(predictor, "metric", None)
    if not isinstance(name, str):
        raise ValueError(f"{type(predictor).__name__} has no attribute 'metric'; pass metric=")
    used = usable_trials(trials, name)
    measured = np.array([t.value(name) for t in used])
    predicted = predictor.predict([t.candidate for t in used]).mean if used else np.zeros(0)
    spearman, kendall = rank_correlations(predicted, measured)
    crossed, _ = (
        rank_correlations(left_out(predictor, used), measured) if len(used) >= ENOUGH else (math.nan, 0)
    )
    return Audit(name, len(used), spearman, kendall, crossed, _verdict(spearman, crossed, len(used)))


def rank_correlations(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> tuple[float, float]:
    """Spearman's rho and Kendall's tau-b; NaN for fewer than three pairs or a constant side."""
    from scipy.stats import kendalltau, spearmanr

    known = np.isfinite(predicted) & np.isfinite(measured)
    a, b = predicted[known], measured[known]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan, math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # p-values of tiny samples warn; only the statistic is used
        return float(spearmanr(a, b).statistic), float(kendalltau(a, b).statistic)


def left_out(predictor: Predictor, trials: Sequence[Trial], folds: int = 5) -> NDArray[np.float64]:
    """Prediction of each trial by a copy fitted on the other folds (every fifth trial is one fold)."""
    found, fitted = np.full(len(trials), math.nan), copy.deepcopy(predictor)
    for fold in range(folds):
        held = np.arange(fold, len(trials), folds)
        rest = [t for i, t in enumerate(trials) if i % folds != fold]
        found[held] = fitted.fit(rest).predict([t.candidate for t in trials[fold::folds]]).mean
    return found


def _verdict(spearman: float, crossed: float, n: int) -> Verdict:
    score = spearman if math.isnan(crossed) else crossed
    if math.isnan(score) or score < WEAK:
        return "distrust"
    return "trust" if score >= TRUST and n >= ENOUGH else "weak"
