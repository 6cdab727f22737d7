"""Weights to integers: round to nearest, with clipping, or with error compensation; outliers kept apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from autocomp.quantize.clipping import clipped_grid
from autocomp.quantize.gptq import round_compensated
from autocomp.quantize.grid import Grid, Span, range_grid, spans
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import SCALE_DTYPES, QuantizedTensor

Method = Literal["rtn", "mse", "gptq", "gptq-mse"]
GridFinder = Callable[[Tensor, Span], Grid]

# Weights worked on at a time: bounds the memory of float32 copies, and stays in the cache of one core.
CHUNK = 1 << 18


@torch.no_grad()
def quantize(
    weight: Tensor,
    scheme: Scheme,
    *,
    method: str = "rtn",
    hessian: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QuantizedTensor:
    """Quantize a weight matrix.

    Args:
        weight: float ``[N, K]`` (output, input features), finite; not modified.
        scheme: bits, group, symmetry, outliers; not ``w16``.
        method: ``rtn`` rounds to nearest on the full range of each group; ``mse`` first clips each range to
            the least squared error (:mod:`~autocomp.quantize.clipping`); ``gptq`` compensates errors
            (:mod:`~autocomp.quantize.gptq`) on the full range of each group as compensated so far, and
            ``gptq-mse`` also clips, which matters at 2 and 3 bits.
        hessian: ``X^T X`` of the layer's inputs, ``[K, K]``. Needed by ``gptq`` and ``gptq-mse``. For ``mse``
            optional, or just its diagonal ``[K]``: the weight of each input feature. ``rtn`` ignores it.
        scale_dtype: bfloat16 or float16; codes are computed with scales already rounded to it.

    Returns:
        The quantized weight, on the device of ``weight``. The ``scheme.outliers`` percent of weights with the
        largest magnitude stay in ``scale_dtype`` and are left out of the ranges (LLM-MQ, section 3.3).

    Raises:
        ValueError: a weight with NaN or infinite values or not a float matrix, an unknown method, a missing
            or unusable Hessian, or values beyond what ``scale_dtype`` holds; the message names it.
    """
    _check_weight(weight, scheme, scale_dtype)
    _check_method(method, hessian, weight.shape[1])
    rows, columns = weight.shape
    mask = outlier_mask(weight, scheme)
    source = weight
    if method.startswith("gptq") and hessian is not None:
        done = round_compensated(weight, hessian, scheme, scale_dtype, mask, clip=method == "gptq-mse")
        codes, scale, zero, source = done.codes, done.scale, done.zero, done.weight
    else:
        find = _grid_finder(scheme, method, hessian, scale_dtype)
        kept = weight if mask is None else weight.masked_fill(mask, 0)
        codes, scale, zero = _round_rows(kept, scheme, find, scale_dtype)
    if mask is None:
        return QuantizedTensor(scheme, (rows, columns), codes, scale, zero)
    index = mask.flatten().nonzero().squeeze(1).to(torch.int32)
    return QuantizedTensor(
        scheme, (rows, columns), codes, scale, zero, index, _outlier_values(source[mask], scale_dtype)
    )


def outlier_mask(weight: Tensor, scheme: Scheme) -> Tensor | None:
    """Bool ``[N, K]``, true at the ``scheme.outliers`` percent largest magnitudes; ``None`` without any."""
    count = scheme.outlier_count(*weight.shape)
    if not count:
        return None
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.abs().flatten().topk(count, sorted=False).indices] = True
    return mask.view(weight.shape)


def _check_weight(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> None:
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"weight must be a float matrix [N, K]; got {weight.dtype} {list(weight.shape)}")
    if scheme.is_dense:
        raise ValueError("w16 means 'not quantized': keep the weight as it is")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be torch.bfloat16 or torch.float16; got {scale_dtype}")
    if weight.numel() > torch.iinfo(torch.int32).max and scheme.outliers:
        raise ValueError(
            f"outliers have 32-bit positions; a weight of shape {list(weight.shape)} is too large"
        )
    low, high = torch.aminmax(weight)  # NaN passes through
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = (~torch.isfinite(weight)).nonzero()
        first = bad[0].tolist()
        raise ValueError(
            f"weight has {len(bad)} NaN or infinite values, the first at {first}: check the model"
        )


def _check_method(method: str, hessian: Tensor | None, columns: int) -> None:
    if method not in get_args(Method):
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(get_args(Method))}")
    if method.startswith("gptq") and hessian is None:
        raise ValueError(
            f"method {method!r} needs hessian = X^T X of the layer's inputs; without it use 'mse'"
        )
    if method == "mse" and hessian is not None and hessian.shape not in ((columns,), (columns, columns)):
        wanted = f"[{columns}, {columns}] or [{columns}]"
        raise ValueError(f"the Hessian must have shape {wanted}; got {list(hessian.shape)}")


def _grid_finder(scheme: Scheme, method: str, hessian: Tensor | None, dtype: torch.dtype) -> GridFinder:
    """How a chunk of groups ``[n, g, width]`` gets its grid ``[n, g]``."""
    bits, symmetric = scheme.bits, scheme.symmetric
    if method == "rtn":
        return lambda grouped, span: range_grid(grouped, bits, symmetric, dtype)
    importance = None if hessian is None else _importance(hessian)

    def find(grouped: Tensor, span: Span) -> Grid:
        if importance is None:
            return clipped_grid(grouped, bits, symmetric, dtype)
        weights = importance[span.columns].unflatten(0, (-1, span.width)).to(grouped.device)
        return clipped_grid(grouped, bits, symmetric, dtype, weights)

    return find


def _importance(hessian: Tensor) -> Tensor:
    """Weights of the input features, float32 ``[K]``, of mean 1: the diagonal of the Hessian."""
    diagonal = (hessian.diagonal() if hessian.ndim == 2 else hessian).to(torch.float64)
    if not bool((torch.isfinite(diagonal) & (diagonal >= 0)).all()):
        raise ValueError("the Hessian's diagonal has NaN, infinite or negative values: build it as X^T X")
    return (diagonal / diagonal.mean().clamp(min=torch.finfo(torch.float64).tiny)).to(torch.float32)


def _round_rows(
    weight: Tensor, scheme: Scheme, find: GridFinder, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes uint8 ``[N, K]``, scales ``[N, G]``, zero points uint8 ``[N, G]``; a chunk of rows at a time."""
    rows, columns = weight.shape
    groups, device = scheme.groups(columns), weight.device
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=device)
    scale = torch.empty((rows, groups), dtype=dtype, device=device)
    zero = None if scheme.symmetric else torch.empty((rows, groups), dtype=torch.uint8, device=device)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        for span in spans(columns, scheme.group):
            grouped = weight[part, span.columns].to(torch.float32).unflatten(1, (-1, span.width))
            grid = find(grouped, span)
            codes[part, span.columns] = grid.unsqueeze().encode(grouped).flatten(1).to(torch.uint8)
            scale[part, span.groups] = grid.scale
            if zero is not None and grid.zero is not None:
                zero[part, span.groups] = grid.zero.to(torch.uint8)
    return codes, scale, zero


def _outlier_values(values: Tensor, dtype: torch.dtype) -> Tensor:
    stored = values.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        largest = float(values.abs().max())
        raise ValueError(f"an outlier of {largest:.4g} is above the largest {dtype}: use torch.bfloat16")
    return stored
