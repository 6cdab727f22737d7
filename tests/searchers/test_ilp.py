"""The ILP against brute force: optimum, bound, exclusions, trust regions, whole fronts."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from autocomp.errors import CapabilityError, InfeasibleError
from autocomp.objective import Constraint, Objective
from autocomp.pareto import non_dominated
from autocomp.searchers import branch
from autocomp.searchers.base import Problem, unsupported
from autocomp.searchers.ilp import IlpSearcher, solve, sweep
from autocomp.searchers.mckp import Groups, Knapsack, Row, greedy, solve_dual, undominated
from autocomp.space import (
    AdditiveTable,
    AtMostDistinct,
    Candidate,
    Choice,
    Decision,
    Interval,
    SearchSpace,
    SpaceConstraint,
    Tied,
    Value,
)
from autocomp.testing.searchers import toy_problem

OPTIONS = (2, 4, 8)


def instance(seed: int, decisions: int) -> tuple[SearchSpace, list[AdditiveTable], list[Candidate]]:
    """A random space, three tables over it, and its candidates. Odd seeds have integer costs (ties)."""
    rng = np.random.default_rng(seed)
    names = [f"d{i}" for i in range(decisions)]
    tables = []
    for metric in ("kl", "memory_mb", "decode_ms"):
        drawn = rng.integers(0, 5, (decisions, 3)) if seed % 2 else rng.random((decisions, 3))
        costs: dict[str, dict[Value, float]] = {
            n: {o: float(c) for o, c in zip(OPTIONS, row)} for n, row in zip(names, drawn)
        }
        tables.append(AdditiveTable(metric, 1.5, costs))
    constraints: list[SpaceConstraint] = []
    if seed % 3 == 0:
        constraints.append(Tied((names[0], names[1])))
    if seed % 4 == 0 and decisions > 3:
        constraints.append(AtMostDistinct(tuple(names[1:]), 2))
    space = SearchSpace(tuple(Decision(n, Choice(OPTIONS)) for n in names), tuple(constraints))
    drawn_all = (Candidate.of(dict(zip(names, x))) for x in itertools.product(OPTIONS, repeat=decisions))
    return space, tables, [c for c in drawn_all if not space.violations(c)]


@pytest.mark.parametrize("seed", range(24))
def test_optimum_is_brute_force(seed: int) -> None:
    space, (cost, size, speed), everything = instance(seed, 2 + seed % 5)
    upper = float(np.median([size.total(c) for c in everything]))
    limit = float(np.median([speed.total(c) for c in everything]))
    feasible = [c for c in everything if size.total(c) <= upper and speed.total(c) <= limit]
    if not feasible:
        with pytest.raises(InfeasibleError):
            solve(space, cost, [(size, upper), (speed, limit)])
        return
    found = solve(space, cost, [(size, upper), (speed, limit)], gap=0.0)
    best = min(cost.total(c) for c in feasible)
    assert found.candidate in feasible
    assert found.objective == pytest.approx(best) and found.objective == cost.total(found.candidate)
    assert found.bound <= best + 1e-9 and found.gap <= 1e-6


def test_eight_decisions() -> None:
    space, (cost, size, _), everything = instance(8, 8)
    upper = float(np.quantile([size.total(c) for c in everything], 0.3))
    best = min(cost.total(c) for c in everything if size.total(c) <= upper)
    assert solve(space, cost, [(size, upper)], gap=0.0).objective == pytest.approx(best)


@pytest.mark.parametrize("seed", range(6))
def test_exclusions_and_trust_region(seed: int) -> None:
    space, (cost, _, _), everything = instance(seed, 5)
    groups = Groups.of(space).names
    center = everything[len(everything) // 2]

    def changes(c: Candidate) -> int:
        return sum(c[names[0]] != center[names[0]] for names in groups)

    near = sorted(cost.total(c) for c in everything if changes(c) <= 2)
    found: list[Candidate] = []
    for rank in range(4):
        best = solve(space, cost, gap=0.0, exclude=found, trust=(center, 2))
        assert best.candidate not in found and changes(best.candidate) <= 2
        assert best.objective == pytest.approx(near[rank])
        found.append(best.candidate)


@pytest.mark.parametrize("seed", range(6))
def test_full_sweep_is_the_front_with_unsupported_points(seed: int) -> None:
    space, (cost, size, _), everything = instance(seed, 4)
    pairs = np.array([[cost.total(c), size.total(c)] for c in everything])
    front = np.unique(np.round(pairs[non_dominated(pairs)], 9), axis=0)
    found = sweep(space, cost, size, None)
    swept = np.unique(np.round([[s.objective, size.total(s.candidate)] for s in found], 9), axis=0)
    assert swept.tolist() == front.tolist()


def test_bounded_sweep_has_rising_sizes_and_falling_costs() -> None:
    problem = toy_problem(30, budget=None)
    found = sweep(problem.space, problem.tables["kl"], problem.tables["memory_mb"], 8)
    sizes = [problem.tables["memory_mb"].total(s.candidate) for s in found]
    assert sizes == sorted(sizes) and len(found) == 8
    assert [s.objective for s in found] == sorted((s.objective for s in found), reverse=True)


def test_presolve_keeps_an_optimum() -> None:
    """Dropped options are in no solution that is better than the greedy one."""
    for seed in (1, 2, 5, 7, 10):
        space, (cost, size, _), everything = instance(seed, 5)
        groups = Groups.of(space)
        raw = groups.costs(cost)
        least = np.minimum.reduceat(raw, groups.start)
        upper = float(np.quantile([size.total(c) for c in everything], 0.4))
        row = Row(groups.costs(size), upper - size.base, "memory_mb")
        problem = Knapsack(groups, raw - least[groups.owner], (row,))
        dual = solve_dual(problem)
        best = min(
            problem.value(x)
            for c in everything
            if (x := groups.positions(c)) is not None and size.total(c) <= upper
        )
        assert dual.bound <= best + 1e-9
        known = greedy(problem, dual)
        assert known is None or (problem.feasible(known) and problem.value(known) >= best - 1e-9)
        kept = np.flatnonzero(undominated(problem))
        survivors = [
            problem.value(x)
            for c in everything
            if (x := groups.positions(c)) is not None and set(x) <= set(kept) and size.total(c) <= upper
        ]
        assert min(survivors) == pytest.approx(best)


def test_a_bound_that_is_met_exactly_is_met() -> None:
    costs: dict[str, dict[Value, float]] = {f"d{i}": {2: 0.1 * i, 4: 0.3 * i} for i in range(1, 9)}
    quality: dict[str, dict[Value, float]] = {n: {2: 1.0, 4: 0.0} for n in costs}
    space = SearchSpace(tuple(Decision(n, Choice((2, 4))) for n in costs))
    size = AdditiveTable("memory_mb", 0.0, costs)
    target = Candidate.of({n: 4 if i % 2 else 2 for i, n in enumerate(costs)})
    found = solve(space, AdditiveTable("kl", 0.0, quality), [(size, size.total(target))], gap=0.0)
    assert size.total(found.candidate) <= size.total(target) * (1 + 1e-9)
    assert found.objective <= 4.0


def test_messages_name_the_reachable_total() -> None:
    space = SearchSpace((Decision("a", Choice((1, 2))), Decision("b", Choice((1, 2)))))
    cost = AdditiveTable("kl", 0.0, {"a": {1: 0.0, 2: 1.0}})
    size = AdditiveTable("memory_mb", 3.0, {"a": {1: 2.0, 2: 1.0}, "b": {1: 5.0, 2: 1.0}})
    speed = AdditiveTable("decode_ms", 0.0, {"a": {1: 1.0, 2: 3.0}})
    with pytest.raises(InfeasibleError, match=r"memory_mb <= 4\.5 can't be met: the smallest .* is 5;"):
        solve(space, cost, [(size, 4.5)])
    with pytest.raises(InfeasibleError, match=r"decode_ms <= 1 can't be met together with memory_mb <= 5"):
        solve(space, cost, [(size, 5.0), (speed, 1.0)])
    with pytest.raises(InfeasibleError, match="no option of a has a known cost"):
        solve(space, AdditiveTable("kl", 0.0, {"a": {7: 0.0}}))
    with pytest.raises(InfeasibleError, match="not in the space"):
        solve(space, cost, trust=(Candidate.of({"a": 9, "b": 1}), 1))


def test_unknown_options_are_not_taken() -> None:
    space = SearchSpace((Decision("a", Choice((1, 2, 3))),))
    table = AdditiveTable("kl", 0.0, {"a": {1: 5.0, 2: 4.0, 3: float("nan")}})
    assert solve(space, table).candidate["a"] == 2


def test_all_candidates_excluded() -> None:
    space = SearchSpace((Decision("a", Choice((1, 2))),))
    table = AdditiveTable("kl", 0.0, {"a": {1: 0.0, 2: 0.0}})
    with pytest.raises(InfeasibleError, match="2 candidates excluded"):
        solve(space, table, exclude=[Candidate.of({"a": 1}), Candidate.of({"a": 2})])


def test_intervals_are_refused_before_anything_runs() -> None:
    space = SearchSpace((Decision("x", Interval(0.0, 1.0)),))
    problem = Problem(space, (Objective("kl"),))
    reasons = unsupported(IlpSearcher, problem)
    assert any("intervals" in r for r in reasons) and any("no additive table for kl" in r for r in reasons)
    with pytest.raises(CapabilityError, match="intervals"):
        solve(space, AdditiveTable("kl", 0.0, {}))


def test_no_solver_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import pulp

    def missing(*args: object, **options: object) -> None:
        raise pulp.PulpError("no solver")

    monkeypatch.setattr(pulp, "getSolver", missing)
    space, (cost, size, _), everything = instance(3, 5)
    upper = float(np.median([size.total(c) for c in everything]))
    monkeypatch.setattr(branch, "greedy", lambda *a: None)
    with pytest.raises(CapabilityError, match="pip install highspy"):
        solve(space, cost, [(size, upper)], gap=0.0)


def test_ten_thousand_decisions_in_two_seconds() -> None:
    problem = toy_problem(10_000, options=(2, 3, 4, 6, 8, 16))
    budget = [(problem.tables["memory_mb"], problem.constraints[0].bound)]
    began = time.process_time()
    found = solve(problem.space, problem.tables["kl"], budget, gap=1e-3)
    assert time.process_time() - began < 2.0
    assert 0.0 <= found.gap <= 1e-3


def test_modelled_bounds_give_way_when_the_model_says_never() -> None:
    """A sum of sensitivities over its bound is no proof; an exact table over its bound is."""
    base = toy_problem(6)
    bounds = (*base.constraints, Constraint("kl", True, 1e-9))
    problem = Problem(base.space, base.objectives, bounds, base.tables)
    assert IlpSearcher(problem, points=3).ask(2, [], [])


def test_three_objectives_spread() -> None:
    base = toy_problem(12, budget=None)
    steps: dict[str, dict[Value, float]] = {n: {2: 5.0, 3: 5.0, 4: 5.0, 8: 9.0} for n in base.space.by_name}
    tables = {**base.tables, "decode_ms": AdditiveTable("decode_ms", 1.0, steps)}
    objectives = (*base.objectives, Objective("decode_ms"))
    asked = IlpSearcher(Problem(base.space, objectives, (), tables), points=6, gap=0.01).ask(8, [], [])
    totals = np.array([[tables[o.metric].total(c) for o in objectives] for c in asked])
    assert len(asked) == 8 and non_dominated(totals).all()
    assert (np.ptp(totals, axis=0) > 0.5 * np.ptp([[t.total(c) for t in tables.values()]
            for c in base.space.uniform()], axis=0)).all()  # fmt: skip
