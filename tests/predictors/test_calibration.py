"""What counts as calibrated, and that the factor leads there."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from autocomp.predictors.base import Prediction
from autocomp.predictors.calibration import calibration, std_factor
from autocomp.predictors.residual import ResidualPredictor
from autocomp.space import Candidate, Choice, Decision, SearchSpace
from autocomp.testing.predictors import toy_trials
from autocomp.trial import Estimate, Fidelity, Measurement, Trial


def test_a_calibrated_normal() -> None:
    mean = norm.ppf((np.arange(2000) + 0.5) / 2000)
    found = calibration(mean, np.zeros(2000), np.ones(2000))
    assert found.n == 2000
    assert found.within68 == pytest.approx(0.68, abs=0.002)
    assert found.within95 == pytest.approx(0.95, abs=0.002)
    assert found.mean_square == pytest.approx(1.0, abs=0.01)
    wide = calibration(mean, np.zeros(2000), np.full(2000, 4.0))
    assert wide.within68 > 0.99 and wide.mean_square == pytest.approx(1 / 16, abs=0.01)


def test_nothing_to_compare() -> None:
    nan = np.array([math.nan])
    assert calibration(nan, nan, nan).n == 0 and math.isnan(calibration(nan, nan, nan).within68)
    assert calibration(np.array([1.0, math.nan]), np.zeros(2), np.ones(2)).n == 1
    assert std_factor(np.zeros(0)) == 1.0


def test_the_factor_is_the_size_of_the_errors_drawn_to_one() -> None:
    errors = np.tile([3.0, -3.0], 500)
    assert std_factor(errors) == pytest.approx(3.0, rel=0.01)
    assert std_factor(errors / 30.0) == pytest.approx(0.14, rel=0.1)
    assert 1.0 < std_factor(errors[:2]) < 1.6  # two errors say little
    outlier = np.append(norm.ppf((np.arange(99) + 0.5) / 99), 1e6)
    assert std_factor(outlier) < 1.1


def test_a_model_that_misses_something_says_so() -> None:
    """Effects can't say that a product of all choices matters; a factor above one makes up for a prior that
    is too sure, one below for a floor of noise that is too high."""
    rng = np.random.default_rng(0)
    space = SearchSpace(tuple(Decision(f"d{i}", Choice((0, 1, 2))) for i in range(6)))

    def trials(scale: float) -> list[Trial]:
        found = []
        for i in range(240):
            c = Candidate.of({d.name: int(rng.integers(3)) for d in space})
            parity = sum(int(v or 0) for v in c.values.values()) % 2
            value = 5.0 + sum(int(v or 0) for v in c.values.values()) + scale * parity
            found.append(Trial(i, c, Fidelity(), "random", Measurement({"m": Estimate(value)}, "toy")))
        return found

    exact = ResidualPredictor("m", None, space).fit(trials(0.0))
    assert exact.factor < 0.7  # the least noise of the grid is more than there is
    for scale in (0.0, 3.0):
        known = trials(scale)
        model = ResidualPredictor("m", None, space).fit(known[:160])
        found = model.predict([t.candidate for t in known[160:]])
        fit = calibration(np.array([t.value("m") for t in known[160:]]), found.mean, found.std)
        assert fit.mean_square < 1.7
        assert fit.within95 > 0.85


def test_noise_is_told_apart_from_doubt() -> None:
    """A prediction is of a measurement; of that its noise is known, and the rest is what is not."""
    table, space, trials = toy_trials(260)
    rng = np.random.default_rng(0)
    noisy = []
    for t in trials:
        value = t.value("kl") * float(np.exp(0.1 * rng.standard_normal()))
        noisy.append(replace(t, measurement=Measurement({"kl": Estimate(value, 0.1 * value)}, "toy")))
    found = ResidualPredictor("kl", table, space).fit(noisy[:160]).predict([t.candidate for t in noisy[160:]])
    assert found.noise is not None
    assert found.noise / found.mean == pytest.approx(np.full(100, 0.1), rel=0.15)
    fit = calibration(np.array([t.value("kl") for t in noisy[160:]]), found.mean, found.std)
    assert 0.55 < fit.within68 < 0.85 and 0.6 < fit.mean_square < 1.6
    truth = np.array([t.value("kl") for t in trials[160:]])
    assert np.mean(found.doubt) < 0.7 * np.mean(found.std)
    assert calibration(truth, found.mean, found.doubt).mean_square < 2.5
    assert Prediction(np.ones(2), np.ones(2)).doubt.tolist() == [1.0, 1.0]
