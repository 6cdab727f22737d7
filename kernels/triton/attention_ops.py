"""The Triton implementations of the attention operators on CUDA. Triton is imported at their first use."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from autocomp.kernels.attention_probe import error
from autocomp.kernels.library import Implementation
from autocomp.kernels.triton.attention_cases import SMALL, Cases
from autocomp.kernels.triton.attention_launch import WIDEST_FLOAT32_HEAD, WIDEST_HEAD

MODULES = {
    "kv_quantize": "attention_cache",
    "cache_append": "attention_cache",
    "decode_attention_kv": "attention_decode",
    "decode_attention_cache": "attention_decode",
    "attention_spans": "attention_spans",
    "attention_window_residual": "attention_window",
    "attention_block_sparse": "attention_block_sparse",
}
"""Operator -> module that holds a function of its name."""

LARGEST_GROUP = 64
CHECK_ERROR = 1.2e-2
"""Relative error (Frobenius) of bfloat16 that the self-check accepts."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_GRID = 65535


@functools.cache
def kernel(name: str) -> Callable[..., Any]:
    """The function that launches the operator's kernels. If Triton interprets, its tensors are on the CPU."""
    module = importlib.import_module(f"autocomp.kernels.triton.{MODULES[name]}")
    function: Callable[..., Any] = getattr(module, name)
    return function


def available() -> str:
    """Why there is no Triton on CUDA here; empty when there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the kernels need compute capability 8.0 or newer (bfloat16 tensor cores)"
    return ""


def _limits(x: torch.Tensor, *others: torch.Tensor) -> str:
    """What all kernels need; wrong shapes are left to the operators' own checks."""
    if x.dtype not in _DTYPES or any(t.dtype != x.dtype for t in others):
        told = ", ".join(str(t.dtype) for t in (x, *others))
        return f"tensors must share one of float32, float16 and bfloat16; got {told}"
    widest = WIDEST_FLOAT32_HEAD if x.dtype == torch.float32 else WIDEST_HEAD
    if x.shape[-1] > widest:
        return f"heads of {x.dtype} may have {widest} features; got {x.shape[-1]}"
    if x.dim() == 4 and x.shape[0] * x.shape[1] > _GRID:
        return f"batch times heads may be {_GRID}; got {x.shape[0] * x.shape[1]}"
    return ""


def _group_limit(heads: int, kv_heads: int) -> str:
    if heads > LARGEST_GROUP * kv_heads:
        return f"at most {LARGEST_GROUP} query heads may share a key head; got {heads} and {kv_heads}"
    return ""


def _decode_kv(q: torch.Tensor, k_codes: torch.Tensor, *args: Any, **kwargs: Any) -> str:
    return _limits(q) or _group_limit(q.shape[1], k_codes.shape[1])


def _decode_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_scale: torch.Tensor | None,
    k_min: torch.Tensor | None, v_scale: torch.Tensor | None, v_min: torch.Tensor | None,
    head_start: torch.Tensor, *args: Any, **kwargs: Any,
) -> str:  # fmt: skip
    plain = [t for t in (k, v) if t.dtype != torch.uint8]
    return _limits(q, *plain) or _group_limit(q.shape[1], head_start.shape[0] - 1)


def _append(
    k: torch.Tensor, v: torch.Tensor, k_scale: torch.Tensor | None, k_min: torch.Tensor | None,
    v_scale: torch.Tensor | None, v_min: torch.Tensor | None, new_k: torch.Tensor, new_v: torch.Tensor,
    *args: Any, **kwargs: Any,
) -> str:  # fmt: skip
    for scale, minimum in ((k_scale, k_min), (v_scale, v_min)):
        if scale is not None and minimum is not None and scale.stride() != minimum.stride():
            return f"a scale must have the strides of its minimum; got {scale.stride()}, {minimum.stride()}"
    reasons = (_limits(t) for t in (k, v, new_k, new_v) if t.dtype != torch.uint8)
    return next(filter(None, reasons), "")


def _prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> str:
    return _limits(q, k, v)


def _block_sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, block: int,
    *args: Any, **kwargs: Any,
) -> str:  # fmt: skip
    if block < 16 or block & (block - 1):
        return f"blocks must be powers of two from 16; got {block}"
    return _limits(q, k, v)


SUPPORTS: dict[str, Callable[..., str]] = {
    "kv_quantize": lambda x, bits: _limits(x),
    "cache_append": _append,
    "decode_attention_kv": _decode_kv,
    "decode_attention_cache": _decode_cache,
    "attention_spans": _prefill,
    "attention_window_residual": _prefill,
    "attention_block_sparse": _block_sparse,
}


def _run(name: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return kernel(name)(x, *args, **kwargs)


def _check(name: str) -> str:
    run, cases = functools.partial(_run, name), Cases("cuda", torch.bfloat16)
    errors = torch.tensor([error(name, run, build(cases)) for build in SMALL[name]])
    worst = float(errors.max())  # NaN if there is one
    return "" if worst <= CHECK_ERROR else f"relative error {worst:.2g} on a small case; update Triton"


IMPLEMENTATIONS = {
    name: Implementation(
        "triton",
        "cuda",
        functools.partial(_run, name),
        available,
        SUPPORTS[name],
        functools.partial(_check, name),
    )
    for name in MODULES
}
"""Operator -> its implementation."""


def register() -> None:
    """Make these the first choice on CUDA."""
    from autocomp.kernels.attention import OPERATORS

    for name, implementation in IMPLEMENTATIONS.items():
        OPERATORS[name].register(implementation)
