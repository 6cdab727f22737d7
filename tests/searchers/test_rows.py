"""Changes of whole rows: what they keep, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest

from autocomp.searchers.evolution import Breeder
from autocomp.searchers.rows import RowChanges
from autocomp.space import Candidate, Choice, Decision, Interval, Ordered, SearchSpace, Slots, Tied, Value

SLOTS, LEAST = 8, 2


def steps() -> SearchSpace:
    """Up to eight falling times, each with a formula."""
    decisions: list[Decision] = []
    for i in range(SLOTS):
        decisions.append(Decision(f"t{i}", Interval(0.01, 1.0, nullable=i >= LEAST), block=i))
        decisions.append(Decision(f"k{i}", Choice(("a", "b")), block=i))
    slots = Slots(tuple(d.name for d in decisions), ("a",), packed=True)
    return SearchSpace(tuple(decisions), (slots, Ordered(tuple(f"t{i}" for i in range(SLOTS)), gap=0.01)))


def even(count: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for i in range(SLOTS):
        values[f"t{i}"] = 1.0 - i / count if i < count else None
        values[f"k{i}"] = ("a" if i < count // 2 else "b") if i < count else "a"
    return values


def groups(space: SearchSpace) -> list[tuple[str, ...]]:
    return [(d.name,) for d in space.decisions]


def times(values: dict[str, Value]) -> list[float]:
    return [float(v) for i in range(SLOTS) if (v := values[f"t{i}"]) is not None]


def test_a_row_read_at_another_number_of_points_keeps_its_shape() -> None:
    space = steps()
    (row,) = RowChanges(space, groups(space)).rows
    assert row.least == LEAST
    rng, counts = np.random.default_rng(0), set()
    for _ in range(60):
        values = even(5)
        values["t1"] = 0.7
        assert row.resampled(values, rng)
        found = times(values)
        counts.add(len(found))
        curve = np.interp(np.linspace(0, 4, len(found)), range(5), [1.0, 0.7, 0.6, 0.4, 0.2])
        assert found == pytest.approx(curve.tolist())
        assert not space.violations(space.repair(values, rng))
        # What stands beside a step goes with it: first "a", then "b".
        kinds = [values[f"k{i}"] for i in range(len(found))]
        assert kinds == sorted(kinds) and set(kinds) == {"a", "b"}
    assert counts == {2, 3, 4, 6, 7, 8}


def test_a_bent_row_keeps_its_ends_and_order() -> None:
    space = steps()
    (row,) = RowChanges(space, groups(space)).rows
    rng, middles = np.random.default_rng(0), []
    for _ in range(50):
        values = {**even(5), "t4": 0.01}
        assert row.bent(values, rng)
        found = times(values)
        assert found[0] == pytest.approx(1.0) and found[-1] == pytest.approx(0.01)
        assert np.all(np.diff(found) < 0)
        middles.append(found[2])
    assert min(middles) < 0.5 and max(middles) > 0.7


def test_a_stretch_of_layers_gets_one_option_or_one_step() -> None:
    bits = Choice((2, 3, 4, 8), ordered=True)
    decisions = [Decision(f"{part}{i}", bits, space="bits", block=i) for i in range(6) for part in "uv"]
    space = SearchSpace(tuple(decisions), (Tied(("u0", "u1")),))
    tied = [("u0", "u1"), *((d.name,) for d in decisions if d.name not in ("u0", "u1"))]
    changes = RowChanges(space, tied)
    assert not changes.rows and [len(c) for c in changes.columns] == [5, 6]
    rng, lengths = np.random.default_rng(0), set()
    for _ in range(300):
        values: dict[str, Value] = dict.fromkeys((d.name for d in decisions), 4)
        changed = changes.change(values, rng)
        moved = [n for n, v in values.items() if v != 4]
        assert changed == bool(moved)
        assert len({values[n] for n in moved}) <= 1 and len({n[0] for n in moved}) <= 1
        blocks = [int(n[1]) for n in moved]
        assert blocks == list(range(min(blocks, default=0), max(blocks, default=-1) + 1))
        assert values["u0"] == values["u1"]
        lengths.add(len(moved))
    assert {0, 1, 2, 5, 6} <= lengths


def test_nothing_to_change() -> None:
    """Short rows, fixed times, decisions of no block: single mutations are left to do it."""
    short = SearchSpace((Decision("t0", Interval(0.0, 1.0)), Decision("t1", Interval(0.0, 1.0))))
    fixed = SearchSpace(
        tuple(Decision(f"t{i}", Interval(1 - i / 4, 1 - i / 4), block=i) for i in range(4)),
        (Ordered(tuple(f"t{i}" for i in range(4))),),
    )
    free = SearchSpace(tuple(Decision(f"x{i}", Choice((1, 2))) for i in range(5)))
    for space in (short, fixed, free):
        assert not RowChanges(space, groups(space))
    rng = np.random.default_rng(0)
    assert Breeder(free).child([Candidate.of({f"x{i}": 1 for i in range(5)})], rng).values


def test_children_stay_in_the_space() -> None:
    space, rng = steps(), np.random.default_rng(0)
    breeder = Breeder(space)
    parents = [space.repair(even(n), rng) for n in (2, 5, 8)]
    counts = set()
    for _ in range(200):
        child = breeder.child(parents, rng)
        assert not space.violations(child)
        counts.add(len(times(child.values)))
    assert counts == set(range(2, 9))
