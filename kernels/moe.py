"""Linears of a mixture of experts: every row goes through the weight of the expert that it was routed to.

Experts are held in pools, one a class: a number of bits, a group size, with or without zero points. ``remap``
says where each expert lies, so that merged experts share one place and pruned ones have none, and a router
needs no change (arXiv 2407.00945 prunes and merges experts, arXiv 2410.06270 gives them different bits).

``moe_grouped_linear(x, expert, route_weight, remap, codes, scale, zero, bits, group, rows, layout)``:

- ``x``: float ``[T, K]``, one row a token (gate and up), or ``[T * top_k, K]``, one row for each pair of a
  token and a chosen expert (down), in the order token, choice. bfloat16, float16 or float32, any strides.
- ``expert``: int32 or int64 ``[T, top_k]``. A number outside of ``0 .. E - 1`` stands for no expert.
- ``route_weight``: float ``[T, top_k]``, or ``None``.
- ``remap``: int32 ``[C, E]``: the place of expert ``e`` in pool ``c``, or -1; one ``c`` an expert at most. An
  expert that is in no pool contributes zeros.
- ``codes``, ``scale``, ``zero``: a tensor for each class. In the layout ``canonical``, for ``P`` places:
  codes int32 ``[P, N, ceil(K * bits / 32)]`` (``kernels/packing.py``), scale float ``[P, N, G]``, zero uint8
  ``[P, N, G]`` or an empty tensor for ``2^(bits-1)``. Dense classes have bits 16, the weight ``[P, N, K]``
  in any float dtype as codes, and empty scale and zero. Other layouts belong to one implementation.
- ``bits``, ``group``: of each class; group 0 is the whole row, the last group may be short.
- ``rows``: N.

It gives ``[T * top_k, N]`` without ``route_weight``; with it ``[T, N]``, the weighted sum over a token's
experts; in the dtype of ``x``, summed in float32. Inference only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autocomp.kernels.activations_reference import FLOATS, dequantize, refuse
from autocomp.kernels.library import Operator
from autocomp.kernels.packing import packed_words, unpack

CANONICAL = "canonical"
Tensors = Sequence[torch.Tensor]
Pools = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def problem(
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
    layout: str = CANONICAL,
) -> str:
    """What is wrong with the arguments; empty when nothing is. Pools of other layouts aren't looked into."""
    classes = len(codes)
    if x.ndim != 2 or x.dtype not in FLOATS or x.shape[1] == 0:
        return f"x must be [T, K] or [T * top_k, K] in bfloat16, float16 or float32; got {_told(x)}"
    if expert.ndim != 2 or expert.dtype not in (torch.int32, torch.int64):
        return f"expert must be int32 or int64 [T, top_k]; got {_told(expert)}"
    if len(x) not in (expert.shape[0], expert.numel()):
        return f"x must have a row a token or a row a pair of expert {list(expert.shape)}; got {len(x)} rows"
    if route_weight is not None and route_weight.shape != expert.shape:
        return f"route_weight must be float {list(expert.shape)} or None; got {_told(route_weight)}"
    if remap.ndim != 2 or len(remap) != classes or remap.dtype != torch.int32:
        return f"remap must be int32 [{classes} classes, E]; got {_told(remap)}"
    if not len(scale) == len(zero) == len(bits) == len(group) == classes:
        told = [len(part) for part in (codes, scale, zero, bits, group)]
        return f"codes, scale, zero, bits and group need one entry a class; got {told}"
    if layout == CANONICAL:
        for pools in zip(codes, scale, zero, bits, group):
            if found := _pool_problem(*pools, shape=(rows, x.shape[1])):
                return found
    return ""


