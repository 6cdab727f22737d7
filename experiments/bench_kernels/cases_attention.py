"""Attention: quantized caches and spans at decode; spans, windows and block sparsity over whole sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cases_linear import copies
from cases_other import implementation, random
from compare import Call, Case, Variant

from autocomp.kernels import attention_reference as reference
from autocomp.kernels.attention_diffusion_reference import block_mask, window_mask
from autocomp.kernels.library import OPERATORS

HEADS, KV_HEADS, DIM = 32, 8, 128
SDPA, MASKED = "bf16 SDPA", "bf16 SDPA with mask"
SLOW = 5.0  # seconds for sequences whose dense attention takes over a tenth of a second
FLEX = False
"""Whether to time ``flex_attention`` too; its compilation takes up to a minute a mask."""
Tensor = torch.Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one token with each group of query heads as one small matrix: reads the cache once."""
    b, kv_heads, _, dim = k.shape
    queries = q.reshape(b, kv_heads, -1, dim)
    weights = torch.softmax((queries @ k.transpose(-1, -2) * dim**-0.5).float(), dim=-1).to(q.dtype)
    return (weights @ v).reshape(q.shape)


def ours(name: str, turns: list[tuple[Any, ...]], **cost: Any) -> dict[str, Variant]:
    """The operator's variant on these argument lists; nothing where only its reference would run."""
    found = implementation(name, *turns[0])
    if not found:
        return {}
    calls: list[Call] = [partial(OPERATORS[name], *turn) for turn in turns]
    return {f"ours ({found})": Variant(calls, ours=True, **cost)}


def _caches(tokens: int) -> list[tuple[Tensor, Tensor]]:
    k, v = (random(1, KV_HEADS, tokens, DIM, seed=s) for s in (1, 2))
    return [(k.clone(), v.clone()) for _ in range(copies(4 * k.numel()))]


def _dense_decode(q: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Variant]:
    moved, flops = 4.0 * pairs[0][0].numel(), 4.0 * q.numel() * pairs[0][0].shape[2]
    calls = {"bf16 bmm": grouped, SDPA: sdpa}  # the better baseline first: SDPA is far from the floor here
    return {
        name: Variant([partial(call, q, k, v) for k, v in pairs], bytes=moved, flops=flops)
        for name, call in calls.items()
    }


def kv(quick: bool) -> Iterator[Case]:
    """One new token over a cache of 8 or 4 bits, 32 query and 8 key heads of 128."""
    q = random(1, HEADS, 1, DIM)
    for tokens in (1024,) if quick else (1024, 4096, 8192):
        pairs = _caches(tokens)
        variants = _dense_decode(q, pairs)
        lengths = torch.full((1,), tokens, dtype=torch.int32)
        for bits in (8, 4):
            k, v = (reference.kv_quantize(t, bits) for t in pairs[0])
            one = sum(t.numel() * t.element_size() for t in (*k, *v))
            turns = [
                (q, *(t.clone() for t in (*k, *v)), lengths, bits, bits, DIM**-0.5)
                for _ in range(copies(one))
            ]
            found = ours("decode_attention_kv", turns, bytes=float(one), flops=4.0 * q.numel() * tokens)
            variants |= {f"{name.replace('ours', f'ours int{bits}')}": v for name, v in found.items()}
        yield Case(f"S={tokens}", variants)


