"""What the attention operators compute, in plain torch: the oracle of every kernel, and the way without one.

All sums are in float32 (float64 when an input is). A query that may attend to nothing gives zeros.
Grouped queries: query head ``h`` of ``H`` reads key head ``h * Hkv // H``; ``H`` is a multiple of ``Hkv``.
"""

from __future__ import annotations

import torch

from autocomp.kernels.attention_checks import (
    check_append,
    check_block_sparse,
    check_decode_kv,
    check_groups,
    check_kv_quantize,
    check_lengths,
    check_modes,
    check_pattern,
    check_prefill,
    check_rings,
    check_span_values,
    check_spans,
    check_window_residual,
    ring_starts,
)

Tensor = torch.Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """``softmax(scale * q k^T, where mask) v`` with grouped queries.

    Args:
        q: ``[B, H, Q, D]``.
        k, v: ``[B, Hkv, S, D]``.
        mask: bool, broadcastable to ``[B, H, Q, S]``: true where the query may see the key.
        softcap: when positive, scores become ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118).

    Returns:
        ``[B, H, Q, D]`` in the wide dtype; zeros for queries that see nothing.
    """
    groups = q.shape[1] // k.shape[1]
    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    k, v = (t.to(wide).repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0)  # a row of -inf gives NaN: zero it
    # What nobody sees may be anything, also NaN (a slot that was never written).
    seen = mask.expand_as(scores).any(dim=-2)
    return weights @ v.masked_fill(~seen.unsqueeze(-1), 0.0)


# --- quantized cache -------------------------------------------------------------------------------------


def kv_quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric codes of keys or values, scale and minimum per token and head: ``x ~ scale * code + min``.

    ``scale = (max - min) / (2^bits - 1)``, ``code = round((x - min) / scale)`` in float32, halves to even; a
    constant row has scale 0 and code 0. Per-token quantization as for the values in KIVI (arXiv 2402.02750).

    Args:
        x: ``[B, Hkv, S, D]``, any float dtype, finite.
        bits: 8 or 4 (two codes a byte, the even feature in the low nibble; D even).

    Returns:
        codes uint8 ``[B, Hkv, S, D * bits / 8]``, scale and minimum float32 ``[B, Hkv, S]``.
    """
    check_kv_quantize(x, bits)
    x = x.float()
    low, high = x.amin(-1), x.amax(-1)
    scale = (high - low) / (2**bits - 1)
    codes = torch.round((x - low.unsqueeze(-1)) / scale.unsqueeze(-1))
    codes = torch.where(scale.unsqueeze(-1) > 0, codes, 0.0).clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, scale, low


def kv_dequantize(codes: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """The float32 ``[B, Hkv, S, D]`` that ``kv_quantize``'s result stands for."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return codes.float() * scale.float().unsqueeze(-1) + minimum.float().unsqueeze(-1)


