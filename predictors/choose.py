"""Predictors by name, and one that takes whichever ranks unseen trials best."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from autocomp.errors import JobError
from autocomp.predictors.additive import usable_trials
from autocomp.predictors.audit import ENOUGH, left_out, rank_correlations
from autocomp.predictors.base import Prediction, Predictor
from autocomp.predictors.ranking import RankingPredictor
from autocomp.predictors.residual import ResidualPredictor
from autocomp.predictors.sequence import Traits
from autocomp.predictors.trees import TreesPredictor
from autocomp.space import AdditiveTable, Candidate, SearchSpace
from autocomp.trial import Trial

KINDS = ("ridge", "gp", "trees", "ranking", "best")


def make_predictor(
    kind: str,
    metric: str,
    table: AdditiveTable | None,
    space: SearchSpace,
    traits: Traits | None = None,
) -> Predictor:
    """A predictor of ``metric`` for candidates of ``space``, not fitted yet.

    Args:
        kind: ``ridge`` or ``gp`` (values around a table), ``trees`` (features of the whole),
            ``ranking`` (order of sequences), ``best`` (of
            these, by cross-validation at every fit).
        traits: further features of a candidate, which ``trees`` and ``ranking`` use.

    Raises:
        JobError: there is no such kind.
    """
    match kind:
        case "ridge" | "gp":
            return ResidualPredictor(metric, table, space, kind)
        case "trees":
            return TreesPredictor(metric, table, space, traits=traits)
        case "ranking":
            return RankingPredictor(metric, table, space, traits=traits)
        case "best":
            names = ("ridge", "gp", "trees", "ranking")
            return BestOf(metric, {n: make_predictor(n, metric, table, space, traits) for n in names})
    raise JobError(f"unknown predictor {kind!r}; known: {', '.join(KINDS)}")


class BestOf:
    """The predictor whose predictions of left-out trials have the largest Kendall tau.

    Args:
        metric: what to predict.
        predictors: by name; the first one answers until there are enough trials to compare, and wins ties.

    Attributes:
        chosen: name of the one that answers.
        taus: cross-validated tau of each at the last fit; NaN where it could not be found.
    """

    def __init__(self, metric: str, predictors: Mapping[str, Predictor]) -> None:
        self.metric, self.predictors = metric, dict(predictors)
        self.chosen = next(iter(self.predictors))
        self.taus: dict[str, float] = {}

    def fit(self, trials: Sequence[Trial]) -> Self:
        """Fit all of them, and choose. The order of trials makes no difference."""
        used = usable_trials(trials, self.metric)
        used.sort(key=lambda t: (t.candidate.fingerprint, t.value(self.metric)))
        self.taus = {name: self._tau(p, used) for name, p in self.predictors.items()}
        known = {name: tau for name, tau in self.taus.items() if not math.isnan(tau)}
        self.chosen = max(known, key=lambda n: known[n]) if known else next(iter(self.predictors))
        chosen = self.predictors[self.chosen]
        if not (isinstance(chosen, RankingPredictor) and known):  # else it was fitted to be compared
            chosen.fit(used)
        return self

    def _tau(self, predictor: Predictor, trials: Sequence[Trial]) -> float:
        if len(trials) < 2 * ENOUGH:
            return math.nan
        if isinstance(predictor, RankingPredictor):  # its members leave trials out as it is
            return predictor.fit(trials).cross_validated
        measured = np.array([t.value(self.metric) for t in trials])
        return rank_correlations(left_out(copy.deepcopy(predictor), trials), measured)[1]

    def predict(self, candidates: Sequence[Candidate]) -> Prediction:
        """Of the chosen one."""
        return self.predictors[self.chosen].predict(candidates)
