"""The epsilon-constraint search against brute force: every plan is on the front, and the front is found."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autocomp.objective import Constraint, Objective
from autocomp.pareto import non_dominated
from autocomp.searchers.base import Problem, unsupported
from autocomp.searchers.common import admissible
from autocomp.searchers.epsilon import EpsilonSearcher
from autocomp.searchers.ilp import IlpSearcher, cost_and_sides
from autocomp.space import AdditiveTable, AtMostDistinct, Candidate, Choice, Decision, SearchSpace, Value
from autocomp.testing.searchers import span_problem, toy_problem

OPTIONS = ("dense/k16v16", "dense/k8v8", "a8b0s1/k16v16", "a8b0s1/k8v8", "a4b0s1/k8v8")
LENGTHS = (1024, 2048, 4096)


def instance(seed: int, objectives: int, decisions: int = 4) -> Problem:
    """Random losses at several lengths under a bound on density; two layers with limits on pieces."""
    rng = np.random.default_rng(seed)
    names = [f"kv{i}" for i in range(decisions)]
    tables = {}
    for metric in [f"kl_{n}" for n in LENGTHS[:objectives]] + ["density"]:
        costs: dict[str, dict[Value, float]] = {
            n: {o: float(rng.integers(0, 40)) for o in OPTIONS} for n in names
        }
        tables[metric] = AdditiveTable(metric, 0.5, costs, exact=metric == "density")
    layers = [tuple(names[: decisions // 2]), tuple(names[decisions // 2 :])]
    space = SearchSpace(
        tuple(Decision(n, Choice(OPTIONS)) for n in names),
        tuple(AtMostDistinct(layer, k, f) for layer in layers for k, f in ((2, 0), (1, 1))),
    )
    bound = Constraint("density", True, 20.0 * decisions)
    wanted = tuple(Objective(m) for m in tables if m != "density")
    return Problem(space, wanted, (bound,), tables)


def losses(
    problem: Problem, candidates: list[Candidate]
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    tables = [problem.tables[o.metric] for o in problem.objectives]
    return np.array([[t.total(c) for t in tables] for c in candidates])


def front(problem: Problem) -> set[tuple[float, ...]]:
    """Loss vectors of the true front."""
    names = [d.name for d in problem.space]
    drawn = itertools.product(*(d.options for d in problem.space))
    inside = [c for x in drawn if admissible(problem, c := Candidate.of(dict(zip(names, x))))]
    rows = losses(problem, inside)
    return {tuple(row) for row in np.round(rows[non_dominated(rows)], 6)}


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_every_plan_is_on_the_front(seed: int, objectives: int) -> None:
    problem = instance(seed, objectives)
    searcher = EpsilonSearcher(problem, intervals=3, gap=0.0)
    planned = searcher.grid.front(3)
    assert len(planned) >= 3 and searcher.ask(3, [], []) == planned[:3]
    assert {tuple(row) for row in np.round(losses(problem, planned), 6)} <= front(problem)


@pytest.mark.parametrize("seed", range(3))
def test_a_fine_grid_finds_all_of_the_front(seed: int) -> None:
    problem = instance(seed, 2, decisions=3)
    found = EpsilonSearcher(problem, gap=0.0).grid.front(160)
    assert {tuple(row) for row in np.round(losses(problem, found), 6)} == front(problem)


def test_prefixes_cover_and_next_best_follow() -> None:
    problem = span_problem(4, 3)
    searcher = EpsilonSearcher(problem, gap=1e-3)
    asked = searcher.ask(2, [], [])
    ends = losses(problem, asked)
    planned = searcher.grid.front(4)
    assert ends.min(axis=0) == pytest.approx(losses(problem, planned).min(axis=0))
    assert non_dominated(losses(problem, planned)).all()
    more = searcher.ask(24, [], planned)
    assert len(more) == len(set(more)) == 24 and not set(more) & set(planned)
    assert all(admissible(problem, c) for c in more)


def test_more_intervals_are_not_solved_twice() -> None:
    """A solve whose solution meets a tighter bound answers that one, too."""
    searcher = EpsilonSearcher(instance(1, 2), gap=0.0)
    first = searcher.grid.front(4)
    count = len(searcher.grid.solved)
    assert searcher.grid.front(4) == first and len(searcher.grid.solved) == count
    assert count <= searcher.grid.solves(4) == 10


def test_objectives_without_a_table_are_refused() -> None:
    base = toy_problem(4)
    problem = Problem(base.space, (*base.objectives, Objective("decode_ms")), (), base.tables)
    assert "no additive table for decode_ms" in unsupported(EpsilonSearcher, problem)[0]
    assert not unsupported(EpsilonSearcher, base)


def test_objectives_with_the_same_costs_are_one() -> None:
    """Divergence and accuracy by one sensitivity profile: nothing is traded between them."""
    base = toy_problem(6)
    kl = base.tables["kl"]
    worse = {n: {o: -c for o, c in row.items()} for n, row in kl.costs.items()}
    tables = {**base.tables, "top1": AdditiveTable("top1", 1.0, worse)}
    three = Problem(base.space, (*base.objectives, Objective("top1", minimize=False)), (), tables)
    cost, sides = cost_and_sides(three, tables)
    assert cost.metric == "kl" and [s.metric for s in sides] == ["memory_mb"]
    two = Problem(base.space, (Objective("kl"), Objective("top1", minimize=False)), (), tables)
    assert [s.metric for s in cost_and_sides(two, tables)[1]] == ["memory_mb"]
    assert len(IlpSearcher(two, points=4).ask(4, [], [])) == 4


def test_two_lengths_are_two_objectives_of_the_sweep_too() -> None:
    problem = span_problem(4, 3)
    cost, sides = cost_and_sides(problem, problem.tables)
    assert (cost.metric, [s.metric for s in sides]) == ("kl_1024", ["kl_2048"])
    one = Problem(problem.space, problem.objectives[:1], problem.constraints[:1], problem.tables)
    assert [s.metric for s in cost_and_sides(one, problem.tables)[1]] == ["kv_mb"]
