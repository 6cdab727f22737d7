"""Conformance suite for executors: run it on your own class, as the built-in ones do.

::

    from autocomp.testing.executors import EXECUTOR_CHECKS

    @pytest.mark.parametrize("check", EXECUTOR_CHECKS, ids=lambda check: check.__name__)
    def test_conformance(check):
        check(lambda spec, workers, retries: MyExecutor(spec, workers, retries))

``EXECUTOR_CHECKS`` are ``CONTRACT_CHECKS``, which any executor meets, and ``PROCESS_CHECKS``: what is
expected where workers are processes of their own. An executor that calls its worker in the driver's process
passes the first: ``check_executor(factory, CONTRACT_CHECKS)``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autocomp.errors import AutocompError
from autocomp.executors.base import Executor, Outcome, WorkerSpec, WorkItem

#: (spec, workers, retries) -> executor
ExecutorFactory = Callable[[WorkerSpec, int, int], Executor]

TOY = "autocomp.testing.workers:ToyWorker"
PATIENCE_S = 60.0  # no check waits longer for its outcomes
CLOSE_S = 15.0  # "seconds", with room for a busy machine


def drain(executor: Executor, patience_s: float = PATIENCE_S) -> list[Outcome]:
    """All outcomes of what was submitted, in the order in which they came.

    Raises:
        AssertionError: some are still missing after ``patience_s`` seconds.
    """
    deadline = time.monotonic() + patience_s
    outcomes: list[Outcome] = []
    while executor.busy():
        assert time.monotonic() < deadline, (
            f"{executor.busy()} items are unfinished after {patience_s:g} s; have {outcomes}"
        )
        outcomes.extend(executor.completed(1.0))
    return outcomes


def run_items(executor: Executor, items: Iterable[WorkItem]) -> dict[str, Outcome]:
    """Submit, wait, and return the outcomes by item id; every item exactly once."""
    items = list(items)
    for item in items:
        executor.submit(item)
    outcomes = drain(executor)
    came, sent = sorted(o.item.id for o in outcomes), sorted(item.id for item in items)
    assert came == sent, f"submitted {sent}, got back {came}"
    return {outcome.item.id: outcome for outcome in outcomes}


@contextmanager
def _opened(factory: ExecutorFactory, spec: WorkerSpec, workers: int, retries: int = 1) -> Iterator[Executor]:
    executor = factory(spec, workers, retries)
    try:
        yield executor
    finally:
        executor.close()


def _value(outcome: Outcome) -> Any:
    assert outcome.failure is None, f"{outcome.item} failed: {outcome.failure}"
    return outcome.value


def _reason(outcome: Outcome, kind: str) -> str:
    assert outcome.failure is not None, f"{outcome.item} gave {outcome.value!r}, not a failure"
    assert outcome.value is None, f"a failure came with the value {outcome.value!r}"
    assert outcome.failure.kind == kind, f"expected kind {kind!r}, got {outcome.failure}"
    return outcome.failure.reason


def check_results(factory: ExecutorFactory) -> None:
    """More items than slots: each comes back once, with its own value; ``busy`` counts them."""
    with _opened(factory, WorkerSpec(TOY, {"greeting": "hello"}), 2) as executor:
        assert executor.slots == 2, f"slots is {executor.slots}, not 2"
        began = time.monotonic()
        assert list(executor.completed(30.0)) == [], "nothing was submitted, yet something came back"
        assert time.monotonic() - began < 10.0, "completed() must not wait when nothing is under way"
        for n in range(12):
            executor.submit(WorkItem(f"echo-{n}", "echo", {"value": {"n": n, "text": "ä" * n}}))
        assert executor.busy() == 12, f"12 items are under way, busy() says {executor.busy()}"
        outcomes = drain(executor)
        assert len(outcomes) == 12
        for outcome in outcomes:
            assert outcome.item.id == f"echo-{_value(outcome)['n']}", f"mixed up: {outcome}"
            assert outcome.attempts == 1 and outcome.worker and outcome.seconds >= 0, outcome
        greeted = run_items(executor, [WorkItem("greet", "greet")])
        assert _value(greeted["greet"]) == "hello", "the spec's kwargs did not reach the worker"


def check_long_lived_in_order(factory: ExecutorFactory) -> None:
    """One worker object serves all items, first in, first out; what is not taken comes next time."""
    with _opened(factory, WorkerSpec(TOY), 1) as executor:
        for n in range(5):
            executor.submit(WorkItem(str(n), "count"))
        outcomes = drain(executor)
        assert [_value(o) for o in outcomes] == [1, 2, 3, 4, 5], "the worker's state was lost between items"
        assert [o.item.id for o in outcomes] == list("01234"), "items were not run first in, first out"
        for n in range(3):
            executor.submit(WorkItem(str(n), "count"))
        first = next(iter(executor.completed(PATIENCE_S)))  # a caller that leaves its loop
        rest = drain(executor)
        assert [_value(o) for o in [first, *rest]] == [6, 7, 8], "outcomes were lost with the iterator"


def check_exceptions(factory: ExecutorFactory) -> None:
    """What a worker raises, returns or can't be sent is a failure of that item; the worker stays."""
    items = [WorkItem(kind, "fail", {"kind": kind}) for kind in ("oom", "nan", "invalid", "error")]
    items += [
        WorkItem("unpicklable", "unpicklable"),
        WorkItem("argument", "echo", {"value": lambda: None}),
        WorkItem("unknown", "no_such_method"),
    ]
    with _opened(factory, WorkerSpec(TOY), 1) as executor:
        before = _value(run_items(executor, [WorkItem("pid", "pid")])["pid"])
        outcomes = run_items(executor, items)
        assert "FloatingPointError" in _reason(outcomes["nan"], "nan")
        assert "can't allocate memory" in _reason(outcomes["oom"], "oom")
        assert "bits=17" in _reason(outcomes["invalid"], "invalid")
        assert "ValueError: some other trouble" in _reason(outcomes["error"], "error")
        assert "workers.py" in _reason(outcomes["error"], "error"), "the place of the error is missing"
        assert "plain values" in _reason(outcomes["unpicklable"], "error")
        assert "pickle" in _reason(outcomes["argument"], "invalid")
        assert "no_such_method" in _reason(outcomes["unknown"], "error")
        after = _value(run_items(executor, [WorkItem("pid", "pid")])["pid"])
        assert before == after, "an exception must not cost the worker"


