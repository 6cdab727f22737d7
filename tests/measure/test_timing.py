"""Medians, noise, outliers, and ratios of interleaved timings."""

from __future__ import annotations

import gc
import math
import time

import numpy as np
import pytest
import torch

from autocomp.measure import timing
from autocomp.measure.timing import interleaved, summarize, time_calls


class Clock:
    """A clock that only work moves, so that tests of timing don't depend on the machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_summary_of_known_samples() -> None:
    found = summarize([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.median_ms, found.iqr_ms, found.n, found.dropped) == (3.0, 2.0, 5, 0)
    assert found.stderr_ms == pytest.approx(1.25 * 2.0 / (1.35 * math.sqrt(5)))


def test_far_out_samples_are_dropped_and_counted() -> None:
    regular = [1.0, 1.1, 1.2, 1.3] * 5
    found = summarize([*regular, 1.4, 50.0, 9.0])
    assert (found.dropped, found.n) == (2, 21) and max(found.samples) == 1.4
    assert found.median_ms == pytest.approx(1.2)


def test_slow_side_only_and_ties_survive() -> None:
    assert summarize([1.0] * 9 + [0.1]).dropped == 0
    assert summarize([1.0] * 9 + [1.1]).dropped == 1  # no spread at all: anything slower is far out
    assert summarize([2.0]) == timing.Timing(2.0, 0.0, 0.0, 1, 0, (2.0,))


def test_stderr_predicts_the_spread_of_medians() -> None:
    rng = np.random.default_rng(0)
    medians, claimed = [], []
    for _ in range(400):
        found = summarize(rng.normal(10.0, 1.0, 50).tolist())
        medians.append(found.median_ms)
        claimed.append(found.stderr_ms)
    assert np.mean(claimed) == pytest.approx(np.std(medians), rel=0.25)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_samples_that_say_nothing_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        summarize(bad)


def test_time_calls_counts_warmup_repeats_and_calls(clock: Clock) -> None:
    seen: list[float] = []

    def fn() -> None:
        seen.append(clock.now)
        clock.work(1.0 if len(seen) <= 2 else 0.010)  # the first two are slow: they must be warm-up

    found = time_calls(fn, warmup=2, repeats=7, calls=5)
    assert len(seen) == 9 and found.n == 7
    assert found.median_ms == pytest.approx(2.0) and found.iqr_ms == pytest.approx(0.0, abs=1e-9)


def test_time_calls_goes_on_until_min_seconds(clock: Clock) -> None:
    found = time_calls(lambda: clock.work(0.25), warmup=0, repeats=2, min_seconds=2.0)
    assert found.n + found.dropped == 8


def test_time_calls_pauses_the_garbage_collector_even_when_the_callable_fails() -> None:
    states: list[bool] = []
    time_calls(lambda: states.append(gc.isenabled()), warmup=0, repeats=2)
    assert states == [False, False] and gc.isenabled()

    def broken() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        time_calls(broken)
    assert gc.isenabled()


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"warmup": -1}, {"calls": 0}, {"min_seconds": -1.0}])
def test_senseless_settings_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="time_calls needs"):
        time_calls(lambda: None, **bad)  # type: ignore[arg-type]


def test_real_clock_measures_a_sleep() -> None:
    found = time_calls(lambda: time.sleep(0.004), warmup=0, repeats=5)
    assert 4.0 <= found.median_ms < 40.0


def test_interleaved_ratios_under_shared_drift(clock: Clock) -> None:
    """The machine slows down fourfold on the way: medians move, the ratio doesn't."""
    order: list[str] = []
    rng = np.random.default_rng(1)

    def call(name: str, seconds: float) -> None:
        order.append(name)
        drift = 1.0 + 3.0 * len(order) / 400
        clock.work(seconds * drift * (1.0 + 0.02 * rng.random()))

    fns = {"slow": lambda: call("slow", 0.03), "fast": lambda: call("fast", 0.01)}
    found = interleaved(fns, rounds=200, warmup=0)
    assert found.baseline == "slow" and set(found.timings) == {"slow", "fast"}
    ratio = found.ratios["fast"]
    assert ratio.low <= ratio.value <= ratio.high and ratio.high - ratio.low < 0.3
    assert ratio.value == pytest.approx(3.0, rel=0.05)
    assert found.ratios["slow"] == timing.Ratio(1.0, 1.0, 1.0)
    rounds = [tuple(order[i : i + 2]) for i in range(0, 400, 2)]
    assert set(rounds) == {("slow", "fast"), ("fast", "slow")}


def test_interleaved_interval_contains_one_for_equals_and_not_for_unequals(clock: Clock) -> None:
    rng = np.random.default_rng(2)
    fns = {
        "a": lambda: clock.work(0.010 * rng.lognormal(0, 0.1)),
        "b": lambda: clock.work(0.010 * rng.lognormal(0, 0.1)),
        "c": lambda: clock.work(0.008 * rng.lognormal(0, 0.1)),
    }
    found = interleaved(fns, baseline="a", rounds=100)
    assert found.ratios["b"].low < 1.0 < found.ratios["b"].high
    assert found.ratios["c"].low > 1.0


def test_interleaved_refuses_nonsense(clock: Clock) -> None:
    with pytest.raises(ValueError, match="needs callables"):
        interleaved({})
    with pytest.raises(ValueError, match="'z' is not one of"):
        interleaved({"a": lambda: None}, baseline="z")
    found = interleaved({"a": lambda: None, "b": lambda: None}, rounds=2)  # a clock that stands still
    assert all(math.isfinite(r.value) for r in found.ratios.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_times_the_gpu_and_not_the_launch() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    assert time_calls(lambda: x @ x, device="cuda", repeats=5).median_ms > 0.5
