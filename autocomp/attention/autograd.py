"""Gradients of attention spans: the forward pass is the operator ``attention_spans``, and the backward pass
recomputes the probabilities, one head and some rows at a time.

That keeps memory linear in the tokens (FlashAttention's recomputation, arXiv 2205.14135, section 3.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autocomp.kernels.attention import OPERATORS

ROWS = 256
"""Queries whose probabilities are recomputed at once."""


def spans_attention(q: Tensor, k: Tensor, v: Tensor, window: Tensor, sink: Tensor, scale: float) -> Tensor:
    """The operator ``attention_spans`` with gradients for q, k and v (first order only).

    Args:
        q: ``[B, H, S, D]``; k, v: ``[B, Hkv, S, D]``; any float dtype. Gradients are computed in float32
            (float64 for float64) and rounded once.
        window, sink: int32 ``[H]``, in tokens.
        scale: of the scores.

    Returns:
        ``[B, H, S, D]`` in the dtype of ``q``.

    Raises:
        ValueError, TypeError: as the operator does.
    """
    out: Tensor = _Spans.apply(q, k, v, window, sink, scale)
    return out


class _Spans(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: Tensor, sink: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, window, sink)
        ctx.scale = scale
        out: Tensor = OPERATORS["attention_spans"](q, k, v, window, sink, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, window, sink = ctx.saved_tensors
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        found = tuple(torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        shared = q.shape[1] // k.shape[1]
        for b in range(q.shape[0]):
            for h, limits in enumerate(zip(window.tolist(), sink.tolist())):
                kv = h // shared
                head = (q[b, h].to(wide), k[b, kv].to(wide), v[b, kv].to(wide), grad[b, h].to(wide))
                sums = (found[0][b, h], found[1][b, kv], found[2][b, kv])
                for first in range(0, q.shape[2], ROWS):
                    _add_rows(head, sums, slice(first, min(first + ROWS, q.shape[2])), limits, ctx.scale)
        return (*(total.to(x.dtype) for total, x in zip(found, (q, k, v))), None, None, None)


def _add_rows(
    head: tuple[Tensor, ...],
    sums: tuple[Tensor, Tensor, Tensor],
    rows: slice,
    limits: tuple[int, int],
    scale: float,
) -> None:
    """Add what the queries ``rows`` of one head give to the gradients of q, k and v, ``[S, D]`` each."""
    q, k, v, grad = head
    for_q, for_k, for_v = sums
    i, j = torch.arange(rows.start, rows.stop, device=q.device).unsqueeze(1), _keys(rows, limits, q.device)
    seen = (j <= i) & ((i - j < limits[0]) | (j < limits[1]))
    near, queries, grads = k[j], q[rows], grad[rows]
    scores = (queries @ near.T).mul_(scale).masked_fill_(~seen, -torch.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num_(nan=0.0)  # a query that sees nothing: a row of NaN
    for_v.index_add_(0, j, weights.T @ grads)
    slope = grads @ v[j].T
    slope = weights * (slope - (weights * slope).sum(-1, keepdim=True)) * scale
    for_q[rows] = slope @ near
    for_k.index_add_(0, j, slope.T @ queries)


def _keys(rows: slice, limits: tuple[int, int], device: torch.device) -> Tensor:
    """int64 positions of the keys that any of the queries ``rows`` may see."""
    first = max(0, rows.start - limits[0] + 1) if limits[0] else rows.stop
    sink = torch.arange(min(limits[1], first, rows.stop), device=device)
    return torch.cat([sink, torch.arange(first, rows.stop, device=device)])
