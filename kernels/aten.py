"""Backends over torch's own weight-only operators: 4 bits in groups, 8 bits a row; CPU and CUDA.

Layouts (private to these backends, never written to disk; the CPU one depends on the instruction set):

- 4 bits: ``w = (u - 8) * s + t`` with bfloat16 ``s, t`` of shape ``[K / g, N, 2]``; a zero point ``z``
  becomes ``t = (8 - z) * s``.
- 8 bits: int8 ``[N, K]`` and one bfloat16 scale a row.

The operators are fast with bfloat16 activations only, so other dtypes are cast on the way in and out.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from autocomp.kernels.backend import CPU_INT4_GROUPS, WeightState
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

# Above this many rows, converting int8 weights to bfloat16 piecewise and using the dense GEMM is faster
# than the 8-bit operator (measured on AVX-512 from 576x576 to 49152x576: they cross between 16 and 32).
DENSE_TOKENS = 24
# Weights converted at a time: the bfloat16 piece (2 MiB) stays in the cache and is never a second copy.
CHUNK_WEIGHTS = 1 << 20


def has_kernel(operator: str, device_type: str) -> bool:
    """Whether ``aten::{operator}`` exists in this torch and is compiled for the device type."""
    if not hasattr(torch.ops.aten, operator):
        return False
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type, "")
    return bool(key) and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", key)


def int4_group(scheme: Scheme, columns: int) -> int:
    """Largest group of the 4-bit operators that divides both the scheme's group and K; 0 if there is none.

    A scheme's group may be a multiple of it (its scales are then repeated): rows of 576 in groups of 128,
    whose last group is short, run in groups of 64.
    """
    width = scheme.group or columns
    return next((g for g in CPU_INT4_GROUPS if width % g == 0 and columns % g == 0), 0)


class Int4Backend:
    """``aten._weight_int4pack_mm_for_cpu`` on CPU, ``aten._weight_int4pack_mm`` (tensor cores) on CUDA."""

    native = True
    probe = (Scheme(4, 32, symmetric=False), (80, 128))
    name = "torch_int4"

    def supports(self, scheme: Scheme, shape: tuple[int, int], device_type: str, tokens: int) -> str:
        del tokens
        rows, columns = shape
        if scheme.bits != 4 or scheme.outliers:
            return f"torch's 4-bit operator runs 4 bits without outliers, not {scheme.label}"
        operator = "_weight_int4pack_mm_for_cpu" if device_type == "cpu" else "_weight_int4pack_mm"
        if not has_kernel(operator, device_type):
            return f"this torch has no aten::{operator} for {device_type}"
        if int4_group(scheme, columns) == 0:
            return f"it needs groups of 32, 64, 128 or 256 that divide K; got {scheme.label} and K={columns}"
        if rows % 16:
            return f"it needs output features in multiples of 16; got N={rows}"
        if device_type == "cuda":
            return _cuda_int4_limits(columns)
        return ""

    def prepack(self, weight: QuantizedTensor, device: torch.device) -> WeightState:
        group = int4_group(weight.scheme, weight.shape[1])
        tensors = {
            "packed": _int4_pack(weight.codes.to(device)),
            "scale_shift": _scale_shift(weight, group).to(device),
        }
        return WeightState(self, weight.scheme, weight.shape, tensors, {"group": group})

    def linear(self, x: torch.Tensor, state: WeightState) -> torch.Tensor:
        operator = _int4_operator(x.device.type)
        packed, scale_shift = state.tensors["packed"], state.tensors["scale_shift"]
        y: torch.Tensor = operator(x.to(torch.bfloat16), packed, state.meta["group"], scale_shift)
        return y.to(x.dtype)

    def rows(self, index: torch.Tensor, state: WeightState) -> torch.Tensor | None:
        if state.device.type != "cpu":
            return None
        codes = _int4_rows(state.tensors["packed"], index, state.shape)
        if codes is None:
            return None
        scale, shift = state.tensors["scale_shift"][:, index].float().permute(2, 1, 0)
        grouped = codes.unflatten(1, (-1, state.meta["group"]))
        return ((grouped - 8.0) * scale.unsqueeze(-1) + shift.unsqueeze(-1)).view(codes.shape)


def _cuda_int4_limits(columns: int) -> str:
    if columns % 32:
        return f"the CUDA operator needs input features in multiples of 32; got K={columns}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the CUDA operator needs compute capability 8.0 or newer (bfloat16 tensor cores)"
    return ""


@cache
def _int4_operator(device_type: str) -> torch._ops.OpOverloadPacket:
    aten = torch.ops.aten
    return aten._weight_int4pack_mm_for_cpu if device_type == "cpu" else aten._weight_int4pack_mm


def _int4_pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes ``[N, K]`` in the operator's layout on the codes' device."""
    aten = torch.ops.aten
    if codes.device.type == "cpu":
        packed: torch.Tensor = aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        return packed
    # CUDA takes two codes a byte, the even column in the high nibble, and tiles of 16 * inner columns.
    inner = next(i for i in (8, 4, 2) if codes.shape[1] % (16 * i) == 0)
    tiled: torch.Tensor = aten._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], inner)
    return tiled


