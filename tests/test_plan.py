"""From a description to a searchable problem: what is refused, what is left out, and what costs become."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from autocomp.description import Description
from autocomp.errors import InfeasibleError, ObjectiveError
from autocomp.objective import Constraint, Objective
from autocomp.plan import Plan, make_plan, make_problem
from autocomp.space import AdditiveTable, Candidate, Choice, Decision, LinearBudget, SearchSpace
from autocomp.spread import spread
from autocomp.testing.fakes import FakeWorker
from autocomp.trial import Estimate, Fidelity, Measurement, Trial


def described(unexecutable: str = "", **changes: object) -> Description:
    found = Description.from_json(FakeWorker(decisions=4, unexecutable=unexecutable).describe())
    return replace(found, **changes)  # type: ignore[arg-type]


def plan(
    objectives: Sequence[str], constraints: Sequence[str] = (), description: Description | None = None
) -> Plan:
    found = description or described()
    wanted = [Objective.parse(o) for o in objectives]
    return make_plan(found, wanted, [Constraint.parse(c) for c in constraints])


def options_of(found: Plan) -> set[object]:
    return {o for d in found.space for o in d.options}


def test_metrics_are_sorted_into_exact_timed_and_predicted() -> None:
    found = plan(["min kl", "min decode_ms", "min memory_mb", "max top1"])
    assert found.quality == ("kl", "top1") and found.timing == ("decode_ms",)
    assert found.space == described().space and found.notes == ()


def test_a_quality_that_is_only_bounded_needs_a_model_too() -> None:
    found = plan(["min decode_ms"], ["kl <= 0.05"])
    assert found.quality == ("kl",)
    assert plan(["min decode_ms", "min kl"], ["kl <= 0.05"]).quality == ("kl",)


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(ObjectiveError, match="'speed'"):
        plan(["min kl"], ["speed <= 3"])


def test_options_without_a_kernel_leave_only_when_latency_matters() -> None:
    where = described("w3g64")
    with_latency = plan(["min kl", "min decode_ms"], description=where)
    assert "w3g64" not in options_of(with_latency)
    assert with_latency.notes == ("w3g64 is left out of 4 decisions: no kernel for w3g64",)
    assert all("w3g64" not in b.values.values() for b in with_latency.baselines)
    assert len(with_latency.baselines) == len(where.baselines) - 1
    bounded = plan(["min kl"], ["decode_ms <= 40"], where)
    assert "w3g64" not in options_of(bounded)
    free = plan(["min kl", "min memory_mb"], description=where)
    assert "w3g64" in options_of(free) and free.notes == () and free.baselines == where.baselines


def test_a_decision_that_nothing_executes_is_an_error() -> None:
    where = described()
    first = next(iter(where.resources))
    dead = {o: replace(r, executes="", reason="no kernel at all") for o, r in where.resources[first].items()}
    broken = replace(where, resources={**where.resources, first: dead})
    with pytest.raises(InfeasibleError, match=r"layer\.0: fake device executes none.*no kernel at all"):
        plan(["min decode_ms"], description=broken)
    assert plan(["min kl"], description=broken)


@pytest.mark.parametrize(("text", "upper"), [("memory_mb <= 40", True), ("avg_bits >= 4", False)])
def test_exact_bounds_become_budgets_of_the_space(text: str, upper: bool) -> None:
    found = plan(["min kl"], [text])
    (budget,) = [c for c in found.space.constraints if isinstance(c, LinearBudget)]
    constraint = Constraint.parse(text)
    rng = np.random.default_rng(0)
    table = described().exact[constraint.metric]
    for _ in range(50):
        candidate = described().space.sample(rng)
        assert (budget.violation(candidate.values) > 0) == (constraint.violation(table.total(candidate)) > 0)
    assert upper == (budget.table.metric == constraint.metric)


def test_a_bound_that_is_met_exactly_is_kept() -> None:
    smallest = min(described().exact["memory_mb"].total(b) for b in described().baselines)
    assert plan(["min kl"], [f"memory_mb <= {smallest!r}"])
    with pytest.raises(InfeasibleError, match="smallest reachable memory_mb is"):
        plan(["min kl"], [f"memory_mb <= {smallest - 0.01!r}"])


# -- problems ------------------------------------------------------------


def sensitivity(rows: dict[str, dict[object, float]], stderr: float = 0.0) -> AdditiveTable:
    errors = {n: dict.fromkeys(row, stderr) for n, row in rows.items()}
    return AdditiveTable("sensitivity", 0.0, rows, errors)  # type: ignore[arg-type]


def quality_table(
    options: tuple[str, ...], costs: Sequence[float], *, stderr: float = 0.0, ordered: bool = True,
    metric: str = "kl",
) -> dict[object, float]:  # fmt: skip
    where = described()
    decision = Decision("only", Choice(options, ordered=ordered))
    found = Plan(SearchSpace((decision,)), (), (metric,), (), ())
    table = sensitivity({"only": dict(zip(options, costs))}, stderr)
    problem = make_problem(found, where, [Objective(metric)], [], {"sensitivity": table}, seed=0)
    return dict(problem.tables[metric].costs["only"])


def test_noise_in_sensitivities_does_not_reward_smaller_formats() -> None:
    options = ("w3", "w4", "w8")
    assert quality_table(options, [0.5, 0.1, 0.12], stderr=0.02) == {"w3": 0.5, "w4": 0.1, "w8": 0.1}
    assert quality_table(options, [0.5, 0.1, -0.01], stderr=0.02)["w8"] == 0.0


def test_clear_differences_between_formats_stay() -> None:
    """Per-row 4 bits may lose to grouped 3 bits although they take more storage."""
    assert quality_table(("w3g32", "w4"), [0.1, 0.4], stderr=0.01) == {"w3g32": 0.1, "w4": 0.4}
    assert quality_table(("w3g32", "w4"), [0.1, 0.4]) == {"w3g32": 0.1, "w4": 0.4}


def test_options_without_an_order_are_taken_as_they_are() -> None:
    assert quality_table(("a", "b"), [0.1, 0.12], stderr=1.0, ordered=False) == {"a": 0.1, "b": 0.12}


def test_where_more_is_better_losses_are_subtracted() -> None:
    assert quality_table(("w3", "w4"), [0.5, 0.1], metric="top1") == {"w3": -0.5, "w4": -0.1}


def test_a_metric_at_a_length_takes_the_rows_profiled_there() -> None:
    space = SearchSpace((Decision("kv0", Choice(("dense", "a64b0s4"))), Decision("w", Choice(("w4",)))))
    rows: dict[str, dict[object, float]] = {
        "kv0": {"dense": 0.0, "a64b0s4": 0.2}, "kv0@1024": {"dense": 0.0, "a64b0s4": 0.1},
        "kv0@2048": {"dense": 0.0, "a64b0s4": 0.4}, "w": {"w4": 0.3},
    }  # fmt: skip
    metrics = ("kl", "kl_1024", "kl_2048", "kl_4096")
    found = Plan(space, (), metrics, (), ())
    objectives = [Objective(m) for m in metrics]
    profiles = {"sensitivity": sensitivity(rows)}
    where = described(exact={})
    tables = make_problem(found, where, objectives, [], profiles, seed=0).tables
    assert [tables[m].cost("kv0", "a64b0s4") for m in metrics] == [0.2, 0.1, 0.4, 0.2]
    assert all(tables[m].cost("w", "w4") == 0.3 and set(tables[m].costs) == {"kv0", "w"} for m in metrics)


def test_a_problem_holds_tables_of_the_remaining_options_only() -> None:
    where = described("w3g64")
    objectives = [Objective("kl"), Objective("decode_ms")]
    found = make_plan(where, objectives, [Constraint.parse("memory_mb <= 40")])
    rows: dict[str, dict[object, float]] = {d.name: dict.fromkeys(d.options, 0.1) for d in where.space}
    latency = AdditiveTable("decode_ms", 5.0, rows)  # type: ignore[arg-type]
    problem = make_problem(
        found, where, objectives, [], {"sensitivity": sensitivity(rows), "decode_ms": latency}, seed=3
    )
    assert set(problem.tables) == {"kl", "decode_ms", "memory_mb", "avg_bits"}
    assert problem.tables["memory_mb"].exact and not problem.tables["kl"].exact
    for table in problem.tables.values():
        assert all("w3g64" not in row for row in table.costs.values()) and table.covers(found.space)
    assert all(not found.space.violations(b) for b in problem.baselines), (
        "baselines over budget are no starts"
    )
    assert problem.seed == 3 and not problem.can_profile


def test_local_profiles_are_offered_for_divergence_only() -> None:
    where = described(profiles=("sensitivity:fisher", "neighbourhood"))

    def can(*objectives: str) -> bool:
        wanted = [Objective.parse(o) for o in objectives]
        return make_problem(make_plan(where, wanted, []), where, wanted, [], {}, seed=0).can_profile

    assert can("min kl", "min memory_mb") and not can("max top1") and not can("min memory_mb")


# -- spreading ------------------------------------------------------------


def trials(points: Sequence[tuple[float, float]]) -> list[Trial]:
    return [
        Trial(i, Candidate.of({"a": i}), Fidelity(), "test",
              Measurement({"kl": Estimate(x), "memory_mb": Estimate(y)}, "cpu"))
        for i, (x, y) in enumerate(points)
    ]  # fmt: skip


OBJECTIVES = [Objective("kl"), Objective("memory_mb")]


def test_spread_keeps_the_ends_and_covers_the_middle_by_rank() -> None:
    front = trials([(2.0**-i, float(i)) for i in range(9)])
    chosen = spread(front, OBJECTIVES, 3)
    assert [t.number for t in chosen] == [0, 4, 8]
    assert spread(front, OBJECTIVES, 9) == front and spread(front, OBJECTIVES, 20) == front
    for count in range(1, 9):
        found = spread(front, OBJECTIVES, count)
        assert len({t.number for t in found}) == count


def test_spread_bears_ties_and_nothing() -> None:
    same = trials([(1.0, 1.0)] * 5)
    assert len({t.number for t in spread(same, OBJECTIVES, 3)}) == 3
    assert spread([], OBJECTIVES, 3) == []
    one = trials([(1.0, math.inf), (0.5, 2.0), (0.1, 3.0)])
    assert len(spread(one, OBJECTIVES, 2)) == 2
