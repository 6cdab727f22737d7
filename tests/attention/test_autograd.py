"""Gradients of attention spans against autograd through masked attention."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autocomp.attention.autograd import ROWS, spans_attention
from autocomp.kernels.attention_reference import attend, spans_mask

LIMITS = [(300, 0), (16, 4), (1, 300), (0, 7), (0, 0), (299, 1)]
"""(window, sink) of each query head, the one that sees nothing included."""


def inputs(
    tokens: int, heads: int, groups: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    q, k, v, grad = (torch.randn(2, n, tokens, 8, dtype=dtype) for n in (heads, groups, groups, heads))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def limits() -> tuple[torch.Tensor, torch.Tensor]:
    window, sink = torch.tensor(LIMITS, dtype=torch.int32).T.contiguous().unbind(0)
    return window, sink


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("tokens", [1, 5, ROWS, ROWS + 44])
def test_gradients_are_those_of_masked_attention(groups: int, tokens: int) -> None:
    q, k, v, grad = inputs(tokens, len(LIMITS), groups)
    window, sink = limits()
    out = spans_attention(q, k, v, window, sink, 0.3)
    wanted = attend(q, k, v, spans_mask(window, sink, tokens), 0.3)
    torch.testing.assert_close(out, wanted)
    # Autograd gives NaN where a row of scores is all -infinity; without a gradient that head may see all.
    grad[:, 4] = 0.0
    window = torch.where(window + sink == 0, tokens, window)
    found = torch.autograd.grad(out, (q, k, v), grad)
    oracle = attend(q, k, v, spans_mask(window, sink, tokens), 0.3)
    for ours, theirs in zip(found, torch.autograd.grad(oracle, (q, k, v), grad)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_head_that_sees_nothing_gives_no_gradient() -> None:
    q, k, v, grad = inputs(9, 1, 1)
    nothing = torch.zeros(1, dtype=torch.int32)
    for found in torch.autograd.grad(spans_attention(q, k, v, nothing, nothing, 0.3), (q, k, v), grad):
        assert not found.any()


def test_gradcheck() -> None:
    q, k, v, _ = inputs(7, 2, 1)
    window, sink = torch.tensor([7, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *x: spans_attention(*x, window, sink, 0.5), (q, k, v))


def test_bfloat16_rounds_once() -> None:
    q, k, v, grad = inputs(100, 4, 2, torch.float32)
    low = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    wide = [t.detach().float().requires_grad_() for t in low]
    window, sink = torch.full((4,), 30, dtype=torch.int32), torch.full((4,), 2, dtype=torch.int32)
    found = torch.autograd.grad(spans_attention(*low, window, sink, 0.35), low, grad.bfloat16())
    wanted = torch.autograd.grad(spans_attention(*wide, window, sink, 0.35), wide, grad.bfloat16().float())
    for ours, theirs in zip(found, wanted):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs.bfloat16(), rtol=0, atol=0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_backward_keeps_no_square_of_the_tokens() -> None:
    tokens = 4 * ROWS
    q, k, v, grad = inputs(tokens, 2, 1, torch.float32)
    window, sink = torch.tensor([tokens, 64], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    out = spans_attention(q, k, v, window, sink, 0.3)
    with Largest() as largest:
        torch.autograd.grad(out, (q, k, v), grad)
    assert largest.numel <= ROWS * tokens
