"""A study on a device that drifts and on one whose timings scatter; on a clock that is simulated."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import autocomp.study
from autocomp.api import front_of
from autocomp.executors.base import WorkItem
from autocomp.executors.simulated import SimulatedClock, SimulatedExecutor
from autocomp.history import PROXY, REPORT, timing_only
from autocomp.job import Job
from autocomp.journal import read_records
from autocomp.noise import NearTies
from autocomp.objective import Objective
from autocomp.readings import Readings
from autocomp.repeats import Pair
from autocomp.searchers.random import RandomSearcher
from autocomp.space import Candidate
from autocomp.study import Study, StudyResult
from autocomp.testing.fakes import BITS, FakeWorker, InlineExecutor
from autocomp.trial import Estimate, Fidelity, Measurement, Trial

FULL_S, TIMING_S = 10.0, 2.0


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocomp.study, "artifacts", lambda result: [])


class Device(FakeWorker):
    """A worker whose latency is ``truth`` times the device's speed of the moment, seen through noise."""

    def __init__(
        self,
        clock: Callable[[], float],
        speed: Callable[[float], float] = lambda t: 1.0,
        noise: float = 0.01,
        claimed: float = 0.002,
        decisions: int = 8,
    ) -> None:
        super().__init__(decisions)
        self.clock, self.speed, self.noise, self.claimed = clock, speed, noise, claimed

    def truth(self, candidate: Mapping[str, Any]) -> float:
        return 5.0 + sum(BITS[str(v)] for v in candidate.values())

    def measure(self, candidate: Mapping[str, Any], fidelity: Mapping[str, Any]) -> dict[str, Any]:
        found = super().measure(candidate, fidelity)
        full = bool(fidelity["split"])
        found["seconds"] = FULL_S if full else TIMING_S
        text = f"{sorted(candidate.items())}{fidelity['name']}"  # the same noise in whatever order
        seen = np.random.default_rng(zlib.crc32(text.encode())).normal(
            0, math.hypot(self.noise, self.claimed)
        )
        value = self.truth(candidate) * self.speed(self.clock()) * math.exp(seen)
        found["metrics"]["decode_ms"] = {"value": value, "stderr": self.claimed * value, "n": 5}
        return found


def study(folder: Path, worker: Device, executor: Any = None, **changes: Any) -> Study:
    job: dict[str, Any] = {
        "workload": {"kind": "causal_lm", "model": "none"},
        "space": [{"bitwidths": {}}],
        "objectives": ["min kl", "min decode_ms"],
        "budget": {"trials": 120},
        "validation": {"audit": 0, "promote": 12, "report": 8},
        **changes,
    }
    clock = worker.clock
    runner = executor or SimulatedExecutor(worker, slots=1, clock=clock)  # type: ignore[arg-type]
    return Study(Job.of(job), folder, executor=runner, searcher=RandomSearcher, clock=clock)


def journal(folder: Path) -> list[Trial]:
    return [Trial.from_json(r["trial"]) for r in read_records(folder) if r["kind"] == "trial"]


def off(worker: Device, trials: list[Trial]) -> np.ndarray:
    """Log of read over true latency."""
    return np.array([math.log(t.value("decode_ms") / worker.truth(t.candidate.values)) for t in trials])


