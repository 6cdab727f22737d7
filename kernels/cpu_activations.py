"""Linears on 8-bit activations with our own C (``cpu/activations.c``).

With int8 everything happens in one pass of the thread pool. CPUs have no products of e4m3, and torch converts
it one number at a time (25 times slower than a bfloat16 linear on the same weight); C converts the weight in
pieces that stay in the cache, and torch's dense linear multiplies them.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from autocomp.kernels import native
from autocomp.kernels.activations_reference import finish, quantize_e4m3, w4a8_problem, w8a8_problem

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the types in ``cpu/linear.h``."""


class _Job(ctypes.Structure):
    """``ac_a8`` of ``cpu/activations.h``."""

    _fields_ = (
        ("m", c_int64), ("n", c_int64), ("k", c_int64),
        ("x", c_void_p), ("x_stride", c_int64), ("x_type", c_int64),
        ("bits", c_int64), ("w", c_void_p), ("w_stride", c_int64), ("group", c_int64),
        ("scale", c_void_p), ("scale_type", c_int64), ("zero", c_void_p),
        ("bias", c_void_p), ("x_scale", c_void_p), ("y", c_void_p),
    )  # fmt: skip


def available() -> str:
    """Why the library can't be used; empty when it can."""
    return native.unavailable("activations")


@cache
def _function() -> Any:
    function = native.load("activations").ac_a8_linear
    function.argtypes = (ctypes.POINTER(_Job), ctypes.c_int)
    return function


def w8a8_supports(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
) -> str:
    return w8a8_problem(x, codes, scale, bias, x_scale)


def w4a8_supports(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None = None,
) -> str:
    if group % 8 and group < x.shape[-1]:
        return f"groups must be rows or multiples of 8 features; got {group}"
    if scale.dtype not in TYPES:
        return f"scale must be float32, bfloat16 or float16; got {scale.dtype}"
    return w4a8_problem(x, packed, scale, zero, group, bias)


def w8a8(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    columns = codes.shape[1]
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    return _run(x, codes, codes.stride(0), 8, columns, scale.contiguous(), None, bias, x_scale)


def w4a8(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    columns = x.shape[1]
    width = group if 0 < group < columns else columns
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    zero = None if zero is None else zero.contiguous()
    return _run(x, packed, 4 * packed.stride(0), 4, width, scale.contiguous(), zero, bias, None)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    bits: int,
    group: int,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor | None,
) -> torch.Tensor:
    dtype = x.dtype
    if dtype == torch.float16:
        x = x.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    m, n = len(x), len(weight)
    y = x.new_empty(m, n)
    if y.numel() == 0:
        return y.to(dtype)
    kind = TYPES[x.dtype]
    job = _Job(
        m, n, x.shape[1], x.data_ptr(), x.stride(0), kind, bits, weight.data_ptr(), stride, group,
        scale.data_ptr(), TYPES[scale.dtype], _address(zero), _address(bias), _address(x_scale), y.data_ptr(),
    )  # fmt: skip
    if _function()(job, native.threads()):
        raise MemoryError(f"no memory for the activations of a linear on [{m}, {x.shape[1]}]")
    return y if dtype == y.dtype else y.to(dtype)


PIECE = 1 << 20
"""Weights that are converted at a time."""


def fp8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    values, row_scale = quantize_e4m3(x)
    wide = torch.float32 if x.dtype == torch.float32 else torch.bfloat16  # e4m3 is exact in both
    q = _widened(values.contiguous(), torch.empty(values.shape, dtype=wide))
    weight = weight.contiguous()
    rows, columns = weight.shape
    buffer = torch.empty(min(rows, max(1, PIECE // columns)), columns, dtype=wide)
    y = torch.empty(len(x), rows, dtype=torch.float32)
    for first in range(0, rows, len(buffer)):
        piece = weight[first : first + len(buffer)]
        y[:, first : first + len(piece)] = F.linear(q, _widened(piece, buffer[: len(piece)]))
    return finish(y * row_scale.unsqueeze(1) * scale, bias, x.dtype)


def _widened(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Contiguous e4m3 ``values`` written to ``out``, float32 or bfloat16."""
    _widen()(values.data_ptr(), out.data_ptr(), values.numel(), TYPES[out.dtype], native.threads())
    return out


@cache
def _widen() -> Any:
    function = native.load("activations").ac_e4m3_widen
    function.argtypes = (c_void_p, c_void_p, c_int64, c_int64, ctypes.c_int)
    function.restype = None
    return function


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
