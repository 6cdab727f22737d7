"""Attention plans where text and image are one sequence: SD3's blocks, Flux's double and single ones."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch

from autocomp.diffusion import attention
from autocomp.diffusion.attention_forms import FORMS, Inputs
from autocomp.diffusion.attention_plan import FULL, ImageAttentionPlan, LayerPlan, Rule
from autocomp.diffusion.attention_processor import PlannedAttention
from autocomp.diffusion.denoiser import Denoiser
from autocomp.diffusion.sampler import Sampler
from autocomp.diffusion.schedule import uniform_schedule, uniform_times
from autocomp.diffusion.state import SamplingState, state_of
from autocomp.errors import CapabilityError
from autocomp.testing.diffusion import POOLED_WIDTH, TEXT_WIDTH, tiny_flux, tiny_sd3

Tensor = torch.Tensor
CONFIG = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
HEADS, DIM, IMAGE, TEXT = 3, 16, 16, 5
SDPA = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Family:
    """A tiny model, the paths of its attention modules and their forms."""

    model: Any
    forms: Mapping[str, str]

    @property
    def guided(self) -> bool:
        return "joint" in self.forms.values()


def make(name: str) -> Family:
    if name == "flux":
        model: Any = tiny_flux(heads=HEADS)
        forms = {
            "transformer_blocks.0.attn": "flux", "single_transformer_blocks.0.attn": "flux_single",
            "single_transformer_blocks.1.attn": "flux_single",
        }  # fmt: skip
    else:
        new = name == "sd35"  # queries and keys normalized, one block with attention of the image alone
        model = tiny_sd3(heads=HEADS, dual=new, rms=new)
        forms = {"transformer_blocks.0.attn": "joint", "transformer_blocks.1.attn": "joint"}
        forms |= {"transformer_blocks.0.attn2": "attention"} if new else {}
    with torch.no_grad():
        for path in forms:  # attention that is far from uniform, and outputs that show it
            module = model.get_submodule(path)
            for part in ("to_q", "add_q_proj"):
                layer = getattr(module, part, None)
                if layer is not None:
                    layer.weight.mul_(6)
            for norm in ("norm_q", "norm_added_q"):
                if getattr(module, norm, None) is not None:
                    getattr(module, norm).weight.mul_(4)
    return Family(model.requires_grad_(False), forms)


@pytest.fixture(scope="module", params=["sd3", "sd35", "flux"])
def family(request: pytest.FixtureRequest) -> Family:
    return make(request.param)


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "family" in request.fixturenames:
        attention.remove(request.getfixturevalue("family").model)


def sample(family: Family, steps: int = 6, *, guided: bool | None = None, **options: Any) -> Tensor:
    guided = family.guided if guided is None else guided
    schedule = uniform_schedule(uniform_times(steps))
    denoiser = Denoiser(family.model, (8, 8))
    sampler = Sampler({"": denoiser}, CONFIG, schedule, 3.0 if guided else 1.0)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 1, 8, 8, generator=generator)
    conditions = {
        name: torch.randn(rows, *shape, generator=generator)
        for name, rows, shape in (
            ("encoder_hidden_states", 2, (TEXT, TEXT_WIDTH)), ("pooled_projections", 2, (POOLED_WIDTH,)),
            ("null_encoder_hidden_states", 1, (TEXT, TEXT_WIDTH)),
            ("null_pooled_projections", 1, (POOLED_WIDTH,)),
        )
    }  # fmt: skip
    return sampler(noise, conditions, options.get("observe"))


class Stock:
    """The stock processor, with the softmax in its middle replaced by the rules, written down again with
    nothing saved that could be computed anew."""

    def __init__(self, layer: LayerPlan, state: SamplingState, form: str, former: Any) -> None:
        self.layer, self.state, self.former = layer, state, former
        self.text = 0 if form == "attention" else TEXT
        self.text_first = form != "joint"
        self.outputs: dict[int, Tensor] = {}
        self.last_full: dict[int, list[Tensor]] = {}

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None, image_rotary_emb: Any = None,
    ) -> Any:  # fmt: skip
        more = {} if image_rotary_emb is None else {"image_rotary_emb": image_rotary_emb}
        with patch.object(torch.nn.functional, "scaled_dot_product_attention", self.attend):
            return self.former(attn, hidden_states, encoder_hidden_states, **more)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        heads = query.shape[1]
        rules = self.layer.at(self.state.index, self.state.total)
        rules = rules * (heads // len(rules))
        rows = [self.head(h, rules[h], query[:, h], key[:, h], value[:, h]) for h in range(heads)]
        return torch.stack(rows, dim=1)

    def head(self, h: int, rule: Rule, *qkv: Tensor) -> Tensor:
        parts = list(qkv)
        if rule.shared and self.state.guided:
            parts = [torch.cat([t[: len(t) // 2]] * 2) for t in parts]
        if rule.kind == "full" or self.state.index == 0:
            self.last_full[h] = parts
            self.outputs[h] = SDPA(*parts)
        elif rule.kind == "window":
            self.outputs[h] = self.near(parts, rule.window)
            if rule.residual:
                then = self.last_full[h]
                residual = SDPA(*then) - self.near(then, rule.window)
                if rule.shared and self.state.guided:
                    residual = torch.cat([residual[: len(residual) // 2]] * 2)
                self.outputs[h] = self.outputs[h] + residual
        return self.outputs[h]

    def near(self, parts: list[Tensor], window: int) -> Tensor:
        """Attention under the arrow, in the module's own order of tokens."""
        place = torch.arange(parts[0].shape[1])
        text = place < self.text if self.text_first else place >= len(place) - self.text
        seen = (place - place[:, None]).abs() <= window
        return SDPA(*parts, attn_mask=seen | text | text[:, None])


