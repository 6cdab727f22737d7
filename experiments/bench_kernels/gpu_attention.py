"""Cases of the attention operators: parity on odd shapes, speed on those of real models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu_case import Call, Case, copies_for

from autocomp.kernels import attention_probe
from autocomp.kernels import attention_reference as reference
from autocomp.kernels.attention import OPERATORS
from autocomp.kernels.attention_diffusion_reference import window_mask
from autocomp.kernels.triton.attention_cases import SMALL, Arguments, Cases
from autocomp.kernels.triton.attention_ops import IMPLEMENTATIONS

BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
BF16 = torch.bfloat16
LLAMA = (32, 8, 128)
"""Heads, key heads, dim of Llama-3-8B."""
FLUX = (1, 24, 24, 4608, 128)
"""4096 tokens of a picture behind 512 of text."""
TEXT = 512
VIDEO = (1, 30, 30, 17664, 64)
"""CogVideoX-2B's sequence, cut to whole blocks of 128."""
Parity = tuple[str, Callable[[], torch.Tensor], Callable[[], torch.Tensor], float]


def run(name: str, *arguments: Any) -> Any:
    return IMPLEMENTATIONS[name].run(*arguments)


# --- parity ---------------------------------------------------------------------------------------------


def parity() -> Iterator[Parity]:
    """Name, call, exact result and bound of every operator in three dtypes; one entry for each result."""
    for dtype, bound in BOUND.items():
        for name, arguments in _odd_cases(Cases("cuda", dtype)):
            for part in _results(name, arguments):
                call = functools.partial(_result, functools.partial(run, name), arguments, part)
                exact = functools.partial(_result, OPERATORS[name].reference, arguments, part)
                yield f"{name} {_shape(arguments)} result {part} {dtype}", call, exact, bound


def _results(name: str, arguments: Arguments) -> list[int]:
    """Numbers of an operator's results, or of the arguments that it changes."""
    if name in attention_probe.CHANGES:
        return [i for i in range(attention_probe.CHANGES[name]) if arguments[i] is not None]
    return list(range({"kv_quantize": 3, "attention_window_residual": 2}.get(name, 1)))


def _result(function: Callable[..., Any], arguments: Arguments, part: int) -> torch.Tensor:
    """Result number ``part``; of a function that gives none, the argument that it changed (in a copy)."""
    copied = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
    found = function(*copied)
    found = copied if found is None else found
    result: torch.Tensor = found[part] if isinstance(found, tuple) else found
    return result


def _shape(arguments: Arguments) -> str:
    return "x".join(map(str, arguments[0].shape))


def _odd_cases(cases: Cases) -> Iterator[tuple[str, Arguments]]:
    for name, builds in SMALL.items():
        for build in builds:
            yield name, build(cases)
    for dim in (33, 80, 128) if cases.dtype == BF16 else (80,):  # each means a dozen compilations
        lengths = [0, 1, 777, 3001]
        for bits in ((8, 8), (4, 8)) if dim % 2 == 0 else ((8, 8),):
            yield "decode_attention_kv", cases.decode_attention_kv((4, 12, 3, 3001, dim), bits, lengths)
        for bits in ((16, 16), (8, 16)) if dim % 2 else ((16, 16), (8, 4), (4, 16)):
            sizes, spans = (3, 12, 3, dim), ([50, 3000, 700], [4, 0])
            yield (
                "decode_attention_cache",
                cases.decode_attention_cache(sizes, bits, *spans, [2900, 0, 300]),
            )
            yield "cache_append", cases.cache_append((3, 3, dim), bits, *spans, [2900, 0, 300])
        yield "attention_spans", cases.attention_spans((1, 6, 3, 1111, dim), [1, 77, 512, 2000], [0, 4, 100])
        sizes, halves = (1, 4, 4, 1111, dim), [9, 128, 300, 0]
        yield "attention_window_residual", cases.attention_window_residual(sizes, halves, [0, 1, 2, 3], 77)
        yield "attention_window_residual", cases.attention_window_residual(sizes, halves, [1, 2], 0, False)
        for block in (16, 128):
            yield "attention_block_sparse", cases.attention_block_sparse(sizes, block, 0.3)
    if cases.dtype != torch.float32:
        yield "attention_spans", cases.attention_spans((1, 4, 2, 500, 256), [100, 600], [4])
        yield "decode_attention_kv", cases.decode_attention_kv((1, 8, 4, 900, 256), (8, 4), [870], 30.0, 512)


