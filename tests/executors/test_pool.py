"""Queue, retries, limits and replacement, over scripted workers and a clock that a test moves by hand."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from autocomp.errors import JobError, RunError
from autocomp.executors._pool import PooledExecutor, WorkerDied, pickled_spec
from autocomp.executors._process import Reply, encode_reply
from autocomp.executors.base import Outcome, WorkerSpec, WorkItem
from autocomp.trial import Failure

DIES = "dies"
HANGS = "hangs"
READY = Reply("node")
BROKEN = Reply(failure=Failure("invalid", "no such folder"))


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class ScriptedLink:
    """Answers ``start`` with the given reply and calls with what ``answer`` says."""

    start: Reply | str
    answer: Callable[[str], Reply | str]
    inbox: list[Reply | str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    killed: bool = False
    dead_when_idle: bool = False

    def __post_init__(self) -> None:
        self.inbox.append(self.start)

    def send(self, payload: bytes) -> None:
        if self.dead_when_idle:
            raise WorkerDied("died while idle")
        method, _ = pickle.loads(payload)
        self.sent.append(method)
        self.inbox.append(self.answer(method))

    def receive(self) -> bytes:
        message = self.inbox.pop(0)
        if isinstance(message, str):
            raise WorkerDied("worker exited with signal 9")
        return encode_reply(message)

    def hang_up(self) -> None:
        assert not self.killed

    def kill(self, grace_s: float = 0.0) -> None:
        self.killed = True

    @property
    def speaks(self) -> bool:
        return bool(self.inbox) and self.inbox[0] != HANGS


@dataclass
class ScriptedTransport:
    """Waiting moves the clock; ``starts`` scripts one worker after the other (the last one repeats)."""

    clock: Clock
    starts: list[Reply | str]
    answer: Callable[[str], Reply | str] = lambda method: Reply(method)
    opened: list[ScriptedLink] = field(default_factory=list)
    closed: int = 0
    name: str = "scripted"

    def open(self, index: int) -> ScriptedLink:
        start = self.starts.pop(0) if len(self.starts) > 1 else self.starts[0]
        if start == "refused":
            raise WorkerDied("no process can be started")
        self.opened.append(ScriptedLink(start, self.answer))
        return self.opened[-1]

    def wait(self, links: Sequence[ScriptedLink], timeout: float) -> Sequence[ScriptedLink]:
        ready = [link for link in links if link.speaks]
        if not ready:
            self.clock.now += max(timeout, 1e-3)
        return ready

    def close(self) -> None:
        self.closed += 1


def _pool(
    starts: list[Reply | str],
    answer: Callable[[str], Reply | str] = lambda method: Reply(method),
    slots: int = 1,
    retries: int = 1,
) -> tuple[PooledExecutor[ScriptedLink], ScriptedTransport]:
    clock = Clock()
    transport = ScriptedTransport(clock, starts, answer)
    return PooledExecutor(transport, slots, retries, start_timeout_s=100.0, clock=clock), transport


def _run(pool: PooledExecutor[ScriptedLink], *items: WorkItem) -> list[Outcome]:
    for item in items:
        pool.submit(item)
    return list(pool.completed(50.0)) + [o for _ in range(200) if pool.busy() for o in pool.completed(50.0)]


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_crashing_item_runs_once_and_then_as_often_as_allowed(retries: int) -> None:
    pool, transport = _pool([READY], lambda m: DIES if m == "bad" else Reply(m), retries=retries)
    bad, good = _run(pool, WorkItem("1", "bad"), WorkItem("2", "good"))
    assert bad.failure == Failure("crash", "worker exited with signal 9")
    assert bad.attempts == retries + 1
    assert good.value == "good" and good.worker == "node/scripted-0"
    assert len(transport.opened) == retries + 2


def test_a_retried_item_goes_before_later_ones() -> None:
    deaths = iter([DIES])
    pool, _ = _pool([READY], lambda m: next(deaths, Reply(m)) if m == "first" else Reply(m))
    outcomes = _run(pool, WorkItem("1", "first"), WorkItem("2", "second"), WorkItem("3", "third"))
    assert [o.item.id for o in outcomes] == ["1", "2", "3"]
    assert [o.attempts for o in outcomes] == [2, 1, 1]


def test_time_out_is_not_retried_and_costs_the_worker_alone() -> None:
    pool, transport = _pool([READY], lambda m: HANGS if m == "hang" else Reply(m))
    hang, good = _run(pool, WorkItem("1", "hang", timeout_s=5.0), WorkItem("2", "good", timeout_s=5.0))
    assert hang.failure is not None and hang.failure.kind == "timeout" and hang.attempts == 1
    assert 5.0 <= hang.seconds < 6.1
    assert good.value == "good"
    assert [link.killed for link in transport.opened] == [True, False]


def test_a_late_driver_does_not_time_out_a_finished_item() -> None:
    pool, transport = _pool([READY])
    pool.submit(WorkItem("0", "warm"))
    assert len(list(pool.completed(1.0))) == 1
    pool.submit(WorkItem("1", "quick", timeout_s=1.0))
    transport.clock.now += 1000.0  # the driver was busy elsewhere
    (outcome,) = pool.completed(0.0)
    assert outcome.value == "quick"


def test_the_time_to_build_a_worker_is_not_counted_to_the_item() -> None:
    pool, transport = _pool([HANGS], lambda m: Reply(m))
    pool.submit(WorkItem("1", "quick", timeout_s=1.0))
    assert list(pool.completed(50.0)) == [] and pool.busy() == 1
    transport.opened[0].inbox[:] = [READY]
    (outcome,) = pool.completed(50.0)
    assert outcome.value == "quick" and len(transport.opened) == 1


def test_a_worker_that_is_never_ready_fails_the_items() -> None:
    pool, transport = _pool([HANGS])
    (outcome,) = _run(pool, WorkItem("1", "any"))
    assert outcome.failure is not None and outcome.failure.kind == "timeout"
    assert "ready after 100 s" in outcome.failure.reason
    assert transport.opened[0].killed and len(transport.opened) == 1


def test_a_broken_spec_is_built_once_per_slot() -> None:
    pool, transport = _pool([BROKEN], slots=3)
    outcomes = _run(pool, *(WorkItem(str(n), "any") for n in range(5)))
    outcomes += _run(pool, WorkItem("late", "any"))
    assert {o.failure for o in outcomes} == {
        Failure("invalid", "no worker could be started: no such folder"),
    }
    assert len(outcomes) == 6 and len(transport.opened) == 3


def test_dying_while_starting_is_retried_then_given_up() -> None:
    pool, transport = _pool([DIES], retries=2)
    (outcome,) = _run(pool, WorkItem("1", "any"))
    assert outcome.failure is not None and outcome.failure.kind == "crash" and outcome.attempts == 0
    assert len(transport.opened) == 3


@pytest.mark.parametrize("first", [DIES, "refused"])
def test_a_start_that_fails_once_is_forgiven(first: str) -> None:
    pool, _ = _pool([first, READY])
    (outcome,) = _run(pool, WorkItem("1", "any"))
    assert outcome.value == "any" and outcome.attempts == 1


def test_one_slot_lost_leaves_the_others_working() -> None:
    pool, _ = _pool([BROKEN, READY], slots=2)
    outcomes = _run(pool, *(WorkItem(str(n), "any") for n in range(4)))
    assert [o.value for o in outcomes] == ["any"] * 4
    assert {o.worker for o in outcomes} == {"node/scripted-1"}


def test_a_replacement_that_fails_to_build_gets_another_try() -> None:
    """The dead worker's memory may not be free yet."""
    deaths = iter([DIES])
    pool, transport = _pool([READY, BROKEN, READY], lambda m: next(deaths, Reply(m)))
    (outcome,) = _run(pool, WorkItem("1", "any"))
    assert outcome.value == "any" and outcome.attempts == 2
    assert len(transport.opened) == 3


