"""Queue, retries, time-outs and replacement of workers: the part that all executors have in common.

A transport knows how to start a worker process and how to talk to it; the pool decides what happens next.
Everything runs in the caller's thread, inside ``submit``, ``completed`` and ``busy``.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from autocomp.errors import JobError, RunError
from autocomp.executors._process import decode_reply, encode_call, unsendable
from autocomp.executors.base import Outcome, WorkerSpec, WorkItem
from autocomp.trial import Failure, FailureKind

_log = logging.getLogger(__name__)
_SLICE_S = 1.0  # longest single wait: a death that the transport can't signal is noticed within this
_GRACE_S = 2.0  # what idle workers get at close to end by themselves


class WorkerDied(Exception):
    """A worker process is gone (or could not be started); the message says how it ended."""

    def __init__(self, reason: str, kind: FailureKind = "crash") -> None:
        super().__init__(reason)
        self.failure = Failure(kind, reason)


class Link(Protocol):
    """One live worker process. Its first message is the reply of ``WorkerHost.start``."""

    def send(self, payload: bytes) -> None:
        """Start a call. Raises ``WorkerDied``."""
        ...

    def receive(self) -> bytes:
        """The reply that ``Transport.wait`` announced. Raises ``WorkerDied``."""
        ...

    def hang_up(self) -> None:
        """Ask an idle worker to end; don't wait for it."""
        ...

    def kill(self, grace_s: float = 0.0) -> None:
        """End the process now, or after ``grace_s`` seconds in which it may end by itself."""
        ...


L = TypeVar("L", bound=Link)


class Transport(Protocol[L]):
    """Starts workers and waits for them."""

    name: str

    def open(self, index: int) -> L:
        """Start the worker of slot ``index`` without waiting until it is built. Raises ``WorkerDied``."""
        ...

    def wait(self, links: Sequence[L], timeout: float) -> Sequence[L]:
        """All links with a reply to receive or a death to report; waits for the first one."""
        ...

    def close(self) -> None:
        """Give back what was started besides the links. Safe to call twice."""
        ...


@dataclass
class _Task:
    item: WorkItem
    payload: bytes
    attempts: int = 0


@dataclass
class _Slot(Generic[L]):
    """A place for one worker; ``link`` is None once the slot is retired."""

    index: int
    link: L | None = None
    node: str = ""
    ready: bool = False  # the current worker is built
    proven: bool = False  # some worker of this slot was built before
    lost: int = 0  # workers lost in a row outside an item: while starting, or idle
    task: _Task | None = None
    since: float = 0.0  # when the current start or item began


