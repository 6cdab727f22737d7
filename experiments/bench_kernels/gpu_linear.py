"""Cases of the linears and of grouped experts: parity on small odd shapes, speed on those of real models."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu_case import Case, Cases, copies_for

from autocomp.kernels.activations import linear_fp8, linear_w4a8, linear_w8a8
from autocomp.kernels.aten import Int4Backend
from autocomp.kernels.experts import GroupedWeights
from autocomp.kernels.library import Operator
from autocomp.kernels.ops import random_weight
from autocomp.kernels.packing import pack
from autocomp.kernels.triton.linear import TRITON
from autocomp.quantize.scheme import Scheme

CUDA = torch.device("cuda")
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
SCHEMES = "w2g64 w3g64 w3g32a w4g32 w4g64a w4g128 w4 w4g64o0.5 w5g64 w6g64a w6g96a w8 w8g64a"
COUNTS = (
    *((tokens, torch.bfloat16) for tokens in (1, 9, 33, 300)),
    (2, torch.float16),
    (3, torch.float32),
)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
TOKENS = (1, 4, 16, 64, 512)
Parity = tuple[str, Callable[[], torch.Tensor], Callable[[], torch.Tensor], float]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA).to(dtype)


def parity() -> Iterator[Parity]:
    """Name, call, exact result and bound of every implementation on odd shapes."""
    yield from _packed_parity()
    yield from _activation_parity()
    yield from _expert_parity()


def _packed_parity() -> Iterator[Parity]:
    for label in SCHEMES.split():
        for shape in ((130, 328), (1, 96)):
            weight = random_weight(Scheme.parse(label), shape)
            state, dense = TRITON.prepack(weight, CUDA), weight.dequantize(torch.float64).to(CUDA)
            for dtype, counts in (
                (torch.bfloat16, (1, 9, 33, 300)),
                (torch.float16, (2,)),
                (torch.float32, (3,)),
            ):
                for tokens in counts:
                    x, bias = normal(tokens, shape[1], dtype=dtype), normal(shape[0], dtype=dtype)
                    call = functools.partial(TRITON.linear, x, state, bias)
                    exact = functools.partial(_exact, x, dense, bias)
                    yield f"wna16 {label} {shape} m{tokens} {dtype}", call, exact, BOUND[dtype]
            index = torch.tensor([0, shape[0] - 1], device=CUDA)
            rows = functools.partial(TRITON.rows, index, state)
            yield f"rows {label} {shape}", rows, functools.partial(torch.index_select, dense, 0, index), 1e-6
    state, dense, a, b = *_state("w4g64", (200, 256)), normal(40, 256), normal(200, 40)
    for tokens in (1, 20, 300):
        x = normal(tokens, 256)
        call = functools.partial(TRITON.linear, x, state, None, (a, b))
        yield (
            f"low rank m{tokens}",
            call,
            functools.partial(_exact, x, dense + b.double() @ a.double()),
            1.2e-2,
        )


def _exact(x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x.double() @ dense.T
    return y if bias is None else y + bias.double()


def _state(label: str, shape: tuple[int, int]) -> tuple[Any, torch.Tensor]:
    weight = random_weight(Scheme.parse(label), shape)
    return TRITON.prepack(weight, CUDA), weight.dequantize(torch.float64).to(CUDA)


def _activation_parity() -> Iterator[Parity]:
    weight = random_weight(Scheme(4, 64, symmetric=False), (144, 272)).to(CUDA)
    codes, scale = torch.randint(-128, 128, (144, 272), device=CUDA).to(torch.int8), normal(144).float()
    floats = normal(144, 272).to(torch.float8_e4m3fn)
    arguments: dict[Operator, tuple[Any, ...]] = {
        linear_w8a8: (codes, scale),
        linear_w4a8: (pack(weight.codes, 4), weight.scale, weight.zero, 64),
        linear_fp8: (floats, scale),
    }
    for tokens, dtype, op in itertools.product((1, 17, 300), (torch.bfloat16, torch.float16), arguments):
        x, others = normal(tokens, 272, dtype=dtype), arguments[op]
        bound = max(BOUND[dtype], 8e-3 if op is linear_fp8 else 0.0)  # torch's product rounds to bfloat16
        for implementation in op.implementations:
            usable = implementation.device_type == "cuda" and not implementation.unusable()
            if usable and not implementation.supports(x, *others):
                name = f"{op.name} {implementation.name} m{tokens} {dtype}"
                call = functools.partial(implementation.run, x, *others)
                yield name, call, functools.partial(op.reference, x, *others), bound


def _expert_parity() -> Iterator[Parity]:
    labels = ["w3g32", "w4g128", "w16", "w3g32", "w8"]
    weights: list[Any] = [
        normal(136, 200).cpu() if label == "w16" else random_weight(Scheme.parse(label), (136, 200), seed=i)
        for i, label in enumerate(labels)
    ]
    place = [0, 1, 2, 3, 4, 0, -1]
    ours, wanted = (GroupedWeights.build(weights, place, CUDA, name) for name in ("triton", "canonical"))
    for tokens in (1, 12, 200):
        x, chosen = normal(tokens, 200), torch.randint(0, 7, (tokens, 2), device=CUDA)
        for route in (None, torch.rand(tokens, 2, device=CUDA)):
            call, exact = (functools.partial(w, x, chosen, route) for w in (ours, wanted))
            yield f"experts m{tokens} {'weighted' if route is not None else 'by pair'}", call, exact, 1.2e-2


def cases() -> Cases:
    """What is timed."""
    for label in ("w4g128", "w3g128", "w2g128", "w8"):
        for shape in SHAPES if label == "w4g128" else SHAPES[:1]:
            yield from _packed_cases(label, shape)
    for tokens in (1, 64, 2048):
        yield _int8_case((4096, 4096), tokens)
    for tokens in (1, 16, 256):
        yield _expert_case(tokens)


def _packed_cases(label: str, shape: tuple[int, int]) -> Cases:
    (rows, columns), scheme = shape, Scheme.parse(label)
    weight = random_weight(scheme, shape)
    dense = weight.dequantize(torch.float64).to(CUDA)
    size = scheme.weight_bytes(rows, columns)
    copies = copies_for(size)
    states = [TRITON.prepack(weight.to(CUDA), CUDA) for _ in range(copies)]
    full = [dense.bfloat16() for _ in range(min(copies, copies_for(2 * rows * columns)))]
    others = _packed_baselines(weight, copies)
    for tokens in TOKENS:
        x = normal(tokens, columns)
        baselines = {"cublas bf16": functools.partial(lambda x, i: F.linear(x, full[i % len(full)]), x)}
        baselines |= {name: functools.partial(call, x) for name, call in others.items()}
        yield Case(
            f"wna16 {label} {rows}x{columns} m{tokens}",
            functools.partial(lambda x, i: TRITON.linear(x, states[i]), x),
            functools.partial(_exact, x, dense),
            size + 2 * tokens * (rows + columns), 2 * tokens * rows * columns,
            copies=copies, baselines=baselines,
        )  # fmt: skip


def _packed_baselines(weight: Any, copies: int) -> dict[str, Callable[[torch.Tensor, int], torch.Tensor]]:
    """Other libraries on the same weight, where they are installed and take it."""
    found: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {}
    int4 = Int4Backend()
    if not int4.supports(weight.scheme, weight.shape, "cuda", 1):
        states = [int4.prepack(weight, CUDA) for _ in range(copies)]
        found["torch int4"] = lambda x, i: int4.linear(x, states[i])
    for add in (_gemlite, _torchao):
        try:
            found |= add(weight, copies)
        except ImportError:
            pass
        except Exception as error:
            print(f"baseline {add.__name__[1:]} left out: {type(error).__name__}: {str(error)[:150]}")
    return found


def _gemlite(weight: Any, copies: int) -> dict[str, Callable[[torch.Tensor, int], torch.Tensor]]:
    from gemlite.core import DType, GemLiteLinear

    (rows, columns), scheme = weight.shape, weight.scheme
    if scheme.bits not in (2, 4, 8):
        return {}
    layers = []
    for _ in range(copies):
        group = scheme.group or columns
        layer = GemLiteLinear(
            scheme.bits, group_size=group, in_features=columns, out_features=rows,
            input_dtype=DType.BF16, output_dtype=DType.BF16,
        )  # fmt: skip
        zero = torch.full_like(weight.scale, 2 ** (scheme.bits - 1)) if weight.zero is None else weight.zero
        layer.pack(weight.codes.to(CUDA), weight.scale.to(CUDA), zero.to(CUDA, torch.bfloat16), None)
        layers.append(layer)
    return {"gemlite": lambda x, i: layers[i](x)}


def _torchao(weight: Any, copies: int) -> dict[str, Callable[[torch.Tensor, int], torch.Tensor]]:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    (rows, columns), scheme = weight.shape, weight.scheme
    if scheme.bits != 4 or scheme.group not in (32, 64, 128, 256):
        return {}
    layers = []
    for _ in range(copies):
        layer = torch.nn.Linear(columns, rows, bias=False, device=CUDA, dtype=torch.bfloat16)
        quantize_(layer, Int4WeightOnlyConfig(group_size=scheme.group))
        layers.append(layer)
    return {"torchao int4": lambda x, i: layers[i](x)}


def _int8_case(shape: tuple[int, int], tokens: int) -> Case:
    (rows, columns), x = shape, normal(tokens, shape[1])
    copies = copies_for(rows * columns)
    codes = [torch.randint(-128, 128, shape, device=CUDA).to(torch.int8) for _ in range(copies)]
    scale = torch.rand(rows, device=CUDA)
    dense = [normal(*shape) for _ in range(copies_for(2 * rows * columns))]

    def run(name: str, i: int) -> torch.Tensor:
        with linear_w8a8.forced(name):
            return linear_w8a8(x, codes[i], scale)

    return Case(
        f"w8a8 {rows}x{columns} m{tokens}",
        functools.partial(run, "triton"),
        lambda: linear_w8a8.reference(x, codes[0], scale),
        rows * columns + 2 * tokens * (rows + columns),
        2 * tokens * rows * columns,
        peak="int8",
        copies=copies,
        baselines={
            "cublas bf16": lambda i: F.linear(x, dense[i % len(dense)]),
            "torch int_mm": functools.partial(run, "torch"),
        },
    )


def _expert_case(tokens: int, count: int = 8, shape: tuple[int, int] = (14336, 4096)) -> Case:
    rows, columns = shape
    weight = random_weight(Scheme(4, 128), shape)
    experts = GroupedWeights.build([weight] * count, device=CUDA)
    dense = weight.dequantize(torch.bfloat16).to(CUDA).expand(count, -1, -1)
    x, chosen = (
        normal(tokens, columns),
        torch.stack([torch.randperm(count)[:2] for _ in range(tokens)]).to(CUDA),
    )
    active = len(chosen.unique())

    def loop(i: int) -> torch.Tensor:  # every expert on every token: what needs no synchronization
        return torch.stack([F.linear(x, dense[e]) for e in range(count)])

    return Case(
        f"experts w4g128 {count}x{rows}x{columns} m{tokens}",
        lambda i: experts(x, chosen),
        lambda: x.double().repeat_interleave(2, 0) @ weight.dequantize(torch.float64).to(CUDA).T,
        active * weight.scheme.weight_bytes(rows, columns) + 4 * tokens * (rows + columns),
        4 * tokens * rows * columns, baselines={"bf16, all experts": loop} if tokens <= 16 else {},
    )  # fmt: skip
