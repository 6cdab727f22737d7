"""Bidirectional attention of diffusion transformers with the shortcuts of DiTFastAttn, chosen for each head
(https://arxiv.org/abs/2406.08552, https://arxiv.org/abs/2503.22796).

Modes lie on the device, so two kernels are launched: one for the heads that need one softmax, one for those
that save full minus window and run both in one pass over the keys. Programs of the other's heads end at once.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch

import triton
import triton.language as tl
from autocomp.kernels.attention_checks import check_prefill, check_window_residual
from autocomp.kernels.attention_diffusion_reference import FULL, FULL_SAVE, REUSE
from autocomp.kernels.triton.attention_launch import (
    LOG2E,
    block_width,
    prefill_tiles,
    ranked_heads,
    row_major,
    two_state_tiles,
)
from autocomp.kernels.triton.attention_tiles import (
    LOWEST,
    PRECISION,
    attend_window,
    head_of_rank,
    key_ranges,
    load_tile,
    normalized,
    softmax_step,
    store_tile,
    visible,
)

_FULL, _SAVE, _REUSE = tl.constexpr(FULL), tl.constexpr(FULL_SAVE), tl.constexpr(REUSE)


@triton.jit
def _by_cost(half_window, mode, prefix, rank, S, H: tl.constexpr, HP: tl.constexpr):
    """Heads with more keys to read first."""
    if HP > 0:
        head = tl.arange(0, HP)
        keys = tl.minimum(tl.load(half_window + head, mask=head < H, other=0), S) * 2 + prefix
        doing = tl.load(mode + head, mask=head < H, other=0)
        keys = tl.where(doing == _REUSE, 0, tl.where(doing == _FULL, S, tl.minimum(keys, S)))
        return head_of_rank(tl.where(head < H, keys, -1), rank, HP)
    else:
        return rank


@triton.jit(do_not_specialize=["S", "prefix"])
def window_kernel(
    q, k, v, residual, out, saved, half_window, mode,
    qb, qh, qs, kb, kh, ks, vb, vh, vs, rb, rh, rs, ob, oh, os,
    prefix, S, scale, H: tl.constexpr, HP: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Modes full, window + residual, and reuse (no keys, so only the residual). Grid: (tiles, H * batch)."""
    first = tl.program_id(0) * BM
    batches = tl.num_programs(1) // H
    head = _by_cost(half_window, mode, prefix, tl.program_id(1) // batches, S, H, HP)
    doing = tl.load(mode + head)
    if doing == _SAVE:
        return
    batch = (tl.program_id(1) % batches).to(tl.int64)
    keys = tl.where(doing == _REUSE, 0, S)
    reach = tl.where(doing == _FULL, S, tl.minimum(tl.load(half_window + head), S))
    kv_head = (head // GROUP).to(tl.int64)
    head = head.to(tl.int64)
    queries = load_tile(q + batch * qb + head * qh, first, qs, S, D, BD, BM, True)
    tile = attend_window(
        queries, k + batch * kb + kv_head * kh, v + batch * vb + kv_head * vh, ks, vs,
        first, scale, reach, reach, tl.minimum(prefix, keys), keys, D, BD, BM, BN, False,
    )  # fmt: skip
    held = tl.zeros((BM, BD), tl.float32)
    if residual is not None:
        held = load_tile(residual + batch * rb + head * rh, first, rs, S, D, BD, BM, True).to(tl.float32)
    store_tile(saved + batch * ob + head * oh, first, os, S, held, D, BD, BM)
    tile = tl.where(doing == _FULL, tile, tile + held)
    store_tile(out + batch * ob + head * oh, first, os, S, tile, D, BD, BM)


@triton.jit(do_not_specialize=["S", "prefix"])
def window_save_kernel(
    q, k, v, out, saved, half_window, mode, qb, qh, qs, kb, kh, ks, vb, vh, vs, ob, oh, os,
    prefix, S, scale, GROUP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Mode full and save: two running softmaxes over the same scores. Grid: (tiles, heads, batch)."""
    if tl.load(mode + tl.program_id(1)) != _SAVE:
        return
    first = tl.program_id(0) * BM
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    reach = tl.minimum(tl.load(half_window + head), S)
    k_base, v_base = k + batch * kb + head // GROUP * kh, v + batch * vb + head // GROUP * vh
    queries = load_tile(q + batch * qb + head * qh, first, qs, S, D, BD, BM, True)
    row = first + tl.arange(0, BM)
    top = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    near_top, near_total, near_acc = top, total, acc
    sink, low, _, _, high = key_ranges(first, reach, reach, prefix, S, BM, BN, False)
    for i in range(sink // BN + (high - low) // BN):
        start = tl.where(i * BN < sink, i * BN, low + i * BN - sink)
        column = start + tl.arange(0, BN)
        keys = load_tile(k_base, start, ks, S, D, BD, BN, True)
        values = load_tile(v_base, start, vs, S, D, BD, BN, True)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where((column < S)[None, :], scores, float("-inf"))
        top, total, acc = softmax_step(scores, values, top, total, acc)
        scores = tl.where(visible(row, column, reach, reach, prefix, S, False), scores, float("-inf"))
        near_top, near_total, near_acc = softmax_step(scores, values, near_top, near_total, near_acc)
    left = (low - sink) // BN
    for i in range(left + tl.cdiv(S - high, BN)):  # what only the full softmax sees
        start = tl.where(i < left, sink + i * BN, high + (i - left) * BN)
        keys = load_tile(k_base, start, ks, S, D, BD, BN, True)
        values = load_tile(v_base, start, vs, S, D, BD, BN, True)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where((start + tl.arange(0, BN) < S)[None, :], scores, float("-inf"))
        top, total, acc = softmax_step(scores, values, top, total, acc)
    tile = normalized(acc, total)
    store_tile(out + batch * ob + head * oh, first, os, S, tile, D, BD, BM)
    tile -= normalized(near_acc, near_total)
    store_tile(saved + batch * ob + head * oh, first, os, S, tile, D, BD, BM)


def attention_window_residual(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, half_window: torch.Tensor, prefix: int,
    residual: torch.Tensor | None, mode: torch.Tensor, scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See the operator ``attention_window_residual``."""
    check_prefill(q, k, v)
    check_window_residual(q, half_window, prefix, residual, mode)
    q, k, v = row_major(q), row_major(k), row_major(v)
    half_window, mode = half_window.contiguous(), mode.contiguous()
    batch, heads, length, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    saved = torch.empty_like(out)
    if not out.numel():
        return out, saved
    held = None if residual is None else row_major(residual)
    held_strides = (0, 0, 0) if held is None else held.stride()[:3]
    prefix = min(prefix, length)
    scale = (dim**-0.5 if scale is None else scale) * LOG2E
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    shape = {"GROUP": heads // k.shape[1], "D": dim, "BD": block_width(dim)}
    tiles = two_state_tiles(q)
    window_save_kernel[(triton.cdiv(length, tiles.rows), heads, batch)](
        q, k, v, out, saved, half_window, mode, *strides, *out.stride()[:3], prefix, length, scale,
        BM=tiles.rows, BN=tiles.keys, **shape, **tiles.options,
    )  # fmt: skip
    tiles = prefill_tiles(q)
    window_kernel[(triton.cdiv(length, tiles.rows), heads * batch)](
        q, k, v, held, out, saved, half_window, mode, *strides, *held_strides, *out.stride()[:3],
        prefix, length, scale, H=heads, HP=ranked_heads(heads),
        BM=tiles.rows, BN=tiles.keys, **shape, **tiles.options,
    )  # fmt: skip
    return out, saved
