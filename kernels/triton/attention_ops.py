"""The Triton implementations of the attention operators on CUDA. Triton is imported at their first use."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from autocomp.kernels import attention_reference as reference
from autocomp.kernels.library import Implementation
from autocomp.kernels.triton.attention_cases import SMALL, Cases
from autocomp.kernels.triton.attention_launch import WIDEST_FLOAT32_HEAD, WIDEST_HEAD

MODULES = {
    "kv_quantize": "attention_cache",
    "spans_append": "attention_cache",
    "decode_attention_kv": "attention_decode",
    "decode_attention_spans": "attention_decode",
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


def _decode_spans(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_start: torch.Tensor, *args: Any, **kwargs: Any
) -> str:
    return _limits(q, k, v) or _group_limit(q.shape[1], head_start.shape[0] - 1)


def _append(
    k: torch.Tensor, v: torch.Tensor, new_k: torch.Tensor, new_v: torch.Tensor, *args: Any, **kwargs: Any
) -> str:
    del args, kwargs
    return _limits(k) or _limits(v) or _limits(new_k) or _limits(new_v)


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
    "spans_append": _append,
    "decode_attention_kv": _decode_kv,
    "decode_attention_spans": _decode_spans,
    "attention_spans": _prefill,
    "attention_window_residual": _prefill,
    "attention_block_sparse": _block_sparse,
}


def _run(name: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return kernel(name)(x, *args, **kwargs)


def compare(name: str, arguments: tuple[Any, ...], run: Callable[..., Any]) -> float:
    """Largest relative error (Frobenius) of ``run`` over the operator's results, against its reference; NaN
    if a result holds one. Arguments that the operator changes are copied first and count as results."""
    changes = name == "spans_append"
    mine, theirs = (_copied(arguments) if changes else arguments for _ in range(2))
    found, wanted = run(*mine), getattr(reference, name)(*theirs)
    if changes:
        found, wanted = mine[:2], theirs[:2]
    pairs = zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, wanted)))
    errors = [(f.double() - w.double()).norm() / w.double().norm().clamp_min(1e-30) for f, w in pairs]
    return float(torch.stack(errors).max())


def _copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)


def _check(name: str) -> str:
    error = compare(name, SMALL[name](Cases("cuda", torch.bfloat16)), functools.partial(_run, name))
    return "" if error <= CHECK_ERROR else f"relative error {error:.2g} on a small case; update Triton"


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