def expected(family: Family, plan: ImageAttentionPlan, **options: Any) -> Tensor:
    formers = {}
    for path, layer in plan.layers.items():
        module = family.model.get_submodule(path)
        formers[path] = module.processor
        module.set_processor(Stock(layer, state_of(family.model), family.forms[path], module.processor))
    try:
        return sample(family, **options)
    finally:
        for path, former in formers.items():
            family.model.get_submodule(path).set_processor(former)


def planned(family: Family, plan: ImageAttentionPlan, **options: Any) -> Tensor:
    attention.install(family.model, plan)
    try:
        return sample(family, **options)
    finally:
        attention.remove(family.model)


def everywhere(family: Family, rows: list[list[str]]) -> ImageAttentionPlan:
    return ImageAttentionPlan.from_json(dict.fromkeys(family.forms, rows))


LABELS = ("full", "w2", "w4", "w2x", "reuse", "full/cfg", "w2/cfg", "w0x/cfg")


@pytest.mark.parametrize("label", LABELS)
def test_every_rule_computes_what_it_says(family: Family, label: str) -> None:
    plan = everywhere(family, [["full"], [label], ["full"], [label]])
    found = planned(family, plan, steps=8)
    torch.testing.assert_close(found, expected(family, plan, steps=8), rtol=1e-4, atol=1e-4)
    changed = label != "full" and (family.guided or label != "full/cfg")
    assert ((found - sample(family, 8)).abs().max() > 1e-3) == changed


@pytest.mark.parametrize("seed", range(8))
def test_any_mixture_of_rules(family: Family, seed: int) -> None:
    """Rules in any order, layers and heads apart, halves that share in some heads only."""
    draw = random.Random(seed)
    rows, steps = HEADS if seed % 3 else 1, draw.choice([5, 8])
    plan = ImageAttentionPlan.from_json(
        {
            path: [[draw.choice(LABELS) for _ in range(rows)] for _ in range(draw.choice([4, steps]))]
            for path in family.forms
        }
    )
    found, wanted = planned(family, plan, steps=steps), expected(family, plan, steps=steps)
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


