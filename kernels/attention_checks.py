"""What the attention operators refuse. Wrong shapes make a kernel read foreign memory, so every
implementation asks here first.

The functions up to ``check_block_sparse`` look at shapes and dtypes only; the ones after it read values, so
on a GPU they wait for it: references and CPU implementations call them, GPU kernels clamp instead.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _shape(name: str, x: Tensor, wanted: tuple[int, ...], remedy: str = "") -> None:
    if tuple(x.shape) != tuple(wanted):
        raise ValueError(f"{name} must have shape {tuple(wanted)}, not {tuple(x.shape)}{remedy}")


def _floats(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float32, float16 or bfloat16, not {x.dtype}; convert it")


def _is(dtype: torch.dtype, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, not {x.dtype}; convert it with .to({dtype})")


def check_groups(heads: int, kv_heads: int) -> int:
    """Query heads per key head."""
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads can't share {kv_heads} key heads: use a multiple")
    return heads // kv_heads


def check_kv_quantize(x: Tensor, bits: int) -> None:
    _floats(x=x)
    if x.dim() != 4 or x.shape[-1] < 1:
        raise ValueError(f"x must be [batch, kv_heads, tokens, dim], not {tuple(x.shape)}")
    if bits not in (4, 8):
        raise ValueError(f"bits must be 8 or 4, not {bits}")
    if bits == 4 and x.shape[-1] % 2:
        raise ValueError(f"4-bit codes lie two in a byte: dim must be even, not {x.shape[-1]}; use 8 bits")


def check_decode_kv(
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
    window: int,
) -> None:
    _floats(q=q)
    if q.dim() != 4 or q.shape[2] != 1:
        raise ValueError(f"q must be [batch, heads, 1, dim], not {tuple(q.shape)}")
    if k_codes.dim() != 4:
        raise ValueError(f"k_codes must be [batch, kv_heads, capacity, bytes], not {tuple(k_codes.shape)}")
    if window < 0:
        raise ValueError(f"window must not be negative, got {window}; 0 sees all")
    batch, heads, _, dim = q.shape
    kv_heads, capacity = k_codes.shape[1], k_codes.shape[2]
    check_groups(heads, kv_heads)
    for side, bits, tensors in (
        ("k", key_bits, (k_codes, k_scale, k_min)),
        ("v", value_bits, (v_codes, v_scale, v_min)),
    ):
        if bits not in (4, 8) or (dim * bits) % 8:
            raise ValueError(f"{side}: {bits} bits at dim {dim}; bits must be 8, or 4 with an even dim")
        _is(torch.uint8, **{f"{side}_codes": tensors[0]})
        _is(torch.float32, **{f"{side}_scale": tensors[1], f"{side}_min": tensors[2]})
        _shape(f"{side}_codes", tensors[0], (batch, kv_heads, capacity, dim * bits // 8), f" at {bits} bits")
        _shape(f"{side}_scale", tensors[1], (batch, kv_heads, capacity))
        _shape(f"{side}_min", tensors[2], (batch, kv_heads, capacity))
    _is(torch.int32, lengths=lengths)
    _shape("lengths", lengths, (batch,))


def check_prefill(q: Tensor, k: Tensor, v: Tensor) -> None:
    _floats(q=q, k=k, v=v)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"q and k must be [batch, heads, tokens, dim], not {tuple(q.shape)}, {tuple(k.shape)}"
        )
    batch, heads, tokens, dim = q.shape
    check_groups(heads, k.shape[1])
    _shape("k", k, (batch, k.shape[1], tokens, dim), " to fit q: this operator has no cache")
    _shape("v", v, tuple(k.shape), " like k")


def check_spans(window: Tensor, sink: Tensor, heads: int) -> None:
    _is(torch.int32, window=window, sink=sink)
    _shape("window", window, (heads,))
    _shape("sink", sink, (heads,))


def check_cache(
    batch: int,
    dim: int,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    k_min: Tensor | None,
    v_scale: Tensor | None,
    v_min: Tensor | None,
    head_start: Tensor,
    window: Tensor,
    sink: Tensor,
    key_bits: int,
    value_bits: int,
) -> None:
    """Ragged rings ``[batch, slots, ...]`` of ``dim`` features."""
    if k.dim() != 3:
        raise ValueError(f"k must be [batch, slots, dim], or codes of it, not {tuple(k.shape)}")
    _entries("k", key_bits, (batch, k.shape[1], dim), k, k_scale, k_min)
    _entries("v", value_bits, (batch, k.shape[1], dim), v, v_scale, v_min)
    _is(torch.int64, head_start=head_start)
    if head_start.dim() != 1 or head_start.shape[0] < 2:
        raise ValueError(f"head_start must be [kv_heads + 1], not {tuple(head_start.shape)}")
    check_spans(window, sink, head_start.shape[0] - 1)


def _entries(
    side: str, bits: int, shape: tuple[int, int, int], rows: Tensor, scale: Tensor | None, low: Tensor | None
) -> None:
    """Keys or values of a cache: numbers of 16 or 32 bits, or codes with scale and minimum."""
    if bits not in (4, 8, 16, 32):
        raise ValueError(f"{side}: bits must be 32, 16, 8 or 4, not {bits}")
    if bits >= 16:
        if not rows.is_floating_point() or 8 * rows.element_size() != bits:
            raise TypeError(f"{side} must be of {bits} bits as told, not {rows.dtype}")
        if scale is not None or low is not None:
            raise ValueError(f"{side}_scale and {side}_min belong to 8 or 4 bits: leave them out at {bits}")
        return _shape(side, rows, shape)
    if (shape[2] * bits) % 8:
        raise ValueError(f"{side}: 4-bit codes lie two in a byte: dim must be even, not {shape[2]}; use 8")
    if scale is None or low is None:
        raise ValueError(f"{side}_scale and {side}_min are needed at {bits} bits; kv_quantize gives them")
    _is(torch.uint8, **{side: rows})
    _is(torch.float32, **{f"{side}_scale": scale, f"{side}_min": low})
    _shape(side, rows, (*shape[:2], shape[2] * bits // 8), f" at {bits} bits")
    _shape(f"{side}_scale", scale, shape[:2])
    _shape(f"{side}_min", low, shape[:2])


def check_decode_cache(q: Tensor, head_start: Tensor, lengths: Tensor) -> None:
    """What decoding asks beyond ``check_cache``."""
    _floats(q=q)
    if q.dim() != 4 or q.shape[2] != 1:
        raise ValueError(f"q must be [batch, heads, 1, dim], not {tuple(q.shape)}")
    check_groups(q.shape[1], head_start.shape[0] - 1)
    _is(torch.int32, lengths=lengths)
    _shape("lengths", lengths, (q.shape[0],))


def check_append(new_k: Tensor, new_v: Tensor, head_start: Tensor, positions: Tensor) -> None:
    """What storing asks beyond ``check_cache``."""
    _floats(new_k=new_k, new_v=new_v)
    if new_k.dim() != 3:
        raise ValueError(f"new_k must be [batch, kv_heads, dim], not {tuple(new_k.shape)}")
    _shape("new_k", new_k, (new_k.shape[0], head_start.shape[0] - 1, new_k.shape[2]))
    _shape("new_v", new_v, tuple(new_k.shape), " like new_k")
    _is(torch.int32, positions=positions)
    _shape("positions", positions, (new_k.shape[0],))


def check_window_residual(
    q: Tensor, half_window: Tensor, prefix: int, residual: Tensor | None, mode: Tensor
) -> None:
    _is(torch.int32, half_window=half_window, mode=mode)
    _shape("half_window", half_window, (q.shape[1],))
    _shape("mode", mode, (q.shape[1],))
    if prefix < 0:
        raise ValueError(f"prefix must not be negative, got {prefix}; 0 means no text tokens")
    if residual is not None:
        _floats(residual=residual)
        _shape("residual", residual, tuple(q.shape), " like q")


def check_block_sparse(q: Tensor, row_ptr: Tensor, col: Tensor, block: int, order: Tensor | None) -> None:
    if block < 1:
        raise ValueError(f"block must be positive, got {block}")
    heads, tokens = q.shape[1], q.shape[2]
    _is(torch.int32, row_ptr=row_ptr, col=col)
    _shape("row_ptr", row_ptr, (heads, -(-tokens // block) + 1), f" for {tokens} tokens in blocks of {block}")
    if col.dim() != 1:
        raise ValueError(f"col must be [nnz], not {tuple(col.shape)}")
    if order is not None:
        _is(torch.int32, order=order)
        _shape("order", order, (heads, tokens))


# --- these read values -----------------------------------------------------------------------------------


def check_lengths(lengths: Tensor, capacity: int) -> None:
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths must be 0 to the capacity {capacity}, got {lengths.tolist()}")


def check_positions(positions: Tensor) -> None:
    if positions.numel() and int(positions.min()) < 0:
        raise ValueError(
            f"positions must not be negative, got {positions.tolist()}; the first token is number 0"
        )


def ring_starts(head_start: Tensor, window: Tensor, sink: Tensor, slots: int, lengths: Tensor) -> list[int]:
    """``head_start`` as integers, after a look whether every head's ring holds what its span needs.

    Args:
        lengths: int ``[B]``, tokens of each sequence.
    """
    starts = head_start.tolist()
    if starts[0] != 0 or starts[-1] != slots:
        raise ValueError(f"head_start must go from 0 to the cache's {slots} slots, got {starts}")
    told = lengths.tolist()
    length = max(told, default=0)
    if min(told, default=0) < 0:
        raise ValueError(f"lengths must not be negative, got {told}")
    for h, (w, s) in enumerate(zip(window.tolist(), sink.tolist())):
        if w < 0 or s < 0:
            raise ValueError(f"head {h}: window {w} and sink {s} must not be negative")
        needed = min(length, s) + min(max(length - s, 0), w)
        if starts[h + 1] - starts[h] < needed:
            room = starts[h + 1] - starts[h]
            raise ValueError(
                f"head {h} has {room} slots but keeps {needed} of {length} tokens: give it {s + w}"
            )
    return starts


def check_span_values(window: Tensor, sink: Tensor) -> None:
    if window.numel() and min(int(window.min()), int(sink.min())) < 0:
        raise ValueError(f"window {window.tolist()} and sink {sink.tolist()} must not be negative")


def check_modes(half_window: Tensor, mode: Tensor) -> None:
    if mode.numel() and not 0 <= int(mode.min()) <= int(mode.max()) <= 3:
        raise ValueError(f"mode must be 0 (full), 1 (save), 2 (window) or 3 (reuse), got {mode.tolist()}")
    if half_window.numel() and int(half_window.min()) < 0:
        raise ValueError(f"half_window must not be negative, got {half_window.tolist()}")


def check_pattern(row_ptr: Tensor, col: Tensor, order: Tensor | None) -> None:
    blocks = row_ptr.shape[1] - 1
    if row_ptr.numel():
        low, high = int(row_ptr.min()), int(row_ptr.max())
        if low < 0 or high > col.numel() or bool((row_ptr.diff(dim=1) < 0).any()):
            raise ValueError(
                f"row_ptr must ascend within 0 to {col.numel()} (col's size); it spans {low} to {high}"
            )
    if col.numel() and not 0 <= int(col.min()) <= int(col.max()) < blocks:
        raise ValueError(
            f"col must be block numbers 0 to {blocks - 1}, got {int(col.min())} to {int(col.max())}"
        )
    if order is not None and order.numel():
        wanted = torch.arange(order.shape[1], dtype=order.dtype, device=order.device)
        if not torch.equal(order.sort(dim=1).values, wanted.expand_as(order)):
            raise ValueError(f"order must hold each of 0 to {order.shape[1] - 1} once per head")
