"""Span rules, plans and their text forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.attention.moa import read_plan
from autocomp.attention.plan import DENSE, AttentionPlan, Keep, LayerPlan, Rule, uniform
from autocomp.errors import SpaceError

RULES = st.builds(
    Rule, st.integers(-4096, 8192), st.sampled_from([0.0, 0.125, 0.3, 0.5, 1.0]), st.integers(0, 64)
)


@given(RULES, st.sampled_from([16, 8, 4]), st.sampled_from([16, 8, 4]))
def test_labels_read_back(rule: Rule, key: int, value: int) -> None:
    keep = Keep(rule, key, value)
    assert Keep.parse(keep.label) == keep and Rule.parse(rule.label) == rule


@given(RULES, st.integers(1, 10_000))
def test_a_span_is_the_rule_within_the_input(rule: Rule, tokens: int) -> None:
    span, window = rule.span(tokens), rule.window(tokens)
    if rule == DENSE:
        assert (span, window) == (tokens, 0)
        return
    assert window >= 1 and span == min(tokens, window + rule.sink)
    if rule.sink + 1 <= rule.alpha + rule.beta * tokens:
        assert window + rule.sink == pytest.approx(rule.alpha + rule.beta * tokens, abs=0.51)


def test_numbers_of_a_few_rules() -> None:
    assert Rule.parse("a512b0s16").span(4096) == 512 and Rule.parse("a512b0s16").span(100) == 100
    assert Rule.parse("a0b0.25s16").span(4096) == 1024
    assert Rule.parse("a-1024b0.5s64").span(2048) == 65, "a token sees itself beside the sink"
    assert DENSE.label == "dense" and Keep().label == "dense/k16v16" == Keep.parse("dense").label
    keep = Keep(DENSE, 8, 4)
    assert keep.token_bytes(64) == 64 + 8 + 32 + 8 and Keep().token_bytes(64) == 256


def test_plans_read_back_and_add_up() -> None:
    quarter = Rule(0, 0.25, 4)
    plan = AttentionPlan({0: LayerPlan((quarter, DENSE), 8, 4), 1: LayerPlan((DENSE, DENSE), window=128)})
    assert AttentionPlan.from_json(plan.to_json()) == plan and not plan.plain
    assert plan.density(1000) == pytest.approx((0.25 + 3) / 4)
    assert plan.layers[0].limits(1000) == [(246, 4), (0, 0)]
    assert plan.layers[1].limits(1000) == [(128, 0), (128, 0)]
    assert uniform(range(3), 2, Keep()).plain


def test_short_prompts_have_the_spans_of_the_shortest_profiled_length() -> None:
    layer = LayerPlan((Rule(0, 0.25, 4), DENSE), shortest=1000)
    assert layer.limits(40) == layer.limits(1000) == [(246, 4), (0, 0)]
    assert layer.limits(2000) == [(496, 4), (0, 0)]
    assert AttentionPlan.from_json(AttentionPlan({0: layer}).to_json()).layers[0] == layer


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Rule.parse("w512"), "a512b0s16"),
        (lambda: Keep.parse("dense/8"), "k8v4"),
        (lambda: Keep(DENSE, 3, 8), "got 3"),
        (lambda: Rule(0, 1.5, 0), "1.5"),
        (lambda: LayerPlan((Rule(9, 0.0, 1),), window=4), "window of its own"),
        (lambda: AttentionPlan.from_json({"0": {"rules": ["dense"]}}), "no attention plan"),
        (lambda: AttentionPlan.from_json([1]), "no attention plan"),  # type: ignore[arg-type]
    ],
)
def test_what_is_wrong_is_named(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SpaceError, match=says):
        make()


def test_published_plans_of_moa() -> None:
    """Two layers of four heads in the published form; heads that share keys take the widest."""
    data = {
        "alphas": [[0, 0, 1024, 0], [0, -1024, 0, 0]],
        "betas": [[0.5, 0.0, 0.125, 1.0], [0.25, 0.5, 0.25, 0.5]],
    }
    heads = read_plan(data, [(4, 1), (4, 1)])
    assert heads[0] == (Rule(64, 0.5, 64), Rule(64, 0.0, 64), Rule(1088, 0.125, 64), DENSE)
    shared = read_plan(data, [(2, 2), (2, 2)])
    # At 4096 tokens: 2112 against 64, all against 1600, 1088 twice (the steeper rule counts), 2112 twice.
    assert shared == [(Rule(64, 0.5, 64), DENSE), (Rule(-960, 0.5, 64), Rule(64, 0.5, 64))]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"alphas": [[0]]}, "'betas'"),
        ({"alphas": [[0, 0]], "betas": [[1, 1]]}, "for 1 layers .* this model has 2"),
        ({"alphas": [[0] * 3] * 2, "betas": [[1] * 3] * 2}, "3 alphas"),
        ({"alphas": [[0] * 4] * 2, "betas": [[1.5] * 4] * 2}, "beta from 0 to 1"),
        ({"alphas": [["x"] * 4] * 2, "betas": [[1] * 4] * 2}, "layer 0"),
    ],
)
def test_a_plan_of_another_model_is_refused(data: dict[str, object], says: str) -> None:
    with pytest.raises(SpaceError, match=says):
        read_plan(data, [(2, 2), (2, 2)])
