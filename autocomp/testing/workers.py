"""Small workers without torch, for the executor conformance suite and for benchmarks of the driver."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autocomp.errors import JobError
from autocomp.trial import Estimate, Measurement


class ToyWorker:
    """One method for each thing that can happen in a worker.

    Args:
        greeting: kept, so that a test can see the constructor's arguments arrive.
    """

    def __init__(self, greeting: str = "") -> None:
        self.greeting = greeting
        self._calls = 0

    def echo(self, value: Any) -> Any:
        return value

    def greet(self) -> str:
        return self.greeting

    def count(self) -> int:
        """How often this very object was asked: it grows only if the worker outlives an item."""
        self._calls += 1
        return self._calls

    def pid(self) -> int:
        return os.getpid()

    def env(self, names: list[str]) -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in names}

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def hang_then_mark(self, seconds: float, path: str) -> None:
        """Leave a file behind unless killed within ``seconds``."""
        time.sleep(seconds)
        Path(path).touch()

    def crash(self, signum: int = signal.SIGKILL) -> None:
        """Die as from a segmentation fault or the out-of-memory killer."""
        os.kill(os.getpid(), signum)

    def exit(self, code: int) -> None:
        os._exit(code)

    def crash_once(self, path: str) -> str:
        """Die the first time, answer the second; ``path`` remembers."""
        if not Path(path).exists():
            Path(path).touch()
            self.crash()
        return "survived"

    def fail(self, kind: str, message: str = "") -> None:
        """Raise what real workers raise, by the kind of failure that it should become."""
        if kind == "nan":
            raise FloatingPointError(message or "loss is NaN")
        if kind == "invalid":
            raise JobError(message or "bits=17 is not one of 2, 3, 4, 8")
        if kind == "oom":
            raise RuntimeError(message or "DefaultCPUAllocator: can't allocate memory")
        raise ValueError(message or "some other trouble")

    def allocate(self, megabytes: int) -> int:
        """Touch that much memory (10**6 bytes) and let it go."""
        return len(bytearray(megabytes * 10**6)) // 10**6

    def unpicklable(self) -> Any:
        return lambda: None


class BrokenWorker:
    """Can't be built."""

    def __init__(self) -> None:
        raise JobError("model folder 'nowhere' does not exist")


class DyingWorker:
    """Takes its process with it while it is being built."""

    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class SlowWorker:
    """Takes ``seconds`` to build."""

    def __init__(self, seconds: float) -> None:
        time.sleep(seconds)


class NoopWorker:
    """The measuring interface with nothing behind it: what is left is the driver's own cost.

    Metrics depend on the candidate alone: ``latency_ms`` is the sum of its numbers plus one, ``kl`` the
    inverse of it, so that every candidate of a numeric space is a trade-off.
    """

    def describe(self) -> dict[str, Any]:
        return {"device": "noop", "metrics": {"latency_ms": "ms", "kl": "nats"}}

    def profile(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"request": dict(request), "costs": {}}

    def measure(self, candidate: Mapping[str, Any], fidelity: Mapping[str, Any]) -> dict[str, Any]:
        numbers = [float(v) for v in candidate.values() if isinstance(v, int | float)]
        latency = 1.0 + sum(numbers)
        metrics = {"latency_ms": Estimate(latency), "kl": Estimate(1.0 / max(latency, 1e-9))}
        return asdict(Measurement(metrics, "noop", details={"fidelity": dict(fidelity).get("name", "")}))
