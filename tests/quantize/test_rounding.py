"""Round to nearest: error bounds, grids, outliers, extreme and bad weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.quantize.grid import Grid, grid_of_range, spans
from autocomp.quantize.rounding import CHUNK, quantize
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

BITS = st.sampled_from([2, 3, 4, 5, 6, 8])
GROUPS = st.sampled_from([0, 8, 24, 64])
DTYPES = st.sampled_from([torch.bfloat16, torch.float16])


def random_weight(rows: int, columns: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


def by_column(tensor: QuantizedTensor, part: torch.Tensor) -> torch.Tensor:
    """``[N, G]`` to ``[N, K]``."""
    columns = tensor.shape[1]
    return part.repeat_interleave(tensor.scheme.group or columns, dim=1)[:, :columns]


@pytest.mark.parametrize(
    "columns, group, widths", [(96, 32, [32]), (100, 32, [32, 4]), (5, 8, [5]), (7, 0, [7])]
)
def test_spans_cover_a_row_once(columns: int, group: int, widths: list[int]) -> None:
    found = spans(columns, group)
    assert [span.width for span in found] == widths
    covered = [k for span in found for k in range(columns)[span.columns]]
    groups = [g for span in found for g in range(Scheme(4, group).groups(columns))[span.groups]]
    assert covered == list(range(columns))
    assert groups == list(range(Scheme(4, group).groups(columns)))


@settings(max_examples=100, deadline=None)
@given(
    bits=BITS,
    group=GROUPS,
    symmetric=st.booleans(),
    rows=st.integers(1, 12),
    columns=st.integers(1, 130),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([1e-6, 1e-2, 1.0, 3e3]),
    shift=st.sampled_from([0.0, 2.5]),
    dtype=DTYPES,
)
def test_error_is_half_a_step_inside_the_range(
    bits: int,
    group: int,
    symmetric: bool,
    rows: int,
    columns: int,
    seed: int,
    spread: float,
    shift: float,
    dtype: torch.dtype,
) -> None:
    weight = random_weight(rows, columns, seed, spread) + shift * spread
    tensor = quantize(weight, Scheme(bits, group, symmetric), scale_dtype=dtype)
    scale = by_column(tensor, tensor.scale).double()
    zero = 1 << (bits - 1) if tensor.zero is None else by_column(tensor, tensor.zero).double()
    low, high = (-0.5 - zero) * scale, ((1 << bits) - 0.5 - zero) * scale
    inside = (weight >= low) & (weight <= high)
    error = (weight.double() - tensor.dequantize().double()).abs()
    assert bool((error[inside] <= 0.5 * scale[inside] * (1 + 1e-5)).all())
    # Rounding the scale to 16 bits may leave the extremes outside, by that rounding (2^-8, or 2^-7 where
    # a subnormal was just not stepped up) of at most 2^bits steps.
    assert bool((error <= scale * (0.5 + 2.0 ** (bits - 7)) * (1 + 1e-5)).all())


@settings(max_examples=40, deadline=None)
@given(
    bits=BITS, group=GROUPS, symmetric=st.booleans(), columns=st.integers(1, 130), seed=st.integers(0, 999)
)
def test_values_on_the_grid_are_kept_exactly(
    bits: int, group: int, symmetric: bool, columns: int, seed: int
) -> None:
    tensor = quantize(random_weight(6, columns, seed), Scheme(bits, group, symmetric))
    zero = None if tensor.zero is None else by_column(tensor, tensor.zero).float()
    grid = Grid(by_column(tensor, tensor.scale), zero, bits)
    assert torch.equal(grid.encode(tensor.dequantize()).to(torch.uint8), tensor.codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_asymmetric_rounding_of_its_own_result_changes_nothing(bits: int) -> None:
    levels = torch.arange(1 << bits, dtype=torch.float32)
    weight = torch.stack(
        [(levels - 1) * 0.25, levels * -0.5]
    )  # all codes used: the range gives the scale back
    once = quantize(weight, Scheme(bits, symmetric=False))
    again = quantize(once.dequantize(), Scheme(bits, symmetric=False))
    assert torch.equal(once.dequantize(), weight)
    assert torch.equal(again.codes, once.codes) and torch.equal(again.scale, once.scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_scale_spends_all_codes(bits: int) -> None:
    reach = (1 << (bits - 1)) - 0.5
    weight = torch.linspace(-reach, reach, 4096)[None]
    tensor = quantize(weight, Scheme(bits))
    assert tensor.scale.tolist() == [[1.0]]
    assert tensor.codes.unique().tolist() == list(range(1 << bits))


def test_codes_are_computed_with_the_stored_scale() -> None:
    """1/3 is not a bfloat16: with the exact scale the middle weight would round up to code 131."""
    scale = torch.tensor(1 / 3).to(torch.bfloat16)
    weight = torch.tensor([[127.5 / 3, 2.5015 * float(scale), 2.4985 * float(scale)]])
    tensor = quantize(weight, Scheme(8))
    assert tensor.scale.item() == scale.item() != 1 / 3
    assert tensor.codes.tolist() == [[255, 131, 130]]


@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("label", ["w3g64", "w4g64ao0.3", "w2"])
def test_chunks_of_rows_do_not_show(method: str, label: str) -> None:
    columns = 200
    rows = CHUNK // columns + 7
    weight = random_weight(rows, columns)
    scheme = Scheme.parse(label)
    whole = quantize(weight, scheme, method=method)
    if scheme.outliers:
        assert whole.outlier_index is not None
        chosen = weight.flatten().abs()[whole.outlier_index.long()]
        rest = weight.flatten().abs()
        rest[whole.outlier_index.long()] = 0
        assert chosen.min() >= rest.max()
    else:
        tail = quantize(weight[-9:], scheme, method=method)
        assert torch.equal(tail.codes, whole.codes[-9:])


def test_outliers_are_exact_and_do_not_widen_ranges() -> None:
    weight = random_weight(16, 64)
    weight[3, 5], weight[9, 60] = 100.0, -200.0
    plain = quantize(weight, Scheme.parse("w4g32"))
    kept = quantize(weight, Scheme.parse("w4g32o0.2"))
    assert kept.outlier_index is not None and kept.outlier_value is not None
    assert kept.outlier_index.tolist() == [3 * 64 + 5, 9 * 64 + 60]
    assert kept.outlier_value.tolist() == [100.0, -200.0]
    assert kept.dequantize()[3, 5] == 100.0 and kept.dequantize()[9, 60] == -200.0
    assert float(kept.scale.max()) < 1.0 < float(plain.scale.max())
    assert kept.codes[[3, 9], [5, 60]].tolist() == [8, 8]


@pytest.mark.parametrize("method", ["rtn", "mse", "gptq", "gptq-mse"])
@pytest.mark.parametrize("label", ["w4g8", "w3g8a", "w2", "w8ao1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_of_zeros_stay_zero(method: str, label: str, dtype: torch.dtype) -> None:
    weight = random_weight(4, 20)
    weight[1] = 0
    weight[2, 8:16] = 0
    tensor = quantize(weight, Scheme.parse(label), method=method, hessian=torch.eye(20), scale_dtype=dtype)
    values = tensor.dequantize()
    assert bool((values[1] == 0).all()) and bool((tensor.scale > 0).all())
    assert label == "w2" or label.startswith("w8") or bool((values[2, 8:16] == 0).all())
    assert bool(torch.isfinite(values).all())


def test_tiny_scales_are_stepped_up_not_flushed() -> None:
    smallest = torch.finfo(torch.float16).smallest_normal * 2.0**-10
    for reach in (smallest * 1e-3, smallest * 0.4, smallest * 1.4, smallest * 2.6):
        for symmetric in (True, False):
            low, high = torch.tensor([-reach * 7.5]), torch.tensor([reach * 7.5])
            scale = grid_of_range(low, high, 4, symmetric, torch.float16).scale.float()
            assert float(scale) >= reach and float(scale) <= max(2 * reach, smallest)
    weight = random_weight(4, 32, spread=1e-8)
    error = (quantize(weight, Scheme(4), scale_dtype=torch.float16).dequantize() - weight).abs().max()
    assert error <= smallest / 2 * 1.01


def test_scales_and_outliers_beyond_float16_are_refused_with_the_remedy() -> None:
    weight = random_weight(4, 32)
    weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"above the largest torch\.float16 .*bfloat16"):
        quantize(weight, Scheme(4), scale_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"an outlier of 1e\+06 .*bfloat16"):
        quantize(weight, Scheme.parse("w4o1"), scale_dtype=torch.float16)
    assert abs(float(quantize(weight, Scheme(4)).dequantize()[0, 0]) / 1e6 - 1) < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["rtn", "mse", "gptq"])
def test_any_float_weight_gives_what_its_float32_copy_gives(dtype: torch.dtype, method: str) -> None:
    parameter = torch.nn.Parameter(random_weight(12, 40).to(dtype))
    before = parameter.detach().clone()
    scheme = Scheme.parse("w4g16ao1")
    tensor = quantize(parameter, scheme, method=method, hessian=torch.eye(40))
    copy = quantize(before.float(), scheme, method=method, hessian=torch.eye(40))
    assert torch.equal(tensor.codes, copy.codes) and torch.equal(tensor.scale, copy.scale)
    assert not tensor.scale.requires_grad and torch.equal(parameter.detach(), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_named(bad: float) -> None:
    weight = random_weight(4, 32)
    weight[2, 7] = bad
    with pytest.raises(ValueError, match=r"1 NaN or infinite values, the first at \[2, 7\]"):
        quantize(weight, Scheme(4))


def test_bad_arguments_are_named() -> None:
    weight = random_weight(4, 32)
    with pytest.raises(ValueError, match="unknown method 'awq'"):
        quantize(weight, Scheme(4), method="awq")
    with pytest.raises(ValueError, match="not quantized"):
        quantize(weight, Scheme(16))
    with pytest.raises(ValueError, match=r"float matrix .*int64"):
        quantize(torch.ones(4, 4, dtype=torch.int64), Scheme(4))
    with pytest.raises(ValueError, match=r"\[0, 4\]"):
        quantize(torch.ones(0, 4), Scheme(4))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        quantize(weight, Scheme(4), scale_dtype=torch.float32)
