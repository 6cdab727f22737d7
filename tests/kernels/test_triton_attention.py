"""Numbers of the Triton attention kernels, from the interpreter: float32 and float16 only (it gets bfloat16
wrong). Every input lies among NaN or absurd numbers, and so does every buffer that a kernel allocates: what
is read beside it shows in the result, what is written beside it or not at all is looked for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from autocomp.kernels import attention_probe
from autocomp.kernels import attention_reference as reference
from autocomp.kernels.attention import OPERATORS
from autocomp.kernels.library import Implementation
from autocomp.kernels.triton import attention_launch
from autocomp.kernels.triton.attention_cases import Cases
from autocomp.kernels.triton.attention_ops import SUPPORTS, kernel
from autocomp.testing.attention import check_operator
from autocomp.testing.triton_aot import run_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs through test_in_the_interpreter")

BOUND = {torch.float32: 1e-5, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", BOUND, ids=["float32", "float16"])
GUARD = 64
POISON = {torch.uint8: 0xFF, torch.int32: 2**30, torch.int64: 2**40}


@pytest.mark.skipif(INTERPRETED, reason="is the inner run")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, POISON.get(dtype, torch.nan), dtype=dtype)


def among_poison(x: torch.Tensor, strided: bool) -> torch.Tensor:
    """A copy of ``x`` with poison before and behind it; strided: beside every row too."""
    if strided:
        large = poisoned(tuple(n + 8 for n in x.shape), x.dtype)
        inner = large[(slice(4, -4),) * x.dim()]
    else:
        large = poisoned((x.numel() + 2 * GUARD,), x.dtype)
        inner = large[GUARD:-GUARD].view(x.shape)
    return inner.copy_(x)


def prepared(arguments: tuple[Any, ...], strided: bool) -> tuple[Any, ...]:
    return tuple(among_poison(a, strided) if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.fixture(autouse=True)
def guarded_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every ``torch.empty`` is full of poison, and what lies around it must still be there afterwards."""
    kept: list[torch.Tensor] = []

    def empty(*shape: Any, dtype: torch.dtype, device: Any = None) -> torch.Tensor:
        del device
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = int(torch.Size(sizes).numel())
        large = poisoned((count + 2 * GUARD,), dtype)
        kept.append(large)
        return large[GUARD : GUARD + count].view(sizes)

    if INTERPRETED:
        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch, "empty_like", lambda x: empty(x.shape, dtype=x.dtype))
    yield
    for large in kept:
        wanted = poisoned((GUARD,), large.dtype)
        for guard in (large[:GUARD], large[-GUARD:]):
            assert torch.equal(guard.nan_to_num(7.0), wanted.nan_to_num(7.0)), "written beside a buffer"


def check(name: str, arguments: tuple[Any, ...], strided: bool = False) -> None:
    dtype = next(a.dtype for a in arguments if isinstance(a, torch.Tensor) and a.dtype in BOUND)
    error = attention_probe.error(name, kernel(name), prepared(arguments, strided))
    assert error <= BOUND[dtype], f"{name}: relative error {error:.2g} is over {BOUND[dtype]}"


# --- cache ----------------------------------------------------------------------------------------------


QUANTIZED = [(8, (2, 2, 37, 40)), (4, (1, 3, 70, 66)), (8, (1, 1, 5, 7)), (4, (1, 1, 1, 2))]


@inside
@DTYPES
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("bits, shape", QUANTIZED)
def test_quantization_is_exact(dtype: torch.dtype, strided: bool, bits: int, shape: tuple[int, ...]) -> None:
    x = Cases("cpu", dtype).normal(*shape)
    x[0, 0, 0] = 1.5  # constant: scale 0
    found = kernel("kv_quantize")(among_poison(x, strided), bits)
    for mine, theirs in zip(found, reference.kv_quantize(x, bits)):
        assert torch.equal(mine, theirs)


DECODE = {
    "int8 grouped": ((1, 8, 2, 600, 64), (8, 8), [600], 0.0, 0),
    "ragged, empty": ((3, 4, 4, 300, 40), (4, 8), [0, 177, 1], 5.0, 0),
    "window": ((2, 6, 2, 700, 80), (8, 4), [33, 650], 0.0, 100),
    "int4, one key head": ((1, 8, 1, 1100, 128), (4, 4), [1043], 0.0, 0),
    "odd dim": ((1, 3, 3, 50, 33), (8, 8), [49], 30.0, 7),
    "17 in a group": ((1, 17, 1, 40, 16), (4, 4), [40], 0.0, 0),
}


