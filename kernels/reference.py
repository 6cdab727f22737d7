"""The reference backend: plain torch, every scheme, from the packed bytes. The oracle of parity tests.

It unpacks and dequantizes the whole weight on every call, so its time says nothing about a scheme and
never stands for one (``native`` is false).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from autocomp.kernels.backend import WeightState
from autocomp.kernels.packing import pack, unpack
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor


class ReferenceBackend:
    """Unpack, dequantize in float32, multiply with float32 accumulation."""

    name = "reference"
    native = False
    probe = (Scheme(3, 32, symmetric=False), (5, 48))

    def supports(self, scheme: Scheme, shape: tuple[int, int], device_type: str, tokens: int) -> str:
        del shape, device_type, tokens
        return "w16 is not a packed weight; use a plain linear" if scheme.is_dense else ""

    def prepack(self, weight: QuantizedTensor, device: torch.device) -> WeightState:
        """Codes stay packed (int32 ``[N, ceil(K * bits / 32)]``); zero points are held one byte each, so
        that a row can be read without unpacking all of them."""
        tensors = {"codes": pack(weight.codes, weight.scheme.bits), "scale": weight.scale}
        if weight.zero is not None:
            tensors["zero"] = weight.zero
        if weight.outlier_index is not None and weight.outlier_value is not None:
            tensors["outlier_index"] = weight.outlier_index
            tensors["outlier_value"] = weight.outlier_value
        tensors = {name: t.to(device).contiguous() for name, t in tensors.items()}
        return WeightState(self, weight.scheme, weight.shape, tensors)

    def linear(self, x: torch.Tensor, state: WeightState) -> torch.Tensor:
        return F.linear(x.float(), dequantize(state)).to(x.dtype)

    def rows(self, index: torch.Tensor, state: WeightState) -> torch.Tensor:
        codes, scale = state.tensors["codes"][index], state.tensors["scale"][index]
        zero = state.tensors["zero"][index] if "zero" in state.tensors else None
        rows = _affine(unpack(codes, state.scheme.bits, state.shape[1]), scale, zero, state.scheme)
        if "outlier_index" in state.tensors:
            _write_outliers(rows, index, state)
        return rows


def dequantize(state: WeightState) -> torch.Tensor:
    """The whole weight of a reference state, float32 ``[N, K]``."""
    everything = torch.arange(state.shape[0], device=state.device)
    return REFERENCE.rows(everything, state)


def to_quantized(state: WeightState) -> QuantizedTensor:
    """The quantized tensor that a reference state was made of."""
    t = state.tensors
    codes = unpack(t["codes"], state.scheme.bits, state.shape[1])
    return QuantizedTensor(
        state.scheme, state.shape, codes, t["scale"], t.get("zero"),
        t.get("outlier_index"), t.get("outlier_value"),
    )  # fmt: skip


def _affine(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """``(u - z) * scale``, float32: codes ``[T, K]``, scale and zero ``[T, G]``."""
    columns = codes.shape[1]
    width = scheme.group or columns
    middle = zero.float() if zero is not None else torch.full_like(scale, 2.0 ** (scheme.bits - 1)).float()

    def spread(per_group: torch.Tensor) -> torch.Tensor:
        return per_group.float().repeat_interleave(width, dim=1)[:, :columns]

    return (codes.float() - spread(middle)) * spread(scale)


def _write_outliers(rows: torch.Tensor, index: torch.Tensor, state: WeightState) -> None:
    """Put the 16-bit outliers that lie in the wanted rows over them, in place.

    Flat positions ascend, so each row's outliers are one run; two binary searches find its ends.
    """
    columns = state.shape[1]
    positions = state.tensors["outlier_index"].long()
    first = torch.searchsorted(positions, index * columns)
    count = torch.searchsorted(positions, (index + 1) * columns) - first
    target = torch.repeat_interleave(torch.arange(len(index), device=index.device), count)
    within = torch.arange(len(target), device=index.device) - (count.cumsum(0) - count)[target]
    source = first[target] + within
    rows[target, positions[source] % columns] = state.tensors["outlier_value"][source].to(rows.dtype)


REFERENCE = ReferenceBackend()
