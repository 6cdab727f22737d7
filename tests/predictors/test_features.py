"""Codes, totals and effects against their definitions, candidate by candidate."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest

from autocomp.errors import SpaceError
from autocomp.predictors.features import Encoder, Layout
from autocomp.space import AdditiveTable, Candidate, Choice, Decision, Interval, SearchSpace, Tied

SPACE = SearchSpace(
    (
        Decision("b", Choice((2, 4, 8), ordered=True), block=0),
        Decision("a", Choice((4, 8), ordered=True), block=0),
        Decision("solver", Choice(("euler", None))),
        Decision("t", Interval(0.0, 2.0, nullable=True), block=1),
    )
)
TABLE = AdditiveTable("kl", 1.0, {"a": {4: 2.0, 8: 0.0}, "b": {2: 6.0, 4: 3.0, 8: 1.0}, "t": {None: 0.5}})


def candidate(a: object = 4, b: object = 2, solver: object = "euler", t: object = None) -> Candidate:
    return Candidate.of({"a": a, "b": b, "solver": solver, "t": t})  # type: ignore[dict-item]


def test_codes_are_option_numbers_and_values() -> None:
    encoder = Encoder(SPACE, None)
    rows = encoder.rows([candidate(), candidate(8, 8, None, 1.5)])
    assert rows[:, :3].tolist() == [[0, 0, 0], [1, 2, 1]]
    assert math.isnan(rows[0, 3]) and rows[1, 3] == 1.5
    assert encoder.rows([]).shape == (0, 4)


@pytest.mark.parametrize("wrong", [candidate(a=3), candidate(a=4.0), candidate(solver="heun")])
def test_foreign_values_are_refused(wrong: Candidate) -> None:
    encoder = Encoder(SPACE, None)
    assert encoder.layout.code(wrong) is None
    with pytest.raises(SpaceError):
        encoder.codes(wrong)


def test_totals_are_the_tables() -> None:
    encoder = Encoder(SPACE, TABLE)
    found = encoder.totals(encoder.rows([candidate(), candidate(8, 4), candidate(t=1.0)]))
    assert found[:2] == pytest.approx([TABLE.total(candidate()), TABLE.total(candidate(8, 4))])
    assert math.isnan(found[2]), "a value without an entry is unknown"
    assert Encoder(SPACE, None).totals(np.zeros((2, 4))).tolist() == [0.0, 0.0]


def test_effects_by_hand() -> None:
    """Every choice adds its share to four levels: its option, its decision, its entry and its block."""
    encoder = Encoder(SPACE, TABLE)
    chosen = candidate(4, 8)
    row = encoder.effects(encoder.rows([chosen]), np.array([10.0]))[0]
    want = np.zeros(encoder.size)
    for (name, option), scale, levels in zip(
        encoder.layout.entries, encoder.scales, encoder.layout.levels, strict=True
    ):
        if chosen[name] == option:
            for level in levels[levels < encoder.size]:
                want[level] += scale / 10.0
    assert row[: encoder.size] == pytest.approx(want)
    assert row[encoder.size :].tolist() == [0.0, 0.0, 0.0]  # the interval is not used
    scales = dict(zip(encoder.layout.entries, encoder.scales, strict=True))
    assert scales["b", 2] == 6.0 and scales["a", 8] == pytest.approx(0.05 * 2.0)  # the floor of a free one
    block = encoder.layout.levels[encoder.layout.entries.index(("a", 4)), 1]
    assert row[block] == pytest.approx((2.0 + 1.0) / 10.0)


def test_many_candidates_are_laid_out_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, rng = Encoder(SPACE, TABLE), np.random.default_rng(0)
    codes = encoder.rows([SPACE.sample(rng) for _ in range(7)])
    whole = encoder.effects(codes, np.ones(7))
    monkeypatch.setattr("autocomp.predictors.features._CHUNK", 3)
    assert np.array_equal(whole, encoder.effects(codes, np.ones(7)))


def test_layouts_are_shared_by_equal_spaces_and_copies() -> None:
    again = SearchSpace(tuple(reversed(SPACE.decisions)))
    encoder = Encoder(SPACE, TABLE)
    assert Encoder(again, None).layout is encoder.layout
    assert copy.deepcopy(encoder).layout is encoder.layout
    texts = SearchSpace(
        (replace(SPACE.decisions[0], domain=Choice(("2", "4", "8"), True)), *SPACE.decisions[1:])
    )
    floats = SearchSpace(
        (replace(SPACE.decisions[0], domain=Choice((2.0, 4, 8), True)), *SPACE.decisions[1:])
    )
    assert len({id(Layout.of(s)) for s in (SPACE, texts, floats)}) == 3  # 2, 2.0 and "2" are not one option


def test_only_trials_are_remembered_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(SPACE)
    layout.code(candidate())
    assert not layout._rows
    monkeypatch.setattr("autocomp.predictors.features._ROWS", 2)
    for b in (2, 4, 8):
        layout.code(candidate(b=b), keep=True)
    assert len(layout._rows) == 2
    assert layout.code(candidate(b=8)) is layout.code(candidate(b=8))


def test_shares_count_tied_choices_once_and_slots_in_use() -> None:
    space = SearchSpace(
        (*SPACE.decisions, Decision("b2", Choice((2, 4, 8), ordered=True))), (Tied(("b", "b2")),)
    )
    encoder = Encoder(space, None)
    rows = encoder.rows([c.replace({"b2": c["b"]}) for c in (candidate(), candidate(8, 8, None, 1.0))])
    names = {repr(o): i for (_, o), (i, _) in zip(encoder.layout.entries, encoder.layout.shared, strict=True)}
    first, second = encoder.shares(rows)
    assert first.sum() == pytest.approx(1.0) and first[-1] == 0.0
    assert [first[names[o]] for o in ("4", "2", "'euler'")] == pytest.approx([1 / 3] * 3)
    assert [second[names[o]] for o in ("8", "None")] == pytest.approx([2 / 3, 1 / 3])
    assert second[-1] == 1.0


def test_slopes_are_differences_of_curves() -> None:
    space = SearchSpace(tuple(Decision(f"d{i:02d}", Choice((2, 4, 8))) for i in range(60)))
    encoder, middle = Encoder(space, None), Candidate.of({f"d{i:02d}": (2, 4, 8)[i % 3] for i in range(60)})
    weights = np.concatenate([np.linspace(0.0, a, 9) ** 2 for a in (1.0, 2.0, 0.5)])
    slopes = encoder.curve_slopes(encoder.rows([middle])[0], weights)
    of = dict(zip(encoder.layout.entries, slopes, strict=True))
    assert of["d00", 8] == of["d59", 8]  # one more of an option, wherever it is
    for name, old, new in (("d00", 2, 4), ("d01", 4, 8), ("d02", 8, 2)):
        before, after = encoder.curves(encoder.rows([middle, middle.replace({name: new})])) @ weights
        assert of[name, new] - of[name, old] == pytest.approx(after - before, rel=0.1, abs=1e-3)
    assert not encoder.curve_slopes(encoder.rows([middle])[0], np.zeros(0)).any()
