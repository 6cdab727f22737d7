"""What the attention operators compute, in plain torch: the oracle of every kernel, and the way without one.
Those of diffusion transformers are in ``attention_diffusion_reference``.

All sums are in float32 (float64 when an input is). A query that may attend to nothing gives zeros.
Grouped queries: query head ``h`` of ``H`` reads key head ``h * Hkv // H``; ``H`` is a multiple of ``Hkv``.
"""

from __future__ import annotations

import torch

from autocomp.kernels.attention_checks import (
    check_append,
    check_cache,
    check_decode_cache,
    check_decode_kv,
    check_kv_quantize,
    check_lengths,
    check_positions,
    check_prefill,
    check_span_values,
    check_spans,
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


def cache_entries(x: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows ``[B, L, D]`` as a cache of ``bits`` stores them: in ``dtype`` at 16 or 32 bits, else as codes
    ``[B, L, D * bits / 8]`` with scale and minimum ``[B, L]`` (see ``kv_quantize``)."""
    if bits >= 16:
        return x.to(dtype), None, None
    codes, scale, minimum = kv_quantize(x.unsqueeze(1), bits)
    return codes.squeeze(1), scale.squeeze(1), minimum.squeeze(1)


def cache_rows(rows: Tensor, scale: Tensor | None, minimum: Tensor | None, bits: int) -> Tensor:
    """The numbers ``[B, L, D]`` that ``cache_entries``' result stands for."""
    if scale is None or minimum is None:
        return rows
    return kv_dequantize(rows, scale, minimum, bits)


def decode_attention_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    k_min: Tensor | None,
    v_scale: Tensor | None,
    v_min: Tensor | None,
    head_start: Tensor,
    window: Tensor,
    sink: Tensor,
    lengths: Tensor,
    key_bits: int,
    value_bits: int,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of one new token per sequence over ragged rings, in which each key head keeps what its span
    needs, as numbers or quantized.

    Head ``h`` owns slots ``head_start[h]`` to ``head_start[h + 1]`` of the cache: ``sink[h] + window[h]`` or
    as many as tokens will ever come. Token ``t`` lies in slot ``t`` while ``t < sink``, else in
    ``sink + (t - sink) % window`` (MoA's StaticCircularCache, here with grouped queries and quantized).

    Args:
        q: ``[B, H, 1, D]``, rotary embedding applied.
        k, v: ``[B, L, D]``, L = ``head_start[Hkv]``, float32, float16 or bfloat16, or codes
            ``[B, L, D * bits / 8]``; written by ``cache_append``. Slots not written yet may hold anything.
        k_scale, k_min, v_scale, v_min: float32 ``[B, L]`` for codes, else ``None``.
        head_start: int64 ``[Hkv + 1]``, ascending from 0.
        window, sink: int32 ``[Hkv]``.
        lengths: int32 ``[B]``, tokens of each sequence so far, this one included; 0 gives zeros.
        key_bits, value_bits: 32 or 16 (numbers) or 8 or 4 (codes).
        scale: of the scores, usually ``D ** -0.5``.
        softcap: see ``attend``.

    Returns:
        ``[B, H, 1, D]`` in the dtype of ``q``.
    """
    rings = (head_start, window, sink)
    check_cache(q.shape[0], q.shape[-1], k, v, k_scale, k_min, v_scale, v_min, *rings, key_bits, value_bits)
    check_decode_cache(q, head_start, lengths)
    starts = ring_starts(*rings, k.shape[1], lengths)
    keys, values = cache_rows(k, k_scale, k_min, key_bits), cache_rows(v, v_scale, v_min, value_bits)
    groups = q.shape[1] // (len(starts) - 1)
    out = []
    for h, (w, s) in enumerate(zip(window.tolist(), sink.tolist())):
        used = lengths.clamp(max=s) + (lengths - s).clamp(0, w)  # the slots in use are a ring's first ones
        ring = slice(starts[h], starts[h + 1])
        mask = torch.arange(starts[h + 1] - starts[h], device=q.device) < used.view(-1, 1, 1, 1)
        heads = q[:, h * groups : (h + 1) * groups]
        out.append(attend(heads, keys[:, None, ring], values[:, None, ring], mask, scale, softcap))
    return torch.cat(out, dim=1).to(q.dtype)


def cache_append(
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    k_min: Tensor | None,
    v_scale: Tensor | None,
    v_min: Tensor | None,
    new_k: Tensor,
    new_v: Tensor,
    head_start: Tensor,
    window: Tensor,
    sink: Tensor,
    positions: Tensor,
    key_bits: int,
    value_bits: int,
) -> None:
    """Store one token of every sequence in ``decode_attention_cache``'s rings, over what leaves the window.

    Args:
        k, v, k_scale, k_min, v_scale, v_min: the cache, changed in place.
        new_k, new_v: ``[B, Hkv, D]``, any float dtype, rotary embedding applied to the keys.
        head_start, window, sink, key_bits, value_bits: as there.
        positions: int32 ``[B]``, number of the token in its own sequence, from 0.
    """
    rings = (head_start, window, sink)
    check_append(new_k, new_v, head_start, positions)
    check_cache(
        new_k.shape[0], new_k.shape[2], k, v, k_scale, k_min, v_scale, v_min, *rings, key_bits, value_bits
    )
    check_positions(positions)
    starts = ring_starts(*rings, k.shape[1], positions + 1)
    sides = ((k, k_scale, k_min, new_k, key_bits), (v, v_scale, v_min, new_v, value_bits))
    for rows, factor, minimum, new, bits in sides:
        for h, (w, s) in enumerate(zip(window.tolist(), sink.tolist())):
            at = torch.where(positions < s, positions, s + (positions - s) % max(w, 1)).long() + starts[h]
            stored = ((positions < s) | (w > 0)).nonzero().squeeze(1)  # a head without window drops the rest
            entries = cache_entries(new[stored, None, h], bits, rows.dtype)
            for target, entry in zip((rows, factor, minimum), entries):
                if target is not None and entry is not None:
                    target[stored, at[stored]] = entry[:, 0]