def test_a_slow_down_in_mid_search_is_found_told_and_corrected(tmp_path: Path) -> None:
    clock = SimulatedClock()
    worker = Device(clock, speed=lambda t: 1.2 if t > 600 else 1.0)
    search = study(tmp_path, worker)
    result = search.run()
    (found,) = result.noise["drift"]["decode_ms"].values()
    assert found["drifts"] and found["change"] == pytest.approx(0.2, abs=0.03)
    assert any("20 % slower; latencies are corrected" in w or "19 % slower" in w or "21 % slower" in w
               for w in result.noise["words"])  # fmt: skip
    read = search.readings.at(PROXY)
    raw = [t for t in journal(tmp_path) if t.fidelity.name == "proxy"]
    assert [t.number for t in read] == [t.number for t in raw]
    wrong, right = off(worker, raw), off(worker, read)
    late = np.arange(len(raw)) > len(raw) * 0.65
    assert wrong[late].mean() - wrong[:40].mean() == pytest.approx(math.log(1.2), abs=0.01)
    assert abs(right[late].mean() - right[:40].mean()) < 0.01
    errors = np.array([t.stderr("decode_ms") / t.value("decode_ms") for t in read])
    scores = (right - right.mean()) / errors
    assert np.sqrt((scores**2).mean()) < 1.5 and (np.abs(scores) > 3).mean() < 0.02
    noted = read[-1].measurement
    assert noted is not None and noted.details["read"]["decode_ms"]["raw"] == raw[-1].value("decode_ms")


def test_references_take_little_time_and_share_what_baselines_measure(tmp_path: Path) -> None:
    clock = SimulatedClock()
    study(tmp_path, Device(clock)).run()
    trials = journal(tmp_path)
    mine = [t for t in trials if t.origin == "reference"]
    assert 8 <= len(mine) <= 16
    assert {t.candidate for t in mine} == {trials[0].candidate}
    assert all(set(t.values()) == {"decode_ms"} for t in mine)
    spent = sum(t.measurement.seconds for t in trials if t.measurement is not None)
    assert sum(t.measurement.seconds for t in mine if t.measurement) <= 0.05 * spent


def test_a_steady_device_is_left_alone_but_its_noise_is_believed(tmp_path: Path) -> None:
    clock = SimulatedClock()
    worker = Device(clock, noise=0.03)
    search = study(tmp_path, worker)
    result = search.run()
    (found,) = result.noise["drift"]["decode_ms"].values()
    assert not found["drifts"] and 0.015 < found["noise"] < 0.06
    read, raw = search.readings.at(PROXY), search.history.at(PROXY)
    assert [t.value("decode_ms") for t in read] == [t.value("decode_ms") for t in raw]
    errors = [t.stderr("decode_ms") / t.value("decode_ms") for t in read]
    assert all(e == pytest.approx(math.hypot(found["noise"], worker.claimed)) for e in errors)
    mine = [t for t in journal(tmp_path) if t.candidate == raw[0].candidate and not t.fidelity.split]
    assert {t.origin for t in mine} == {"reference", "repeat"}, "the reference is close to another one here"
    assert len({t.key for t in mine}) == len(mine)


def test_quality_alone_needs_no_timings(tmp_path: Path) -> None:
    clock = SimulatedClock()
    search = study(tmp_path, Device(clock), objectives=["min kl", "min memory_mb"])
    result = search.run()
    assert all(t.fidelity.split for t in journal(tmp_path))
    assert result.noise == {"drift": {}, "pairs": [], "unknown": [], "words": []}
    assert search.readings.at(REPORT) == search.history.at(REPORT)


def test_reference_and_repeats_can_be_turned_off(tmp_path: Path) -> None:
    clock = SimulatedClock()
    settings = {"audit": 0, "promote": 12, "report": 8, "repeats": 0, "reference_every": 0}
    search = study(tmp_path, Device(clock, noise=0.05), validation=settings)
    search.run()
    assert all(t.fidelity.split for t in journal(tmp_path))


class Close(Device):
    """The last decision changes quality alone: all its options are equally fast."""

    def truth(self, candidate: Mapping[str, Any]) -> float:
        return 50.0 + 5 * sum(BITS[str(candidate[n])] for n in self.names[:-1])


