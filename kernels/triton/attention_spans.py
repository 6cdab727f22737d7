"""Causal prefill with a window and sinks for each head (MoA, https://arxiv.org/abs/2406.14909)."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch

import triton
import triton.language as tl
from autocomp.kernels.attention_checks import check_prefill, check_spans
from autocomp.kernels.triton.attention_launch import (
    LOG2E,
    block_width,
    prefill_tiles,
    ranked_heads,
    row_major,
)
from autocomp.kernels.triton.attention_tiles import attend_window, head_of_rank, load_tile, store_tile


@triton.jit
def _widest_first(window, sink, rank, S, H: tl.constexpr, HP: tl.constexpr):
    if HP > 0:
        head = tl.arange(0, HP)
        width = tl.minimum(tl.load(window + head, mask=head < H, other=0), S)
        width += tl.minimum(tl.load(sink + head, mask=head < H, other=0), S)
        return head_of_rank(tl.where(head < H, width, -1), rank, HP)
    else:
        return rank


@triton.jit(do_not_specialize=["S"])
def spans_kernel(
    q, k, v, out, window, sink, qb, qh, qs, kb, kh, ks, vb, vh, vs, ob, oh, os, S, scale,
    H: tl.constexpr, HP: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of BM queries of one head. Grid: (tiles, H * batch), last tiles and widest heads first."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    batches = tl.num_programs(1) // H
    head = _widest_first(window, sink, tl.program_id(1) // batches, S, H, HP)
    batch = (tl.program_id(1) % batches).to(tl.int64)
    width = tl.minimum(tl.load(window + head), S)
    prefix = tl.minimum(tl.load(sink + head), S)
    kv_head = (head // GROUP).to(tl.int64)
    queries = load_tile(q + batch * qb + head.to(tl.int64) * qh, first, qs, S, D, BD, BM, True)
    tile = attend_window(
        queries, k + batch * kb + kv_head * kh, v + batch * vb + kv_head * vh, ks, vs,
        first, scale, width - 1, 0, prefix, S, D, BD, BM, BN, True,
    )  # fmt: skip
    store_tile(out + batch * ob + head.to(tl.int64) * oh, first, os, S, tile, D, BD, BM)


def attention_spans(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: torch.Tensor, sink: torch.Tensor, scale: float
) -> torch.Tensor:
    """See the operator ``attention_spans``."""
    check_prefill(q, k, v)
    check_spans(window, sink, q.shape[1])
    window, sink = window.contiguous(), sink.contiguous()
    q, k, v = row_major(q), row_major(k), row_major(v)
    batch, heads, length, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    tiles = prefill_tiles(q)
    spans_kernel[(triton.cdiv(length, tiles.rows), heads * batch)](
        q, k, v, out, window, sink, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        length, scale * LOG2E, heads, ranked_heads(heads), heads // k.shape[1],
        D=dim, BD=block_width(dim), BM=tiles.rows, BN=tiles.keys, **tiles.options,
    )  # fmt: skip
    return out
