"""Parity of every backend with the exact product, and honest answers about what executes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.kernels import aten, ops
from autocomp.kernels.backend import WeightState
from autocomp.kernels.reference import REFERENCE, dequantize, to_quantized
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

TOKENS = (1, 2, 7, 8, 9, 33)
BF16_ERROR = 1.2e-2
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def torch_operators_first(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These tests are about torch's own operators and the reference; our C kernels would take most of it."""
    monkeypatch.setattr(ops, "_backends", [b for b in ops._backends if b.name != "cpu"])
    ops._clear()
    yield
    monkeypatch.undo()
    ops._clear()


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def exact_product(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    return x.double() @ weight.dequantize(torch.float32).double().T


def inputs(tokens: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, columns, generator=generator).to(dtype)


def native_cases() -> list[tuple[str, tuple[int, int]]]:
    """Schemes and shapes that a native CPU backend claims, on and off its tiles."""
    int4 = [
        (label, shape)
        for label in ("w4g32", "w4g64a", "w4g128", "w4g256a", "w4")
        for shape in ((16, 256), (48, 256), (80, 512), (208, 256))
    ]
    ragged = [("w4g128a", (64, 576)), ("w4g96", (16, 192)), ("w4g64", (112, 576)), ("w4a", (32, 64))]
    int8 = [("w8", s) for s in ((1, 16), (17, 48), (64, 576), (130, 112))]
    return [*int4, *ragged, *int8, ("w8g128", (33, 64))]


@pytest.mark.parametrize(("label", "shape"), native_cases())
def test_native_backends_agree_with_the_exact_product(label: str, shape: tuple[int, int]) -> None:
    scheme = Scheme.parse(label)
    found = ops.capability(scheme, shape, "cpu")
    assert found.native, found.reason
    weight = ops.random_weight(scheme, shape, seed=7)
    state = ops.prepack(weight, "cpu")
    assert state.backend.name == found.backend
    for tokens in TOKENS:
        x = inputs(tokens, shape[1])
        y = ops.linear_wna16(x, state)
        assert y.dtype == torch.bfloat16 and y.shape == (tokens, shape[0])
        assert relative_error(y, exact_product(x, weight)) <= BF16_ERROR


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([0, 8, 32, 40, 64, 128]),
    symmetric=st.booleans(),
    outliers=st.sampled_from([0.0, 0.5, 5.0]),
    rows=st.integers(1, 70),
    columns=st.integers(1, 130),
    tokens=st.sampled_from(TOKENS),
)
@settings(max_examples=120, deadline=None)
def test_any_scheme_at_any_shape_is_right_whoever_runs_it(
    bits: int, group: int, symmetric: bool, outliers: float, rows: int, columns: int, tokens: int
) -> None:
    scheme = Scheme(bits, group, symmetric, outliers)
    weight = ops.random_weight(scheme, (rows, columns), seed=rows)
    state = ops.prepack(weight, "cpu")
    x = inputs(tokens, columns)
    exact = exact_product(x, weight)
    # One output of one term can cancel to nothing: the bound is on the size of what was summed, too.
    scale = x.double().abs() @ weight.dequantize(torch.float32).double().abs().T
    error = (ops.linear_wna16(x, state).double() - exact).norm()
    assert error <= BF16_ERROR * max(float(exact.norm()), 0.1 * float(scale.norm()))
    assert (state.backend.name == "reference") == (not ops.capability(scheme, (rows, columns), "cpu").native)


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([0, 8, 40, 64]),
    symmetric=st.booleans(),
    outliers=st.sampled_from([0.0, 1.0, 10.0]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 100),
)
@settings(max_examples=80, deadline=None)
def test_reference_reads_the_packed_bytes_exactly(
    bits: int, group: int, symmetric: bool, outliers: float, rows: int, columns: int
) -> None:
    weight = ops.random_weight(Scheme(bits, group, symmetric, outliers), (rows, columns), seed=columns)
    state = REFERENCE.prepack(weight, CPU)
    assert torch.equal(dequantize(state), weight.dequantize(torch.float32))
    index = torch.tensor([rows - 1, 0, rows // 2, 0])
    assert torch.equal(REFERENCE.rows(index, state), weight.dequantize(torch.float32)[index])
    again = to_quantized(state)
    assert torch.equal(again.codes, weight.codes) and torch.equal(again.scale, weight.scale)


def test_reference_accumulates_in_float32() -> None:
    weight = ops.random_weight(Scheme(8), (16, 4096))
    x = inputs(3, 4096, torch.float32)
    y = REFERENCE.linear(x, REFERENCE.prepack(weight, CPU))
    assert relative_error(y, exact_product(x, weight)) <= 1e-5


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 128, 176])
@pytest.mark.parametrize("label", ["w4g32", "w4g64a", "w8"])
def test_rows_are_read_back_out_of_native_layouts(label: str, rows: int) -> None:
    weight = ops.random_weight(Scheme.parse(label), (rows, 192), seed=rows)
    state = ops.prepack(weight, "cpu")
    assert state.backend.name != "reference"
    found = state.backend.rows(torch.arange(rows).flip(0), state)
    assert found is not None
    # The layout rounds shifts (8 - z) * s to bfloat16; symmetric weights come back exactly.
    exact = weight.dequantize(torch.float32).flip(0)
    tolerance = 0.0 if weight.zero is None else 2.0**-8
    assert float((found - exact).norm()) <= tolerance * float(exact.norm())


