"""A small case per attention operator, run once before an implementation is trusted in a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autocomp.kernels import attention_reference as reference
from autocomp.kernels.library import OPERATORS

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1.2e-2}
"""Largest accepted relative error (Frobenius norm) by dtype; wrong indexing or instructions give 0.1."""


CHANGES = {"cache_append": 6}
"""Operators that change their first arguments, and how many."""
CACHE_BITS = {
    "decode_attention_cache": ((0, 0), (8, 4), (4, 8)),
    "cache_append": ((0, 0), (8, 4), (4, 8)),
}
"""Bits of keys and values that are tried; 0 stands for uncompressed ones."""


def arguments(
    name: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    bits: tuple[int, int] = (8, 4),
) -> tuple[Any, ...]:
    """A small call of ``name`` in ``dtype``: 70 tokens (no multiple of any tile), 4 heads on 2 key heads.

    Args:
        bits: of keys and values in the operators over rings; 0 stands for those of ``dtype``.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def integers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    q, k, v = random(1, 4, 70, 40), random(1, 2, 70, 40), random(1, 2, 70, 40)
    starts = torch.tensor([0, 30, 70], device=device)
    spans = starts, integers(20, 33), integers(10, 7)
    match name:
        case "kv_quantize":
            return k, 4
        case "decode_attention_kv":
            coded = (*reference.kv_quantize(k, 8), *reference.kv_quantize(v, 4))
            return q[:, :, :1], *coded, integers(67), 8, 4, 0.15
        case "attention_spans":
            return q, k, v, integers(3, 20, 70, 9), integers(0, 5, 0, 1), 0.15
        case "decode_attention_cache" | "cache_append":
            widths = tuple(n or 8 * dtype.itemsize for n in bits)
            entries = [reference.cache_entries(random(2, 70, 40), n, dtype) for n in widths]
            cache = [entries[0][0], entries[1][0], *entries[0][1:], *entries[1][1:]]
            if name == "cache_append":
                return *cache, random(2, 2, 40), random(2, 2, 40), *spans, integers(90, 24), *widths
            return random(2, 4, 1, 40), *cache, *spans, integers(90, 25), *widths, 0.15, 5.0
        case "attention_window_residual":
            return q, k, v, integers(3, 20, 5, 9), 4, random(1, 4, 70, 40), integers(0, 1, 2, 3)
        case "attention_block_sparse":
            row_ptr = torch.arange(13, dtype=torch.int32, device=device).unfold(0, 4, 3)
            return q, k, v, row_ptr, integers(*[0, 2, 1] * 4), 32, None
    raise ValueError(f"no attention operator is called {name!r}")


def check(name: str, run: Callable[..., Any], device: str = "cpu") -> str:
    """Why the numbers of ``run`` are not to be trusted; empty when they agree with the reference's."""
    for dtype, limit in LIMITS.items():
        for bits in CACHE_BITS.get(name, ((8, 4),)):
            worst = error(name, run, arguments(name, device, dtype, bits))
            if not worst <= limit:
                return f"{name}: self-check in {dtype} is off by {worst:.2g} (relative; limit {limit:g})"
    return ""


def error(name: str, run: Callable[..., Any], args: tuple[Any, ...]) -> float:
    """Largest relative error (Frobenius) of ``run`` against the operator's reference, over its results and
    the arguments that it changes (in copies); NaN when one is NaN."""
    changed = CHANGES.get(name, 0)
    mine, theirs = (
        [a.clone() if isinstance(a, torch.Tensor) and i < changed else a for i, a in enumerate(args)]
        for _ in range(2)
    )
    found, wanted = run(*mine), OPERATORS[name].reference(*theirs)
    if changed:
        found, wanted = tuple(mine[:changed]), tuple(theirs[:changed])
    pairs = zip(found, wanted) if isinstance(wanted, tuple) else [(found, wanted)]
    errors = [
        (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
        for a, b in pairs
        if b is not None
    ]
    return float(torch.stack(errors).max())
