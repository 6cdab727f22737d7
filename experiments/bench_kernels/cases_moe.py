"""Mixtures of experts: one projection of all experts a token is routed to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from cases_other import implementation, random
from compare import Call, Case, Variant

from autocomp.kernels import ops
from autocomp.kernels.experts import GroupedWeights
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

EXPERTS, CHOSEN, SHAPE = 64, 8, (1024, 2048)
ROUTINGS = 8  # different ones take turns, so that experts come out of memory at few tokens
MIXED = ("w4g64", "w4g64", "w3g64", "w2g64")
Tensor = torch.Tensor


def cases(quick: bool) -> Iterator[Case]:
    """A projection of 64 experts of 1024x2048, 8 a token: in one width, in several, or merged in pairs."""
    dense = torch.stack([random(*SHAPE, seed=e) / SHAPE[1] ** 0.5 for e in range(EXPERTS)])
    ours = {
        "w16": _grouped(list(dense)),
        "w4g64": _grouped(_packed(["w4g64"] * EXPERTS)),
        "w4/w3/w2": _grouped(_packed([MIXED[e % 4] for e in range(EXPERTS)])),
        "w4g64, 32 merged": _grouped(_packed(["w4g64"] * (EXPERTS // 2)), [e // 2 for e in range(EXPERTS)]),
    }
    widths = {"w16": ("w16",), "w4/w3/w2": MIXED}
    for tokens in (4,) if quick else (1, 16, 256):
        x = random(tokens, SHAPE[1], seed=1)
        routes = [_route(tokens, seed) for seed in range(ROUTINGS)]
        variants = {
            "bf16 loop of F.linear": _variant(
                [partial(_loop, x, r, dense) for r in routes], routes, ("w16",)
            ),
            "bf16 F.grouped_mm": _variant(
                [partial(_torch_grouped, x, r, dense) for r in routes], routes, ("w16",)
            ),
        }
        for name, weights in ours.items():
            found = implementation("moe_grouped_linear", *_arguments(weights, x, routes[0]))
            if found:
                used = [r // 2 for r in routes] if "merged" in name else routes
                calls = [partial(weights, x, r) for r in routes]
                variants[f"ours {name} ({found})"] = _variant(calls, used, widths.get(name, ("w4g64",)), True)
        yield Case(f"T={tokens}", variants)


def _packed(labels: Sequence[str]) -> list[QuantizedTensor]:
    return [ops.random_weight(Scheme.parse(label), SHAPE, seed=e) for e, label in enumerate(labels)]


def _grouped(weights: list[Tensor] | list[QuantizedTensor], place: list[int] | None = None) -> GroupedWeights:
    return GroupedWeights.build(weights, place)


def _arguments(weights: GroupedWeights, x: Tensor, expert: Tensor) -> tuple[object, ...]:
    w = weights
    pools = (list(w.codes), list(w.scale), list(w.zero), list(w.bits), list(w.group))
    return (x, expert, None, w.remap, *pools, w.shape[0], w.layout)


def _route(tokens: int, seed: int) -> Tensor:
    """Experts of each token, int32 ``[T, CHOSEN]``, all alike probable."""
    score = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return score.topk(CHOSEN).indices.int()


def _variant(calls: list[Call], routes: list[Tensor], labels: Sequence[str], ours: bool = False) -> Variant:
    """Costs: the experts that are used, on average, at the mean width; all pairs' arithmetic."""
    rows, columns = SHAPE
    active = sum(len(r.unique()) for r in routes) / len(routes)
    one = sum(Scheme.parse(label).weight_bytes(rows, columns) for label in labels) / len(labels)
    pairs = routes[0].numel()
    moved = active * one + 2 * (len(routes[0]) * columns + pairs * rows)
    return Variant(calls, ours=ours, bytes=moved, flops=2.0 * pairs * rows * columns)


def _loop(x: Tensor, expert: Tensor, weights: Tensor) -> Tensor:
    """As in plain models: for every expert that is used, its tokens through its linear."""
    flat = expert.flatten()
    y = x.new_empty(len(flat), SHAPE[0])
    for e in flat.unique().tolist():
        pairs = (flat == e).nonzero().squeeze(1)
        y[pairs] = F.linear(x[pairs // CHOSEN], weights[e])
    return y


def _torch_grouped(x: Tensor, expert: Tensor, weights: Tensor) -> Tensor:
    """Sort the pairs by expert, one grouped product, and sort back."""
    flat = expert.flatten()
    order = flat.argsort()
    ends = torch.bincount(flat, minlength=EXPERTS).cumsum(0).int()
    y = x.new_empty(len(flat), SHAPE[0])
    y[order] = F.grouped_mm(x[order // CHOSEN], weights.transpose(1, 2), offs=ends)
    return y
