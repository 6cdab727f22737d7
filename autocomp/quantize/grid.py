"""Quantization grids: which groups a row has, the scale and zero point of a range, weights to codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Groups of equal width inside a row: a slice of columns and the slice of groups that covers it."""

    columns: slice
    groups: slice
    width: int


def spans(columns: int, group: int) -> tuple[Span, ...]:
    """The full groups of a row, then the short last one where ``group`` does not divide ``columns``.

    ``group`` 0 is the whole row. ``row[span.columns].unflatten(-1, (-1, span.width))`` is a view by group.
    """
    group = group or columns
    full = columns // group
    body, tail = full * group, columns - full * group
    found = []
    if full:
        found.append(Span(slice(0, body), slice(0, full), group))
    if tail:
        found.append(Span(slice(body, columns), slice(full, full + 1), tail))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that groups can take: ``(code - zero) * scale`` for codes in ``[0, 2**bits)``.

    Attributes:
        scale: bfloat16 or float16, positive, any shape.
        zero: float32 whole numbers of the same shape; ``None`` when symmetric (``2**(bits-1)``).
        bits: width of a code.
    """

    scale: Tensor
    zero: Tensor | None
    bits: int

    @property
    def origin(self) -> Tensor | float:
        """The code that means 0."""
        return float(1 << (self.bits - 1)) if self.zero is None else self.zero

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes, as float32, of float32 weights that broadcast with ``scale``."""
        steps = torch.round(weight / self.scale.to(torch.float32))
        return steps.add_(self.origin).clamp_(0, (1 << self.bits) - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 values of float32 codes that broadcast with ``scale``."""
        return (codes - self.origin) * self.scale.to(torch.float32)

    def unsqueeze(self) -> Grid:
        """The same with a last dimension of 1, to broadcast over the weights of a group."""
        zero = None if self.zero is None else self.zero.unsqueeze(-1)
        return Grid(self.scale.unsqueeze(-1), zero, self.bits)


def grid_of_range(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    """The grid that covers ``[low, high]`` (elementwise, float32, ``low <= 0 <= high``).

    Symmetric: ``scale = max(-low, high) / (2**(bits-1) - 0.5)``, so that both ends are half a step from the
    outermost codes and no code is lost. Asymmetric: ``scale = (high - low) / (2**bits - 1)`` and the zero
    point is the nearest whole number to ``-low / scale`` (Jacob et al. 2018, equation 1).

    An empty range gets scale 1: its weights are 0, and nobody who divides by a scale gets NaN.

    Raises:
        ValueError: a scale that ``dtype`` can't hold.
    """
    if symmetric:
        return Grid(_to_16_bits(torch.maximum(-low, high) / ((1 << (bits - 1)) - 0.5), dtype), None, bits)
    levels = (1 << bits) - 1
    scale = _to_16_bits(high / levels - low / levels, dtype)
    zero = torch.round(-low / scale.to(torch.float32)).clamp_(0, levels)
    return Grid(scale, zero, bits)


def range_grid(weight: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, dim: int = -1) -> Grid:
    """The grid of the smallest and largest weight along ``dim`` (zero is always inside)."""
    low, high = torch.aminmax(weight, dim=dim)
    return grid_of_range(low.clamp_(max=0), high.clamp_(min=0), bits, symmetric, dtype)


def _to_16_bits(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to ``dtype``: empty groups to 1, underflow upwards, overflow to an error."""
    rounded = scale.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        worst, limit = float(scale.max()), torch.finfo(dtype).max
        raise ValueError(
            f"a scale of {worst:.4g} is above the largest {dtype} ({limit:.4g}): "
            "use scale_dtype=torch.bfloat16, or rescale the weight"
        )
    # Among subnormals the nearest value can be far below, even 0, and would cut the range: take the next one.
    short = rounded.to(torch.float32) < scale * (1 - 2.0**-7)
    rounded = torch.where(short, (rounded.view(torch.int16) + 1).view(dtype), rounded)
    return torch.where(scale == 0, torch.ones_like(rounded), rounded)
