"""Candidates as sequences, the networks that rank them, and the choice between predictors."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from autocomp.errors import JobError, SpaceError
from autocomp.predictors.audit import rank_correlations
from autocomp.predictors.base import Predictor
from autocomp.predictors.choose import BestOf, make_predictor
from autocomp.predictors.ranking import RankingPredictor
from autocomp.predictors.ranking_net import Training
from autocomp.predictors.residual import ResidualPredictor
from autocomp.predictors.sequence import SequenceEncoder, kind_name
from autocomp.space import Candidate, Choice, Decision, Interval, Ordered, SearchSpace, Value
from autocomp.trial import Estimate, Fidelity, Measurement, Trial

SLOTS = 7
FAST = Training(members=4, width=24, epochs=100)
TRAIN = 80
SPREADS = np.array([0.1, 0.4, 1.0, 2.0])
"""Standard deviations of the normal distribution that the analytic problem samples from, a dimension each."""


def level(time: float) -> tuple[float, float]:
    """Signal and noise of a flow: ``(1 - t, t)``, kept off the ends."""
    return max(1.0 - time, 1e-2), max(time, 1e-2)


def distance(steps: list[tuple[float, int]]) -> float:
    """Frechet distance of exact samples to what a solver of (time, order) makes of noise.

    The clean image expected from ``x`` is linear in it for a normal distribution, so a sample stays a
    multiple of its noise: the standard deviation. Steps as in DPM-Solver++ (arXiv 2211.01095).
    """
    gain, before = np.ones(4), None
    for (time_, order), (after, _) in zip(steps, [*steps[1:], (0.0, 1)], strict=True):
        (a, s), (b, r) = level(time_), level(after)
        clean = a * SPREADS**2 / (a**2 * SPREADS**2 + s**2) * gain
        here, h = math.log(a / s), math.log(b / r) - math.log(a / s)
        aim = clean
        if order == 2 and before is not None:
            aim = clean + 0.5 * h / (here - before[0]) * (clean - before[1])
        gain = r / s * gain + b * -math.expm1(-h) * aim
        before = here, clean
    return float(np.sum((gain - SPREADS) ** 2))


def schedule_space(low: float = 0.02) -> SearchSpace:
    """Up to seven steps, each with a time and an order; the first three are always used."""
    decisions = []
    for i in range(SLOTS):
        decisions.append(Decision(f"schedules/time.{i}", Interval(low, 1.0, nullable=i > 2), block=i))
        decisions.append(Decision(f"schedules/order.{i}", Choice((1, 2), True), block=i))
    return SearchSpace(tuple(decisions), (Ordered(tuple(f"schedules/time.{i}" for i in range(SLOTS))),))


def candidate(steps: list[tuple[float, int]], gaps: frozenset[int] = frozenset()) -> Candidate:
    """The steps in the first slots that are not ``gaps``."""
    values: dict[str, Value] = {}
    left = list(steps)
    for i in range(SLOTS):
        time_, order = left.pop(0) if left and i not in gaps else (None, 1)
        values |= {f"schedules/time.{i}": time_, f"schedules/order.{i}": order}
    return Candidate.of(values)


def problem(n: int, seed: int = 0) -> list[Trial]:
    """Random schedules with their exact distances."""
    rng, trials = np.random.default_rng(seed), []
    for i in range(n):
        count = int(rng.integers(3, SLOTS + 1))
        times = 0.02 + 0.95 * np.sort(rng.random(count - 1) ** rng.choice([1.0, 1.5]))[::-1]
        steps = [(1.0, 1), *((float(t), int(rng.integers(1, 3))) for t in times)]
        found = Measurement({"fd": Estimate(distance(steps))}, "exact")
        trials.append(Trial(i, candidate(steps), Fidelity(), "random", found))
    return trials


def tau(predictor: object, trials: list[Trial]) -> float:
    predicted = predictor.predict([t.candidate for t in trials]).mean  # type: ignore[attr-defined]
    return rank_correlations(predicted, np.array([t.value("fd") for t in trials]))[1]


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return problem(160)


@pytest.fixture(scope="module")
def network(trials: list[Trial]) -> RankingPredictor:
    """Fitted to the first half of the trials."""
    return RankingPredictor("fd", None, schedule_space(), FAST).fit(trials[:TRAIN])


# -- sequences -------------------------------------------------------------------------------------------


def test_one_thing_decided_in_every_slot_is_one_kind() -> None:
    names = {kind_name(Decision(f"schedules/time.{i}", Interval(0, 1), block=i)) for i in (1, 11)}
    assert names == {"schedules/time.#"}
    assert kind_name(Decision("model.layers.3.fc13", Choice((1,)), block=3)) == "model.layers.#.fc13"
    assert kind_name(Decision("model.layers.3.fc1", Choice((1,)))) == "model.layers.3.fc1"


def test_unused_slots_leave_no_trace() -> None:
    """The same steps in other slots, with other values in the unused ones, are the same sequence."""
    encoder, steps = SequenceEncoder(schedule_space()), [(1.0, 1), (0.7, 2), (0.5, 2), (0.1, 1)]
    packed, spread = candidate(steps), candidate(steps, frozenset({3, 5}))
    spread = spread.replace({"schedules/order.3": 2})
    data = encoder([packed, spread])
    assert data.used.tolist() == [[True] * 4 + [False] * 3] * 2
    assert np.array_equal(data.steps[0], data.steps[1]) and np.array_equal(data.whole[0], data.whole[1])
    assert not data.steps[:, 4:].any()
    other = encoder([candidate([(1.0, 1), (0.7, 2), (0.4, 2), (0.1, 1)])])
    changed = np.flatnonzero(np.abs(other.steps[0] - data.steps[0]).sum(axis=1))
    assert changed.tolist() == [1, 2, 3]  # the step itself, and its neighbours by their moves


def test_a_given_grid_is_a_clock_and_a_model_may_be_none() -> None:
    """OMS-DPM's space: fixed times, a slot without a model is left out."""
    times, rows = (1.0, 0.9, 0.3, 0.2), []
    for i, t in enumerate(times):
        rows.append(Decision(f"s/time.{i}", Interval(t, t), block=i))
        rows.append(Decision(f"s/model.{i}", Choice((None, "", "large")), block=i))
    given: dict[str, Value] = {f"s/time.{i}": t for i, t in enumerate(times)}
    models: list[list[str | None]] = [["large", "", None, None], ["large", None, "", None]]
    found = [Candidate.of(given | {f"s/model.{i}": m for i, m in enumerate(row)}) for row in models]
    data = SequenceEncoder(SearchSpace(tuple(rows)))(found)
    assert data.used.tolist() == [[True, True, False, False]] * 2
    clocks = [(t - 0.2) / 0.8 for t in (0.9, 0.3)]
    for row, clock in zip(data.steps, clocks, strict=True):
        assert np.isclose(row[1], clock).any() and np.isclose(row[0], 1.0 - clock).any()


