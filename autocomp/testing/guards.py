"""Buffers between guard zones, for tests of kernels: reading or writing beside one does not fail by itself.

Zones hold NaN (or the lowest integer), so that what was read from them spoils the result, and are compared
afterwards, so that what was written into them shows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

ELEMENTS = 256
"""Size of a zone on either side."""


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy between two zones."""
    return _inside(_allocate(tensor.numel(), tensor.dtype, tensor.device), tensor.shape).copy_(tensor)


def untouched(*tensors: torch.Tensor) -> bool:
    """Whether the zones around guarded tensors hold what they did."""
    return all(_zones_hold(t.as_strided((_elements(t),), (1,), 0)) for t in tensors)


@contextlib.contextmanager
def guarded_allocations() -> Iterator[None]:
    """Inside, ``torch.empty``, ``torch.zeros`` and ``Tensor.new_empty`` give guarded tensors, and what is not
    written into the empty ones stays NaN.

    Raises:
        AssertionError: at the end, when something was written beside one of them.
    """
    made: list[tuple[str, torch.Tensor]] = []

    def allocate(size: tuple[Any, ...], dtype: torch.dtype | None, device: Any) -> torch.Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        whole = _allocate(shape.numel(), dtype or torch.get_default_dtype(), torch.device(device or "cpu"))
        made.append((f"{list(shape)} {dtype}", whole))
        return _inside(whole, shape)

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        return allocate(size, dtype, device)

    def zeros(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        return allocate(size, dtype, device).zero_()

    def new_empty(self: torch.Tensor, *size: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
        return allocate(size, dtype or self.dtype, device or self.device)

    method = mock.patch.object(torch.Tensor, "new_empty", new_empty)
    with mock.patch.multiple(torch, empty=empty, zeros=zeros), method:
        yield
    wrong = [told for told, whole in made if not _zones_hold(whole)]
    assert not wrong, f"written beside buffers: {', '.join(wrong)}"


def _poison(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point:
        return math.nan
    return True if dtype is torch.bool else torch.iinfo(dtype).min or 255


def _allocate(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((count + 2 * ELEMENTS,), _poison(dtype), dtype=dtype, device=device)


def _inside(whole: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return whole[ELEMENTS : len(whole) - ELEMENTS].view(shape)


def _elements(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _zones_hold(whole: torch.Tensor) -> bool:
    zones = torch.cat([whole[:ELEMENTS], whole[-ELEMENTS:]])
    if zones.dtype.is_floating_point:
        return bool(zones.float().isnan().all())
    return bool((zones == _poison(whole.dtype)).all())
