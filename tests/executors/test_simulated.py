"""The simulated executor: contract, a clock that jumps, slots that overtake, costs, time-outs, failures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from autocomp.errors import JobError, RunError
from autocomp.executors.base import ItemFailed, Outcome, WorkItem
from autocomp.executors.simulated import SimulatedClock, SimulatedExecutor
from autocomp.testing.executors import CONTRACT_CHECKS, ExecutorFactory, run_items
from autocomp.trial import Failure


class Worker:
    """Says what it costs, and remembers when it was called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def measure(self, name: str, seconds: float) -> dict[str, Any]:
        self.calls.append(name)
        return {"name": name, "seconds": seconds}

    def fail(self, seconds: float) -> None:
        raise ItemFailed(Failure("oom", "needs 3 GB", seconds))

    def interrupt(self) -> None:
        raise KeyboardInterrupt


def item(name: str, seconds: float, timeout_s: float = 0.0) -> WorkItem:
    return WorkItem(name, "measure", {"name": name, "seconds": seconds}, timeout_s)


def arrivals(executor: SimulatedExecutor, items: list[WorkItem]) -> list[tuple[float, str, str]]:
    """(time, item, worker) in the order in which the outcomes came."""
    for i in items:
        executor.submit(i)
    found = []
    while executor.busy():
        found += [(executor.clock(), o.item.id, o.worker) for o in executor.completed(1.0)]
    return found


@pytest.mark.parametrize("check", CONTRACT_CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[ExecutorFactory], None]) -> None:
    check(lambda spec, workers, retries: SimulatedExecutor(spec.build(), workers))


def test_slots_overtake_each_other_and_the_next_item_starts_when_one_is_free() -> None:
    executor = SimulatedExecutor(Worker(), slots=2)
    items = [item("a", 100.0), item("b", 30.0), item("c", 30.0), item("d", 50.0)]
    assert arrivals(executor, items) == [
        (30.0, "b", "simulated-1"),
        (60.0, "c", "simulated-1"),
        (100.0, "a", "simulated-0"),
        (110.0, "d", "simulated-1"),
    ]


def test_a_worker_is_asked_when_its_item_starts() -> None:
    worker = Worker()
    executor = SimulatedExecutor(worker, slots=1)
    executor.submit(item("a", 10.0))
    executor.submit(item("b", 10.0))
    assert worker.calls == ["a"]
    next(iter(executor.completed(1.0)))
    assert worker.calls == ["a", "b"]


def test_ends_at_one_moment_come_together_in_the_order_of_their_starts() -> None:
    executor = SimulatedExecutor(Worker(), slots=3)
    for name in ("z", "a", "m"):
        executor.submit(item(name, 0.1))
    assert [o.item.id for o in executor.completed(1.0)] == ["z", "a", "m"]


def test_a_poll_lets_no_time_pass() -> None:
    executor = SimulatedExecutor(Worker(), slots=1)
    executor.submit(item("a", 10.0))
    assert list(executor.completed(0.0)) == [] and executor.clock() == 0.0 and executor.busy() == 1
    executor.clock.advance(10.0)
    assert [o.item.id for o in executor.completed(0.0)] == ["a"]


def test_items_without_cost_all_come_at_once() -> None:
    executor = SimulatedExecutor(Worker(), slots=2)
    assert [t for t, _, _ in arrivals(executor, [item(str(n), 0.0) for n in range(7)])] == [0.0] * 7


def test_time_adds_up_to_the_last_bit_of_every_end() -> None:
    executor = SimulatedExecutor(Worker(), slots=1)
    executor.clock.advance(1e9)  # 0.1 s are not representable up here; the clock must still reach each end
    assert len(arrivals(executor, [item(str(n), 0.1) for n in range(50)])) == 50
    assert executor.clock() == pytest.approx(1e9 + 5.0)


def test_over_its_time_an_item_fails_when_the_limit_is_reached() -> None:
    executor = SimulatedExecutor(Worker(), slots=1)
    outcomes = run_items(executor, [item("slow", 100.0, timeout_s=60.0), item("exact", 60.0, timeout_s=60.0)])
    slow, exact = outcomes["slow"], outcomes["exact"]
    assert slow.value is None and slow.failure == Failure("timeout", "no result within 60 s")
    assert slow.seconds == slow.failure.seconds == 60.0
    assert exact.failure is None and executor.clock() == 120.0


def test_a_failure_comes_back_as_it_was_recorded_and_takes_its_time() -> None:
    executor = SimulatedExecutor(Worker(), slots=1)
    (outcome,) = run_items(executor, [WorkItem("f", "fail", {"seconds": 12.0})]).values()
    assert outcome.failure == Failure("oom", "needs 3 GB") and outcome.seconds == executor.clock() == 12.0


def test_costs_can_be_given_for_any_item() -> None:
    seen = []

    def cost(work: WorkItem, result: Any) -> float:
        seen.append((work.id, result))
        return 7.0 if work.method == "measure" else 3.0

    executor = SimulatedExecutor(Worker(), slots=1, cost=cost)
    arrivals(executor, [item("a", 1.0), WorkItem("f", "fail", {"seconds": 0.0})])
    assert executor.clock() == 10.0
    assert seen == [("a", {"name": "a", "seconds": 1.0}), ("f", Failure("oom", "needs 3 GB"))]


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_impossible_costs_and_times_are_refused(seconds: float) -> None:
    with pytest.raises(RunError, match="simulated cost of 'a'"):
        SimulatedExecutor(Worker()).submit(item("a", seconds))
    with pytest.raises(ValueError, match="only goes forward"):
        SimulatedClock().advance(seconds)


def test_no_slots_are_refused_and_a_clock_may_be_shared() -> None:
    with pytest.raises(JobError, match="workers >= 1"):
        SimulatedExecutor(Worker(), slots=0)
    clock = SimulatedClock()
    first, second = SimulatedExecutor(Worker(), clock=clock), SimulatedExecutor(Worker(), clock=clock)
    first.submit(item("a", 5.0))
    assert len(list(first.completed(1.0))) == 1 and second.clock() == 5.0


def test_ctrl_c_in_a_worker_reaches_the_driver() -> None:
    with pytest.raises(KeyboardInterrupt):
        SimulatedExecutor(Worker()).submit(WorkItem("i", "interrupt"))


def test_a_worker_can_not_change_what_the_driver_holds() -> None:
    class Greedy:
        def take(self, items: list[int]) -> list[int]:
            items.clear()
            return items

    held = [1, 2]
    outcome: Outcome = run_items(SimulatedExecutor(Greedy()), [WorkItem("t", "take", {"items": held})])["t"]
    assert outcome.value == [] and held == [1, 2]