def check_crash(factory: ExecutorFactory) -> None:
    """A worker that dies is replaced, its item retried and then failed; other items don't notice."""
    with tempfile.TemporaryDirectory() as folder, _opened(factory, WorkerSpec(TOY), 2) as executor:
        items = [
            WorkItem("crash", "crash"),
            WorkItem("once", "crash_once", {"path": str(Path(folder) / "crashed")}),
            *(WorkItem(f"echo-{n}", "echo", {"value": n}) for n in range(4)),
        ]
        outcomes = run_items(executor, items)
        assert _reason(outcomes["crash"], "crash")
        assert outcomes["crash"].attempts == 2, f"retries=1 is 2 attempts, got {outcomes['crash'].attempts}"
        assert _value(outcomes["once"]) == "survived" and outcomes["once"].attempts == 2, outcomes["once"]
        for n in range(4):
            assert _value(outcomes[f"echo-{n}"]) == n


def check_timeout(factory: ExecutorFactory) -> None:
    """An item over its time fails without a retry, its worker is killed, and the next item runs."""
    with tempfile.TemporaryDirectory() as folder, _opened(factory, WorkerSpec(TOY), 1) as executor:
        mark = Path(folder) / "not-killed"
        hang = WorkItem("hang", "hang_then_mark", {"seconds": 1.2, "path": str(mark)}, timeout_s=0.3)
        quick = WorkItem("quick", "echo", {"value": 1}, timeout_s=PATIENCE_S)
        outcomes = run_items(executor, [hang, quick])
        assert "0.3 s" in _reason(outcomes["hang"], "timeout")
        assert outcomes["hang"].attempts == 1, "a time-out must not be retried"
        assert _value(outcomes["quick"]) == 1
        time.sleep(max(0.0, 1.5 - outcomes["hang"].seconds))
        assert not mark.exists(), "the worker went on after its time-out"


def check_environment(factory: ExecutorFactory) -> None:
    """``env`` and the thread count are there, and threads do not spin."""
    names = ["AUTOCOMP_TEST_VARIABLE", "OMP_NUM_THREADS", "GOMP_SPINCOUNT"]
    spec = WorkerSpec(TOY, env={"AUTOCOMP_TEST_VARIABLE": "a b=c"}, threads=2)
    with _opened(factory, spec, 1) as executor:
        seen = _value(run_items(executor, [WorkItem("env", "env", {"names": names})])["env"])
    expected = dict(zip(names, ["a b=c", "2", "0"], strict=True))
    assert seen == expected, f"worker's environment: {seen}, expected {expected}"


