"""Spaces with floats: operators that keep rows and sums, and searches that find a planted schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from autocomp.objective import Objective
from autocomp.registry import SEARCHERS
from autocomp.searchers import evolution
from autocomp.searchers.base import Problem
from autocomp.searchers.evolution import Breeder, EvolutionSearcher
from autocomp.space import Candidate, Choice, Decision, Interval, Ordered, SearchSpace, SumTo, Value
from autocomp.trial import Estimate, Fidelity, Measurement, Trial

TARGET = (1.0, 0.7, 0.35, 0.1, 0.02)
KINDS = ("a", "b", "b", "a", "b")


def schedule_problem(seed: int = 0) -> Problem:
    """Falling times and a kind of each; the baseline is evenly spaced."""
    decisions: list[Decision] = []
    for i in range(len(TARGET)):
        decisions.append(Decision(f"t{i}", Interval(0.001, 1.0), block=i))
        decisions.append(Decision(f"k{i}", Choice(("a", "b")), block=i))
    space = SearchSpace(tuple(decisions), (Ordered(tuple(f"t{i}" for i in range(5)), gap=0.001),))
    even = Candidate.of({f"t{i}": 1 - i / 5 for i in range(5)} | {f"k{i}": "a" for i in range(5)})
    return Problem(space, (Objective("fd"),), baselines=(even,), seed=seed)


def measured(candidate: Candidate, number: int, origin: str = "search") -> Trial:
    """How far a schedule is from the planted one, in ratios of times: the last ones count as the first."""
    logs = [math.log(float(candidate[f"t{i}"] or 0) / t) for i, t in enumerate(TARGET)]
    wrong = sum(candidate[f"k{i}"] != k for i, k in enumerate(KINDS))
    fd = 0.05 + sum(x * x for x in logs) + 0.3 * wrong
    return Trial(number, candidate, Fidelity(), origin, Measurement({"fd": Estimate(fd)}, "toy"))


def best_of(name: str, seed: int, trials: int, **options: object) -> float:
    problem = schedule_problem(seed)
    history = [measured(c, i, "baseline") for i, c in enumerate(problem.baselines)]
    searcher = SEARCHERS.get(name)(problem, **options)
    while len(history) < trials:
        history += [measured(c, len(history) + i) for i, c in enumerate(searcher.ask(2, history, []))]
    return min(t.value("fd") for t in history)


def test_searches_find_a_planted_schedule() -> None:
    """Evolution, and a predictor in front of it, come nearer in 80 trials than random search."""
    found = {
        name: float(np.median([best_of(name, seed, 80) for seed in range(7)])) - 0.05
        for name in ("random", "evolution", "hybrid")
    }
    assert found["evolution"] < 0.6 * found["random"] and found["hybrid"] < 0.6 * found["random"], found


def test_blocks_are_inherited_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolution, "BLEND", 0.0)
    monkeypatch.setattr(evolution, "BLOCKS", 1.0)
    monkeypatch.setattr(evolution, "ROWS", 0.0)
    space = replace(schedule_problem().space, constraints=())
    breeder = Breeder(space, mutation=0.0, crossover=1.0)
    first, second = _parent(0.9, "a"), _parent(0.1, "b")
    rng, mixed = np.random.default_rng(0), 0
    for _ in range(40):
        child = breeder.child([first, second], rng)
        # A mutation always changes one decision; in all other slots time and kind are of one parent.
        torn = sum((child[f"t{i}"], child[f"k{i}"]) not in ((0.9, "a"), (0.1, "b")) for i in range(5))
        assert torn <= 1
        mixed += len({child[f"k{i}"] for i in range(5)}) == 2
    assert mixed > 5


def _parent(time: float, kind: str) -> Candidate:
    return Candidate.of({f"t{i}": time for i in range(5)} | {f"k{i}": kind for i in range(5)})


def test_floats_are_placed_on_the_line_through_the_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolution, "BLEND", 1.0)
    names = tuple(f"w{i}" for i in range(4))
    space = SearchSpace(tuple(Decision(n, Interval(-1.0, 1.5)) for n in names), (SumTo(names),))
    rows = np.array([[0.0, 0.0, 0.0, 1.0], [0.4, 0.3, 0.2, 0.1]])
    breeder = Breeder(space, mutation=0.0, crossover=1.0, step=0.0)
    parents = [Candidate.of(dict(zip(names, map(float, r), strict=True))) for r in rows]
    rng, shares = np.random.default_rng(0), set()
    for _ in range(60):
        child = breeder.child(parents, rng)
        found = np.array([child[n] for n in names], dtype=float)
        assert found.sum() == pytest.approx(1.0)
        share = found[0] / 0.4
        assert found == pytest.approx(rows[0] + share * (rows[1] - rows[0]))
        shares.add(round(share, 6))
    assert min(shares) < 0.0 and max(shares) > 1.0 and len(shares) > 20


def test_crowded_times_take_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolution, "NEAR", 1.0)
    problem = schedule_problem()
    at = Candidate.of({f"t{i}": t for i, t in enumerate(TARGET)} | {f"k{i}": "a" for i in range(5)})
    breeder, rng = Breeder(problem.space, mutation=1.0), np.random.default_rng(0)
    moves: dict[str, list[float]] = {"t1": [], "t4": []}
    for _ in range(600):
        child = breeder.mutate(dict(at.values), rng)
        for name, found in moves.items():
            if child[name] != at[name]:
                found.append(abs(float(child[name] or 0) - float(at[name] or 0)))
    assert 0.002 < np.mean(moves["t4"]) < 0.02 < 0.05 < np.mean(moves["t1"]) < 0.2


def test_what_has_one_value_is_not_mutated() -> None:
    fixed: Sequence[Decision] = (Decision("t", Interval(0.5, 0.5)), Decision("k", Choice(("only",))))
    free = Decision("x", Choice((1, 2)))
    breeder, rng = Breeder(SearchSpace((*fixed, free)), mutation=1.0), np.random.default_rng(0)
    start: dict[str, Value] = {"t": 0.5, "k": "only", "x": 1}
    assert all(breeder.mutate(dict(start), rng)["x"] == 2 for _ in range(20))
    still = Breeder(SearchSpace(tuple(fixed)))
    assert still.mutate({"t": 0.5, "k": "only"}, rng).values == {"t": 0.5, "k": "only"}


def test_defaults_follow_the_space() -> None:
    """Few parents and few random proposals where floats are searched for one objective."""
    floats = schedule_problem()
    one, two = EvolutionSearcher(floats), replace(floats, objectives=(Objective("fd"), Objective("ms")))
    options = EvolutionSearcher(replace(floats, space=SearchSpace((Decision("x", Choice((1, 2))),))))
    assert one.population < EvolutionSearcher(two).population == options.population
    assert one.random < options.random
    assert EvolutionSearcher(floats, population=3, random=0.7).random == 0.7
