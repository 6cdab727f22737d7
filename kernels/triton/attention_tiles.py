"""What the attention kernels share: tiles in and out, one step of the online softmax, windows of key blocks.

Scores are in units of log2, so that the exponential is one instruction. Running maxima start at a finite
number and masked scores are minus infinity, so a row that sees nothing needs no special case: its weights are
zero and ``normalized`` gives zeros.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)

# Of float32: three products on the matrix units. "ieee" has none of them, and its registers spill.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def load_tile(
    base, start, stride, limit, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr
):
    """ROWS rows of a matrix from row ``start`` as ``[ROWS, BD]``; zeros from row ``limit`` and past D."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BD)
    # The first row in 64 bits, the rest relative to it: long sequences with wide rows pass 2^31 elements.
    at = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    # Every result in a branch of its own: the compiler goes on behind a return.
    if MASKED and D == BD:
        return tl.load(at, mask=(start + row < limit)[:, None], other=0)
    elif MASKED:
        return tl.load(at, mask=(start + row < limit)[:, None] & (column < D)[None, :], other=0)
    elif D == BD:
        return tl.load(at)
    else:
        return tl.load(at, mask=(column < D)[None, :], other=0)


@triton.jit
def store_tile(base, start, stride, limit, tile, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """The counterpart of ``load_tile``, in the type of ``base``."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BD)
    at = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    mask = (start + row < limit)[:, None] & (column < D)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def softmax_weights(scores, top):
    """Unnormalized weights of one block of scores and the new running maximum; the old one's correction."""
    highest = tl.maximum(top, tl.max(scores, 1))
    return tl.exp2(scores - highest[:, None]), highest, tl.exp2(top - highest)


@triton.jit
def softmax_step(scores, values, top, total, acc):
    """Add one block of keys to a running softmax: ``top`` and ``total`` ``[M]``, ``acc`` ``[M, BD]``."""
    weights, top, shrink = softmax_weights(scores, top)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return top, total, acc


@triton.jit
def normalized(acc, total):
    """The softmax's result; rows that saw no key are zero."""
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit
def visible(row, column, before, after, prefix, limit, CAUSAL: tl.constexpr):
    """Which keys (columns) a query (row) sees: at most ``before`` back and ``after`` ahead, and the first
    ``prefix``. Causal: of the prefix too only what isn't ahead. Otherwise queries in it see everything."""
    distance = row[:, None] - column[None, :]
    in_window = (distance <= before) & (distance >= -after)
    if CAUSAL:
        seen = in_window | ((column < prefix)[None, :] & (distance >= 0))
    else:
        seen = in_window | (column < prefix)[None, :] | (row < prefix)[:, None]
    return seen & (column < limit)[None, :]


@triton.jit
def head_of_rank(cost, rank, HP: tl.constexpr):
    """The head with ``rank`` costlier ones before it; ``cost [HP]``, negative for heads that don't exist.
    Costly heads start first, so that none is left over when most of the device is idle. Comparing all pairs
    of heads costs less than another launch."""
    head = tl.arange(0, HP)
    equal_before = (cost[None, :] == cost[:, None]) & (head[None, :] < head[:, None])
    place = tl.sum(((cost[None, :] > cost[:, None]) | equal_before).to(tl.int32), 1)
    return tl.sum(tl.where(place == rank, head, 0), 0)


@triton.jit
def key_ranges(first, before, after, prefix, S, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """Key blocks of the query tile that starts at row ``first``, all multiples of BN: ``sink, low, inner_low,
    inner_high, high``. Blocks in [0, sink) and [low, high) hold something visible; those in [inner_low,
    inner_high) are visible as a whole and need no mask."""
    last = first + BM - 1
    low = tl.maximum(first - before, 0)
    high = tl.minimum(last + after + 1, S)
    inner_low = tl.maximum(last - before, 0)
    inner_high = tl.minimum(first + after + 1, S)
    if not CAUSAL:
        low = tl.where(first < prefix, 0, low)
        high = tl.where(first < prefix, S, high)
        inner_low = tl.where(last < prefix, 0, inner_low)
        inner_high = tl.where(last < prefix, S, inner_high)
    low = low // BN * BN
    high = tl.cdiv(high, BN) * BN
    inner_low = tl.minimum(tl.cdiv(inner_low, BN) * BN, high)
    inner_high = tl.maximum(inner_high // BN * BN, inner_low)
    sink = tl.minimum(tl.cdiv(prefix, BN) * BN, low)
    return sink, low, inner_low, inner_high, high


@triton.jit
def attend_block(
    q, k, v, stride_k, stride_v, start, row, scale, before, after, prefix, S, top, total, acc,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys from row ``start``, added to the running softmax of a query tile."""
    keys = load_tile(k, start, stride_k, S, D, BD, BN, MASKED)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    if MASKED:
        column = start + tl.arange(0, BN)
        seen = visible(row, column, before, after, prefix, S, CAUSAL)
        scores = tl.where(seen, scores, float("-inf"))
    values = load_tile(v, start, stride_v, S, D, BD, BN, MASKED)
    return softmax_step(scores, values, top, total, acc)


@triton.jit
def attend_window(
    q, k, v, stride_k, stride_v, first, scale, before, after, prefix, S,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Attention of the query tile ``q [BM, BD]`` from row ``first`` over what it sees, ``[BM, BD]``.

    Blocks out of sight are skipped; only those on an edge of the window compute a mask."""
    top = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    row = first + tl.arange(0, BM)
    sink, low, inner_low, inner_high, high = key_ranges(first, before, after, prefix, S, BM, BN, CAUSAL)
    # Masked blocks: the sinks, the window's lower edge, its upper edge. One loop, so one copy of the code.
    lower = sink // BN + (inner_low - low) // BN
    for i in range(lower + (high - inner_high) // BN):
        start = tl.where(i * BN < sink, i * BN, low + i * BN - sink)
        start = tl.where(i < lower, start, inner_high + (i - lower) * BN)
        top, total, acc = attend_block(
            q, k, v, stride_k, stride_v, start, row, scale, before, after, prefix, S, top, total, acc,
            D, BD, BN, CAUSAL, True,
        )  # fmt: skip
    for start in range(inner_low, inner_high, BN):
        top, total, acc = attend_block(
            q, k, v, stride_k, stride_v, start, row, scale, before, after, prefix, S, top, total, acc,
            D, BD, BN, CAUSAL, False,
        )  # fmt: skip
    return normalized(acc, total)
