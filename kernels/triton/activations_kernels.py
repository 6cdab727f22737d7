"""Triton kernels of the linears on quantized activations: the formulas are in ``activations_reference``.

Rows are quantized by one kernel, which reads each twice (the second time from the cache), and multiplied by
another, as y^T = W x^T: few tokens are then the narrow side of the matrix units.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_rows_kernel(
    x, q, scale, given, K,
    TOP: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q[m, :], scale[m] of row m; one program a row. ``given``: a static scale (float32) or None.

    Launch without fused multiply-add: the product must be rounded before it is rounded to an integer.
    """
    m = tl.program_id(0).to(tl.int64)
    INFINITY: tl.constexpr = float("inf")
    wrong = tl.zeros((BLOCK,), tl.int32)
    largest = tl.full((BLOCK,), SMALLEST, tl.float32)
    for k in range(0, K, BLOCK):
        at = k + tl.arange(0, BLOCK)
        v = tl.abs(tl.load(x + m * K + at, mask=at < K, other=0.0).to(tl.float32))
        if given is None:
            wrong = wrong | (v < INFINITY).to(tl.int32) ^ 1
            largest = tl.maximum(largest, tl.where(v < INFINITY, v, 0.0))
        else:
            wrong = wrong | (v != v).to(tl.int32)
    if given is None:
        a = tl.max(largest, axis=0)
        factor, s = tl.div_rn(TOP, a), tl.div_rn(a, TOP)
    else:
        s = tl.load(given)
        factor = tl.div_rn(1.0, s)
    tl.store(scale + m, tl.where(tl.max(wrong, axis=0) > 0, float("nan"), s))
    for k in range(0, K, BLOCK):
        at = k + tl.arange(0, BLOCK)
        v = tl.load(x + m * K + at, mask=at < K, other=0.0).to(tl.float32) * factor
        v = tl.minimum(tl.maximum(tl.where(v == v, v, 0.0), -TOP), TOP)
        if q.dtype.element_ty == tl.int8:
            v = (v + 12582912.0) - 12582912.0  # 1.5 * 2**23: rounds to the nearest integer, ties to even
        tl.store(q + m * K + at, v.to(q.dtype.element_ty), mask=at < K)


@triton.jit
def _store(acc, t, n, row_scale, bias, y, M, N):
    """acc float32 [BN, BM] times the tokens' scales, plus the bias, into y[M, N]."""
    rows, tokens = n < N, t < M
    acc = acc * tl.load(row_scale + t, mask=tokens, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=rows, other=0.0).to(tl.float32)[:, None]
    place = t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + place, acc.T.to(y.dtype.element_ty), mask=tokens[:, None] & rows[None, :])


@triton.jit(do_not_specialize=["M"])
def w8a8_kernel(
    q, codes, scale, row_scale, bias, y, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y = q codes^T, exact in int32, times scale[n] and row_scale[m]. Programs (tiles of N, tiles of M)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = tl.zeros((BN, BM), tl.int32)
    for k in range(0, K, BK):
        kk = k + tl.arange(0, BK)
        inside = (kk < K)[None, :]
        a = tl.load(q + t.to(tl.int64)[:, None] * K + kk[None, :], mask=(t < M)[:, None] & inside, other=0)
        w = tl.load(
            codes + n.to(tl.int64)[:, None] * K + kk[None, :], mask=(n < N)[:, None] & inside, other=0
        )
        acc = tl.dot(w, a.T, acc, out_dtype=tl.int32)
    s = tl.load(scale + n, mask=n < N, other=0.0)
    _store(acc.to(tl.float32) * s[:, None], t, n, row_scale, bias, y, M, N)


@triton.jit(do_not_specialize=["M"])
def w4a8_kernel(
    q, packed, scale, zero, row_scale, bias, y, M, N, K, words, groups, group,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y = sum over groups of (q (code - zero)^T, exact in int32) * scale[n, g], times row_scale[m].

    BK divides the group. packed int32 [N, words]: code k of a row is nibble k % 8 of word k // 8.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = n < N
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(0, K, BK):
        kk = k + tl.arange(0, BK)
        a = tl.load(
            q + t.to(tl.int64)[:, None] * K + kk[None, :], mask=(t < M)[:, None] & (kk < K)[None, :], other=0
        )
        w = k // 8 + tl.arange(0, BK // 8)
        mask = rows[:, None] & (w < words)[None, :]
        word = tl.load(packed + n.to(tl.int64)[:, None] * words + w[None, :], mask=mask, other=0)
        u = (word[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
        at = n * groups + k // group
        middle = tl.full((BN,), 8, tl.int32)
        if zero is not None:
            middle = tl.load(zero + at, mask=rows, other=0).to(tl.int32)
        u = tl.reshape(u - middle[:, None, None], (BN, BK)).to(tl.int8)
        s = tl.load(scale + at, mask=rows, other=0.0).to(tl.float32)
        acc += tl.dot(u, a.T, out_dtype=tl.int32).to(tl.float32) * s[:, None]
    _store(acc, t, n, row_scale, bias, y, M, N)
