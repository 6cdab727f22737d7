"""The worker's side of every executor: build the worker once, call its methods, classify what goes wrong.

Calls and replies cross the process border as bytes that this module pickles itself, so that a value which
can't be pickled or read becomes a failed outcome instead of a dead worker or a dead driver.
"""

from __future__ import annotations

import errno
import gc
import pickle
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autocomp.errors import AutocompError
from autocomp.executors.base import ItemFailed, Outcome, WorkerSpec, WorkItem
from autocomp.trial import Failure, FailureKind

_REASON_LIMIT = 1000  # characters; a CUDA message with a module dump would otherwise fill the journal
_OOM_TEXTS = (
    "out of memory",  # CUDA, HIP, MPS
    "can't allocate memory",  # torch's CPU allocator
    "cannot allocate memory",  # strerror(ENOMEM), for instance from mmap
    "not enough memory",  # torch's CPU allocator on Windows
    "bad_alloc",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
)
# After these the CUDA context is lost: every later call in the same process fails as well.
_STICKY_TEXTS = ("cuda error", "hip error", "device-side assert")


@dataclass(frozen=True)
class Reply:
    """What a worker process answers.

    Attributes:
        value: what the method returned; for the first reply (the worker is built), the node's name.
        failure: set when the method raised.
        seconds: wall seconds spent in the method.
        fatal: the process can't be trusted with another item and must be replaced.
    """

    value: Any = None
    failure: Failure | None = None
    seconds: float = 0.0
    fatal: bool = False


def worker_environment(spec: WorkerSpec) -> dict[str, str]:
    """Variables that must be set before the worker's process starts; ``spec.env`` wins.

    Numerical libraries read the thread counts when they are loaded. Without ``GOMP_SPINCOUNT=0`` idle
    OpenMP threads spin on cores that other workers are being timed on.
    """
    threads = str(spec.threads)
    defaults = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    return {**defaults, "GOMP_SPINCOUNT": "0", **spec.env}


def limit_memory(megabytes: int) -> None:
    """Cap this process's private writable memory (``RLIMIT_DATA``), in 10**6 bytes; 0 leaves it alone.

    ``RLIMIT_AS`` would count address space that is only reserved (CUDA takes tens of gigabytes) and mapped
    weight files; ``RLIMIT_DATA`` counts heap and private anonymous mappings, which is what tensors live in.
    Device memory and shared memory are not limited. Importing torch alone takes about 180 MB of it.
    Only Linux enforces it for mappings; elsewhere the cap has no effect.
    """
    if megabytes <= 0 or sys.platform == "win32":
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = megabytes * 10**6
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def classify(error: BaseException) -> FailureKind:
    """The kind of failure that an exception means, looking through ``raise ... from`` chains."""
    link: BaseException | None = error
    while link is not None:
        if _is_oom(link):
            return "oom"
        if isinstance(link, FloatingPointError):
            return "nan"
        if isinstance(link, AutocompError):
            return "invalid"
        link = link.__cause__
    return "error"


def _is_oom(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # by name, so that torch.OutOfMemoryError is known without importing torch here
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OOM_TEXTS)


def describe_error(error: BaseException) -> str:
    """``Type: message [file.py:12 in function: source line]``, at most about 1,000 characters."""
    message = str(error).strip()[:_REASON_LIMIT]
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return text
    last = frames[-1]
    file = last.filename.replace("\\", "/").rpartition("/")[2]
    return f"{text} [{file}:{last.lineno} in {last.name}: {last.line}]"


def _failed(error: BaseException, seconds: float) -> Reply:
    if isinstance(error, ItemFailed):
        return Reply(failure=error.failure, seconds=seconds)
    fatal = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _STICKY_TEXTS)
    return Reply(failure=Failure(classify(error), describe_error(error)), seconds=seconds, fatal=fatal)


def encode_call(method: str, kwargs: Mapping[str, Any]) -> bytes:
    """A call as bytes. Raises whatever ``pickle`` raises for arguments that it can't take."""
    return pickle.dumps((method, dict(kwargs)), protocol=pickle.HIGHEST_PROTOCOL)


def unsendable(item: WorkItem, error: Exception) -> Outcome:
    """The outcome of an item for which ``encode_call`` raised ``error``."""
    reason = f"arguments of {item.method!r} can't be pickled ({type(error).__name__}: {error})"
    return Outcome(item, failure=Failure("invalid", reason), attempts=0)


def encode_reply(reply: Reply) -> bytes:
    """A reply as bytes; a value that can't be pickled turns into a failure that says so."""
    try:
        return pickle.dumps(reply, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        kind = classify(error)
        reason = (
            f"a result of type {type(reply.value).__name__} can't be sent to the driver "
            f"({type(error).__name__}: {error}); return plain values"
        )
    return pickle.dumps(Reply(failure=Failure(kind, reason), seconds=reply.seconds))


def decode_reply(payload: bytes) -> Reply:
    """A reply from bytes; one that the driver can't read turns into a failure that says so."""
    try:
        reply = pickle.loads(payload)
    except Exception as error:
        reason = f"the driver can't read the result ({type(error).__name__}: {error}); return plain values"
        return Reply(failure=Failure(classify(error), reason))
    assert isinstance(reply, Reply)
    return reply


def run_call(
    worker: Any, payload: bytes, clock: Callable[[], float] = time.perf_counter
) -> tuple[bytes, bool]:
    """Run a call made by ``encode_call`` on ``worker``: the reply's bytes, and whether it is a failure."""
    began = clock()
    try:
        method, kwargs = pickle.loads(payload)
        value = getattr(worker, method)(**kwargs)
        reply = Reply(value, seconds=clock() - began)
    except Exception as error:
        reply = _failed(error, clock() - began)
    return encode_reply(reply), reply.failure is not None


class WorkerHost:
    """Holds the one worker of a process. No method raises: all that goes wrong is in the reply.

    ``SystemExit`` and the like do pass: a worker that ends its process has crashed.

    Args:
        payload: the pickled ``WorkerSpec``; it is read in ``start``, so that an unreadable one is a failure.
    """

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._worker: Any = None
        self.ready = False

    def start(self) -> bytes:
        """Build the worker. The reply's value is the node's name."""
        began = time.perf_counter()
        try:
            spec: WorkerSpec = pickle.loads(self._payload)
            limit_memory(spec.memory_mb)
            self._worker = spec.build()
            self.ready = True
            reply = Reply(platform.node(), seconds=time.perf_counter() - began)
        except Exception as error:
            reply = _failed(error, time.perf_counter() - began)
        return encode_reply(reply)

    def call(self, payload: bytes) -> bytes:
        """Run one call made by ``encode_call``."""
        reply, failed = run_call(self._worker, payload)
        if failed:
            gc.collect()  # the traceback's frames held tensors; give them back before the next candidate
        return reply
