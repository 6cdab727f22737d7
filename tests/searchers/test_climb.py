"""Steps uphill: they end at the top, keep to the space and never answer with what is ruled out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autocomp.objective import Objective
from autocomp.searchers.base import Problem
from autocomp.searchers.climb import climb, neighbour
from autocomp.searchers.evolution import Breeder
from autocomp.searchers.hybrid import HybridSearcher
from autocomp.space import Candidate, Choice, Decision, Interval, Ordered, SearchSpace, SumTo
from autocomp.trial import Estimate, Failure, Fidelity, Measurement, Trial

LINE = SearchSpace((Decision("x", Choice(tuple(range(20)), ordered=True)),))


def at(x: int) -> Candidate:
    return Candidate.of({"x": x})


def beside(candidate: Candidate) -> list[Candidate]:
    x = int(candidate["x"] or 0)
    return [at(y) for y in (x - 1, x + 1) if 0 <= y < 20]


def height(candidates: Sequence[Candidate]) -> NDArray[np.float64]:
    """Two hills, the higher one at 15."""
    x = np.array([int(c["x"] or 0) for c in candidates], dtype=float)
    return np.maximum(5.0 - np.abs(x - 4.0), 9.0 - np.abs(x - 15.0))


def test_the_best_way_up_is_taken_to_its_end() -> None:
    assert climb([at(0), at(10)], height, beside, 20) == at(15)
    assert climb([at(0)], height, beside, 20) == at(4)  # a lower hill, with no way over
    assert climb([at(0), at(10)], height, beside, 2) == at(12)
    assert climb([at(0), at(10)], height, beside, 0) == at(10)
    assert climb([at(3)], height, lambda _: [], 5) == at(3)


def test_a_climb_ends_where_nothing_gains() -> None:
    asked: list[int] = []

    def counted(candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        asked.append(len(candidates))
        return height(candidates)

    climb([at(14)], counted, beside, 100)
    assert len(asked) == 3  # the start, a step up, and a look around


def test_neighbours_stay_in_the_space_and_reach_ends() -> None:
    rows = tuple(f"m{i}" for i in range(3))
    times = tuple(f"t{i}" for i in range(3))
    space = SearchSpace(
        (
            Decision("kind", Choice(("a", "b", "c"))),
            Decision("free", Interval(0.0, 1.0)),
            *(Decision(n, Interval(0.0, 1.0)) for n in rows),
            *(Decision(n, Interval(0.0, 1.0, nullable=n == "t2")) for n in times),
        ),
        (SumTo(rows), Ordered(times, gap=0.01)),
    )
    start = Candidate.of(
        {"kind": "a", "free": 0.5, "m0": 0.4, "m1": 0.3, "m2": 0.3, "t0": 0.9, "t1": 0.5, "t2": 0.1}
    )
    rng, breeder = np.random.default_rng(0), Breeder(space)
    found = [neighbour(breeder, start, rng) for _ in range(400)]
    assert not any(space.violations(c) for c in found)
    assert {c["kind"] for c in found} == {"a", "b", "c"}
    assert {0.0, 1.0} <= {c["free"] for c in found} and any(c["t0"] == 1.0 for c in found)
    assert any(c["t2"] is None for c in found)


def test_a_climb_never_ends_at_what_failed_or_is_pending() -> None:
    """Both are where the predictors expect most: at an end of every interval."""
    names = ("x0", "x1")
    space = SearchSpace(tuple(Decision(n, Interval(0.0, 1.0)) for n in names))
    problem = Problem(space=space, objectives=(Objective("loss"),), seed=0)
    history: list[Trial] = []
    for i, (a, b) in enumerate(np.random.default_rng(0).uniform(0.3, 1.0, (30, 2)).tolist()):
        measured = Measurement({"loss": Estimate(1.0 + a + 2.0 * b)}, "test")
        history.append(Trial(i, Candidate.of({"x0": a, "x1": b}), Fidelity(), "hybrid", measured))
    corner, beside = Candidate.of({"x0": 0.0, "x1": 0.0}), Candidate.of({"x0": 1.0, "x1": 0.0})
    found = HybridSearcher(problem).ask(4, history, [])
    assert corner in found
    failed = Trial(30, corner, Fidelity(), "hybrid", None, Failure("crash", "out of memory"))
    again = HybridSearcher(problem).ask(6, [*history, failed], [beside])
    assert corner not in again and beside not in again
    assert len({c.fingerprint for c in again}) == 6