def _pool_problem(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    group: int,
    shape: tuple[int, int],
) -> str:
    rows, columns = shape
    if bits == 16:
        fits = codes.is_floating_point() and codes.shape[1:] == shape
        return "" if fits else f"a dense pool must be float [P, {rows}, {columns}]; got {_told(codes)}"
    if not 1 <= bits <= 8 or group < 0:
        return f"a class needs bits 1 to 8, or 16, and a group of 0 or more; got bits {bits}, group {group}"
    wanted = (rows, packed_words(columns, bits))
    if codes.dtype != torch.int32 or codes.shape[1:] != wanted:
        return f"codes of {bits} bits must be int32 [P, {wanted[0]}, {wanted[1]}]; got {_told(codes)}"
    grouped = (len(codes), rows, -(-columns // group) if group else 1)
    if scale.shape != grouped or not scale.is_floating_point():
        return f"scale must be float {list(grouped)} for groups of {group}; got {_told(scale)}"
    if zero.numel() and (zero.shape != grouped or zero.dtype != torch.uint8):
        return f"zero must be uint8 {list(grouped)} or empty; got {_told(zero)}"
    return ""


def _told(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def places(expert: torch.Tensor, remap: torch.Tensor) -> torch.Tensor:
    """Where each pair's weight lies: int64 ``[C, T * top_k]``, the place in pool ``c`` or -1."""
    flat = expert.reshape(-1).long()
    count = remap.shape[1]
    if count == 0:
        return flat.new_full((len(remap), len(flat)), -1)
    known = (flat >= 0) & (flat < count)
    return torch.where(known, remap[:, flat.clamp(0, count - 1)].long(), -1)


def rows_of_pairs(x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """Which row of ``x`` each pair multiplies, int64 ``[T * top_k]``."""
    pairs = torch.arange(expert.numel(), device=expert.device)
    return pairs if len(x) == expert.numel() else pairs // expert.shape[1]


def combine(
    y: torch.Tensor, expert: torch.Tensor, route_weight: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The result from float32 products ``y [T * top_k, N]``."""
    if route_weight is None:
        return y.to(dtype)
    weighted = y.view(*expert.shape, y.shape[1]) * route_weight.float().unsqueeze(2)
    return weighted.sum(dim=1).to(dtype)


def reference(
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
    layout: str = CANONICAL,
) -> torch.Tensor:
    """A loop over the places of every pool, in float32 on the dequantized weights."""
    refuse(problem(x, expert, route_weight, remap, codes, scale, zero, bits, group, rows, layout))
    if layout != CANONICAL:
        raise ValueError(f"these experts are packed as {layout!r}, which can't run here: build them again")
    y = x.new_zeros(expert.numel(), rows, dtype=torch.float32)
    source = rows_of_pairs(x, expert)
    for c, place in enumerate(places(expert, remap)):
        for p in place.unique().tolist():
            if p >= 0:
                pairs = (place == p).nonzero().squeeze(1)
                weight = pool_weight(codes[c][p], scale[c], zero[c], bits[c], group[c], p, x.shape[1])
                y[pairs] = x[source[pairs]].float() @ weight.T
    return combine(y, expert, route_weight, x.dtype)


def pool_weight(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    group: int,
    place: int,
    columns: int,
) -> torch.Tensor:
    """Weight float32 ``[N, K]`` at a place of a canonical pool, of which ``codes`` are already taken."""
    if bits == 16:
        return codes.float()
    middle = zero[place] if zero.numel() else None
    return dequantize(unpack(codes, bits, columns), scale[place], middle, bits, group).float()


def _fake(
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
    layout: str = CANONICAL,
) -> torch.Tensor:
    refuse(problem(x, expert, route_weight, remap, codes, scale, zero, bits, group, rows, layout))
    return x.new_empty(expert.numel() if route_weight is None else expert.shape[0], rows)


moe_grouped_linear = Operator(
    "moe_grouped_linear(Tensor x, Tensor expert, Tensor? route_weight, Tensor remap, Tensor[] codes, "
    "Tensor[] scale, Tensor[] zero, int[] bits, int[] group, int rows, str layout='canonical') -> Tensor",
    reference,
    _fake,
)
