"""Conformance checks of implementations of the linears on quantized activations, of the low-rank correction
and of the experts' linear, for the built-in ones and for yours.

    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
    def test_mine(check):
        check(linear_w8a8, "mine", "cuda")

A check takes an operator, the name of an implementation registered on it, and a device type, and raises
``AssertionError`` with what went wrong. Cases that the implementation refuses are left out; one that refuses
everything fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from autocomp.kernels.experts import GroupedWeights
from autocomp.kernels.library import Operator
from autocomp.kernels.ops import random_weight
from autocomp.kernels.packing import pack
from autocomp.quantize.scheme import Scheme

Check = Callable[[Operator, str, str], None]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Largest relative error (Frobenius norm) against the reference, by dtype of the activations."""
PACKED_BOUND = 1.2e-2
"""The same for packed experts, whose implementations may quantize activations to 8 bits."""
TOKENS = (1, 2, 7, 33)
SHAPES = ((33, 200), (64, 128), (5, 72), (1, 8), (130, 576))


@dataclass(frozen=True)
class Case:
    """Arguments for an implementation, those for the reference, and what they are in words.

    The first argument is always ``x``; every row of the result belongs to one row of it.
    """

    label: str
    args: tuple[Any, ...]
    reference: tuple[Any, ...]
    bound: float
    rows: bool = True
    """Whether rows of ``x`` and of the result correspond one to one."""


