"""8-bit activations, the low-rank correction, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cases_linear import BF16, Shape, copies, dense
from compare import Call, Case, Variant

from autocomp.kernels import ops
from autocomp.kernels.library import OPERATORS
from autocomp.kernels.packing import pack
from autocomp.quantize.scheme import Scheme

GROUP = 64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal bfloat16 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def implementation(name: str, *args: Any) -> str:
    """What runs the operator on these arguments; empty when only its reference would, or nothing."""
    operator = OPERATORS.get(name)
    found = operator.choose(*args) if operator else "reference"
    return "" if found == "reference" else found


def activations(quick: bool) -> Iterator[Case]:
    """Weights and activations of 8 bits, or 4 and 8, against bfloat16 and torch's parts put together."""
    for shape in ((2048, 2048),) if quick else ((2048, 2048), (4096, 4096)):
        makers = (_w8a8_eager(shape), _operator("linear_w8a8", shape, _w8a8(shape), 1.0),
                  _operator("linear_w4a8", shape, _w4a8(shape), 0.5 + 2 / GROUP),
                  _operator("linear_fp8", shape, _fp8(shape), 1.0))  # fmt: skip
        weights = dense(shape)
        for tokens in (128,) if quick else (1, 128, 512):
            x = random(tokens, shape[1])
            variants = {
                BF16: Variant([partial(F.linear, x, w) for w in weights], **_cost(tokens, shape, 2.0))
            }
            for make in makers:
                variants |= make(x)
            yield Case(f"{shape[0]}x{shape[1]} M={tokens}", variants)


def _cost(tokens: int, shape: Shape, weight_bytes: float) -> dict[str, float]:
    rows, columns = shape
    moved = weight_bytes * rows * columns + 2 * tokens * (rows + columns)
    return {"bytes": moved, "flops": 2.0 * tokens * rows * columns}


def _w8a8(shape: Shape) -> tuple[torch.Tensor, ...]:
    codes = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    return codes, torch.full(shape[:1], 1e-3)


def _w4a8(shape: Shape) -> tuple[Any, ...]:
    weight = ops.random_weight(Scheme(4, GROUP), shape)
    return pack(weight.codes, 4), weight.scale, None, GROUP


def _fp8(shape: Shape) -> tuple[torch.Tensor, ...]:
    return random(*shape).to(torch.float8_e4m3fn), torch.full(shape[:1], 1e-3)


def _clone(weight: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part.clone() if isinstance(part, torch.Tensor) else part for part in weight)


def _operator(name: str, shape: Shape, weight: tuple[Any, ...], weight_bytes: float) -> Any:
    """A function from activations to the operator's variant; it shares the weights among all of them."""
    turns = [_clone(weight) for _ in range(copies(weight_bytes * shape[0] * shape[1]))]

    def make(x: torch.Tensor) -> dict[str, Variant]:
        found = implementation(name, x, *weight)
        if not found:
            return {}
        calls: list[Call] = [partial(OPERATORS[name], x, *turn) for turn in turns]
        peak = "bf16" if name == "linear_fp8" else "int8"
        variant = Variant(calls, ours=True, peak=peak, **_cost(len(x), shape, weight_bytes))
        return {f"ours {name.removeprefix('linear_')} ({found})": variant}

    return make


def _w8a8_eager(shape: Shape) -> Any:
    """What a user writes today: quantize each row, ``torch._int_mm``, scale."""
    weight = _w8a8(shape)
    turns = [_clone(weight) for _ in range(copies(shape[0] * shape[1]))]

    def eager(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(dim=1, keepdim=True).float() / 127
        q = (x / step).round().to(torch.int8)
        return (torch._int_mm(q, codes.T) * step * scale).bfloat16()

    def make(x: torch.Tensor) -> dict[str, Variant]:
        calls: list[Call] = [partial(eager, x, *turn) for turn in turns]
        return {"eager w8a8 (_int_mm)": Variant(calls, peak="int8", **_cost(len(x), shape, 1.0))}

    return make


def low_rank(quick: bool) -> Iterator[Case]:
    """``y + (x a^T) b^T`` with 64 columns beside a 4096x4096 linear."""
    size, rank = 4096, 64
    for tokens in (1,) if quick else (1, 8, 128):
        x, y = random(tokens, size), random(tokens, size, seed=1)
        pairs = [
            (random(rank, size, seed=2), random(size, rank, seed=3)) for _ in range(copies(4 * size * rank))
        ]
        cost = {"bytes": 4.0 * size * rank + 6 * tokens * size, "flops": 4.0 * tokens * size * rank}
        variants = {
            name: Variant([partial(call, x, y, *pair) for pair in pairs], **cost)
            for name, call in {"bf16 two F.linear, add": _low_rank_add, "bf16 addmm": _low_rank_addmm}.items()
        }
        found = implementation("low_rank_add", x, y, *pairs[0])
        if found:
            calls = [partial(OPERATORS["low_rank_add"], x, y, *pair) for pair in pairs]
            variants[f"ours ({found})"] = Variant(calls, ours=True, **cost)
        yield Case(f"4096x4096 r=64 M={tokens}", variants)


def _low_rank_add(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return y + F.linear(F.linear(x, a), b)


def _low_rank_addmm(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm(y, F.linear(x, a), b.T)
