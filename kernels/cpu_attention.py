"""The attention operators' implementations on the CPU: our C kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from autocomp.kernels import attention_checks as checks
from autocomp.kernels import attention_probe, native
from autocomp.kernels.library import Implementation

Tensor = torch.Tensor
STORED = (torch.float32, torch.bfloat16, torch.uint8)
"""Types of a cache that C reads and writes; uint8 are codes."""
LARGEST_DIM = 2048


_SIZES = ("batch", "heads", "kv_heads", "dim", "capacity", "key_bits", "value_bits")
_POINTERS = ("k", "v", "k_scale", "k_min", "v_scale", "v_min", "window", "sink", "head_start")


class Cache(ctypes.Structure):
    """``ac_cache`` of attention.h."""

    _fields_ = [*((n, ctypes.c_int64) for n in _SIZES), *((n, ctypes.c_void_p) for n in _POINTERS)]


def _library() -> ctypes.CDLL:
    library = native.load("attention")
    library.ac_decode_space.restype = ctypes.c_int64
    return library


def _float(x: float) -> ctypes.c_float:
    return ctypes.c_float(x)


def _decode(cache: Cache, q: Tensor, lengths: Tensor, scale: float, softcap: float, window: int) -> Tensor:
    """Run ``ac_decode``; q ``[B, H, 1, D]``, lengths int32 ``[B]`` contiguous."""
    library, threads = _library(), native.threads()
    wide = q.float().contiguous()
    out = torch.empty_like(wide)
    counts = native.pointer(lengths)
    limits = ctypes.c_int64(window), ctypes.c_int64(threads)
    floats = library.ac_decode_space(ctypes.byref(cache), counts, *limits)
    space = torch.empty(floats, dtype=torch.float32)
    library.ac_decode(
        ctypes.byref(cache),
        native.pointer(wide),
        native.pointer(out),
        counts,
        _float(scale),
        _float(softcap),
        *limits,
        native.pointer(space),
    )
    return out.to(q.dtype)


def kv_quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_kv_quantize(x, bits)
    x = x.float().contiguous()
    codes = torch.empty(*x.shape[:-1], x.shape[-1] * bits // 8, dtype=torch.uint8)
    scale, minimum = torch.empty(x.shape[:-1]), torch.empty(x.shape[:-1])
    sizes = (ctypes.c_int64(n) for n in (scale.numel(), x.shape[-1], bits))
    results = (native.pointer(t) for t in (codes, scale, minimum))
    _library().ac_kv_quantize(native.pointer(x), *sizes, *results, ctypes.c_int64(native.threads()))
    return codes, scale, minimum


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
    cache = [t.contiguous() for t in (k_codes, v_codes, k_scale, k_min, v_scale, v_min)]
    checks.check_decode_kv(
        q, k_codes, k_scale, k_min, v_codes, v_scale, v_min, lengths, key_bits, value_bits, window
    )
    checks.check_lengths(lengths, k_codes.shape[2])
    batch, kv_heads, capacity, _ = k_codes.shape
    sizes = (batch, q.shape[1], kv_heads, q.shape[-1], capacity, key_bits, value_bits)
    c = Cache(*sizes, *(t.data_ptr() for t in cache))
    return _decode(c, q, lengths.contiguous(), scale, softcap, window)


def _rings(tensors: Sequence[Tensor | None], sizes: tuple[int, ...], bits: tuple[int, int]) -> Cache:
    """Ragged rings. The caller keeps the tensors alive.

    Args:
        tensors: contiguous: k, v, their scales and minima, head_start, window, sink.
        sizes: batch, query heads, key heads, dim.
    """
    k, v, k_scale, k_min, v_scale, v_min, head_start, window, sink = (
        None if t is None else t.data_ptr() for t in tensors
    )
    return Cache(*sizes, 0, *bits, k, v, k_scale, k_min, v_scale, v_min, window, sink, head_start)


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
    cache = (k, v, k_scale, k_min, v_scale, v_min, head_start, window, sink)
    batch, heads, _, dim = q.shape
    checks.check_cache(batch, dim, *cache, key_bits, value_bits)
    checks.check_decode_cache(q, head_start, lengths)
    checks.ring_starts(head_start, window, sink, k.shape[1], lengths)
    held = [None if t is None else t.contiguous() for t in cache]
    c = _rings(held, (batch, heads, window.numel(), dim), (key_bits, value_bits))
    return _decode(c, q, lengths.contiguous(), scale, softcap, 0)


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
    cache = (k, v, k_scale, k_min, v_scale, v_min, head_start, window, sink)
    batch, heads, dim = new_k.shape
    checks.check_append(new_k, new_v, head_start, positions)
    checks.check_cache(batch, dim, *cache, key_bits, value_bits)
    checks.check_positions(positions)
    checks.ring_starts(head_start, window, sink, k.shape[1], positions + 1)
    held = [*cache[:6], *(t.contiguous() for t in (head_start, window, sink))]
    c = _rings(held, (batch, heads, heads, dim), (key_bits, value_bits))
    rows = [t.float().contiguous() for t in (new_k, new_v)]
    counts = positions.contiguous()
    _library().ac_append_each(ctypes.byref(c), *map(native.pointer, (*rows, counts)))


def _supports_quantize(x: Tensor, bits: int) -> str:
    return _narrow(x)


def _supports_decode_kv(q: Tensor, *args: object, **kwargs: object) -> str:
    return _narrow(q) or _small(q.shape[-1])


def _supports_decode_cache(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> str:
    return _narrow(q) or _ring_types(k, v) or _small(q.shape[-1])


def _supports_append(
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    k_min: Tensor | None,
    v_scale: Tensor | None,
    v_min: Tensor | None,
    new_k: Tensor,
    new_v: Tensor,
    *args: object,
    **kwargs: object,
) -> str:
    if not all(t is None or t.is_contiguous() for t in (k, v, k_scale, k_min, v_scale, v_min)):
        return "a cache that is not contiguous"
    return _ring_types(k, v) or _narrow(new_k) or _narrow(new_v)


def _narrow(x: Tensor) -> str:
    return "float64, which the reference computes in full" if x.dtype == torch.float64 else ""


def _small(dim: int) -> str:
    return f"dim {dim} is over {LARGEST_DIM}" if dim > LARGEST_DIM else ""


def _ring_types(k: Tensor, v: Tensor) -> str:
    if k.dtype not in STORED or v.dtype not in STORED:
        return f"a cache of {k.dtype} and {v.dtype}; use bfloat16, float32 or codes"
    return ""


def _available() -> str:
    return native.unavailable("attention")


def _implementation(run: Callable[..., Any], supports: Callable[..., str]) -> list[Implementation]:
    name = run.__name__
    return [Implementation("cpu", "cpu", run, _available, supports, lambda: attention_probe.check(name, run))]


IMPLEMENTATIONS: dict[str, list[Implementation]] = {
    "kv_quantize": _implementation(kv_quantize, _supports_quantize),
    "decode_attention_kv": _implementation(decode_attention_kv, _supports_decode_kv),
    "decode_attention_cache": _implementation(decode_attention_cache, _supports_decode_cache),
    "cache_append": _implementation(cache_append, _supports_append),
}
