"""What predictors that learn values around a prior have in common: trials, links, priors, left-out errors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from autocomp.predictors.additive import AdditivePredictor, usable_trials
from autocomp.predictors.audit import rank_correlations
from autocomp.predictors.base import Prediction, log_normal
from autocomp.predictors.calibration import std_factor
from autocomp.predictors.sequence import SequenceEncoder, Traits
from autocomp.space import AdditiveTable, Candidate, SearchSpace
from autocomp.trial import Trial

Floats = NDArray[np.float64]

ENOUGH = 8
"""Fewer trials than this grow no model: the prior answers alone."""


def learnable(
    trials: Sequence[Trial], metric: str, encoder: SequenceEncoder, table: AdditiveTable | None
) -> list[Trial]:
    """Trials that have the metric and lie in the encoder's space, with a finite total where there is a table;
    in an order of their own, so that theirs makes no difference."""
    used = [t for t in usable_trials(trials, metric) if encoder.knows(t.candidate)]
    if table is not None:
        used = [t for t in used if math.isfinite(table.total(t.candidate))]
    return sorted(used, key=lambda t: (t.candidate.fingerprint, t.value(metric)))


class Members(Protocol):
    """Several regressors of one target.

    Attributes:
        mean, spread: prediction of each training row by members that did not see it, ``[n]``, and the
            variance of the members there; NaN where every member saw it.
    """

    mean: Floats
    spread: Floats

    def predict(self, features: Floats) -> Floats:
        """``[members, n]``."""
        ...


class AroundPrior(ABC):
    """Learns what a table misses (or the metric itself) with an ensemble; errors give the uncertainty.

    Half of the error on left-out trials is taken to be everywhere, half follows the members' spread; then
    deviations are multiplied by what the left-out errors say. Subclasses say what the features are
    (``features``) and which ensemble is grown on them (``grow``).

    Args:
        metric: what to predict.
        table: additive prior, or ``None``: then the mean of the trials.
        space: decisions of the candidates.
        traits: further features of a candidate (``Problem.traits``).
        seed: of the ensemble.

    Attributes:
        cross_validated: Kendall's tau of the predictions of left-out trials; NaN before there are any.
    """

    def __init__(
        self,
        metric: str,
        table: AdditiveTable | None,
        space: SearchSpace,
        *,
        traits: Traits | None = None,
        seed: int = 0,
    ) -> None:
        self.metric, self.table, self.space, self.seed = metric, table, space, seed
        self.encoder = SequenceEncoder(space, traits)
        self._reset()

    def _reset(self) -> None:
        self._base = None if self.table is None else AdditivePredictor(self.table)
        self._members: Members | None = None
        self._log, self._center, self._spread = False, 0.0, 1.0
        self._error, self._doubt, self.cross_validated = 1.0, 1.0, math.nan

    @abstractmethod
    def features(self, candidates: Sequence[Candidate]) -> Floats:
        """What the ensemble sees, ``[n, f]``."""

    @abstractmethod
    def grow(self, features: Floats, target: Floats) -> Members:
        """An ensemble for ``target [n]``."""

    def fit(self, trials: Sequence[Trial]) -> Self:
        """Forget what was learned and learn from ``trials``; failed, NaN and foreign ones are ignored.

        The result depends on the set of trials and the seed, not on their order.
        """
        self._reset()
        used = learnable(trials, self.metric, self.encoder, self.table)
        if self._base is not None:
            self._base.fit(used)
        if not used:
            return self
        values = np.array([t.value(self.metric) for t in used])
        self._log = bool(np.all(values > 0))
        y = np.log(values) if self._log else values
        self._center = float(y.mean())
        self._spread = float(y.std()) or 0.1 * abs(self._center) or 1.0
        if len(used) >= ENOUGH:
            candidates = [t.candidate for t in used]
            prior = self._prior(candidates)
            self._learn(self.features(candidates), y - prior, prior)
        return self

    def _learn(self, features: Floats, rest: Floats, prior: Floats) -> None:
        self._members = found = self.grow(features, rest)
        unseen = np.isfinite(found.mean)
        errors, spread = (rest - found.mean)[unseen], found.spread[unseen]
        tiny = 1e-9 * (self._spread + abs(self._center))
        self._error = float(np.sqrt(np.mean(errors**2))) + tiny if len(errors) else self._spread
        self._doubt = max(float(np.mean(spread)) if len(spread) else 0.0, 1e-24, tiny**2)
        if len(errors):
            # Never less: where a member errs on a trial it did not see, that very error is in the spread.
            self._error *= max(1.0, std_factor(errors / self._deviation(spread)))
            order = rank_correlations((prior + found.mean)[unseen], (prior + rest)[unseen])
            self.cross_validated = order[1]

    def _deviation(self, spread: Floats) -> Floats:
        """Standard deviation of a measurement where members vary by ``spread [n]``."""
        return np.asarray(self._error * np.sqrt(0.5 + 0.5 * np.minimum(spread / self._doubt, 20.0)))

    def _prior(self, candidates: Sequence[Candidate]) -> Floats:
        """What the table says, or the trials' mean, on the scale that is learned on."""
        if self._base is None:
            return np.full(len(candidates), self._center)
        values = self._base.predict(candidates).mean
        return np.log(np.maximum(values, 1e-300)) if self._log else values

    def predict(self, candidates: Sequence[Candidate]) -> Prediction:
        """Median and standard deviation of a measurement, shape ``[candidates]``, in the metric's unit.

        Raises:
            SpaceError: a candidate is not in the space.
        """
        for c in candidates:
            self.encoder.codes(c)
        if self._members is None:
            if self._base is not None:
                return self._base.predict(candidates)
            middle, deviation = np.full(len(candidates), self._center), np.full(len(candidates), self._spread)
        elif not len(candidates):
            middle = deviation = np.zeros(0)
        else:
            each = self._members.predict(self.features(candidates))
            middle = self._prior(candidates) + each.mean(axis=0)
            deviation = self._deviation(each.var(axis=0))
        return log_normal(middle, deviation) if self._log else Prediction(middle, deviation)
