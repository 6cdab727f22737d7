"""Extremely randomised trees (Geurts et al., Machine Learning 63, 2006) on features of whole candidates.

They need no scaling and few trials, and bear noise; what they can't do is extrapolate. ``traits`` (what
theory says about a schedule) help them most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocomp.predictors.around import AroundPrior, Members
from autocomp.predictors.sequence import Traits
from autocomp.space import AdditiveTable, Candidate, Ordered, SearchSpace

Floats = NDArray[np.float64]


class TreesPredictor(AroundPrior):
    """Learns around a table or from nothing with 200 trees; see ``AroundPrior``.

    Args:
        metric, table, space, traits, seed: as there.
        trees: size of the forest.
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
        super().__init__(metric, table, space, traits=traits, seed=seed)
        self.trees = trees
        timed = {space.by_name[n].space for c in space.constraints if isinstance(c, Ordered) for n in c.names}
        names = sorted(space.decisions, key=lambda d: d.name)
        self._others = [i for i, d in enumerate(names) if d.space not in timed]

    def features(self, candidates: Sequence[Candidate]) -> Floats:
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

    def grow(self, features: Floats, target: Floats) -> Members:
        return _Forest(features, target, self.trees, self.seed)


class _Forest(Members):
    """A forest, and what the trees that did not draw a trial say of it."""

    def __init__(self, features: Floats, target: Floats, trees: int, seed: int) -> None:
        from sklearn.ensemble import ExtraTreesRegressor

        options: dict[str, Any] = {"min_samples_leaf": 2, "max_features": 0.3, "bootstrap": True}
        self.forest = ExtraTreesRegressor(trees, random_state=seed, **options).fit(features, target)
        each = self.predict(features)
        for row, drawn in zip(each, self.forest.estimators_samples_, strict=True):
            row[drawn] = np.nan
        unseen = np.isfinite(each).sum(axis=0) > 1
        self.mean, self.spread = np.full(len(target), np.nan), np.full(len(target), np.nan)
        self.mean[unseen] = np.nanmean(each[:, unseen], axis=0)
        self.spread[unseen] = np.nanvar(each[:, unseen], axis=0)

    def predict(self, features: Floats) -> Floats:
        rows = np.ascontiguousarray(features, dtype=np.float32)  # what each tree would convert to
        return np.stack([tree.predict(rows, check_input=False) for tree in self.forest.estimators_])
