"""Limits on pieces of options: exact in the ILP, kept by repair and by every operator of a search."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from autocomp.errors import InfeasibleError
from autocomp.searchers import blocks, branch, columns
from autocomp.searchers.evolution import Breeder
from autocomp.searchers.ilp import Allocator, solve, sweep
from autocomp.space import (
    AdditiveTable,
    AtMostDistinct,
    Candidate,
    Choice,
    Decision,
    LinearBudget,
    SearchSpace,
    SpaceConstraint,
    Tied,
    Value,
)
from autocomp.testing.searchers import span_problem

RULES, BITS = ("dense", "a64b0s4", "a0b0.5s4"), ("k16v16", "k8v4")
OPTIONS = tuple(f"{r}/{b}" for r in RULES for b in BITS)


def instance(
    seed: int, layers: int = 2, groups: int = 3
) -> tuple[SearchSpace, list[AdditiveTable], list[Candidate]]:
    """Layers of key/value groups with at most two rules and one bit width, free weights, three tables."""
    rng = np.random.default_rng(seed)
    names = [[f"l{i}.kv{g}" for g in range(groups)] for i in range(layers)]
    constraints: list[SpaceConstraint] = []
    for layer in names:
        constraints += [AtMostDistinct(tuple(layer), 2 - seed % 2, 0), AtMostDistinct(tuple(layer), 1, 1)]
    if seed % 5 == 4:
        constraints.append(Tied((names[0][0], names[-1][0])))
    decisions = [Decision(n, Choice(OPTIONS), block=i) for i, layer in enumerate(names) for n in layer]
    decisions += [Decision(n, Choice((2, 4, 8), True)) for n in ("w0", "w1")[: 3 - layers]]
    tables = []
    for metric in ("kl", "kv_mb", "decode_ms"):
        costs: dict[str, dict[Value, float]] = {
            d.name: {o: float(rng.integers(0, 6) if seed % 3 else rng.random()) for o in d.options}
            for d in decisions
        }
        tables.append(AdditiveTable(metric, 1.0, costs))
    space = SearchSpace(tuple(decisions), tuple(constraints))
    return space, tables, everything(space)


def everything(space: SearchSpace) -> list[Candidate]:
    """All candidates, by brute force."""
    options = [d.options for d in space]
    drawn = (dict(zip(space.by_name, x)) for x in itertools.product(*options))
    return [Candidate.of(v) for v in drawn if not any(k.violation(v) for k in space.constraints)]


@pytest.mark.parametrize("seed", range(10))
def test_optimum_is_brute_force(seed: int) -> None:
    layers, groups = [(1, 3), (2, 2)][seed % 2]
    space, (cost, size, speed), candidates = instance(seed, layers, groups)
    for share in (0.15, 0.4):
        upper, limit = (float(np.quantile([t.total(c) for c in candidates], share)) for t in (size, speed))
        inside = [c for c in candidates if size.total(c) <= upper and speed.total(c) <= limit]
        if not inside:
            with pytest.raises(InfeasibleError, match="can't be met together with kv_mb"):
                solve(space, cost, [(size, upper), (speed, limit)])
            continue
        found = solve(space, cost, [(size, upper), (speed, limit)], gap=0.0)
        best = min(cost.total(c) for c in inside)
        assert found.candidate in inside and found.objective == pytest.approx(best)
        assert found.bound <= best + 1e-9 and found.gap <= 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_the_lagrangian_bound_is_a_bound_and_prices_are_exact(seed: int) -> None:
    space, (cost, size, _), candidates = instance(seed, 1, 3)
    allocator = Allocator(space, cost)
    problem, floor = allocator._knapsack((), ())
    priced = problem.cost + 0.7 * allocator.row((size, 0.0)).weight
    found = {c: problem.groups.positions(c) for c in candidates}
    totals = {c: float(priced[x].sum()) for c, x in found.items() if x is not None}
    x, total = problem.optimum(priced)
    assert total == pytest.approx(min(totals.values())) == pytest.approx(float(priced[x].sum()))
    reduced = problem.reduced(priced)
    for position in range(len(priced)):
        through = [v for c, v in totals.items() if found[c] is not None and position in found[c]]
        if through:
            assert reduced[position] == pytest.approx(min(through) - total)
    (block,) = problem.structure.blocks
    ceiling = float(np.median([priced[x[block.groups]].sum() for x in found.values() if x is not None]))
    listed = block.columns(priced, ceiling, 10_000)
    assert listed is not None
    wanted = {tuple(x[block.groups]) for x in found.values()
              if x is not None and priced[x[block.groups]].sum() <= ceiling + 1e-12}  # fmt: skip
    assert {tuple(row) for row in listed} == wanted and len(listed) == len(wanted)
    assert block.columns(priced, ceiling, 0) is None
    assert floor >= 1.0


@pytest.mark.parametrize("what", ["patterns", "columns"])
def test_what_is_too_much_to_list_is_left_to_the_solver(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "patterns":
        monkeypatch.setattr(blocks, "MOST_CELLS", 20)
    else:
        monkeypatch.setattr(columns, "MOST_COLUMNS", 1)
        monkeypatch.setattr(columns, "FACTORS", (0.0,))
    for seed in (0, 1, 3):
        space, (cost, size, _), candidates = instance(seed, 2, 2)
        upper = float(np.quantile([size.total(c) for c in candidates], 0.3))
        best = min(cost.total(c) for c in candidates if size.total(c) <= upper)
        found = solve(space, cost, [(size, upper)], gap=0.0)
        assert found.objective == pytest.approx(best) and not space.violations(found.candidate)
        assert found.bound <= best + 1e-9


def test_next_best_candidates_come_in_order() -> None:
    space, (cost, size, _), candidates = instance(3, 1, 3)
    upper = float(np.quantile([size.total(c) for c in candidates], 0.5))
    ranked = sorted(cost.total(c) for c in candidates if size.total(c) <= upper)
    known: list[Candidate] = []
    for rank in range(6):
        found = solve(space, cost, [(size, upper)], gap=0.0, exclude=known)
        assert found.candidate not in known and found.objective == pytest.approx(ranked[rank])
        known.append(found.candidate)


def test_full_sweep_is_the_front() -> None:
    space, (cost, size, _), candidates = instance(1, 1, 3)
    pairs = {(cost.total(c), size.total(c)) for c in candidates}
    front = sorted(p for p in pairs if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in pairs))
    found = sweep(space, cost, size, None)
    assert np.allclose(sorted((s.objective, size.total(s.candidate)) for s in found), front)


def test_limits_that_nothing_meets_say_so() -> None:
    decisions = (Decision("a", Choice(("x/1",))), Decision("b", Choice(("x/2",))))
    space = SearchSpace(decisions, (AtMostDistinct(("a", "b"), 1, 1),))
    table = AdditiveTable("kl", 0.0, {"a": {"x/1": 1.0}, "b": {"x/2": 1.0}})
    with pytest.raises(InfeasibleError):
        solve(space, table, [(table, 5.0)])


def test_thirty_layers_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a small model: 30 layers of 3 groups, 35 options each, and 60 weights."""
    problem = span_problem(30, 3, rules=7, widths=5, weights=60)
    began = time.process_time()
    found = solve(problem.space, problem.tables["kl_1024"], gap=1e-3)
    assert time.process_time() - began < 5.0
    assert found.gap <= 1e-3 and not problem.space.violations(found.candidate)
    # The dual bound alone is nearly tight: limits are priced, not relaxed.
    monkeypatch.setattr(branch, "_branch_and_bound", lambda *a: pytest.fail("branch and bound was needed"))
    assert solve(problem.space, problem.tables["kl_1024"], gap=0.02).gap <= 0.02


