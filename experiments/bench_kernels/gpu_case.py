"""What a benchmark case on the GPU is, and how it is timed: by CUDA graphs, with a cold cache."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

ROUNDS = 30
L2_MULTIPLE = 5
"""Bytes that a timed loop goes through, in multiples of the L2 cache, so that it starts cold."""
Call = Callable[[int], Any]


@dataclass
class Case:
    """One kernel on one shape.

    Attributes:
        name: operator, shape and settings.
        call: runs the kernel on copy ``i`` of its inputs, ``i < copies``.
        reference: the exact result for copy 0, or ``None`` where only the time is wanted.
        bytes, flops: of one call, as the roofline counts them.
        error: largest accepted relative error (Frobenius norm).
        peak: which measured peak bounds it: ``bf16``, ``int8`` or ``fp8``.
        copies: sets of inputs; see :func:`copies_for`.
        baselines: other ways to do the same, by name.
    """

    name: str
    call: Call
    reference: Callable[[], torch.Tensor] | None
    bytes: float
    flops: float
    error: float = 1.2e-2
    peak: str = "bf16"
    copies: int = 1
    baselines: dict[str, Call] = field(default_factory=dict)


Cases = Iterator[Case]


def copies_for(size: float) -> int:
    """How many copies of inputs of ``size`` bytes go through the L2 cache several times over; at most 64."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(64, math.ceil(L2_MULTIPLE * cache / size)))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def graphed(call: Call, copies: int) -> tuple[Callable[[], None], int]:
    """A replay of calls over all copies (at least ten calls), and the number of calls in it."""
    calls = copies * math.ceil(10 / copies)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and fills the allocator
        for i in range(min(copies, 3)):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    return graph.replay, calls


def time_together(calls: dict[str, Call], copies: int, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Microseconds a call of each, round robin: median, p10, p90. One that can't run gets its reason."""
    replays: dict[str, tuple[Callable[[], None], int]] = {}
    found: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            replays[name] = graphed(call, copies)
        except Exception as error:
            torch.cuda.synchronize()
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:150]}"}
    times: dict[str, list[float]] = {name: [] for name in replays}
    for turn in range(rounds + 3):
        for name, (replay, count) in replays.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(start.elapsed_time(end) * 1e3 / count)
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=10)
        found[name] = {"median": statistics.median(values), "p10": cuts[0], "p90": cuts[-1]}
    return found


def measured_peaks() -> dict[str, float]:
    """Bytes and operations a second that this device reaches: a copy of 1 GiB, large dense products."""
    peaks = {"bytes": _copied()}
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    products: dict[str, Call] = {"bf16": lambda _: a @ b}
    q, r = ((40 * m).clamp(-127, 127).to(torch.int8) for m in (a, b))
    products["int8"] = lambda _: torch._int_mm(q, r.T)
    if torch.cuda.get_device_capability() >= (8, 9):
        f, g, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        products["fp8"] = lambda _: torch._scaled_mm(f, g.T, one, one, out_dtype=torch.bfloat16)
    for name, call in products.items():
        try:
            peaks[name] = 2 * size**3 / _seconds(call)
        except RuntimeError as error:
            print(f"no {name} peak: {str(error)[:100]}")
    return peaks


def _copied() -> float:
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda _: target.copy_(source))


def _seconds(call: Call) -> float:
    return time_together({"": call}, 1, rounds=10)[""]["median"] * 1e-6
