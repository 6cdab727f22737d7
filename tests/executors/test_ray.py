"""The Ray executor: conformance on one shared local Ray, reservations, and leaving nothing behind."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

from autocomp.errors import CapabilityError, JobError  # noqa: E402
from autocomp.executors import ray as ray_executor  # noqa: E402
from autocomp.executors.base import WorkerSpec, WorkItem  # noqa: E402
from autocomp.executors.ray import RayExecutor  # noqa: E402
from autocomp.testing.executors import EXECUTOR_CHECKS, TOY, ExecutorFactory, run_items  # noqa: E402

DRIVER = """
import psutil
from autocomp.executors.base import WorkerSpec, WorkItem
from autocomp.executors.ray import RayExecutor

executor = RayExecutor(WorkerSpec("autocomp.testing.workers:ToyWorker"), workers=1)
executor.submit(WorkItem("pid", "pid"))
worker = next(iter(executor.completed(60.0))).value
print(worker, *[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
executor.submit(WorkItem("long", "sleep", {"seconds": 60.0}))
list(executor.completed(60.0))
"""


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """A Ray that the executor finds initialised; so small that two workers of two threads must share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
        )
        yield
        ray.shutdown()


# Starting an actor takes a second. What these three look at is the pool's doing, which the local executor's
# run covers as well; together they take over ten seconds.
_SLOW = {"check_share", "check_death_in_constructor", "check_long_lived_in_order"}
_CHECKS = [
    pytest.param(check, id=check.__name__, marks=[pytest.mark.slow] if check.__name__ in _SLOW else [])
    for check in EXECUTOR_CHECKS
]


@pytest.mark.parametrize("check", _CHECKS)
def test_conformance(shared_ray: None, check: Callable[[ExecutorFactory], None]) -> None:
    check(lambda spec, workers, retries: RayExecutor(spec, workers, retries))


def test_three_workers_share_two_cores_of_a_ray_that_outlives_them(shared_ray: None) -> None:
    with RayExecutor(WorkerSpec(TOY, threads=8), workers=3, retries=0) as executor:
        items = [WorkItem(str(n), "pid") for n in range(3)]
        items += [WorkItem("crash", "crash"), WorkItem("env", "env", {"names": ["OMP_NUM_THREADS"]})]
        outcomes = run_items(executor, items)
    assert outcomes["env"].value == {"OMP_NUM_THREADS": "8"}
    assert all(o.worker.startswith(f"{platform.node()}/ray-") for o in outcomes.values())
    died = outcomes["crash"].failure
    assert died is not None and died.reason.startswith("worker died: The actor is dead because")
    assert len(died.reason) < 500, "Ray's advice was not cut off"
    assert ray.is_initialized()
    deadline = time.monotonic() + 15
    left = {outcomes[str(n)].value for n in range(3)}
    while (left := {pid for pid in left if psutil.pid_exists(pid)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"actors outlived close(): {left}"


def test_an_actor_that_cannot_be_placed_is_a_timeout_with_a_remedy(shared_ray: None) -> None:
    with RayExecutor(WorkerSpec(TOY, gpus=64), workers=1, start_timeout_s=0.5) as executor:
        failure = run_items(executor, [WorkItem("1", "pid")])["1"].failure
    assert failure is not None and failure.kind == "timeout" and "can be placed" in failure.reason


def test_bad_numbers_and_specs_are_refused_without_starting_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(**options: object) -> None:
        raise AssertionError("Ray was started for a spec that is refused")

    monkeypatch.setattr(ray, "init", started)
    with pytest.raises(JobError, match="workers=0"):
        RayExecutor(WorkerSpec(TOY), workers=0)
    with pytest.raises(JobError, match="can't be sent"):
        RayExecutor(WorkerSpec(TOY, {"greeting": lambda: None}))


@pytest.mark.parametrize(
    ("have", "spec", "text"),
    [
        ({"CPU": 8.0}, WorkerSpec(TOY, gpus=1), "Ray sees 0"),
        ({"CPU": 8.0, "GPU": 1.0}, WorkerSpec(TOY, gpus=1), "need 2"),
        (
            {"GPU": 2.0, "accelerator_type:A100": 1.0},
            WorkerSpec(TOY, gpus=1, accelerator="H100"),
            r"'H100' was asked for; this machine has \['A100'\]",
        ),
    ],
)
def test_what_one_machine_can_never_place_is_refused(
    monkeypatch: pytest.MonkeyPatch, have: dict[str, float], spec: WorkerSpec, text: str
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: have)
    with pytest.raises(CapabilityError, match=text):
        ray_executor._check_fits(spec, workers=2)


@pytest.mark.parametrize(
    ("node_cpus", "threads", "workers", "reserved"),
    [([8], 4, 2, 4), ([2], 2, 2, 1), ([3], 2, 2, 1), ([2], 2, 4, 0.5), ([4, 4], 16, 2, 16), ([0], 4, 2, 4)],
)
def test_cpu_reservation(
    monkeypatch: pytest.MonkeyPatch, node_cpus: list[int], threads: int, workers: int, reserved: float
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": float(n)}} for n in node_cpus]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert ray_executor._cpus_per_actor(threads, workers) == reserved


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, **options: object) -> None:
        raise ConnectionError(f"nobody at {address}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(CapabilityError, match=r"'10\.0\.0\.1:6379'.*ray start --head"):
        RayExecutor(WorkerSpec(TOY), address="10.0.0.1:6379")


@pytest.mark.slow
def test_ctrl_c_in_a_driver_that_does_not_close_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    started = [int(pid) for pid in process.stdout.readline().split()]
    assert len(started) >= 3, "expected at least the worker, the raylet and the control store"
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    _, left = psutil.wait_procs([psutil.Process(p) for p in started if psutil.pid_exists(p)], timeout=15)
    assert left == [], f"still running: {left}"
