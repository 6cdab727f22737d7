"""Work items, outcomes, and the interface of an executor. Nothing here knows what the work is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from autocomp.trial import Failure


@dataclass(frozen=True)
class WorkerSpec:
    """How to build a worker in another process.

    Attributes:
        target: ``"module:callable"``; called once with ``kwargs``; what it returns is the worker.
        kwargs: picklable arguments.
        env: environment variables set before the first import (``GOMP_SPINCOUNT=0``).
        threads: CPU threads that the worker may use.
        gpus: whole GPUs reserved for the worker alone (never a fraction: timings would be junk).
        memory_mb: cap on the worker's memory (10**6 bytes); 0 is no cap. Over it, allocations fail.
    """

    target: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1
    gpus: int = 0
    memory_mb: int = 0
    accelerator: str = ""

    def build(self) -> Any:
        module, _, attribute = self.target.partition(":")
        return getattr(import_module(module), attribute)(**self.kwargs)


@dataclass(frozen=True)
class WorkItem:
    """One call of one method of a worker.

    Attributes:
        id: chosen by the caller, unique in a study.
        method: name of the worker's method.
        kwargs: picklable arguments.
        timeout_s: wall seconds after which the worker is killed and the item fails; 0 is no limit.
    """

    id: str
    method: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The end of a work item: a value or a failure, never an exception in the driver."""

    item: WorkItem
    value: Any = None
    failure: Failure | None = None
    worker: str = ""
    seconds: float = 0.0
    attempts: int = 1


class ItemFailed(Exception):
    """Raised in a worker's method: the item fails with exactly this failure, and the worker stays."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


class Executor(Protocol):
    """Runs work items on ``slots`` long-lived workers.

    A worker that dies (crash, kill, time-out) is replaced; its item is retried up to ``retries`` times
    for a crash and never for a time-out, then comes back as a failed outcome.

    An executor whose work takes simulated time also has an attribute ``clock``, a callable that returns
    seconds; a study that is built by ``autocomp.search`` then lives by that clock.
    """

    slots: int

    def submit(self, item: WorkItem) -> None:
        """Queue an item. More items than slots may be queued."""
        ...

    def completed(self, timeout: float) -> Iterator[Outcome]:
        """Outcomes that are there, after waiting at most ``timeout`` seconds for the first one."""
        ...

    def busy(self) -> int:
        """Number of items submitted and not yet returned by ``completed``."""
        ...

    def close(self) -> None:
        """End all workers. Safe to call twice."""
        ...
