"""Dominance, noise, hypervolume, selection."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.errors import InfeasibleError, ObjectiveError
from autocomp.objective import Constraint, Objective
from autocomp.pareto import (
    ParetoFront,
    dominates,
    hypervolume,
    noisy_labels,
    non_dominated,
    reference_point,
)
from autocomp.space import Candidate
from autocomp.trial import Estimate, Failure, Fidelity, Measurement, Trial

KL, MS = Objective("kl"), Objective("decode_ms")
rows = st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=0, max_size=12)


def trial(number: int, kl: float, ms: float, se: float = 0.0, **more: float) -> Trial:
    metrics = {"kl": Estimate(kl, se), "decode_ms": Estimate(ms, se)}
    metrics |= {k: Estimate(v) for k, v in more.items()}
    return Trial(number, Candidate.of({"a": number}), Fidelity(), "search", Measurement(metrics, "toy"))


def test_dominates() -> None:
    assert dominates([1, 2], [1, 3])
    assert not dominates([1, 2], [1, 2])
    assert not dominates([1, 4], [2, 3])
    assert not dominates([math.nan, 0], [1, 1])


@given(rows)
def test_non_dominated_is_the_definition(points: list[tuple[int, ...]]) -> None:
    table = np.array(points, dtype=float).reshape(-1, 3)
    expected = [not any(dominates(q, p) for q in table) for p in table]
    assert non_dominated(table).tolist() == expected


def test_nan_rows_are_neither_on_the_front_nor_in_the_way() -> None:
    assert non_dominated([[math.nan, 0.0], [1.0, 1.0]]).tolist() == [False, True]


def brute_force_volume(table: np.ndarray, corner: int) -> int:
    """Unit cells of the grid that some row dominates."""
    cells = np.stack(np.meshgrid(*[np.arange(corner)] * table.shape[1]), -1).reshape(-1, table.shape[1])
    return int(np.any(np.all(table[None] <= cells[:, None], axis=2), axis=1).sum())


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_hypervolume_counts_cells(m: int) -> None:
    rng = np.random.default_rng(m)
    for _ in range(20):
        table = rng.integers(0, 6, size=(int(rng.integers(1, 9)), m))
        assert hypervolume(table, [5] * m) == pytest.approx(brute_force_volume(table, 5))


@pytest.mark.parametrize("m", [2, 3, 4])
def test_hypervolume_agrees_with_optuna(m: int) -> None:
    from optuna._hypervolume import compute_hypervolume

    rng = np.random.default_rng(m)
    for n in (1, 7, 25):
        table = rng.random((n, m))
        assert hypervolume(table, np.ones(m)) == pytest.approx(compute_hypervolume(table, np.ones(m)))


def test_hypervolume_corner_cases() -> None:
    assert hypervolume([], [1.0]) == 0.0
    assert hypervolume([[2.0, 0.0]], [1.0, 1.0]) == 0.0
    assert hypervolume([[math.nan, 0.0], [0.5, 0.5]], [1.0, 1.0]) == 0.25
    assert hypervolume([[0.5, 0.5]] * 3, [1.0, 1.0]) == 0.25
    with pytest.raises(ObjectiveError, match="3 numbers"):
        hypervolume([[0.0, 0.0]], [1.0, 1.0, 1.0])
    with pytest.raises(ObjectiveError, match="finite"):
        hypervolume([[0.0]], [math.inf])


@settings(deadline=None)
@given(rows, st.tuples(*[st.integers(0, 5)] * 3))
def test_a_point_more_never_lowers_the_volume(points: list[tuple[int, ...]], extra: tuple[int, ...]) -> None:
    table = np.array(points, dtype=float).reshape(-1, 3)
    grown = np.vstack([table, extra])
    assert hypervolume(grown, [6] * 3) >= hypervolume(table, [6] * 3) - 1e-9


def test_labels_respect_noise() -> None:
    losses = [[1.0, 5.0], [1.05, 5.0], [1.05, 9.0], [3.0, 1.0]]
    noise = [[0.05, 0.0]] * 4
    labels = noisy_labels(losses, noise)
    assert labels[0] == ("front", None)
    assert labels[1] == ("tie", 0)
    assert labels[2] == ("dominated", 0)  # the second objective is beyond the noise
    assert labels[3] == ("front", None)
    assert noisy_labels(losses, np.zeros((4, 2)))[1] == ("dominated", 0)


def test_a_tie_with_one_is_dominated_when_another_is_clearly_better() -> None:
    losses, noise = [[1.0, 1.0], [0.99, 1.0], [0.5, 1.0]], [[0.1, 0.0]] * 3
    assert [label for label, _ in noisy_labels(losses, noise)] == ["dominated", "dominated", "front"]


@given(rows, st.floats(0, 2))
def test_labels_refine_dominance(points: list[tuple[int, ...]], noise: float) -> None:
    table = np.array(points, dtype=float).reshape(-1, 3)
    labels = noisy_labels(table, np.full(table.shape, noise))
    assert [label == "front" for label, _ in labels] == non_dominated(table).tolist()
    for i, (label, by) in enumerate(labels):
        assert label == "front" or dominates(table[by], table[i])


def test_front_leaves_out_what_it_must() -> None:
    failed = Trial(5, Candidate.of({"a": 5}), Fidelity(), "search", failure=Failure("oom", "toy"))
    trials = [
        trial(0, 1.0, 1.0),
        trial(1, 2.0, 2.0),
        trial(2, math.nan, 0.1),
        trial(3, 0.1, 50.0),
        trial(4, math.inf, 0.1),
        failed,
    ]
    front = ParetoFront.of(trials, (KL, MS), (Constraint("decode_ms", True, 10.0),))
    assert [(p.trial.number, p.label, p.dominated_by) for p in front.points] == [
        (0, "front", None),
        (1, "dominated", 0),
    ]
    assert [p.trial.number for p in front.front] == [0] and len(front) == 1


def test_remeasured_candidates_count_once_with_the_last_value() -> None:
    first, again = trial(0, 1.0, 1.0), trial(7, 1.2, 1.0)
    again = Trial(7, first.candidate, Fidelity("report"), "validate", again.measurement)
    assert [p.trial.number for p in ParetoFront.of([first, again], (KL, MS)).points] == [7]


def test_maximised_objectives() -> None:
    accuracy = Objective("acc", minimize=False)
    front = ParetoFront.of([trial(0, 1.0, 1.0, acc=0.5), trial(1, 1.0, 1.0, acc=0.9)], (accuracy, MS))
    assert [p.trial.number for p in front.front] == [1]
    assert front.select("max acc").number == 1


def test_selection() -> None:
    front = ParetoFront.of([trial(i, 0.1 * (i + 1), 10.0 - i) for i in range(5)], (KL, MS))
    assert front.select("kl <= 0.35, min decode_ms").number == 2
    assert front.select("min kl").number == 0
    with pytest.raises(InfeasibleError, match=r"smallest kl is 0\.1; trial 0 is nearest with kl = 0\.1"):
        front.select("kl <= 0.05, min decode_ms")
    with pytest.raises(ObjectiveError, match="no point of the front has that metric"):
        front.select("min perplexity")
    with pytest.raises(InfeasibleError, match="empty"):
        ParetoFront.of([], (KL,)).select("min kl")


def test_selection_never_returns_a_dominated_trial() -> None:
    cheap_but_beaten = trial(1, 2.0, 2.0, memory_mb=1.0)
    front = ParetoFront.of([trial(0, 1.0, 1.0, memory_mb=9.0), cheap_but_beaten], (KL, MS))
    assert front.select("min memory_mb").number == 0


def test_front_survives_json() -> None:
    bounds = (Constraint("decode_ms", True, 1234.56789),)
    front = ParetoFront.of([trial(0, 1.0, 3.0, 0.1), trial(1, 1.1, 3.0, 0.1)], (KL, MS), bounds)
    again = ParetoFront.from_json(json.loads(json.dumps(front.to_json())))
    assert again == front
    assert [p.label for p in again.points] == ["front", "tie"]


def test_rows_and_reference() -> None:
    trials = [trial(0, 1.0, 4.0, 0.1), trial(1, 3.0, 2.0)]
    front = ParetoFront.of(trials, (KL, MS))
    assert front.rows()[0]["kl"] == 1.0 and front.rows()[0]["kl_stderr"] == 0.1
    assert reference_point(trials, (KL, MS)).tolist() == pytest.approx([3.2, 4.2])
    assert reference_point(trials[:1], (KL, MS)).tolist() == pytest.approx([1.1, 4.4])
    assert front.hypervolume([4.0, 5.0]) == pytest.approx(3 * 1 + 1 * 2)
    with pytest.raises(ObjectiveError, match="no measured trial"):
        reference_point([], (KL,))
    with pytest.raises(ObjectiveError, match="at least one objective"):
        ParetoFront.of(trials, ())
