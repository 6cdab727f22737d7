"""Workers as long-lived subprocesses of the driver, one pipe each.

A worker that crashes, is killed or runs out of time takes one item with it, never the search. Workers
ignore Ctrl-C, so that the driver decides what an interrupt means, and end when the driver is gone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, parent_process

from autocomp.errors import CapabilityError, JobError
from autocomp.executors._pool import PooledExecutor, WorkerDied, pickled_spec
from autocomp.executors._process import WorkerHost, worker_environment
from autocomp.executors.base import WorkerSpec
from autocomp.leave import leave

_SPAWN = get_context("spawn")  # a forked child would inherit torch's thread pools and locks, and CUDA
_SPAWN_LOCK = threading.Lock()
_DEATH_S = 1.0  # what a process that closed its pipe gets to leave an exit code
_KILL_S = 5.0  # a process stuck in a device driver may not die at once; the search goes on without it


# ---------------------------------------------------------------------- in the worker's process


def serve(pipe: connection.Connection, payload: bytes) -> None:
    """Build the worker, then answer calls until the driver closes the pipe."""
    _detach()
    host = WorkerHost(payload)
    with suppress(BrokenPipeError):  # the driver has given this worker up
        pipe.send_bytes(host.start())
        while host.ready:
            try:
                call = pipe.recv_bytes()
            except (EOFError, OSError):
                leave()
                return
            pipe.send_bytes(host.call(call))


def _detach() -> None:
    """Leave the driver's process group, ignore Ctrl-C, and watch for the driver's death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # a group of its own: kill reaches compilers and loaders that the worker started
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, name="watch-driver", daemon=True).start()


def _end_with_parent() -> None:
    # Sleeps in the kernel, so it costs a timing nothing. (PR_SET_PDEATHSIG would do as well, but fires when
    # the thread that started the worker ends, not the driver.)
    parent = parent_process()
    assert parent is not None
    parent.join()
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


# ---------------------------------------------------------------------- in the driver's process


