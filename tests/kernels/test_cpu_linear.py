"""The C linears: exact up to 15-bit activations, inside of their buffers, on every instruction set."""

from __future__ import annotations

import copy
import gc
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.kernels import cpu_linear, native, ops
from autocomp.kernels.backend import WeightState
from autocomp.kernels.cpu_linear import CpuBackend, native_weight
from autocomp.kernels.modules import PackedLinear
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

pytestmark = pytest.mark.skipif(bool(native.unavailable("linear")), reason="needs a C compiler")
CPU = torch.device("cpu")
BACKEND = CpuBackend()
LABELS = "w2 w2g32a w2g64 w3g64 w3g32a w3a w3g128ao2 w4g32 w4g64a w4g96 w4g128 w4 w4g64o0.5 w5g64 w5g32a"
LABELS += " w6g64a w6 w8 w8g64 w8g32a"
SHAPES = ((64, 128), (17, 72), (33, 200), (1, 64), (5, 3))
BOUND = {torch.float32: 1e-4, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # of the result's norm, by its dtype
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 300)


@pytest.fixture(autouse=True)
def integer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of rows by integers, also where a CPU would take its dense bfloat16 units."""
    monkeypatch.setattr(cpu_linear, "_dense_rows", lambda: 1 << 62)


def as_the_kernel_sees(x: torch.Tensor) -> torch.Tensor:
    """float64 ``x`` as two int8 planes, ``scale * (128 * high + low)``, a scale per 64 features of a row."""
    rows, columns = x.shape
    padded = torch.zeros(rows, columns + -columns % 64)
    padded[:, :columns] = x
    chunks = padded.view(rows, -1, 64)
    peak = chunks.abs().amax(-1, keepdim=True)
    # A true division: torch makes a reciprocal of 127 / peak, which rounds twice.
    inverse = torch.where(peak > 1e-36, torch.div(torch.full_like(peak, 127), peak), 0.0)
    scale = peak * torch.tensor(1 / (127 * 128), dtype=torch.float32)
    scaled = chunks * inverse
    high = scaled.round()
    codes = 128 * high.double() + ((scaled - high) * 128).round().double()
    return (codes * scale.double()).view(rows, -1)[:, :columns]


class Exact:
    """float64 products of a weight."""

    def __init__(self, weight: QuantizedTensor) -> None:
        bare = replace(weight.scheme, outliers=0.0)
        coded = QuantizedTensor(bare, weight.shape, weight.codes, weight.scale, weight.zero)
        self.coded, self.dense = coded.dequantize(torch.float64), weight.dequantize(torch.float64)

    def emulated(self, x: torch.Tensor) -> torch.Tensor:
        """What the kernel computes: outliers meet the activations as they are."""
        return as_the_kernel_sees(x) @ self.coded.T + x.double() @ (self.dense - self.coded).T

    def typical(self, x: torch.Tensor) -> float:
        """Norm of a product whose terms have random signs; errors are compared with it, as one output may
        cancel."""
        return max(float((x.double() ** 2 @ (self.dense**2).T).sum().sqrt()), 1e-30)

    def error(self, y: torch.Tensor, x: torch.Tensor) -> float:
        """Of the kernel's result, against what it should compute."""
        return error(y, self.emulated(x), self.typical(x))


def inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(97 * tokens + seed))


def error(found: torch.Tensor, wanted: torch.Tensor, size: float) -> float:
    return float((found.double() - wanted).norm()) / size


# Numbers. The names of these tests are used below, to run them on other instruction sets.


@pytest.mark.parametrize("label", LABELS.split())
def test_numbers_are_exact_up_to_the_rounding_of_activations(label: str) -> None:
    for shape in SHAPES:
        weight = ops.random_weight(Scheme.parse(label), shape)
        state, exact = BACKEND.prepack(weight, CPU), Exact(weight)
        for tokens in (1, 15):  # 15 rows take every tile: 8, 4, 2 and 1
            x = inputs(tokens, shape[1])
            y = BACKEND.linear(x, state)
            assert y.shape == (tokens, shape[0]) and y.dtype == torch.float32
            assert exact.error(y, x) <= 1e-5, (shape, tokens)


