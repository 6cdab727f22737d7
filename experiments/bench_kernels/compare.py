"""Interleaved timing of one case: several ways to compute (nearly) the same, on weights out of the caches."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch

from autocomp.measure.device import load_average
from autocomp.measure.timing import Ratio, summarize

SAMPLE_MS = 2.0
"""A sample is a burst of calls that takes about this long: one alone would time how threads wake up."""
MAX_BURST = 64
MIN_ROUNDS, MAX_ROUNDS = 7, 60
DRAWS = 1000
Call = Callable[[], Any]


@dataclass(frozen=True)
class Variant:
    """One way to run a case.

    Attributes:
        calls: equal calls, each with its own copy of what is read from memory; they are used in turn.
        ours: whether the implementation is this project's.
        rivals: names of the variants that it is compared with (empty: all that aren't ours). The best of
            them is its "best alternative".
        bytes: least bytes that one call moves.
        flops: multiplications and additions of one call.
        peak: ``bf16`` or ``int8``, the arithmetic whose peak rate bounds it.
    """

    calls: Sequence[Call]
    ours: bool = False
    rivals: tuple[str, ...] = ()
    bytes: float = 0.0
    flops: float = 0.0
    peak: str = "bf16"


@dataclass(frozen=True)
class Case:
    """Variants by name; the first is the uncompressed baseline. ``seconds`` is a longer time to spend."""

    name: str
    variants: Mapping[str, Variant]
    seconds: float = 0.0


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches with some threads: GB/s of copying and of reading, GFLOP/s of two GEMMs."""

    copy: float
    read: float
    bf16: float
    int8: float

    def floor_ms(self, variant: Variant) -> float:
        """The least time of one call: its bytes at the better of the two rates, or its arithmetic."""
        peak = self.int8 if variant.peak == "int8" else self.bf16
        return max(variant.bytes / max(self.copy, self.read), variant.flops / peak) * 1e-6


def ceilings(size: int = 2048, repeats: int = 7) -> Ceilings:
    """Measure them with torch's present threads; the best of ``repeats``, in under two seconds."""
    memory = torch.ones(64 * 2**20)
    target = torch.empty_like(memory)
    a = torch.randn(size, size).bfloat16()
    codes = torch.randint(-127, 128, (size, size), dtype=torch.int8)

    def best(call: Call) -> float:
        return min(_seconds(call, 1) for _ in range(repeats))

    moved, work = 4.0 * memory.numel(), 2.0 * size**3
    return Ceilings(
        copy=2 * moved / best(lambda: target.copy_(memory)) / 1e9,
        read=moved / best(memory.sum) / 1e9,
        bf16=work / best(lambda: a @ a) / 1e9,
        int8=work / best(lambda: torch._int_mm(codes, codes)) / 1e9,
    )


def compare(case: Case, limits: Ceilings, *, seconds: float, seed: int = 0) -> list[dict[str, Any]]:
    """Time all variants round-robin in a random order for about ``seconds`` and return one row for each.

    A row has ``ms`` (median of one call), ``iqr_ms``, ``rounds``, ``speedup`` over the baseline and
    ``speedup_best`` over the best alternative (both with 95 % bootstrap intervals over whole rounds), and
    ``floor_percent``: the share of its time that bytes and arithmetic need at the rates in ``limits``.
    """
    names = list(case.variants)
    turns = {name: cycle(variant.calls) for name, variant in case.variants.items()}
    burst, rounds = _plan(case, turns, max(seconds, case.seconds))
    rng = np.random.default_rng(seed)
    times = np.empty((rounds, len(names)))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for row in times:
            for column in rng.permutation(len(names)):
                turn = turns[names[column]]
                row[column] = 1e3 * _seconds(lambda turn=turn: next(turn)(), burst)
    finally:
        if collecting:
            gc.enable()
    columns = dict(zip(names, times.T))
    return [_row(case, name, columns, burst, limits, rng) for name in names]


def _seconds(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def _plan(case: Case, turns: Mapping[str, Any], seconds: float) -> tuple[int, int]:
    """Calls a sample and rounds, from a first look after every call has run once."""
    took = []
    for name, variant in case.variants.items():
        for call in variant.calls:
            call()
        took.append(min(_seconds(lambda name=name: next(turns[name])(), 1) for _ in range(2)))
    burst = int(np.clip(SAMPLE_MS * 1e-3 / min(took), 1, MAX_BURST))
    return burst, int(np.clip(seconds / (burst * sum(took)), MIN_ROUNDS, MAX_ROUNDS))


def _row(
    case: Case,
    name: str,
    columns: Mapping[str, np.ndarray],
    burst: int,
    limits: Ceilings,
    rng: np.random.Generator,
) -> dict[str, Any]:
    variant, timing = case.variants[name], summarize(columns[name].tolist())
    baseline = next(iter(case.variants))
    row: dict[str, Any] = {
        "case": case.name, "variant": name, "ours": variant.ours, "threads": torch.get_num_threads(),
        "ms": timing.median_ms, "iqr_ms": timing.iqr_ms, "rounds": len(columns[name]), "burst": burst,
        "load": load_average(), "baseline": baseline,
        "speedup": ratio(columns[baseline], columns[name], rng).__dict__,
    }  # fmt: skip
    if variant.bytes or variant.flops:
        row["floor_percent"] = 100 * limits.floor_ms(variant) / timing.median_ms
    rivals = variant.rivals or tuple(n for n, v in case.variants.items() if not v.ours)
    if variant.ours and rivals:
        best = min(rivals, key=lambda n: float(np.median(columns[n])))
        row |= {"best": best, "speedup_best": ratio(columns[best], columns[name], rng).__dict__}
    return row


def ratio(base: np.ndarray, ours: np.ndarray, rng: np.random.Generator) -> Ratio:
    """``base`` time / ``ours``: of medians, with a paired percentile bootstrap over the rounds."""
    picks = rng.integers(len(base), size=(DRAWS, len(base)))
    drawn = np.median(base[picks], axis=1) / np.median(ours[picks], axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Ratio(float(np.median(base) / np.median(ours)), float(low), float(high))