def decode_attention_kv(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_min: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_min: Tensor,
    lengths: Tensor,
    key_bits: int,
    value_bits: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Attention of one new token per sequence over a quantized cache.

    Args:
        q: ``[B, H, 1, D]``, rotary embedding applied.
        k_codes, k_scale, k_min, v_codes, v_scale, v_min: from ``kv_quantize``, of capacity S.
        lengths: int32 ``[B]``, tokens in each sequence's cache, this one included; 0 gives zeros. What lies
            behind is never read as a number: it may be garbage.
        key_bits, value_bits: 8 or 4.
        scale: of the scores, usually ``D ** -0.5``.
        softcap: see ``attend``.
        window: when positive, only the last ``window`` tokens are seen.

    Returns:
        ``[B, H, 1, D]`` in the dtype of ``q``.
    """
    check_decode_kv(
        q, k_codes, k_scale, k_min, v_codes, v_scale, v_min, lengths, key_bits, value_bits, window
    )
    check_lengths(lengths, k_codes.shape[2])
    k = kv_dequantize(k_codes, k_scale, k_min, key_bits)
    v = kv_dequantize(v_codes, v_scale, v_min, value_bits)
    position = torch.arange(k.shape[2], device=q.device)
    seen = position < lengths.unsqueeze(-1)
    if window > 0:
        seen &= position >= lengths.unsqueeze(-1) - window
    return attend(q, k, v, seen[:, None, None], scale, softcap).to(q.dtype)


# --- spans: a window and a sink of its own for every head (MoA) -----------------------------------------


def spans_mask(window: Tensor, sink: Tensor, tokens: int) -> Tensor:
    """bool ``[H, S, S]``: query ``i`` of head ``h`` sees key ``j``."""
    i = torch.arange(tokens, device=window.device).view(-1, 1)
    j = torch.arange(tokens, device=window.device)
    near = i - j < window.view(-1, 1, 1)
    return (j <= i) & (near | (j < sink.view(-1, 1, 1)))


def attention_spans(q: Tensor, k: Tensor, v: Tensor, window: Tensor, sink: Tensor, scale: float) -> Tensor:
    """Causal attention in which every head has its own span (MoA, arXiv 2406.14909, section 3).

    Token ``i`` sees ``j <= i`` with ``i - j < window[h]`` or ``j < sink[h]``; a window of S or more is dense
    causal attention, window 0 with sink 0 gives zeros.

    Args:
        q: ``[B, H, S, D]``; k, v: ``[B, Hkv, S, D]``.
        window, sink: int32 ``[H]``, in tokens, not negative.
        scale: of the scores.

    Returns:
        ``[B, H, S, D]`` in the dtype of ``q``.
    """
    check_prefill(q, k, v)
    check_spans(window, sink, q.shape[1])
    check_span_values(window, sink)
    return attend(q, k, v, spans_mask(window, sink, q.shape[2]), scale).to(q.dtype)


def span_slots(window: int, sink: int, length: int) -> int:
    """Slots in use of a head's ring after ``length`` tokens: the first ``sink`` and the last ``window``."""
    return min(length, sink) + min(max(length - sink, 0), window)


def span_slot(window: int, sink: int, position: int) -> int | None:
    """Slot of token ``position`` in its head's ring; ``None`` when a head without window drops it."""
    if position < sink:
        return position
    return sink + (position - sink) % window if window else None


def decode_attention_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_start: Tensor,
    window: Tensor,
    sink: Tensor,
    length: int,
    scale: float,
) -> Tensor:
    """Attention of one new token over ragged rings: each key head keeps only what its span needs.

    Head ``h`` owns slots ``head_start[h]`` to ``head_start[h + 1]`` of the cache: ``sink[h] + window[h]`` or
    as many as tokens will ever come. Token ``t`` lies in slot ``t`` while ``t < sink``, else in
    ``sink + (t - sink) % window`` (MoA's StaticCircularCache, here with grouped queries).

    Args:
        q: ``[B, H, 1, D]``.
        k, v: ``[B, L, D]``, L = ``head_start[Hkv]``, written by ``spans_append``.
        head_start: int64 ``[Hkv + 1]``, ascending from 0.
        window, sink: int32 ``[Hkv]``.
        length: tokens so far, this one included (the same for all sequences); 0 gives zeros.
        scale: of the scores.

    Returns:
        ``[B, H, 1, D]`` in the dtype of ``q``.
    """
    check_rings(q.shape[0], q.shape[-1], k, v, head_start, window, sink)
    starts = ring_starts(head_start, window, sink, k.shape[1], length)
    groups = check_groups(q.shape[1], len(starts) - 1)
    out = []
    for h, (first, w, s) in enumerate(zip(starts, window.tolist(), sink.tolist())):
        used = slice(first, first + span_slots(w, s, length))
        mask = torch.ones(1, dtype=torch.bool, device=q.device)
        heads = q[:, h * groups : (h + 1) * groups]
        out.append(attend(heads, k[:, None, used], v[:, None, used], mask, scale))
    return torch.cat(out, dim=1).to(q.dtype)


def spans_append(
    k: Tensor,
    v: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    head_start: Tensor,
    window: Tensor,
    sink: Tensor,
    position: int,
) -> None:
    """Store token number ``position`` (0-based) of all sequences in the rings, over what leaves the window.

    Args:
        k, v: ``[B, L, D]``, changed in place; any strides.
        new_k, new_v: ``[B, Hkv, D]``, any float dtype, rotary embedding applied to the keys.
        head_start, window, sink: as in ``decode_attention_spans``.
    """
    check_rings(k.shape[0], k.shape[2], k, v, head_start, window, sink)
    check_append(k, new_k, new_v, head_start, position)
    starts = ring_starts(head_start, window, sink, k.shape[1], position + 1)
    for h, (first, w, s) in enumerate(zip(starts, window.tolist(), sink.tolist())):
        slot = span_slot(w, s, position)
        if slot is not None:
            k[:, first + slot] = new_k[:, h].to(k.dtype)
            v[:, first + slot] = new_v[:, h].to(v.dtype)


# --- diffusion transformers ------------------------------------------------------------------------------


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
