"""Triton kernels of ``linear_wna16``: 16-bit (or float32) activations times weights of 2 to 8 bits.

Layout of a weight ``[N, K]``: 32-bit words, in blocks of KB features (64, or 32 for groups of an odd multiple
of 32): ``low [K / KB, N, KB * LOW / 32]`` holds LOW = 2, 4 or 8 bits of each code and ``high``, in the same
order, the HIGH = 1 or 2 bits above (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2), so that no code straddles two words. Of
two neighbouring codes the even one lies in the low half of a word and the odd one at the same place of the
high half. Scale and zero are ``[G, N]``. K is padded to whole blocks with zeros.

Why so: a tile is contiguous in memory, and one shift and one mask make a pair of 16-bit floats in one
register, in the order in which the matrix units want the left operand. So y^T = W x^T is computed: weights
pass through registers to the matrix units without being written to shared memory, and a few tokens are the
narrow side (8 wide; also for one token, where this takes fewer instructions a weight than a vector product).

Codes become floats by their bits, put into the mantissa of 2**10 (float16), 2**7 (bfloat16) or 2**23
(float32): converting integers is slow. ``u - zero`` is exact in all of them; scales multiply float32 sums.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _paired(q, h, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes 2i (low half) and 2i + 1 (high half) of words [..., W] -> int32 [..., W, 16 / LOW]."""
    i = tl.arange(0, 16 // LOW)[None, None, :]
    pair = (q[:, :, None] >> (LOW * i)) & (((1 << LOW) - 1) * 0x10001)
    if HIGH > 0:
        pair = pair | (((h[:, :, None] >> (HIGH * i)) & (((1 << HIGH) - 1) * 0x10001)) << LOW)
    return pair


@triton.jit
def _single(pair):
    """Pairs int32 [A, W, P] -> codes int32 [A, W * P * 2] in their order."""
    both = tl.join(pair & 0xFFFF, (pair >> 16) & 0xFFFF)
    return tl.reshape(both, (pair.shape[0], pair.shape[1] * pair.shape[2] * 2))


@triton.jit
def _halves(pair, zero, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """``u - zero`` in DTYPE (16 bits) [A, K] from pairs [A, W, P] and zeros int32 [A]."""
    MAGIC: tl.constexpr = 0x6400 if tl.float16 == DTYPE else 0x4300  # 2**10, 2**7
    pair = pair | (MAGIC * 0x10001)
    if ASM:  # one instruction a pair; the compiler regroups scalar subtractions and then shuffles
        pair, middle = tl.broadcast(pair, ((zero | MAGIC) * 0x10001)[:, None, None])
        if tl.float16 == DTYPE:
            pair = tl.inline_asm_elementwise(
                "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [pair, middle], dtype=tl.int32, is_pure=True, pack=1
            )
        else:  # 1 * pair - middle: sub.bf16x2 needs sm_90
            pair = tl.inline_asm_elementwise(
                "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r",
                [pair, tl.full(pair.shape, 0x3F803F80, tl.int32), middle ^ -0x7FFF8000],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        return _single(pair).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        middle = (zero | MAGIC).to(tl.int16).to(DTYPE, bitcast=True)
        return _single(pair).to(tl.int16).to(DTYPE, bitcast=True) - middle[:, None]


@triton.jit
def _floats(pair, zero):
    """``u - zero``, float32 [A, K]."""
    big = (_single(pair) | 0x4B000000).to(tl.float32, bitcast=True)
    return big - (zero[:, None] | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _centred(pair, zero, DTYPE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """``u - zero`` in DTYPE, exactly."""
    if tl.float16 == DTYPE or (tl.bfloat16 == DTYPE and BITS < 8):
        return _halves(pair, zero, DTYPE, ASM)
    else:
        return _floats(pair, zero).to(DTYPE)


@triton.jit
def _pairs_at(
    low, high, n, inside, k, N, K,
    LOW: tl.constexpr, HIGH: tl.constexpr, KB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Pairs [BN, BK * LOW / 32, 16 / LOW] of the weight's rows n and features k .. k + BK (k: a multiple)."""
    WORDS: tl.constexpr = KB * LOW // 32  # of a row in a block
    w = k * LOW // 32 + tl.arange(0, BK * LOW // 32)
    mask = inside[:, None] & (w < tl.cdiv(K, KB) * WORDS)[None, :]
    block = (w // WORDS)[None, :] * N + n[:, None]
    q = tl.load(low + block * WORDS + (w % WORDS)[None, :], mask=mask, other=0)
    h = q
    if HIGH > 0:
        SHARE: tl.constexpr = LOW // HIGH  # words of low for one of high
        place = block * (WORDS // SHARE) + (w % WORDS // SHARE)[None, :]
        h = tl.load(high + place, mask=mask, other=0) >> (w % SHARE * (16 // SHARE))[None, :]
    return _paired(q, h, LOW, HIGH)


@triton.jit
def _zeros_at(zero, at, inside, BITS: tl.constexpr):
    """The codes that mean 0, int32."""
    if zero is None:
        return tl.full(at.shape, 1 << (BITS - 1), tl.int32)
    else:
        return tl.load(zero + at, mask=inside, other=0).to(tl.int32)


@triton.jit
def _store(total, n, place, inside, bias, y, N):
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _finish(total, t, n, tile, split, bias, partial, counters, y, M, N, SPLIT: tl.constexpr):
    """Store a tile ``total [BM, BN]`` of y, or this program's part of the sum.

    The last program to write a part of a tile adds all of them up in their order, so the result does not
    depend on which one that is, and clears the tile's counter for the next launch.
    """
    inside = (t < M)[:, None] & (n < N)[None, :]
    place = t.to(tl.int64)[:, None] * N + n[None, :]
    if SPLIT > 1:
        tl.store(partial + split.to(tl.int64) * M * N + place, total, mask=inside)
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            total = tl.zeros_like(total)
            for part in range(SPLIT):
                start = partial + tl.cast(part, tl.int64) * M * N
                total += tl.load(start + place, mask=inside, other=0.0, cache_modifier=".cg")
            _store(total, n, place, inside, bias, y, N)
            tl.store(counters + tile, 0)
    else:
        _store(total, n, place, inside, bias, y, N)


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, low, high, scale, zero, bias, hidden, up, partial, counters, y,
    M, N, K, group,
    LOW: tl.constexpr, HIGH: tl.constexpr, KB: tl.constexpr, RANK: tl.constexpr, ASM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """y[M, N] = x[M, K] W^T + hidden[M, RANK] up[N, RANK]^T + bias.

    Programs (tiles of N, SPLIT parts of K, tiles of M). BK divides the group. RANK 0: no low-rank part.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(2) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    rows, tokens = n < N, t < M
    all_steps = tl.cdiv(K, BK)
    steps = tl.cdiv(all_steps, SPLIT)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(split * steps, tl.minimum(split * steps + steps, all_steps)):
        k = step * BK
        kk = k + tl.arange(0, BK)
        place = t.to(tl.int64)[:, None] * K + kk[None, :]
        a = tl.load(x + place, mask=tokens[:, None] & (kk < K)[None, :], other=0.0)
        pair = _pairs_at(low, high, n, rows, k, N, K, LOW, HIGH, KB, BK)
        at = (k // group) * N + n
        s = tl.load(scale + at, mask=rows, other=0.0).to(tl.float32)
        w = _centred(pair, _zeros_at(zero, at, rows, LOW + HIGH), a.dtype, LOW + HIGH, ASM)
        acc += tl.dot(w, a.T, input_precision="ieee", out_dtype=tl.float32) * s[:, None]
    if RANK > 0:  # noqa: SIM102, the compiler decides this one
        if split == 0:
            r = tl.arange(0, RANK)
            b = tl.load(up + n[:, None] * RANK + r[None, :], mask=rows[:, None], other=0.0)
            h = tl.load(hidden + t[:, None] * RANK + r[None, :], mask=tokens[:, None], other=0.0)
            acc += tl.dot(b, h.T, input_precision="ieee", out_dtype=tl.float32)
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    _finish(acc.T, t, n, tile, split, bias, partial, counters, y, M, N, SPLIT)


@triton.jit(do_not_specialize=["first", "count"])
def dequantize_kernel(
    low, high, scale, zero, index, out, first, count, N, K, group,
    LOW: tl.constexpr, HIGH: tl.constexpr, KB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[i, k] = W[index[i], k], or W[first + i, k] without index, for i < count. BK divides the group."""
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK
    rows = i < count
    n = first + i
    if index is not None:
        n = tl.load(index + i, mask=rows, other=0).to(tl.int32)
    pair = _pairs_at(low, high, n, rows, k, N, K, LOW, HIGH, KB, BK)
    at = (k // group) * N + n
    s = tl.load(scale + at, mask=rows, other=0.0).to(tl.float32)
    w = _floats(pair, _zeros_at(zero, at, rows, LOW + HIGH)) * s[:, None]
    kk = k + tl.arange(0, BK)
    place = out + i.to(tl.int64)[:, None] * K + kk[None, :]
    tl.store(place, w.to(out.dtype.element_ty), mask=rows[:, None] & (kk < K)[None, :])


@triton.jit
def outlier_kernel(x, start, column, change, y, N, K, BR: tl.constexpr, BLOCK: tl.constexpr):
    """y[m, n] += sum of x[m, column] * change over the outliers of row n. Programs (BR rows, one token)."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BR + tl.arange(0, BR)
    rows = n < N
    begin = tl.load(start + n, mask=rows, other=0)
    end = tl.load(start + n + 1, mask=rows, other=0)
    acc = tl.zeros((BR, BLOCK), tl.float32)
    for offset in range(0, tl.max(end - begin, axis=0), BLOCK):
        at = begin[:, None] + offset + tl.arange(0, BLOCK)[None, :]
        inside = at < end[:, None]
        k = tl.load(column + at, mask=inside, other=0)
        v = tl.load(change + at, mask=inside, other=0.0)
        acc += v * tl.load(x + m * K + k, mask=inside, other=0.0).to(tl.float32)
    place = y + m * N + n
    former = tl.load(place, mask=rows, other=0.0).to(tl.float32)
    tl.store(place, (former + tl.sum(acc, axis=1)).to(y.dtype.element_ty), mask=rows)


@triton.jit(do_not_specialize=["first"])
def outlier_rows_kernel(index, first, start, column, change, out, K, BLOCK: tl.constexpr):
    """out[i, column] += change for the outliers of row index[i], or first + i. One program per row of out."""
    i = tl.program_id(0).to(tl.int64)
    n = first + i
    if index is not None:
        n = tl.load(index + i)
    begin, end = tl.load(start + n), tl.load(start + n + 1)
    for offset in range(begin, end, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        k = tl.load(column + at, mask=at < end, other=0)
        place = out + i * K + k
        former = tl.load(place, mask=at < end, other=0.0).to(tl.float32)
        w = former + tl.load(change + at, mask=at < end, other=0.0)
        tl.store(place, w.to(out.dtype.element_ty), mask=at < end)