@contextmanager
def _spawn_environment(extra: Mapping[str, str]) -> Iterator[None]:
    """Let a process that starts inside see ``extra`` from its first instruction, with SIGINT blocked."""
    with _SPAWN_LOCK:
        before = {name: os.environ.get(name) for name in extra}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if os.name == "posix" else None
        os.environ.update(extra)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            if mask is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class LocalLink:
    """A worker process and the driver's end of its pipe."""

    def __init__(self, payload: bytes, env: Mapping[str, str], name: str) -> None:
        self._ready = False
        self._ended = False
        self._pipe, other = _SPAWN.Pipe()
        # a daemon, so that a driver that ends without close() ends its workers
        self._process = _SPAWN.Process(target=serve, args=(other, payload), name=name, daemon=True)
        try:
            with _spawn_environment(env):
                self._process.start()
        except OSError as error:
            raise WorkerDied(f"no process can be started ({error})") from error
        finally:
            other.close()

    @property
    def handles(self) -> tuple[connection.Connection, int]:
        """What to wait on: the pipe and the process's end."""
        return (self._pipe, self._process.sentinel)

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def send(self, payload: bytes) -> None:
        try:
            self._pipe.send_bytes(payload)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> bytes:
        with suppress(EOFError, OSError):
            if self._pipe.poll():
                reply = self._pipe.recv_bytes()
                self._ready = True
                return reply
        raise self._death()

    def hang_up(self) -> None:
        self._pipe.close()

    def kill(self, grace_s: float = 0.0) -> None:
        if self._ended:
            return
        self._ended = True
        if grace_s > 0:
            self._process.join(grace_s)
        # The group first: it holds what the worker started, even when the worker itself is gone. A worker
        # that has not come far enough to have a group yet is killed alone.
        with suppress(OSError, AttributeError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()
        self._process.join(_KILL_S)
        self._pipe.close()

    def _death(self) -> WorkerDied:
        self._process.join(_DEATH_S)
        self.kill()
        code = self._process.exitcode or 0
        reason = f"worker exited with {f'signal {-code}' if code < 0 else f'code {code}'}"
        if -code == signal.SIGKILL:
            reason += " (SIGKILL; often the kernel's out-of-memory killer)"
        elif code < 0:
            with suppress(ValueError):
                reason += f" ({signal.Signals(-code).name})"
        if code > 0 and not self._ready:
            reason += (
                " before it could answer. Worker processes import the script that starts them: it must be a "
                "file, and start its search under `if __name__ == '__main__':`"
            )
        return WorkerDied(reason)


class LocalTransport:
    """Starts workers on this machine; each gets GPUs of its own when the spec asks for them."""

    name = "local"

    def __init__(self, spec: WorkerSpec, workers: int) -> None:
        self._payload = pickled_spec(spec)
        self._environments = [worker_environment(spec) for _ in range(workers)]
        if spec.gpus and "CUDA_VISIBLE_DEVICES" not in spec.env:
            for env, devices in zip(self._environments, assign_gpus(spec, workers), strict=True):
                env["CUDA_VISIBLE_DEVICES"] = devices

    def open(self, index: int) -> LocalLink:
        return LocalLink(self._payload, self._environments[index], f"autocomp-worker-{index}")

    def wait(self, links: Sequence[LocalLink], timeout: float) -> Sequence[LocalLink]:
        owner = {handle: link for link in links for handle in link.handles}
        ready = {id(owner[handle]) for handle in connection.wait(list(owner), timeout)}  # type: ignore[index]
        # A process forked by a worker may hold its pipes open; then only asking shows that it is gone.
        return [link for link in links if id(link) in ready or not link.alive]

    def close(self) -> None:
        return


def assign_gpus(spec: WorkerSpec, workers: int) -> list[str]:
    """``CUDA_VISIBLE_DEVICES`` of every worker; no GPU is given to two.

    Raises:
        CapabilityError: there are too few GPUs, or they are not of the wanted type.
    """
    names = _gpu_names()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = [str(i) for i in range(len(names))] if visible is None else [v for v in visible.split(",") if v]
    wanted = workers * spec.gpus
    if len(ids) < wanted or not names:
        raise CapabilityError(
            f"{workers} worker(s) with {spec.gpus} GPU(s) each need {wanted}, and this machine shows "
            f"{min(len(ids), len(names))}; use fewer workers, or the ray executor on a cluster"
        )
    model = spec.accelerator.partition("-")[0].lower()  # Ray calls one of them "A100-40G"
    if any(model not in name.lower() for name in names):
        raise CapabilityError(f"accelerator {spec.accelerator!r} was asked for; this machine has {names}")
    return [",".join(ids[i * spec.gpus : (i + 1) * spec.gpus]) for i in range(workers)]


def _gpu_names() -> list[str]:
    """Product names of the machine's NVIDIA GPUs, asked of the driver's own tool: torch stays unloaded."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return [line.strip() for line in found.stdout.splitlines() if line.strip()]
    return []


class LocalExecutor(PooledExecutor[LocalLink]):
    """Runs items in ``workers`` subprocesses of this process. See ``PooledExecutor`` for the rest.

    Workers are spawned, not forked: a script needs the usual ``if __name__ == "__main__":`` guard.

    Raises:
        JobError: ``workers`` or ``retries`` is out of range, or the spec can't be pickled.
        CapabilityError: more GPUs are asked for than there are.
    """

    def __init__(
        self, spec: WorkerSpec, workers: int = 1, retries: int = 1, start_timeout_s: float = 900.0
    ) -> None:
        if workers < 1 or retries < 0:
            raise JobError(f"executor: workers={workers}, retries={retries}; need workers >= 1, retries >= 0")
        super().__init__(LocalTransport(spec, workers), workers, retries, start_timeout_s)
