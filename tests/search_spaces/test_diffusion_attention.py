"""The space of attention rules: decisions, what options cost, what a choice does to the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from pydantic import ValidationError

from autocomp.diffusion import attention
from autocomp.diffusion.attention_plan import ImageAttentionPlan
from autocomp.diffusion.schedule import uniform_schedule, uniform_times
from autocomp.errors import SpaceError
from autocomp.kernels.attention import attention_window_residual
from autocomp.measure.op_table import ImageAttentionOperation, parse_op_key, time_op
from autocomp.search_spaces.base import ModelSite, Part, exact_tables
from autocomp.search_spaces.diffusion_attention import DiffusionAttention, DiffusionAttentionConfig
from autocomp.space import Candidate
from autocomp.workloads.base import Built

PATHS = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
SITE = ModelSite(
    "dit", (), 0, "f", itemsize=4, steps=10, guided=True,
    image_attention=tuple(
        Part(p, "image_attention", (2, 8, 16), i, p, "attention") for i, p in enumerate(PATHS)
    ),
)  # fmt: skip


def space(**options: Any) -> DiffusionAttention:
    return DiffusionAttention(DiffusionAttentionConfig(**options))


def built(s: DiffusionAttention, site: ModelSite = SITE, steps: int = 10) -> Built:
    model = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=4, norm_num_groups=1,
    )  # fmt: skip
    state = {"decisions": {s.name: s.decisions(site)}, "schedule": uniform_schedule(uniform_times(steps))}
    return Built(model, site, "cpu", state=state)


def labels(plan: ImageAttentionPlan | None) -> dict[str, Any]:
    return {} if plan is None else plan.to_json()


def test_a_decision_for_every_layer_and_range() -> None:
    found = space().decisions(SITE)
    assert [d.name for d in found[:4]] == [f"diffusion_attention/{PATHS[0]}.{r}" for r in range(4)]
    assert len(found) == 8 and [d.block for d in found] == [0] * 4 + [1] * 4
    assert found[0].options == ("reuse", "w1/cfg", "w2/cfg", "w1", "w2", "full/cfg", "full"), (
        "least work first"
    )
    free = space().decisions(replace(SITE, guided=False))
    assert free[0].options == ("reuse", "w1", "w2", "full")
    assert space(options=["w3x"]).decisions(SITE)[0].options == ("w3x", "full")
    assert [d.sites for d in space(layers=["blocks.1"], ranges=1).decisions(SITE)] == [(PATHS[1],)]


def test_the_first_step_alone_has_no_decision() -> None:
    found = space(ranges="step").decisions(SITE)
    assert len(found) == 18 and found[0].name.endswith(".1") and found[8].name.endswith("attn1.9")
    heads = space(ranges="step", granularity="head", layers=["blocks.0"]).decisions(SITE)
    assert [d.name for d in heads[:2]] == [f"diffusion_attention/{PATHS[0]}.1.h{h}" for h in (0, 1)]


def test_what_options_cost() -> None:
    s = space(options=["reuse", "w2", "w2/cfg"])
    decisions = s.decisions(SITE)
    rows = {d.name: {o: s.resources(SITE, d, o, "cpu") for o in d.options} for d in decisions}
    first, second = rows[decisions[0].name], rows[decisions[1].name]
    # Steps 0 to 2 and 3 to 4 of 10; the very first is full. A window of 2 has 5 tokens, 3 and 4 at the ends.
    pairs = (16 * 5 - 2 * (2 + 1)) / 256
    assert first["w2"].metrics["attention_share"] == pytest.approx((1 + 2 * pairs) / 20)
    assert second["w2/cfg"].metrics["attention_share"] == pytest.approx(2 * pairs / 2 / 20)
    assert first["reuse"].metrics["attention_share"] == pytest.approx(1 / 20)
    assert first["reuse"].ops == pytest.approx(
        {"image_attention/16x2x8x16/full": 0.1, "image_attention/16x2x8x16/reuse": 0.2}
    )
    assert second["full"].ops == pytest.approx({"image_attention/16x2x8x16/full": 0.2})
    table = exact_tables(SITE, rows)["attention_share"]
    assert table.total(Candidate.of({d.name: "full" for d in decisions})) == pytest.approx(1)
    heads = space(granularity="head")
    share = [
        heads.resources(SITE, d, "full", "cpu").metrics["attention_share"] for d in heads.decisions(SITE)
    ]
    assert sum(share) == pytest.approx(1) and len(share) == 16


def test_only_what_a_kernel_runs_counts_as_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    s = space(options=["reuse", "w2", "full/cfg"])
    decision = s.decisions(SITE)[1]
    q, one = torch.zeros(1, 1, 4, 8), torch.ones(1, dtype=torch.int32)
    backend = attention_window_residual.choose(q, q, q, one, 0, None, one)
    found = s.resources(SITE, decision, "w2", "cpu")
    assert found.executes == ("" if backend == "reference" else backend)
    monkeypatch.setattr(attention_window_residual, "implementations", [])
    found = s.resources(SITE, decision, "w2", "cpu")
    assert not found.executes and "offer 'reuse'" in found.reason
    assert all(s.resources(SITE, decision, o, "cpu").executes for o in ("reuse", "full", "full/cfg"))


def test_choices_become_a_plan_and_are_undone() -> None:
    s = space(options=["reuse", "w2", "full/cfg"])
    b = built(s)
    names = [d.name for d in s.decisions(SITE)]
    s.apply(b, {names[1]: "w2", names[3]: "reuse"}, serving=True)
    assert labels(attention.installed(b.model)) == {PATHS[0]: [["full"], ["w2"], ["full"], ["reuse"]]}
    assert b.changed == {"diffusion_attention"}
    s.apply(b, {names[4]: "full/cfg"}, serving=False)
    assert labels(attention.installed(b.model)) == {PATHS[1]: [["full/cfg"], ["full"], ["full"], ["full"]]}
    s.apply(b, dict.fromkeys(names, "full"), serving=False)
    assert attention.installed(b.model) is None and b.pristine


def test_heads_and_steps_have_choices_of_their_own() -> None:
    s = space(ranges="step", granularity="head", options=["reuse", "w2"])
    b = built(s)
    s.apply(b, {f"diffusion_attention/{PATHS[1]}.3.h1": "w2"}, serving=False)
    rows = labels(attention.installed(b.model))[PATHS[1]]
    assert len(rows) == 10 and rows[3] == ["full", "w2"] and rows[2] == ["full", "full"]
    b.state["schedule"] = uniform_schedule(uniform_times(5))
    with pytest.raises(SpaceError, match="needs the schedule of 10 steps, and the one in force has 5"):
        s.apply(b, {f"diffusion_attention/{PATHS[1]}.3.h1": "reuse"}, serving=False)


def test_models_and_settings_that_do_not_fit() -> None:
    with pytest.raises(SpaceError, match="it joins two sequences"):
        space().decisions(
            replace(SITE, image_attention=(), lacking={"image_attention": "it joins two sequences"})
        )
    with pytest.raises(SpaceError, match="4 ranges of 3 steps"):
        space().decisions(replace(SITE, steps=3))
    with pytest.raises(SpaceError, match="steps are not guided"):
        space(options=["full/cfg"]).decisions(replace(SITE, guided=False))
    with pytest.raises(SpaceError, match="'attn2'"):
        space(layers=["attn2"]).decisions(SITE)
    for wrong in ({"options": ["half"]}, {"ranges": 0}, {"ranges": "all"}, {"granularity": "block"}):
        with pytest.raises((ValidationError, SpaceError)):
            space(**wrong)


@pytest.mark.parametrize("rule", ["full", "w2", "w2x", "reuse", "full/cfg"])
def test_every_option_can_be_timed(rule: str) -> None:
    key = f"image_attention/16x2x8x16/{rule}"
    assert parse_op_key(key).key == key
    assert time_op(key, 2, torch.float32, repeats=3).median_ms > 0


JOINT = ModelSite(
    "sd3", (), 0, "f", itemsize=4, steps=4, guided=True,
    image_attention=(
        Part("a", "image_attention", (2, 8, 16, 4), 0, "a", "joint"),
        Part("b", "image_attention", (2, 8, 16), 0, "b", "attention"),
    ),
)  # fmt: skip


def test_a_joint_text_is_looked_at_in_full() -> None:
    s = space(options=["reuse", "w2", "w15", "w99"], ranges=2)
    joint, alone = (s.decisions(JOINT)[i] for i in (1, 3))
    assert (joint.sites, alone.sites) == (("a",), ("b",))
    assert space().decisions(JOINT)[0].options[1] == "w1/cfg", "shares of the image's tokens"
    rows = {d.name: {o: s.resources(JOINT, d, o, "cpu") for o in d.options} for d in s.decisions(JOINT)}
    # All pairs: 20 x 20 and 16 x 16 tokens. A window of 2 leaves 74 pairs of the image, the text's stay.
    every, near = 20**2 + 16**2, 16 * 5 - 2 * 3
    share = {o: found.metrics["attention_share"] for o, found in rows[joint.name].items()}
    assert share["w2"] == pytest.approx(0.5 * (20**2 - 16**2 + near) / every)
    assert share["w15"] == share["w99"] == share["full"] == pytest.approx(0.5 * 20**2 / every)
    assert rows[alone.name]["w2"].metrics["attention_share"] == pytest.approx(0.5 * near / every)
    table = exact_tables(JOINT, rows)["attention_share"]
    assert table.total(Candidate.of({d.name: "full" for d in s.decisions(JOINT)})) == pytest.approx(1)
    assert set(rows[joint.name]["w2"].ops) == {"image_attention/16+4x2x8x16/joint/w2"}
    assert set(rows[alone.name]["w2"].ops) == {"image_attention/16x2x8x16/w2"}


@pytest.mark.parametrize("form", ["joint", "flux", "flux_single"])
@pytest.mark.parametrize("rule", ["full", "w2", "reuse", "full/cfg", "w2x/cfg"])
def test_joint_attention_can_be_timed(form: str, rule: str) -> None:
    key = f"image_attention/16+4x2x8x16/{form}/{rule}"
    op = parse_op_key(key)
    assert isinstance(op, ImageAttentionOperation)
    assert (op.key, op.text, op.form, op.rule.label) == (key, 4, form, rule)
    assert time_op(key, 2, torch.float32, repeats=3).median_ms > 0


def test_keys_that_are_none() -> None:
    for wrong in (
        "image_attention/16x2x8/full", "image_attention/0x2x8x16/full",
        "image_attention/16+0x2x8x16/joint/w2",
        "image_attention/16+4x2x8x16/w2", "image_attention/16x2x8x16/flux/w2",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="image_attention/196x2x32x64"):
            parse_op_key(wrong)
    with pytest.raises(SpaceError, match="no attention rule"):
        parse_op_key("image_attention/16x2x8x16/most")
    with pytest.raises(ValueError, match="3 rows have none"):
        time_op("image_attention/16x2x8x16/full/cfg", 3)


def test_rows_of_a_linear_are_in_its_key() -> None:
    key = "linear/16x32/w8@9"
    operation = parse_op_key(key)
    assert operation.key == key and getattr(operation, "rows", 0) == 9
    assert time_op(key, 2, torch.float32, repeats=3).median_ms > 0
