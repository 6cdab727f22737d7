"""``moe_grouped_linear`` in Triton: one launch for each class of experts (bits, group) over a shared output.

Few pairs of (token, expert) are multiplied one by one. Many are sorted by expert, on the device and without
waiting for it, and cut into blocks of one expert each; the number of blocks is bounded by the shapes alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from autocomp.kernels.experts import GroupedWeights, register_layout
from autocomp.kernels.library import Implementation
from autocomp.kernels.moe import (
    CANONICAL,
    Pools,
    Tensors,
    combine,
    moe_grouped_linear,
    places,
    problem,
    reference,
)
from autocomp.kernels.ops import random_weight
from autocomp.kernels.triton.launch import FP_FUSION, INTERPRETED, disagreement, power_of_two, unavailable
from autocomp.kernels.triton.linear import PLANES, block_features, pack_plane, padded_row
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

LAYOUT = "triton"
DEVICE = "cpu" if INTERPRETED else "cuda"
FEW_PAIRS = 32
"""Up to here every pair is a block of its own; with more, those of one expert share a read of its weight."""


@functools.cache
def _kernels() -> ModuleType:
    from autocomp.kernels.triton import moe_kernels

    return moe_kernels


class TritonLayout:
    """Pools as ``experts_kernel`` reads them: codes int32 ``[P, words]``, scale and zero ``[P, G, N]``; dense
    pools ``[P, N, K]``."""

    name = LAYOUT
    device_type = DEVICE

    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str:
        if unavailable():
            return unavailable()
        if not scheme.is_dense and scheme.group % 32:
            return f"it needs groups in multiples of 32 (or of a row); got {scheme.label}"
        return "" if 1 <= math.prod(shape) < 2**32 else f"it needs 1 to 2**32 - 1 weights; got {shape}"

    def pools(self, experts: Sequence[QuantizedTensor | torch.Tensor], device: torch.device) -> Pools:
        none = torch.empty(0, dtype=torch.uint8, device=device)
        packed = [e for e in experts if isinstance(e, QuantizedTensor)]
        if not packed:
            dense = [e for e in experts if isinstance(e, torch.Tensor)]
            return torch.stack(dense).to(device).contiguous(), none, none
        codes = torch.stack([_words(e, device) for e in packed])
        scale = torch.stack([e.scale.T for e in packed]).to(device)
        zero = [e.zero.T for e in packed if e.zero is not None]
        return codes, scale.contiguous(), torch.stack(zero).to(device).contiguous() if zero else none


def _words(weight: QuantizedTensor, device: torch.device) -> torch.Tensor:
    """All words of one expert, low part first, int32 ``[words]``."""
    (low, high), block = PLANES[weight.scheme.bits], block_features(weight.scheme.group)
    codes = weight.codes.to(device)
    planes = [pack_plane(codes & (2**low - 1), low, block)]
    if high:
        planes.append(pack_plane(codes >> low, high, block))
    return torch.cat([plane.reshape(-1) for plane in planes])


def grouped_linear(
    x: torch.Tensor,
    expert: torch.Tensor,
    route_weight: torch.Tensor | None,
    remap: torch.Tensor,
    codes: Tensors,
    scale: Tensors,
    zero: Tensors,
    bits: Sequence[int],
    group: Sequence[int],
    rows: int,
    layout: str = LAYOUT,
) -> torch.Tensor:
    dtype = x.dtype
    x = x.float() if INTERPRETED and dtype is torch.bfloat16 else x.contiguous()
    expert = expert.contiguous()
    y = torch.zeros(
        expert.numel(), rows, dtype=x.dtype if route_weight is None else torch.float32, device=x.device
    )
    few = expert.numel() <= FEW_PAIRS
    place = None if few else places(expert, remap)
    for c in range(len(codes)):
        blocks = None if place is None else _blocks(place[c], len(codes[c]))
        _launch(x, expert, remap[c], codes[c], scale[c], zero[c], bits[c], group[c], y, blocks)
    return combine(y, expert, route_weight, dtype)


def block_height(pairs: int, pool: int) -> int:
    """Pairs in a block: about as many as an expert gets."""
    return power_of_two(math.ceil(pairs / pool), 8, 64)


def _blocks(place: torch.Tensor, pool: int) -> tuple[torch.Tensor, ...]:
    """Cut the pairs into blocks that share a place.

    Args:
        place: int64 ``[pairs]`` in ``-1 .. pool - 1``.

    Returns:
        ``order`` (pairs sorted by place), and for each of ``pool + pairs // height`` blocks its first
        position in ``order``, the end of its place there, and its place (-1: block left over). int32.
    """
    height = block_height(len(place), pool)
    ordered, order = torch.sort(place, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(pool + 1, device=place.device))
    blocks = (starts.diff() + height - 1) // height
    ends = blocks.cumsum(0)
    b = torch.arange(pool + len(place) // height, device=place.device)
    owner = torch.searchsorted(ends, b, right=True)
    used = owner < pool
    owner = owner.clamp_max(pool - 1)
    first = starts[owner] + (b - ends[owner] + blocks[owner]) * height
    owner_or_none = torch.where(used, owner, -1)
    return tuple(t.to(torch.int32) for t in (order, first, starts[owner + 1], owner_or_none))


def _launch(
    x: torch.Tensor,
    expert: torch.Tensor,
    remap: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    group: int,
    y: torch.Tensor,
    blocks: tuple[torch.Tensor, ...] | None,
) -> None:
    pairs, rows = y.shape
    columns = x.shape[1]
    low, high = PLANES.get(bits, (16, 0))
    block = block_features(group)
    width = group or padded_row(columns)
    words = codes[0].numel() if len(codes) else 0
    order, first, end, place = blocks if blocks is not None else (None, None, None, None)
    count = pairs if place is None else len(place)
    if not (count and words and rows):
        return
    _kernels().experts_kernel[(math.ceil(rows / 64), count)](
        x, codes, scale, zero if zero.numel() else None, y, expert, remap, order, first, end, place,
        pairs, len(remap), rows, columns, width, math.ceil(columns / width), words,
        math.ceil(columns / block) * rows * block * low // 32, 1 if len(x) == pairs else expert.shape[1],
        LOW=low, HIGH=high, KB=block, ASM=not INTERPRETED,
        BM=8 if blocks is None else block_height(pairs, len(codes)), BN=64,
        BK=128 if block == 64 and width % 128 == 0 and bits <= 8 else block, num_warps=4, num_stages=3,
        **FP_FUSION,
    )  # fmt: skip


def _supports(
    x: torch.Tensor,
    expert: torch.Tensor,
    route_weight: torch.Tensor | None,
    remap: torch.Tensor,
    codes: Tensors,
    scale: Tensors,
    zero: Tensors,
    bits: Sequence[int],
    group: Sequence[int],
    rows: int,
    layout: str = "canonical",
) -> str:
    if layout != LAYOUT:
        return f"it runs experts packed as {LAYOUT!r}, not {layout!r}"
    return problem(x, expert, route_weight, remap, codes, scale, zero, bits, group, rows, layout)


def _check() -> str:
    """Two classes of experts on the device, pair by pair and sorted, against the reference."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(2, 40, 96, generator=generator) / 10
    weights: list[QuantizedTensor | torch.Tensor] = [dense[0], dense[1]]
    weights += [random_weight(Scheme(3, 32, symmetric=False), (40, 96), seed) for seed in (1, 2)]
    for tokens in (4, 40):
        x = torch.randn(tokens, 96, generator=generator).to(DEVICE, torch.bfloat16)
        chosen = torch.randint(0, 4, (tokens, 2), generator=generator).to(DEVICE)
        ours, wanted = (
            GroupedWeights.build(weights, device=DEVICE, layout=name) for name in (LAYOUT, CANONICAL)
        )
        problem = disagreement(
            grouped_linear(x, chosen, None, *_operands(ours)), reference(x, chosen, None, *_operands(wanted))
        )
        if problem:
            return problem
    return ""


def _operands(weights: GroupedWeights) -> tuple[Any, ...]:
    pools = (weights.codes, weights.scale, weights.zero, weights.bits, weights.group)
    return (weights.remap, *pools, weights.shape[0], weights.layout)


def register() -> None:
    """Make this the first choice on CUDA, and its layout the one that experts are packed in."""
    register_layout(TritonLayout())
    moe_grouped_linear.register(
        Implementation(LAYOUT, DEVICE, grouped_linear, unavailable, _supports, _check)
    )
