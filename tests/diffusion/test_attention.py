"""Attention plans of diffusion transformers: what each rule computes, what is held, who is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from autocomp.diffusion import attention
from autocomp.diffusion.attention_plan import FULL, ImageAttentionPlan, LayerPlan, Rule
from autocomp.diffusion.denoiser import Denoiser
from autocomp.diffusion.sampler import Sampler
from autocomp.diffusion.schedule import Schedule, Step, uniform_schedule, uniform_times
from autocomp.diffusion.state import state_of
from autocomp.errors import CapabilityError, SpaceError
from autocomp.kernels.attention_diffusion_reference import window_mask

HEADS, DIM, TOKENS = 3, 8, 16
PATHS = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "v_prediction"}
Tensor = torch.Tensor


@pytest.fixture(scope="module")
def model() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    made = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=2, num_attention_heads=HEADS,
        attention_head_dim=DIM, num_embeds_ada_norm=4, norm_num_groups=1,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for path in PATHS:
            made.get_submodule(path).to_q.weight.mul_(8)  # attention that is far from uniform
    return made


def sample(model: Any, steps: int = 6, *, guided: bool = True, rows: int = 2, **options: Any) -> Tensor:
    schedule = options.get("schedule") or uniform_schedule(uniform_times(steps))
    sampler = Sampler({"": Denoiser(model)}, CONFIG, schedule, 2.0 if guided else 1.0)
    noise = torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return sampler(noise, {"class_labels": torch.arange(rows)}, options.get("observe"))


def plan_of(rules: Mapping[str, list[list[str]]]) -> ImageAttentionPlan:
    return ImageAttentionPlan.from_json(rules)


def everywhere(rows: list[list[str]]) -> ImageAttentionPlan:
    return plan_of(dict.fromkeys(PATHS, rows))


class Plain:
    """The rules written down again, with nothing saved that could be computed anew."""

    def __init__(self, layer: LayerPlan, state: Any) -> None:
        self.layer, self.state = layer, state
        self.outputs: dict[int, Tensor] = {}
        self.last_full: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, attn: Attention, hidden_states: Tensor, **options: None) -> Tensor:
        x, step = hidden_states, self.state.index
        heads = attn.heads
        q, k, v = (f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        rules = self.layer.at(step, self.state.total)
        rules = rules * (heads // len(rules))
        out = torch.stack([self.head(h, rules[h], q[:, h], k[:, h], v[:, h]) for h in range(heads)], dim=1)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    def head(self, h: int, rule: Rule, *qkv: Tensor) -> Tensor:
        shared = rule.shared and self.state.guided
        if shared:
            qkv = tuple(self.first_half(t) for t in qkv)  # type: ignore[assignment]
        if rule.kind == "full" or self.state.index == 0:
            self.last_full[h] = qkv
            self.outputs[h] = attend(*qkv)
        elif rule.kind == "window":
            self.outputs[h] = attend(*qkv, window=rule.window)
            if rule.residual:
                then = self.last_full[h]
                residual = attend(*then) - attend(*then, window=rule.window)
                self.outputs[h] = self.outputs[h] + residual
            if shared:
                self.outputs[h] = self.first_half(self.outputs[h])
        return self.outputs[h]

    def first_half(self, x: Tensor) -> Tensor:
        return torch.cat([x[: len(x) // 2]] * 2)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if window is not None:
        scores = scores.masked_fill(~window_mask(torch.tensor([window]), 0, q.shape[1]), -torch.inf)
    return scores.softmax(-1) @ v


def expected(model: Any, plan: ImageAttentionPlan, **options: Any) -> Tensor:
    attention.remove(model)
    for path, layer in plan.layers.items():
        model.get_submodule(path).set_processor(Plain(layer, state_of(model)))
    try:
        return sample(model, **options)
    finally:
        for path in plan.layers:
            model.get_submodule(path).set_processor(AttnProcessor2_0())


def planned(model: Any, plan: ImageAttentionPlan, **options: Any) -> Tensor:
    attention.install(model, plan)
    try:
        return sample(model, **options)
    finally:
        attention.remove(model)


LABELS = ("full", "w2", "w5", "w2x", "reuse", "full/cfg", "w2/cfg", "w5/cfg", "w0x/cfg")


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("guided", [True, False])
def test_every_rule_computes_what_it_says(model: Any, label: str, guided: bool) -> None:
    plan = everywhere([["full"], [label], ["full"], [label]])
    found = planned(model, plan, steps=8, guided=guided)
    torch.testing.assert_close(found, expected(model, plan, steps=8, guided=guided), rtol=1e-4, atol=1e-4)
    differs = (found - sample(model, 8, guided=guided)).abs().max() > 1e-3
    assert differs == (label != "full" and not (label == "full/cfg" and not guided))


@pytest.mark.parametrize("seed", range(24))
def test_any_mixture_of_rules(model: Any, seed: int) -> None:
    """Rules that follow each other in any order, layers and heads apart, windows that change between full
    steps, halves that share in some heads only."""
    draw = random.Random(seed)
    rows = HEADS if seed % 3 else 1
    steps, guided = draw.choice([5, 8]), seed % 2 == 0
    labels = LABELS if seed % 4 else ("w2", "w5", "reuse", "w2/cfg", "reuse")
    plan = plan_of(
        {
            p: [[draw.choice(labels) for _ in range(rows)] for _ in range(draw.choice([4, steps]))]
            for p in PATHS
        }
    )
    found = planned(model, plan, steps=steps, guided=guided)
    wanted = expected(model, plan, steps=steps, guided=guided)
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


def test_a_plan_of_full_rules_is_the_model_bit_for_bit(model: Any) -> None:
    wanted = sample(model)
    plan = plan_of({PATHS[0]: [["full"]], PATHS[1]: [["full"], ["reuse"]]})
    attention.install(model, everywhere([["full"]] * 3))
    assert attention.installed(model) is None
    assert torch.equal(sample(model), wanted)
    # A processor of ours whose steps happen to be all full runs the same operations, too.
    attention.install(model, plan)
    found = attention.installed(model)
    assert found is not None and list(found.layers) == [PATHS[1]]
    with torch.no_grad():
        x, t = torch.randn(2, 1, 8, 8), torch.tensor([10, 10])
        state_of(model).index = 0
        here = model(x, t, class_labels=torch.tensor([0, 1])).sample
        attention.remove(model)
        assert torch.equal(model(x, t, class_labels=torch.tensor([0, 1])).sample, here)
    assert torch.equal(sample(model), wanted) and attention.installed(model) is None


def test_a_residual_makes_a_window_a_close_guess(model: Any) -> None:
    """The ablation of DiTFastAttn (section 4): a window without the residual is far worse."""
    dense = sample(model, 24)
    rows = [["full"], ["{}"], ["{}"], ["{}"]] * 6
    errors = {}
    for label in ("w2", "w2x"):
        plan = everywhere([[text[0].format(label)] for text in rows])
        errors[label] = float((planned(model, plan, steps=24) - dense).square().mean())
    assert errors["w2"] < 0.5 * errors["w2x"]


def test_a_new_sampling_another_batch_and_a_gap_void_what_is_held(model: Any) -> None:
    plan = everywhere([["full"], ["w2"], ["reuse"]])
    first = planned(model, plan)
    attention.install(model, plan)
    try:
        sample(model, rows=3)
        assert torch.equal(sample(model), first)
        state = state_of(model)
        with torch.no_grad():
            x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([10, 10]), torch.tensor([0, 1])
            dense = _dense(model, lambda: model(x, t, class_labels=y).sample)
            state.started += 1
            state.guided, state.total, state.index = False, 6, 4
            assert torch.equal(model(x, t, class_labels=y).sample, dense), "the first call is full"
            state.index = 5
            reused = model(x + 1, t, class_labels=y).sample
            state.index = 5
            again = model(x + 1, t, class_labels=y).sample
            assert not torch.equal(reused, again), "step 5 after step 5: nothing is known, full again"
    finally:
        attention.remove(model)


def _dense(model: Any, call: Callable[[], Tensor]) -> Tensor:
    plan = attention.installed(model)
    attention.remove(model)
    result = call()
    assert plan is not None
    attention.install(model, plan)
    return result


def test_guidance_in_some_steps_only(model: Any) -> None:
    """Where the doubled batch ends, earlier outputs don't fit: that step is full."""
    times = uniform_times(6)
    schedule = Schedule(tuple(Step(t, guidance=i < 3) for i, t in enumerate(times)))
    plan = everywhere([["full/cfg"], ["reuse"], ["reuse"], ["reuse"], ["w2"], ["w2"]])
    same = everywhere([["full/cfg"], ["reuse"], ["reuse"], ["full"], ["w2"], ["w2"]])
    found = planned(model, plan, schedule=schedule)
    torch.testing.assert_close(found, expected(model, same, schedule=schedule), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_held_bytes_are_those_that_are_held(model: Any, seed: int) -> None:
    draw = random.Random(seed)
    rows = HEADS if seed % 2 else 1
    plan = plan_of({p: [[draw.choice(LABELS) for _ in range(rows)] for _ in range(8)] for p in PATHS})
    seen: list[int] = []

    def look(*args: Any) -> None:
        tensors = [t for row in attention.resident_tensors(model).values() for t in row]
        seen.append(sum(t.untyped_storage().nbytes() for t in tensors))

    attention.install(model, plan)
    try:
        sample(model, 8, observe=look)
        assert not attention.resident_tensors(model), "nothing is needed after the last step"
    finally:
        attention.remove(model)
    shapes = dict.fromkeys(PATHS, (HEADS, DIM, TOKENS))
    assert max(seen) == plan.held_bytes(shapes, 8, 4, 4) > 0


def test_labels_and_plans_survive_json() -> None:
    for label in LABELS:
        assert Rule.parse(label).label == label
    plan = plan_of({"a": [["full"], ["w12/cfg"]], "b": [["w1x", "reuse"]]})
    assert plan_of(plan.to_json()) == plan
    assert plan.layers["b"].at(3, 9) == (Rule("window", 1), Rule("reuse"))
    assert [plan.layers["a"].at(i, 5)[0].label for i in range(5)] == ["full"] * 3 + ["w12/cfg"] * 2
    for wrong in ("w", "w-1", "reuse/cfg", "full/x", "half", "w3y", "full/", ""):
        with pytest.raises(SpaceError):
            Rule.parse(wrong)
    for data in ([1], {"a": []}, {"a": [[]]}, {"a": [["full"], ["full", "w1"], ["w1"] * 3]}, {"a": [[3]]}):
        with pytest.raises(SpaceError):
            ImageAttentionPlan.from_json(data)  # type: ignore[arg-type]
    assert plan_of({"a": [["full"]]}).plain and FULL.label == "full"


def test_a_full_step_saves_only_what_is_used() -> None:
    layer = plan_of({"a": [["full"], ["full"], ["w2"], ["reuse"], ["w5"], ["full"], ["w2x"], ["reuse"]]})
    actions = layer.layers["a"].actions(8)
    assert [a.saves for a in actions] == [((),), ((2, 5),), ((),), ((),), ((),), ((),), ((),), ((),)]
    assert [a.keep_output for a in actions] == [False, False, True, False, False, False, True, False]
    assert not actions[0].keep_heads and actions[0].dense and not actions[1].dense


def refused(**options: Any) -> str:
    return attention.refusal(Attention(query_dim=16, heads=2, dim_head=8, **options))


def test_modules_that_can_not_be_planned_are_refused_with_the_reason() -> None:
    assert not refused() and not refused(qk_norm="layer_norm", bias=True)
    assert "cross-attention" in refused(cross_attention_dim=8)
    assert "two sequences" in refused(added_kv_proj_dim=8, context_pre_only=False)
    assert "groups" in refused(norm_num_groups=4)
    assert "own input" in refused(residual_connection=True)
    assert "rescales" in refused(rescale_output_factor=2.0)
    assert "share keys" in refused(kv_heads=1)
    assert "scale" in refused(scale_qk=False)
    assert "AttnProcessor," in refused(processor=AttnProcessor())
    assert "Linear is no diffusers Attention" in attention.refusal(torch.nn.Linear(2, 2))


def test_plans_that_do_not_fit_the_model(model: Any) -> None:
    with pytest.raises(SpaceError, match="names 'nowhere'"):
        attention.install(model, plan_of({"nowhere": [["reuse"]]}))
    with pytest.raises(CapabilityError, match="Linear is no"):
        attention.install(model, plan_of({f"{PATHS[0]}.to_q": [["reuse"]]}))
    with pytest.raises(SpaceError, match="rules for 2 heads, and the module has 3"):
        attention.install(model, plan_of({PATHS[0]: [["reuse", "full"]]}))
    fitting, others = attention.find(model)
    assert list(fitting) == list(PATHS) and not others
    module = model.get_submodule(PATHS[0])
    attention.install(model, plan_of({PATHS[0]: [["w2"]]}))
    x = torch.randn(1, TOKENS, HEADS * DIM)
    for wrong in ({"encoder_hidden_states": x}, {"attention_mask": torch.ones(1, TOKENS)}):
        with pytest.raises(CapabilityError, match="leave this module out"):
            module(x, **wrong)
    attention.remove(model)
