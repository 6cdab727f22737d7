"""The speed of a device over time, from timings of one reference with noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autocomp.measure.drift import Curve, fit

CLAIMED = 0.003


def curve(moves: np.ndarray, noise: float, seed: int) -> Curve:
    rng = np.random.default_rng(seed)
    logs = 4.0 + moves + rng.normal(0, math.hypot(noise, CLAIMED), len(moves))
    return fit(60.0 * np.arange(len(moves)), logs, np.full(len(moves), CLAIMED))


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05, 0.15])
@pytest.mark.parametrize("n", [5, 8, 20])
def test_noise_alone_is_seldom_called_drift(noise: float, n: int) -> None:
    found = [curve(np.zeros(n), noise, seed) for seed in range(60)]
    assert sum(c.drifts for c in found) <= 9, "more than 15 % false alarms"
    assert all(c.change == 0 or c.drifts for c in found)
    if n == 20:
        assert 0.7 * noise <= np.median([c.noise for c in found]) <= 1.3 * noise + 0.002


@pytest.mark.parametrize("n", [8, 20])
@pytest.mark.parametrize("noise", [0.002, 0.01])
def test_a_slow_down_by_a_fifth_is_found_and_measured(noise: float, n: int) -> None:
    moves = math.log(1.2) * (np.arange(n) >= n // 2)
    found = [curve(moves, noise, seed) for seed in range(30)]
    assert all(c.drifts for c in found)
    error = np.array([c.level - c.level[0] - moves for c in found])
    assert np.abs(error).max() < 6 * math.hypot(noise, CLAIMED)
    assert all(abs(c.change - 0.2) < 7 * math.hypot(noise, CLAIMED) for c in found)


def test_a_slow_trend_is_followed_better_than_by_single_references() -> None:
    n, noise = 40, 0.02
    moves = np.linspace(0, math.log(1.2), n)
    found = [curve(moves, noise, seed) for seed in range(30)]
    assert np.mean([c.drifts for c in found]) > 0.9
    error = np.array([c.level - 4.0 - moves for c in found if c.drifts])
    assert np.sqrt((error**2).mean()) < 0.7 * noise
    claimed = np.sqrt(np.array([c.variance for c in found if c.drifts]).mean())
    assert 0.6 < np.sqrt((error**2).mean()) / claimed < 1.6


def test_a_single_slow_moment_is_no_drift() -> None:
    moves = np.zeros(10)
    moves[4] = math.log(3.0)
    found = [curve(moves, 0.01, seed) for seed in range(20)]
    assert sum(c.drifts for c in found) <= 2
    assert all(c.dropped == 1 and len(c.times) == 9 and c.noise < 0.03 for c in found)


def test_few_references_say_nothing() -> None:
    found = fit([0.0, 60.0, 120.0], [1.0, 1.5, 1.0], [0.01, 0.01, 0.01])
    assert not found.drifts and found.noise == 0 and found.change == 0
    assert found.at(60.0)[0] == pytest.approx(3.5 / 3)


def test_between_two_references_a_jump_may_have_been_anywhere() -> None:
    found = curve(0.2 * (np.arange(12) >= 6), 0.001, 0)
    before, variance_before = found.at(5 * 60.0)
    after, _ = found.at(6 * 60.0)
    middle, variance = found.at(5.5 * 60.0)
    assert middle == pytest.approx((before + after) / 2)
    assert math.sqrt(variance) == pytest.approx(0.1, rel=0.1) and variance_before < 0.01**2
    assert found.at(-100.0) == found.at(0.0) and found.at(1e6) == found.at(11 * 60.0)


def test_order_of_references_does_not_matter_and_unknown_errors_count_as_none() -> None:
    times, logs = [0.0, 60.0, 120.0, 180.0, 240.0], [1.0, 1.01, 0.99, 1.0, 1.02]
    forward = fit(times, logs, [math.nan] * 5)
    backward = fit(times[::-1], logs[::-1], [0.0] * 5)
    assert np.array_equal(forward.level, backward.level) and forward.noise == backward.noise
    same = fit([5.0] * 5, [1.0] * 5, [0.0] * 5)
    assert not same.drifts and same.at(5.0)[0] == 1.0


def test_what_is_no_list_of_references_is_refused() -> None:
    with pytest.raises(ValueError, match="as many"):
        fit([], [], [])
    with pytest.raises(ValueError, match="as many"):
        fit([1.0], [1.0, 2.0], [0.1])
