"""Both forms of the regression agree, and its short cuts equal what they stand for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from autocomp.predictors.posterior import Data, Dual, Inputs, Primal, Scales, condition, smooth
from autocomp.predictors.relevance import LEAST, RELEVANCE, learn_relevance, with_relevance
from autocomp.predictors.tuning import tune

Floats = NDArray[np.float64]
SCALES = Scales(effect=0.2, noise=0.05)


def problem(n: int, p: int, seed: int = 0) -> tuple[Data, Inputs]:
    """Sparse effects like a table's, a line, noise that differs from trial to trial; and 30 more inputs."""
    rng = np.random.default_rng(seed)
    total = n + 30
    effects = np.where(rng.random((total, p)) < 0.3, rng.random((total, p)), 0.0)
    line = np.column_stack([np.ones(total), rng.standard_normal(total)])
    every = Inputs(line, effects, np.zeros((total, 0)), rng.random((total, 4)))
    target = line @ [0.5, -0.3] + effects @ (0.2 * rng.standard_normal(p))
    errors = rng.uniform(0.0, 0.02, total)
    target = target + np.sqrt(errors + 0.05**2) * rng.standard_normal(total)
    rows = np.arange(total)
    return Data(every, target, errors)[rows[:n]], every[rows[n:]]


@pytest.mark.parametrize(("n", "p"), [(40, 12), (12, 40), (200, 60)])
def test_primal_equals_dual(n: int, p: int) -> None:
    data, unseen = problem(n, p)
    primal, dual = Primal(data, SCALES), Dual(data, SCALES)
    for a, b in zip(primal.predict(unseen), dual.predict(unseen), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
    assert primal.weights(None) == pytest.approx(dual.weights(None), rel=1e-6, abs=1e-9)
    rngs = np.random.default_rng(3), np.random.default_rng(3)
    assert primal.weights(rngs[0]) == pytest.approx(dual.weights(rngs[1]), rel=1e-6, abs=1e-8)


def test_the_smaller_form_is_taken() -> None:
    assert isinstance(condition(problem(40, 12)[0], SCALES), Primal)
    assert isinstance(condition(problem(12, 40)[0], SCALES), Dual)
    assert isinstance(condition(problem(40, 12)[0], Scales(smooth=0.1)), Dual)


def test_the_mean_is_ridge_regression() -> None:
    """Against the normal equations, written out."""
    data, unseen = problem(25, 6)
    w, own = data.inputs.whitened(SCALES), unseen.whitened(SCALES)
    weight = 1.0 / (SCALES.noise**2 + data.errors)
    normal = np.linalg.solve(np.eye(8) + w.T @ (weight[:, None] * w), w.T @ (weight * data.target))
    assert Dual(data, SCALES).predict(unseen)[0] == pytest.approx(own @ normal, rel=1e-8)


@pytest.mark.parametrize("scales", [SCALES, Scales(0.2, 0.05, 0.4, 0.5)])
def test_samples_of_weights_scatter_as_the_posterior_says(scales: Scales) -> None:
    data, _ = problem(30, 5)
    posterior = Dual(data, scales)
    rng = np.random.default_rng(0)
    drawn = np.array([posterior.weights(rng) for _ in range(4000)])
    w = data.inputs.whitened(scales)
    kernel = np.diag(posterior.noise) + w @ w.T
    if scales.smooth:
        kernel += scales.smooth**2 * smooth(data.inputs.places, data.inputs.places, scales.length)
    want = np.eye(7) - w.T @ np.linalg.solve(kernel, w)
    assert drawn.mean(axis=0) == pytest.approx(posterior.weights(None), abs=0.06)
    assert np.cov(drawn.T) == pytest.approx(want, abs=0.06)


@pytest.mark.parametrize("kind", ["ridge", "gp"])
def test_left_out_predictions_equal_those_of_a_fit_without_them(kind: str) -> None:
    data, _ = problem(37, 10)
    tuned = tune(data, kind)  # type: ignore[arg-type]
    for fold in range(5):
        out = np.arange(37) % 5 == fold
        rest = Dual(data[np.flatnonzero(~out)], tuned.scales)
        mean, variance = rest.predict(data.inputs[np.flatnonzero(out)])
        assert tuned.mean[out] == pytest.approx(mean, rel=1e-6, abs=1e-9)
        noise = tuned.scales.noise**2 + data.errors[out]
        assert tuned.std[out] == pytest.approx(np.sqrt(variance + noise), rel=1e-6)


def test_scales_follow_the_data() -> None:
    data, _ = problem(200, 10)
    quiet = Data(data.inputs, data.inputs.effects @ np.full(10, 0.3), np.zeros(200))
    assert tune(quiet, "ridge").scales.noise < tune(data, "ridge").scales.noise


def test_relevances_say_which_decisions_matter() -> None:
    """Of five decisions, the first with two places, only the second one moves the target."""
    rng = np.random.default_rng(0)
    places = rng.uniform(-1.0, 1.0, (80, 6))
    inputs = Inputs(np.ones((80, 2)) * [1.0, 0.0], np.zeros((80, 1)), np.zeros((80, 0)), places)
    data = Data(inputs, np.sin(3.0 * places[:, 2]), np.full(80, 1e-4))
    owners = np.array([0, 0, 1, 2, 3, 4])
    plain = tune(data, "gp")
    learned = with_relevance(data, plain, owners)
    relevance = learned.scales.relevance
    assert relevance is not None and relevance[0] == relevance[1]
    assert relevance[2] > 3.0 * np.delete(relevance, 2).max()
    assert np.abs(learned.mean - data.target).mean() < 0.5 * np.abs(plain.mean - data.target).mean()
    few = data[np.arange(LEAST - 1)]
    assert with_relevance(few, tune(few, "gp"), owners).scales.relevance is None
    many = Data(replace(inputs, places=np.repeat(places, 20, axis=1)), data.target, data.errors)
    assert with_relevance(many, plain, np.arange(120)).scales.relevance is None


def test_relevances_that_predict_worse_are_not_taken() -> None:
    """The target is a function of the distance from the middle alone: all decisions matter alike."""
    rng = np.random.default_rng(1)
    places = rng.uniform(-1.0, 1.0, (30, 12)) / np.sqrt(12.0)
    inputs = Inputs(np.ones((30, 2)) * [1.0, 0.0], np.zeros((30, 1)), np.zeros((30, 0)), places)
    target = np.cos(6.0 * np.linalg.norm(places, axis=1)) + 0.02 * rng.standard_normal(30)
    data = Data(inputs, target, np.zeros(30))
    plain = tune(data, "gp")
    assert with_relevance(data, plain, np.arange(12)) is plain
    assert learn_relevance(data, plain.scales, np.arange(12))[0].relevance is not None


def test_deviations_stay_honest_where_nothing_matters() -> None:
    rng = np.random.default_rng(1)
    inputs = Inputs(np.ones((60, 2)) * [1.0, 0.0], np.zeros((60, 1)), np.zeros((60, 0)), rng.random((60, 20)))
    data = Data(inputs, rng.standard_normal(60), np.zeros(60))
    tuned = with_relevance(data, tune(data, "gp"), np.arange(20))
    assert 0.6 < np.mean(((data.target - tuned.mean) / tuned.std) ** 2) < 1.6


def test_left_out_trials_teach_no_relevances() -> None:
    """The prediction of a fifth does not change with the values of that fifth."""
    rng = np.random.default_rng(0)
    places = rng.uniform(-1.0, 1.0, (50, 3))
    inputs = Inputs(np.ones((50, 2)) * [1.0, 0.0], np.zeros((50, 1)), np.zeros((50, 0)), places)
    data = Data(inputs, np.sin(4.0 * places[:, 0]), np.full(50, 1e-4))
    plain, out = tune(data, "gp"), np.arange(50) % 5 == 1
    other = Data(inputs, np.where(out, 1.01 * data.target, data.target), data.errors)
    one, two = (with_relevance(d, plain, np.arange(3)) for d in (data, other))
    assert one.scales.relevance is not None and two.scales.relevance is not None
    assert one.mean[out] == pytest.approx(two.mean[out], abs=1e-12)
    assert one.mean[~out] != pytest.approx(two.mean[~out], abs=1e-12)


def test_relevances_are_at_a_maximum_of_the_likelihood() -> None:
    """No step along any relevance, the GP or the noise gains anything."""
    data, _ = problem(40, 3)
    rest = data.inputs.line @ data.inputs.line.T
    start = Scales(effect=0.0, smooth=0.3, length=0.5)
    found, height = learn_relevance(data, start, np.arange(4))
    assert found.relevance is not None
    at = np.log([*found.relevance, found.smooth, found.noise])
    begin = np.log([1.0, 1.0, 1.0, 1.0, 0.3, start.noise])
    deviation = np.array([RELEVANCE] * 4 + [1.0] * 2)

    def value(x: Floats) -> float:
        kernel = rest + np.diag(np.exp(2 * x[-1]) + data.errors)
        kernel += np.exp(2 * x[-2]) * smooth(*(np.exp(x[:4]) * data.inputs.places,) * 2, start.length)
        likelihood = -0.5 * data.target @ np.linalg.solve(kernel, data.target)
        return float(
            likelihood - 0.5 * np.linalg.slogdet(kernel)[1] - 0.5 * np.sum(((x - begin) / deviation) ** 2)
        )

    assert value(at) == pytest.approx(height, rel=1e-6)
    for i in range(len(at)):
        step = 0.05 * (np.arange(len(at)) == i)
        assert max(value(at + step), value(at - step)) < height + 1e-3
