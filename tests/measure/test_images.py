"""Frechet distance, its noise, and drift of images: against other formulas and against sampling itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import correlate

from autocomp.measure.images import (
    MAX_PSNR,
    Gaussian,
    fd_estimate,
    frechet,
    gaussian,
    influence,
    mean_estimate,
    mse,
    psnr,
    ratio_estimate,
    ssim,
)

DIM = 5


def _features(n: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(7).standard_normal((DIM, DIM))
    spread = np.linspace(1.0, scale, DIM)
    return rng.standard_normal((n, DIM)) * spread @ mix + shift


def test_distance_is_that_of_the_formula_with_a_matrix_root() -> None:
    a, b = gaussian(_features(300, 0)), gaussian(_features(200, 1, 0.3, 2.0))
    root = sqrtm(a.cov @ b.cov).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov + b.cov - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-10)


def test_distance_of_independent_features_is_that_of_means_and_deviations() -> None:
    a = Gaussian(np.array([1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 0.0]), 10)
    b = Gaussian(np.array([1.0, 0.0, 3.0]), np.diag([9.0, 4.0, 1.0]), 10)
    assert frechet(a, b) == pytest.approx(4.0 + (1 - 3) ** 2 + 0.0 + 1.0)


def test_equal_statistics_are_at_distance_zero_exactly() -> None:
    rows = _features(50, 0)
    assert frechet(gaussian(rows), gaussian(rows.copy())) == 0.0


def test_features_that_never_vary_are_no_trouble() -> None:
    here, there = _features(40, 0), _features(60, 1)
    dead = [np.concatenate([x, np.zeros((len(x), 3))], axis=1) for x in (here, there)]
    expected = fd_estimate(here, gaussian(there))
    found = fd_estimate(dead[0], gaussian(dead[1]))
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    assert found.stderr == pytest.approx(expected.stderr, rel=1e-6)


def test_fewer_images_than_features_give_a_number() -> None:
    found = fd_estimate(_features(3, 0), gaussian(_features(60, 1)))
    assert found.value > 0 and math.isfinite(found.stderr)


def test_influence_is_the_slope_by_a_rows_weight() -> None:
    rows, reference = _features(40, 3, 0.2, 1.7), gaussian(_features(200, 1))

    def distance(weights: np.ndarray) -> float:
        share = weights / weights.sum()
        mean = share @ rows
        cov = (rows - mean).T @ (share[:, None] * (rows - mean)) * len(rows) / (len(rows) - 1)
        return frechet(Gaussian(mean, cov, len(rows)), reference)

    found = influence(rows, reference)
    assert found.mean() == pytest.approx(0.0, abs=1e-9)
    for i in (0, 7, 31):
        step = np.zeros(len(rows))
        step[i] = 1e-4
        slope = (distance(1.0 + step) - distance(1.0 - step)) / 2e-4 * len(rows)
        # The covariance is divided by n - 1 here and by n in the derivative: a factor of 40 / 39 on its part.
        assert found[i] == pytest.approx(slope, abs=0.04 * np.abs(found).max())


def test_standard_error_is_the_spread_over_fresh_samples_and_over_a_bootstrap() -> None:
    reference = gaussian(_features(4000, 99))
    fresh = [_features(400, seed, 0.3, 1.5) for seed in range(300)]
    spread = np.std([frechet(gaussian(x), reference) for x in fresh], ddof=1)
    claimed = np.mean([fd_estimate(x, reference).stderr for x in fresh])
    assert claimed == pytest.approx(spread, rel=0.15)  # the spread itself is known to 4 %

    rng, rows = np.random.default_rng(0), fresh[0]
    drawn = [frechet(gaussian(rows[rng.integers(400, size=400)]), reference) for _ in range(300)]
    assert fd_estimate(rows, reference).stderr == pytest.approx(np.std(drawn, ddof=1), rel=0.15)


def test_small_samples_are_further_away() -> None:
    reference = gaussian(_features(20_000, 99))
    few, many = (
        np.mean([frechet(gaussian(_features(n, seed)), reference) for seed in range(20)]) for n in (50, 500)
    )
    assert few == pytest.approx(10 * many, rel=0.3), "the bias falls like 1/n"


@pytest.mark.parametrize("rows", [np.zeros((1, 3)), np.zeros(5), np.array([[1.0, np.nan], [0.0, 1.0]])])
def test_statistics_need_two_finite_rows(rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite features"):
        gaussian(rows)


def test_mean_and_its_error() -> None:
    found = mean_estimate(np.array([1.0, 2.0, 3.0, 6.0]))
    assert (found.value, found.n) == (3.0, 4)
    assert found.stderr == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)
    assert mean_estimate(np.array([4.0])).stderr == 0.0


def test_ratio_and_its_error() -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.gamma(4, 1, 200), rng.gamma(9, 1, 200)) for _ in range(400)]
    ratios = [ratio_estimate(a, b) for a, b in pairs]
    assert ratios[0].value == pytest.approx(pairs[0][0].sum() / pairs[0][1].sum())
    spread = np.std([r.value for r in ratios], ddof=1)
    assert np.mean([r.stderr for r in ratios]) == pytest.approx(spread, rel=0.1)
    assert ratio_estimate(np.zeros(3), np.zeros(3)).value == 0.0
    assert math.isnan(ratio_estimate(np.ones(3), np.zeros(3)).value)


def test_psnr_of_known_errors() -> None:
    black = torch.full((3, 1, 4, 4), -1.0)
    other = black.clone()
    other[1] += 0.2
    other[2, 0, 0, 0] = 1.0
    assert mse(other, black).tolist() == pytest.approx([0.0, 0.04, 4 / 16])
    assert psnr(other, black).tolist() == pytest.approx([MAX_PSNR, 20.0, 10 * math.log10(16)])


def test_ssim_is_one_for_the_same_image_and_falls_with_noise() -> None:
    images = torch.rand(4, 3, 20, 17) * 2 - 1
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 4)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    scores = [float(ssim(images + s * noise, images).mean()) for s in (0.05, 0.2, 0.8)]
    assert 1 > scores[0] > scores[1] > scores[2]


def test_ssim_of_flat_images_compares_their_brightness() -> None:
    a, b = torch.full((1, 1, 12, 12), 0.5), torch.full((1, 1, 12, 12), -0.25)
    c = (0.01 * 2) ** 2
    assert float(ssim(a, b)) == pytest.approx((2 * 0.5 * -0.25 + c) / (0.25 + 0.0625 + c))


@pytest.mark.parametrize(("height", "width", "side"), [(16, 13, 11), (8, 9, 7), (28, 28, 11)])
def test_ssim_is_that_of_filtered_moments(height: int, width: int, side: int) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.uniform(-1, 1, (2, height, width))
    y = 0.7 * x + 0.3 * y
    at = np.arange(side) - side // 2
    window = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(image: np.ndarray) -> np.ndarray:
        edge = side // 2
        return correlate(image, window)[edge : height - edge, edge : width - edge]

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x**2) - mx**2, mean(y**2) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.02**2, 0.06**2
    expected = ((2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    tensors = [torch.from_numpy(v)[None, None] for v in (x, y)]
    assert float(ssim(*tensors)) == pytest.approx(expected, rel=1e-6)
