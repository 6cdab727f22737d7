"""One new token per sequence over a long cache, plain or as codes of ``kv_quantize``, even or ragged rings.

Split over the keys ("flash-decoding"): each program takes a piece of the keys and, as the rows of one tile,
all query heads that share them, so that the cache is read once. A second kernel merges the pieces by their
log-sum-exp. Lengths stay on the device. Codes are expanded in registers: those of keys go into the dot as
they are (exact in 16 bits), then q.k = scale * (q.code) + min * sum(q).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from autocomp.kernels.triton.attention_launch import LOG2E
from autocomp.kernels.triton.attention_tiles import LOWEST, PRECISION, load_tile, normalized, softmax_weights

MERGED = tl.constexpr(16)
LOG2 = tl.constexpr(LOG2E)

# 1024 in float16 and 128 in bfloat16: there the last bit of the mantissa counts ones.
HALF_1024 = tl.constexpr(0x6400)
BFLOAT_128 = tl.constexpr(0x4300)


@triton.jit
def _ring_sizes(head_start, window, sink, length, HKV: tl.constexpr, HKVP: tl.constexpr):
    """Slots in use of a sequence's rings, never more than there are: ``[HKVP]``, zeros past the last head."""
    head = tl.arange(0, HKVP)
    room = tl.load(head_start + head + 1, mask=head < HKV, other=0)
    room -= tl.load(head_start + head, mask=head < HKV, other=0)
    kept = tl.load(window + head, mask=head < HKV, other=0).to(tl.int64)
    kept += tl.load(sink + head, mask=head < HKV, other=0)
    return tl.maximum(tl.minimum(tl.minimum(room, kept), length), 0).to(tl.int32)


@triton.jit
def _pick(vector, index, SIZE: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SIZE) == index, vector, 0), 0)


@triton.jit
def _ring_split(size, pieces, HKV: tl.constexpr, BN: tl.constexpr):
    """Keys of a piece, such that ``pieces`` hold all in use and a remainder a head; four tiles at least."""
    keys = tl.cdiv(tl.sum(size, 0), tl.maximum(pieces - HKV, 1))
    return tl.maximum(tl.cdiv(keys, BN), 4) * BN


@triton.jit
def _ring_piece(size, piece, split, HKVP: tl.constexpr, WHOLE: tl.constexpr):
    """Head and keys of a piece when pieces of ``split`` keys are counted over all heads."""
    if WHOLE:
        head, begin = piece, 0
        end = _pick(size, head, HKVP)
    else:
        pieces = tl.cdiv(size, split)
        ends = tl.cumsum(pieces, 0)
        # A piece past the last one belongs to no head: all that is picked is 0, so it has no keys.
        head = tl.sum((ends <= piece).to(tl.int32), 0)
        begin = (piece - _pick(ends - pieces, head, HKVP)) * split
        end = tl.minimum(begin + split, _pick(size, head, HKVP))
    return head, begin, end


@triton.jit
def _even_split(lengths, batch, split, window, capacity, BN: tl.constexpr):
    """First key that a sequence's query sees, the one after the last, and the keys in each of the pieces."""
    end = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), capacity)
    begin = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    return begin, end, tl.maximum(tl.cdiv(tl.cdiv(end - begin, split), BN), 1) * BN


@triton.jit
def _even_piece(lengths, batch, index, split, window, capacity, BN: tl.constexpr):
    begin, end, width = _even_split(lengths, batch, split, window, capacity, BN)
    return begin + index * width, tl.minimum(begin + (index + 1) * width, end)


