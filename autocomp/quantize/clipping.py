"""Clipping: the range of each group that minimizes the (weighted) squared rounding error.

Shrinking a range clips its largest weights and rounds all others more finely. The best trade has no closed
form, so a geometric ladder of shrink factors is tried on all groups at once: the criterion of OMSE (Choukroun
et al. 2019), optionally with the mean squared activation of each input feature as weight, which makes it the
activation-aware clipping of AWQ (Lin et al. 2023, section 3.2) under uncorrelated inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocomp.quantize.grid import Grid, grid_of_range

# 1, 0.93, ... 0.16: rows of 2-bit codes with heavy tails are best cut to a fifth of their range.
SHRINK_FACTORS = tuple(0.93**step for step in range(26))


def clipped_grid(
    grouped: Tensor,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    importance: Tensor | None = None,
    factors: tuple[float, ...] = SHRINK_FACTORS,
) -> Grid:
    """The grid of each group with the smallest squared error among ``factors`` of its range.

    Args:
        grouped: float32 ``[N, G, width]``.
        bits, symmetric, dtype: of the grid (:func:`~autocomp.quantize.grid.grid_of_range`).
        importance: float32 ``[G, width]``, weight of each column's squared error; ``None`` weighs all alike.
        factors: shrink factors; the first one wins ties and must be 1 for "never worse than the full range".

    Returns:
        Grid with scale ``[N, G]``.
    """
    low, high = torch.aminmax(grouped, dim=-1)
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    best = grid_of_range(low * factors[0], high * factors[0], bits, symmetric, dtype)
    least = _squared_error(grouped, best, importance)
    for factor in factors[1:]:
        trial = grid_of_range(low * factor, high * factor, bits, symmetric, dtype)
        error = _squared_error(grouped, trial, importance)
        better = error < least
        least = torch.where(better, error, least)
        zero = None
        if trial.zero is not None and best.zero is not None:
            zero = torch.where(better, trial.zero, best.zero)
        best = Grid(torch.where(better, trial.scale, best.scale), zero, bits)
    return best


def _squared_error(grouped: Tensor, grid: Grid, importance: Tensor | None) -> Tensor:
    """Float32 ``[N, G]``."""
    broadcast = grid.unsqueeze()
    error = broadcast.decode(broadcast.encode(grouped)).sub_(grouped).square_()
    return (error if importance is None else error.mul_(importance)).sum(-1)
