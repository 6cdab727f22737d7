"""Extremely randomised trees (Geurts et al., Machine Learning 63, 2006) on features of whole candidates.

They need no scaling and few trials, and bear noise; what they can't do is extrapolate. ``traits`` (what
theory says about a schedule) help them most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from autocomp.predictors.additive import AdditivePredictor, usable_trials
from autocomp.predictors.base import Prediction, log_normal
from autocomp.predictors.sequence import SequenceEncoder, Traits
from autocomp.space import AdditiveTable, Candidate, Ordered, SearchSpace
from autocomp.trial import Trial

Floats = NDArray[np.float64]

ENOUGH = 8
"""Fewer trials than this grow no tree: the prior answers alone."""


class TreesPredictor:
    """Learns what a table misses (or the metric itself) with 200 trees; their spread is the uncertainty.

    Args:
        metric: what to predict.
        table: additive prior, or ``None``: then the mean of the trials.
        space: decisions of the candidates.
        traits: further features of a candidate (``Problem.traits``).
        trees, seed: size and seed of the forest.
    """

    def __init__(
        self,
        metric: str,
        table: AdditiveTable | None,
        space: SearchSpace,
        *,
        traits: Traits | None = None,
        trees: int = 200,
        seed: int = 0,
    ) -> None:
        self.metric, self.table, self.space = metric, table, space
        self.encoder, self.trees, self.seed = SequenceEncoder(space, traits), trees, seed
        timed = {space.by_name[n].space for c in space.constraints if isinstance(c, Ordered) for n in c.names}
        names = sorted(space.decisions, key=lambda d: d.name)
        self._others = [i for i, d in enumerate(names) if d.space not in timed]
        self._reset()

    def _reset(self) -> None:
        self._base = None if self.table is None else AdditivePredictor(self.table)
        self._forest: Any = None
        self._log, self._center, self._spread, self._error = False, 0.0, 1.0, 1.0

    def fit(self, trials: Sequence[Trial]) -> Self:
        """Forget what was learned and learn from ``trials``; failed, NaN and foreign ones are ignored.

        The result depends on the set of trials and the seed, not on their order.
        """
        from sklearn.ensemble import ExtraTreesRegressor

        self._reset()
        used = [t for t in usable_trials(trials, self.metric) if self.encoder.knows(t.candidate)]
        used.sort(key=lambda t: (t.candidate.fingerprint, t.value(self.metric)))
        if self._base is not None:
            used = [t for t in used if np.isfinite(self._base.table.total(t.candidate))]
            self._base.fit(used)
        if not used:
            return self
        values = np.array([t.value(self.metric) for t in used])
        self._log = bool(np.all(values > 0))
        y = np.log(values) if self._log else values
        self._center = float(y.mean())
        self._spread = float(y.std()) or 0.1 * abs(self._center) or 1.0
        if len(used) < ENOUGH:
            return self
        candidates = [t.candidate for t in used]
        rest = y - self._prior(candidates)
        options = {"min_samples_leaf": 2, "max_features": 0.3, "bootstrap": True, "oob_score": True}
        self._forest = ExtraTreesRegressor(self.trees, random_state=self.seed, **options)
        self._forest.fit(self._features(candidates), rest)
        self._error = float(np.sqrt(np.nanmean((self._forest.oob_prediction_ - rest) ** 2))) + 1e-9
        return self

    def _prior(self, candidates: Sequence[Candidate]) -> Floats:
        """What the table says, or the trials' mean, on the scale that is learned on."""
        if self._base is None:
            return np.full(len(candidates), self._center)
        values = self._base.predict(candidates).mean
        return np.log(np.maximum(values, 1e-300)) if self._log else values

    def _features(self, candidates: Sequence[Candidate]) -> Floats:
        """The whole, and without traits every slot in order and their sums: ``[n, f]``.

        Traits say it better than slots, and fewer features bear noise better; only what other spaces decide
        is added to them.
        """
        data = self.encoder(candidates)
        if self.encoder.traits is not None:
            codes = np.array([self.encoder.codes(c)[self._others] for c in candidates])
            return np.concatenate([data.whole, np.nan_to_num(codes, nan=-1.0)], axis=1)
        slots = data.steps.reshape(len(data.whole), -1)
        return np.concatenate([data.whole, data.steps.sum(axis=1), slots], axis=1)

    def predict(self, candidates: Sequence[Candidate]) -> Prediction:
        """Median and standard deviation of a measurement, shape ``[candidates]``, in the metric's unit.

        Raises:
            SpaceError: a candidate is not in the space.
        """
        for c in candidates:
            self.encoder.codes(c)
        if self._forest is None:
            if self._base is not None:
                return self._base.predict(candidates)
            middle, deviation = np.full(len(candidates), self._center), np.full(len(candidates), self._spread)
        elif not len(candidates):
            middle = deviation = np.zeros(0)
        else:
            features = self._features(candidates)
            each = np.stack([tree.predict(features) for tree in self._forest.estimators_])
            middle = self._prior(candidates) + each.mean(axis=0)
            # Half of the error on left-out trials is taken to be everywhere, half follows the trees' spread.
            spread = each.var(axis=0)
            deviation = self._error * np.sqrt(0.5 + 0.5 * spread / max(float(spread.mean()), 1e-12))
        return log_normal(middle, deviation) if self._log else Prediction(middle, deviation)
