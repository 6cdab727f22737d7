"""A small case per attention operator, run once before an implementation is trusted in a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autocomp.kernels import attention_reference as reference

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1.2e-2}
"""Largest accepted relative error (Frobenius norm) by dtype; wrong indexing or instructions give 0.1."""


def arguments(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """A small call of ``name`` in ``dtype``: 70 tokens (no multiple of any tile), 4 heads on 2 key heads."""
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
        case "decode_attention_spans":
            return q[:, :, :1], k[:, 0], v[:, 0], *spans, 90, 0.15
        case "spans_append":
            return k[:, 0].clone(), v[:, 0].clone(), random(1, 2, 40), random(1, 2, 40), *spans, 90
        case "attention_window_residual":
            return q, k, v, integers(3, 20, 5, 9), 4, random(1, 4, 70, 40), integers(0, 1, 2, 3)
        case "attention_block_sparse":
            row_ptr = torch.arange(13, dtype=torch.int32, device=device).unfold(0, 4, 3)
            return q, k, v, row_ptr, integers(*[0, 2, 1] * 4), 32, None
    raise ValueError(f"no attention operator is called {name!r}")


def check(name: str, run: Callable[..., Any], device: str = "cpu") -> str:
    """Why the numbers of ``run`` are not to be trusted; empty when they agree with the reference's."""
    for dtype, limit in LIMITS.items():
        worst = _error(name, run, arguments(name, device, dtype))
        if not worst <= limit:
            return f"{name}: self-check in {dtype} is off by {worst:.2g} (relative; limit {limit:g})"
    return ""


def _error(name: str, run: Callable[..., Any], args: tuple[Any, ...]) -> float:
    """Largest relative error of a result; NaN when one is NaN."""
    other = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    found, wanted = run(*args), getattr(reference, name)(*other)
    if name == "spans_append":  # what it has written
        found, wanted = args[:2], other[:2]
    pairs = zip(found, wanted) if isinstance(wanted, tuple) else [(found, wanted)]
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) for a, b in pairs)