def test_a_space_without_slots_is_one_row() -> None:
    space = SearchSpace((Decision("a", Choice(("x", "y"))), Decision("b", Interval(0.0, 2.0))))
    data = SequenceEncoder(space)([Candidate.of({"a": "x", "b": 1.0}), Candidate.of({"a": "y", "b": 1.0})])
    assert data.steps.shape[:2] == (2, 0) and not np.array_equal(data.whole[0], data.whole[1])
    with pytest.raises(SpaceError, match="no value for"):
        SequenceEncoder(space)([Candidate.of({"a": "x"})])


# -- ranking ---------------------------------------------------------------------------------------------


def test_a_network_ranks_schedules_that_a_table_can_not(
    network: RankingPredictor, trials: list[Trial]
) -> None:
    test = trials[TRAIN:]
    ridge = ResidualPredictor("fd", None, schedule_space()).fit(trials[:TRAIN])
    assert tau(network, test) > 0.65
    assert tau(network, test) > tau(ridge, test) + 0.05
    assert network.cross_validated == pytest.approx(tau(network, test), abs=0.2)


def test_values_and_deviations_are_in_the_metrics_unit(
    network: RankingPredictor, trials: list[Trial]
) -> None:
    found = network.predict([t.candidate for t in trials[TRAIN:]])
    measured = np.array([t.value("fd") for t in trials[TRAIN:]])
    errors = np.log(found.mean / measured)
    assert abs(float(np.median(errors))) < 0.3
    assert float(np.std(errors)) < 0.8 * float(np.std(np.log(measured)))
    inside = np.abs(found.mean - measured) < 2.0 * found.std
    assert inside.mean() > 0.75