def cases(operator: Operator, name: str, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Random arguments for one of the operators that this module knows.

    Raises:
        KeyError: another operator.
    """
    yield from _CASES[operator.name](name, device, dtype, torch.Generator().manual_seed(7))


def _plain(label: str, args: tuple[Any, ...], device: str, bound: float) -> Case:
    moved = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
    return Case(label, moved, moved, bound)


def _w8a8(name: str, device: str, dtype: torch.dtype, seed: torch.Generator) -> Iterator[Case]:
    for rows, columns in SHAPES:
        codes = torch.randint(-128, 128, (rows, columns), generator=seed, dtype=torch.int8)
        scale, bias = torch.rand(rows, generator=seed) / 100, torch.randn(rows, generator=seed)
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, generator=seed).to(dtype)
            label = f"{dtype} [{tokens}, {columns}] -> {rows}"
            yield _plain(label, (x, codes, scale, bias, None), device, BOUND[dtype])
            static = torch.tensor([0.01])  # saturates about a quarter of the values
            yield _plain(label + " static", (x, codes, scale, None, static), device, BOUND[dtype])


def _w4a8(name: str, device: str, dtype: torch.dtype, seed: torch.Generator) -> Iterator[Case]:
    for rows, columns in SHAPES:
        codes = torch.randint(0, 16, (rows, columns), generator=seed, dtype=torch.uint8)
        bias = torch.randn(rows, generator=seed)
        for group in (0, 32, 64, 128, 8):
            groups = -(-columns // group) if group else 1
            scale = torch.rand(rows, groups, generator=seed) / 100
            zero = torch.randint(0, 16, (rows, groups), generator=seed, dtype=torch.uint8)
            for tokens in TOKENS[::2] if group else TOKENS:
                x = torch.randn(tokens, columns, generator=seed).to(dtype)
                label = f"{dtype} [{tokens}, {columns}] -> {rows} g{group}"
                packed = pack(codes, 4)
                yield _plain(label, (x, packed, scale.bfloat16(), None, group, bias), device, BOUND[dtype])
                yield _plain(label + " asymmetric", (x, packed, scale, zero, group), device, BOUND[dtype])


def _fp8(name: str, device: str, dtype: torch.dtype, seed: torch.Generator) -> Iterator[Case]:
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns, generator=seed).to(torch.float8_e4m3fn)
        scale, bias = torch.rand(rows, generator=seed), torch.randn(rows, generator=seed)
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, generator=seed).to(dtype)
            label = f"{dtype} [{tokens}, {columns}] -> {rows}"
            yield _plain(label, (x, weight, scale, bias), device, BOUND[dtype])


def _low_rank(name: str, device: str, dtype: torch.dtype, seed: torch.Generator) -> Iterator[Case]:
    for rows, columns in SHAPES:
        for tokens, rank in zip(TOKENS, (16, 1, 128, 40)):
            x = torch.randn(tokens, columns, generator=seed).to(dtype)
            y = torch.randn(tokens, rows, generator=seed).to(dtype)
            a = (torch.randn(rank, columns, generator=seed) / columns**0.5).bfloat16()
            b = (torch.randn(rows, rank, generator=seed) / rank**0.5).bfloat16()
            label = f"{dtype} [{tokens}, {columns}] -> {rows} rank {rank}"
            yield _plain(label, (x, y, a, b), device, BOUND[dtype])


ROUTINGS = (
    (1, 2, False, False),
    (5, 3, True, False),
    (9, 2, True, True),
    (40, 2, True, False),
    (40, 2, False, True),
)
"""Tokens, experts of each, whether with weights, and whether ``x`` has a row for each pair."""


def _experts(name: str, device: str, dtype: torch.dtype, seed: torch.Generator) -> Iterator[Case]:
    mixtures = ("w4g32 w4g32 w4g32", "w2g32a w4g64 w16 w8 w3 w16", "w16 w16", "w6g64a w5g32")
    for (rows, columns), mixture in zip(SHAPES, mixtures):
        weights = [
            torch.randn(rows, columns, generator=seed).div(columns**0.5).to(dtype)
            if label == "w16"
            else random_weight(Scheme.parse(label), (rows, columns), seed=index)
            for index, label in enumerate(mixture.split())
        ]
        place = [*range(len(weights)), -1, 0]  # one pruned, one merged with the first
        packed = GroupedWeights.build(weights, place, device, name)
        plain = GroupedWeights.build(weights, place, "cpu", "canonical")
        bound = PACKED_BOUND if mixture.strip("w16 ") else BOUND[dtype]
        for tokens, top_k, weighted, per_pair in ROUTINGS:
            x = torch.randn(tokens * (top_k if per_pair else 1), columns, generator=seed).to(dtype)
            expert = torch.randint(-1, len(place) + 1, (tokens, top_k), generator=seed)
            route = torch.rand(tokens, top_k, generator=seed) if weighted else None
            label = f"{dtype} {mixture} [{len(x)}, {columns}] -> {rows}, {tokens} x {top_k}"
            moved = (x.to(device), expert.to(device), None if route is None else route.to(device))
            yield Case(
                label, (*moved, *_operands(packed)), (x, expert, route, *_operands(plain)), bound, rows=False
            )


def _operands(weights: GroupedWeights) -> tuple[Any, ...]:
    lists = (weights.codes, weights.scale, weights.zero, weights.bits, weights.group)
    return (weights.remap, *(list(part) for part in lists), weights.shape[0], weights.layout)


_CASES: dict[str, Callable[[str, str, torch.dtype, torch.Generator], Iterator[Case]]] = {
    "linear_w8a8": _w8a8,
    "linear_w4a8": _w4a8,
    "linear_fp8": _fp8,
    "low_rank_add": _low_rank,
    "moe_grouped_linear": _experts,
}


def _taken(
    operator: Operator, name: str, device: str, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> Iterator[Case]:
    """The cases that the implementation takes; at least one."""
    found = next((i for i in operator.implementations if (i.name, i.device_type) == (name, device)), None)
    assert found, f"{operator.name} has no implementation {name!r} on {device}"
    assert not found.unusable(), f"{operator.name} {name}: {found.unusable()}"
    count = 0
    for dtype in dtypes:
        for case in cases(operator, name, device, dtype):
            if not found.supports(*case.args):
                count += 1
                yield case
    assert count, f"{operator.name} {name} takes none of the cases on {device}"


def _run(operator: Operator, name: str, args: tuple[Any, ...]) -> torch.Tensor:
    with operator.forced(name):
        y: torch.Tensor = operator(*args)
    return y


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.double().cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def check_parity(operator: Operator, name: str, device: str) -> None:
    """Values, shape and dtype of every case against the reference."""
    for case in _taken(operator, name, device):
        found, wanted = _run(operator, name, case.args), operator.reference(*case.reference)
        where = f"{operator.name} {name} {case.label}"
        assert found.shape == wanted.shape and found.dtype == wanted.dtype, f"{where}: {found.shape}"
        error = _error(found, wanted)
        assert error <= case.bound, f"{where}: relative error {error:.2g} is over {case.bound:.2g}"


def check_strides(operator: Operator, name: str, device: str) -> None:
    """Columns of a wider tensor, a transposed one, and guard zones of NaN around ``x`` change nothing."""
    for case in _taken(operator, name, device, (torch.float32,)):
        x = case.args[0]
        wanted = _run(operator, name, case.args)
        wide = x.new_full((len(x) + 2, x.shape[1] + 6), torch.nan)
        wide[1:-1, 3:-3] = x
        for other in (wide[1:-1, 3:-3], x.T.contiguous().T):
            found = _run(operator, name, (other, *case.args[1:]))
            # The same kernel on the same numbers; only where it copies first may the order of sums differ.
            assert _error(found, wanted) <= 1e-6, f"{operator.name} {name} {case.label}: strides matter"


def check_inputs_kept(operator: Operator, name: str, device: str) -> None:
    """No argument is changed, and the result is no view of one."""
    for case in _taken(operator, name, device, (torch.bfloat16,)):
        parts = [t for a in case.args for t in (a if isinstance(a, list) else [a])]
        tensors = [t for t in parts if isinstance(t, torch.Tensor)]
        before = [t.clone() for t in tensors]
        y = _run(operator, name, case.args)
        where = f"{operator.name} {name} {case.label}"
        for t, kept in zip(tensors, before):
            assert torch.equal(t.view(torch.uint8), kept.view(torch.uint8)), f"{where}: changes an argument"
            assert not t.numel() or t.data_ptr() != y.data_ptr(), f"{where}: returns an argument"


def check_rows(operator: Operator, name: str, device: str) -> None:
    """A row's result doesn't depend on the others: also when one of them is NaN."""
    for case in _taken(operator, name, device, (torch.float32,)):
        if not case.rows or len(case.args[0]) < 2:
            continue
        wanted = _run(operator, name, case.args)
        x = case.args[0].clone()
        x[0] = torch.nan
        found = _run(operator, name, (x, *case.args[1:]))
        where = f"{operator.name} {name} {case.label}"
        assert found[0].isnan().all(), f"{where}: a row of NaN gives numbers"
        assert _error(found[1:], wanted[1:]) <= 1e-6, f"{where}: rows interact"


CHECKS: dict[str, Check] = {
    "parity": check_parity,
    "strides": check_strides,
    "inputs_kept": check_inputs_kept,
    "rows": check_rows,
}


def check_implementation(operator: Operator, name: str, device: str = "cpu") -> None:
    """All checks."""
    for check in CHECKS.values():
        check(operator, name, device)
