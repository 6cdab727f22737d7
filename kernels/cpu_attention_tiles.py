"""Attention of many queries on the CPU, with a pattern per head: our C kernel.

It also takes heads whose pattern is dense: torch's ``scaled_dot_product_attention`` was slower in every case
that was measured (float32 and bfloat16, 256 to 4096 tokens).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from autocomp.kernels import attention_checks as checks
from autocomp.kernels import attention_probe, native
from autocomp.kernels.library import Implementation

Tensor = torch.Tensor
SPANS, WINDOWS, BLOCKS = 0, 1, 2
LARGEST_DIM = 1024


class View(ctypes.Structure):
    """``view`` of attention_tiles.c."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    ]


_SIZES = ("batch", "heads", "kv_heads", "tokens", "dim", "pattern", "prefix", "block", "threads")
_POINTERS = ("out", "saved", "residual", "window", "sink", "mode", "row_ptr", "col", "order")


class Pattern(ctypes.Structure):
    """``ac_pattern`` of attention_tiles.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, View) for name in ("q", "k", "v")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("scale", ctypes.c_double),
    ]


def _readable(x: Tensor) -> Tensor:
    """``x`` itself when C reads its type and strides, else a copy."""
    x = x.float() if x.dtype == torch.float16 else x
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _view(x: Tensor) -> View:
    return View(x.data_ptr(), *x.stride()[:3], x.element_size() * 8)


def _run(
    pattern: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    *,
    prefix: int = 0,
    block: int = 0,
    save: bool = False,
    **tensors: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The output and, with ``save``, the new residual; ``tensors`` by the names of ``ac_pattern``."""
    library = native.load("attention_tiles")
    library.ac_pattern_space.restype = ctypes.c_int64
    dtype, scale = q.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = _readable(q), _readable(k), _readable(v)
    out = torch.empty(q.shape, dtype=q.dtype)
    saved = torch.empty_like(out) if save else None
    if not out.numel():
        return out.to(dtype), saved if saved is None else saved.to(dtype)
    residual = tensors.pop("residual", None)
    kept = {"out": out, "saved": saved, "residual": residual if residual is None else residual.to(q.dtype)}
    kept = {name: t if t is None else t.contiguous() for name, t in (kept | tensors).items()}
    batch, heads, tokens, dim = q.shape
    sizes = (batch, heads, k.shape[1], tokens, dim, pattern, prefix, block, native.threads())
    pointers = (t if (t := kept.get(name)) is None else t.data_ptr() for name in _POINTERS)
    x = Pattern(*sizes, _view(q), _view(k), _view(v), *pointers, scale)
    space = torch.empty(library.ac_pattern_space(ctypes.byref(x)), dtype=torch.uint8)
    library.ac_attend_pattern(ctypes.byref(x), native.pointer(space))
    return out.to(dtype), saved if saved is None else saved.to(dtype)


def attention_spans(q: Tensor, k: Tensor, v: Tensor, window: Tensor, sink: Tensor, scale: float) -> Tensor:
    checks.check_prefill(q, k, v)
    checks.check_spans(window, sink, q.shape[1])
    checks.check_span_values(window, sink)
    return _run(SPANS, q, k, v, scale, window=window, sink=sink)[0]


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
    checks.check_prefill(q, k, v)
    checks.check_window_residual(q, half_window, prefix, residual, mode)
    checks.check_modes(half_window, mode)
    tensors: dict[str, Any] = {"window": half_window, "mode": mode, "residual": residual}
    out, saved = _run(WINDOWS, q, k, v, scale, prefix=prefix, save=True, **tensors)
    assert saved is not None
    return out, saved


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
    checks.check_prefill(q, k, v)
    checks.check_block_sparse(q, row_ptr, col, block, order)
    checks.check_pattern(row_ptr, col, order)
    return _run(BLOCKS, q, k, v, scale, block=block, row_ptr=row_ptr, col=col, order=order)[0]


def _available() -> str:
    return native.unavailable("pool") or native.unavailable("attention_tiles")


def _supports(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> str:
    scale = kwargs.get("scale", args[-1] if args and isinstance(args[-1], float) else 1.0)
    if scale is not None and not scale > 0:
        return f"scale {scale}: it must be positive"
    if torch.float64 in (q.dtype, k.dtype, v.dtype):
        return "float64, which the reference computes in full"
    return f"dim {q.shape[-1]} is over {LARGEST_DIM}" if q.shape[-1] > LARGEST_DIM else ""


IMPLEMENTATIONS: dict[str, list[Implementation]] = {
    run.__name__: [
        Implementation(
            "cpu",
            "cpu",
            run,
            _available,
            _supports,
            functools.partial(attention_probe.check, run.__name__, run),
        )
    ]
    for run in (attention_spans, attention_window_residual, attention_block_sparse)
}
