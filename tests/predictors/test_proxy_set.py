"""Subsets of samples: what they are scored with, how they are found, and whether they help unseen models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autocomp.errors import SpaceError
from autocomp.measure.images import frechet, gaussian
from autocomp.predictors.proxy_scores import FrechetScore, LogMeanScore, MeanScore
from autocomp.predictors.proxy_search import Ranking, frequency, match
from autocomp.predictors.proxy_set import Method, ProxySet, choose_and_check, choose_samples

METHODS: tuple[Method, ...] = ("match", "frequency")


def mean_score(seed: int = 0, models: int = 40, samples: int = 1000) -> MeanScore:
    """Scores whose differences between models lie in a few directions, as those of relatives do."""
    rng = np.random.default_rng(seed)
    common, traits = 2.0 * rng.normal(size=samples), rng.normal(size=(5, samples))
    liking = 0.5 * rng.normal(size=(models, 5))
    own = 0.2 * rng.normal(size=(models, samples)) + 0.08 * rng.normal(size=(models, 1))
    return MeanScore(common + liking @ traits + own)


def frechet_score(seed: int = 0, models: int = 24, samples: int = 1000, d: int = 8) -> FrechetScore:
    """Features of the same samples, turned by each model along three directions that all share."""
    rng = np.random.default_rng(seed)
    clean = rng.normal(size=(samples, d)) * np.linspace(1.5, 0.5, d)
    ways = 0.15 * rng.normal(size=(3, d, d))
    turned = [
        clean @ (np.eye(d) + np.tensordot(0.5 * rng.normal(size=3), ways, 1))
        + 0.1 * rng.normal(size=clean.shape)
        for _ in range(models)
    ]
    return FrechetScore(np.stack(turned).astype(np.float16), gaussian(1.1 * clean))


def divergences(seed: int = 0, models: int = 40, samples: int = 300) -> LogMeanScore:
    """KL of sequences: models over two decades, damaged in five ways that sequences mind unequally."""
    rng = np.random.default_rng(seed)
    minds = rng.gamma(1.5, size=(5, samples))
    damage = np.exp(rng.uniform(-3.0, 2.0, size=(models, 1))) * rng.dirichlet(np.full(5, 0.7), size=models)
    return LogMeanScore(damage @ minds * rng.gamma(50.0, 1 / 50, size=(models, samples)))


def test_a_mean_over_sets() -> None:
    score = mean_score(samples=20)
    sets = np.array([[0, 3, 5], [7, 1, 19]])
    assert score(sets) == pytest.approx(np.stack([score.matrix[:, s].mean(axis=1) for s in sets]))
    assert score.of(np.array([2, 4])).full == pytest.approx(score.full[[2, 4]])


def test_the_logarithm_of_a_mean_over_sets() -> None:
    matrix = np.random.default_rng(0).gamma(1.0, size=(4, 20))
    score, sets = LogMeanScore(matrix), np.array([[0, 3, 5], [7, 1, 19]])
    assert score(sets) == pytest.approx(np.stack([np.log(matrix[:, s].mean(axis=1)) for s in sets]))
    assert score(np.arange(20)[None])[0] == pytest.approx(score.full)
    assert score.parts.mean(axis=1) == pytest.approx(score.full)
    assert score.of(np.array([2])).full == pytest.approx(score.full[[2]])
    # First order: a set with slightly more of one sample moves as its part says.
    weights = np.full(20, 1 / 20) + np.eye(20)[7] * 1e-4
    moved = np.log(matrix @ weights / weights.sum()) - score.full
    assert moved == pytest.approx(1e-4 * (score.parts[:, 7] - score.full), rel=1e-3)


def test_logarithms_weigh_small_values_as_much_as_large_ones() -> None:
    """Sets that match plain means look at the most damaged models only."""
    plain, logs = [], []
    for seed in range(4):
        score = divergences(seed)
        plain.append(choose_samples(MeanScore(score.matrix), 15, seed=seed, draws=5).tau_test)
        logs.append(choose_samples(score, 15, seed=seed, draws=5).tau_test)
    assert np.mean(logs) > np.mean(plain) + 0.005
    assert min(logs) > 0.95


def test_a_frechet_distance_over_sets() -> None:
    score = frechet_score(models=3, samples=200)
    sets = np.random.default_rng(0).permutation(200)[:120].reshape(2, 60)
    expected = [[frechet(gaussian(x[s]), score.reference) for x in score.features] for s in sets]
    assert score(sets) == pytest.approx(np.array(expected), rel=1e-6)
    assert score(np.arange(200)[None])[0] == pytest.approx(score.full, rel=1e-6)
    known = score.parts
    assert score.of(np.array([2])).parts == pytest.approx(known[[2]])


def test_parts_are_the_first_order_of_a_frechet_distance() -> None:
    """Leaving a few samples out moves the distance as their parts say."""
    score = frechet_score(models=4, samples=2000)
    kept = np.argsort(score.parts[0])[:-20]  # without those that make the first model look worst
    exact = score(kept[None])[0] - score.full
    guessed = score.parts[:, kept].mean(axis=1) - score.full
    assert exact[0] < 0
    assert guessed == pytest.approx(exact, rel=0.2, abs=2e-3)


def test_pairs_within_the_noise_are_ties() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=500)
    matrix = np.stack([base, base + 0.001 * rng.normal(size=500), base + 1.0, base + 2.0])
    ranking = Ranking.of(MeanScore(matrix), margin=3.0)
    assert ranking.pairs == 6 and len(ranking.sign) == 5  # the first two are the same model
    assert ranking.tau(np.array([0.0, 9.0, 10.0, 11.0])) == 1.0
    assert ranking.tau(np.array([11.0, 10.0, 9.0, 0.0])) == -1.0
    assert ranking.tau(np.array([0.0, 9.0, 1.0, 11.0])) == pytest.approx(0.6)
    same = Ranking.of(MeanScore(np.ones((3, 10))), margin=1.0)
    assert math.isnan(float(same.tau(np.arange(3.0))))


@pytest.mark.parametrize("method", METHODS)
def test_sets_are_of_the_size_asked_for(method: Method) -> None:
    score = mean_score(models=10, samples=60)
    search = match if method == "match" else frequency
    for size in (2, 30, 60):
        found = search(score, size, np.random.default_rng(1))
        assert len(set(found.tolist())) == size and (np.diff(found) > 0).all() and found.max() < 60
        assert np.array_equal(found, search(score, size, np.random.default_rng(1)))


def test_matched_sets_rank_unseen_models() -> None:
    found = [choose_samples(mean_score(s), 100, seed=s, draws=40) for s in range(3)]
    for one in found:
        assert one.tau_train > 0.95
        assert one.tau_test > one.random_mean + one.random_sd
    gain = [one.tau_test - one.random_mean for one in found]
    assert np.mean(gain) > 0.15


def test_matched_sets_rank_unseen_models_by_their_frechet_distance() -> None:
    found = [choose_samples(frechet_score(s), 100, seed=s, draws=20) for s in range(3)]
    assert np.mean([one.tau_test - one.random_mean for one in found]) > 0.03
    assert min(one.tau_train for one in found) > 0.9


def test_frequency_search_climbs() -> None:
    score = mean_score()
    found = choose_samples(score, 50, method="frequency", draws=40)
    assert found.tau_train > found.random_mean + 2 * found.random_sd
    ranking, rng = Ranking.of(score, 1.0), np.random.default_rng(0)
    few, many = (frequency(score, 50, rng, draws=n, rounds=r) for n, r in ((50, 1), (1000, 8)))
    assert ranking.tau(score(many[None])) > ranking.tau(score(few[None]))


def test_the_report_is_of_models_that_the_search_did_not_see() -> None:
    """What the left-out models look like changes neither the set nor ``tau_train``."""
    score = mean_score(models=12, samples=200)
    test = np.array([1, 4, 6, 9])
    changed = score.matrix.copy()
    changed[test] = np.random.default_rng(9).normal(size=(4, 200))
    one = choose_samples(score, 20, test=test, seed=3)
    other = choose_samples(MeanScore(changed), 20, test=test, seed=3)
    assert one.indices == other.indices and one.tau_train == other.tau_train
    assert one.tau_test != other.tau_test
    final = choose_samples(score, 20, test=test, seed=3, final=True)
    assert final.final and final.indices != one.indices and final.tau_test == one.tau_test


def test_taus_are_means_over_halves_and_the_set_sees_all_models() -> None:
    score = mean_score(models=16, samples=200)
    found = choose_and_check(score, 20, halves=3, seed=5, draws=10)
    single = [choose_samples(score, 20, seed=5 + i, draws=10) for i in range(3)]
    for name in ("tau_train", "tau_test", "random_mean", "random_plain", "plain_test"):
        assert getattr(found, name) == pytest.approx(np.mean([getattr(s, name) for s in single]))
    assert found.final and found.halves == 3 and len(found.indices) == 20
    assert Ranking.of(score, 1.0).tau(score(np.array([found.indices])))[0] > found.tau_test
    with pytest.raises(SpaceError, match="got 0"):
        choose_and_check(score, 20, halves=0)


def test_a_set_says_how_good_it_is() -> None:
    found = choose_and_check(mean_score(models=12, samples=100), 10, halves=2, draws=5)
    first, chosen, random = found.text().split("\n")
    assert first.startswith("10 of 100: Kendall's tau")
    assert f"{found.tau_test:.3f}" in chosen and f"{found.plain_test:.3f}" in chosen
    assert f"{found.random_mean:.3f} ± {found.random_sd:.3f}" in random


def test_a_set_outlives_its_process(tmp_path: Path) -> None:
    found = replace(choose_samples(mean_score(models=8, samples=50), 10, draws=5), data={"seed": 3})
    assert math.isnan(found.random_large)  # there are no 100 samples
    path = tmp_path / "subset.json"
    found.save(path)
    again = ProxySet.load(path)
    assert math.isnan(again.random_large)
    assert str(again) == str(found)  # NaN is not equal to itself
    path.write_text('{"samples": 3}')
    with pytest.raises(SpaceError, match="no proxy set"):
        ProxySet.load(path)


def test_what_can_not_be_searched_is_refused() -> None:
    score = mean_score(models=8, samples=50)
    with pytest.raises(SpaceError, match="2 to 50 samples; got 51"):
        choose_samples(score, 51)
    with pytest.raises(SpaceError, match="both need three"):
        choose_samples(mean_score(models=5, samples=50), 10)
    with pytest.raises(SpaceError, match="finite array of 2 axes"):
        MeanScore(np.full((2, 3), math.nan))
    with pytest.raises(SpaceError, match="leave the uncompressed model out"):
        LogMeanScore(np.array([[1.0, 2.0], [0.0, 0.0]]))
    with pytest.raises(SpaceError, match="a value of -1"):
        LogMeanScore(np.array([[3.0, -1.0]]))
    with pytest.raises(SpaceError, match="finite array of 3 axes"):
        FrechetScore(np.zeros((2, 3)), gaussian(np.eye(3)))
