"""Spaces, candidates, tables, repair, objectives."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.errors import ObjectiveError, SpaceError
from autocomp.objective import Constraint, Objective, Selection, check_metrics
from autocomp.repair import moving_groups
from autocomp.space import (
    AdditiveTable,
    AtMostDistinct,
    Candidate,
    Choice,
    Decision,
    Interval,
    LinearBudget,
    Ordered,
    SearchSpace,
    Slots,
    SpaceConstraint,
    SumTo,
    Tied,
    Value,
    space_from_json,
    space_to_json,
)

BITS = (2, 4, 8)


def choices(n: int, *constraints: object) -> SearchSpace:
    return SearchSpace(
        tuple(Decision(f"d{i}", Choice(BITS, True), block=i) for i in range(n)),
        tuple(constraints),  # type: ignore[arg-type]
    )


def sizes(n: int) -> AdditiveTable:
    costs: dict[str, dict[Value, float]] = {f"d{i}": {b: b * (i + 1.0) for b in BITS} for i in range(n)}
    return AdditiveTable("memory_mb", 1.0, costs, exact=True)


def test_domains() -> None:
    assert Choice((1, 2)).contains(1) and not Choice((1, 2)).contains(True)
    assert not Choice((1, 2)).contains([1])  # type: ignore[arg-type]
    assert Choice(("a", None)).index(None) == 1
    with pytest.raises(SpaceError, match="not one of"):
        Choice((1, 2)).index(3)
    with pytest.raises(SpaceError, match="at least one option"):
        Choice(())
    with pytest.raises(SpaceError, match="differ"):
        Choice((1, 1))
    assert Interval(0, 1, True).contains(None) and not Interval(0, 1).contains(None)
    assert not Interval(0, 1).contains(True) and not Interval(0, 1).contains(math.nan)
    for low, high in ((1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(SpaceError, match="finite low <= high"):
            Interval(low, high)


def test_candidates_are_values() -> None:
    a, b = Candidate.of({"x": 1, "y": None}), Candidate.of({"y": None, "x": 1})
    assert a == b and hash(a) == hash(b) and a.fingerprint == b.fingerprint
    assert a.replace({"x": 2})["x"] == 2 and a["x"] == 1
    assert a != Candidate.of({"x": 1.5, "y": None})
    assert Candidate.of(json.loads(json.dumps(a.to_json()))) == a


def test_names_must_be_unique_and_known() -> None:
    with pytest.raises(SpaceError, match=r"unique; twice: \['a'\]"):
        SearchSpace((Decision("a", Choice((1,))), Decision("a", Choice((1,)))))
    with pytest.raises(SpaceError, match=r"Tied names decisions that are not in the space: \['z'\]"):
        choices(1, Tied(("d0", "z")))


def test_violations_in_words() -> None:
    space = choices(2, Tied(("d0", "d1")), LinearBudget(sizes(2), 10.0))
    assert space.violations(Candidate.of({"d0": 2, "d1": 2})) == []
    assert "no value for ['d1']" in space.violations(Candidate.of({"d0": 2}))[0]
    assert "unknown decisions ['z']" in space.violations(Candidate.of({"d0": 2, "d1": 2, "z": 0}))[0]
    assert "d0 = 3 is not in [2, 4, 8]" in space.violations(Candidate.of({"d0": 3, "d1": 2}))[0]
    reasons = space.violations(Candidate.of({"d0": 2, "d1": 8}))
    assert "Tied" in reasons[0] and "memory_mb = 19 is over the budget 10" in reasons[1]
    with pytest.raises(SpaceError, match="is invalid"):
        space.check(Candidate.of({"d0": 2}))


def test_tables() -> None:
    table = sizes(2)
    assert table.total(Candidate.of({"d0": 2, "d1": 4, "other": 9})) == 1 + 2 + 8
    assert math.isnan(table.total(Candidate.of({"d0": 3, "d1": 4})))
    assert table.covers(choices(2)) and not table.covers(choices(3))
    assert AdditiveTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    assert LinearBudget(table, 5.0).violation({"d0": 3, "d1": 2}) == math.inf


def test_a_sum_of_floats_may_meet_its_bound_exactly() -> None:
    costs: dict[str, dict[Value, float]] = {f"d{i}": {2: 0.1} for i in range(10)}
    budget = LinearBudget(AdditiveTable("memory_mb", 0.0, costs), 1.0)
    assert budget.violation({f"d{i}": 2 for i in range(10)}) == 0.0


def test_space_survives_json() -> None:
    floats = tuple(Decision(f"x{i}", Interval(0.0, 1.0, True), ("site",), "s") for i in range(2))
    names = tuple(d.name for d in floats)
    space = SearchSpace(
        (*choices(3).decisions, *floats),
        (
            Tied(("d0", "d1")),
            AtMostDistinct(("d0", "d2"), 1),
            LinearBudget(sizes(3), 9.0),
            SumTo(names),
            Ordered(names, False, 0.1),
            Slots((names[0], "d0", names[1], "d1"), (2,), packed=True),
        ),
    )
    again = space_from_json(json.loads(json.dumps(space_to_json(space))))
    assert again == space and again.fingerprint == space.fingerprint


def test_uniform_and_restrict() -> None:
    space = choices(3, LinearBudget(sizes(3), 13.0))
    assert [c["d0"] for c in space.uniform()] == [2, 4, 8]  # over the budget or not: baselines are measured
    assert [c["d0"] for c in choices(3, AtMostDistinct(("d0", "d1"), 1)).uniform()] == [2, 4, 8]
    assert space.restrict({"d1": [8, 4]}).by_name["d1"].options == (4, 8)
    with pytest.raises(SpaceError, match="none of its options"):
        space.restrict({"d1": [3]})
    assert SearchSpace((Decision("x", Interval(0, 1)),)).uniform() == []


def test_overlapping_ties_move_together() -> None:
    space = choices(5, Tied(("d0", "d1")), Tied(("d3", "d4")), Tied(("d1", "d3")))
    assert [set(g) for g in moving_groups(space)] == [{"d0", "d1", "d3", "d4"}, {"d2"}]
    rng = np.random.default_rng(0)
    assert all(not space.violations(space.sample(rng)) for _ in range(30))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(0.0, 1.0))
def test_samples_meet_what_can_be_met(seed: int, k: int, share: float) -> None:
    names = [f"d{i}" for i in range(8)]
    table = sizes(8)
    low, high = (table.total(Candidate.of(dict.fromkeys(names, b))) for b in (2, 8))
    budget = LinearBudget(table, low + share * (high - low))
    space = choices(8, Tied(tuple(names[:3])), AtMostDistinct(tuple(names[2:7]), k), budget)
    assert space.violations(space.sample(np.random.default_rng(seed))) == []


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.booleans())
def test_float_samples_are_ordered_and_sum(seed: int, descending: bool) -> None:
    rng = np.random.default_rng(seed)
    names = tuple(f"x{i}" for i in range(5))
    slots = tuple(Decision(n, Interval(0.0, 1.0, True)) for n in names)
    assert not (space := SearchSpace(slots, (Ordered(names, descending),))).violations(space.sample(rng))
    weights = tuple(Decision(n, Interval(0.0, 1.0)) for n in names)
    assert not (space := SearchSpace(weights, (SumTo(names),))).violations(space.sample(rng))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([0.01, 0.2, 0.25]))
def test_ordered_floats_keep_their_distance(seed: int, descending: bool, gap: float) -> None:
    rng = np.random.default_rng(seed)
    names = tuple(f"x{i}" for i in range(5))
    row = Ordered(names, descending, gap)
    space = SearchSpace(tuple(Decision(n, Interval(0.0, 1.0)) for n in names), (row,))
    assert not space.violations(space.sample(rng))
    equal = space.repair(dict.fromkeys(names, float(rng.random())), rng)
    assert not space.violations(equal)
    assert space.violations(Candidate.of(dict.fromkeys(names, 0.5)))
    assert space.repair(equal.values, rng) == equal


def test_an_order_without_room_is_a_violation() -> None:
    names = ("x0", "x1", "x2")
    row = Ordered(names, gap=0.6)
    space = SearchSpace(tuple(Decision(n, Interval(0.0, 1.0)) for n in names), (row,))
    assert "off by" in space.violations(space.sample(np.random.default_rng(0)))[0]


def test_slots_rest_where_they_are_unused() -> None:
    names = ("t0", "s0", "t1", "s1", "t2", "s2")
    decisions = [Decision(n, Interval(0.0, 1.0, True) if n[0] == "t" else Choice(("a", "b"))) for n in names]
    given = {"t0": None, "s0": "b", "t1": 0.5, "s1": "b", "t2": 0.2, "s2": "a"}
    for packed, wanted in (
        (False, [None, "a", 0.5, "b", 0.2, "a"]),
        (True, [0.5, "b", 0.2, "a", None, "a"]),
    ):
        space = SearchSpace(tuple(decisions), (Slots(names, ("a",), packed),))
        fixed = space.repair(dict(given), np.random.default_rng(0))
        assert [fixed[n] for n in names] == wanted and not space.violations(fixed)
        assert space.violations(Candidate.of(given)) == [f"Slots(t0, s0, t1...) is off by {1 + packed}"]


def test_a_slot_that_moves_leaves_behind_what_its_place_lacks() -> None:
    names = ("t0", "s0", "t1", "s1")
    orders = (Choice((1,), True), Choice((1, 2, 3), True))
    decisions = [Decision(n, orders[int(n[1])] if n[0] == "s" else Interval(0, 1, True)) for n in names]
    space = SearchSpace(tuple(decisions), (Slots(names, (1,), packed=True),))
    fixed = space.repair({"t0": None, "s0": 1, "t1": 0.5, "s1": 3}, np.random.default_rng(0))
    assert [fixed[n] for n in names] == [0.5, 1, None, 1]


def test_repair_keeps_what_is_right_and_mends_the_rest() -> None:
    space = choices(4, AtMostDistinct(("d0", "d1", "d2", "d3"), 2))
    rng = np.random.default_rng(0)
    fine: dict[str, Value] = {"d0": 2, "d1": 2, "d2": 8, "d3": 8}
    assert space.repair(fine, rng) == Candidate.of(fine)
    mended = space.repair({"d0": 2, "d1": 2, "d2": 8, "d3": 99}, rng)
    assert space.violations(mended) == [] and mended["d0"] == 2
    x = SearchSpace((Decision("x", Interval(0.0, 1.0)),))
    assert x.repair({"x": 7.0}, rng)["x"] == 1.0
    assert x.violations(x.repair({"x": math.nan}, rng)) == []


def test_an_impossible_budget_is_left_violated() -> None:
    space = choices(2, LinearBudget(sizes(2), 0.0))
    assert "over the budget" in space.violations(space.sample(np.random.default_rng(0)))[0]


@pytest.mark.parametrize(
    ("text", "metric", "minimize"),
    [("min kl", "kl", True), (" maximize top1/acc ", "top1/acc", False)],
)
def test_objectives(text: str, metric: str, minimize: bool) -> None:
    objective = Objective.parse(text)
    assert (objective.metric, objective.minimize) == (metric, minimize)
    assert Objective.parse(str(objective)) == objective
    assert objective.loss(2.0) == (2.0 if minimize else -2.0)


@pytest.mark.parametrize("text", ["kl", "min", "min kl decode_ms", "minimise kl", ""])
def test_bad_objectives(text: str) -> None:
    with pytest.raises(ObjectiveError, match="can't read the objective"):
        Objective.parse(text)


@pytest.mark.parametrize("text", ["kl <= 0.1", "decode_ms>=2e-3", "memory_mb < 200.", "kl <= .5", "kl > -3"])
def test_constraints_round_trip(text: str) -> None:
    constraint = Constraint.parse(text)
    assert Constraint.parse(str(constraint)) == constraint


def test_a_bound_is_printed_in_full() -> None:
    constraint = Constraint("bytes", True, 123456789.5)
    assert Constraint.parse(str(constraint)) == constraint


@pytest.mark.parametrize("text", ["kl <= 1.2.3", "kl <= .", "kl = 1", "kl <= x", "<= 1", "kl <= 1 2"])
def test_bad_constraints(text: str) -> None:
    with pytest.raises(ObjectiveError, match="can't read the constraint"):
        Constraint.parse(text)


def test_violation_of_a_constraint() -> None:
    assert Constraint.parse("kl <= 1").violation(3.0) == 2.0
    assert Constraint.parse("kl >= 1").violation(3.0) == 0.0
    assert Constraint.parse("kl >= 1").violation(math.nan) == math.inf


def test_selections() -> None:
    selection = Selection.parse("kl <= 0.1, memory_mb <= 5, min decode_ms")
    assert Selection.parse(str(selection)) == selection
    assert selection.admits({"kl": 0.1, "memory_mb": 5.0}) and not selection.admits({"kl": 0.1})
    for text in ("kl <= 0.1", "min kl, min decode_ms"):
        with pytest.raises(ObjectiveError, match="objectives; write bounds and one objective"):
            Selection.parse(text)


def test_unknown_metrics_are_named() -> None:
    with pytest.raises(ObjectiveError, match="unknown metric 'kk' in 'min kk'"):
        check_metrics([Objective("kk")], ["kl"])


def test_a_rounding_error_does_not_break_a_bound() -> None:
    total = sum([0.1] * 40)  # 4.000000000000001
    assert total > 4.0 and Constraint.parse("avg_bits <= 4.0").violation(total) == 0
    assert Constraint.parse("avg_bits >= 4.0").violation(8.0 - total) == 0
    assert Constraint.parse("avg_bits <= 4.0").violation(4.00001) > 0


SPANS = ("dense/k16v16", "dense/k8v8", "a64b0s4/k16v16", "a64b0s4/k8v8", "a32b0s4/k8v8")


def spans(*constraints: SpaceConstraint, options: tuple[Value, ...] = SPANS) -> SearchSpace:
    return SearchSpace(tuple(Decision(f"kv{i}", Choice(options)) for i in range(3)), constraints)


def test_pieces_of_options_are_counted() -> None:
    names = ("kv0", "kv1", "kv2")
    space = spans(AtMostDistinct(names, 2, 0), AtMostDistinct(names, 1, 1))
    good = Candidate.of({"kv0": "dense/k8v8", "kv1": "a64b0s4/k8v8", "kv2": "a64b0s4/k8v8"})
    assert space.violations(good) == []
    mixed = good.replace({"kv1": "a64b0s4/k16v16"})
    (reason,) = space.violations(mixed)
    assert "field 1 of kv0, kv1, kv2... takes 2 different values ['k16v16', 'k8v8'], over 1" in reason
    three = good.replace({"kv2": "a32b0s4/k8v8"})
    assert "field 0" in space.violations(three)[0] and len(space.violations(three)) == 1
    assert AtMostDistinct(names, 2).violation(good.values) == 0
    assert AtMostDistinct(names, 2).violation(three.values) == 1
    assert [c["kv0"] for c in space.uniform()] == list(SPANS)


def test_pieces_go_through_json_and_older_journals_load() -> None:
    names = ("kv0", "kv1", "kv2")
    space = spans(AtMostDistinct(names, 2, 0), AtMostDistinct(names, 3))
    data = json.loads(json.dumps(space_to_json(space)))
    assert space_from_json(data) == space and space_from_json(data).fingerprint == space.fingerprint
    assert data["constraints"][1] == {"kind": "AtMostDistinct", "names": list(names), "k": 3}
    assert data["constraints"][0]["field"] == 0


@pytest.mark.parametrize(("options", "shown"), [((2, 4), r"\[2, 4\]"), (("a/1", "b"), r"\['b'\]")])
def test_options_without_the_piece_are_refused(options: tuple[Value, ...], shown: str) -> None:
    with pytest.raises(SpaceError, match=rf"field 1 of kv0.*at least 2 pieces between slashes; got {shown}"):
        spans(AtMostDistinct(("kv0", "kv1"), 1, 1), options=options)
    with pytest.raises(SpaceError, match="counts field 0 of x"):
        SearchSpace((Decision("x", Interval(0.0, 1.0)),), (AtMostDistinct(("x",), 1, 0),))


def test_repair_of_pieces_keeps_to_ties_and_budgets() -> None:
    names = ("kv0", "kv1", "kv2")
    costs: dict[str, dict[Value, float]] = {n: {o: float(5 - i) for i, o in enumerate(SPANS)} for n in names}
    budget = LinearBudget(AdditiveTable("kv_mb", 0.0, costs, exact=True), 9.0)
    space = spans(AtMostDistinct(names, 2, 0), AtMostDistinct(names, 1, 1), Tied(("kv0", "kv2")), budget)
    for seed in range(40):
        assert space.violations(space.sample(np.random.default_rng(seed))) == []
