"""Error-compensated rounding: GPTQ (Frantar et al. 2022, algorithm 1).

Columns are rounded in order, and what each loses is made up by the columns that are still to come, so that
the layer's output on the calibration data moves least. With ``H = X^T X`` and ``H^-1 = U^T U`` (``U`` upper
triangular), rounding column ``j`` with error ``e = (w_j - q_j) / U_jj`` changes each later column ``k`` by
``-e * U_jk``. Updates outside a block of columns are applied once a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from autocomp.quantize.clipping import clipped_grid
from autocomp.quantize.grid import Grid, range_grid
from autocomp.quantize.scheme import Scheme

BLOCK = 128
DAMPING = (0.01, 0.1, 1.0)


@dataclass(frozen=True, eq=False)
class Compensated:
    """What :func:`round_compensated` gives.

    Attributes:
        codes: uint8 ``[N, K]``.
        scale: 16-bit ``[N, G]``.
        zero: uint8 ``[N, G]``, ``None`` when symmetric.
        weight: float32 ``[N, K]``, each weight as it was when its turn came (the value of an outlier).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    weight: Tensor


def round_compensated(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    outliers: Tensor | None = None,
    clip: bool = False,
) -> Compensated:
    """Round ``weight`` so that its product with the calibration inputs changes least.

    Args:
        weight: float ``[N, K]``; not modified.
        hessian: float ``[K, K]``, ``X^T X`` of the inputs (any positive multiple gives the same result).
        scheme: bits, group, symmetry. Each group's scale comes from its weights as compensated so far.
        dtype: of the scales and of outliers.
        outliers: bool ``[N, K]``, weights that stay in ``dtype``: they neither widen a range nor get a code,
            and their rounding to 16 bits is compensated like any other.
        clip: choose each range for the least loss instead of the full one. Compensation widens the weights
            to come; at 2 and 3 bits the full range then spends its few codes on the tails.

    Raises:
        ValueError: a Hessian of the wrong shape, with NaN, or not positive semidefinite.
    """
    rows, columns = weight.shape
    upper = inverse_factor(hessian.to(weight.device), columns)
    pivots: list[float] = upper.diagonal().tolist()
    loss = upper.diagonal() ** -2 if clip else None  # of column j: (w - q)**2 / U_jj**2 (equation 2)
    turned = (
        weight.to(torch.float32, copy=True).t().contiguous()
    )  # [K, N]: a column of the weight is contiguous
    kept = None if outliers is None else outliers.t().contiguous()
    codes = torch.empty((columns, rows), dtype=torch.uint8, device=weight.device)
    group = scheme.group or columns
    grids: list[Grid] = []
    for block in _blocks(columns, group):
        errors = torch.empty_like(turned[block])
        for j in range(block.start, block.stop):
            if j % group == 0:
                part = slice(j, min(j + group, columns))
                weights = turned[part] if kept is None else turned[part].masked_fill(kept[part], 0)
                grids.append(_group_grid(weights, scheme, dtype, None if loss is None else loss[part]))
            code, value = _round_column(turned[j], grids[-1], None if kept is None else kept[j], dtype)
            error = (turned[j] - value).div_(pivots[j])
            turned[j + 1 : block.stop].addr_(upper[j, j + 1 : block.stop], error, alpha=-1)
            errors[j - block.start], codes[j] = error, code
        turned[block.stop :].addmm_(upper[block, block.stop :].t(), errors, alpha=-1)
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    return Compensated(
        codes=codes.t().contiguous(),
        scale=torch.stack([grid.scale for grid in grids], dim=1).to(dtype),
        zero=torch.stack(zeros, dim=1).to(torch.uint8) if zeros else None,
        weight=turned.t(),
    )


def inverse_factor(hessian: Tensor, columns: int) -> Tensor:
    """``U``, float32 upper triangular ``[K, K]``, with ``U^T U`` the inverse of the damped Hessian.

    One Cholesky factor suffices: if ``H = R R^T`` with ``R`` upper triangular (the usual factor of ``H`` with
    both axes reversed), then ``U = R^-1``. Computed in float64. 1 % of the mean diagonal is added to the
    diagonal, more when that is not enough. An input that is always 0 gets the mean diagonal: its column
    is then rounded by itself, instead of being cleared as in the paper's program (other data may use it).

    Raises:
        ValueError: wrong shape, NaN or infinite values, or no factor even with the largest damping.
    """
    if tuple(hessian.shape) != (columns, columns):
        wanted = [columns, columns]
        raise ValueError(f"the Hessian must be X^T X of shape {wanted}; got {list(hessian.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian has NaN or infinite values: check the calibration inputs for overflow")
    matrix = hessian.to(torch.float64, copy=True)
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    level = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    diagonal[dead] = level
    added = 0.0
    for damping in DAMPING:
        diagonal += (damping - added) * level
        added = damping
        factor, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if level > 0 and int(info) == 0:
            return _invert_upper(factor.flip(0, 1)).to(torch.float32)
    raise ValueError(
        f"the Hessian is not positive semidefinite, even with {DAMPING[-1]:.0%} of its mean diagonal "
        f"({level:.4g}) added: build it as X^T X in float32 or float64"
    )


def _blocks(columns: int, group: int) -> Iterator[slice]:
    """Slices of about ``BLOCK`` columns. A group never starts before all updates to its columns are applied:
    it lies inside one block, or begins with one."""
    span = group * max(1, BLOCK // group)
    for start in range(0, columns, span):
        end = min(start + span, columns)
        for first in range(start, end, BLOCK):
            yield slice(first, min(first + BLOCK, end))


def _invert_upper(matrix: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix, by halves: the zeros below are skipped, unlike in a solve."""
    size = matrix.shape[0]
    if size <= BLOCK:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve_triangular(matrix, identity, upper=True)
    half = size // 2
    inverse = torch.zeros_like(matrix)
    inverse[:half, :half] = _invert_upper(matrix[:half, :half])
    inverse[half:, half:] = _invert_upper(matrix[half:, half:])
    inverse[:half, half:] = -(inverse[:half, :half] @ matrix[:half, half:] @ inverse[half:, half:])
    return inverse


def _group_grid(weights: Tensor, scheme: Scheme, dtype: torch.dtype, loss: Tensor | None) -> Grid:
    """The grid of ``N`` groups ``[width, N]``, scales cast to float32 (exactly) for the loop over columns."""
    if loss is None:
        grid = range_grid(weights, scheme.bits, scheme.symmetric, dtype, dim=0)
    else:
        grouped = weights.t().contiguous().unsqueeze(1)
        found = clipped_grid(grouped, scheme.bits, scheme.symmetric, dtype, loss / loss.mean())
        grid = Grid(found.scale[:, 0], None if found.zero is None else found.zero[:, 0], found.bits)
    return Grid(grid.scale.to(torch.float32), grid.zero, grid.bits)


def _round_column(
    column: Tensor, grid: Grid, kept: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes and the values they stand for, float32 ``[N]``."""
    code = grid.encode(column)
    value = grid.decode(code)
    if kept is not None:
        code = torch.where(kept, grid.origin, code)
        value = torch.where(kept, column.to(dtype).to(torch.float32), value)
    return code, value
