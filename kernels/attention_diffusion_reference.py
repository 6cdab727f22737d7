"""What the operators for diffusion transformers compute, in plain torch; see ``attention_reference``."""

from __future__ import annotations

import torch

from autocomp.kernels.attention_checks import (
    check_block_sparse,
    check_modes,
    check_pattern,
    check_prefill,
    check_window_residual,
)
from autocomp.kernels.attention_reference import attend

Tensor = torch.Tensor


def window_mask(half_window: Tensor, prefix: int, tokens: int) -> Tensor:
    """bool ``[H, S, S]``: ``|i - j| <= half_window[h]``, and all of the first ``prefix`` rows and columns."""
    i = torch.arange(tokens, device=half_window.device).view(-1, 1)
    j = torch.arange(tokens, device=half_window.device)
    near = (i - j).abs() <= half_window.view(-1, 1, 1)
    return near | (i < prefix) | (j < prefix)


FULL, FULL_SAVE, WINDOW_ADD, REUSE = 0, 1, 2, 3
"""What a head does in ``attention_window_residual``."""


def attention_window_residual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    half_window: Tensor,
    prefix: int,
    residual: Tensor | None,
    mode: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Bidirectional attention with the shortcuts of DiTFastAttn, chosen for each head.

    With F the full attention, W the one in the window of ``half_window[h]`` tokens to each side, in which the
    first ``prefix`` tokens (the text of a joint sequence) see all and are seen by all ("arrow"), and R the
    head's ``residual``:

    - 0 full: ``out = F``, R stays.
    - 1 full and save: ``out = F``, ``R = F - W``, both rounded once from the wide dtype.
    - 2 window and add: ``out = W + R``, R stays (WA-RS of arXiv 2406.08552, section 3.2; per head in
      arXiv 2503.22796).
    - 3 reuse: ``out = R``, R stays. The caller has put the head's earlier output there (AST, section 3.3);
      such a head costs no attention.

    Args:
        q: ``[B, H, S, D]``; k, v: ``[B, Hkv, S, D]``.
        half_window: int32 ``[H]``, not negative; 0 sees itself (and the prefix).
        prefix: number of text tokens at the front, 0 for none.
        residual: ``[B, H, S, D]``; ``None`` counts as zeros.
        mode: int32 ``[H]``, 0 to 3.
        scale: of the scores; ``D ** -0.5`` by default.

    Returns:
        ``out`` and the residual for the next step, both ``[B, H, S, D]`` in the dtype of ``q`` and new.
    """
    check_prefill(q, k, v)
    check_window_residual(q, half_window, prefix, residual, mode)
    check_modes(half_window, mode)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    held = torch.zeros_like(q) if residual is None else residual
    dense = attend(q, k, v, torch.ones(1, dtype=torch.bool, device=q.device), scale)
    near = attend(q, k, v, window_mask(half_window, prefix, q.shape[2]), scale)
    head = mode.view(-1, 1, 1)
    out = torch.where(head == WINDOW_ADD, near + held, torch.where(head == REUSE, held, dense))
    saved = torch.where(head == FULL_SAVE, dense - near, held)
    return out.to(q.dtype).contiguous(), saved.to(q.dtype).contiguous()


def attention_block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    block: int,
    order: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Bidirectional attention on a static pattern of blocks per head, after a reordering of the tokens.

    Position ``p`` of head ``h`` holds token ``order[h, p]``; positions are cut into ``nb = ceil(S / block)``
    blocks, the last may be short. Queries of block ``r`` see the keys of blocks
    ``col[row_ptr[h, r] : row_ptr[h, r + 1]]`` (PAROAttention, arXiv 2506.16054, section 3: a permutation per
    head that gathers what a head attends to in few blocks).

    Args:
        q: ``[B, H, S, D]``; k, v: ``[B, Hkv, S, D]``, in the order of the tokens.
        row_ptr: int32 ``[H, nb + 1]``, ascending, offsets into ``col``.
        col: int32 ``[nnz]``, block numbers, distinct within a row.
        block: tokens of a block.
        order: int32 ``[H, S]``, a permutation for each head, or ``None``.
        scale: of the scores; ``D ** -0.5`` by default.

    Returns:
        ``[B, H, S, D]`` in the dtype and token order of ``q``; zeros in rows without blocks.
    """
    check_prefill(q, k, v)
    check_block_sparse(q, row_ptr, col, block, order)
    check_pattern(row_ptr, col, order)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = block_mask(row_ptr, col, block, q.shape[2])
    if order is not None:  # the mask in the order of the tokens
        place = order.long().argsort(dim=-1)
        mask = mask.gather(1, place.unsqueeze(-1).expand_as(mask))
        mask = mask.gather(2, place.unsqueeze(1).expand_as(mask))
    return attend(q, k, v, mask, scale).to(q.dtype)


def block_mask(row_ptr: Tensor, col: Tensor, block: int, tokens: int) -> Tensor:
    """bool ``[H, S, S]`` over positions, from blocks."""
    heads, blocks = row_ptr.shape[0], row_ptr.shape[1] - 1
    mask = torch.zeros(heads, blocks, blocks, dtype=torch.bool, device=row_ptr.device)
    for h, row in enumerate(row_ptr.tolist()):
        for r in range(blocks):
            mask[h, r, col[row[r] : row[r + 1]].long()] = True
    return mask.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :tokens, :tokens]