@inside
@pytest.mark.parametrize(
    "name", ["kv_quantize", "cache_append", "decode_attention_kv", "decode_attention_cache"]
)
def test_the_public_conformance_checks_hold(name: str) -> None:
    """Of the operators over caches; the others' take minutes here and run on a GPU."""
    OPERATORS[name].register(Implementation("interpreted", "cpu", kernel(name), supports=SUPPORTS[name]))
    assert check_operator(OPERATORS[name], "interpreted", "cpu", (torch.float16,)) > 0


@inside
@DTYPES
@pytest.mark.parametrize("case", DECODE)
def test_decoding_over_codes(dtype: torch.dtype, case: str) -> None:
    arguments = Cases("cpu", dtype).decode_attention_kv(*DECODE[case])
    for b, length in enumerate(arguments[7].tolist()):  # behind a sequence's end lies garbage
        for scales in (arguments[2], arguments[3], arguments[5], arguments[6]):
            scales[b, :, length:] = torch.nan
    check("decode_attention_kv", arguments, strided=case in ("window", "odd dim"))


@inside
def test_lengths_past_the_capacity_read_no_further() -> None:
    arguments = Cases("cpu", torch.float32).decode_attention_kv((1, 2, 1, 70, 32), (8, 8), [70])
    full = kernel("decode_attention_kv")(*arguments)
    arguments[7].fill_(1000)
    assert torch.equal(kernel("decode_attention_kv")(*prepared(arguments, False)), full)


RINGS = {
    "full and young rings": ((2, 8, 2, 64), (16, 16), [100, 700], [4, 0], [900, 60]),
    "young, one head without window": ((2, 6, 3, 40), (16, 8), [1, 20, 0], [0, 3, 8], [5, 24]),
    "many pieces": ((2, 4, 4, 32), (4, 16), [10, 900, 300, 5], [1, 2, 3, 4], [4000, 0], 5.0),
    "an empty ring": ((1, 2, 2, 16), (8, 8), [0, 9], [0, 0], [30]),
    "odd dim": ((2, 6, 2, 33), (8, 16), [600, 50], [0, 3], [610, 1]),
    "as codes": ((2, 17, 1, 48), (8, 4), [600], [7], [2**31 - 1, 40]),
}


@inside
@DTYPES
@pytest.mark.parametrize("case", RINGS)
def test_decoding_over_rings(dtype: torch.dtype, case: str) -> None:
    arguments = list(Cases("cpu", dtype).decode_attention_cache(*RINGS[case]))
    starts, window, sink, lengths = (t.tolist() for t in arguments[7:11])
    for first, w, s in zip(starts, window, sink):  # what was never written is garbage
        for b, length in enumerate(lengths):
            for x in arguments[1:7]:
                if x is not None:
                    unused = x[b, first + reference.span_slots(w, s, length) : first + w + s]
                    unused.fill_(torch.nan if x.is_floating_point() else 255)
    check("decode_attention_cache", tuple(arguments), strided=case.startswith(("young", "odd")))


