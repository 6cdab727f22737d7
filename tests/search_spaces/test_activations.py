"""Activation bits: what the space offers, what rounding computes, and which kernel runs when."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autocomp.diffusion import activations
from autocomp.diffusion.activations import ActivationPlan, round_activations
from autocomp.diffusion.state import state_of
from autocomp.errors import SpaceError
from autocomp.kernels.modules import PackedLinear
from autocomp.kernels.ops import a8_unavailable, capability, linear_wna8, prepack, random_weight
from autocomp.quantize.bank import LayerBank
from autocomp.quantize.scheme import Scheme
from autocomp.search_spaces.activations import Activations, ActivationsConfig
from autocomp.search_spaces.base import ModelSite, Part, Stage, exact_tables
from autocomp.search_spaces.bitwidths import Bitwidths, BitwidthsConfig
from autocomp.space import SearchSpace
from autocomp.workloads.base import Built

BLOCK = "transformer_blocks.{}."


def site(**fields: Any) -> ModelSite:
    parts = []
    for i in range(2):
        at = BLOCK.format(i)
        parts += [
            Part(f"{at}attn1.{n}", "linear", (64, 64), i, f"{at}attn1.q-k-v")
            for n in ("to_q", "to_k", "to_v")
        ]
        parts += [
            Part(f"{at}ff.net.0.proj", "linear", (256, 64), i),
            Part(f"{at}ff.net.2", "linear", (64, 256), i),
        ]
    return ModelSite("dit", tuple(parts), 1000, "f", 4, **{"steps": 10, **fields})


def space(**options: Any) -> Activations:
    return Activations(ActivationsConfig(**options))


# -- the space -----------------------------------------------------------------------------------------


def test_a_decision_for_every_layer_and_range() -> None:
    found = space(ranges=3).decisions(site())
    assert [d.name for d in found][:3] == [
        f"activations/transformer_blocks.0.attn1.to_q+to_k+to_v.{r}" for r in range(3)
    ]
    assert len(found) == 3 * 3 * 2 and all(d.options == ("a8", "a16") for d in found)
    assert len(found[0].sites) == 3 and found[-1].block == 1
    assert len(space(ranges=1, granularity="linear").decisions(site())) == 10
    assert len(space(ranges=2, granularity="model").decisions(site())) == 2
    assert space().neutral(found[0]) == "a16"
    assert [c.values[found[0].name] for c in space(ranges=3).baselines(site(), found)] == ["a8", "a16"]


def test_it_comes_after_the_weights() -> None:
    assert Bitwidths.stage < Activations.stage == Stage.RUNTIME


def test_activation_bits_are_weighted_by_multiplications() -> None:
    one, model = space(bits=[4, 8, 16], ranges=2), site()
    decisions = one.decisions(model)
    rows = {d.name: {o: one.resources(model, d, o, "cpu") for o in d.options} for d in decisions}
    table = exact_tables(model, rows)["act_bits"]
    uniform = SearchSpace(tuple(decisions)).uniform()
    assert [table.total(c) for c in uniform] == pytest.approx([4, 8, 16])
    qkv = decisions[0].name  # 3 * 64 * 64 of 2 * 11 * 64 * 64 weights, in one of 2 ranges
    assert table.total(uniform[-1].replace({qkv: "a4"})) == pytest.approx(16 - 12 * 3 / 11 / 2 / 2)


def test_what_is_simulated_has_no_latency() -> None:
    one, model = space(bits=[4, 6, 8, 16]), site()
    decision = one.decisions(model)[0]
    found = {o: one.resources(model, decision, o, "cpu") for o in decision.options}
    assert found["a16"].executes and found["a8"].executes == ("" if a8_unavailable("cpu") else "cpu")
    for label in ("a4", "a6"):
        assert (
            not found[label].executes and "simulated" in found[label].reason and "a8" in found[label].reason
        )
    on_cuda = one.resources(model, decision, "a8", "cuda")
    assert not on_cuda.executes and "CPU only" in on_cuda.reason


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({}, {"steps": 0}, "no sampling steps"),
        ({"exclude": ["lm_head"]}, {}, "matches no linear"),
        ({"exclude": ["."]}, {}, "all excluded"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        space(**options).decisions(site(**fields))


def test_bits_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="activations have"):
        space(bits=[8, 12])


# -- the plan ------------------------------------------------------------------------------------------


def test_ranges_cut_the_time_from_noise_to_image() -> None:
    plan = ActivationPlan({"a": (8, 8, 16, 16)})
    assert [plan.range_of(t) for t in (1.0, 0.76, 0.75, 0.51, 0.5, 0.26, 0.25, 0.001)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert ActivationPlan({}).plain and ActivationPlan({"a": (16, 16)}).plain and not plan.plain
    assert ActivationPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "data", [{}, {"bits": 3}, {"bits": {"a": ["x"]}}, {"bits": {"a": [7]}}, {"bits": {"a": []}}, [1]]
)
def test_other_data_is_no_plan(data: Any) -> None:
    with pytest.raises(SpaceError):
        ActivationPlan.from_json(data)


def test_layers_need_the_same_ranges() -> None:
    with pytest.raises(SpaceError, match="equally many"):
        ActivationPlan({"a": (8,), "b": (8, 16)})


# -- rounding and kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (6, 31), (4, 7)])
def test_rounding_is_per_token_and_64_features(bits: int, top: int) -> None:
    x = torch.randn(3, 5, 100, generator=torch.Generator().manual_seed(bits))
    x[0, 0, 3] = 1000.0
    found = round_activations(x, bits)
    for first, last in ((0, 64), (64, 100)):
        part, got = x[..., first:last], found[..., first:last]
        step = part.abs().amax(-1, keepdim=True) / top
        assert ((got - part).abs() <= step / 2 * 1.0001).all()
        codes = got / step
        assert torch.allclose(codes, codes.round(), atol=1e-3) and codes.abs().max() == pytest.approx(top)
    other = round_activations(x[:1, 1:2], bits)
    assert torch.equal(other, found[:1, 1:2]), "another token's numbers play no part"
    assert round_activations(x, 16) is x


@pytest.mark.skipif(bool(a8_unavailable("cpu")), reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("label", "shape"), [
    ("w8", (64, 64)), ("w4g64", (96, 96)), ("w4g128a", (24, 64)), ("w3g32", (40, 100)), ("w2g64", (384, 64)),
    ("w6", (16, 256)), ("w5g64a", (17, 1024)), ("w4g64", (4, 64)), ("w8g64", (384, 64)),
])  # fmt: skip
def test_the_kernel_multiplies_the_rounded_numbers(
    label: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_weight(Scheme.parse(label), shape)
    module = PackedLinear(weight, torch.arange(shape[0]) / 1000, dtype=dtype)
    held = module.resident_bytes
    x = torch.randn(2, 37, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    rounded = round_activations(x.float(), 8)
    wanted = rounded @ weight.dequantize().T + torch.arange(shape[0]) / 1000
    exact = x.float() @ weight.dequantize().T + torch.arange(shape[0]) / 1000
    assert capability(Scheme.parse(label), shape, "cpu").native, "no shape of these models is refused"
    with torch.inference_mode():
        whole = module(x)
        module.activation_bits = 8
        found = module(x)
        one = module(x[0, :1])
    close = 1e-6 if dtype == torch.float32 else 1e-2
    assert found.dtype == dtype and (found.float() - wanted).norm() < close * wanted.norm()
    if dtype == torch.float32:
        assert (whole - exact).norm() < 2e-4 * exact.norm()
        assert (found - exact).norm() > 1e-3 * exact.norm(), "8 bits were not used"
        assert torch.equal(one, found[0, :1]), "a token's result depends on no other token"
    assert module.resident_bytes == held, "one packed weight for both"


@pytest.mark.skipif(bool(a8_unavailable("cpu")), reason="no C compiler")
def test_a_token_that_is_not_finite_is_nan_and_alone() -> None:
    state = prepack(random_weight(Scheme.parse("w4g64"), (32, 128)), "cpu")
    x = torch.randn(3, 128)
    x[1, 5] = torch.inf
    found = linear_wna8(x, state)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
    assert round_activations(x, 8)[1, :64].isnan().all()


def test_a_backend_without_the_kernel_says_so() -> None:
    from autocomp.kernels.reference import REFERENCE

    state = REFERENCE.prepack(random_weight(Scheme.parse("w4g64"), (32, 128)), torch.device("cpu"))
    with pytest.raises(ValueError, match="reference backend multiplies no 8-bit"):
        linear_wna8(torch.randn(1, 128), state)
    with pytest.raises(ValueError, match="takes 128 input features"):
        linear_wna8(torch.randn(1, 64), prepack(random_weight(Scheme.parse("w4g64"), (32, 128)), "cpu"))


# -- on a model ----------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Two linears and the names that diffusers models have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x).tanh())
        return y


def built(options: dict[str, Any] | None = None) -> tuple[Built, Bitwidths, Activations]:
    model = Model().eval().requires_grad_(False)
    parts = tuple(Part(n, "linear", tuple(m.weight.shape)) for n, m in model.named_children())
    where = ModelSite("tiny", parts, 0, "f", 4, steps=10)
    made = Built(model, where, "cpu", {n: m.weight.data for n, m in model.named_children()})
    made.state["bank"] = LayerBank()
    bits, acts = (
        Bitwidths(BitwidthsConfig(bits=[4, 16])),
        space(**(options or {"bits": [4, 8, 16], "ranges": 2})),
    )
    made.state["decisions"] = {"bitwidths": bits.decisions(where), "activations": acts.decisions(where)}
    return made, bits, acts


def apply(made: Built, spaces: tuple[Any, Any], choices: dict[str, Any], *, serving: bool) -> None:
    for one in spaces:
        mine = {n: v for n, v in choices.items() if n.startswith(one.name)}
        one.apply(
            made,
            {**{d.name: one.neutral(d) for d in made.state["decisions"][one.name]}, **mine},
            serving=serving,
        )


@torch.inference_mode()
def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    """In each of two ranges of time."""
    found = []
    for time in (0.9, 0.1):
        state_of(model).time = time
        found.append(model(torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(3))))
    return found


def test_a_layer_is_rounded_in_its_range_only() -> None:
    made, *spaces = built()
    plain = outputs(made.model)
    apply(made, spaces, {"activations/second.1": "a4"}, serving=False)
    assert made.changed == {"activations"}
    early, late = outputs(made.model)
    assert torch.equal(early, plain[0]) and not torch.equal(late, plain[1])
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(3))
    inner = round_activations(made.model.first(x).tanh(), 4)
    assert torch.equal(
        late, torch.nn.functional.linear(inner, made.model.second.weight, made.model.second.bias)
    )
    apply(made, spaces, {}, serving=False)
    assert made.pristine and all(map(torch.equal, outputs(made.model), plain))
    assert activations.installed(made.model) is None


@pytest.mark.skipif(bool(a8_unavailable("cpu")), reason="no C compiler")
def test_serving_runs_the_kernel_in_some_ranges_from_one_weight() -> None:
    made, *spaces = built()
    weights = {"bitwidths/first": "w4g64", "bitwidths/second": "w4g64"}
    plan = {"activations/first.0": "a8", "activations/second.0": "a8", "activations/second.1": "a4"}
    apply(made, spaces, weights, serving=True)
    without, held = outputs(made.model), [m.resident_bytes for m in made.model.children()]
    apply(made, spaces, weights | plan, serving=False)
    scored = outputs(made.model)
    apply(made, spaces, weights | plan, serving=True)
    served = outputs(made.model)
    for here, there in zip(scored, served, strict=True):
        # Both round the second input; numbers that differ by 5e-5 may fall on two sides of a half.
        assert (here - there).norm() < 2e-2 * here.norm()
    assert not torch.equal(served[0], without[0])
    assert [m.resident_bytes for m in made.model.children()] == held
    state_of(made.model).time = 0.9
    made.model(torch.randn(1, 64))
    assert [m.activation_bits for m in made.model.children()] == [8, 8]
    apply(made, spaces, weights, serving=True)
    assert all(map(torch.equal, outputs(made.model), without))
    apply(made, spaces, {}, serving=False)
    assert made.pristine


def test_a_weight_that_is_not_packed_is_rounded_as_it_was_scored() -> None:
    made, *spaces = built()
    plan = {"activations/first.0": "a8", "activations/first.1": "a8"}
    apply(made, spaces, plan, serving=False)
    scored = outputs(made.model)
    apply(made, spaces, plan, serving=True)
    assert all(map(torch.equal, outputs(made.model), scored))


def test_a_plan_for_another_model_is_refused() -> None:
    model = Model()
    with pytest.raises(SpaceError, match="the model lacks"):
        activations.install(model, ActivationPlan({"third": (8,)}))
    assert activations.installed(model) is None
