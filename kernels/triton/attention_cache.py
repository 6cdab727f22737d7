"""Writing caches: codes of keys and values, and the next token into ragged rings."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch

import triton
import triton.language as tl
from autocomp.kernels.attention_checks import check_append, check_cache, check_kv_quantize
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


@triton.jit
def _quantized(source, known, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr):
    """Codes ``[ROWS, BD * BITS / 8]``, scale and minimum ``[ROWS]`` of rows at ``source [ROWS, 1]``, and the
    mask of codes that exist; ``known [ROWS]``: rows that do. 4 bits: even and odd features as two tiles."""
    LEVELS: tl.constexpr = 255.0 if BITS == 8 else 15.0
    PER_BYTE: tl.constexpr = 8 // BITS
    byte = tl.arange(0, BD // PER_BYTE)
    mask = known[:, None] & (byte < D // PER_BYTE)[None, :]
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
    return packed, step, low, mask


@triton.jit(do_not_specialize=["tokens"])
def kv_quantize_kernel(
    x, codes, scale, minimum, xb, xh, xs, tokens, heads,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head. Grid: (tiles, batch * heads)."""
    PER_BYTE: tl.constexpr = 8 // BITS
    batch_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = row < tokens
    source = x + batch_head // heads * xb + batch_head % heads * xh + row.to(tl.int64)[:, None] * xs
    packed, step, low, mask = _quantized(source, known, D, BD, BITS)
    at = batch_head * tokens + row
    byte = tl.arange(0, BD // PER_BYTE)
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


@triton.jit
def _store_entry(
    rows, stride, scale, minimum, source, stored, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr
):
    """One row of ``source`` as an entry of a cache, its features ``stride`` apart, if ``stored [1]``."""
    if BITS == 16:
        feature = tl.arange(0, BD)
        mask = stored & (feature < D)
        x = tl.load(source + feature, mask=mask, other=0.0)
        tl.store(rows + feature * stride, x.to(rows.dtype.element_ty), mask=mask)
    else:
        one = tl.arange(0, 1)
        packed, step, low, mask = _quantized(source + one[:, None], stored, D, BD, BITS)
        byte = tl.arange(0, BD * BITS // 8)
        tl.store(rows + byte[None, :] * stride, packed, mask=mask)
        tl.store(scale + one, step, mask=stored)
        tl.store(minimum + one, low, mask=stored)


@triton.jit
def cache_append_kernel(
    k, v, k_scale, k_min, v_scale, v_min, new_k, new_v, head_start, window, sink, positions,
    kb, ks, kd, vb, vs, vd, kfb, kfs, vfb, vfs, nkb, nkh, nvb, nvh,
    D: tl.constexpr, BD: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
):  # fmt: skip
    """One head of one sequence. Grid: (batch, key heads). A slot that the ring lacks is not written.

    Strides: of k and v (3 each), of the factors of both (2 each), of new_k and new_v (2 each). Bits of 16
    stand for plain numbers of any type.
    """
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + batch)
    kept, width = tl.load(sink + head), tl.load(window + head)
    slot = tl.where(position < kept, position, kept + (position - kept) % tl.maximum(width, 1))
    at = tl.load(head_start + head) + slot
    stored = ((position < kept) | (width > 0)) & (position >= 0) & (at < tl.load(head_start + head + 1))
    stored = tl.zeros((1,), tl.int32) + stored.to(tl.int32) > 0
    if KEY_BITS != 16:
        k_scale, k_min = k_scale + batch * kfb + at * kfs, k_min + batch * kfb + at * kfs
    if VALUE_BITS != 16:
        v_scale, v_min = v_scale + batch * vfb + at * vfs, v_min + batch * vfb + at * vfs
    key, value = new_k + batch * nkb + head * nkh, new_v + batch * nvb + head * nvh
    _store_entry(k + batch * kb + at * ks, kd, k_scale, k_min, key, stored, D, BD, KEY_BITS)
    _store_entry(v + batch * vb + at * vs, vd, v_scale, v_min, value, stored, D, BD, VALUE_BITS)


def cache_append(
    k: torch.Tensor, v: torch.Tensor, k_scale: torch.Tensor | None, k_min: torch.Tensor | None,
    v_scale: torch.Tensor | None, v_min: torch.Tensor | None, new_k: torch.Tensor, new_v: torch.Tensor,
    head_start: torch.Tensor, window: torch.Tensor, sink: torch.Tensor, positions: torch.Tensor,
    key_bits: int, value_bits: int,
) -> None:  # fmt: skip
    """See the operator ``cache_append``. A scale must have the strides of its minimum."""
    check_append(new_k, new_v, head_start, positions)
    cache = (k, v, k_scale, k_min, v_scale, v_min)
    batch, heads, dim = new_k.shape
    check_cache(batch, dim, *cache, head_start, window, sink, key_bits, value_bits)
    new_k, new_v = row_major(new_k), row_major(new_v)
    factors = [(0, 0) if scale is None else scale.stride() for scale in (k_scale, v_scale)]
    where = (t.contiguous() for t in (head_start, window, sink, positions))
    if new_k.numel():
        cache_append_kernel[(batch, heads)](
            *cache, new_k, new_v, *where, *k.stride(), *v.stride(), *factors[0], *factors[1],
            *new_k.stride()[:2], *new_v.stride()[:2], D=dim, BD=max(2, power_of_2(dim)),
            KEY_BITS=min(key_bits, 16), VALUE_BITS=min(value_bits, 16), num_warps=1,
        )  # fmt: skip