@pytest.mark.parametrize("tokens", TOKENS)
def test_numbers_for_any_number_of_rows(tokens: int) -> None:
    for label in ("w3g64", "w4g32a"):
        weight = ops.random_weight(Scheme.parse(label), (33, 200))
        x = inputs(tokens, 200)
        assert Exact(weight).error(BACKEND.linear(x, BACKEND.prepack(weight, CPU)), x) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_integer_activations_cost_next_to_nothing(bits: int, dtype: torch.dtype) -> None:
    weight = ops.random_weight(Scheme(bits, 64), (192, 576))
    dense = weight.dequantize(torch.float64)
    for tokens in (1, 8, 33):
        x = inputs(tokens, 576).to(dtype)
        y = BACKEND.linear(x, BACKEND.prepack(weight, CPU))
        exact = x.double() @ dense.T
        assert y.dtype == dtype and error(y, exact, float(exact.norm())) <= BOUND[dtype]


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([0, 32, 64, 96, 128, 160, 1024]),
    symmetric=st.booleans(),
    outliers=st.sampled_from([0.0, 0.5, 10.0]),
    half=st.booleans(),
    rows=st.integers(1, 70),
    columns=st.integers(1, 330),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=25 if "AUTOCOMP_MARCH" in os.environ else 150, deadline=None)
