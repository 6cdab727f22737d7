"""QuantizedTensor: dequantization, packed state, exact sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.quantize.rounding import quantize
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

schemes = st.builds(
    Scheme,
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([0, 8, 24, 32, 64]),
    symmetric=st.booleans(),
    outliers=st.sampled_from([0.0, 0.5, 3.0]),
)


def random_tensor(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> QuantizedTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return quantize(weight, scheme)


@settings(max_examples=80, deadline=None)
@given(scheme=schemes, rows=st.integers(1, 40), columns=st.integers(1, 140), seed=st.integers(0, 1000))
def test_state_round_trip_and_exact_bytes(scheme: Scheme, rows: int, columns: int, seed: int) -> None:
    tensor = random_tensor(scheme, rows, columns, seed)
    state = tensor.to_state()
    back = QuantizedTensor.from_state(state, scheme)
    assert back.shape == (rows, columns)
    assert torch.equal(back.codes, tensor.codes)
    assert torch.equal(back.dequantize(), tensor.dequantize())
    stored = sum(part.numel() * part.element_size() for name, part in state.items() if name != "weight_shape")
    assert stored == tensor.nbytes == scheme.weight_bytes(rows, columns)


@settings(max_examples=40, deadline=None)
@given(scheme=schemes, rows=st.integers(1, 6), columns=st.integers(1, 80))
def test_dequantize_is_the_definition(scheme: Scheme, rows: int, columns: int) -> None:
    tensor = random_tensor(scheme, rows, columns)
    expected = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        for k in range(columns):
            g = k // scheme.group if scheme.group else 0
            zero = 1 << (scheme.bits - 1) if tensor.zero is None else int(tensor.zero[n, g])
            expected[n, k] = (int(tensor.codes[n, k]) - zero) * float(tensor.scale[n, g])
    if tensor.outlier_index is not None and tensor.outlier_value is not None:
        for position, value in zip(tensor.outlier_index.tolist(), tensor.outlier_value.tolist()):
            expected[position // columns, position % columns] = value
    assert torch.equal(tensor.dequantize().double(), expected)
    assert torch.equal(tensor.dequantize(torch.bfloat16), expected.to(torch.bfloat16))


@pytest.mark.parametrize("label", ["w2g32", "w3g32a", "w4g64a", "w5g32a", "w6", "w8a"])
def test_compressed_tensors_decompresses_our_state(label: str) -> None:
    compressed = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.base",
        reason="compressed-tensors with dense packing is not installed (pip install autocomp[export])",
    )
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = Scheme.parse(label)
    tensor = random_tensor(scheme, 33, 192)
    args = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="group" if scheme.group else "channel",
        group_size=scheme.group or None,
    )
    theirs = QuantizationScheme(targets=["Linear"], weights=args)
    weight = compressed.PackedQuantizationCompressor.decompress(tensor.to_state(), theirs)["weight"]
    assert torch.equal(weight, tensor.dequantize(weight.dtype))


def test_moving_keeps_every_part() -> None:
    tensor = random_tensor(Scheme.parse("w3g32ao1"), 8, 96)
    moved = tensor.to("cpu")
    assert torch.equal(moved.dequantize(), tensor.dequantize())


def test_contradictions_are_refused() -> None:
    scheme = Scheme.parse("w4g32a")
    tensor = random_tensor(scheme, 8, 96)
    with pytest.raises(ValueError, match="codes must be"):
        dataclasses.replace(tensor, codes=tensor.codes[:, :95])
    with pytest.raises(ValueError, match="zero must be"):
        dataclasses.replace(tensor, zero=None)
    with pytest.raises(ValueError, match="scale must be bfloat16 or float16"):
        dataclasses.replace(tensor, scale=tensor.scale.float())
    with pytest.raises(ValueError, match="outlier_index must be"):
        dataclasses.replace(tensor, scheme=Scheme.parse("w4g32ao1"))
    with pytest.raises(ValueError, match="not quantized"):
        dataclasses.replace(tensor, scheme=Scheme(16))


def test_damaged_state_is_refused() -> None:
    scheme = Scheme.parse("w4g32ao1")
    state = random_tensor(scheme, 8, 96).to_state()
    with pytest.raises(ValueError, match="lacks \\['weight_zero_point'\\]"):
        QuantizedTensor.from_state({k: v for k, v in state.items() if k != "weight_zero_point"}, scheme)
    with pytest.raises(ValueError, match="fill 12 words; got rows of 11"):
        QuantizedTensor.from_state(state | {"weight_packed": state["weight_packed"][:, :-1]}, scheme)
    with pytest.raises(ValueError, match="outside a weight of shape"):
        QuantizedTensor.from_state(state | {"outlier_index": state["outlier_index"] + 768}, scheme)
    with pytest.raises(ValueError, match="codes of 3 bits"):
        QuantizedTensor.from_state(state, Scheme.parse("w3g32ao1"))
