"""Timing of callables: medians with their noise, and ratios of interleaved timings."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

MAX_SAMPLES = 100_000
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Time of one call, in milliseconds.

    Attributes:
        median_ms: median of the kept samples.
        iqr_ms: their interquartile range.
        stderr_ms: standard error of the median.
        n: samples kept.
        dropped: samples thrown away as outliers (see ``summarize``).
        samples: the kept samples in the order they were taken.
    """

    median_ms: float
    iqr_ms: float
    stderr_ms: float
    n: int
    dropped: int = 0
    samples: tuple[float, ...] = field(default=(), repr=False)


def summarize(samples: Sequence[float]) -> Timing:
    """Median and noise of samples in milliseconds.

    Samples above ``Q3 + 3 IQR`` (Tukey's far-out rule) are dropped and counted: on a shared machine they
    are somebody else's time. The standard error of the median is ``1.25 IQR / (1.35 sqrt(n))`` (McGill,
    Tukey and Larsen 1978, "Variations of box plots"), which outliers don't move.

    Raises:
        ValueError: no samples, or one that is NaN or infinite.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"need at least one sample and only finite ones; got {list(samples)[:5]}")
    low, high = np.percentile(values, [25, 75])
    kept = values[values <= high + 3.0 * (high - low)]
    low, high = np.percentile(kept, [25, 75])
    return Timing(
        median_ms=float(np.median(kept)),
        iqr_ms=float(high - low),
        stderr_ms=float(1.25 * (high - low) / (1.35 * math.sqrt(kept.size))),
        n=int(kept.size),
        dropped=int(values.size - kept.size),
        samples=tuple(kept.tolist()),
    )


def time_calls(
    fn: Call,
    *,
    warmup: int = 3,
    repeats: int = 20,
    device: str = "cpu",
    min_seconds: float = 0.0,
    calls: int = 1,
) -> Timing:
    """Time ``fn`` after ``warmup`` calls: at least ``repeats`` samples and ``min_seconds`` of them.

    On CUDA a sample is the time between two events on the current stream (it includes gaps in which the
    GPU waits for Python: that is what a user waits for); elsewhere it is ``time.perf_counter``. The
    garbage collector rests meanwhile.

    Args:
        fn: what to time; its result is ignored, its exceptions pass through.
        calls: how many equal operations one ``fn()`` makes; times are divided by it.

    Raises:
        ValueError: ``repeats`` or ``calls`` below 1, ``warmup`` or ``min_seconds`` below 0.
    """
    if repeats < 1 or calls < 1 or warmup < 0 or min_seconds < 0:
        raise ValueError(
            "time_calls needs repeats >= 1, calls >= 1, warmup >= 0 and min_seconds >= 0; got "
            f"{repeats}, {calls}, {warmup}, {min_seconds}"
        )
    sample = _sampler(device)
    with _no_garbage_collection():
        for _ in range(warmup):
            sample(fn)
        samples: list[float] = []
        end = time.perf_counter() + min_seconds
        while len(samples) < repeats or (time.perf_counter() < end and len(samples) < MAX_SAMPLES):
            samples.append(sample(fn) / calls)
    return summarize(samples)


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline (above 1: faster), with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Interleaved timings by name, and the ratios ``baseline time / time``."""

    baseline: str
    timings: Mapping[str, Timing]
    ratios: Mapping[str, Ratio]


def interleaved(
    fns: Mapping[str, Call],
    *,
    baseline: str | None = None,
    rounds: int = 30,
    warmup: int = 3,
    device: str = "cpu",
    seed: int = 0,
) -> Comparison:
    """Time several callables round-robin, so that drift and neighbours hit all of them alike.

    Each round runs every callable once in a random order. Ratios are of medians; their intervals
    resample whole rounds (a paired bootstrap), because the samples of one round share their disturbance.

    Args:
        fns: name -> callable.
        baseline: name that the ratios refer to; the first one by default.

    Raises:
        ValueError: nothing to time, fewer than one round, or a baseline that isn't among the names.
    """
    names = list(fns)
    if not names or rounds < 1 or warmup < 0:
        raise ValueError(
            f"interleaved needs callables, rounds >= 1, warmup >= 0; got {names}, {rounds}, {warmup}"
        )
    baseline = names[0] if baseline is None else baseline
    if baseline not in fns:
        raise ValueError(f"baseline {baseline!r} is not one of {names}")
    rng = np.random.default_rng(seed)
    sample = _sampler(device)
    times = np.empty((rounds, len(names)))
    with _no_garbage_collection():
        for name in names:
            for _ in range(warmup):
                sample(fns[name])
        for row in times:
            for column in rng.permutation(len(names)):
                row[column] = sample(fns[names[column]])
    timings = {name: summarize(times[:, i].tolist()) for i, name in enumerate(names)}
    return Comparison(baseline, timings, _ratios(times, names, names.index(baseline), rng))


def _ratios(
    times: np.ndarray, names: Sequence[str], base: int, rng: np.random.Generator, draws: int = 2000
) -> dict[str, Ratio]:
    """Ratios of medians with percentile-bootstrap intervals; ``times`` is ``[rounds, callables]``."""
    floor = np.finfo(np.float64).tiny  # a clock too coarse for the callable gives zeros
    medians = np.maximum(np.median(times, axis=0), floor)
    picks = rng.integers(len(times), size=(draws, len(times)))
    found = {}
    for i, name in enumerate(names):
        ours, theirs = (np.median(times[picks, j], axis=1) for j in (i, base))
        low, high = np.percentile(theirs / np.maximum(ours, floor), [2.5, 97.5])
        found[name] = Ratio(float(medians[base] / medians[i]), float(low), float(high))
    return found


def _sampler(device: str) -> Callable[[Call], float]:
    """A function that runs a callable once and returns its time in milliseconds."""
    return _cuda_sample if torch.device(device).type == "cuda" else _cpu_sample


def _cpu_sample(fn: Call) -> float:
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e3


def _cuda_sample(fn: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    fn()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
