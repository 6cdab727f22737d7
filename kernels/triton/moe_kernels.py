"""Triton kernel of ``moe_grouped_linear``: tiles of pairs (token, expert) that share an expert's weight.

Weights lie as in ``linear_kernels``, one expert after the other: the words of ``low``, then of ``high``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from autocomp.kernels.triton.linear_kernels import _centred, _pairs_at, _zeros_at


@triton.jit
def _weight_tile(
    codes, high, scale, zero, n, rows, k, N, K, group, DTYPE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, KB: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Weights [BN, BK] in DTYPE without their scales, and the scales float32 [BN]."""
    if LOW == 16:
        kk = k + tl.arange(0, BK)
        place = codes + n.to(tl.int64)[:, None] * K + kk[None, :]
        w = tl.load(place, mask=rows[:, None] & (kk < K)[None, :], other=0.0).to(DTYPE)
        return w, tl.full(n.shape, 1.0, tl.float32)
    else:
        pair = _pairs_at(codes, high, n, rows, k, N, K, LOW, HIGH, KB, BK)
        at = (k // group) * N + n
        s = tl.load(scale + at, mask=rows, other=0.0).to(tl.float32)
        return _centred(pair, _zeros_at(zero, at, rows, LOW + HIGH), DTYPE, LOW + HIGH, ASM), s


@triton.jit
def _tile(
    x, codes, scale, zero, y, pair, valid, place, n, N, K, group, groups, words, high_at, share,
    LOW: tl.constexpr, HIGH: tl.constexpr, KB: tl.constexpr, ASM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[pair, n] = x[pair // share] W[place]^T for the valid pairs."""
    rows = n < N
    place = place.to(tl.int64)
    codes += place * words
    scale += place * groups * N
    if zero is not None:
        zero += place * groups * N
    source = (pair // share).to(tl.int64)[:, None] * K
    acc = tl.zeros((n.shape[0], pair.shape[0]), tl.float32)
    for k in range(0, K, BK):
        kk = k + tl.arange(0, BK)
        a = tl.load(x + source + kk[None, :], mask=valid[:, None] & (kk < K)[None, :], other=0.0)
        w, s = _weight_tile(
            codes, codes + high_at, scale, zero, n, rows, k, N, K, group, a.dtype, LOW, HIGH, KB, BK, ASM
        )
        acc += tl.dot(w, a.T, input_precision="ieee", out_dtype=tl.float32) * s[:, None]
    at = pair.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + at, acc.T.to(y.dtype.element_ty), mask=valid[:, None] & rows[None, :])


@triton.jit(do_not_specialize=["pairs"])
def experts_kernel(
    x, codes, scale, zero, y, expert, remap, order, block_first, block_end, block_place,
    pairs, experts, N, K, group, groups, words, high_at, share,
    LOW: tl.constexpr, HIGH: tl.constexpr, KB: tl.constexpr, ASM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One class of experts. Programs (tiles of N, blocks of pairs).

    With ``order``: the pairs sorted by place, block b starting at order[block_first[b]] and its place
    block_place[b] (-1: nothing to do) ending at block_end[b]. Without: block b is the pair b, at the place
    remap[expert[b]].
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1)
    if order is not None:
        place = tl.load(block_place + b)
        i = tl.load(block_first + b) + tl.arange(0, BM)
        valid = i < tl.load(block_end + b)
        pair = tl.load(order + i, mask=valid, other=0).to(tl.int32)
    else:
        e = tl.load(expert + b)
        known = (e >= 0) & (e < experts)
        place = tl.load(remap + e, mask=known, other=-1)
        pair = b + tl.arange(0, BM)
        valid = pair == b
    if place >= 0:
        _tile(
            x, codes, scale, zero, y, pair, valid, place, n, N, K, group, groups, words, high_at, share,
            LOW, HIGH, KB, ASM, BK,
        )  # fmt: skip
