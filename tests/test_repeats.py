"""Near-ties in latency: which pairs matter, and what repeats say together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from autocomp.noise import without_errors
from autocomp.objective import Objective
from autocomp.pareto import ParetoFront
from autocomp.repeats import between_variance, compare, contested, pool, without_spikes
from autocomp.space import Candidate
from autocomp.trial import Estimate, Fidelity, Measurement, Trial

OBJECTIVES = (Objective("kl"), Objective("ms"))


def point(number: int, kl: float, ms: float, error: float = 0.01, **more: float) -> Trial:
    metrics = {"kl": Estimate(kl, 1e-3), "ms": Estimate(ms, error * ms)}
    metrics |= {name: Estimate(value, error * value) for name, value in more.items()}
    return Trial(number, Candidate.of({"a": number}), Fidelity("report"), "x", Measurement(metrics, "toy"))


def numbers(
    trials: list[Trial], objectives: Any = OBJECTIVES, timing: Any = ("ms",)
) -> list[tuple[int, int]]:
    return [(p.first, p.second) for p in contested(trials, objectives, timing)]


def test_a_pair_matters_when_the_better_one_may_be_the_faster_one() -> None:
    better, near, far = point(0, 1.0, 10.0), point(1, 2.0, 9.9), point(2, 3.0, 8.0)
    assert numbers([better, near, far]) == [(1, 0)]
    assert ParetoFront.of([better, near], OBJECTIVES).points[1].label == "front"
    assert numbers([better, point(1, 2.0, 9.0)]) == [], "faster beyond the noise"
    assert numbers([better, point(1, 2.0, 11.0)]) == [], "slower beyond the noise: dominated"
    assert numbers([better, point(1, 2.0, 10.1)]) == [(1, 0)]


def test_what_is_dominated_anyway_takes_no_part() -> None:
    winner, one, other = point(0, 1.0, 5.0), point(1, 2.0, 10.0), point(2, 3.0, 10.1)
    assert numbers([winner, one, other]) == []


def test_equal_quality_gives_one_pair_and_certain_values_none() -> None:
    assert numbers([point(0, 1.0, 10.0), point(1, 1.0, 10.1)]) == [(0, 1)]
    assert numbers([point(0, 1.0, 10.0, 0.0), point(1, 1.0, 10.0, 0.0)]) == []
    assert numbers([point(0, 1.0, 10.0), point(1, 2.0, 10.1)], timing=()) == []
    assert numbers([point(0, 1.0, 10.0)]) == []


def test_a_pair_that_one_of_two_timed_metrics_decides_is_left_alone() -> None:
    objectives = (*OBJECTIVES, Objective("prefill"))
    one = point(0, 1.0, 10.0, prefill=100.0)
    faster = point(1, 2.0, 10.1, prefill=80.0)
    assert numbers([one, faster], objectives, ("ms", "prefill")) == []
    slower = point(1, 2.0, 10.1, prefill=130.0)
    (pair,) = contested([one, slower], objectives, ("ms", "prefill"))
    assert pair.metric == "ms"


def test_objectives_to_maximize_turn_the_order() -> None:
    objectives = (Objective("kl"), Objective("speed", minimize=False))
    one, near = point(0, 1.0, 1.0, speed=50.0), point(1, 2.0, 1.0, speed=50.2)
    assert numbers([one, near], objectives, ("speed",)) == [(1, 0)]
    assert numbers([one, point(1, 2.0, 1.0, speed=60.0)], objectives, ("speed",)) == []


def test_verdicts_in_words() -> None:
    undecided = compare(point(3, 1.0, 10.0), point(4, 2.0, 10.2), "ms")
    assert undecided.open and undecided.verdict == "tie" and "#3 and #4 tie in ms" in str(undecided)
    decided = compare(point(3, 1.0, 11.0), point(4, 2.0, 10.0), "ms")
    assert decided.verdict == "decided" and str(decided).startswith("#4 is faster than #3")
    equal = compare(point(3, 1.0, 10.0, 1e-3), point(4, 2.0, 10.01, 1e-3), "ms")
    assert not equal.open and equal.verdict == "tie"


def test_pooling_by_hand() -> None:
    # weights 100 and 25: mean (1 * 100 + 2 * 25) / 125
    mean, error = pool(np.array([1.0, 2.0]), np.array([0.1, 0.2]), 0.0)
    assert (mean, error) == (pytest.approx(1.2), pytest.approx(1 / math.sqrt(125)))
    # Q = 100 * 0.04 + 25 * 0.64 = 20; (20 - 1) / (125 - 10625 / 125) = 0.475
    groups = [(np.array([1.0, 2.0]), np.array([0.1, 0.2]))]
    assert between_variance(groups) == pytest.approx(19 / 40)
    assert between_variance([(np.array([1.0]), np.array([0.1]))]) == 0.0
    assert between_variance([(np.array([1.0, 1.01]), np.array([0.1, 0.2]))]) == 0.0
    assert between_variance([]) == 0.0


def test_errors_of_pooled_repeats_are_those_that_they_make() -> None:
    rng = np.random.default_rng(0)
    claimed, between, scores, found = 0.01, 0.03, [], []
    for _ in range(300):
        groups = [(rng.normal(0, math.hypot(claimed, between), 4), np.full(4, claimed)) for _ in range(6)]
        variance = between_variance(groups)
        found.append(variance)
        pooled = [pool(*g, variance) for g in groups]
        scores += [mean / error for mean, error in pooled]
    assert np.mean(found) == pytest.approx(between**2, rel=0.1)
    assert np.std(scores) == pytest.approx(1.0, abs=0.1)
    assert np.mean(np.abs(scores) > 1.96) < 0.08


def test_a_spike_is_left_out_and_two_values_are_not_cleaned() -> None:
    steady = (np.array([0.0, 0.01, -0.01, 0.02]), np.full(4, 0.01))
    spiked = (np.array([0.0, 0.01, 1.6, -0.01]), np.full(4, 0.01))
    pair = (np.array([0.0, 1.0]), np.full(2, 0.01))
    cleaned = without_spikes({"a": steady, "b": spiked, "c": pair})
    assert len(cleaned["a"][0]) == 4 and len(cleaned["c"][0]) == 2
    assert cleaned["b"][0].tolist() == [0.0, 0.01, -0.01]
    assert without_spikes({"c": pair})["c"][0].tolist() == [0.0, 1.0]


def test_objectives_without_errors_are_named() -> None:
    trials = [point(0, 1.0, 10.0), point(1, 2.0, 9.0, math.nan)]
    assert without_errors(trials, OBJECTIVES, ()) == []
    assert without_errors(trials[1:], OBJECTIVES, ()) == ["ms"]
    assert without_errors(trials[1:], OBJECTIVES, ("ms",)) == []
    assert without_errors([], OBJECTIVES, ()) == []