def test_an_unknown_int4_layout_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ops.prepack(ops.random_weight(Scheme(4, 32), (64, 64)), "cpu")
    monkeypatch.setattr(aten, "_nibble_order", lambda height: None)
    monkeypatch.setattr(aten, "_slots", aten._slots.__wrapped__)  # without its cache
    assert state.backend.rows(torch.tensor([3]), state) is None
    monkeypatch.setattr(aten, "_int4_block", lambda: 0)
    assert state.backend.rows(torch.tensor([3]), state) is None


@pytest.mark.parametrize("label", ["w4g32", "w4g32a", "w8", "w3g32", "w2a"])
def test_zero_scales_give_zeros(label: str) -> None:
    weight = ops.random_weight(Scheme.parse(label), (32, 64))
    weight.scale[5] = 0
    for tokens in TOKENS:
        y = ops.linear_wna16(inputs(tokens, 64), ops.prepack(weight, "cpu"))
        assert torch.isfinite(y).all() and (y[:, 5] == 0).all() and (y != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("label", ["w4g64", "w8", "w3g64"])
def test_activations_keep_dtype_shape_and_strides_do_not_matter(label: str, dtype: torch.dtype) -> None:
    weight = ops.random_weight(Scheme.parse(label), (48, 128))
    state = ops.prepack(weight, "cpu")
    x = inputs(12, 256, dtype)[:, ::2].reshape(3, 4, 128).transpose(0, 1)
    assert not x.is_contiguous()
    y = ops.linear_wna16(x, state)
    assert y.dtype == dtype and y.shape == (4, 3, 48)
    exact = exact_product(x.reshape(-1, 128), weight).view(4, 3, 48)
    assert relative_error(y, exact) <= BF16_ERROR


@pytest.mark.parametrize("label", ["w4g64", "w8", "w3g64"])
def test_no_tokens_give_no_rows(label: str) -> None:
    state = ops.prepack(ops.random_weight(Scheme.parse(label), (32, 64)), "cpu")
    assert ops.linear_wna16(torch.zeros(2, 0, 64), state).shape == (2, 0, 32)


def test_wrong_inputs_name_the_value() -> None:
    state = ops.prepack(ops.random_weight(Scheme(8), (32, 64)), "cpu")
    with pytest.raises(ValueError, match=r"64 input features; got \(2, 63\)"):
        ops.linear_wna16(torch.zeros(2, 63), state)
    with pytest.raises(ValueError, match="meta"):
        ops.linear_wna16(torch.zeros(2, 64, device="meta"), state)
    with pytest.raises(ValueError, match="w16"):
        ops.choose(Scheme(16), (32, 64), "cpu")


@pytest.mark.parametrize(
    ("label", "shape", "words"),
    [
        ("w3g64", (576, 576), ["w4g64", "w8", "without latency", "w3g64 at 576x576"]),
        ("w4g64", (50257, 768), ["use w8", "multiples of 16; got N=50257"]),
        ("w8", (64, 100), ["K=100", "w16"]),
        ("w4g64o0.5", (64, 64), ["without outliers"]),
        ("w4g40", (64, 80), ["w8"]),
        ("w8g32", (64, 64), ["one symmetric scale a row"]),
        ("w8a", (64, 64), ["one symmetric scale a row"]),
    ],
)
def test_what_is_only_simulated_says_why_and_what_would_work(
    label: str, shape: tuple[int, int], words: list[str]
) -> None:
    found = ops.capability(Scheme.parse(label), shape, "cpu")
    assert (found.backend, found.native) == ("reference", False)
    assert [w for w in words if w not in found.reason] == []
    # A remedy that is named must be true.
    for remedy in ("w4g64", "w8"):
        if f"use {remedy} " in found.reason:
            assert ops.capability(Scheme.parse(remedy), shape, "cpu").native


def test_dense_weights_run_anywhere_but_not_without_the_device() -> None:
    assert ops.capability(Scheme(16), (3, 5), "cpu") == ops.Capability("torch", True)
    missing = ops.capability(Scheme(16), (3, 5), "tpu")
    assert not missing.native and "cpu, cuda" in missing.reason
    if not torch.cuda.is_available():
        missing = ops.capability(Scheme(4, 64), (64, 64), "cuda:0")
        assert not missing.native and "no CUDA device" in missing.reason


class Fake:
    """A backend for w3 that computes through the reference and then does what the test wants."""

    def __init__(self, factor: float = 1.0, native: bool = True, error: str = "") -> None:
        self.name, self.native, self.probe = "fake", native, (Scheme(3, 32), (8, 64))
        self.factor, self.error, self.calls = factor, error, 0

    def supports(self, scheme: Scheme, shape: tuple[int, int], device_type: str, tokens: int) -> str:
        return "" if scheme.bits == 3 else "only w3"

    def prepack(self, weight: QuantizedTensor, device: torch.device) -> WeightState:
        inner = REFERENCE.prepack(weight, device)
        return WeightState(self, weight.scheme, weight.shape, inner.tensors)

    def linear(self, x: torch.Tensor, state: WeightState) -> torch.Tensor:
        self.calls += 1
        if self.error:
            raise OSError(self.error)
        return REFERENCE.linear(x, state) * self.factor

    def rows(self, index: torch.Tensor, state: WeightState) -> torch.Tensor | None:
        return None


@pytest.fixture
def registered(request: pytest.FixtureRequest) -> object:
    backend: Fake = request.param
    ops.register(backend)
    yield backend
    ops.unregister("fake")


@pytest.mark.parametrize("registered", [Fake()], indirect=True)
def test_a_registered_backend_is_preferred_probed_once_and_can_leave(registered: Fake) -> None:
    w3 = Scheme(3, 64)
    assert ops.capability(w3, (5, 7), "cpu") == ops.Capability("fake", True)
    probes = registered.calls
    assert probes == 3
    assert ops.capability(w3, (6, 7), "cpu").native and registered.calls == probes
    assert ops.prepack(ops.random_weight(w3, (5, 7)), "cpu").backend is registered
    assert ops.capability(Scheme(4, 64), (64, 64), "cpu").backend == "torch_int4"
    ops.unregister("fake")
    assert not ops.capability(w3, (5, 7), "cpu").native


@pytest.mark.parametrize(
    ("registered", "words"),
    [
        (Fake(factor=1.1), "off by 0.1"),
        (Fake(factor=float("nan")), "off by nan"),
        (Fake(error="libfoo.so is missing"), "OSError: libfoo.so is missing"),
        (Fake(native=False), "only simulates"),
    ],
    indirect=["registered"],
)
def test_a_backend_that_fails_its_self_check_is_not_native(registered: Fake, words: str) -> None:
    found = ops.capability(Scheme(3, 64), (8, 64), "cpu")
    assert not found.native and found.backend == "reference"
    assert words in found.reason


def test_int4_group_divides_group_and_row() -> None:
    assert aten.int4_group(Scheme(4, 128), 576) == 64
    assert aten.int4_group(Scheme(4), 512) == 256
    assert aten.int4_group(Scheme(4, 96), 192) == 32
    assert aten.int4_group(Scheme(4, 40), 80) == 0
    assert aten.int4_group(Scheme(4, 64), 100) == 0


def test_state_counts_what_it_holds() -> None:
    state = ops.prepack(ops.random_weight(Scheme(4, 64), (64, 128)), "cpu")
    assert state.nbytes == 64 * 128 // 2 + 64 * 2 * 2 * 2  # codes; a scale and a shift for each group
    state = ops.prepack(ops.random_weight(Scheme(8), (64, 128)), "cpu")
    assert state.nbytes == Scheme(8).weight_bytes(64, 128)
