"""Linears on quantized activations and the low-rank correction, as operators.

- ``linear_w8a8(x, codes, scale, bias=None, x_scale=None)``: int8 weights ``codes [N, K]`` with one float32
  scale a row; int8 activations, quantized per token, or with the static ``x_scale`` (one float32).
- ``linear_w4a8(x, packed, scale, zero, group, bias=None)``: 4-bit weights as ``kernels/packing.py`` packs
  them, int32 ``[N, ceil(K / 8)]``; scale ``[N, G]`` of any float dtype; zero uint8 ``[N, G]`` in 0..15, or
  ``None`` for 8 everywhere; ``group`` features share a scale (0: the row; the last group may be short).
- ``linear_fp8(x, weight, scale, bias=None)``: float8_e4m3fn weights ``[N, K]`` with one float32 scale a row;
  e4m3 activations, quantized per token.
- ``low_rank_add(x, y, a, b)``: ``y + (x a^T) b^T`` with ``a [r, K]`` and ``b [N, r]``, as a new tensor.

``x [M, K]`` is bfloat16, float16 or float32 with any strides; results are ``[M, N]`` in its dtype; ``bias``
is ``[N]`` in any float dtype. Wrong shapes or dtypes raise ``ValueError``. Inference only: no gradients.
The formulas, and what becomes of NaN, are in ``activations_reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from autocomp.kernels import activations_reference as formulas
from autocomp.kernels import cpu_activations
from autocomp.kernels.activations_reference import (
    finish,
    fp8_problem,
    low_rank_problem,
    quantize_e4m3,
    quantize_int8,
    refuse,
    w4a8_problem,
    w8a8_problem,
)
from autocomp.kernels.library import Implementation, Operator
from autocomp.kernels.packing import unpack

Problem = Callable[..., str]


def _fake(problem: Problem) -> Callable[..., torch.Tensor]:
    """Result of the linears: as many rows as ``x``, as many columns as the weight has rows."""

    def fake(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        refuse(problem(x, weight, *args, **kwargs))
        return x.new_empty(x.shape[0], weight.shape[0])

    return fake


def _fake_low_rank(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    refuse(low_rank_problem(x, y, a, b))
    return y.new_empty(y.shape)


linear_w8a8 = Operator(
    "linear_w8a8(Tensor x, Tensor codes, Tensor scale, Tensor? bias=None, Tensor? x_scale=None) -> Tensor",
    formulas.w8a8,
    _fake(w8a8_problem),
)
linear_w4a8 = Operator(
    "linear_w4a8(Tensor x, Tensor packed, Tensor scale, Tensor? zero, int group, Tensor? bias=None) "
    "-> Tensor",
    formulas.w4a8,
    _fake(w4a8_problem),
)
linear_fp8 = Operator(
    "linear_fp8(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor",
    formulas.fp8,
    _fake(fp8_problem),
)
low_rank_add = Operator(
    "low_rank_add(Tensor x, Tensor y, Tensor a, Tensor b) -> Tensor", formulas.low_rank_add, _fake_low_rank
)


# ---- with torch's own operators ----

CUDA_ROWS = 32
"""``torch._int_mm`` wants more than 16 rows on CUDA: fewer are padded to this."""
PIECE = 1 << 20
"""Weights that are converted at a time, so that the converted piece stays in the cache."""


def _product(q: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """``q @ codes.T`` of int8 as int32. With one feature, torch 2.13's ``_int_mm`` gives zeros on CPUs."""
    if q.shape[1] == 1:
        return q.int() * codes.T.int()
    return torch._int_mm(q, codes.T)


