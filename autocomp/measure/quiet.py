"""Quiet moments on a shared machine: workers compute together, a timing runs alone.

A readers-writer lock over ``fcntl.flock`` files: ``computing`` is the shared side, ``timing`` the
exclusive one. The kernel releases a dead process's locks, so a killed worker blocks nobody. A second
file, the turnstile, keeps timings from starving: everyone passes it on the way in, and a waiting timing
holds it, so no new computation starts before the timing has had its turn (Courtois, Heymans and Parnas
1971, "Concurrent control with readers and writers", problem 2).
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autocomp.errors import CapabilityError

POLL_SECONDS = 0.005
_held = threading.local()


def default_path() -> Path:
    """``$AUTOCOMP_QUIET_LOCK``, or one file per user and machine in the folder for temporary files."""
    named = os.environ.get("AUTOCOMP_QUIET_LOCK")
    return Path(named) if named else Path(tempfile.gettempdir()) / f"autocomp-quiet-{os.getuid()}.lock"


@contextmanager
def computing(path: Path | str | None = None, timeout: float | None = None) -> Iterator[float]:
    """Work that disturbs timings (scoring, quantizing). Waits while a timing runs or waits.

    Inside of another ``computing`` or ``timing`` of this thread it does nothing.

    Args:
        path: the lock file; ``default_path()`` by default. It is created, and stays.
        timeout: seconds to wait at most; ``None`` waits for ever.

    Yields:
        Seconds that it waited.

    Raises:
        CapabilityError: the lock file can't be opened, or the time is over.
    """
    with _locked(path, fcntl.LOCK_SH, timeout) as waited:
        yield waited


@contextmanager
def timing(path: Path | str | None = None, timeout: float | None = None) -> Iterator[float]:
    """A measurement of latency: runs while nobody else computes or times. Arguments as ``computing``.

    Raises:
        CapabilityError: as ``computing``.
        RuntimeError: this thread is inside of ``computing`` and would wait for itself.
    """
    with _locked(path, fcntl.LOCK_EX, timeout) as waited:
        yield waited


@contextmanager
def _locked(path: Path | str | None, mode: int, timeout: float | None) -> Iterator[float]:
    lock = Path(path) if path is not None else default_path()
    held = _modes()
    key = os.path.abspath(lock)
    if key in held:
        if mode == fcntl.LOCK_EX and held[key] == fcntl.LOCK_SH:
            raise RuntimeError("timing() inside of computing() would wait for itself: leave computing()")
        yield 0.0
        return
    start = time.monotonic()
    deadline = None if timeout is None else start + timeout
    with _opened(lock) as main:
        with _opened(lock.with_name(lock.name + ".turn")) as turn:
            # A computation only passes through; a timing keeps new computations out while it waits.
            _acquire(turn, mode, deadline, lock)
            _acquire(main, mode, deadline, lock)
        held[key] = mode
        try:
            yield time.monotonic() - start
        finally:
            del held[key]


def _modes() -> dict[str, int]:
    """Lock files that this thread of this process holds, with their modes."""
    if getattr(_held, "pid", None) != os.getpid():  # a forked child has its parent's variables, not its locks
        _held.pid, _held.modes = os.getpid(), {}
    modes: dict[str, int] = _held.modes
    return modes


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        yield handle
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # for a forked child that still has the file open, too
        os.close(handle)


def _acquire(handle: int, mode: int, deadline: float | None, lock: Path) -> None:
    mode = mode if deadline is None else mode | fcntl.LOCK_NB
    while True:
        try:
            fcntl.flock(handle, mode)
            return
        except BlockingIOError:
            assert deadline is not None
            left = deadline - time.monotonic()
            if left <= 0:
                raise CapabilityError(
                    f"no quiet moment on this machine in the time allowed ({lock} is held elsewhere); "
                    "wait longer, or run fewer workers on it"
                ) from None
            time.sleep(min(POLL_SECONDS, left))
        except OSError as error:  # a network file system without locks
            raise _unusable(lock, error) from error


def _unusable(path: Path, error: OSError) -> CapabilityError:
    remedy = "set AUTOCOMP_QUIET_LOCK to a writable path on a local disk"
    return CapabilityError(f"can't use the lock file {path} ({error.strerror}); {remedy}")