def test_full_rules_give_the_stock_processors_numbers_bit_for_bit(family: Family) -> None:
    """Even through our processor, where the plan has full steps that save nothing."""
    wanted = sample(family)
    state = state_of(family.model)
    attention.install(family.model, everywhere(family, [["full"]] * 3))
    assert attention.installed(family.model) is None, "the modules stay as they are"
    for path, form in family.forms.items():
        module = family.model.get_submodule(path)
        full = LayerPlan(((FULL,),))
        module.set_processor(PlannedAttention(full, module.heads, state, module.processor, FORMS[form]))
    plan = attention.installed(family.model)
    assert plan is not None and set(plan.layers) == set(family.forms)
    assert torch.equal(sample(family), wanted)
    attention.remove(family.model)
    kinds = {type(family.model.get_submodule(p).processor).__name__ for p in family.forms}
    assert kinds <= {"JointAttnProcessor2_0", "FluxAttnProcessor"}
    assert torch.equal(sample(family), wanted)


def called(family: Family, path: str) -> tuple[Any, dict[str, Any]]:
    """A module and the arguments that a call of the model gives it."""
    module = family.model.get_submodule(path)
    seen: list[dict[str, Any]] = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(dict(kwargs))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    sample(family, 1)
    handle.remove()
    return module, seen[0]


def split(family: Family, path: str, output: Any) -> tuple[Tensor, Tensor]:
    """Image and text rows of a module's output."""
    if isinstance(output, tuple):
        return output
    text = TEXT if family.forms[path] == "flux_single" else 0
    return output[:, text:], output[:, :text]


def steps_of(family: Family, path: str, labels: list[str]) -> list[tuple[Tensor, Tensor]]:
    """The module's outputs at steps with these rules, called with the same inputs each time."""
    module, inputs = called(family, path)
    attention.install(family.model, ImageAttentionPlan.from_json({path: [[label] for label in labels]}))
    state = state_of(family.model)
    state.started, state.total = state.started + 1, len(labels)
    found = []
    for state.index in range(len(labels)):
        found.append(split(family, path, module(**inputs)))
    attention.remove(family.model)
    return found


def test_a_window_is_exact_where_its_residual_was_refreshed(family: Family) -> None:
    """With the inputs of the last full step, window and residual add up to full attention."""
    for path in family.forms:
        full, near, bare = steps_of(family, path, ["full", "w2", "w2x"])
        torch.testing.assert_close(near[0], full[0], rtol=1e-5, atol=1e-5)
        assert (bare[0] - full[0]).abs().max() > 1e-3