@inside
@pytest.mark.parametrize("batch, multiprocessors", [(1, 132), (40, 132), (300, 4)])
def test_pieces_suffice_for_rings_of_any_length(
    monkeypatch: pytest.MonkeyPatch, batch: int, multiprocessors: int
) -> None:
    """What ``_ring_split`` computes on the device, against the pieces of the launch."""
    monkeypatch.setattr(attention_launch, "ASSUMED", (90, multiprocessors))
    for slots in (1, 255, 256, 257, 511, 512, 1111, 5000):
        plan = attention_launch.ring_plan(torch.empty(batch, 6, 1, 64, dtype=torch.float16), 3, slots, 8)
        more, tile = plan.pieces - 3, plan.tiles.keys
        assert more == 0 or more >= 2
        for used in ([slots, 0, 0], [slots // 3] * 3, [slots // 2, 1, slots // 2 - 1], [1, 1, 0]):
            keys = math.ceil(sum(used) / max(more, 1))
            split = max(4, math.ceil(keys / tile)) * tile
            assert more == 0 or sum(math.ceil(n / split) for n in used) <= plan.pieces


@inside
@pytest.mark.parametrize("bits", [(16, 16), (8, 4)])
def test_rings_hold_what_the_spans_see(bits: tuple[int, int]) -> None:
    """Token by token into the rings; decoding from them is the last row of the prefill over all."""
    cases = Cases("cpu", torch.float32)
    tokens, window, sink = 17, [5, 9], [3, 0]
    q, k, v = cases.qkv(1, 4, 2, tokens, 24)
    empty, where, widths = cases.rings((1, 2, 24), bits, window, sink)
    empty = tuple(None if x is None else torch.full_like(x, POISON.get(x.dtype, torch.nan)) for x in empty)
    cache, rings = prepared(empty, True), prepared(where, True)
    spans = (rings[1].repeat_interleave(2), rings[2].repeat_interleave(2))
    exact = [
        reference.cache_rows(*reference.cache_entries(x.flatten(0, 1), n, x.dtype), n).view(x.shape)
        for x, n in zip((k, v), widths)
    ]
    wanted = reference.attention_spans(q, *exact, *spans, 0.2)
    for t in range(tokens):
        new = (k[:, :, t], v[:, :, t])
        count = torch.tensor([t], dtype=torch.int32)
        kernel("cache_append")(*cache, *prepared(new, True), *rings, count, *widths)
        if t in (0, 4, 8, 16):
            now = q[:, :, t : t + 1]
            found = kernel("decode_attention_cache")(now, *cache, *rings, count + 1, *widths, 0.2)
            torch.testing.assert_close(found, wanted[:, :, t : t + 1], rtol=1e-5, atol=1e-5)


@inside
@pytest.mark.parametrize("bits", [(16, 16), (4, 8)])
@pytest.mark.parametrize("positions", [(0, 100), (3, 8), (29, 4)])
def test_appending(positions: tuple[int, int], bits: tuple[int, int]) -> None:
    arguments = Cases("cpu", torch.float16).cache_append((2, 3, 40), bits, [7, 0, 30], [2, 4, 0], positions)
    check("cache_append", arguments, strided=True)


@inside
def test_what_is_beside_a_ring_stays_when_positions_are_wrong() -> None:
    """A position below 0, and a ring with less room than its span."""
    cases = Cases("cpu", torch.float32)
    *cache, new_k, new_v, starts, window, sink, positions, _, _ = cases.cache_append(
        (2, 2, 16), (8, 16), [4, 6], [1, 0], [-1, 10]
    )
    starts[1] = 2  # of 5: slots 2 and up belong to the other head
    before = [None if x is None else x.clone() for x in cache]
    kernel("cache_append")(*cache, new_k, new_v, starts, window, sink, positions, 8, 32)
    for mine, former in zip(cache, before):
        if mine is not None and former is not None:
            same = (mine == former).view(2, 11, -1).all(-1)
            assert same[0].all() and same[1].sum() == 10 and not same[1, 2 + 4]


# --- prefill --------------------------------------------------------------------------------------------

PREFILL = {
    "grouped": ((1, 4, 2, 150, 64), [16, 1, 64, 500], [0, 4, 70]),
    "odd dim, short": ((2, 3, 1, 65, 40), [7, 70, 20], [3, 1]),
    "blind heads": ((1, 2, 2, 130, 16), [0, 33], [0, 5]),
    "more sinks than tokens": ((1, 2, 1, 100, 32), [1, 3], [1000, 99]),
}


@inside
@DTYPES
@pytest.mark.parametrize("case", PREFILL)
def test_spans(dtype: torch.dtype, case: str) -> None:
    strided = case == "odd dim, short" or (case == "grouped" and dtype == torch.float16)
    check("attention_spans", Cases("cpu", dtype).attention_spans(*PREFILL[case]), strided)


@inside
def test_a_window_as_wide_as_the_text_is_dense_and_one_of_one_token_is_the_value() -> None:
    q, k, v, window, sink, scale = Cases("cpu", torch.float16).attention_spans(
        (1, 4, 4, 150, 32), [150, 1], [0]
    )
    found = kernel("attention_spans")(q, k, v, window, sink, scale)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(found[:, ::2], dense[:, ::2], rtol=2e-3, atol=2e-3)
    assert torch.equal(found[:, 1::2], v[:, 1::2])


@inside
def test_the_edge_of_the_blocks_without_mask() -> None:
    """Windows that end one token before, at and behind a block's edge. One pair too many is a small error: it
    takes float32 to see it."""
    cases, sizes = Cases("cpu", torch.float32), (1, 3, 1, 130, 16)
    check("attention_spans", cases.attention_spans(sizes, [63, 64, 65], [0]))
    check("attention_window_residual", cases.attention_window_residual(sizes, [31, 62, 63], [2]))


@inside
def test_heads_are_independent_of_their_order() -> None:
    q, k, v, window, sink, scale = Cases("cpu", torch.float16).attention_spans(
        (1, 6, 6, 90, 16), [5, 90, 5, 33, 1, 60], [0, 2]
    )
    found = kernel("attention_spans")(q, k, v, window, sink, scale)
    order = [3, 5, 0, 2, 1, 4]
    again = kernel("attention_spans")(
        q[:, order], k[:, order], v[:, order], window[order], sink[order], scale
    )
    assert torch.equal(again, found[:, order])


WINDOW = {
    "all modes": ((1, 4, 4, 100, 64), [5, 20, 30, 0], [0, 1, 2, 3], 0),
    "text": ((1, 4, 2, 70, 40), [3, 10, 0, 200], [1, 2, 1, 2], 17),
    "text over some tiles": ((1, 2, 2, 200, 32), [20, 9], [2, 1], 70),
    "nothing but text": ((1, 2, 1, 40, 16), [1, 2], [2, 1], 100),
}


@inside
@DTYPES
@pytest.mark.parametrize("case", WINDOW)
def test_window_and_residual(dtype: torch.dtype, case: str) -> None:
    residual = (case == "all modes") == (dtype == torch.float16)  # each case with and without one
    arguments = Cases("cpu", dtype).attention_window_residual(*WINDOW[case], residual=residual)
    check("attention_window_residual", arguments, strided=residual)


@inside
def test_a_saved_residual_brings_the_window_back_to_the_full_result() -> None:
    q, k, v, half, prefix, _, mode, scale = Cases("cpu", torch.float32).attention_window_residual(
        (1, 2, 2, 130, 32), [9, 40], [1], prefix=5
    )
    run = kernel("attention_window_residual")
    full, residual = run(q, k, v, half, prefix, None, mode, scale)
    again, kept = run(q, k, v, half, prefix, residual, torch.full_like(mode, 2), scale)
    torch.testing.assert_close(again, full, rtol=1e-5, atol=1e-5)
    assert torch.equal(kept, residual) and not torch.equal(residual, torch.zeros_like(residual))


SPARSE = {
    "64": ((1, 3, 1, 192, 64), 64, 0.4, True),
    "short last block": ((2, 2, 2, 150, 40), 32, 0.3, True),
    "one tile of two": ((1, 2, 2, 300, 16), 128, 0.5, False),
    "smallest block": ((1, 3, 3, 70, 32), 16, 0.3, False),
}


@inside
@DTYPES
@pytest.mark.parametrize("case", SPARSE)
def test_block_sparse(dtype: torch.dtype, case: str) -> None:
    arguments = Cases("cpu", dtype).attention_block_sparse(*SPARSE[case])
    check("attention_block_sparse", arguments, strided=case == "short last block")


@inside
def test_a_full_pattern_is_dense_attention_in_any_order_and_an_empty_one_gives_zeros() -> None:
    cases = Cases("cpu", torch.float32)
    q, k, v, rows, col, block, order, _ = cases.attention_block_sparse((1, 2, 2, 128, 32), 32, 2.0)
    rows = torch.arange(0, 36, 4, dtype=torch.int32).as_strided((2, 5), (4, 1))
    col = torch.arange(4, dtype=torch.int32).repeat(8)
    found = kernel("attention_block_sparse")(q, k, v, rows, col, block, order)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)
    for columns in (col, col[:0]):
        none = kernel("attention_block_sparse")(q, k, v, torch.zeros_like(rows), columns, block, order)
        assert torch.equal(none, torch.zeros_like(q))
