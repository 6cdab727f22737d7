"""Linears on quantized activations in Triton, registered on their operators for CUDA."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from autocomp.kernels.activations import linear_fp8, linear_w4a8, linear_w8a8
from autocomp.kernels.activations_reference import (
    E4M3_MAX,
    INT8_MAX,
    SMALLEST,
    finish,
    fp8_problem,
    w4a8_problem,
    w8a8_problem,
)
from autocomp.kernels.library import Implementation, Operator
from autocomp.kernels.triton.launch import (
    FP_FUSION,
    INTERPRETED,
    Tiles,
    disagreement,
    multiprocessors,
    power_of_two,
    unavailable,
)

DEVICE = "cpu" if INTERPRETED else "cuda"


@functools.cache
def _kernels() -> ModuleType:
    from autocomp.kernels.triton import activations_kernels

    return activations_kernels


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype, given: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[M, K]`` in ``dtype`` (int8 or float8_e4m3fn) and scales float32 ``[M]`` of the rows of
    ``x [M, K]``; with ``given`` (one float32, on the device) that scale for every row."""
    x = x.contiguous()
    if INTERPRETED and x.dtype is torch.bfloat16:
        x = x.float()
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    top = INT8_MAX if dtype is torch.int8 else E4M3_MAX
    _kernels().quantize_rows_kernel[(len(x),)](
        x, q, scale, given, x.shape[1], TOP=top, SMALLEST=SMALLEST,
        BLOCK=power_of_two(x.shape[1], 128, 2048), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return q, scale


@functools.lru_cache(maxsize=4096)
def int8_tiles(tokens: int, rows: int, depth: int, processors: int, largest: int = 128) -> Tiles:
    """Tiles of the products: narrow along N as long as there are too few of them for the device."""
    height = power_of_two(tokens, 8, largest)
    width = min(largest, 128 if height >= 64 else 64)
    while width > 32 and math.ceil(rows / width) * math.ceil(tokens / height) < 2 * processors:
        width //= 2
    warps = 8 if width * height >= 128 * 128 else 4
    return Tiles(height, width, depth, warps=warps, stages=3 if height >= 64 else 4)


def w8a8(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    q, row_scale = quantize_rows(x, torch.int8, x_scale)
    (rows, columns), tokens = codes.shape, len(x)
    tiles = int8_tiles(tokens, rows, 128, multiprocessors(x.device))
    y = _output(x, rows)
    _kernels().w8a8_kernel[_grid(tiles, rows, tokens)](
        q, codes.contiguous(), scale.contiguous(), row_scale, _vector(bias), y, tokens, rows, columns,
        BM=tiles.tokens, BN=tiles.features, BK=tiles.depth,
        num_warps=tiles.warps, num_stages=tiles.stages, **FP_FUSION,
    )  # fmt: skip
    return y.to(x.dtype)


def w4a8(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    q, row_scale = quantize_rows(x, torch.int8)
    (rows, words), tokens, columns = packed.shape, len(x), x.shape[1]
    width = group or math.ceil(columns / 128) * 128
    depth = next(d for d in (128, 64, 32) if width % d == 0)
    tiles = int8_tiles(tokens, rows, depth, multiprocessors(x.device), largest=64)
    y = _output(x, rows)
    _kernels().w4a8_kernel[_grid(tiles, rows, tokens)](
        q, packed.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous(), row_scale,
        _vector(bias), y, tokens, rows, columns, words, scale.shape[1], width,
        BM=tiles.tokens, BN=tiles.features, BK=tiles.depth,
        num_warps=tiles.warps, num_stages=tiles.stages, **FP_FUSION,
    )  # fmt: skip
    return y.to(x.dtype)


def fp8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows quantized by one kernel, then torch's (cuBLAS or CUTLASS) product."""
    q, row_scale = quantize_rows(x, torch.float8_e4m3fn)
    y = torch._scaled_mm(q, weight.T, row_scale.unsqueeze(1), scale.unsqueeze(0), out_dtype=torch.bfloat16)
    return finish(y, bias, x.dtype)


def _grid(tiles: Tiles, rows: int, tokens: int) -> tuple[int, int]:
    return math.ceil(rows / tiles.features), math.ceil(tokens / tiles.tokens)


def _output(x: torch.Tensor, rows: int) -> torch.Tensor:
    dtype = torch.float32 if INTERPRETED and x.dtype is torch.bfloat16 else x.dtype
    return torch.empty(len(x), rows, dtype=dtype, device=x.device)


def _vector(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.contiguous()


def _w8a8_supports(x: torch.Tensor, codes: torch.Tensor, *args: object, **kwargs: object) -> str:
    return w8a8_problem(x, codes, *args, **kwargs) or _nothing(x, codes)  # type: ignore[arg-type]


def _w4a8_supports(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None = None,
) -> str:
    if group % 32:
        return f"it needs groups in multiples of 32 (or 0, the row); got {group}"
    return w4a8_problem(x, packed, scale, zero, group, bias) or _nothing(x, packed)


def _fp8_supports(x: torch.Tensor, weight: torch.Tensor, *args: object, **kwargs: object) -> str:
    if weight.shape[0] % 16 or weight.shape[1] % 16 or not weight.is_contiguous():
        shape = list(weight.shape)
        return f"torch._scaled_mm needs a contiguous weight, N and K in multiples of 16; got {shape}"
    if x.dtype == torch.float32:
        return "torch._scaled_mm with scales for rows gives bfloat16 only"
    return fp8_problem(x, weight, *args, **kwargs) or _nothing(x, weight)  # type: ignore[arg-type]


def _fp8_unavailable() -> str:
    if unavailable() or INTERPRETED:
        return unavailable()
    fits = torch.cuda.get_device_capability() >= (8, 9)
    return "" if fits else "fp8 products need compute capability 8.9 or newer"


def _nothing(x: torch.Tensor, weight: torch.Tensor) -> str:
    return "" if x.numel() and weight.numel() else "nothing to multiply"


def _check(run: Callable[..., torch.Tensor], operator: Operator, *weight: Any) -> str:
    """Run few and many rows on the device and compare with the reference."""
    arguments = [w.to(DEVICE) if isinstance(w, torch.Tensor) else w for w in weight]
    for tokens in (1, 70):
        x = torch.randn(tokens, 160, generator=torch.Generator().manual_seed(tokens)).to(
            DEVICE, torch.bfloat16
        )
        problem = disagreement(run(x, *arguments), operator.reference(x, *arguments))
        if problem:
            return problem
    return ""


def _check_w8a8() -> str:
    codes = (torch.arange(96 * 160) * 37 % 255 - 127).to(torch.int8).view(96, 160)
    return _check(w8a8, linear_w8a8, codes, torch.linspace(0.01, 0.02, 96))


def _check_w4a8() -> str:
    packed = (torch.arange(96 * 20) * 2654435761 % 2**31).to(torch.int32).view(96, 20)
    zero = (torch.arange(96 * 5) % 16).to(torch.uint8).view(96, 5)
    return _check(w4a8, linear_w4a8, packed, torch.linspace(0.01, 0.02, 480).view(96, 5), zero, 32)


def _check_fp8() -> str:
    weight = torch.linspace(-2, 2, 96 * 160).view(96, 160).sin().to(torch.float8_e4m3fn)
    return "" if INTERPRETED else _check(fp8, linear_fp8, weight, torch.linspace(0.01, 0.02, 96))


def register() -> None:
    """Make these the first choice on CUDA for what they support."""
    for operator, run, reason, supports, check in (
        (linear_w8a8, w8a8, unavailable, _w8a8_supports, _check_w8a8),
        (linear_w4a8, w4a8, unavailable, _w4a8_supports, _check_w4a8),
        (linear_fp8, fp8, _fp8_unavailable, _fp8_supports, _check_fp8),
    ):
        operator.register(Implementation("triton", DEVICE, run, reason, supports, check))