def test_a_window_over_all_tokens_is_full_attention(family: Family) -> None:
    for path in family.forms:
        full, *wide = steps_of(family, path, ["full", f"w{IMAGE - 1}x", f"w{9 * IMAGE}x"])
        for row in wide:
            torch.testing.assert_close(row[0], full[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(row[1], full[1], rtol=1e-5, atol=1e-5)


def test_the_text_sees_all_under_every_window(family: Family) -> None:
    for path, form in family.forms.items():
        full, bare, near = steps_of(family, path, ["full", "w0x", "w1"])
        assert full[1].shape[1] == (0 if form == "attention" else TEXT)
        torch.testing.assert_close(bare[1], full[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(near[1], full[1], rtol=1e-5, atol=1e-5)


def test_the_image_sees_the_text_under_every_window(family: Family) -> None:
    """Other values of the text move every token of the image even where it sees nothing else."""
    for path, form in family.forms.items():
        if form == "attention":
            continue
        module, inputs = called(family, path)
        other = dict(inputs)
        if form == "flux_single":
            other["hidden_states"] = inputs["hidden_states"].clone()
            other["hidden_states"][:, :TEXT] += 1.0
        else:
            other["encoder_hidden_states"] = inputs["encoder_hidden_states"] + 1.0
        attention.install(family.model, ImageAttentionPlan.from_json({path: [["full"], ["w0x"]]}))
        state, images = state_of(family.model), []
        for given in (inputs, other):
            state.started, state.total = state.started + 1, 2
            for state.index in range(2):
                found = module(**given)
            images.append(split(family, path, found)[0])
        attention.remove(family.model)
        assert ((images[0] - images[1]).abs().amax(-1) > 1e-5).all()


@pytest.mark.parametrize("seed", range(4))
def test_held_bytes_are_those_that_are_held(family: Family, seed: int) -> None:
    draw = random.Random(seed)
    rows = HEADS if seed % 2 else 1
    plan = ImageAttentionPlan.from_json(
        {p: [[draw.choice(LABELS) for _ in range(rows)] for _ in range(8)] for p in family.forms}
    )
    seen: list[int] = []

    def look(*args: Any) -> None:
        tensors = [t for row in attention.resident_tensors(family.model).values() for t in row]
        seen.append(sum(t.untyped_storage().nbytes() for t in tensors))

    attention.install(family.model, plan)
    sample(family, 8, observe=look)
    assert not attention.resident_tensors(family.model), "nothing is needed after the last step"
    shapes = {
        p: (HEADS, DIM, IMAGE + (TEXT if form != "attention" else 0)) for p, form in family.forms.items()
    }
    told = plan.held_bytes(shapes, 8, 4 if family.guided else 2, 4)
    if family.guided:
        assert max(seen) == told > 0
    else:  # an output of a single-stream module can share its storage with its heads' outputs
        assert 0 < max(seen) <= told


def test_a_single_stream_module_must_be_told_where_the_text_ends() -> None:
    family = make("flux")
    path = "single_transformer_blocks.0.attn"
    module, inputs = called(family, path)
    attention.install(family.model, ImageAttentionPlan.from_json({path: [["full"], ["w2"]]}))
    state_of(family.model).text = 0
    with pytest.raises(CapabilityError, match="through autocomp's Denoiser"):
        module(**inputs)
    with pytest.raises(CapabilityError, match="a mask"):
        module(**inputs, attention_mask=torch.ones(2, TEXT + IMAGE))


def test_modules_that_can_not_be_planned_are_refused_with_the_reason() -> None:
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
    from diffusers.models.transformers.transformer_flux import FluxAttention, FluxIPAdapterAttnProcessor

    sizes = {"query_dim": 16, "heads": 2, "dim_head": 8}
    joint = {**sizes, "added_kv_proj_dim": 16, "context_pre_only": False}
    assert not attention.refusal(Attention(**joint, processor=JointAttnProcessor2_0()))
    assert "through AttnProcessor2_0, not JointAttnProcessor2_0" in attention.refusal(Attention(**joint))
    fused = Attention(**joint, processor=JointAttnProcessor2_0())
    fused.fuse_projections()
    assert "fused" in attention.refusal(fused)
    for form, options in {"flux": joint, "flux_single": {**sizes, "pre_only": True}}.items():
        module = FluxAttention(**options)
        assert attention.form_of(module).name == form and not attention.refusal(module)
        module.set_attention_backend("_native_math")
        assert "backend" in attention.refusal(module)
        module.set_processor(FluxIPAdapterAttnProcessor(16, 8))
        assert "FluxIPAdapterAttnProcessor" in attention.refusal(module)
    with pytest.raises(CapabilityError, match="neither of a double-stream block"):
        attention.form_of(FluxAttention(**sizes))


def test_a_copied_model_has_plans_of_its_own() -> None:
    """A deep copy takes processors along; a plan removed from one stays in the other."""
    family = make("sd3")
    plan = everywhere(family, [["full"], ["w2"]])
    attention.install(family.model, plan)
    twin = Family(copy.deepcopy(family.model), family.forms)
    attention.remove(family.model)
    assert attention.installed(family.model) is None and attention.installed(twin.model) == plan
    attention.install(twin.model, plan)  # with the copy's own state
    assert torch.equal(sample(twin), planned(family, plan))


def test_gradients_by_heads_are_those_of_the_module(family: Family) -> None:
    """``turned`` against autograd through the form's own output."""
    for path, name in family.forms.items():
        module, inputs = called(family, path)
        form, x = FORMS[name], Inputs.of((), inputs)
        text = TEXT if name != "attention" else 0
        with torch.enable_grad():
            heads = SDPA(*form.project(module, x)).detach().requires_grad_()
            output = form.finish(module, heads, text)
            parts = output if isinstance(output, tuple) else (output,)
            weights = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for p in parts]
            total = sum((w * p).sum() for w, p in zip(weights, parts, strict=True))
            assert isinstance(total, Tensor)
            (wanted,) = torch.autograd.grad(total, heads)
        torch.testing.assert_close(form.turned(module, weights, text), wanted, rtol=1e-4, atol=1e-5)
