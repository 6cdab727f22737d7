"""Clipping never loses against the full range, and wins where it should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.quantize.rounding import quantize
from autocomp.quantize.scheme import Scheme


def group_errors(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor, **kwargs: object
) -> torch.Tensor:
    """Weighted squared error of each group, float64 ``[N, G]``."""
    tensor = quantize(weight, scheme, **kwargs)  # type: ignore[arg-type]
    error = (tensor.dequantize().double() - weight.double()).square() * importance.double()
    columns = weight.shape[1]
    width = scheme.group or columns
    padded = torch.nn.functional.pad(error, (0, -columns % width))
    return padded.unflatten(1, (-1, width)).sum(-1)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([0, 16, 32]),
    symmetric=st.booleans(),
    columns=st.integers(1, 100),
    heavy=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 999),
)
def test_no_group_is_worse_than_rounding_to_nearest(
    bits: int, group: int, symmetric: bool, columns: int, heavy: bool, weighted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, columns, generator=generator)
    weight = weight**3 if heavy else weight
    importance = torch.rand(columns, generator=generator) ** 4 if weighted else torch.ones(columns)
    scheme = Scheme(bits, group, symmetric)
    nearest = group_errors(weight, scheme, importance)
    clipped = group_errors(weight, scheme, importance, method="mse", hessian=importance)
    assert bool((clipped <= nearest * (1 + 1e-5) + 1e-12).all())


@pytest.mark.parametrize("label", ["w2g64", "w3g64a", "w3", "w4"])
def test_clipping_pays_on_normal_weights(label: str) -> None:
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
    scheme, ones = Scheme.parse(label), torch.ones(192)
    nearest = group_errors(weight, scheme, ones).sum()
    assert group_errors(weight, scheme, ones, method="mse").sum() < 0.9 * nearest


def test_importance_decides_whom_clipping_serves() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(128)
    importance[::4] = 100.0
    scheme = Scheme.parse("w3g64")
    plain = group_errors(weight, scheme, importance, method="mse").sum()
    aware = group_errors(weight, scheme, importance, method="mse", hessian=importance).sum()
    assert aware < 0.98 * plain
    full = quantize(weight, scheme, method="mse", hessian=torch.diag(importance))
    scaled = quantize(weight, scheme, method="mse", hessian=importance * 1e-6)
    assert torch.equal(full.codes, scaled.codes)  # only ratios count, and only the diagonal


def test_inputs_that_are_never_seen_leave_the_full_range() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    tensor = quantize(weight, Scheme.parse("w3g32"), method="mse", hessian=torch.zeros(64))
    assert torch.equal(tensor.codes, quantize(weight, Scheme.parse("w3g32")).codes)


def test_unusable_importance_is_named() -> None:
    weight = torch.randn(8, 64)
    with pytest.raises(ValueError, match=r"\[64, 64\] or \[64\]; got \[63\]"):
        quantize(weight, Scheme(4), method="mse", hessian=torch.ones(63))
    with pytest.raises(ValueError, match="NaN, infinite or negative"):
        quantize(weight, Scheme(4), method="mse", hessian=-torch.ones(64))
    with pytest.raises(ValueError, match="NaN, infinite or negative"):
        quantize(weight, Scheme(4), method="mse", hessian=torch.full((64,), float("nan")))