def test_numbers_at_any_scheme_and_shape(
    bits: int,
    group: int,
    symmetric: bool,
    outliers: float,
    half: bool,
    rows: int,
    columns: int,
    tokens: int,
    seed: int,
) -> None:
    weight = ops.random_weight(Scheme(bits, group, symmetric, outliers), (rows, columns), seed)
    if half:
        value = None if weight.outlier_value is None else weight.outlier_value.half()
        weight = replace(weight, scale=weight.scale.half(), outlier_value=value)
    x = inputs(tokens, columns, seed)
    state = BACKEND.prepack(weight, CPU)
    assert Exact(weight).error(BACKEND.linear(x, state), x) <= 1e-5
    dense = weight.dequantize(torch.float32)
    assert torch.allclose(BACKEND.rows(torch.arange(rows), state), dense, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_numbers_do_not_overflow_with_extreme_codes(bits: int, symmetric: bool) -> None:
    """All terms of one sign and of the largest size: what saturating instructions would cut off."""
    rows, columns, top = 32, 4096, 2**bits - 1
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    codes[::2] = top
    zero = None if symmetric else (torch.arange(rows, dtype=torch.uint8) // 2 % 2 * top).view(-1, 1)
    weight = QuantizedTensor(
        Scheme(bits, 0, symmetric), (rows, columns), codes, torch.ones(rows, 1).bfloat16(), zero
    )
    for sign in (1.0, -1.0):
        x = torch.full((3, columns), sign)
        x[1, ::2] = -sign  # neighbours of opposite signs
        y = BACKEND.linear(x, BACKEND.prepack(weight, CPU))
        exact = x.double() @ weight.dequantize(torch.float64).T
        assert float((y.double() - exact).abs().max()) <= 1e-6 * columns * top


@pytest.mark.parametrize("label", ["w2g32a", "w3g64", "w4g96o1", "w5", "w6g64a", "w8g32"])
def test_numbers_of_bfloat16_pieces(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "_dense_rows", lambda: 1)
    monkeypatch.setattr(cpu_linear, "PIECE_WEIGHTS", 7000)  # several pieces, the last one short
    for shape in ((100, 200), (17, 72), (5, 3)):
        weight = ops.random_weight(Scheme.parse(label), shape)
        state = BACKEND.prepack(weight, CPU)
        x = inputs(33, shape[1]).bfloat16()
        y = BACKEND.linear(x, state)
        dense = weight.dequantize(torch.float32).bfloat16()  # the pieces are exactly this
        assert error(y, x.double() @ dense.double().T, Exact(weight).typical(x)) <= 4e-3
        piece = torch.empty(shape, dtype=torch.bfloat16)
        cpu_linear._function("ac_weight_bf16")(native_weight(state), 0, shape[0], piece.data_ptr(), 2)
        assert torch.equal(piece, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_dense_weights(dtype: torch.dtype) -> None:
    for rows, columns in ((64, 128), (7, 45), (1, 3), (130, 96)):
        weight, bias = inputs(rows, columns, 1).to(dtype), inputs(1, rows, 2)[0]
        for tokens in (1, 3, 9):
            x, y = inputs(tokens, columns), torch.full((tokens, rows), torch.nan)
            struct = cpu_linear.dense_weight(weight, bias)
            run = cpu_linear._function("ac_linear")
            assert run(struct, x.data_ptr(), y.data_ptr(), tokens, 0, 2) == 0
            exact = x.double() @ weight.double().T + bias.double()
            assert error(y, exact, float(exact.norm())) <= 1e-6


# Special values.


def test_zero_activations_and_zero_scales_give_zeros() -> None:
    weight = ops.random_weight(Scheme(4, 64, symmetric=False), (40, 130))
    weight.scale[5] = 0
    state = BACKEND.prepack(weight, CPU)
    assert (BACKEND.linear(torch.zeros(3, 130), state) == 0).all()
    y = BACKEND.linear(inputs(3, 130), state)
    assert (y[:, 5] == 0).all() and (y[:, 4] != 0).all()


def test_a_huge_activation_hurts_only_the_64_features_around_it() -> None:
    weight = ops.random_weight(Scheme(4, 64), (48, 256))
    x = inputs(2, 256)
    x[0, 70] = 1e6
    y = BACKEND.linear(x, BACKEND.prepack(weight, CPU))
    rest = x.clone()
    rest[:, 64:128] = 0
    # Without the products of its chunk, which a float64 emulation knows, the row is as exact as any other.
    inside = Exact(weight).emulated(x - rest)
    exact = rest.double() @ weight.dequantize(torch.float64).T
    assert error(y[0].double() - inside[0], exact[0], float(exact[0].norm())) <= 5e-2  # float32 sums of 1e6
    assert error(y[1], (x.double() @ weight.dequantize(torch.float64).T)[1], float(exact[1].norm())) <= 1e-4


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tokens", [3, 9])
def test_what_is_not_finite_gives_nan_in_its_row_only(value: float, tokens: int) -> None:
    for label in ("w4g64", "w3g32ao1"):
        weight = ops.random_weight(Scheme.parse(label), (40, 130))
        state = BACKEND.prepack(weight, CPU)
        for dtype in (torch.float32, torch.bfloat16):
            x = inputs(tokens, 130).to(dtype)
            clean = BACKEND.linear(x, state)
            x[1, 129] = value
            y = BACKEND.linear(x, state)
            assert y[1].isnan().all()
            assert torch.equal(torch.cat([y[:1], y[2:]]), torch.cat([clean[:1], clean[2:]]))


def test_the_smallest_and_largest_activations_stay_finite() -> None:
    weight = ops.random_weight(Scheme(8, 64), (16, 64))
    state = BACKEND.prepack(weight, CPU)
    small = BACKEND.linear(torch.full((1, 64), 1e-40), state)
    assert small.isfinite().all() and float(small.abs().max()) <= 1e-36
    x = torch.full((1, 64), 1e36)
    assert Exact(weight).error(BACKEND.linear(x, state), x) <= 1e-5


# Buffers.


def guarded(tensor: torch.Tensor, fill: float, margin: int = 512) -> tuple[torch.Tensor, Callable[[], bool]]:
    """A copy between guard zones, at an odd address, and a function that says whether these are intact."""
    size = tensor.numel()
    room = torch.full((size + 2 * margin + 3,), fill).to(tensor.dtype)
    before = room.clone()
    view = room[margin + 3 : margin + 3 + size].view(tensor.shape)
    view.copy_(tensor)

    def intact() -> bool:
        ends = torch.cat([room[: margin + 3], room[margin + 3 + size :]])
        return torch.equal(
            ends.nan_to_num(7), torch.cat([before[: margin + 3], before[-margin:]]).nan_to_num(7)
        )

    return view, intact


@pytest.mark.parametrize("label", ["w2g64", "w3g32ao2", "w4g128", "w5g64a", "w6", "w8g96"])
@pytest.mark.parametrize("shape", [(17, 72), (33, 200), (16, 64), (3, 5)])
def test_guard_zones_are_neither_read_nor_written(label: str, shape: tuple[int, int]) -> None:
    weight = ops.random_weight(Scheme.parse(label), shape)
    plain = BACKEND.prepack(weight, CPU)
    tensors, checks = {}, []
    for name, tensor in plain.tensors.items():
        tensors[name], intact = guarded(tensor, torch.nan if tensor.is_floating_point() else 77)
        checks.append(intact)
    state = replace(plain, tensors=tensors)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 7):
            bare = inputs(tokens, shape[1]).to(dtype)
            x, x_intact = guarded(bare, torch.nan)
            y, y_intact = guarded(torch.zeros(tokens, shape[0]).to(dtype), torch.nan)
            run, kind = cpu_linear._function("ac_linear"), cpu_linear.TYPES[dtype]
            assert run(native_weight(state), x.data_ptr(), y.data_ptr(), tokens, kind, 2) == 0
            assert torch.equal(y, BACKEND.linear(bare, plain))
            assert x_intact() and y_intact()
    out, out_intact = guarded(torch.zeros(shape).bfloat16(), torch.nan)
    cpu_linear._function("ac_weight_bf16")(native_weight(state), 0, shape[0], out.data_ptr(), 2)
    assert torch.equal(out, weight.dequantize(torch.bfloat16)) and out_intact()
    rows, rows_intact = guarded(torch.zeros(shape), torch.nan)
    index = torch.arange(shape[0])
    arguments = (index.data_ptr(), shape[0], rows.data_ptr(), 2)
    cpu_linear._function("ac_weight_rows")(native_weight(state), *arguments)
    assert torch.allclose(rows, weight.dequantize(torch.float32), atol=1e-7) and rows_intact()
    assert all(check() for check in checks)


def test_strides_of_the_input_do_not_matter() -> None:
    weight = ops.random_weight(Scheme(3, 64), (40, 130))
    state = ops.prepack(weight, "cpu")
    assert state.backend.name == "cpu"
    wide = inputs(6, 260).bfloat16()
    expected = ops.linear_wna16(wide[::2, ::2].contiguous(), state)
    assert torch.equal(ops.linear_wna16(wide[::2, ::2], state), expected)
    assert torch.equal(ops.linear_wna16(wide[::2, ::2].T.contiguous().T, state), expected)
    assert torch.equal(ops.linear_wna16(wide[::2, ::2].unsqueeze(0), state), expected.unsqueeze(0))
    odd = torch.empty(3 * 130 + 1, dtype=torch.bfloat16)[1:].view(3, 130)  # not aligned to 4 bytes
    odd.copy_(wide[::2, ::2])
    assert torch.equal(ops.linear_wna16(odd, state), expected)


@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_the_number_of_threads_changes_nothing(tokens: int) -> None:
    weight = ops.random_weight(Scheme(4, 64, outliers=1.0), (530, 330))
    state = BACKEND.prepack(weight, CPU)
    x, run = inputs(tokens, 330), cpu_linear._function("ac_linear")
    results = []
    for threads in (1, 2, 3, 16, 0):
        y = torch.full((tokens, 530), torch.nan)
        assert run(native_weight(state), x.data_ptr(), y.data_ptr(), tokens, 0, threads) == 0
        results.append(y)
    assert all(torch.equal(y, results[0]) for y in results)
    assert Exact(weight).error(results[0], x) <= 1e-5


# States.


@pytest.mark.parametrize("label", ["w2g64", "w3g64a", "w4g128", "w5g32", "w6", "w8g64a"])
def test_a_state_takes_what_its_scheme_says(label: str) -> None:
    scheme, shape = Scheme.parse(label), (64, 256)
    state = BACKEND.prepack(ops.random_weight(scheme, shape), CPU)
    zeros = 0 if scheme.symmetric else scheme.groups(256) * (64 - 64 * scheme.bits // 8)  # kept one byte each
    assert state.nbytes == scheme.weight_bytes(*shape) + zeros


def test_copies_have_structs_of_their_own_and_none_outlives_its_weight() -> None:
    state = BACKEND.prepack(ops.random_weight(Scheme(4, 64), (32, 64)), CPU)
    other = copy.deepcopy(state)
    assert native_weight(state) is native_weight(state)
    assert native_weight(other).codes == other.tensors["codes"].data_ptr() != native_weight(state).codes
    key = id(other.tensors["codes"])
    assert key in cpu_linear._structs
    del other
    gc.collect()
    assert key not in cpu_linear._structs


def test_refusals_name_the_case_and_the_remedy() -> None:
    def reason(label: str, shape: tuple[int, int] = (64, 128), device: str = "cpu") -> str:
        return BACKEND.supports(Scheme.parse(label), shape, device, 1)

    assert reason("w3g64") == reason("w4g40", (8, 40)) == reason("w2g8", (8, 8)) == ""
    assert "multiples of 32" in reason("w4g40") and "K=128" in reason("w4g40")
    assert "cuda" in reason("w4", device="cuda") and "plain linear" in reason("w16")
    assert "0x64" in reason("w4", (0, 64))
    with pytest.raises(ValueError, match="device meta"):
        BACKEND.prepack(ops.random_weight(Scheme(4), (4, 8)), torch.device("meta"))


@pytest.mark.parametrize(
    ("weight", "bias", "words"),
    [
        (torch.zeros(4, 6).T, None, "contiguous"),
        (torch.zeros(4, 6).double(), None, "float64"),
        (torch.zeros(4), None, r"\[4\]"),
        (torch.zeros(4, 6), torch.zeros(5), r"float32 \[4\]"),
        (torch.zeros(4, 6), torch.zeros(4).half(), "float16"),
        (torch.zeros(4, 6), torch.zeros(8)[::2], "contiguous"),
    ],
)
def test_dense_weights_that_c_cannot_read_are_refused(
    weight: torch.Tensor, bias: torch.Tensor | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        cpu_linear.dense_weight(weight, bias)


# Graphs.


def traced_arguments(x: torch.Tensor, state: WeightState) -> tuple[object, ...]:
    scheme = state.scheme
    form = (scheme.bits, scheme.group, scheme.symmetric, scheme.outliers)
    held = (list(state.tensors.values()), list(state.tensors))
    return (x, *held, state.backend.name, *form, *state.shape, list(state.meta), list(state.meta.values()))


def test_the_operator_keeps_torchs_rules() -> None:
    state = ops.prepack(ops.random_weight(Scheme(3, 64, False, 1.0), (40, 130)), "cpu")
    arguments = traced_arguments(inputs(3, 130), state)
    torch.library.opcheck(torch.ops.autocomp.linear_wna16.default, arguments)
    unknown = (*arguments[:3], "nobody", *arguments[4:])
    with pytest.raises(ValueError, match=r"'nobody'.*cpu"):
        torch.ops.autocomp.linear_wna16(*unknown)


@pytest.mark.parametrize("label", ["w4g64", "w3g64ao1"])
def test_compiled_modules_have_it_as_one_node(label: str) -> None:
    torch._dynamo.reset()
    module = PackedLinear(ops.random_weight(Scheme.parse(label), (40, 128)), torch.randn(40))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for shape in ((3, 128), (2, 5, 128)):
            x = torch.randn(shape).bfloat16()
            assert torch.equal(compiled(x), module(x))
    torch._dynamo.reset()


# Other instruction sets than this CPU's best.


def marches() -> list[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    flags = torch.cpu._is_avx2_supported(), torch.cpu._is_avx512_supported()
    return ["x86-64", *(march for march, has in zip(("x86-64-v3", "x86-64-v4"), flags) if has)]


@pytest.mark.parametrize("march", marches())
def test_other_instruction_sets(march: str) -> None:
    variant = {"x86-64": "plain", "x86-64-v3": "avx2", "x86-64-v4": "avx512"}[march]
    chosen = "numbers or guard or finite"
    code = (
        "import pytest, sys; from autocomp.kernels import cpu_linear; "
        f"assert cpu_linear.variant() == '{variant}', cpu_linear.variant(); "
        f"sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '-k', {chosen!r}, {__file__!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"AUTOCOMP_MARCH": march},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