def test_near_ties_are_timed_again_and_put_together(tmp_path: Path) -> None:
    clock = SimulatedClock()
    worker = Close(clock, noise=0.01, decisions=2)
    settings = {"audit": 0, "promote": 16, "report": 16, "repeats": 4}
    search = study(tmp_path, worker, budget={"trials": 16}, validation=settings)
    result = search.run()
    read = search.readings.at(REPORT)
    candidates = {t.number: t.candidate.values for t in read}
    for pair in result.noise["pairs"]:
        first, second = candidates[pair["first"]], candidates[pair["second"]]
        assert worker.truth(first) == worker.truth(second), "only these are close"
    assert all(p["verdict"] in ("tie", "decided") for p in result.noise["pairs"]) and result.noise["pairs"]
    repeats = [t for t in journal(tmp_path) if t.origin == "repeat"]
    counts = {c: sum(t.candidate == c for t in repeats) for c in {t.candidate for t in repeats}}
    assert counts and max(counts.values()) <= 4
    for trial in read:
        if trial.candidate in counts:
            assert trial.measurement is not None
            assert trial.measurement.details["read"]["decode_ms"]["repeats"] == counts[trial.candidate]
            assert abs(off(worker, [trial])[0]) < 4 * trial.stderr("decode_ms") / trial.value("decode_ms")
    assert [p.trial for p in result.front.points] == sorted(
        read, key=lambda t: (t.value("kl"), t.value("decode_ms"), t.number)
    )


def race(difference: float, seed: int, repeats: int = 4, noise: float = 0.02) -> tuple[list[Pair], int]:
    """Verdicts on two candidates that are that far apart, and the number of timings it took."""
    rng = np.random.default_rng(seed)
    reference = Candidate.of({"a": 0})
    readings, times = Readings(reference, ("ms",)), {0: 100.0, 1: 50.0, 2: 50.0 * math.exp(-difference)}
    number = 0

    def add(which: int, level: Fidelity, origin: str = "x") -> None:
        nonlocal number
        ms = times[which] * math.exp(rng.normal(0, noise))
        metrics = {"ms": Estimate(ms, 0.001 * ms), "kl": Estimate(float(which), 0.001)}
        found = Measurement(metrics, "cpu", TIMING_S)
        readings.add(Trial(number, Candidate.of({"a": which}), level, origin, found), 10.0 * number)
        number += 1

    for i in range(8):
        add(0, timing_only(i), "reference")
    for which in (0, 1, 2):
        add(which, REPORT)
    ties, taken = NearTies(readings, (Objective("kl"), Objective("ms")), (), repeats), 0
    while again := ties.next_round():
        for candidate in again:
            add(int(candidate["a"]), timing_only(100 + number), "repeat")
            taken += 1
    return ties.verdicts(), taken


def test_equal_ones_are_declared_a_tie() -> None:
    found = [race(0.0, seed) for seed in range(60)]
    wrong = [p for pairs, _ in found for p in pairs if p.verdict == "decided"]
    assert len(wrong) <= 4, "too many equal pairs were decided"
    assert np.mean([taken == 8 for _, taken in found]) > 0.8


def test_what_repeats_can_tell_apart_is_decided() -> None:
    found = [race(0.05, seed, repeats=8) for seed in range(60)]
    close = [p for pairs, _ in found for p in pairs]
    assert len(close) > 20, "hardly any pair was close at first"
    assert np.mean([p.verdict == "decided" for p in close]) > 0.8
    assert all(p.difference < 0 for p in close if p.verdict == "decided"), "decided the wrong way"
    assert np.mean([taken for pairs, taken in found if pairs]) < 12, "decided pairs are still timed"


def test_rounds_go_forth_and_back_and_only_over_the_undecided(tmp_path: Path) -> None:
    clock = SimulatedClock()
    worker = Close(clock, noise=0.01, decisions=2)
    study(tmp_path, worker, budget={"trials": 16}).run()
    order = [t.candidate.fingerprint for t in journal(tmp_path) if t.origin == "repeat"]
    first = order[: len(set(order))]
    assert len(set(first)) == len(first)
    second = order[len(first) : 2 * len(first)]
    kept = [c for c in reversed(first) if c in second]
    assert second[: len(kept)] == kept and len(kept) > 1


