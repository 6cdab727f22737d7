"""Launches of the kernels that decode one new token per sequence; see ``attention_decode_kernels``."""

from __future__ import annotations

import torch

from autocomp.kernels.attention_checks import check_cache, check_decode_cache, check_decode_kv
from autocomp.kernels.triton.attention_decode_kernels import decode_kernel, merge_kernel
from autocomp.kernels.triton.attention_launch import (
    DecodePlan,
    block_width,
    decode_plan,
    power_of_2,
    ring_plan,
    row_major,
)


def _decode(
    q: torch.Tensor, cache: tuple[torch.Tensor | None, ...], strides: tuple[int, ...],
    where: tuple[torch.Tensor | int | None, ...], bound: int, kv_heads: int, plan: DecodePlan,
    bits: tuple[int, int], scale: float, softcap: float,
) -> torch.Tensor:  # fmt: skip
    """Launch both kernels. ``cache``: k, its scale, its minimum, the same of v. ``where``: lengths,
    head_start, window, sink."""
    batch, heads, _, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    whole = plan.pieces == kv_heads
    group = heads // kv_heads
    rows = (batch, plan.pieces, group)
    parts = out if whole else torch.empty((*rows, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    width = max(block_width(dim), 32)
    shape = {"HKV": kv_heads, "HKVP": power_of_2(kv_heads), "GROUP": group, "D": dim, "BD": width}
    shape |= {"BN": plan.tiles.keys, "RINGS": where[1] is not None}
    decode_kernel[(plan.pieces, batch)](
        q, *cache, *where, parts, lse, q.stride(0), q.stride(1), *strides, bound, plan.split, scale, softcap,
        BM=plan.tiles.rows, KEY_BITS=bits[0], VALUE_BITS=bits[1], WHOLE=whole, SOFTCAP=softcap > 0,
        **shape, **plan.tiles.options,
    )  # fmt: skip
    if not whole:
        merge_kernel[(heads, batch)](parts, lse, *where, out, bound, plan.split, plan.pieces, **shape)
    return out


def _factors(*factors: torch.Tensor | None) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...]]:
    """Scales and minima, copied where one set of strides does not serve all, and their strides but the last,
    which is 1; a 0 where there are none."""
    given = [f for f in factors if f is not None]
    if any(f.stride() != given[0].stride() or f.stride(-1) != 1 for f in given):
        factors = tuple(None if f is None else f.contiguous() for f in factors)
    strides = next((f.stride()[:-1] for f in factors if f is not None), (0,))
    return factors, strides


def decode_attention_kv(
    q: torch.Tensor, k_codes: torch.Tensor, k_scale: torch.Tensor, k_min: torch.Tensor,
    v_codes: torch.Tensor, v_scale: torch.Tensor, v_min: torch.Tensor, lengths: torch.Tensor,
    key_bits: int, value_bits: int, scale: float, softcap: float = 0.0, window: int = 0,
) -> torch.Tensor:  # fmt: skip
    """See the operator ``decode_attention_kv``. Lengths past the capacity count as the capacity."""
    check_decode_kv(
        q, k_codes, k_scale, k_min, v_codes, v_scale, v_min, lengths, key_bits, value_bits, window
    )
    q, k_codes, v_codes = row_major(q), row_major(k_codes), row_major(v_codes)
    factors, outer = _factors(k_scale, k_min, v_scale, v_min)
    kv_heads, capacity = k_codes.shape[1:3]
    if not q.numel() or not capacity:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    plan = decode_plan(q, kv_heads, capacity, min(key_bits, value_bits))
    strides = (*k_codes.stride()[:3], *v_codes.stride()[:3], *outer)
    cache = (k_codes, *factors[:2], v_codes, *factors[2:])
    where = (lengths.contiguous(), None, window, None)
    return _decode(q, cache, strides, where, capacity, kv_heads, plan, (key_bits, value_bits), scale, softcap)


def decode_attention_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_scale: torch.Tensor | None,
    k_min: torch.Tensor | None, v_scale: torch.Tensor | None, v_min: torch.Tensor | None,
    head_start: torch.Tensor, window: torch.Tensor, sink: torch.Tensor, lengths: torch.Tensor,
    key_bits: int, value_bits: int, scale: float, softcap: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """See the operator ``decode_attention_cache``. A ring that is too small is read as far as it goes."""
    check_cache(
        q.shape[0], q.shape[-1], k, v, k_scale, k_min, v_scale, v_min, head_start, window, sink, key_bits,
        value_bits,
    )  # fmt: skip
    check_decode_cache(q, head_start, lengths)
    q, k, v = row_major(q), row_major(k), row_major(v)
    factors, (sb, *_) = _factors(k_scale, k_min, v_scale, v_min)
    if not q.numel() or not k.shape[1]:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    kv_heads = head_start.shape[0] - 1
    plan = ring_plan(q, kv_heads, k.shape[1], min(key_bits, value_bits))
    strides = (k.stride(0), 0, k.stride(1), v.stride(0), 0, v.stride(1), sb, 0)
    where = tuple(t.contiguous() for t in (lengths, head_start, window, sink))
    cache = (k, *factors[:2], v, *factors[2:])
    bits = min(key_bits, 16), min(value_bits, 16)
    return _decode(q, cache, strides, where, 0, kv_heads, plan, bits, scale, softcap)
