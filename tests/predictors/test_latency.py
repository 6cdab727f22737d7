"""Latency as a sum of kernel times."""

from __future__ import annotations

import math

import pytest

from autocomp.description import Description
from autocomp.predictors.latency import kernel_share, latency_table, operation_keys, rebase
from autocomp.profile import ProfileResult
from autocomp.search_spaces.base import ModelSite, Resources
from autocomp.space import Candidate, Choice, Decision, SearchSpace

OPTIONS = ("w4", "w8", "w16")


def described(**without: str) -> Description:
    """``attention`` calls one kernel three times and another once, ``embedding`` none; ``without`` names
    options that nothing executes."""

    def resources(name: str, option: str) -> Resources:
        ops = {f"square/{option}": 3, f"tall/{option}": 1} if name == "attention" else {}
        dead = without.get(name) == option
        return Resources({}, ops, "" if dead else "torch", "no kernel" if dead else "")

    names = ("attention", "embedding")
    decisions = tuple(Decision(n, Choice(OPTIONS, ordered=True)) for n in names)
    return Description(
        site=ModelSite("fake", (), 0, "f"),
        space=SearchSpace(decisions),
        baselines=tuple(Candidate.of(dict.fromkeys(names, o)) for o in reversed(OPTIONS)),
        exact={},
        resources={n: {o: resources(n, o) for o in OPTIONS} for n in names},
        metrics={"decode_ms": True},
        timing=("decode_ms",),
    )


def times(**ms: float) -> ProfileResult:
    """Four samples a kernel call, two at 10 % below and two at 10 % above the given mean."""
    samples = {op.replace("_", "/"): [0.9 * t, 0.9 * t, 1.1 * t, 1.1 * t] for op, t in ms.items()}
    rows = {op: {"decode_ms": (4, sum(s), sum(x * x for x in s))} for op, s in samples.items()}
    return ProfileResult("operations", rows)  # type: ignore[arg-type]


TIMES = times(square_w4=1.0, tall_w4=2.0, square_w8=1.5, tall_w8=2.5, square_w16=4.0, tall_w16=5.0)


def test_every_executed_kernel_is_wanted_once() -> None:
    assert operation_keys(described()) == sorted(f"{k}/{o}" for k in ("square", "tall") for o in OPTIONS)
    assert "tall/w4" not in operation_keys(described(attention="w4"))


def test_options_cost_the_sum_of_their_calls_with_its_noise() -> None:
    table = latency_table(described(), TIMES, "decode_ms")
    assert table.costs["attention"] == pytest.approx({"w4": 5.0, "w8": 7.0, "w16": 17.0})
    assert table.costs["embedding"] == dict.fromkeys(OPTIONS, 0.0) and table.base == 0.0
    # Standard error of a mean of four samples with a deviation of 10 % of t: 0.1 t / sqrt(3).
    assert table.stderr["attention"]["w4"] == pytest.approx(math.hypot(3 * 0.1, 0.2) / math.sqrt(3))


def test_the_base_makes_the_uncompressed_model_right() -> None:
    table = latency_table(described(), TIMES, "decode_ms", measured_base=20.0)
    assert table.base == pytest.approx(3.0) and table.total(described().baselines[0]) == pytest.approx(20.0)
    again = rebase(table, described(), 30.0)
    assert again.total(described().baselines[0]) == pytest.approx(30.0)
    assert again.costs == table.costs
    assert kernel_share(again, described(), {"decode_ms": 30.0}) == pytest.approx(17 / 30)
    assert kernel_share(again, described(), {}) == 0.0


def test_options_without_a_time_are_left_out() -> None:
    table = latency_table(described(attention="w4"), TIMES, "decode_ms")
    assert set(table.costs["attention"]) == {"w8", "w16"}
    partly = latency_table(described(), times(square_w8=1.0, tall_w8=2.0, square_w16=3.0), "decode_ms")
    assert set(partly.costs["attention"]) == {"w8"}
    assert latency_table(described(), TIMES, "prefill_ms").costs["embedding"] == dict.fromkeys(OPTIONS, 0.0)
    assert "attention" not in latency_table(described(), TIMES, "prefill_ms").costs


def test_a_baseline_without_a_time_leaves_the_base_alone() -> None:
    table = latency_table(described(attention="w16"), TIMES, "decode_ms", measured_base=20.0)
    assert table.base == 0.0 and math.isfinite(
        table.total(Candidate.of({"attention": "w8", "embedding": "w8"}))
    )
