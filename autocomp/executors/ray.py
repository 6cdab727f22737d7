"""Workers as long-lived Ray actors, on this machine or on a cluster.

Actors stay up for the whole search and keep the model loaded; the search itself stays in the driver. Ray's
own restarts and retries are off: a dead actor is replaced here, so that local and Ray runs treat a crash
alike and a call never runs twice behind the driver's back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError

from autocomp.errors import CapabilityError, JobError
from autocomp.executors._pool import PooledExecutor, WorkerDied, pickled_spec
from autocomp.executors._process import WorkerHost, worker_environment
from autocomp.executors.base import WorkerSpec

_OBJECT_STORE_BYTES = 128 * 2**20  # replies are small; Ray's default is a third of the machine's memory
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # workers without a GPU keep CUDA_VISIBLE_DEVICES, no warning
}
_REASON_LIMIT = 400


class RayHost:
    """The actor: a ``WorkerHost`` and nothing else. The node needs autocomp installed."""

    def __init__(self, payload: bytes) -> None:
        self._host = WorkerHost(payload)

    def start(self) -> bytes:
        return self._host.start()

    def call(self, payload: bytes) -> bytes:
        return self._host.call(payload)


@contextmanager
def _actor_errors() -> Iterator[None]:
    """Turn what Ray raises about a dead actor, node or cluster into ``WorkerDied``."""
    try:
        yield
    except RayError as error:
        text = " ".join(str(error).split())
        starved = isinstance(error, OutOfMemoryError) or "running low on memory" in text
        raise WorkerDied(_cause(type(error).__name__, text), "oom" if starved else "crash") from error


def _cause(kind: str, text: str) -> str:
    """The middle of Ray's message: ids and addresses come before it, general advice after it."""
    middle = text[max(text.find("The actor is dead because"), 0) :].partition(" Some common causes")[0]
    return f"worker died: {middle[:_REASON_LIMIT]} ({kind})"


class RayLink:
    """One actor and the call that it is working on."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        with _actor_errors():
            self.pending: Any = actor.start.remote()

    def send(self, payload: bytes) -> None:
        with _actor_errors():
            self.pending = self._actor.call.remote(payload)

    def receive(self) -> bytes:
        pending, self.pending = self.pending, None
        with _actor_errors():
            reply: bytes = ray.get(pending)
        return reply

    def hang_up(self) -> None:
        self.kill()

    def kill(self, grace_s: float = 0.0) -> None:
        """End the actor now; an idle one holds nothing that a grace period would save."""
        self.pending = None
        if self._actor is not None and ray.is_initialized():
            with suppress(RayError):  # the cluster may be gone already
                ray.kill(self._actor, no_restart=True)
        self._actor = None


class RayTransport:
    """Joins a Ray cluster or starts a small one, and creates actors in it.

    Raises:
        CapabilityError: the address can't be reached, or a Ray started here lacks the GPUs.
    """

    name = "ray"

    def __init__(self, spec: WorkerSpec, workers: int, address: str | None, log_to_driver: bool) -> None:
        self._payload = pickled_spec(spec)
        self._started = not ray.is_initialized()
        if self._started:
            _start_ray(spec, workers, address, log_to_driver)
        try:
            self._actor_class = ray.remote(RayHost).options(**_actor_options(spec, workers))
        except BaseException:
            self.close()
            raise

    def open(self, index: int) -> RayLink:
        with _actor_errors():
            return RayLink(self._actor_class.remote(self._payload))

    def wait(self, links: Sequence[RayLink], timeout: float) -> Sequence[RayLink]:
        owner = {link.pending: link for link in links if link.pending is not None}
        if not owner:
            return []
        refs = list(owner)
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout)
        if ready and len(refs) > 1:  # all others that are there as well
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return [owner[ref] for ref in ready]

    def close(self) -> None:
        """Shut Ray down if it was started here."""
        if self._started and ray.is_initialized():
            ray.shutdown()
        self._started = False


def _start_ray(spec: WorkerSpec, workers: int, address: str | None, log_to_driver: bool) -> None:
    """Connect to ``address`` (or ``RAY_ADDRESS``, which Ray sets for submitted jobs), else start Ray here."""
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.ERROR}
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if where == "local":
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(address=where, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise CapabilityError(
            f"Ray can't be started or reached at address {where!r} ({error}); for a cluster, run "
            "`ray start --head` first; without an address, Ray starts on this machine"
        ) from error
    if where == "local":
        try:
            _check_fits(spec, workers)
        except CapabilityError:
            ray.shutdown()
            raise


def _check_fits(spec: WorkerSpec, workers: int) -> None:
    """Refuse what one machine can never place; on a cluster more nodes may come."""
    have = ray.cluster_resources()
    gpus = int(have.get("GPU", 0))
    if workers * spec.gpus > gpus:
        raise CapabilityError(
            f"{workers} worker(s) with {spec.gpus} GPU(s) each need {workers * spec.gpus}, and Ray sees "
            f"{gpus} on this machine; use fewer workers, or give the address of a cluster"
        )
    if spec.accelerator and f"accelerator_type:{spec.accelerator}" not in have:
        found = [name.partition(":")[2] for name in have if name.startswith("accelerator_type:")]
        raise CapabilityError(
            f"accelerator {spec.accelerator!r} was asked for; this machine has {found or 'none'}"
        )


def _actor_options(spec: WorkerSpec, workers: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "num_cpus": _cpus_per_actor(spec.threads, workers),
        "num_gpus": spec.gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": worker_environment(spec)},
    }
    if spec.accelerator:
        options["accelerator_type"] = spec.accelerator
    return options


def _cpus_per_actor(threads: int, workers: int) -> float:
    """CPUs to reserve for an actor: its threads, or on a single small machine an equal share of it.

    Only a reservation; the thread count itself is not changed. With several nodes (or an autoscaler, whose
    head usually offers no CPUs) the full number is asked for, so that the scheduler can find or add a node.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    if len(nodes) != 1:
        return threads
    share = nodes[0]["Resources"]["CPU"] / workers
    return threads if threads <= share else round(share, 3) if share < 1 else int(share)


class RayExecutor(PooledExecutor[RayLink]):
    """Runs items on ``workers`` Ray actors. See ``PooledExecutor`` for the rest.

    A Ray that is already initialised is used and left running. Otherwise ``address`` (or ``RAY_ADDRESS``)
    is joined, or without one a small Ray without dashboard is started on this machine and shut down again
    by ``close``. Nothing is uploaded: on a cluster, ``ray job submit --working-dir`` or the image brings
    the code.

    Args:
        spec: GPUs are reserved whole, for one actor each; ``accelerator`` is Ray's name (``"H100"``).
        start_timeout_s: includes the wait for a node; raise it where an autoscaler boots machines.
        log_to_driver: show what workers print.

    Raises:
        JobError: ``workers`` or ``retries`` is out of range, or the spec can't be pickled.
        CapabilityError: the cluster can't be reached, or this machine lacks the GPUs.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        workers: int = 2,
        retries: int = 1,
        address: str | None = None,
        log_to_driver: bool = False,
        start_timeout_s: float = 900.0,
    ) -> None:
        if workers < 1 or retries < 0:
            raise JobError(f"executor: workers={workers}, retries={retries}; need workers >= 1, retries >= 0")
        transport = RayTransport(spec, workers, address, log_to_driver)
        super().__init__(transport, workers, retries, start_timeout_s)