@pytest.mark.parametrize("stop_at", [3, 14, 20, 33, 41, 50, 57])
def test_resume_times_nothing_twice(tmp_path: Path, stop_at: int) -> None:
    clock = SimulatedClock()
    worker, count = Close(clock, noise=0.02, decisions=2), 0

    def interrupt(item: WorkItem) -> None:
        nonlocal count
        clock.advance(5.0)
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt

    def run() -> StudyResult:
        executor = InlineExecutor(worker, slots=1, before=interrupt)
        return study(tmp_path, worker, executor, budget={"trials": 16}).run()

    first = run()
    before = journal(tmp_path)
    if first.status == "stopped":
        assert len(front_of(tmp_path)) == len(first.front)
        second = run()
        assert second.status == "finished" and journal(tmp_path)[: len(before)] == before
    assert len(set(worker.measured)) == len(worker.measured)
    done = len(worker.measured)
    assert run().front == front_of(tmp_path)
    assert len(worker.measured) == done


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_a_finished_run_on_a_drifting_device_stays_finished(tmp_path: Path, noise: float) -> None:
    """What was chosen before the last references came is not chosen anew with them."""
    clock = SimulatedClock()
    worker = Device(clock, speed=lambda t: 1.0 + t / 1500, noise=noise, decisions=5)
    first = study(tmp_path, worker, budget={"trials": 40}).run()
    done = len(journal(tmp_path))
    again = study(tmp_path, worker, budget={"trials": 40}).run()
    assert len(journal(tmp_path)) == done and again.front == first.front
    assert again.noise == first.noise


def test_a_resumed_search_begins_with_the_reference(tmp_path: Path) -> None:
    clock = SimulatedClock()
    worker = Device(clock, decisions=3)
    study(tmp_path, worker, budget={"trials": 12}).run()
    done = len(journal(tmp_path))
    study(tmp_path, worker, budget={"trials": 20}).run()
    assert journal(tmp_path)[done].origin == "reference"


def test_a_worker_that_cannot_time_alone_is_asked_once(tmp_path: Path) -> None:
    class Whole(Device):
        def measure(self, candidate: Mapping[str, Any], fidelity: Mapping[str, Any]) -> dict[str, Any]:
            if not fidelity["split"]:
                raise FloatingPointError("no such split")
            return super().measure(candidate, fidelity)

    clock = SimulatedClock()
    result = study(tmp_path, Whole(clock)).run()
    assert result.status == "finished"
    assert sum(t.origin == "reference" for t in journal(tmp_path)) == 1


def test_machines_of_different_speed_are_read_at_the_same(tmp_path: Path) -> None:
    reference, other = Candidate.of({"a": 0}), Candidate.of({"a": 1})
    readings = Readings(reference, ("ms",))

    def add(number: int, candidate: Candidate, level: Fidelity, node: str, ms: float) -> None:
        made = Measurement({"ms": Estimate(ms, 0.001 * ms)}, "cpu")
        readings.add(
            Trial(number, candidate, level, "x", made, worker=f"{node}/local-{number % 2}"), 10.0 * number
        )

    for i in range(12):
        fast = i % 2 == 0
        add(i, reference, Fidelity(f"timing-{i}", ""), "a" if fast else "b", 10.0 if fast else 15.0)
    add(20, reference, PROXY, "a", 10.0)
    add(21, other, PROXY, "a", 20.0)
    add(22, Candidate.of({"a": 2}), PROXY, "b", 30.0)
    add(23, Candidate.of({"a": 3}), PROXY, "c", 30.0)
    values = [t.value("ms") for t in readings.at(PROXY)]
    assert values == [pytest.approx(v, rel=0.01) for v in (10.0, 20.0, 20.0, 30.0)]
