"""Numbers of the int8 and fp8 linears and of grouped experts in the interpreter: ``test_triton_linear``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from autocomp.kernels.ops import random_weight
from autocomp.kernels.triton.launch import INTERPRETED
from autocomp.quantize.scheme import Scheme
from autocomp.testing.guards import guarded, guarded_allocations

assert INTERPRETED, "these need TRITON_INTERPRET=1: run test_triton_linear.py"
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def guards() -> Iterator[None]:
    """Results and workspaces lie between guard zones too."""
    with guarded_allocations():
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def w4(shape: tuple[int, int], group: int, asymmetric: bool) -> tuple[torch.Tensor, ...]:
    """Arguments packed, scale and zero of ``linear_w4a8``, guarded."""
    from autocomp.kernels.packing import pack

    weight = random_weight(Scheme(4, group, not asymmetric), shape)
    zero = None if weight.zero is None else guarded(weight.zero)
    return guarded(pack(weight.codes, 4)), guarded(weight.scale), zero  # type: ignore[return-value]


@pytest.mark.parametrize("tokens", [1, 20, 130])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_w8a8_is_its_reference(tokens: int, dtype: torch.dtype, static: bool) -> None:
    from autocomp.kernels.activations_reference import w8a8 as reference
    from autocomp.kernels.triton.activations import w8a8

    codes = guarded(
        torch.randint(-128, 128, (37, 150), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    )
    x, scale, bias = guarded(random(tokens, 150, dtype=dtype)), guarded(random(37).abs()), guarded(random(37))
    given = torch.tensor(0.015) if static else None
    y = w8a8(x, codes, scale, bias, given)
    wanted = reference(x.double().to(dtype), codes, scale, bias, given).double()
    assert y.dtype == dtype and error(y, wanted) <= BOUND[dtype]


@pytest.mark.parametrize(
    ("shape", "group"), [((37, 150), 32), ((20, 256), 128), ((33, 100), 0), ((8, 192), 96)]
)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("tokens", [1, 18, 70])
def test_w4a8_is_its_reference(shape: tuple[int, int], group: int, asymmetric: bool, tokens: int) -> None:
    from autocomp.kernels.activations_reference import w4a8 as reference
    from autocomp.kernels.triton.activations import w4a8

    weight, x, bias = (
        w4(shape, group, asymmetric),
        guarded(random(tokens, shape[1])),
        guarded(random(shape[0])),
    )
    packed_codes, scale, zero = weight
    y = w4a8(x, packed_codes, scale, zero, group, bias)
    wanted = reference(x, packed_codes, scale, zero, group, bias).double()
    assert error(y, wanted) <= BOUND[torch.float32]


@pytest.mark.parametrize("target", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_are_quantized_as_the_reference_does(target: torch.dtype) -> None:
    from autocomp.kernels.activations_reference import quantize_e4m3, quantize_int8
    from autocomp.kernels.triton.activations import quantize_rows

    x = random(7, 300)
    x[1], x[2, 5], x[3, 7], x[4] = 0.0, float("nan"), float("inf"), torch.arange(300) / 2
    q, scale = quantize_rows(guarded(x), target)
    wanted, wanted_scale = (quantize_int8 if target is torch.int8 else quantize_e4m3)(x)
    finite = wanted_scale.isfinite()
    assert finite.tolist() == [True, True, False, False, True, True, True]
    assert torch.equal(scale[finite], wanted_scale[finite]) and scale[~finite].isnan().all()
    if target is torch.int8:
        assert torch.equal(q[finite], wanted[finite])
    else:  # the interpreter does not round e4m3 to the nearest, so values may be a step away
        assert error(q[finite].float(), wanted[finite].double()) <= 0.05


def test_fp8_is_its_reference() -> None:
    from autocomp.kernels.activations_reference import fp8 as reference
    from autocomp.kernels.triton.activations import fp8

    weight, scale = random(32, 64).to(torch.float8_e4m3fn), random(32).abs()
    x = random(5, 64, dtype=torch.float16)
    y, wanted = fp8(x, weight, scale, random(32)), reference(x, weight, scale, random(32))
    assert y.dtype == x.dtype and error(y, wanted.double()) <= 0.05  # see the test above


def test_static_scales_saturate_and_spoil_only_rows_with_nan() -> None:
    from autocomp.kernels.activations_reference import w8a8 as reference
    from autocomp.kernels.triton.activations import w8a8

    x = random(4, 64)
    x[1, 3], x[2, 3] = float("nan"), float("inf")
    codes, scale, given = torch.ones(8, 64, dtype=torch.int8), torch.ones(8), torch.tensor(0.01)
    y, wanted = w8a8(x, codes, scale, None, given), reference(x, codes, scale, None, given)
    assert torch.equal(y.isnan(), wanted.isnan()) and torch.allclose(y, wanted, equal_nan=True)


def experts(labels: list[str], shape: tuple[int, int], place: list[int]) -> tuple[object, object]:
    """The same experts in our layout, all tensors guarded, and in the canonical one."""
    from dataclasses import replace

    from autocomp.kernels.experts import GroupedWeights
    from autocomp.kernels.triton.moe import register

    register()
    schemes = [Scheme.parse(label) for label in labels]
    weights = [
        random(*shape, seed=i) if s.is_dense else random_weight(s, shape, seed=i)
        for i, s in enumerate(schemes)
    ]
    ours, wanted = (GroupedWeights.build(weights, place, layout=name) for name in ("triton", "canonical"))
    pools = {name: tuple(map(guarded, getattr(ours, name))) for name in ("codes", "scale", "zero")}
    return replace(ours, remap=guarded(ours.remap), **pools), wanted


@pytest.mark.parametrize(
    "labels", [["w4g64a"] * 3, ["w3g32", "w4g128", "w16", "w3g32", "w8"]], ids=["one", "mixed"]
)
@pytest.mark.parametrize("tokens", [2, 20])  # pair by pair, sorted
@pytest.mark.parametrize("weighted", [False, True])
def test_grouped_experts_are_their_reference(labels: list[str], tokens: int, weighted: bool) -> None:
    place = [*range(len(labels)), 0, -1]  # one merged, one pruned
    ours, wanted = experts(labels, (40, 136), place)
    generator = torch.Generator().manual_seed(tokens)
    chosen = guarded(torch.randint(-1, len(place) + 1, (tokens, 2), generator=generator))  # both ends unknown
    x = guarded(random(tokens, 136))
    route = guarded(torch.rand(tokens, 2, generator=generator)) if weighted else None
    y = ours(x, chosen, route)  # type: ignore[operator]
    assert error(y, wanted(x, chosen, route).double()) <= BOUND[torch.float32]  # type: ignore[operator]
    by_pair = guarded(random(tokens * 2, 136, seed=4))
    assert error(ours(by_pair, chosen, route), wanted(by_pair, chosen, route).double()) <= 1e-5  # type: ignore[operator]


@pytest.mark.parametrize("tokens", [1, 70])
def test_all_tokens_to_one_expert(tokens: int) -> None:
    ours, wanted = experts(["w4g32"] * 4, (20, 64), [0, 1, 2, 3])
    x, chosen = guarded(random(tokens, 64)), guarded(torch.full((tokens, 1), 2, dtype=torch.int32))
    assert error(ours(x, chosen), wanted(x, chosen).double()) <= BOUND[torch.float32]  # type: ignore[operator]


def test_nobody_is_chosen() -> None:
    ours, _ = experts(["w4g32"] * 2, (20, 64), [0, 1])
    for tokens in (0, 3, 40):
        y = ours(random(tokens, 64), torch.full((tokens, 2), -1), torch.ones(tokens, 2))  # type: ignore[operator]
        assert y.shape == (tokens, 20) and not y.any()


def test_self_checks_pass_and_find_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from autocomp.kernels.triton import activations, moe

    for check in (activations._check_w8a8, activations._check_w4a8, moe._check):
        assert check() == ""
    quantize = activations.quantize_rows
    monkeypatch.setattr(activations, "quantize_rows", lambda *a: (quantize(*a)[0], 1.1 * quantize(*a)[1]))
    assert "off by 0.1" in activations._check_w8a8()
    assert "off by 0.1" in activations._check_w4a8()
    monkeypatch.setattr(moe, "PLANES", moe.PLANES | {3: (2, 0)})
    assert "off by" in moe._check()


def test_the_dispatchers_choose_triton() -> None:
    from autocomp.kernels.activations import linear_w8a8
    from autocomp.kernels.triton import activations

    activations.register()
    arguments = (random(3, 64), torch.ones(8, 64, dtype=torch.int8), torch.ones(8))
    assert linear_w8a8.choose(*arguments) == "triton"
    assert torch.equal(linear_w8a8(*arguments), activations.w8a8(*arguments))