def _scale_shift(weight: QuantizedTensor, group: int) -> torch.Tensor:
    """bfloat16 ``[K / group, N, 2]``: the scale and ``(8 - z) * scale`` of each group."""
    scale = weight.scale.float()
    shift = torch.zeros_like(scale) if weight.zero is None else (8.0 - weight.zero.float()) * scale
    columns = weight.shape[1]
    width = weight.scheme.group or columns
    source = torch.arange(0, columns, group, device=scale.device) // width
    return torch.stack([scale, shift], dim=-1)[:, source].transpose(0, 1).contiguous().to(torch.bfloat16)


def _int4_rows(packed: torch.Tensor, index: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    """Codes of some rows, uint8 ``[T, K]``, out of torch's CPU layout; ``None`` when it isn't understood."""
    rows, columns = shape
    block = _int4_block()
    slots = _slots(block, rows % block) if block else None
    if slots is None:
        return None
    within = index % block
    first = index - within
    height = torch.clamp(rows - first, max=block)  # the last block may be lower
    slot = slots[(height < block).long(), within]
    start = (first * columns + slot) // 2
    byte = start.unsqueeze(1) + torch.arange(columns) * (height // 2).unsqueeze(1)
    shift = (4 * (slot % 2)).to(torch.uint8)
    return (packed.view(-1)[byte] >> shift.unsqueeze(1)) & 15


@cache
def _slots(block: int, tail: int) -> torch.Tensor | None:
    """``_nibble_order`` of whole blocks and of a last block of ``tail`` rows, int64 ``[2, block]``."""
    orders = [_nibble_order(block), _nibble_order(tail or block)]
    table = torch.zeros(2, block, dtype=torch.int64)
    for line, order in zip(table, orders):
        if order is None:
            return None
        line[: len(order)] = order
    return table


@cache
def _int4_block() -> int:
    """Rows that torch's CPU layout packs together (64 with AVX-512, 32 with AVX2); 0 when none fits."""
    codes = torch.randint(0, 16, (128, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = _int4_pack(codes)
    for block in (16, 32, 64):
        if torch.equal(whole, torch.cat([_int4_pack(part) for part in codes.split(block)])):
            return block
    return 0


@cache
def _nibble_order(height: int) -> torch.Tensor | None:
    """Where the rows of a block of ``height`` lie among the ``height`` nibbles of each column, int64
    ``[height]``; nibble 2j is the low half of byte j. ``None`` when a column's nibbles aren't together.

    Found by packing the row and column numbers themselves (four bits at a time), not assumed.
    """
    columns = 32

    def nibbles(codes: torch.Tensor) -> torch.Tensor:
        data = _int4_pack(codes.to(torch.uint8)).view(columns, height // 2)
        return torch.stack([data & 15, data >> 4], dim=-1).view(columns, height).long()

    row = torch.arange(height).unsqueeze(1).expand(height, columns)
    column = torch.arange(columns).expand(height, columns)
    row_at = nibbles(row % 16) + 16 * nibbles(row // 16)
    column_at = nibbles(column % 16) + 16 * nibbles(column // 16)
    regular = (row_at == row_at[0]).all() and (column_at == torch.arange(columns).unsqueeze(1)).all()
    return torch.argsort(row_at[0]) if regular else None


class Int8Backend:
    """``aten._weight_int8pack_mm`` while decoding; piecewise conversion and a dense GEMM for many rows."""

    name = "torch_int8"
    native = True
    probe = (Scheme(8), (17, 64))

    def supports(self, scheme: Scheme, shape: tuple[int, int], device_type: str, tokens: int) -> str:
        del tokens
        columns = shape[1]
        per_row = scheme.group == 0 or scheme.group >= columns
        if scheme.bits != 8 or not per_row or not scheme.symmetric or scheme.outliers:
            return f"torch's 8-bit operator runs w8 (one symmetric scale a row), not {scheme.label}"
        if not has_kernel("_weight_int8pack_mm", device_type):
            return f"this torch has no aten::_weight_int8pack_mm for {device_type}"
        if columns % 16:  # out of contract: the CPU operator reads past the end and may crash
            return f"it needs input features in multiples of 16; got K={columns}"
        return ""

    def prepack(self, weight: QuantizedTensor, device: torch.device) -> WeightState:
        codes = (weight.codes ^ 128).view(torch.int8)  # unsigned u to signed u - 128: flip the top bit
        scale = weight.scale[:, 0].to(torch.bfloat16)
        tensors = {"codes": codes.to(device).contiguous(), "scale": scale.to(device).contiguous()}
        return WeightState(self, weight.scheme, weight.shape, tensors)

    def linear(self, x: torch.Tensor, state: WeightState) -> torch.Tensor:
        codes, scale = state.tensors["codes"], state.tensors["scale"]
        half = x.to(torch.bfloat16)
        if len(x) > DENSE_TOKENS:
            return _linear_by_pieces(half, codes, scale).to(x.dtype)
        y: torch.Tensor = torch.ops.aten._weight_int8pack_mm(half, codes, scale)
        return y.to(x.dtype)

    def rows(self, index: torch.Tensor, state: WeightState) -> torch.Tensor:
        return state.tensors["codes"][index].float() * state.tensors["scale"][index].float().unsqueeze(1)


def _linear_by_pieces(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``(x @ codes.T) * scale``; int8 codes are exact in bfloat16, so the scale may wait for the product."""
    rows, columns = codes.shape
    step = max(1, CHUNK_WEIGHTS // columns)
    y = x.new_empty(len(x), rows)
    for first in range(0, rows, step):
        piece = slice(first, first + step)
        y[:, piece] = F.linear(x, codes[piece].to(x.dtype)) * scale[piece]
    return y