def test_another_unit_changes_nothing_else() -> None:
    quick, few = Training(members=2, width=8, epochs=20), problem(20)
    scaled = [
        replace(t, measurement=Measurement({"fd": Estimate(50.0 * t.value("fd"))}, "exact")) for t in few
    ]
    one, other = (
        RankingPredictor("fd", None, schedule_space(), quick).fit(x).predict([t.candidate for t in few])
        for x in (few, scaled)
    )
    assert other.mean == pytest.approx(50.0 * one.mean, rel=1e-2)
    assert other.std == pytest.approx(50.0 * one.std, rel=1e-2)


def test_pairs_within_their_noise_teach_nothing() -> None:
    """With errors larger than every difference no pair is left, and the scores stay where they were."""
    trials = problem(30)
    noisy = [
        replace(t, measurement=Measurement({"fd": Estimate(t.value("fd"), 1e3 * t.value("fd"))}, "exact"))
        for t in trials
    ]
    quick = Training(members=2, width=16, epochs=30)
    sure, unsure = (RankingPredictor("fd", None, schedule_space(), quick).fit(x) for x in (trials, noisy))
    assert tau(sure, trials) > 0.5 > abs(tau(unsure, trials))


def test_a_fit_is_a_matter_of_seconds() -> None:
    """A tenth of the usual steps; loops over pairs in Python would take a hundred times as long."""
    trials = problem(200)
    model = RankingPredictor("fd", None, schedule_space(), Training(epochs=20))
    began = time.process_time()
    model.fit(trials)
    assert time.process_time() - began < 6.0
    began = time.process_time()
    model.predict([t.candidate for t in trials] * 2)
    assert time.process_time() - began < 1.5


# -- choosing --------------------------------------------------------------------------------------------


def both(training: Training = FAST) -> dict[str, Predictor]:
    space = schedule_space()
    ranking = RankingPredictor("fd", None, space, training)
    return {"ridge": ResidualPredictor("fd", None, space), "ranking": ranking}


def test_the_best_is_found_by_trials_left_out(network: RankingPredictor, trials: list[Trial]) -> None:
    best = BestOf("fd", both())
    assert best.predict([trials[0].candidate]).mean.shape == (1,) and best.chosen == "ridge"
    best.fit(trials[:TRAIN])
    assert best.chosen == "ranking" and best.taus["ranking"] > best.taus["ridge"]
    rest = [t.candidate for t in trials[TRAIN:]]
    assert np.array_equal(best.predict(rest).mean, network.predict(rest).mean)
    best.fit(trials[:8])
    assert best.chosen == "ridge" and all(math.isnan(t) for t in best.taus.values())


def test_a_simple_truth_needs_no_network() -> None:
    rng, trials = np.random.default_rng(0), []
    for t in problem(40):
        value = 1.0 + sum(1 for i in range(SLOTS) if t.candidate[f"schedules/order.{i}"] == 2)
        noise = float(rng.normal(0, 0.01))
        trials.append(replace(t, measurement=Measurement({"fd": Estimate(value + noise)}, "exact")))
    best = BestOf("fd", both(Training(members=3, width=16, epochs=60))).fit(trials)
    assert best.chosen == "ridge" and best.taus["ridge"] > 0.7  # equal counts differ by noise alone


def test_predictors_by_name() -> None:
    space = schedule_space()
    assert isinstance(make_predictor("gp", "fd", None, space), ResidualPredictor)
    assert isinstance(make_predictor("ranking", "fd", None, space), RankingPredictor)
    assert isinstance(make_predictor("best", "fd", None, space), BestOf)
    with pytest.raises(JobError, match="unknown predictor 'magic'; known: additive, ridge, gp, trees"):
        make_predictor("magic", "fd", None, space)
