"""The worker's side: classification of errors, pickling, environment. All in this process."""

from __future__ import annotations

import errno
import os
import pickle

import pytest

from autocomp.errors import ExportError, JobError
from autocomp.executors._process import (
    Reply,
    WorkerHost,
    classify,
    decode_reply,
    describe_error,
    encode_call,
    encode_reply,
    worker_environment,
)
from autocomp.executors.base import WorkerSpec


class OutOfMemoryError(RuntimeError):
    """Named like torch's own."""


def _chained(inner: Exception) -> Exception:
    try:
        raise ValueError("outer") from inner
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (OutOfMemoryError("Tried to allocate 2 GiB"), "oom"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "oom"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "oom"),
        (_chained(MemoryError()), "oom"),
        (FloatingPointError("NaN"), "nan"),
        (JobError("x"), "invalid"),
        (_chained(ExportError("x")), "invalid"),
        (ValueError("a file about being out of memory"), "error"),
        (RuntimeError("shapes differ"), "error"),
    ],
)
def test_classify(error: Exception, kind: str) -> None:
    assert classify(error) == kind


def test_torch_errors_are_known_without_importing_torch_here() -> None:
    torch = pytest.importorskip("torch")
    assert classify(torch.OutOfMemoryError("CUDA out of memory.")) == "oom"


def test_description_has_type_message_place_and_no_folder() -> None:
    try:
        raise KeyError("layers.3")
    except KeyError as error:
        text = describe_error(error)
    assert text.startswith("KeyError: 'layers.3' [test_process.py:")
    assert 'raise KeyError("layers.3")' in text
    assert "/" not in text


def test_description_is_bounded() -> None:
    assert len(describe_error(RuntimeError("x" * 10**6))) < 2000
    assert describe_error(ValueError()) == "ValueError"


def test_explicit_environment_wins() -> None:
    env = worker_environment(WorkerSpec("m:c", env={"GOMP_SPINCOUNT": "100", "A": "b"}, threads=3))
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "3"
    assert env["GOMP_SPINCOUNT"] == "100" and env["A"] == "b"


def _host(spec: WorkerSpec) -> tuple[WorkerHost, Reply]:
    host = WorkerHost(pickle.dumps(spec))
    return host, decode_reply(host.start())


def test_host_runs_calls_and_reports_its_node() -> None:
    host, started = _host(WorkerSpec("autocomp.testing.workers:ToyWorker"))
    assert host.ready and started.failure is None and isinstance(started.value, str)
    assert decode_reply(host.call(encode_call("echo", {"value": [1, None]}))).value == [1, None]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("no.such.module:X", "ModuleNotFoundError"),
        ("autocomp.testing.workers:Nobody", "Nobody"),
        ("autocomp.testing.workers", "has no attribute ''"),
    ],
)
def test_unknown_target_is_a_failure(target: str, text: str) -> None:
    host, started = _host(WorkerSpec(target))
    assert not host.ready and started.failure is not None
    assert text in started.failure.reason


def test_unreadable_bytes_are_failures_on_both_sides() -> None:
    started = decode_reply(WorkerHost(b"not a pickle").start())
    assert started.failure is not None and "UnpicklingError" in started.failure.reason
    host, _ = _host(WorkerSpec("autocomp.testing.workers:ToyWorker"))
    assert decode_reply(host.call(b"not a pickle")).failure is not None
    reply = decode_reply(b"cgone_module\nGone\n.")  # an instance of a class that the driver doesn't have
    assert reply.failure is not None and "gone_module" in reply.failure.reason


def test_unpicklable_value_keeps_its_duration() -> None:
    reply = decode_reply(encode_reply(Reply(value=lambda: None, seconds=1.5)))
    assert reply.failure is not None and "function" in reply.failure.reason
    assert reply.seconds == 1.5


@pytest.mark.parametrize(
    ("message", "fatal"),
    [("CUDA error: an illegal memory access was encountered", True), ("mat1 and mat2 shapes differ", False)],
)
def test_a_lost_cuda_context_is_fatal(message: str, fatal: bool) -> None:
    host, _ = _host(WorkerSpec("autocomp.testing.workers:ToyWorker"))
    reply = decode_reply(host.call(encode_call("fail", {"kind": "oom", "message": message})))
    assert reply.failure is not None and reply.fatal is fatal
