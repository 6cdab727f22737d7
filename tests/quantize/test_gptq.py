"""GPTQ: the algorithm against its dense definition, its gain on correlated inputs, and bad Hessians."""

from __future__ import annotations

import pytest
import torch

from autocomp.quantize.gptq import BLOCK, inverse_factor
from autocomp.quantize.grid import Grid, range_grid
from autocomp.quantize.rounding import quantize
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

LABELS = ["w2g32", "w3g24a", "w4g64", "w4g64a", "w5", "w6g32", "w8", "w3g32o1", "w4ao2", "w4g200"]


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def correlated_inputs(samples: int, columns: int, seed: int = 1) -> torch.Tensor:
    """A few strong directions under noise, as the inputs of a layer have."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(samples, 16, generator=generator) @ torch.randn(16, columns, generator=generator)
    return torch.randn(samples, columns, generator=generator) + 0.5 * factors


def output_error(tensor: QuantizedTensor, weight: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs.double() @ (tensor.dequantize() - weight).double().t()).norm())


def plain_gptq(weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Codes by the definition: after each column the inverse Hessian of the rest is computed anew (OBQ,
    equation 2 of the paper, for the fixed order), in float64, without blocks or factors."""
    work, columns = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(columns)
    group = scheme.group or columns
    codes = torch.empty_like(weight)
    for j in range(columns):
        if j % group == 0:
            found = range_grid(work[:, j : j + group].float(), scheme.bits, scheme.symmetric, torch.bfloat16)
            grid = Grid(found.scale.double(), found.zero, found.bits)
        inverse = torch.linalg.inv(damped[j:, j:])
        codes[:, j] = grid.encode(work[:, j])
        error = (work[:, j] - grid.decode(codes[:, j])) / inverse[0, 0]
        work[:, j:] -= error[:, None] * inverse[0]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("label", ["w2g32", "w3g24a", "w4", "w4g200", "w8g64"])
def test_equal_to_the_definition(label: str) -> None:
    columns = 2 * BLOCK + 40  # three blocks, and short last groups
    weight, inputs = random_weight(6, columns), correlated_inputs(600, columns)
    hessian = inputs.t() @ inputs
    tensor = quantize(weight, Scheme.parse(label), method="gptq", hessian=hessian)
    expected = plain_gptq(weight, hessian, Scheme.parse(label))
    # A weight within float32 error of a tie may fall either way, and takes the rest of its row along.
    same_rows = (tensor.codes == expected).all(dim=1).sum()
    assert int(same_rows) >= 4
    first = tensor.codes[:, :BLOCK] == expected[:, :BLOCK]
    assert float(first.float().mean()) > 0.9


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("method", ["gptq", "gptq-mse"])
def test_less_output_error_than_without_compensation(label: str, method: str) -> None:
    weight, inputs = random_weight(48, 300), correlated_inputs(1200, 300)
    fresh = correlated_inputs(1200, 300)[torch.randperm(1200, generator=torch.Generator().manual_seed(3))][
        :600
    ]
    scheme, hessian = Scheme.parse(label), inputs.t() @ inputs
    plain = quantize(weight, scheme, method=method.replace("gptq-", "").replace("gptq", "rtn"))
    tensor = quantize(weight, scheme, method=method, hessian=hessian)
    assert output_error(tensor, weight, inputs) < 0.75 * output_error(plain, weight, inputs)
    assert output_error(tensor, weight, fresh) < 0.75 * output_error(plain, weight, fresh)
    assert torch.equal(
        QuantizedTensor.from_state(tensor.to_state(), scheme).dequantize(), tensor.dequantize()
    )


@pytest.mark.parametrize("label", ["w2g32", "w3g32a", "w3"])
def test_clipping_helps_few_bits(label: str) -> None:
    weight, inputs = random_weight(48, 300), correlated_inputs(1200, 300)
    hessian = inputs.t() @ inputs
    full = quantize(weight, Scheme.parse(label), method="gptq", hessian=hessian)
    clipped = quantize(weight, Scheme.parse(label), method="gptq-mse", hessian=hessian)
    assert output_error(clipped, weight, inputs) < 0.95 * output_error(full, weight, inputs)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("method, plain", [("gptq", "rtn"), ("gptq-mse", "mse")])