def test_death_while_idle_is_not_the_next_items_fault() -> None:
    pool, transport = _pool([READY], retries=1)
    assert len(_run(pool, WorkItem("1", "any"))) == 1
    transport.opened[0].dead_when_idle = True
    (outcome,) = _run(pool, WorkItem("2", "any"))
    assert outcome.value == "any" and outcome.attempts == 1
    assert len(transport.opened) == 2


def test_a_fatal_reply_replaces_the_worker_and_keeps_the_outcome() -> None:
    lost = Reply(failure=Failure("error", "CUDA error"), fatal=True)
    pool, transport = _pool([READY], lambda m: lost if m == "bad" else Reply(m))
    bad, good = _run(pool, WorkItem("1", "bad"), WorkItem("2", "good"))
    assert bad.failure == lost.failure and bad.attempts == 1
    assert good.value == "good"
    assert transport.opened[0].killed and len(transport.opened) == 2


def test_many_crashes_in_a_row_do_not_retire_a_slot() -> None:
    pool, _ = _pool([READY], lambda m: DIES if m == "bad" else Reply(m), retries=0)
    outcomes = _run(pool, *(WorkItem(str(n), "bad") for n in range(10)), WorkItem("last", "good"))
    assert [o.failure is None for o in outcomes] == [False] * 10 + [True]


def test_close_drops_what_is_under_way() -> None:
    pool, transport = _pool([READY], lambda m: HANGS)
    with pool:
        pool.submit(WorkItem("1", "any"))
        pool.submit(WorkItem("2", "any"))
        assert pool.busy() == 2
    pool.close()
    assert pool.busy() == 0 and transport.closed == 1 and transport.opened[0].killed
    with pytest.raises(RunError, match="'3'"):
        pool.submit(WorkItem("3", "any"))


def test_spec_that_cannot_be_pickled_is_refused_at_once() -> None:
    with pytest.raises(JobError, match="m:c"):
        pickled_spec(WorkerSpec("m:c", {"callback": lambda: None}))
