"""Predictors by name, and one that takes whichever ranks unseen trials best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from autocomp.errors import JobError
from autocomp.predictors.additive import AdditivePredictor, usable_trials
from autocomp.predictors.audit import ENOUGH, left_out, rank_correlations
from autocomp.predictors.base import Prediction, Predictor
from autocomp.predictors.boosted import BoostedPredictor
from autocomp.predictors.ranking import RankingPredictor
from autocomp.predictors.residual import ResidualPredictor
from autocomp.predictors.sequence import SequenceEncoder, Traits
from autocomp.predictors.trees import TreesPredictor
from autocomp.space import AdditiveTable, Candidate, SearchSpace
from autocomp.trial import Trial

KINDS = ("additive", "ridge", "gp", "trees", "boosted", "ranking", "best")


def make_predictor(
    kind: str,
    metric: str,
    table: AdditiveTable | None,
    space: SearchSpace,
    traits: Traits | None = None,
) -> Predictor:
    """A predictor of ``metric`` for candidates of ``space``, not fitted yet.

    Args:
        kind: ``additive`` (a table, scaled and bent), ``ridge`` or ``gp`` (values around a table), ``trees``
            or ``boosted`` (features of the whole), ``ranking`` (order of sequences), ``best`` (of these, by
            the order of left-out trials at every fit).
        table: additive prior; ``None`` where there is none, which ``additive`` can't do without.
        traits: further features of a candidate, which ``trees``, ``boosted`` and ``ranking`` use.

    Raises:
        JobError: there is no such kind, or it lacks its table.
    """
    match kind:
        case "additive":
            if table is None:
                raise JobError(f"predictor 'additive' needs a table of {metric!r}; use 'ridge' without one")
            return AdditivePredictor(table)
        case "ridge" | "gp":
            return ResidualPredictor(metric, table, space, kind)
        case "trees":
            return TreesPredictor(metric, table, space, traits=traits)
        case "boosted":
            return BoostedPredictor(metric, table, space, traits=traits)
        case "ranking":
            return RankingPredictor(metric, table, space, traits=traits)
        case "best":
            names = members_of_best(table, space)
            return BestOf(metric, {n: make_predictor(n, metric, table, space, traits) for n in names})
    raise JobError(f"unknown predictor {kind!r}; known: {', '.join(KINDS)}")


def members_of_best(table: AdditiveTable | None, space: SearchSpace) -> list[str]:
    """Kinds that ``best`` chooses from, the one that answers first in front.

    ``ranking`` takes seconds to train where others take tenths, so it is one of them only for sequences.
    """
    names = ["ridge", *(["additive"] if table is not None else []), "gp", "trees", "boosted"]
    return [*names, "ranking"] if SequenceEncoder(space).timed else names


class BestOf:
    """The first predictor whose order of left-out trials is as good as the best one's, by Kendall's tau.

    As good is within one standard error: of few trials any of several may come out ahead by luck (the rule of
    Breiman et al., Classification and Regression Trees, 1984, for choosing the simplest tree).

    A predictor that has an attribute ``cross_validated`` (the tau of trials that its parts did not see) is
    fitted once; of others every fifth trial is left out in turn.

    Args:
        metric: what to predict.
        predictors: by name, the simplest first; the first one answers until there are enough trials.

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
        first = next(iter(self.predictors))
        if len(used) < 2 * ENOUGH:
            self.taus, self.chosen = dict.fromkeys(self.predictors, math.nan), first
            self.predictors[first].fit(used)
            return self
        self.taus = {name: self._tau(p.fit(used), used) for name, p in self.predictors.items()}
        known = {name: tau for name, tau in self.taus.items() if not math.isnan(tau)}
        enough = max(known.values(), default=0.0) - _standard_error(len(used))
        self.chosen = next((name for name, tau in known.items() if tau >= enough), first)
        return self

    def _tau(self, predictor: Predictor, trials: Sequence[Trial]) -> float:
        found = getattr(predictor, "cross_validated", None)
        if found is not None:
            return float(found)
        measured = np.array([t.value(self.metric) for t in trials])
        return rank_correlations(left_out(predictor, trials), measured)[1]

    def predict(self, candidates: Sequence[Candidate]) -> Prediction:
        """Of the chosen one."""
        return self.predictors[self.chosen].predict(candidates)


def _standard_error(n: int) -> float:
    """Of tau between ``n`` unrelated pairs (Kendall, Biometrika 30, 1938)."""
    return math.sqrt(2.0 * (2 * n + 5) / (9.0 * n * (n - 1)))