def test_uncorrelated_inputs_leave_nothing_to_compensate(label: str, method: str, plain: str) -> None:
    weight, scheme = random_weight(16, 300), Scheme.parse(label)
    diagonal = torch.eye(300) * 7.0
    tensor = quantize(weight, scheme, method=method, hessian=diagonal)
    expected = quantize(weight, scheme, method=plain)
    assert torch.equal(tensor.codes, expected.codes)
    assert torch.equal(tensor.scale, expected.scale)
    assert torch.equal(tensor.dequantize(), expected.dequantize())


def test_same_result_twice_and_whatever_the_hessians_scale() -> None:
    weight, inputs = random_weight(16, 200), correlated_inputs(400, 200)
    hessian, scheme = inputs.t() @ inputs, Scheme.parse("w3g64")
    before = hessian.clone()
    first = quantize(weight, scheme, method="gptq", hessian=hessian)
    again = quantize(weight, scheme, method="gptq", hessian=hessian)
    mean = quantize(weight, scheme, method="gptq", hessian=hessian.double() / 1024)
    assert torch.equal(first.codes, again.codes) and torch.equal(first.codes, mean.codes)
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("size", [1, 2, 127, 300])
def test_inverse_factor_is_the_factor_of_the_damped_inverse(size: int) -> None:
    inputs = correlated_inputs(2 * size + 1, size).double()
    hessian = inputs.t() @ inputs
    upper = inverse_factor(hessian, size).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(size)
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(size).double(), atol=1e-4, rtol=0)
    assert torch.equal(upper, upper.triu()) and bool((upper.diagonal() > 0).all())


def test_inputs_that_are_always_zero_keep_their_weights() -> None:
    weight, inputs = random_weight(16, 96), correlated_inputs(400, 96)
    inputs[:, 10:20] = 0
    scheme = Scheme.parse("w8g32")
    tensor = quantize(weight, scheme, method="gptq", hessian=inputs.t() @ inputs)
    error = (tensor.dequantize() - weight)[:, 10:20].abs()
    assert bool((error <= tensor.scale[:, :1].float() * 0.8).all())
    never = quantize(weight, scheme, method="gptq", hessian=torch.zeros(96, 96))
    assert torch.equal(never.codes, quantize(weight, scheme).codes)


def test_fewer_samples_than_inputs_and_repeated_inputs() -> None:
    weight, inputs = random_weight(16, 128), correlated_inputs(20, 128)
    inputs[:, 64:] = inputs[:, :64]
    hessian = inputs.t() @ inputs
    tensor = quantize(weight, Scheme.parse("w4g32"), method="gptq", hessian=hessian)
    plain = quantize(weight, Scheme.parse("w4g32"))
    assert output_error(tensor, weight, inputs) < 0.4 * output_error(plain, weight, inputs)


def test_more_damping_rescues_a_slightly_indefinite_hessian() -> None:
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 1.05  # smallest eigenvalue -0.05: 1 % is not enough, 10 % is
    upper = inverse_factor(hessian, 32).double()
    damped = hessian.double() + 0.1 * torch.eye(32)
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(32).double(), atol=1e-5, rtol=0)


def test_bad_hessians_are_named() -> None:
    weight, scheme = random_weight(4, 32), Scheme(4)
    with pytest.raises(ValueError, match="'gptq' needs hessian"):
        quantize(weight, scheme, method="gptq")
    with pytest.raises(ValueError, match=r"\[32, 32\]; got \[31, 31\]"):
        quantize(weight, scheme, method="gptq", hessian=torch.eye(31))
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weight, scheme, method="gptq", hessian=torch.eye(32) * float("nan"))
    for bad in (-torch.eye(32), torch.ones(32, 32) - 3 * torch.eye(32)):
        with pytest.raises(ValueError, match="not positive semidefinite"):
            quantize(weight, scheme, method="gptq", hessian=bad)