def test_mutations_reach_every_piece() -> None:
    """Three groups with one bit width: a single mutation is not voted down for ever."""
    space = SearchSpace(
        tuple(Decision(f"kv{g}", Choice(OPTIONS)) for g in range(3)),
        (AtMostDistinct(("kv0", "kv1", "kv2"), 2, 0), AtMostDistinct(("kv0", "kv1", "kv2"), 1, 1)),
    )
    breeder, rng = Breeder(space, mutation=1.0), np.random.default_rng(0)
    start = Candidate.of({f"kv{g}": "dense/k16v16" for g in range(3)})
    children = [breeder.child([start], rng) for _ in range(60)]
    assert not any(space.violations(c) for c in children)
    assert sum("k8v4" in str(c["kv0"]) for c in children) > 5
    assert sum(len(set(c.values.values())) == 2 for c in children) > 5


def test_a_repair_changes_only_the_counted_piece() -> None:
    space = SearchSpace(
        tuple(Decision(f"kv{g}", Choice(OPTIONS)) for g in range(3)),
        (AtMostDistinct(("kv0", "kv1", "kv2"), 1, 1),),
    )
    values: dict[str, Value] = {"kv0": "dense/k16v16", "kv1": "a64b0s4/k8v4", "kv2": "a0b0.5s4/k16v16"}
    kept = set()
    for seed in range(20):
        fixed = space.repair(values, np.random.default_rng(seed))
        assert [str(fixed[n]).split("/")[0] for n in sorted(values)] == ["dense", "a64b0s4", "a0b0.5s4"]
        kept |= {str(v).split("/")[1] for v in fixed.values.values()}
    assert kept == {"k16v16", "k8v4"}, "either may win"


def test_a_budget_that_needs_fewer_bits_everywhere_is_met() -> None:
    """No single group can take fewer bits where a layer has one width: all of it has to move."""
    costs: dict[str, dict[Value, float]] = {
        f"kv{g}": {"dense/k16v16": 4.0, "dense/k8v4": 1.0} for g in range(3)
    }
    budget = LinearBudget(AdditiveTable("kv_mb", 0.0, costs, exact=True), 5.0)
    decisions = tuple(Decision(n, Choice(tuple(row))) for n, row in costs.items())
    space = SearchSpace(decisions, (AtMostDistinct(tuple(costs), 1, 1), budget))
    for seed in range(5):
        assert not space.violations(space.sample(np.random.default_rng(seed)))
