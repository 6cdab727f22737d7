"""Boosted trees (Friedman, Annals of Statistics 29, 2001; stochastic: 2002) around an additive table.

They see the table's total, its parts by option and by block, and every decision, so that they can say what a
sum can't: that two options hurt more together, or that a total grows faster beyond a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocomp.predictors.around import AroundPrior, Members
from autocomp.predictors.features import Encoder
from autocomp.predictors.sequence import Traits
from autocomp.space import AdditiveTable, Candidate, SearchSpace

Floats = NDArray[np.float64]

_EXACT = 1000
"""Trials up to which every threshold is tried; beyond, values are binned (Ke et al., LightGBM, 2017)."""


class BoostedPredictor(AroundPrior):
    """Learns around a table or from nothing by boosting; see ``AroundPrior``.

    Every member leaves out one part of the trials, so that each is predicted unseen by one of them.

    Args:
        metric, table, space, traits, seed: as there.
        members: boosted models.
        rounds, depth, rate: trees of each, their depth, and the share of each that is added.
    """

    def __init__(
        self,
        metric: str,
        table: AdditiveTable | None,
        space: SearchSpace,
        *,
        traits: Traits | None = None,
        seed: int = 0,
        members: int = 5,
        rounds: int = 100,
        depth: int = 3,
        rate: float = 0.08,
    ) -> None:
        super().__init__(metric, table, space, traits=traits, seed=seed)
        self.members, self.rounds, self.depth, self.rate = members, rounds, depth, rate
        self._table = Encoder(space, table)

    def features(self, candidates: Sequence[Candidate]) -> Floats:
        """``[n, f]``: logarithm of the total, sums by option and by block, decisions; of sequences with
        floats and where there are traits also the features of the whole and sums over its steps."""
        encoder, layout = self._table, self._table.layout
        codes = encoder.rows(candidates)
        totals = encoder.totals(codes)
        sums = encoder.effects(codes, np.ones(len(codes)))[:, : layout.shared_size]
        level = np.sign(totals) * np.log1p(np.abs(totals) / encoder.scales.min(initial=1.0))
        columns = [
            level[:, None],
            encoder.shares(codes),
            sums,
            _decisions(codes, layout.widths),
            encoder.intervals(codes),
        ]
        if self.encoder.traits is not None or any(i is not None for i in layout.intervals):
            data = self.encoder(candidates)
            columns += [data.whole, data.steps.sum(axis=1)]
        return np.nan_to_num(np.concatenate(columns, axis=1))  # the prior of an unknown total is NaN as it is

    def grow(self, features: Floats, target: Floats) -> Members:
        return _Boosted(features, target, self)


def _decisions(codes: Floats, widths: Sequence[tuple[int, bool]]) -> Floats:
    """One column an ordered choice, one an option of others, ``[n, f]``; nothing for intervals."""
    columns = [np.zeros((len(codes), 0))]
    for column, (size, ordered) in zip(codes.T, widths, strict=True):
        if ordered or size == 2:
            columns.append(column[:, None])
        elif size > 2:
            columns.append((column[:, None] == np.arange(size)).astype(float))
    return np.concatenate(columns, axis=1)


class _Boosted(Members):
    """Boosted models, each of which leaves out one part of the rows."""

    def __init__(self, features: Floats, target: Floats, how: BoostedPredictor) -> None:
        parts = np.random.default_rng(how.seed).permutation(len(target)) % how.members
        self.models = [
            _model(how, how.seed + k, len(target)).fit(features[parts != k], target[parts != k])
            for k in range(how.members)
        ]
        each = self.predict(features)
        self.mean = each[parts, np.arange(len(target))]
        self.spread = each.var(axis=0)

    def predict(self, features: Floats) -> Floats:
        return np.stack([m.predict(features) for m in self.models])


def _model(how: BoostedPredictor, seed: int, trials: int) -> Any:
    from sklearn.ensemble import GradientBoostingRegressor, HistGradientBoostingRegressor

    if trials <= _EXACT:
        options = {"max_depth": how.depth, "subsample": 0.6, "max_features": 0.3, "min_samples_leaf": 3}
        return GradientBoostingRegressor(
            n_estimators=how.rounds, learning_rate=how.rate, random_state=seed, **options
        )
    return HistGradientBoostingRegressor(
        max_iter=how.rounds,
        learning_rate=how.rate,
        max_depth=how.depth,
        max_features=0.3,
        early_stopping=False,
        random_state=seed,
    )