def check_memory_cap(factory: ExecutorFactory) -> None:
    """Over ``memory_mb`` an allocation fails as out of memory, and the worker goes on (Linux only)."""
    if sys.platform != "linux":
        return
    with _opened(factory, WorkerSpec(TOY, memory_mb=1000), 1) as executor:
        items = [WorkItem(str(mb), "allocate", {"megabytes": mb}) for mb in (2000, 50)]
        outcomes = run_items(executor, items)
        assert "MemoryError" in _reason(outcomes["2000"], "oom")
        assert _value(outcomes["50"]) == 50


def check_constructor_failure(factory: ExecutorFactory) -> None:
    """A worker that can't be built fails every item, early and late ones, with the constructor's words."""
    with _opened(factory, WorkerSpec("autocomp.testing.workers:BrokenWorker"), 1) as executor:
        outcomes = run_items(executor, [WorkItem(str(n), "echo", {"value": n}) for n in range(3)])
        outcomes |= run_items(executor, [WorkItem("late", "echo", {"value": 0})])
        for outcome in outcomes.values():
            assert "'nowhere' does not exist" in _reason(outcome, "invalid")


def check_death_in_constructor(factory: ExecutorFactory) -> None:
    """A worker that dies while it is being built is not started for ever."""
    with _opened(factory, WorkerSpec("autocomp.testing.workers:DyingWorker"), 1) as executor:
        outcomes = run_items(executor, [WorkItem(str(n), "echo", {"value": n}) for n in range(2)])
        for outcome in outcomes.values():
            _reason(outcome, "crash")


def check_close(factory: ExecutorFactory) -> None:
    """``close`` drops what is not finished, twice does no harm, and nothing can be submitted after."""
    executor = factory(WorkerSpec(TOY), 1, 1)
    run_items(executor, [WorkItem("first", "count")])
    for n in range(3):
        executor.submit(WorkItem(str(n), "count"))
    executor.close()
    executor.close()
    finished = list(executor.completed(0.0))  # may have come in before the end
    assert len(finished) <= 3 and executor.busy() == 0, "dropped items still count"
    try:
        executor.submit(WorkItem("late", "count"))
    except AutocompError:
        return
    raise AssertionError("submit() on a closed executor must raise an AutocompError")


def check_close_ends_workers(factory: ExecutorFactory) -> None:
    """``close`` ends busy workers within seconds."""
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "still-running"
        executor = factory(WorkerSpec(TOY), 1, 1)
        run_items(executor, [WorkItem("pid", "pid")])
        executor.submit(WorkItem("long", "hang_then_mark", {"seconds": 1.2, "path": str(mark)}))
        began = time.monotonic()
        executor.close()
        taken = time.monotonic() - began
        assert taken < CLOSE_S, f"close() took {taken:.1f} s"
        time.sleep(max(0.0, 1.5 - taken))
        assert not mark.exists(), "a worker outlived close()"


def check_share(factory: ExecutorFactory) -> None:
    """With two slots, two items run at the same time, on workers of different names."""
    with _opened(factory, WorkerSpec(TOY), 2) as executor:
        spread: dict[str, set[int]] = defaultdict(set)
        for attempt in range(20):  # the second worker may still be loading at first
            items = [WorkItem(f"{attempt}-{n}", "sleep", {"seconds": 0.3}) for n in range(2)]
            items += [WorkItem(f"{attempt}-{n}", "pid") for n in range(2, 6)]
            for outcome in run_items(executor, items).values():
                if outcome.item.method == "pid":
                    spread[outcome.worker].add(_value(outcome))
            if len(spread) == 2:
                break
        assert len(spread) == 2, f"all items ran on {sorted(spread)}"
        pids = [pid for found in spread.values() for pid in found]
        assert len(pids) == len(set(pids)) == 2, f"workers are not one process each: {dict(spread)}"


CONTRACT_CHECKS: tuple[Callable[[ExecutorFactory], None], ...] = (
    check_results,
    check_long_lived_in_order,
    check_exceptions,
    check_close,
)
PROCESS_CHECKS: tuple[Callable[[ExecutorFactory], None], ...] = (
    check_share,
    check_crash,
    check_timeout,
    check_environment,
    check_memory_cap,
    check_constructor_failure,
    check_death_in_constructor,
    check_close_ends_workers,
)
EXECUTOR_CHECKS = (*CONTRACT_CHECKS, *PROCESS_CHECKS)


def check_executor(
    factory: ExecutorFactory, checks: Iterable[Callable[[ExecutorFactory], None]] = EXECUTOR_CHECKS
) -> None:
    """Run all checks.

    Args:
        factory: makes an executor from a spec, a number of workers and a number of retries.
        checks: which ones.

    Raises:
        AssertionError: with what differs from the contract.
    """
    for check in checks:
        check(factory)
