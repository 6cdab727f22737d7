"""Inputs of the attention operators' checks: tensors between guard zones, shapes, a case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor

GUARD = 64


@dataclass(frozen=True)
class Case:
    """Arguments of one call and what to call it in a message."""

    label: str
    args: tuple[Any, ...]


def guarded(x: Tensor) -> Tensor:
    """A copy of ``x`` between two guard zones."""
    filling = torch.nan if x.is_floating_point() else 255 if x.dtype == torch.uint8 else 0
    whole = torch.full((x.numel() + 2 * GUARD,), filling, dtype=x.dtype, device=x.device)
    inner = whole[GUARD : GUARD + x.numel()].view(x.shape)
    return inner.copy_(x)


def guards_hold(x: Tensor) -> bool:
    """Whether the zones around a tensor from ``guarded`` are as they were."""
    size = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.as_strided(x, (size,), (1,), 0)
    zones = torch.cat([whole[:GUARD], whole[size - GUARD :]])
    if x.is_floating_point():
        return bool(zones.isnan().all())
    return bool((zones == (255 if x.dtype == torch.uint8 else 0)).all())


def random_heads(generator: torch.Generator, dtype: torch.dtype, *shape: int, shift: float = 0.0) -> Tensor:
    """Random ``[B, H, S, D]`` that lies as ``[B, S, H, D]`` in memory, as a model's projections leave it."""
    batch, heads, tokens, dim = shape
    x = torch.randn(batch, tokens, heads, dim, generator=generator) + shift
    return guarded(x.to(dtype)).transpose(1, 2)


def spread(heads: int, *values: int) -> Tensor:
    """int32 ``[heads]`` that goes through ``values``."""
    return guarded(torch.tensor([values[h % len(values)] for h in range(heads)], dtype=torch.int32))


DECODE_SHAPES = (
    (4, 4, 64, 70),
    (8, 2, 128, 300),
    (6, 2, 40, 33),
    (7, 1, 6, 129),
    (8, 8, 16, 1),
    (16, 2, 80, 65),
)
"""H, Hkv, D, S."""
PREFILL_SHAPES = (
    (4, 4, 64, 130),
    (4, 2, 16, 64),
    (4, 1, 40, 65),
    (8, 4, 33, 17),
    (4, 4, 128, 200),
    (4, 4, 8, 1),
)


def moved_to(x: Any, device: str) -> Any:
    """``x`` on ``device`` with its strides and its guards."""
    if not isinstance(x, Tensor) or x.device.type == device:
        return x
    size = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.as_strided(x, (size,), (1,), 0).to(device)
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())
