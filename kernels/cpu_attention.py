"""The attention operators' implementations on the CPU: our C kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from autocomp.kernels import attention_checks as checks
from autocomp.kernels import attention_probe, native
from autocomp.kernels.library import Implementation

Tensor = torch.Tensor
BITS = {torch.float32: 32, torch.bfloat16: 16}
"""Caches that C reads without quantization, as its ``key_bits`` and ``value_bits``."""
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


def _rings(k: Tensor, v: Tensor, heads: int, spans: list[Tensor]) -> Cache:
    """Dense rings; ``spans``: contiguous head_start, window, sink. The caller keeps all tensors alive."""
    head_start, window, sink = spans
    sizes = (k.shape[0], heads, window.numel(), k.shape[2], 0, BITS[k.dtype], BITS[v.dtype])
    rings = (t.data_ptr() for t in (window, sink, head_start))
    return Cache(*sizes, k.data_ptr(), v.data_ptr(), None, None, None, None, *rings)


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
    checks.check_rings(q.shape[0], q.shape[-1], k, v, head_start, window, sink)
    checks.ring_starts(head_start, window, sink, k.shape[1], length)
    checks.check_groups(q.shape[1], window.numel())
    k, v, *spans = (t.contiguous() for t in (k, v, head_start, window, sink))
    c = _rings(k, v, q.shape[1], spans)
    return _decode(c, q, torch.full((len(q),), length, dtype=torch.int32), scale, 0.0, 0)


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
    checks.check_rings(k.shape[0], k.shape[2], k, v, head_start, window, sink)
    checks.check_append(k, new_k, new_v, head_start, position)
    checks.ring_starts(head_start, window, sink, k.shape[1], position + 1)
    spans = [t.contiguous() for t in (head_start, window, sink)]
    c = _rings(k, v, window.numel(), spans)
    rows = [t.float().contiguous() for t in (new_k, new_v)]
    _library().ac_append(ctypes.byref(c), *map(native.pointer, rows), ctypes.c_int64(position))


def _supports_quantize(x: Tensor, bits: int) -> str:
    return _narrow(x)


def _supports_decode_kv(q: Tensor, *args: object, **kwargs: object) -> str:
    return _narrow(q) or _small(q.shape[-1])


def _supports_decode_spans(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> str:
    return _narrow(q) or _ring_types(k, v) or _small(q.shape[-1])


def _supports_append(k: Tensor, v: Tensor, *args: object, **kwargs: object) -> str:
    if not (k.is_contiguous() and v.is_contiguous()):
        return "a cache that is not contiguous"
    return _ring_types(k, v)


def _narrow(x: Tensor) -> str:
    return "float64, which the reference computes in full" if x.dtype == torch.float64 else ""


def _small(dim: int) -> str:
    return f"dim {dim} is over {LARGEST_DIM}" if dim > LARGEST_DIM else ""


def _ring_types(k: Tensor, v: Tensor) -> str:
    if k.dtype not in BITS or v.dtype not in BITS:
        return f"a cache of {k.dtype} and {v.dtype}; use bfloat16 or float32"
    return ""


def _available() -> str:
    return native.unavailable("attention")


def _implementation(run: Callable[..., Any], supports: Callable[..., str]) -> list[Implementation]:
    name = run.__name__
    return [Implementation("cpu", "cpu", run, _available, supports, lambda: attention_probe.check(name, run))]


IMPLEMENTATIONS: dict[str, list[Implementation]] = {
    "kv_quantize": _implementation(kv_quantize, _supports_quantize),
    "decode_attention_kv": _implementation(decode_attention_kv, _supports_decode_kv),
    "decode_attention_spans": _implementation(decode_attention_spans, _supports_decode_spans),
    "spans_append": _implementation(spans_append, _supports_append),
}
