"""``moe_grouped_linear`` on the CPU by our own C: the weights of the packed linears, many to a pool.

Few pairs of token and expert run in one call of ``cpu/moe.c``. With many, each expert's rows are gathered and
run as one linear: packed weights by the backend ``cpu``, dense ones by torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from autocomp.kernels import native
from autocomp.kernels.backend import WeightState
from autocomp.kernels.cpu_linear import TYPES, AcWeight, CpuBackend, dense_weight, native_weight
from autocomp.kernels.cpu_linear import _dense_rows as dense_rows
from autocomp.kernels.experts import DENSE, Weight, register_layout
from autocomp.kernels.library import Implementation
from autocomp.kernels.moe import (
    Pools,
    Tensors,
    combine,
    moe_grouped_linear,
    places,
    problem,
    rows_of_pairs,
)
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

LAYOUT = "cpu"
MANY_DENSE, MANY_PACKED = 64, 2048
"""Pairs from which a loop over the experts is taken: with dense experts, because torch multiplies many rows
faster; with packed ones to save memory, and sooner where many rows are faster in bfloat16."""
BACKEND = CpuBackend()
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]
"""Codes, scale, zero, bits and group of a class."""


class _Pool(ctypes.Structure):
    """``ac_pool`` of ``cpu/moe.h``."""

    _fields_ = (
        ("first", AcWeight),
        ("places", c_int64),
        ("codes_step", c_int64),
        ("scale_step", c_int64),
        ("zero_step", c_int64),
    )


class _Job(ctypes.Structure):
    """``ac_moe`` of ``cpu/moe.h``."""

    _fields_ = (
        ("tokens", c_int64), ("top_k", c_int64), ("per_pair", c_int64), ("n", c_int64), ("k", c_int64),
        ("x", c_void_p), ("x_stride", c_int64), ("x_type", c_int64),
        ("expert", c_void_p), ("wide", c_int64), ("experts", c_int64), ("classes", c_int64),
        ("remap", c_void_p), ("route", c_void_p), ("pools", ctypes.POINTER(_Pool)), ("y", c_void_p),
    )  # fmt: skip


@cache
def _function() -> Any:
    function = native.load("moe").ac_moe_linear
    function.argtypes = (ctypes.POINTER(_Job), ctypes.c_int)
    return function


class CpuLayout:
    """Pools of weights as the backend ``cpu`` packs them, one after the other; dense ones ``[P, N, K]``."""

    name = LAYOUT
    device_type = "cpu"

    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str:
        if scheme.is_dense:
            return native.unavailable("moe")
        return BACKEND.supports(scheme, shape, "cpu", 1) or native.unavailable("moe")

    def pools(self, experts: Sequence[Weight], device: torch.device) -> Pools:
        packed = [BACKEND.prepack(e, device).tensors for e in experts if isinstance(e, QuantizedTensor)]
        none = torch.empty(0, dtype=torch.uint8)
        if not packed:
            dense = torch.stack([e for e in experts if isinstance(e, torch.Tensor)]).to(device)
            return dense if dense.dtype in TYPES else dense.float(), none, none
        codes, scale = (torch.stack([t[name] for t in packed]) for name in ("codes", "scale"))
        return codes, scale, torch.stack([t["zero"] for t in packed]) if "zero" in packed[0] else none


def run(
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
    del layout
    shape = (rows, x.shape[1])
    parts = list(zip(codes, scale, zero, bits, group))
    if _many(expert.numel(), parts):
        return _by_expert(x, expert, route_weight, remap, parts, shape)
    return _at_once(x, expert, route_weight, remap, parts, shape)


def _many(pairs: int, parts: Sequence[Part]) -> bool:
    if any(bits == DENSE.bits for *_, bits, _ in parts):
        return pairs >= MANY_DENSE
    return pairs >= MANY_PACKED or pairs >= dense_rows() * sum(len(codes) for codes, *_ in parts)


def _by_expert(
    x: torch.Tensor,
    expert: torch.Tensor,
    route_weight: torch.Tensor | None,
    remap: torch.Tensor,
    parts: Sequence[Part],
    shape: tuple[int, int],
) -> torch.Tensor:
    y = torch.zeros(expert.numel(), shape[0])
    source = rows_of_pairs(x, expert)
    for part, place in zip(parts, places(expert, remap)):
        found, order = place.sort(stable=True)
        served, counts = found.unique_consecutive(return_counts=True)
        for p, pairs in zip(served.tolist(), order.split(counts.tolist())):
            if p >= 0:
                y[pairs] = _linear(x[source[pairs]], part, p, shape).float()
    return combine(y, expert, route_weight, x.dtype)


def _linear(x: torch.Tensor, part: Part, place: int, shape: tuple[int, int]) -> torch.Tensor:
    codes, *_, bits, _ = part
    if bits == DENSE.bits:
        return F.linear(x.to(codes.dtype), codes[place])
    return BACKEND.linear(x, _state(part, place, shape))


def _state(part: Part, place: int, shape: tuple[int, int]) -> WeightState:
    """One weight of a pool, sharing its memory."""
    codes, scale, zero, bits, group = part
    tensors = {"codes": codes[place], "scale": scale[place]}
    if zero.numel():
        tensors["zero"] = zero[place]
    return WeightState(BACKEND, Scheme(bits, group, symmetric=not zero.numel()), shape, tensors)


def _at_once(
    x: torch.Tensor,
    expert: torch.Tensor,
    route_weight: torch.Tensor | None,
    remap: torch.Tensor,
    parts: Sequence[Part],
    shape: tuple[int, int],
) -> torch.Tensor:
    dtype = x.dtype
    if dtype == torch.float16:
        x = x.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    expert, remap = expert.contiguous(), remap.contiguous()
    if route_weight is not None:
        route_weight = route_weight.float().contiguous()
    tokens, top_k = expert.shape
    y = x.new_empty(tokens if route_weight is not None else tokens * top_k, shape[0])
    if y.numel() == 0:
        return y.to(dtype)
    pools = (_Pool * len(parts))(*(_pool(part, shape) for part in parts))
    job = _Job(
        tokens, top_k, len(x) != tokens, *shape, x.data_ptr(), x.stride(0), TYPES[x.dtype],
        expert.data_ptr(), expert.dtype == torch.int64, remap.shape[1], len(parts), remap.data_ptr(),
        None if route_weight is None else route_weight.data_ptr(), pools, y.data_ptr(),
    )  # fmt: skip
    failed = _function()(job, native.threads())
    if failed == -1:
        raise MemoryError(f"no memory for {expert.numel()} rows of {shape[1]} features; use fewer tokens")
    if failed:
        raise ValueError("remap names a place that its pool does not have; build the experts again")
    return y if y.dtype == dtype else y.to(dtype)


def _pool(part: Part, shape: tuple[int, int]) -> _Pool:
    codes, scale, zero, bits, _ = part
    if not len(codes):
        return _Pool()
    if bits == DENSE.bits:
        return _Pool(dense_weight(codes[0]), len(codes), codes.stride(0) * codes.element_size())
    first = native_weight(_state(part, 0, shape))
    steps = [t.stride(0) * t.element_size() if t.numel() else 0 for t in (codes, scale, zero)]
    return _Pool(first, len(codes), *steps)


def supports(
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
    layout: str = "",
) -> str:
    if layout != LAYOUT:
        return f"it reads the layout {LAYOUT!r}, not {layout!r}"
    if not all(t.is_contiguous() for t in (*codes, *scale, *zero)):
        return "pools must be contiguous"
    return problem(x, expert, route_weight, remap, codes, scale, zero, bits, group, rows, layout)


def register() -> None:
    """Make this the first choice on the CPU, and its layout the one that experts are packed in."""
    register_layout(CpuLayout())
    implementation = Implementation(LAYOUT, "cpu", run, lambda: native.unavailable("moe"), supports)
    moe_grouped_linear.register(implementation)