def _w8a8(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    q, row_scale = quantize_int8(x, x_scale)
    if x.is_cuda and len(q) < CUDA_ROWS:
        q = F.pad(q, (0, 0, 0, CUDA_ROWS - len(q)))
    y = _product(q, codes)[: len(x)].float() * row_scale.unsqueeze(1) * scale
    return finish(y, bias, x.dtype)


def _w8a8_supports(x: torch.Tensor, codes: torch.Tensor, *args: Any, **kwargs: Any) -> str:
    if x.is_cuda and (codes.shape[0] % 8 or codes.shape[1] % 8 or not codes.is_contiguous()):
        return f"torch._int_mm needs contiguous codes, N and K in multiples of 8; got {list(codes.shape)}"
    return w8a8_problem(x, codes, *args, **kwargs) or _nothing(x, codes)


def _w4a8(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """One integer product a group: exact, and slow where groups are small."""
    q, row_scale = quantize_int8(x)
    codes = unpack(packed, 4, x.shape[1]).to(torch.int8)
    y = x.new_zeros(len(x), len(packed), dtype=torch.float32)
    width = group or x.shape[1]
    for g, (q_part, code_part) in enumerate(zip(q.split(width, dim=1), codes.split(width, dim=1))):
        middle = 8 if zero is None else zero[:, g : g + 1].to(torch.int8)
        product = _product(q_part.contiguous(), code_part - middle)
        y += product.float() * scale[:, g].float()
    return finish(y * row_scale.unsqueeze(1), bias, x.dtype)


def _w4a8_supports(x: torch.Tensor, packed: torch.Tensor, *args: Any, **kwargs: Any) -> str:
    return w4a8_problem(x, packed, *args, **kwargs) or _nothing(x, packed)


def _fp8_pieces(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """e4m3 is exact in bfloat16, so a dense product of converted pieces only rounds its sums.
    (``torch._scaled_mm`` has no fast path on CPUs: 10 to 50 times slower than a bfloat16 product.)"""
    q, row_scale = quantize_e4m3(x)
    wide = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    q = q.to(wide)
    pieces = weight.split(max(1, PIECE // weight.shape[1]))
    y = torch.cat([F.linear(q, piece.to(wide)) for piece in pieces], dim=1)
    return finish(y.float() * row_scale.unsqueeze(1) * scale, bias, x.dtype)


def _fp8_scaled(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    q, row_scale = quantize_e4m3(x)
    half = torch.bfloat16
    y = torch._scaled_mm(q, weight.T, row_scale.unsqueeze(1), scale.unsqueeze(0), out_dtype=half)
    return finish(y, bias, x.dtype)


def _fp8_supports(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> str:
    return fp8_problem(x, weight, *args, **kwargs) or _nothing(x, weight)


def _fp8_scaled_supports(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> str:
    if weight.shape[0] % 16 or weight.shape[1] % 16 or not weight.is_contiguous():
        shape = list(weight.shape)
        return f"torch._scaled_mm needs a contiguous weight, N and K in multiples of 16; got {shape}"
    if x.dtype == torch.float32:
        return "torch._scaled_mm with scales for rows gives bfloat16 only"
    return _fp8_supports(x, weight, *args, **kwargs)


def _fp8_scaled_available() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    fits = torch.cuda.get_device_capability() >= (8, 9)
    return "" if fits else "fp8 products need compute capability 8.9 or newer"


def _low_rank(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm(y, F.linear(x, a.to(x.dtype)), b.to(x.dtype).T)


def _nothing(x: torch.Tensor, weight: torch.Tensor) -> str:
    return "" if x.numel() and weight.numel() else "nothing to multiply"


for _device in ("cpu", "cuda"):
    linear_w8a8.register(Implementation("torch", _device, _w8a8, supports=_w8a8_supports))
    linear_fp8.register(Implementation("torch", _device, _fp8_pieces, supports=_fp8_supports))
    low_rank_add.register(Implementation("torch", _device, _low_rank, supports=low_rank_problem))
linear_w4a8.register(Implementation("torch", "cpu", _w4a8, supports=_w4a8_supports))
linear_fp8.register(
    Implementation("scaled_mm", "cuda", _fp8_scaled, _fp8_scaled_available, _fp8_scaled_supports)
)

linear_w8a8.register(
    Implementation(
        "cpu", "cpu", cpu_activations.w8a8, cpu_activations.available, cpu_activations.w8a8_supports
    )
)
linear_w4a8.register(
    Implementation(
        "cpu", "cpu", cpu_activations.w4a8, cpu_activations.available, cpu_activations.w4a8_supports
    )
)
linear_fp8.register(
    Implementation("cpu", "cpu", cpu_activations.fp8, cpu_activations.available, _fp8_supports)
)
