"""Linear layers: packed weights against bfloat16 and torch's own low-bit operators; 8-bit activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from compare import Call, Case, Variant

from autocomp.kernels import ops
from autocomp.kernels.backend import DECODE_TOKENS, WeightState
from autocomp.measure.op_table import COLD_BYTES, MAX_COPIES
from autocomp.quantize.scheme import Scheme

Shape = tuple[int, int]
BF16 = "bf16 F.linear"
SHAPES: tuple[Shape, ...] = ((2048, 2048), (4096, 4096), (576, 576), (1536, 576), (576, 1536), (49152, 576))
LABELS = ("w8g64", "w6g64", "w5g64", "w4g64", "w3g64", "w2g64")
MORE_LABELS = ("w4g128", "w4g64a", "w4g64o0.5")  # at the first shape only
TORCH = {"torch int4": ("torch_int4", "w4g64"), "torch int8": ("torch_int8", "w8")}
OURS = "cpu"


def copies(one: float) -> int:
    """How many copies of something of ``one`` bytes don't fit into the caches together."""
    return int(max(2, min(MAX_COPIES, -(-COLD_BYTES // max(1, int(one))))))


def dense(shape: Shape) -> list[torch.Tensor]:
    """Equal bfloat16 weights, more of them than the caches hold."""
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) / shape[1] ** 0.5).bfloat16()
    return [weight.clone() for _ in range(copies(2 * weight.numel()))]


def packed(backend_name: str, label: str, shape: Shape) -> list[WeightState]:
    """Equal packed weights of one backend; empty when it isn't there or doesn't take the scheme."""
    scheme = Scheme.parse(label)
    backend = next((b for b in ops.backends() if b.name == backend_name), None)
    if (
        backend is None
        or backend.supports(scheme, shape, "cpu", DECODE_TOKENS)
        or ops.self_check(backend, "cpu")
    ):
        return []
    weight = ops.random_weight(scheme, shape)
    return [backend.prepack(weight, torch.device("cpu")) for _ in range(copies(scheme.weight_bytes(*shape)))]


def rivals(bits: int) -> tuple[str, ...]:
    """What could run a weight of ``bits`` otherwise: bfloat16, or torch's operator with enough bits."""
    return (BF16, "torch int4" if bits <= 4 else "torch int8")


class Weights:
    """All forms of one weight, made once and multiplied with several numbers of rows."""

    def __init__(self, shape: Shape, labels: Sequence[str], others: Sequence[str] = tuple(TORCH)) -> None:
        self.shape = shape
        self.dense = dense(shape)
        self.packed = {name: packed(*TORCH[name], shape) for name in others}
        self.packed |= {f"ours {label}": packed(OURS, label, shape) for label in labels}

    def case(self, tokens: int) -> Case:
        rows, columns = self.shape
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
        found = {BF16: self._variant([partial(F.linear, x, w) for w in self.dense], tokens, Scheme(16))}
        for name, states in self.packed.items():
            if states:
                scheme = states[0].scheme
                calls = [partial(ops.linear_wna16, x, state) for state in states]
                variant = self._variant(calls, tokens, scheme)
                if name.startswith("ours"):
                    known = tuple(n for n in rivals(scheme.bits) if n in found)
                    variant = dataclasses.replace(variant, ours=True, rivals=known, peak="int8")
                found[name] = variant
        return Case(f"{rows}x{columns} M={tokens}", found)

    def _variant(self, calls: list[Call], tokens: int, scheme: Scheme) -> Variant:
        rows, columns = self.shape
        moved = scheme.weight_bytes(rows, columns) + 2 * tokens * (rows + columns)
        return Variant(calls, bytes=moved, flops=2.0 * tokens * rows * columns)


def decode(quick: bool) -> Iterator[Case]:
    """Few rows: the weights' bytes decide."""
    for shape in SHAPES[:3:2] if quick else SHAPES:
        labels = LABELS if quick or shape != SHAPES[0] else (*LABELS, *MORE_LABELS)
        weights = Weights(shape, labels)
        for tokens in (1,) if quick else (1, 4, 8):
            yield weights.case(tokens)


def prefill(quick: bool) -> Iterator[Case]:
    """Many rows: arithmetic decides, and 16-bit GEMM is hard to beat."""
    for shape in ((2048, 2048),) if quick else ((2048, 2048), (4096, 4096)):
        weights = Weights(shape, ("w8g64", "w4g64"), ("torch int4",))
        for tokens in (128,) if quick else (128, 512):
            yield weights.case(tokens)
