"""Predictors by name, and the choice between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import pytest

from autocomp.errors import JobError
from autocomp.predictors.additive import AdditivePredictor
from autocomp.predictors.base import Prediction
from autocomp.predictors.boosted import BoostedPredictor
from autocomp.predictors.choose import KINDS, BestOf, make_predictor, members_of_best
from autocomp.predictors.residual import ResidualPredictor
from autocomp.space import Candidate, Decision, Interval, Ordered, SearchSpace
from autocomp.testing.predictors import toy_trials
from autocomp.trial import Trial


class Fixed:
    """Predicts ``sign`` times the truth, counts its fits, and says nothing of left-out trials."""

    def __init__(self, sign: float, truth: dict[str, float]) -> None:
        self.sign, self.truth, self.fits = sign, truth, [0]

    def fit(self, trials: Sequence[Trial]) -> Self:
        self.fits[0] += 1
        return self

    def predict(self, candidates: Sequence[Candidate]) -> Prediction:
        mean = self.sign * np.array([self.truth[c.fingerprint] for c in candidates])
        return Prediction(mean, np.ones(len(candidates)))


class Reporting(Fixed):
    """One that does say."""

    cross_validated = 0.5


def test_every_kind_can_be_made() -> None:
    table, space, _ = toy_trials(1)
    kinds = {k: type(make_predictor(k, "kl", table, space)) for k in KINDS}
    assert kinds["additive"] is AdditivePredictor and kinds["boosted"] is BoostedPredictor
    assert kinds["ridge"] is kinds["gp"] is ResidualPredictor and kinds["best"] is BestOf
    with pytest.raises(JobError, match="'additive' needs a table of 'kl'; use 'ridge'"):
        make_predictor("additive", "kl", None, space)


def test_best_chooses_from_what_suits_the_space() -> None:
    table, space, _ = toy_trials(1)
    with_table, without = (make_predictor("best", "kl", t, space) for t in (table, None))
    assert isinstance(with_table, BestOf) and isinstance(without, BestOf)
    assert set(with_table.predictors) == {"additive", "ridge", "gp", "trees", "boosted"}
    assert set(without.predictors) == {"ridge", "gp", "trees", "boosted"}
    assert with_table.chosen == without.chosen == "ridge"
    times = [Decision(f"t{i}", Interval(0.0, 1.0), block=i) for i in range(3)]
    steps = SearchSpace(tuple(times), (Ordered(tuple(d.name for d in times)),))
    assert set(members_of_best(None, steps)) == {"ridge", "gp", "trees", "boosted", "ranking"}


def test_the_best_order_is_taken_and_ties_go_to_the_first() -> None:
    _, _, trials = toy_trials(30)
    truth = {t.candidate.fingerprint: t.value("kl") for t in trials}
    worse, better, same = Fixed(-1.0, truth), Fixed(1.0, truth), Fixed(1.0, truth)
    best = BestOf("kl", {"worse": worse, "better": better, "same": same}).fit(trials)
    assert best.chosen == "better" and best.taus == {"worse": -1.0, "better": 1.0, "same": 1.0}
    assert best.predict([trials[0].candidate]).mean[0] == trials[0].value("kl")


def test_one_that_reports_is_fitted_once() -> None:
    _, _, trials = toy_trials(30)
    truth = {t.candidate.fingerprint: t.value("kl") for t in trials}
    silent, reporting = Fixed(1.0, truth), Reporting(1.0, truth)
    best = BestOf("kl", {"silent": silent, "reporting": reporting}).fit(trials)
    assert best.taus == {"silent": 1.0, "reporting": 0.5}
    assert reporting.fits == [1] and silent.fits == [1]  # what is left out is learned by copies


def test_too_few_trials_are_not_compared() -> None:
    _, _, trials = toy_trials(11)
    truth = {t.candidate.fingerprint: t.value("kl") for t in trials}
    best = BestOf("kl", {"first": Fixed(-1.0, truth), "other": Fixed(1.0, truth)}).fit(trials)
    assert best.chosen == "first" and all(math.isnan(t) for t in best.taus.values())


@pytest.mark.parametrize(("second", "chosen"), [(0.6, "first"), (0.9, "second")])
def test_a_small_lead_is_luck(second: float, chosen: str) -> None:
    """Thirty trials: a tau of 0.6 against 0.5 says nothing, one of 0.9 does."""
    _, _, trials = toy_trials(30)
    first, other = Reporting(1.0, {}), Reporting(1.0, {})
    other.cross_validated = second
    assert BestOf("kl", {"first": first, "second": other}).fit(trials).chosen == chosen
