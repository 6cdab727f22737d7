"""Linears on quantized activations and the low-rank correction."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from autocomp.kernels import native
from autocomp.kernels.activations import linear_fp8, linear_w4a8, linear_w8a8, low_rank_add
from autocomp.kernels.activations_reference import dequantize, quantize_e4m3, quantize_int8
from autocomp.kernels.library import Implementation, Operator
from autocomp.kernels.packing import pack
from autocomp.testing.operators import CHECKS, Check, check_implementation, check_parity

OPERATORS = (linear_w8a8, linear_w4a8, linear_fp8, low_rank_add)
BUILT_IN = [(o, i.name) for o in OPERATORS for i in o.implementations if i.device_type == "cpu"]
NAN, INF = float("nan"), float("inf")
needs_c = pytest.mark.skipif(bool(native.unavailable("activations")), reason="no C compiler")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that spin while they wait make small operators slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("operator, name", BUILT_IN, ids=[f"{o.name}-{n}" for o, n in BUILT_IN])
def test_built_in_implementations(operator: Operator, name: str, check: Check) -> None:
    found = next(i for i in operator.implementations if (i.name, i.device_type) == (name, "cpu"))
    if found.unusable():
        pytest.skip(found.unusable())
    check(operator, name, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_implementations_on_the_gpu(operator: Operator) -> None:
    for implementation in operator.implementations:
        if implementation.device_type == "cuda" and not implementation.unusable():
            check_implementation(operator, implementation.name, "cuda")


def test_a_wrong_implementation_is_found_out() -> None:
    def wrong(*args: torch.Tensor) -> torch.Tensor:
        return 1.01 * linear_fp8.reference(*args)

    former = list(linear_fp8.implementations)
    linear_fp8.register(Implementation("wrong", "cpu", wrong))
    try:
        with pytest.raises(AssertionError, match="relative error"):
            check_parity(linear_fp8, "wrong", "cpu")
    finally:
        linear_fp8.implementations[:] = former


# ---- quantization ----


def test_int8_codes_round_to_even_and_keep_a_row_of_zeros() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [1e-38, 0.0, 0.0, -1e-38]])
    codes, scale = quantize_int8(x)
    assert codes.tolist()[:2] == [[127, 0, 2, -2], [0, 0, 0, 0]]
    assert scale[0] == 1.0 and bool((scale > 0).all())
    assert not codes[2].any()  # too small to tell from zero


def test_rows_that_are_not_finite_get_no_scale() -> None:
    x = torch.tensor([[1.0, NAN], [INF, 1.0], [1.0, 2.0]])
    for quantize in (quantize_int8, quantize_e4m3):
        assert quantize(x)[1].isnan().tolist() == [True, True, False]


def test_a_static_scale_saturates() -> None:
    x = torch.tensor([[1000.0, -INF, 0.25, -0.75], [NAN, 1.0, 1.0, 1.0]])
    codes, scale = quantize_int8(x, torch.tensor([0.5]))
    assert codes[0].tolist() == [127, -127, 0, -2]
    assert scale[0] == 0.5 and scale[1].isnan()


def test_e4m3_uses_the_whole_range() -> None:
    values, scale = quantize_e4m3(torch.tensor([[-7.0, 3.5, 0.0]]))
    assert values.float().tolist() == [[-448.0, 224.0, 0.0]]
    assert float(scale) == 7.0 / 448.0


# ---- exactness ----


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_every_e4m3_number_is_read_right(name: str) -> None:
    """Products with 1 give the 256 numbers of the format back, also the subnormal ones and NaN."""
    if name == "cpu" and native.unavailable("activations"):
        pytest.skip("no C compiler")
    weight = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).unsqueeze(1)
    for dtype in (torch.float32, torch.bfloat16):
        with linear_fp8.forced(name):
            y = linear_fp8(torch.full((1, 1), 448.0, dtype=dtype), weight, torch.full((256,), 1 / 448))
        torch.testing.assert_close(y[0], weight[:, 0].to(dtype), equal_nan=True)


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 1000, 65536])
def test_sums_of_int8_products_are_exact(name: str, columns: int) -> None:
    """With scales of 1 the result is the integer sum, rounded to float32 once; extreme codes included."""
    if name == "cpu" and native.unavailable("activations"):
        pytest.skip("no C compiler")
    seed = torch.Generator().manual_seed(columns)
    q = torch.randint(-127, 128, (7, columns), generator=seed)
    q[:, 0] = 127  # the largest of each row, so that its scale is 1
    q[1], q[2] = 127, torch.where(torch.arange(columns) % 2 == 0, 127, -127)
    codes = torch.randint(-128, 128, (9, columns), generator=seed, dtype=torch.int8)
    codes[0], codes[1] = -128, 127
    with linear_w8a8.forced(name):
        y = linear_w8a8(q.float(), codes, torch.ones(9))
    assert torch.equal(y, (q @ codes.long().T).float())


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("group", [0, 64, 72, 128])
def test_sums_of_4_bit_products_are_exact(name: str, group: int) -> None:
    """Scales of 1 and sums below 2^24: every step is exact in float32, whatever its order."""
    if name == "cpu" and native.unavailable("activations"):
        pytest.skip("no C compiler")
    columns, seed = 333, torch.Generator().manual_seed(group)
    q = torch.randint(-127, 128, (5, columns), generator=seed)
    q[:, -1] = -127
    codes = torch.randint(0, 16, (6, columns), generator=seed, dtype=torch.uint8)
    codes[0], codes[1] = 0, 15
    groups = -(-columns // group) if group else 1
    zero = torch.randint(0, 16, (6, groups), generator=seed, dtype=torch.uint8)
    zero[0], zero[1] = 15, 0
    spread = zero.repeat_interleave(group or columns, dim=1)[:, :columns].long()
    with linear_w4a8.forced(name):
        y = linear_w4a8(q.float(), pack(codes, 4), torch.ones(6, groups), zero, group)
    assert torch.equal(y, (q @ (codes.long() - spread).T).float())


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 20), rows=st.integers(1, 40), columns=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), bias=st.booleans(),
    group=st.sampled_from([0, 8, 24, 32, 64, 128]), asymmetric=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(
    tokens: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    bias: bool,
    group: int,
    asymmetric: bool,
    seed: int,
) -> None:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=made).to(dtype)
    b = torch.randn(rows, generator=made) if bias else None
    codes = torch.randint(-128, 128, (rows, columns), generator=made, dtype=torch.int8)
    scale = torch.rand(rows, generator=made)
    close(linear_w8a8, x, codes.float() * scale.unsqueeze(1), b, (x, codes, scale, b))
    groups = -(-columns // group) if group else 1
    nibbles, scales = codes.view(torch.uint8) & 15, torch.rand(rows, groups, generator=made)
    zero = torch.randint(0, 16, (rows, groups), generator=made, dtype=torch.uint8) if asymmetric else None
    weight = dequantize(nibbles, scales, zero, 4, group).float()
    close(linear_w4a8, x, weight, b, (x, pack(nibbles, 4), scales, zero, group, b))


def close(
    operator: Operator,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    args: tuple[object, ...],
) -> None:
    """Every element within some roundings of the sizes of what was added up for it."""
    found, wanted = operator(*args), operator.reference(*args)
    largest = x.float().abs().amax(1, keepdim=True).clamp_min(1e-3)
    size = (x.float().abs() + largest / 127) @ weight.abs().T + (0 if bias is None else bias.abs())
    error = (found.double() - wanted.double()).abs()
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert bool(
        (error <= 8 * torch.finfo(torch.float32).eps * size + torch.finfo(x.dtype).eps * wanted.abs()).all()
    )


# ---- special values ----


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_what_is_not_finite_stays_in_its_row(name: str) -> None:
    if name == "cpu" and native.unavailable("activations"):
        pytest.skip("no C compiler")
    x = torch.randn(9, 100, generator=torch.Generator().manual_seed(0))
    x[1, 7], x[4, 99], x[6] = NAN, -INF, 0.0
    codes = torch.randint(-128, 128, (5, 100), dtype=torch.int8)
    bias = torch.arange(5.0)
    with linear_w8a8.forced(name):
        dynamic = linear_w8a8(x, codes, torch.ones(5), bias)
        static = linear_w8a8(x, codes, torch.ones(5), bias, torch.tensor(0.01))
    assert dynamic.isnan().all(1).nonzero().flatten().tolist() == [1, 4]
    assert static.isnan().all(1).nonzero().flatten().tolist() == [1]
    assert torch.equal(dynamic[6], bias) and torch.equal(static[6], bias)
    assert dynamic[[0, 2, 3, 5, 7, 8]].isfinite().all() and static[4].isfinite().all()


def test_empty_inputs() -> None:
    assert linear_w8a8(torch.empty(0, 8), torch.zeros(3, 8, dtype=torch.int8), torch.ones(3)).shape == (0, 3)
    assert linear_fp8(torch.empty(0, 8), torch.zeros(3, 8).to(torch.float8_e4m3fn), torch.ones(3)).shape == (
        0,
        3,
    )
    packed = torch.zeros(3, 1, dtype=torch.int32)
    assert linear_w4a8(torch.empty(0, 8), packed, torch.ones(3, 1), None, 0).shape == (0, 3)
    y = torch.randn(2, 3)
    assert torch.equal(low_rank_add(torch.randn(2, 8), y, torch.empty(0, 8), torch.empty(3, 0)), y)


# ---- C: memory, threads, variants ----


@needs_c
@pytest.mark.parametrize("tokens, rows, columns", [(1, 5, 31), (3, 33, 65), (13, 7, 130)])
def test_c_writes_nothing_beside_its_result(
    tokens: int, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def guarded(like: torch.Tensor, *shape: int) -> torch.Tensor:
        whole = torch.full((shape[0] * shape[1] + 256,), 7.0, dtype=like.dtype)
        kept.append(whole)
        return whole[128:-128].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(tokens, columns).to(dtype)
        with linear_w8a8.forced("cpu"), linear_w4a8.forced("cpu"):
            linear_w8a8(x, codes, torch.ones(rows))
            linear_w4a8(x, pack(codes.view(torch.uint8) & 15, 4), torch.ones(rows, 1), None, 0)
    assert len(kept) == 4
    for whole in kept:
        assert bool((whole[:128] == 7).all()) and bool((whole[-128:] == 7).all())
        assert not bool((whole[128:-128] == 7).all())


@needs_c
def test_the_number_of_threads_changes_nothing() -> None:
    seed = torch.Generator().manual_seed(3)
    x = torch.randn(11, 320, generator=seed).bfloat16()
    codes = torch.randint(-128, 128, (77, 320), generator=seed, dtype=torch.int8)
    packed, scale = pack(codes.view(torch.uint8) & 15, 4), torch.rand(77, 5, generator=seed)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        with linear_w8a8.forced("cpu"), linear_w4a8.forced("cpu"):
            results.append(
                torch.cat([linear_w8a8(x, codes, scale[:, 0]), linear_w4a8(x, packed, scale, None, 64)])
            )
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_c
def test_large_scratch_memory_is_reused_and_released() -> None:
    """Sizes go up and down over what is kept between calls; results don't change."""
    codes = torch.randint(-128, 128, (4, 4096), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    for tokens in (1, 5000, 2, 300, 1):
        x = torch.randn(tokens, 4096, generator=torch.Generator().manual_seed(tokens))
        with linear_w8a8.forced("cpu"):
            y = linear_w8a8(x, codes, torch.ones(4))
        wanted = linear_w8a8.reference(x[-1:], codes, torch.ones(4))
        torch.testing.assert_close(y[-1:], wanted, rtol=1e-5, atol=1e-2)


VARIANT = """
import torch
torch.set_num_threads(2)
from autocomp.kernels.activations import linear_fp8, linear_w4a8, linear_w8a8
from autocomp.testing.operators import CHECKS
for operator in (linear_w8a8, linear_w4a8, linear_fp8):
    for check in CHECKS.values():
        check(operator, "cpu", "cpu")
print("passed")
"""


def run_python(code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: what is compiled, and whether, is decided once a process."""
    env = {**os.environ, "GOMP_SPINCOUNT": "0", "AUTOCOMP_CACHE": str(cache), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280)


@needs_c
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="variants of x86")
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
def test_variants_for_other_instruction_sets(march: str, tmp_path: Path) -> None:
    if march == "x86-64-v3" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this CPU has no AVX2")
    done = run_python(VARIANT, tmp_path, AUTOCOMP_MARCH=march)
    assert done.stdout.strip() == "passed", done.stderr[-2000:]


WITHOUT = """
import torch
from autocomp.kernels.activations import linear_fp8, linear_w4a8, linear_w8a8
from autocomp.kernels.experts import GroupedWeights
x, codes, scale = torch.randn(3, 64), torch.randint(-128, 128, (8, 64), dtype=torch.int8), torch.ones(8)
packed = torch.randint(-99, 99, (8, 8), dtype=torch.int32)
chosen = linear_w8a8.choose(x, codes, scale), linear_w4a8.choose(x, packed, scale[:, None], None, 0)
print(*chosen, linear_fp8.choose(x, codes.to(torch.float8_e4m3fn), scale))
torch.testing.assert_close(linear_w8a8(x, codes, scale), linear_w8a8.reference(x, codes, scale))
experts = GroupedWeights.build([torch.randn(4, 64), torch.randn(4, 64)])
print(experts.layout, tuple(experts(x, torch.tensor([[0], [1], [0]])).shape))
"""


@pytest.mark.parametrize(
    "how", [{"AUTOCOMP_NATIVE": "0"}, {"CC": "/nonexistent/cc"}], ids=["off", "no compiler"]
)
def test_without_c_torch_takes_over(how: dict[str, str], tmp_path: Path) -> None:
    done = run_python(WITHOUT, tmp_path, **how)
    assert done.stdout.split("\n")[:2] == ["torch torch torch", "canonical (3, 4)"], done.stderr[-2000:]


# ---- operators ----


def sample(operator: Operator) -> tuple[object, ...]:
    x, ones = torch.randn(3, 64), torch.ones(8)
    return {
        "linear_w8a8": (x, torch.ones(8, 64, dtype=torch.int8), ones, ones, torch.tensor([0.1])),
        "linear_w4a8": (x, torch.ones(8, 8, dtype=torch.int32), torch.ones(8, 2), None, 32),
        "linear_fp8": (x, torch.ones(8, 64).to(torch.float8_e4m3fn), ones, ones.bfloat16()),
        "low_rank_add": (x, torch.randn(3, 8), torch.randn(4, 64), torch.randn(8, 4)),
    }[operator.name]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_torch_accepts_the_operator(operator: Operator) -> None:
    overload = getattr(torch.ops.autocomp, operator.name).default
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if operator is linear_fp8:  # to check the schema torch computes with the arguments; it can't in e4m3
        utils.remove("test_schema")
    torch.library.opcheck(overload, sample(operator), test_utils=utils)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_fake_tensors_have_the_real_shape(operator: Operator) -> None:
    real = operator(*sample(operator))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in sample(operator)]
        fake = operator(*fakes)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


X, CODES, ONES = torch.randn(3, 64), torch.ones(8, 64, dtype=torch.int8), torch.ones(8)
PACKED = torch.ones(8, 8, dtype=torch.int32)
WRONG = [
    (linear_w8a8, (X, CODES.float(), ONES), "codes must be int8"),
    (linear_w8a8, (X[:, :63], CODES, ONES), "x has 63 features, the weight 64"),
    (linear_w8a8, (X.double(), CODES, ONES), "x must be .* float64"),
    (linear_w8a8, (X, CODES, ONES[:7]), "scale must be float32 .8., one a row; got float32 .7."),
    (linear_w8a8, (X, CODES, ONES, ONES[:2]), "bias must be float .8."),
    (linear_w8a8, (X, CODES, ONES, None, ONES), "x_scale must be one float32"),
    (linear_w4a8, (X, PACKED[:, :7], ONES[:, None], None, 0), "64 features of 4 bits fill 8 words"),
    (linear_w4a8, (X, PACKED, ONES[:, None], None, 32), "scale must be float .8, 2. for groups of 32"),
    (linear_w4a8, (X, PACKED, ONES[:, None], ONES[:, None], 0), "zero must be uint8"),
    (linear_w4a8, (X, PACKED, ONES[:, None], None, -1), "group must be .* got -1"),
    (linear_fp8, (X, CODES.float(), ONES), "weight must be float8_e4m3fn"),
    (low_rank_add, (X, X[:, :8], ONES[None], ONES[:, None]), "shapes must be"),
    (low_rank_add, (X, X[:, :8].half(), X, X), "one float dtype"),
]


@pytest.mark.parametrize("operator, args, message", WRONG, ids=[m[:25] for _, _, m in WRONG])
def test_wrong_arguments_are_refused(operator: Operator, args: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        operator(*args)


def test_the_low_rank_correction_mends_a_linear() -> None:
    """With the leading singular vectors of the error, the corrected output is closer by what they hold."""
    seed = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=seed)
    error = torch.randn(48, 4, generator=seed) @ torch.randn(4, 32, generator=seed)
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    x = torch.randn(5, 32, generator=seed)
    mended = low_rank_add(x, x @ (weight - error).T, v[:4], u[:, :4] * s[:4])
    torch.testing.assert_close(mended, x @ weight.T, rtol=1e-4, atol=1e-4)