def pickled_spec(spec: WorkerSpec) -> bytes:
    """The spec as bytes.

    Raises:
        JobError: some argument can't be pickled.
    """
    try:
        return pickle.dumps(spec, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise JobError(
            f"the arguments of worker {spec.target!r} can't be sent to another process "
            f"({type(error).__name__}: {error}); pass plain values and paths"
        ) from error


class PooledExecutor(Generic[L]):
    """An executor over any transport; see ``Executor`` for the contract.

    Items start in the order of submission; one that is retried goes to the front. A worker that can't be
    built is not tried for ever: its slot is retired, and when the last slot is, every item fails with the
    reason. Use it as a context manager, or call ``close``.

    Args:
        transport: starts the workers; closed with the executor.
        slots: number of workers, at least 1.
        retries: how often an item is run again after its worker died, and how often a slot whose worker
            died while it was starting is filled again.
        start_timeout_s: wall seconds in which a worker must be built; 0 is no limit.
        clock: monotonic seconds (another one in tests).
    """

    def __init__(
        self,
        transport: Transport[L],
        slots: int,
        retries: int = 1,
        start_timeout_s: float = 900.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = slots
        self._transport = transport
        self._retries = retries
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self._queue: deque[_Task] = deque()
        self._done: deque[Outcome] = deque()
        self._last_loss = Failure("crash", "no worker was started")
        self._closed = False
        self._slots = [_Slot[L](index) for index in range(slots)]
        try:
            for slot in self._slots:
                self._open(slot)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ the contract

    def submit(self, item: WorkItem) -> None:
        """Queue an item. Raises ``RunError`` on a closed executor."""
        if self._closed:
            raise RunError(f"item {item.id!r} was submitted to a closed executor; make a new one")
        try:
            self._queue.append(_Task(item, encode_call(item.method, item.kwargs)))
        except Exception as error:
            self._done.append(unsendable(item, error))
        self._pump(0.0)

    def completed(self, timeout: float) -> Iterator[Outcome]:
        """Outcomes that are there, after waiting at most ``timeout`` seconds for the first one.

        Ends at once when nothing is under way. What a caller leaves in the iterator comes next time.
        """
        deadline = self._clock() + timeout
        self._pump(0.0)
        while not self._done and self.busy():
            left = deadline - self._clock()
            if left <= 0:
                break
            self._pump(min(left, _SLICE_S, self._until_limit()))
        while self._done:
            yield self._done.popleft()

    def busy(self) -> int:
        """Number of items submitted and not yet returned by ``completed``."""
        running = sum(slot.task is not None for slot in self._slots)
        return len(self._queue) + running + len(self._done)

    def close(self) -> None:
        """End all workers; items that are not finished are dropped. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._queue.clear()
        live = [(slot, slot.link) for slot in self._slots if slot.link is not None]
        for slot, link in live:
            if slot.ready and slot.task is None:
                link.hang_up()
        deadline = time.monotonic() + _GRACE_S
        for slot, link in live:
            idle = slot.ready and slot.task is None
            link.kill(max(0.0, deadline - time.monotonic()) if idle else 0.0)
            slot.link, slot.task = None, None
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ one step of the loop

    def _pump(self, timeout: float) -> None:
        """Hand out items, take in what is ready (waiting for the first), enforce time limits."""
        if self._closed:
            return
        self._dispatch()
        by_link = {id(slot.link): slot for slot in self._slots if slot.link is not None}
        links = [slot.link for slot in self._slots if slot.link is not None]
        for link in self._transport.wait(links, timeout) if links else ():
            self._take(by_link[id(link)], link)
        self._expire()
        self._dispatch()

    def _dispatch(self) -> None:
        if all(slot.link is None for slot in self._slots):
            self._fail_queue()
        for slot in self._slots:
            while self._queue and slot.link is not None and slot.ready and slot.task is None:
                task = self._queue.popleft()
                try:
                    slot.link.send(task.payload)
                except WorkerDied as death:  # it died while idle: not this item's doing
                    self._queue.appendleft(task)
                    self._lose(slot, death.failure, self._retries)
                    continue
                task.attempts += 1
                slot.task, slot.since = task, self._clock()

    def _take(self, slot: _Slot[L], link: L) -> None:
        try:
            reply = decode_reply(link.receive())
        except WorkerDied as death:
            self._died(slot, link, death.failure)
            return
        if slot.task is not None:
            slot.lost = 0
            self._finish(slot, Outcome(slot.task.item, reply.value, reply.failure, seconds=reply.seconds))
            if reply.fatal:
                link.kill()
                self._open(slot)
        elif reply.failure is None:
            slot.node, slot.ready, slot.proven = str(reply.value), True, True
        else:  # an exception will not go away by itself, unless an earlier worker did not meet it
            link.kill()
            self._lose(slot, reply.failure, self._retries if slot.proven else 0)

    def _died(self, slot: _Slot[L], link: L, failure: Failure) -> None:
        link.kill()
        if slot.task is None:
            self._lose(slot, failure, self._retries)
            return
        if slot.task.attempts <= self._retries:
            self._queue.appendleft(slot.task)
            slot.task = None
        else:
            self._fail(slot, failure)
        self._open(slot)

    def _expire(self) -> None:
        for slot in self._slots:
            limit = self._limit(slot)
            if slot.link is None or not limit or self._clock() - slot.since < limit:
                continue
            slot.link.kill()
            if slot.task is None:
                reason = f"no worker was ready after {limit:g} s; check that it can be placed and loaded"
                self._lose(slot, Failure("timeout", reason), self._retries if slot.proven else 0)
            else:
                self._fail(slot, Failure("timeout", f"no result within {limit:g} s; the worker was killed"))
                self._open(slot)

    def _limit(self, slot: _Slot[L]) -> float:
        """Seconds that what the slot is doing may take; 0 is no limit."""
        if slot.task is not None:
            return slot.task.item.timeout_s
        return 0.0 if slot.ready else self._start_timeout_s

    def _until_limit(self) -> float:
        """Seconds until the next time limit, never negative."""
        now = self._clock()
        live = [slot for slot in self._slots if slot.link is not None]
        ends = [slot.since + limit - now for slot in live if (limit := self._limit(slot))]
        return max(0.0, min(ends, default=_SLICE_S))

    # ------------------------------------------------------------------ changes of state

    def _fail(self, slot: _Slot[L], failure: Failure) -> None:
        assert slot.task is not None
        seconds = self._clock() - slot.since
        self._finish(slot, Outcome(slot.task.item, failure=failure, seconds=seconds))

    def _finish(self, slot: _Slot[L], outcome: Outcome) -> None:
        assert slot.task is not None
        worker = f"{slot.node}/{self._transport.name}-{slot.index}"
        failure = outcome.failure and replace(outcome.failure, seconds=outcome.seconds)
        self._done.append(replace(outcome, failure=failure, worker=worker, attempts=slot.task.attempts))
        slot.task = None

    def _open(self, slot: _Slot[L]) -> None:
        slot.link, slot.ready, slot.task, slot.since = None, False, None, self._clock()
        try:
            slot.link = self._transport.open(slot.index)
        except WorkerDied as death:
            self._lose(slot, death.failure, self._retries)

    def _lose(self, slot: _Slot[L], failure: Failure, allowed: int) -> None:
        """A worker is gone outside an item: fill the slot again, or retire it after too many in a row."""
        slot.lost += 1
        if slot.lost <= allowed:
            self._open(slot)
            return
        slot.link, slot.ready = None, False
        self._last_loss = failure
        _log.warning("worker slot %d is given up: %s", slot.index, failure.reason)

    def _fail_queue(self) -> None:
        lost = self._last_loss
        failure = Failure(lost.kind, f"no worker could be started: {lost.reason}")
        while self._queue:
            task = self._queue.popleft()
            self._done.append(Outcome(task.item, failure=failure, attempts=task.attempts))
