"""Operators for compressed attention: quantized caches, spans per head, windows with residual, sparse blocks.

Each is a ``torch.ops.autocomp`` operator with the semantics that its reference in ``attention_reference``
documents. Here are the schemas, the fakes for ``torch.compile``, and the choice of implementations.
"""

from __future__ import annotations

import torch

from autocomp.kernels import attention_checks as checks
from autocomp.kernels import attention_diffusion_reference as diffusion
from autocomp.kernels import attention_reference as reference
from autocomp.kernels import cpu_attention, cpu_attention_tiles
from autocomp.kernels.library import Operator

Tensor = torch.Tensor


def _fake_kv_quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_kv_quantize(x, bits)
    codes = x.new_empty(*x.shape[:-1], x.shape[-1] * bits // 8, dtype=torch.uint8)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return codes, scale, torch.empty_like(scale)


def _fake_decode_kv(
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
    checks.check_decode_kv(
        q, k_codes, k_scale, k_min, v_codes, v_scale, v_min, lengths, key_bits, value_bits, window
    )
    return q.new_empty(q.shape)


def _fake_spans(q: Tensor, k: Tensor, v: Tensor, window: Tensor, sink: Tensor, scale: float) -> Tensor:
    checks.check_prefill(q, k, v)
    checks.check_spans(window, sink, q.shape[1])
    return q.new_empty(q.shape)


def _fake_decode_cache(
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
    checks.check_cache(q.shape[0], q.shape[-1], *cache, key_bits, value_bits)
    checks.check_decode_cache(q, head_start, lengths)
    return q.new_empty(q.shape)


def _fake_append(
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
    checks.check_append(new_k, new_v, head_start, positions)
    checks.check_cache(new_k.shape[0], new_k.shape[2], *cache, key_bits, value_bits)


def _fake_window_residual(
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
    return q.new_empty(q.shape), q.new_empty(q.shape)


def _fake_block_sparse(
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
    return q.new_empty(q.shape)


kv_quantize = Operator(
    "kv_quantize(Tensor x, int bits) -> (Tensor, Tensor, Tensor)", reference.kv_quantize, _fake_kv_quantize
)
decode_attention_kv = Operator(
    "decode_attention_kv(Tensor q, Tensor k_codes, Tensor k_scale, Tensor k_min, Tensor v_codes, "
    "Tensor v_scale, Tensor v_min, Tensor lengths, int key_bits, int value_bits, float scale, "
    "float softcap=0.0, int window=0) -> Tensor",
    reference.decode_attention_kv,
    _fake_decode_kv,
)
attention_spans = Operator(
    "attention_spans(Tensor q, Tensor k, Tensor v, Tensor window, Tensor sink, float scale) -> Tensor",
    reference.attention_spans,
    _fake_spans,
)
decode_attention_cache = Operator(
    "decode_attention_cache(Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor? k_min, Tensor? v_scale, "
    "Tensor? v_min, Tensor head_start, Tensor window, Tensor sink, Tensor lengths, int key_bits, "
    "int value_bits, float scale, float softcap=0.0) -> Tensor",
    reference.decode_attention_cache,
    _fake_decode_cache,
)
cache_append = Operator(
    "cache_append(Tensor(a!) k, Tensor(b!) v, Tensor(c!)? k_scale, Tensor(d!)? k_min, Tensor(e!)? v_scale, "
    "Tensor(f!)? v_min, Tensor new_k, Tensor new_v, Tensor head_start, Tensor window, Tensor sink, "
    "Tensor positions, int key_bits, int value_bits) -> ()",
    reference.cache_append,
    _fake_append,
)
attention_window_residual = Operator(
    "attention_window_residual(Tensor q, Tensor k, Tensor v, Tensor half_window, SymInt prefix, "
    "Tensor? residual, Tensor mode, float? scale=None) -> (Tensor, Tensor)",
    diffusion.attention_window_residual,
    _fake_window_residual,
)
attention_block_sparse = Operator(
    "attention_block_sparse(Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor col, int block, "
    "Tensor? order=None, float? scale=None) -> Tensor",
    diffusion.attention_block_sparse,
    _fake_block_sparse,
)

OPERATORS = {
    operator.name: operator
    for operator in (
        kv_quantize,
        decode_attention_kv,
        attention_spans,
        decode_attention_cache,
        cache_append,
        attention_window_residual,
        attention_block_sparse,
    )
}

for _name, _implementations in (cpu_attention.IMPLEMENTATIONS | cpu_attention_tiles.IMPLEMENTATIONS).items():
    for _implementation in _implementations:
        OPERATORS[_name].register(_implementation)
