"""Attention on a static pattern of key blocks per head, tokens reordered on the way in and out
(PAROAttention, https://arxiv.org/abs/2506.16054). The pattern comes as compressed sparse rows, so only its
blocks are visited."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch

import triton
import triton.language as tl
from autocomp.kernels.attention_checks import check_block_sparse, check_prefill
from autocomp.kernels.triton.attention_launch import (
    LOG2E,
    block_sparse_tiles,
    block_width,
    ranked_heads,
    row_major,
)
from autocomp.kernels.triton.attention_tiles import LOWEST, PRECISION, head_of_rank, normalized, softmax_step


@triton.jit
def _densest_first(row_ptr, rank, blocks, H: tl.constexpr, HP: tl.constexpr):
    if HP > 0:
        head = tl.arange(0, HP)
        start = row_ptr + head * (blocks + 1)
        count = tl.load(start + blocks, mask=head < H, other=-1) - tl.load(start, mask=head < H, other=0)
        return head_of_rank(count, rank, HP)
    else:
        return rank


@triton.jit
def _tokens(order, position, S):
    """Tokens at some positions; positions past the end give any token, for the loads are masked."""
    if order is None:
        return position
    else:
        token = tl.load(order + position, mask=position < S, other=0)
        return tl.minimum(tl.maximum(token, 0), S - 1)


@triton.jit
def _gather(base, token, stride, known, D: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of some tokens, ``[ROWS, BD]``; WHOLE: there are no unknown ones and no padded features."""
    column = tl.arange(0, BD)
    at = base + token.to(tl.int64)[:, None] * stride + column[None, :]
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=known[:, None] & (column < D)[None, :], other=0)


@triton.jit(do_not_specialize=["S", "nnz"])
def block_sparse_kernel(
    q, k, v, out, row_ptr, col, order, qb, qh, qs, kb, kh, ks, vb, vh, vs, ob, oh, os, S, nnz, scale,
    H: tl.constexpr, HP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of BM queries of one head. Grid: (tiles, H * batch)."""
    SUB: tl.constexpr = BLOCK // BN
    blocks = tl.cdiv(S, BLOCK)
    batches = tl.num_programs(1) // H
    head = _densest_first(row_ptr, tl.program_id(1) // batches, blocks, H, HP)
    batch = (tl.program_id(1) % batches).to(tl.int64)
    pattern = row_ptr + head * (blocks + 1) + tl.program_id(0) // (BLOCK // BM)
    begin = tl.maximum(tl.load(pattern), 0)
    end = tl.minimum(tl.load(pattern + 1), nnz)
    kv_head = (head // GROUP).to(tl.int64)
    head = head.to(tl.int64)
    k_base, v_base = k + batch * kb + kv_head * kh, v + batch * vb + kv_head * vh
    if order is not None:
        order += head * S
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    token = _tokens(order, row, S)
    queries = _gather(q + batch * qb + head * qh, token, qs, row < S, D, BD, WHOLE)
    top = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    for i in range(begin * SUB, end * SUB):
        block = tl.minimum(tl.maximum(tl.load(col + i // SUB), 0), blocks - 1)
        position = block * BLOCK + (i % SUB) * BN + tl.arange(0, BN)
        from_token = _tokens(order, position, S)
        keys = _gather(k_base, from_token, ks, position < S, D, BD, WHOLE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if not WHOLE:
            scores = tl.where((position < S)[None, :], scores, float("-inf"))
        values = _gather(v_base, from_token, vs, position < S, D, BD, WHOLE)
        top, total, acc = softmax_step(scores, values, top, total, acc)
    column = tl.arange(0, BD)
    at = out + batch * ob + head * oh + token.to(tl.int64)[:, None] * os + column[None, :]
    mask = (row < S)[:, None] & (column < D)[None, :]
    tl.store(at, normalized(acc, total).to(out.dtype.element_ty), mask=mask)


def attention_block_sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor,
    block: int, order: torch.Tensor | None = None, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """See the operator ``attention_block_sparse``; ``block`` a power of two from 16. Numbers outside of their
    range in the pattern and the order are clamped."""
    check_prefill(q, k, v)
    check_block_sparse(q, row_ptr, col, block, order)
    q, k, v, row_ptr, col = row_major(q), row_major(k), row_major(v), row_ptr.contiguous(), col.contiguous()
    order = None if order is None else order.contiguous()
    batch, heads, length, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    if not col.numel():
        return out.zero_()
    tiles = block_sparse_tiles(q, block)
    width = block_width(dim)
    block_sparse_kernel[(triton.cdiv(length, block) * (block // tiles.rows), heads * batch)](
        q, k, v, out, row_ptr, col, order,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        length, col.numel(), (dim**-0.5 if scale is None else scale) * LOG2E,
        H=heads, HP=ranked_heads(heads), GROUP=heads // k.shape[1], D=dim, BD=width,
        BLOCK=block, BM=tiles.rows, BN=tiles.keys, WHOLE=length % block == 0 and width == dim,
        **tiles.options,
    )  # fmt: skip
    return out