# --- speed ----------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """Decoding over long caches, prefill with spans, and steps of diffusion transformers."""
    for batch, tokens in ((1, 4096), (1, 32768), (16, 4096)):
        for bits in (8, 4):
            yield _decode_case(batch, tokens, bits)
    for tokens, density in ((4096, 8), (16384, 8), (16384, 2)):
        for bits in ((16, 16), (8, 8), (8, 4)):
            yield _rings_case(tokens, density, bits)
    for tokens in (4096, 16384):
        yield _spans_case(tokens)
    for name, half_window, mode in (
        ("full", [0], [0]),
        ("full and save, window 1/8", [FLUX[3] // 16], [1]),
        ("window 1/8", [FLUX[3] // 16], [2]),
        ("window 1/8, 1/16, reuse", [FLUX[3] // 16, FLUX[3] // 32, 0], [2, 2, 3]),
    ):
        yield _window_case(name, half_window, mode)
    for block, density in ((64, 0.2), (128, 0.2), (128, 0.5)):
        yield _sparse_case(block, density)
    yield _quantize_case()


def _calls(name: str, sets: list[Arguments]) -> Call:
    return lambda i: run(name, *sets[i])


def _sdpa(sets: list[Arguments], **options: Any) -> Call:
    return lambda i: F.scaled_dot_product_attention(*sets[i][:3], **options)


def _decode_case(batch: int, tokens: int, bits: int) -> Case:
    heads, kv_heads, dim = LLAMA
    entries = batch * kv_heads * tokens
    size = entries * (2 * dim * bits / 8 + 4 * 4)
    copies = copies_for(size)
    draw = Cases("cuda", BF16)
    sizes = (batch, heads, kv_heads, tokens, dim)
    sets = [draw.decode_attention_kv(sizes, (bits, bits), [tokens]) for _ in range(copies)]
    dense = [(draw.normal(batch, heads, 1, dim), *draw.qkv(*sizes)[1:]) for _ in range(copies)]
    return Case(
        f"decode int{bits} cache b{batch} s{tokens}", _calls("decode_attention_kv", sets),
        functools.partial(reference.decode_attention_kv, *sets[0]) if entries <= 1 << 19 else None,
        size, 4.0 * batch * heads * tokens * dim, copies=copies,
        baselines={"sdpa bf16": _sdpa(dense, enable_gqa=True)},
    )  # fmt: skip


def _rings_case(tokens: int, density: int, bits: tuple[int, int]) -> Case:
    """Spans of a quarter, one and 2.75 times the mean: 1/``density`` of the tokens."""
    heads, kv_heads, dim = LLAMA
    mean = tokens // density
    window = [mean // 4 - 64, mean - 64, min(tokens, 11 * mean // 4) - 64, mean // 4 - 64]
    draw = Cases("cuda", BF16)
    whole = ((1, heads, kv_heads, dim), bits, window, [64], [tokens])
    first = draw.decode_attention_cache(*whole)
    size = sum(t.nbytes for t in first[1:7] if t is not None)
    copies = copies_for(size)
    sets = [first] + [draw.decode_attention_cache(*whole) for _ in range(copies - 1)]
    sizes = (1, heads, kv_heads, tokens, dim)
    dense = [(draw.normal(1, heads, 1, dim), *draw.qkv(*sizes)[1:]) for _ in range(copies)]
    slots = first[1].shape[1]
    return Case(
        f"decode rings k{bits[0]} v{bits[1]} s{tokens} 1/{density}", _calls("decode_attention_cache", sets),
        functools.partial(reference.decode_attention_cache, *first),
        size, 4.0 * heads // kv_heads * slots * dim, copies=copies,
        baselines={"sdpa dense": _sdpa(dense, enable_gqa=True)},
    )  # fmt: skip


def _spans_case(tokens: int) -> Case:
    heads, kv_heads, dim = LLAMA
    window, sink = [tokens // 16, tokens // 8, tokens // 8, tokens // 2], 64
    arguments = Cases("cuda", BF16).attention_spans((1, heads, kv_heads, tokens, dim), window, [sink])
    seen = 0
    position = torch.arange(1, tokens + 1)
    for w in arguments[3].tolist():
        seen += int((position.clamp_max(w) + (position - w).clamp(0, sink)).sum())
    sets = [arguments]
    return Case(
        f"prefill spans s{tokens} {window}", _calls("attention_spans", sets), None,
        _moved(arguments), 4.0 * dim * seen,
        baselines={"sdpa causal": _sdpa(sets, is_causal=True, enable_gqa=True)},
    )  # fmt: skip


def _moved(arguments: Arguments) -> float:
    """Bytes of q, k, v and a result like q."""
    return float(2 * arguments[0].nbytes + arguments[1].nbytes + arguments[2].nbytes)


def _window_case(name: str, half_window: list[int], mode: list[int]) -> Case:
    batch, heads, _, tokens, dim = FLUX
    arguments = Cases("cuda", BF16).attention_window_residual(FLUX, half_window, mode, TEXT)
    near = [min(tokens * tokens, _window_pairs(tokens, w, TEXT)) for w in half_window]
    pairs = {0: lambda w: tokens**2, 1: lambda w: tokens**2, 2: lambda w: w, 3: lambda w: 0}
    done = sum(pairs[mode[h % len(mode)]](near[h % len(near)]) for h in range(heads))
    sets = [arguments]
    return Case(
        f"dit {name}", _calls("attention_window_residual", sets), None,
        _moved(arguments) + 2 * arguments[0].nbytes, 4.0 * batch * dim * done,
        baselines={"sdpa full": _sdpa(sets)},
    )  # fmt: skip


def _window_pairs(tokens: int, half_window: int, prefix: int) -> int:
    """Pairs of query and key that the window and the text's arrow leave."""
    mask = window_mask(torch.tensor([half_window], device="cuda"), prefix, tokens)
    return int(mask.sum())


def _sparse_case(block: int, density: float) -> Case:
    batch, _, _, _, dim = VIDEO
    arguments = Cases("cuda", BF16).attention_block_sparse(VIDEO, block, density)
    plain = (*arguments[:6], None, None)
    return Case(
        f"block sparse {block} density {density}", _calls("attention_block_sparse", [arguments]), None,
        _moved(arguments), 4.0 * batch * dim * block * block * arguments[4].numel(),
        baselines={
            "sdpa full": _sdpa([arguments]),
            "without reordering": _calls("attention_block_sparse", [plain]),
        },
    )  # fmt: skip


def _quantize_case() -> Case:
    _, kv_heads, dim = LLAMA
    x = Cases("cuda", BF16).normal(1, kv_heads, 65536, dim)
    moved = x.nbytes + x.numel() * 0.5 + x.numel() / dim * 8
    return Case("kv_quantize int4 s65536", _calls("kv_quantize", [(x, 4)]), None, moved, 0.0)
