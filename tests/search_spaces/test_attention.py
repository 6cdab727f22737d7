"""The space of spans and cache bits: decisions, exact costs, constraints, and what a choice does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from autocomp.attention import runtime
from autocomp.attention.plan import DENSE, Keep, Rule
from autocomp.errors import SpaceError
from autocomp.search_spaces.attention import Attention, AttentionConfig
from autocomp.search_spaces.base import ModelSite, Part, exact_tables
from autocomp.space import AtMostDistinct, Candidate, SearchSpace
from autocomp.testing.models import tiny_network
from autocomp.workloads.base import Built
from autocomp.workloads.discovery import discover


def site_of(kind: str = "llama", **facts: Any) -> ModelSite:
    return replace(discover(tiny_network(kind), "f"), **{"context": 1000, "batch": 2, **facts})


def space(**options: Any) -> Attention:
    return Attention(AttentionConfig(**options))


def test_a_decision_for_every_key_value_head() -> None:
    site = site_of()
    found = space(spans=["dense", 0.25, 100], kv_bits=[16, 8]).decisions(site)
    assert [d.name for d in found] == [
        f"attention/model.layers.{i}.self_attn.kv{g}" for i in (0, 1) for g in (0, 1)
    ]
    assert [d.block for d in found] == [0, 0, 1, 1]
    assert found[0].options == (
        "a100b0s16/k8v8", "a0b0.25s16/k8v8", "a100b0s16/k16v16", "a0b0.25s16/k16v16", "dense/k8v8",
        "dense/k16v16",
    ), "smallest first"  # fmt: skip
    layers = space(granularity="layer").decisions(site)
    assert [(d.name, len(d.sites)) for d in layers] == [
        ("attention/model.layers.0.self_attn", 2),
        ("attention/model.layers.1.self_attn", 2),
    ]
    assert [len(d.sites) for d in space(granularity="model").decisions(site)] == [4]
    assert len(space(granularity="head").decisions(site_of("gpt2"))) == 8


def test_rules_that_keep_the_same_at_all_lengths_are_one() -> None:
    site = site_of(lengths=(1000,), context=1000)
    options = space(spans=["dense", 0.5, 500, 2000, "a250b0.25s16"]).decisions(site)[0].options
    assert options == ("a0b0.5s16/k16v16", "dense/k16v16")
    longer = replace(site, context=4000)
    options = space(spans=["dense", 0.5, 500, 2000]).decisions(longer)[0].options
    assert [Keep.parse(str(o)).rule.span(4000) for o in options] == [500, 2000, 2000, 4000]


def test_auto_makes_rules_from_the_profiled_lengths() -> None:
    site = site_of(lengths=(1024, 2048), context=4096)
    rules = [Keep.parse(str(o)).rule for o in space(spans=["auto"]).decisions(site)[0].options]
    assert DENSE in rules and 12 <= len(rules) <= 25
    for rule in rules:
        if rule != DENSE:
            assert all(32 <= rule.span(n) < n for n in (1024, 2048, 4096)), rule
    spans = {tuple(r.span(n) for n in (1024, 2048, 4096)) for r in rules}
    assert len(spans) == len(rules)


def test_bytes_and_densities_are_exact() -> None:
    site = site_of()  # context 1000, batch 2, float32, 2 layers of 2 groups of 16 features
    s = space(spans=["dense", 0.25], key_bits=[16, 8], value_bits=[16, 4], lengths=[400])
    decisions = s.decisions(site)
    resources = {d.name: {o: s.resources(site, d, o, "cpu") for o in d.options} for d in decisions}
    tables = exact_tables(site, resources)
    names = [d.name for d in decisions]
    dense = Candidate.of(dict.fromkeys(names, "dense/k16v16"))
    mixed = dense.replace({names[0]: "a0b0.25s16/k16v16", names[2]: "dense/k8v4", names[3]: "dense/k8v4"})
    assert tables["kv_mb"].total(dense) == pytest.approx(4 * 2 * 1000 * 2 * 16 * 4 / 1e6)
    small = 2 * (250 * 128 + 1000 * 128 + 2 * 1000 * (16 + 8 + 8 + 8)) / 1e6
    assert tables["kv_mb"].total(mixed) == pytest.approx(small)
    weights = sum(p.numel() for p in tiny_network("llama").parameters()) * 4 / 1e6
    assert tables["memory_mb"].total(mixed) - small == pytest.approx(weights, rel=1e-3)
    assert tables["density"].total(mixed) == pytest.approx((0.25 + 3) / 4)
    assert tables["density_400"].total(mixed) == pytest.approx((0.25 + 3) / 4)
    assert "avg_bits" not in tables


def test_a_layer_has_one_layout_and_few_rules() -> None:
    site = site_of("gpt2")
    s = space(spans=["dense", 0.5, 0.25], kv_bits=[16, 8], rules_per_layer=2)
    decisions = s.decisions(site)
    found = s.constraints(site, decisions)
    assert found[:2] == [
        AtMostDistinct(tuple(d.name for d in decisions[:4]), 1, field=1),
        AtMostDistinct(tuple(d.name for d in decisions[:4]), 2, field=0),
    ]
    full = SearchSpace(tuple(decisions), tuple(found))
    names = [d.name for d in decisions]
    dense = Candidate.of(dict.fromkeys(names, "dense/k8v8"))
    assert not full.violations(dense)
    assert full.violations(dense.replace({names[0]: "dense/k16v16"}))
    two = dense.replace({names[0]: "a0b0.5s16/k8v8", names[1]: "a0b0.5s16/k8v8"})
    assert not full.violations(two)
    assert full.violations(two.replace({names[2]: "a0b0.25s16/k8v8"}))
    assert not space(spans=["dense", 0.5], rules_per_layer=0).constraints(site, decisions)


def test_baselines_are_uniform_windows_and_uniform_bits() -> None:
    site = site_of()
    s = space(spans=["dense", 0.25], kv_bits=[16, 8, 4])
    decisions = s.decisions(site)
    found = {next(iter(set(c.values.values()))) for c in s.baselines(site, decisions)}
    assert found == {"dense/k16v16", "a0b0.25s16/k16v16", "dense/k8v8", "dense/k4v4"}
    assert s.neutral(decisions[0]) == "dense/k16v16"


def test_layers_with_a_window_of_their_own_keep_it() -> None:
    parts = tuple(
        Part(f"m.{i}.attn.kv0", "kv_group", (2, 16), i, f"m.{i}.attn", "attention", window=w)
        for i, w in enumerate((128, 0))
    )
    site = ModelSite("mistral", (), 0, "f", context=1000, kv_groups=parts)
    s = space(spans=["dense", 0.5], kv_bits=[16, 8])
    own, free = s.decisions(site)
    assert own.options == ("dense/k8v8", "dense/k16v16") and len(free.options) == 4
    assert s.resources(site, own, "dense/k16v16", "cpu").metrics["kv_mb"] == pytest.approx(
        128 * 2 * 16 * 2 / 1e6
    )
    uniform = s.baselines(site, [own, free])
    assert {own.name: "dense/k16v16", free.name: "a0b0.5s16/k16v16"} in [c.values for c in uniform]


def test_applying_and_undoing(tmp_path: Path) -> None:
    model = tiny_network("llama")
    site = replace(discover(model, "f"), context=64)
    s = space(spans=["dense", 0.25], sink=2)
    built = Built(model, site, "cpu", state={"decisions": {"attention": s.decisions(site)}})
    ids = torch.arange(40)[None] + 5
    names = [d.name for d in s.decisions(site)]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        s.apply(built, {names[0]: "a0b0.25s2/k16v16"}, serving=False)
        assert not built.pristine
        changed = model(input_ids=ids, use_cache=False).logits
        s.apply(built, {}, serving=False)
        assert built.pristine
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before, rtol=1e-4, atol=1e-4)
        s.apply(built, {}, serving=True)
        assert runtime.installed(model) is None and torch.equal(model(input_ids=ids).logits, before)
    assert (changed - before).abs().max() > 1e-2


def test_a_published_plan_becomes_options_and_a_baseline(tmp_path: Path) -> None:
    file = tmp_path / "moa.json"
    file.write_text(json.dumps({"alphas": [[0, 0], [128, 0]], "betas": [[0.5, 1], [0, 0.25]]}))
    site = site_of()
    s = space(spans=["dense"], moa_plan=str(file))
    decisions = s.decisions(site)
    plan = s.baselines(site, decisions)[-1]
    assert [Keep.parse(str(plan[d.name])).rule for d in decisions] == [
        Rule(64, 0.5, 64), DENSE, Rule(192, 0.0, 64), Rule(64, 0.25, 64),
    ]  # fmt: skip
    file.write_text("{}")
    with pytest.raises(SpaceError, match="alphas"):
        s.decisions(site)
    file.unlink()
    with pytest.raises(SpaceError, match=r"moa\.json"):
        s.decisions(site)


def test_models_and_settings_that_do_not_fit() -> None:
    with pytest.raises(SpaceError, match="soft-capped"):
        space().decisions(site_of("gemma2"))
    with pytest.raises(SpaceError, match="2 query heads share one"):
        space(granularity="head").decisions(site_of())
    with pytest.raises(SpaceError, match=r"attention\.context"):
        space().decisions(site_of(context=0))
    for wrong in ({"spans": []}, {"spans": [0]}, {"spans": [1.5]}, {"spans": ["w3"]}, {"kv_bits": [3]}):
        with pytest.raises((ValidationError, SpaceError)):
            space(**wrong)