def spans_decode(quick: bool) -> Iterator[Case]:
    """One new token after 4096 when heads keep an eighth of the tokens: all the same, or each its own; in
    bfloat16, or with keys of 8 and values of 4 bits."""
    del quick
    tokens, sink = 4096, 32
    q, pairs = random(1, HEADS, 1, DIM), _caches(tokens)
    even = [tokens // 8 - sink] * KV_HEADS
    spread = [96, 96, 224, 224, 480, 480, 992, 1248]  # with the sinks an eighth of the tokens too
    for name, window in (("even", even), ("spread", spread)):
        sizes = torch.tensor([w + sink for w in window])
        start = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        slots = int(start[-1])
        variants = _dense_decode(q, pairs)
        if name == "even":
            short = [
                (k[:, :, : slots // KV_HEADS].clone(), v[:, :, : slots // KV_HEADS].clone()) for k, v in pairs
            ]
            variants["bf16 bmm, cut cache"] = _dense_decode(q, short)["bf16 bmm"]
        rings = [tuple(random(1, slots, DIM, seed=s) for s in (1, 2)) for _ in range(copies(4 * slots * DIM))]
        spans = (torch.tensor(window, dtype=torch.int32), torch.full((KV_HEADS,), sink, dtype=torch.int32))
        flops, length = 4.0 * slots * DIM * HEADS / KV_HEADS, torch.tensor([tokens], dtype=torch.int32)
        for bits in ((16, 16), (8, 4)):
            turns = []
            for pair in rings:
                k, v = (reference.cache_entries(t, n, t.dtype) for t, n in zip(pair, bits))
                turns.append((q, k[0], v[0], *k[1:], *v[1:], start, *spans, length, *bits, DIM**-0.5))
            moved = sum(t.nbytes for t in turns[0][1:7] if t is not None)
            found = ours("decode_attention_cache", turns, bytes=float(moved), flops=flops)
            label = "ours" if bits == (16, 16) else "ours k8 v4"
            variants |= {named.replace("ours", label): v for named, v in found.items()}
        yield Case(f"S={tokens}, {slots / KV_HEADS / tokens:.3f} kept, {name}", variants)


def _whole(tokens: int, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (random(1, heads, tokens, dim, seed=s) for s in range(3))
    return q, k, v


def _cost(heads: int, tokens: int, dim: int, density: float) -> dict[str, float]:
    """Four activations moved; two products over the share ``density`` of all pairs of tokens."""
    return {"bytes": 8.0 * heads * tokens * dim, "flops": 4.0 * heads * dim * tokens**2 * density}


def _whole_case(
    name: str,
    inputs: tuple[Tensor, ...],
    mask: Tensor | None,
    causal: bool,
    density: float,
    found: dict[str, Variant],
) -> Case:
    """Dense attention, dense with a mask (where one fits in memory), flex if asked for, and ours."""
    q = inputs[0]
    _, heads, tokens, dim = q.shape
    dense = _cost(heads, tokens, dim, 0.5 if causal else 1.0)
    variants = {SDPA: Variant([partial(sdpa, *inputs, is_causal=causal)], **dense)}
    if mask is not None:
        variants[MASKED] = Variant([partial(sdpa, *inputs, attn_mask=_additive(mask))], **dense)
        if FLEX:
            cost = _cost(heads, tokens, dim, density)
            variants["flex_attention compiled"] = Variant([_flex(inputs, mask)], **cost)
    return Case(name, variants | found, SLOW if tokens >= 4096 else 0.0)


def _additive(mask: Tensor) -> Tensor:
    """The form that SDPA takes without converting it at each call."""
    return torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, -torch.inf)


def _flex(inputs: tuple[Tensor, ...], mask: Tensor) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    heads, tokens = inputs[0].shape[1], mask.shape[-1]
    table = mask.expand(heads, -1, -1).contiguous()

    def seen(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return table[head, i, j]

    blocks = create_block_mask(seen, None, heads, tokens, tokens, device="cpu")
    # With dynamic shapes the C++ that torch 2.13 writes for several lengths in a process doesn't compile.
    return partial(torch.compile(flex_attention, dynamic=False), *inputs, block_mask=blocks)


def spans(quick: bool) -> Iterator[Case]:
    """A causal prompt, 8 heads of 64: a window of 256 for all heads, or 128 to everything by head."""
    heads, dim, sink = 8, 64, 64
    for tokens in (2048,) if quick else (2048, 4096, 8192):
        for name, widths in (
            ("window 256", [256] * heads), ("by head", [128, 256, 256, 512, 512, 512, 1024, tokens]),
        ):  # fmt: skip
            inputs = _whole(tokens, heads, dim)
            window = torch.tensor(widths, dtype=torch.int32)
            sinks = torch.full_like(window, sink)
            pairs = sum(int((torch.arange(1, tokens + 1)).clamp(max=w + sink).sum()) for w in widths)
            density = pairs / (heads * tokens**2)
            mask = None
            if (
                tokens <= 4096
            ):  # a mask takes bytes with the square, and dense attention under one loses anyway
                alike = 1 if name == "window 256" else heads
                mask = reference.spans_mask(window[:alike], sinks[:alike], tokens)
            turns = [(*inputs, window, sinks, dim**-0.5)]
            found = ours("attention_spans", turns, **_cost(heads, tokens, dim, density))
            yield _whole_case(
                f"S={tokens} {name} ({2 * density:.2f} dense)", inputs, mask, True, density, found
            )


def window_residual(quick: bool) -> Iterator[Case]:
    """Joint image and text attention, 4 heads of 64, 64 text tokens: what DiTFastAttn saves in a step."""
    heads, dim, prefix = 4, 64, 64
    for tokens in (1088,) if quick else (1088, 4160):
        inputs = _whole(tokens, heads, dim)
        residual = random(1, heads, tokens, dim, seed=4)
        half = torch.full((heads,), tokens // 16, dtype=torch.int32)
        mask = window_mask(half[:1], prefix, tokens)
        density = float(mask.float().mean())
        add = [2] * heads
        mixed = [(2, 2, 2, 3)[h % 4] for h in range(heads)]
        save = [1] * heads
        kinds = (("window", add, density), ("window, 1/4 reused", mixed, 0.75 * density), ("save", save, 1.0))
        for name, modes, work in kinds:
            mode = torch.tensor(modes, dtype=torch.int32)
            turns = [(*inputs, half, prefix, residual, mode)]
            found = ours("attention_window_residual", turns, **_cost(heads, tokens, dim, work))
            case = _whole_case(f"S={tokens} {name} ({work:.2f} dense)", inputs, mask, False, work, found)
            if name == "save":  # without one pass for both: full, window, difference
                case = _with_two_passes(case, inputs, mask)
            yield case


def _with_two_passes(case: Case, inputs: tuple[Tensor, ...], mask: Tensor) -> Case:
    near = _additive(mask)

    def save() -> tuple[Tensor, Tensor]:
        full = sdpa(*inputs)
        return full, full - sdpa(*inputs, attn_mask=near)

    variants = dict(case.variants)
    variants["bf16 SDPA twice"] = dataclasses.replace(variants.pop(MASKED), calls=[save])
    variants = {
        n: dataclasses.replace(v, rivals=("bf16 SDPA twice",)) if v.ours else v for n, v in variants.items()
    }
    return dataclasses.replace(case, variants=variants)


def block_sparse(quick: bool) -> Iterator[Case]:
    """Bidirectional attention on blocks of 64, 4 heads of 64, by density; tokens reordered by head or not."""
    heads, dim, block, tokens = 4, 64, 64, 1024 if quick else 4096
    inputs = _whole(tokens, heads, dim)
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(heads)]).int()
    for density in (0.25,) if quick else (0.5, 0.25, 0.12):
        row_ptr, col = _pattern(heads, tokens // block, density, generator)
        mask = block_mask(row_ptr, col, block, tokens)
        real = col.numel() * block**2 / (heads * tokens**2)
        cost = _cost(heads, tokens, dim, real)
        found: dict[str, Variant] = {}
        for label, permutation in (("", None), (", reordered", order)):
            turns = [(*inputs, row_ptr, col, block, permutation)]
            named = ours("attention_block_sparse", turns, **cost)
            found |= {name.replace("ours", f"ours{label}"): v for name, v in named.items()}
        yield _whole_case(f"S={tokens} ({real:.2f} dense)", inputs, mask, False, real, found)


def _pattern(heads: int, blocks: int, density: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random blocks with the diagonal, the same number in every row: ``row_ptr [H, nb + 1]`` and ``col``."""
    count = max(1, round(density * blocks))
    score = torch.rand(heads, blocks, blocks, generator=generator) + 2 * torch.eye(blocks)
    col = score.topk(count, dim=-1).indices.sort(dim=-1).values.flatten().int()
    row_ptr = torch.arange(heads * blocks + 1, dtype=torch.int32) * count
    starts = torch.arange(heads).unsqueeze(1) * blocks + torch.arange(blocks + 1)
    return row_ptr[starts], col
