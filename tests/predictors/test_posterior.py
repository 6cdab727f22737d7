"""Both forms of the regression agree, and its short cuts equal what they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from autocomp.predictors.posterior import Data, Dual, Inputs, Primal, Scales, condition, smooth, tune

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
