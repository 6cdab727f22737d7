"""Writing caches: codes of keys and values, and the next token into ragged rings."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch

import triton
import triton.language as tl
from autocomp.kernels.attention_checks import check_append, check_kv_quantize, check_rings
from autocomp.kernels.triton.attention_launch import power_of_2, row_major

# Adding and subtracting 1.5 * 2^23 rounds a small float32 to an integer, halves to even, as torch does.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _codes(x, low, scale, LEVELS: tl.constexpr):
    """Codes of one tile, uint8; 0 where the row is constant."""
    safe = tl.where(scale > 0.0, scale, 1.0)[:, None]
    code = (tl.div_rn(x - low[:, None], safe) + ROUNDER) - ROUNDER
    code = tl.where((scale > 0.0)[:, None], code, 0.0)
    return tl.minimum(tl.maximum(code, 0.0), LEVELS).to(tl.uint8)


@triton.jit(do_not_specialize=["tokens"])
def kv_quantize_kernel(
    x, codes, scale, minimum, xb, xh, xs, tokens, heads,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head. Grid: (tiles, batch * heads). 4 bits: even and odd features as two tiles."""
    LEVELS: tl.constexpr = 255.0 if BITS == 8 else 15.0
    PER_BYTE: tl.constexpr = 8 // BITS
    batch_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = row < tokens
    byte = tl.arange(0, BD // PER_BYTE)
    mask = known[:, None] & (byte < D // PER_BYTE)[None, :]
    source = x + batch_head // heads * xb + batch_head % heads * xh + row.to(tl.int64)[:, None] * xs
    first = tl.load(source + byte[None, :] * PER_BYTE, mask=mask, other=0.0).to(tl.float32)
    low = tl.min(tl.where(mask, first, float("inf")), 1)
    high = tl.max(tl.where(mask, first, float("-inf")), 1)
    if BITS == 4:
        second = tl.load(source + byte[None, :] * 2 + 1, mask=mask, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(mask, second, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(mask, second, float("-inf")), 1))
    # Rows past the end: finite numbers, whatever they are, for they are not stored.
    low, high = tl.where(known, low, 0.0), tl.where(known, high, 0.0)
    step = tl.div_rn(high - low, tl.zeros_like(high) + LEVELS)
    packed = _codes(first, low, step, LEVELS)
    if BITS == 4:
        packed = packed | (_codes(second, low, step, LEVELS) << 4)
    at = batch_head * tokens + row
    tl.store(codes + at[:, None] * (D // PER_BYTE) + byte[None, :], packed, mask=mask)
    tl.store(scale + at, step, mask=known)
    tl.store(minimum + at, low, mask=known)


def kv_quantize(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the operator ``kv_quantize``."""
    check_kv_quantize(x, bits)
    x = row_major(x)
    batch, heads, tokens, dim = x.shape
    codes = torch.empty(batch, heads, tokens, dim * bits // 8, dtype=torch.uint8, device=x.device)
    scale = torch.empty(batch, heads, tokens, dtype=torch.float32, device=x.device)
    minimum = torch.empty_like(scale)
    if codes.numel():
        width = max(2, power_of_2(dim))
        rows = max(1, min(4096 // width, power_of_2(tokens)))
        kv_quantize_kernel[(triton.cdiv(tokens, rows), batch * heads)](
            x, codes, scale, minimum, *x.stride()[:3], tokens, heads, D=dim, BD=width, ROWS=rows, BITS=bits
        )
    return codes, scale, minimum


@triton.jit(do_not_specialize=["position"])
def spans_append_kernel(
    k, v, new_k, new_v, head_start, window, sink, kb, ks, kd, vb, vs, vd, nkb, nkh, nvb, nvh, position,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One head of one sequence. Grid: (batch, key heads). A slot that the ring lacks is not written."""
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kept, width = tl.load(sink + head), tl.load(window + head)
    slot = tl.where(position < kept, position, kept + (position - kept) % tl.maximum(width, 1))
    first = tl.load(head_start + head)
    stored = ((position < kept) | (width > 0)) & (first + slot < tl.load(head_start + head + 1))
    feature = tl.arange(0, BD)
    mask = (feature < D) & (tl.zeros_like(feature) + stored.to(tl.int32) > 0)
    key = tl.load(new_k + batch * nkb + head * nkh + feature, mask=mask, other=0.0)
    value = tl.load(new_v + batch * nvb + head * nvh + feature, mask=mask, other=0.0)
    tl.store(k + batch * kb + (first + slot) * ks + feature * kd, key.to(k.dtype.element_ty), mask=mask)
    tl.store(v + batch * vb + (first + slot) * vs + feature * vd, value.to(v.dtype.element_ty), mask=mask)


def spans_append(
    k: torch.Tensor, v: torch.Tensor, new_k: torch.Tensor, new_v: torch.Tensor,
    head_start: torch.Tensor, window: torch.Tensor, sink: torch.Tensor, position: int,
) -> None:  # fmt: skip
    """See the operator ``spans_append``."""
    check_rings(k.shape[0], k.shape[2], k, v, head_start, window, sink)
    check_append(k, new_k, new_v, head_start, position)
    new_k, new_v = row_major(new_k), row_major(new_v)
    batch, heads, dim = new_k.shape
    if new_k.numel():
        spans_append_kernel[(batch, heads)](
            k, v, new_k, new_v, head_start.contiguous(), window.contiguous(), sink.contiguous(),
            *k.stride(), *v.stride(), *new_k.stride()[:2], *new_v.stride()[:2], position,
            D=dim, BD=power_of_2(dim), num_warps=1,
        )  # fmt: skip
