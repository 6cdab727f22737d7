"""Work in this process on a fake clock: a week of measurements takes as long as the driver's own thinking."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from heapq import heappop, heappush
from typing import Any

from autocomp.errors import JobError, RunError
from autocomp.executors._process import decode_reply, encode_call, run_call, unsendable
from autocomp.executors.base import Outcome, WorkItem
from autocomp.trial import Failure

Cost = Callable[[WorkItem, Any], float]
"""(item, its value or its ``Failure``) -> seconds that the item takes."""


class SimulatedClock:
    """Seconds since its start; they pass only when somebody says so."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass. Raises ``ValueError`` for a negative time or one that is not finite."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"a clock can't be advanced by {seconds} s; time only goes forward")
        self._now += seconds

    def advance_to(self, moment: float) -> None:
        """Let time pass until the clock shows exactly ``moment``; a moment in the past changes nothing."""
        self._now = max(self._now, moment)


def told_seconds(item: WorkItem, result: Any) -> float:
    """What a result says of its own cost: ``seconds`` of a measurement, profile or failure; else 0."""
    del item
    if isinstance(result, Failure):
        return result.seconds
    return float(result.get("seconds") or 0.0) if isinstance(result, Mapping) else 0.0


class SimulatedExecutor:
    """An ``Executor`` that calls ``worker.<method>(**kwargs)`` in this process.

    An item starts when a slot is free, in the order of submission, and its outcome is there when the clock
    has passed its cost; so slots overtake each other as workers do. Outcomes depend on nothing but the
    worker, the costs and the order of calls. The worker is called when an item starts, and values pass
    through pickle as between processes. What a worker raises fails its item; nothing is retried.

    Args:
        worker: any object; shared by all slots.
        slots: how many items run side by side.
        clock: read and advanced here; give it to the study as well. Default: one of its own (``.clock``).
        cost: seconds of an item, from the item and its value or ``Failure``; default ``told_seconds``.

    Raises:
        JobError: ``slots`` is less than 1.
    """

    def __init__(
        self,
        worker: Any,
        slots: int = 2,
        clock: SimulatedClock | None = None,
        cost: Cost | None = None,
    ) -> None:
        if slots < 1:
            raise JobError(f"executor: workers={slots}; a simulation needs workers >= 1")
        self.slots = slots
        self.clock = clock if clock is not None else SimulatedClock()
        self._worker = worker
        self._cost = cost if cost is not None else told_seconds
        self._queue: deque[tuple[WorkItem, bytes]] = deque()
        self._running: list[
            tuple[float, int, int, Outcome]
        ] = []  # heap of (end, start number, slot, outcome)
        self._free = list(range(slots))  # heap: the lowest free slot takes the next item
        self._done: deque[Outcome] = deque()
        self._started = 0
        self._closed = False

    def submit(self, item: WorkItem) -> None:
        """Queue an item. Raises ``RunError`` on a closed executor."""
        if self._closed:
            raise RunError(f"item {item.id!r} was submitted to a closed executor; make a new one")
        try:
            self._queue.append((item, encode_call(item.method, item.kwargs)))
        except Exception as error:
            self._done.append(unsendable(item, error))
        self._settle()

    def completed(self, timeout: float) -> Iterator[Outcome]:
        """Outcomes that are there; when there are none and ``timeout`` is not 0, the clock goes to the next.

        However far that is: a driver that waits does nothing else, so waiting in slices changes nothing.
        """
        self._settle()
        if not self._done and self._running and timeout > 0:
            self.clock.advance_to(self._running[0][0])
            self._settle()
        while self._done:
            yield self._done.popleft()

    def busy(self) -> int:
        """Number of items submitted and not yet returned by ``completed``."""
        return len(self._queue) + len(self._running) + len(self._done)

    def close(self) -> None:
        """Drop what is not finished. Safe to call twice."""
        self._closed = True
        self._queue.clear()
        self._running.clear()

    def _settle(self) -> None:
        """Take in what has ended by now and start what there is room for, until neither changes anything."""
        while True:
            while self._running and self._running[0][0] <= self.clock():
                _, _, slot, outcome = heappop(self._running)
                heappush(self._free, slot)
                self._done.append(outcome)
            if not (self._queue and self._free):
                return
            self._start(*self._queue.popleft())

    def _start(self, item: WorkItem, payload: bytes) -> None:
        reply = decode_reply(run_call(self._worker, payload, self.clock)[0])
        value, failure = reply.value, reply.failure
        seconds = self._cost(item, value if failure is None else failure)
        if not (math.isfinite(seconds) and seconds >= 0):
            raise RunError(f"the simulated cost of {item.id!r} is {seconds} s; give a finite number >= 0")
        if item.timeout_s and seconds > item.timeout_s:
            seconds = item.timeout_s
            value, failure = None, Failure("timeout", f"no result within {seconds:g} s", seconds)
        slot = heappop(self._free)
        self._started += 1
        outcome = Outcome(item, value, failure, f"simulated-{slot}", seconds)
        heappush(self._running, (self.clock() + seconds, self._started, slot, outcome))