@triton.jit
def _features(D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr, odd: tl.constexpr):
    """Feature of each column of a tile: all of them, or for two codes a byte the even or the odd ones."""
    if BITS == 4:
        return 2 * tl.arange(0, BD // 2) + odd
    else:
        return tl.arange(0, BD)


@triton.jit
def _load_codes(
    base, start, stride, end, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr
):
    if BITS == 4:
        return load_tile(base, start, stride, end, D // 2, BD // 2, BN, True)
    else:
        return load_tile(base, start, stride, end, D, BD, BN, True)


@triton.jit
def _shift(HALF: tl.constexpr, BFLOAT: tl.constexpr, BITS: tl.constexpr):
    """What ``_exact`` adds to a code."""
    if HALF:
        return 1024.0
    elif BFLOAT and BITS == 4:
        return 128.0
    else:
        return 0.0


@triton.jit
def _exact(codes, HALF: tl.constexpr, BFLOAT: tl.constexpr, BITS: tl.constexpr):
    """``code + shift`` in a dot's type without rounding. Where the mantissa is wide enough, by putting the
    code into its last bits: conversions of integers run at a fraction of the rate."""
    if HALF:
        return (codes.to(tl.int16) | HALF_1024).to(tl.float16, bitcast=True)
    elif BFLOAT and BITS == 4:
        return (codes.to(tl.int16) | BFLOAT_128).to(tl.bfloat16, bitcast=True)
    elif BFLOAT:
        return codes.to(tl.int32).to(tl.float32).to(tl.bfloat16)
    else:
        return codes.to(tl.int32).to(tl.float32)


@triton.jit
def _scores(
    even, odd, q_sum, base, scales, minima, start, stride, end,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """q.k of one block of keys, ``[M, BN]`` float32; zeros in q for features that don't exist."""
    codes = _load_codes(base, start, stride, end, D, BD, BN, BITS)
    if BITS == 16:
        scores = tl.dot(even, tl.trans(codes.to(even.dtype)), input_precision=PRECISION)
    else:
        at = start + tl.arange(0, BN)
        scale = tl.load(scales + at, mask=at < end, other=0.0)
        minimum = tl.load(minima + at, mask=at < end, other=0.0)
        HALF: tl.constexpr = even.dtype == tl.float16
        BFLOAT: tl.constexpr = even.dtype == tl.bfloat16
        if BITS == 4:
            low, high = _exact(codes & 15, HALF, BFLOAT, 4), _exact(codes >> 4, HALF, BFLOAT, 4)
            product = tl.dot(even, tl.trans(low), input_precision=PRECISION)
            product = tl.dot(odd, tl.trans(high), product, input_precision=PRECISION)
        else:
            product = tl.dot(even, tl.trans(_exact(codes, HALF, BFLOAT, 8)), input_precision=PRECISION)
        shifted = minimum - _shift(HALF, BFLOAT, BITS) * scale
        scores = product * scale[None, :] + q_sum[:, None] * shifted[None, :]
    return scores


@triton.jit
def _add_values(
    weights, even, odd, base, scales, minima, start, stride, end, shrink,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The accumulators (of even and odd features, or of all and an unused one) after one block of values."""
    codes = _load_codes(base, start, stride, end, D, BD, BN, BITS)
    if BITS == 16:
        values = codes.to(weights.dtype)
    else:
        at = start + tl.arange(0, BN)
        scale = tl.load(scales + at, mask=at < end, other=0.0)[:, None]
        minimum = tl.load(minima + at, mask=at < end, other=0.0)[:, None]
        if BITS == 4:
            values = ((codes & 15).to(tl.int32).to(tl.float32) * scale + minimum).to(weights.dtype)
            second = ((codes >> 4).to(tl.int32).to(tl.float32) * scale + minimum).to(weights.dtype)
            odd = tl.dot(weights, second, odd * shrink[:, None], input_precision=PRECISION)
        else:
            values = (codes.to(tl.int32).to(tl.float32) * scale + minimum).to(weights.dtype)
    return tl.dot(weights, values, even * shrink[:, None], input_precision=PRECISION), odd


@triton.jit
def _store_result(
    rows, acc, total, known, D: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr, odd: tl.constexpr
):
    feature = _features(D, BD, BITS, odd)
    mask = known[:, None] & (feature < D)[None, :]
    tl.store(rows[:, None] + feature[None, :], normalized(acc, total).to(rows.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["bound", "split", "window"])
def decode_kernel(
    q, k, k_scale, k_min, v, v_scale, v_min, lengths, head_start, window, sink, out, lse,
    qb, qh, kb, kh, ks, vb, vh, vs, sb, sh, bound, split, scale, softcap,
    HKV: tl.constexpr, HKVP: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, RINGS: tl.constexpr, WHOLE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One piece of one key head's keys. Grid: (pieces of all key heads, batch).

    ``out`` ``[batch, pieces, GROUP, D]`` and ``lse`` ``[batch, pieces, GROUP]`` (log2). WHOLE: every head is
    one piece, ``out`` is the result and is written for empty heads too.
    ``lengths [batch]``, the tokens so far. KEY_BITS and VALUE_BITS: 16 for plain ones of any type.
    Even: ``bound`` is the capacity, ``split`` the pieces of each head, ``window`` an integer; no ``sink``, no
    ``head_start``.
    Rings: all pieces have the same number of keys, so that wide heads get more of them; ``bound`` and
    ``split`` are not used.
    """
    piece = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    if RINGS:
        size = _ring_sizes(head_start, window, sink, tl.load(lengths + batch), HKV, HKVP)
        head, begin, end = _ring_piece(
            size, piece, _ring_split(size, tl.num_programs(0), HKV, BN), HKVP, WHOLE
        )
        first = tl.load(head_start + tl.minimum(head, HKV - 1))
        k_base, v_base = k + batch * kb + first * ks, v + batch * vb + first * vs
        at = batch * sb + first
    else:
        head = piece // split
        begin, end = _even_piece(lengths, batch, piece % split, split, window, bound, BN)
        wide = head.to(tl.int64)
        k_base, v_base = k + batch * kb + wide * kh, v + batch * vb + wide * vh
        at = batch * sb + wide * sh
    if KEY_BITS != 16:
        k_scale, k_min = k_scale + at, k_min + at
    if VALUE_BITS != 16:
        v_scale, v_min = v_scale + at, v_min + at
    row = tl.arange(0, BM)
    queries = q + batch * qb + head.to(tl.int64) * GROUP * qh + row[:, None] * qh
    known = (row < tl.where(head < HKV, GROUP, 0))[:, None]
    feature = _features(D, BD, KEY_BITS, 0)
    even = tl.load(queries + feature[None, :], mask=known & (feature < D)[None, :], other=0.0)
    odd = even
    q_sum = tl.sum(even.to(tl.float32), 1)
    if KEY_BITS == 4:
        feature = _features(D, BD, KEY_BITS, 1)
        odd = tl.load(queries + feature[None, :], mask=known & (feature < D)[None, :], other=0.0)
        q_sum += tl.sum(odd.to(tl.float32), 1)
    top = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    BDV: tl.constexpr = BD // 2 if VALUE_BITS == 4 else BD
    acc = tl.zeros((BM, BDV), tl.float32)
    acc_odd = acc
    for start in range(begin, end, BN):
        scores = _scores(even, odd, q_sum, k_base, k_scale, k_min, start, ks, end, D, BD, BN, KEY_BITS)
        if SOFTCAP:  # tanh by the logistic function: there is no other one that the interpreter knows
            scores = softcap * (2.0 * tl.sigmoid(2.0 * (scores * (scale / softcap))) - 1.0) * LOG2
        else:
            scores *= scale * LOG2
        scores = tl.where((start + tl.arange(0, BN) < end)[None, :], scores, float("-inf"))
        weights, top, shrink = softmax_weights(scores, top)
        total = total * shrink + tl.sum(weights, 1)
        acc, acc_odd = _add_values(
            weights.to(even.dtype), acc, acc_odd, v_base, v_scale, v_min, start, vs, end, shrink,
            D, BD, BN, VALUE_BITS,
        )  # fmt: skip
    if WHOLE or begin < end:
        place = batch * tl.num_programs(0) + piece
        if not WHOLE:
            tl.store(lse + place * GROUP + row, top + tl.log2(total), mask=row < GROUP)
        target = out + (place * GROUP + row) * D
        _store_result(target, acc, total, row < GROUP, D, BD, VALUE_BITS, 0)
        if VALUE_BITS == 4:
            _store_result(target, acc_odd, total, row < GROUP, D, BD, VALUE_BITS, 1)


@triton.jit(do_not_specialize=["bound", "split", "pieces", "window"])
def merge_kernel(
    parts, lse, lengths, head_start, window, sink, out, bound, split, pieces,
    HKV: tl.constexpr, HKVP: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, RINGS: tl.constexpr,
):  # fmt: skip
    """Merge the pieces of one query head. Grid: (query heads, batch). ``pieces``: of all heads."""
    kv_head = tl.program_id(0) // GROUP
    batch = tl.program_id(1).to(tl.int64)
    if RINGS:
        size = _ring_sizes(head_start, window, sink, tl.load(lengths + batch), HKV, HKVP)
        counts = tl.cdiv(size, _ring_split(size, pieces, HKV, BN))
        count = _pick(counts, kv_head, HKVP)
        first = _pick(tl.cumsum(counts, 0), kv_head, HKVP) - count
    else:
        begin, end, width = _even_split(lengths, batch, split, window, bound, BN)
        count = tl.cdiv(end - begin, width)
        first = kv_head * split
    row = (batch * pieces + first) * GROUP + tl.program_id(0) % GROUP
    column = tl.arange(0, BD)
    top = tl.full((1,), LOWEST, tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BD,), tl.float32)
    for start in range(0, count, MERGED):
        at = start + tl.arange(0, MERGED)
        # [1, MERGED]: one row of scores, as softmax_weights takes them.
        scores = tl.load(lse + row + at * GROUP, mask=at < count, other=float("-inf"))[None, :]
        mask = (at < count)[:, None] & (column < D)[None, :]
        part = tl.load(parts + (row + at[:, None] * GROUP) * D + column[None, :], mask=mask, other=0.0)
        weights, top, shrink = softmax_weights(scores, top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink + tl.sum(tl.trans(weights) * part, 0)
    result = acc / tl.where(total > 0.0, total, 1.0)
    target = out + (batch * tl.num_programs(0) + tl.program_id(0)) * D + column
    tl.store(target, result.to(out.dtype.element_ty), mask=column < D)
