"""Checks of the operators over ragged rings: ``decode_attention_cache`` and ``cache_append``."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from autocomp.kernels import attention_reference as reference
from autocomp.kernels.library import Operator
from autocomp.testing.attention_inputs import (
    DECODE_SHAPES,
    Case,
    guarded,
    guards_hold,
    moved_to,
    random_heads,
    spread,
)

Tensor = torch.Tensor

MIXES = tuple((k, v) for k in (16, 8, 4) for v in (16, 8, 4))
"""Bits of keys and values; 16 stands for plain numbers of any type."""


def ring_cache(
    window: Tensor,
    sink: Tensor,
    dim: int,
    lengths: tuple[int, ...],
    bits: tuple[int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]]:
    """Random rings: ``k, v, k_scale, k_min, v_scale, v_min`` and ``head_start, window, sink``.

    Slots that were never written hold NaN, as codes 255.
    """
    kv_heads = len(window)
    starts = torch.zeros(kv_heads + 1, dtype=torch.int64)
    starts[1:] = (window + sink).cumsum(0)
    sides = []
    for n, shift in zip(bits, (0.0, 0.5)):
        rows = torch.randn(len(lengths), int(starts[-1]), dim, generator=generator) + shift
        entries = [t for t in reference.cache_entries(rows, n, dtype) if t is not None]
        for h, ring in itertools.product(range(kv_heads), entries):
            for b, length in enumerate(lengths):
                used = reference.span_slots(int(window[h]), int(sink[h]), length)
                unused = ring[b, starts[h] + used : starts[h + 1]]
                unused.fill_(torch.nan if ring.is_floating_point() else 255)
        rows, *factors = (guarded(t) for t in entries)
        sides.append((rows, *(factors or (None, None))))
    cache = (sides[0][0], sides[1][0], *sides[0][1:], *sides[1][1:])
    return cache, (guarded(starts), window, sink)


def _widths(bits: tuple[int, int], dtype: torch.dtype) -> tuple[int, int]:
    plain = 8 * dtype.itemsize
    return (plain if bits[0] == 16 else bits[0], plain if bits[1] == 16 else bits[1])


def decode_cache_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Windows from 0 and 1 on, with and without sink; rings that are empty, young, just full and wrapped side
    by side; all mixes of bits; plain numbers of the queries' dtype or bfloat16."""
    generator = torch.Generator().manual_seed(2)
    mixes = itertools.cycle(MIXES)
    turns: tuple[tuple[tuple[int, ...], torch.dtype, float], ...] = (
        ((0, 1, 45), dtype, 0.0),
        ((3, 500, 64), dtype, 3.0),
        ((134, 2**30, 0), dtype, 0.0),
        ((41, 1, 7), torch.bfloat16, 0.0),
    )
    for heads, kv_heads, dim, _ in (*DECODE_SHAPES, (6, 3, 33, 0)):
        for lengths, stored, softcap in turns:
            bits = next(mixes)
            if dim % 2:
                bits = (max(bits[0], 8), max(bits[1], 8))
            widths = _widths(bits, stored)
            spans = spread(kv_heads, 1, 40, 0, 64, 7), spread(kv_heads, 0, 5, 3, 70, 2)
            cache, rings = ring_cache(*spans, dim, lengths, widths, stored, generator)
            q = random_heads(generator, dtype, 3, heads, 1, dim)
            counts = guarded(torch.tensor(lengths, dtype=torch.int32))
            label = f"H{heads}/{kv_heads} D{dim} lengths {lengths} k{widths[0]} v{widths[1]} {stored}"
            yield Case(label, (q, *cache, *rings, counts, *widths, dim**-0.5, softcap))


def check_append(operator: Operator, implementation: str, device: str, dtype: torch.dtype) -> int:
    """Rings token by token against lists that keep sink and window; the second sequence goes half as fast.
    Returns how many mixes of bits the implementation takes."""
    ran = 0
    for bits in ((16, 16), (8, 4), (4, 8)):
        with contextlib.suppress(NotImplementedError):
            _check_append(operator, implementation, device, dtype, bits)
            ran += 1
    return ran


def _check_append(
    operator: Operator, implementation: str, device: str, dtype: torch.dtype, bits: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(6)
    widths = _widths(bits, dtype)
    spans = spread(4, 5, 0, 8, 1), spread(4, 2, 3, 0, 1)
    cache, rings = ring_cache(*spans, 24, (0, 0), widths, dtype, generator)
    cache, rings = (tuple(moved_to(t, device) for t in part) for part in (cache, rings))
    seen: list[dict[int, tuple[Tensor, Tensor]]] = [{}, {}]
    where = f"{operator.name} ({implementation}, {dtype}, bits {widths})"
    for step in range(18):
        positions = torch.tensor([step, step // 2], dtype=torch.int32)
        new = [random_heads(generator, dtype, 2, 4, 1, 24, shift=1.0)[:, :, 0] for _ in range(2)]
        for b, position in enumerate(positions.tolist()):
            seen[b][position] = (new[0][b], new[1][b])
        with operator.forced(implementation):
            moved = [moved_to(x, device) for x in (*new, positions)]
            operator(*cache, *moved[:2], *rings, moved[2], *widths)
        for side, n in enumerate(widths):
            entries = [None if t is None else t.cpu() for t in (cache[side], *cache[2 + 2 * side :][:2])]
            for b, tokens in enumerate(seen):
                _check_rings([t if t is None else t[b] for t in entries], rings, tokens, side, n, where)
    assert all(guards_hold(t) for t in cache if t is not None), f"{where}: writes beside the cache"


def _check_rings(
    entries: list[Tensor | None],
    rings: tuple[Tensor, ...],
    tokens: dict[int, tuple[Tensor, Tensor]],
    side: int,
    bits: int,
    where: str,
) -> None:
    """Keys (side 0) or values of one sequence ``[L, ...]`` against its ``tokens``."""
    starts, window, sink = (t.tolist() for t in rings)
    for h, (w, s) in enumerate(zip(window, sink)):
        kept = [t for t in tokens if t < s or max(tokens) - t < w]
        slots = [t if t < s else s + (t - s) % w for t in kept]
        rest = [slot for slot in range(starts[h + 1] - starts[h]) if slot not in slots]
        told = f"{where} head {h}, token {max(tokens)}"
        found = [None if t is None else t[starts[h] : starts[h + 1]] for t in entries]
        for t in found:
            if t is not None:
                untouched = t[rest].isnan() if t.is_floating_point() else t[rest] == 255
                assert untouched.all(), f"{told}: writes a slot that is not its own"
        if kept:
            rows = torch.stack([tokens[t][side][h] for t in kept])
            _check_entries([None if t is None else t[slots][None] for t in found], rows[None], bits, told)


def _check_entries(found: list[Tensor | None], x: Tensor, bits: int, where: str) -> None:
    """Entries of a cache that should hold the rows ``x``: exactly, or as near as codes can be."""
    rows, scale, minimum = found
    assert rows is not None
    if scale is None:
        assert torch.equal(rows, x.to(rows.dtype)), f"{where}: tokens are lost"
        return
    codes, *factors = reference.cache_entries(x, bits, rows.dtype)
    for mine, wanted in zip((scale, minimum), factors):
        torch.testing.assert_close(mine, wanted, msg=lambda m: f"{where}: tokens are lost: {m}")
    error = (reference.cache_rows(rows, scale, minimum, bits) - x.float()).abs()
    assert (error <= scale.unsqueeze(-1) * 0.501 + 1e-6).all(), f"{where}: more than half a step off"
    assert (rows != codes).float().mean() <= 0.01, f"{where}: codes differ from the reference's"
