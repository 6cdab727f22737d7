"""The local executor: conformance, interrupts, orphans, GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autocomp.errors import CapabilityError, JobError
from autocomp.executors import local
from autocomp.executors.base import WorkerSpec, WorkItem
from autocomp.executors.local import LocalExecutor, assign_gpus
from autocomp.testing.executors import EXECUTOR_CHECKS, TOY, ExecutorFactory, run_items

DRIVER = """
import sys, time
from autocomp.executors.base import WorkerSpec, WorkItem
from autocomp.executors.local import LocalExecutor

def main():
    executor = LocalExecutor(WorkerSpec("autocomp.testing.workers:ToyWorker"), workers=1)
    executor.submit(WorkItem("pid", "pid"))
    print(next(iter(executor.completed(60.0))).value, flush=True)
    executor.submit(WorkItem("long", "sleep", {"seconds": 60.0}))
    try:
        list(executor.completed(60.0))
    except KeyboardInterrupt:
        if "survey" in sys.argv:
            print("interrupted with", executor.busy(), "under way", flush=True)
            time.sleep(0.5)  # the worker must still be there: the driver has not decided yet
        executor.close()

if __name__ == "__main__":
    main()
"""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"  # a zombie has ended
    except OSError:
        return not Path("/proc").exists()


def _gone(pid: int, within_s: float = 15.0) -> bool:
    deadline = time.monotonic() + within_s
    while _exists(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def driver(tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[str], int]]:
    """Start a driver script in a session of its own; gives the process and its worker's pid."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)

    def start(*args: str) -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(
            [sys.executable, str(script), *args], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    return start


@pytest.mark.parametrize("check", EXECUTOR_CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[ExecutorFactory], None]) -> None:
    check(lambda spec, workers, retries: LocalExecutor(spec, workers, retries))


def test_worker_ends_with_a_killed_driver(
    driver: Callable[..., tuple[subprocess.Popen[str], int]],
) -> None:
    process, worker = driver()
    assert _exists(worker)
    process.kill()
    process.communicate()
    assert _gone(worker), "a worker outlived its driver by 15 s"


def test_ctrl_c_reaches_the_driver_alone(driver: Callable[..., tuple[subprocess.Popen[str], int]]) -> None:
    process, worker = driver("survey")
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    assert process.stdout is not None
    assert process.stdout.readline() == "interrupted with 1 under way\n"
    os.kill(worker, signal.SIGINT)
    assert _exists(worker), "the worker did not ignore SIGINT"
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert _gone(worker)


def test_a_script_without_main_guard_is_told_so_and_ends(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    body = DRIVER.partition("def main")[0] + "\n".join(
        [
            'executor = LocalExecutor(WorkerSpec("autocomp.testing.workers:ToyWorker"))',
            'executor.submit(WorkItem("pid", "pid"))',
            "print(next(iter(executor.completed(60.0))).failure, flush=True)",
        ]
    )
    script.write_text(body)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert "exited with code 1" in done.stdout and "if __name__ == '__main__'" in done.stdout


def test_signal_is_named_and_the_environment_of_the_driver_is_untouched() -> None:
    before = dict(os.environ)
    spec = WorkerSpec(TOY, env={"AUTOCOMP_LEAK": "1"}, threads=7)
    with LocalExecutor(spec, retries=0) as executor:
        items = [
            WorkItem("segv", "crash", {"signum": int(signal.SIGSEGV)}),
            WorkItem("exit", "exit", {"code": 3}),
        ]
        outcomes = run_items(executor, items)
    segv, code = outcomes["segv"].failure, outcomes["exit"].failure
    assert segv is not None and segv.reason == "worker exited with signal 11 (SIGSEGV)"
    assert code is not None and code.reason == "worker exited with code 3"
    assert dict(os.environ) == before


def test_a_killed_idle_worker_is_replaced() -> None:
    with LocalExecutor(WorkerSpec(TOY)) as executor:
        pid = run_items(executor, [WorkItem("1", "pid")])["1"].value
        os.kill(pid, signal.SIGKILL)
        assert _gone(pid)
        after = run_items(executor, [WorkItem("2", "pid")])["2"]
    assert after.failure is None and after.value != pid and after.attempts <= 2


def test_large_values_pass_both_ways() -> None:
    text = "x" * (8 * 2**20)  # far above the pipe's buffer
    with LocalExecutor(WorkerSpec(TOY)) as executor:
        assert run_items(executor, [WorkItem("1", "echo", {"value": text})])["1"].value == text


@pytest.mark.parametrize(("workers", "retries"), [(0, 1), (-1, 1), (1, -1)])
def test_numbers_out_of_range_are_refused(workers: int, retries: int) -> None:
    with pytest.raises(JobError, match="need workers >= 1"):
        LocalExecutor(WorkerSpec(TOY), workers, retries)


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [(None, 1, ["0", "1"]), (None, 2, ["0,1", "2,3"]), ("3,1", 1, ["3", "1"])],
)
def test_every_worker_gets_gpus_of_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int, expected: list[str]
) -> None:
    monkeypatch.setattr(local, "_gpu_names", lambda: ["NVIDIA H100 80GB HBM3"] * 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert assign_gpus(WorkerSpec(TOY, gpus=gpus, accelerator="H100"), 2) == expected


@pytest.mark.parametrize(
    ("names", "visible", "accelerator", "text"),
    [
        ([], None, "", "shows 0"),
        (["NVIDIA H100"], None, "", "need 2"),
        (["NVIDIA H100"] * 4, "0", "", "shows 1"),
        (["NVIDIA H100"] * 4, "", "", "shows 0"),
        (["NVIDIA A100-SXM4-40GB"] * 2, None, "H100", "accelerator 'H100'"),
    ],
)
def test_missing_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, names: list[str], visible: str | None, accelerator: str, text: str
) -> None:
    monkeypatch.setattr(local, "_gpu_names", lambda: names)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(CapabilityError, match=text):
        LocalExecutor(WorkerSpec(TOY, gpus=1, accelerator=accelerator), workers=2)
