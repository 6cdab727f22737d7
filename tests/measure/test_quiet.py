"""The readers-writer lock between processes of one machine."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from autocomp.errors import CapabilityError
from autocomp.measure.quiet import computing, default_path, timing

# Takes the lock named by argv, says so on stdout, and keeps it until a line comes in (or it is killed).
_HOLD = """
import sys
from autocomp.measure import quiet
with getattr(quiet, sys.argv[1])(sys.argv[2]) as waited:
    print("in", flush=True)
    sys.stdin.readline()
"""

# Workers that alternate between computing and timing, and note both ends of each in one append-only log.
_WORK = """
import os, sys, time
from autocomp.measure import quiet
path, log = sys.argv[1], os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
def note(*words):
    os.write(log, (" ".join(map(str, (os.getpid(), *words))) + "\\n").encode())
note("ready", "!")
while open(sys.argv[2]).read().count("ready") < 2:
    time.sleep(0.005)
for _ in range(20):
    with quiet.computing(path):
        note("compute", "+")
        time.sleep(0.01)
        note("compute", "-")
    with quiet.timing(path):
        note("time", "+")
        time.sleep(0.002)
        note("time", "-")
"""


class Holder:
    def __init__(self, mode: str, path: Path) -> None:
        command = [sys.executable, "-c", _HOLD, mode, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_in(self) -> None:
        assert self.process.stdout is not None and self.process.stdout.readline() == "in\n"

    def end(self) -> None:
        self.process.communicate("go\n", timeout=20)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=20)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "quiet.lock"


def test_computations_of_two_processes_run_together_and_keep_a_timing_out(lock: Path) -> None:
    other = Holder("computing", lock)
    other.wait_in()
    with computing(lock, timeout=0.5) as waited:
        assert waited < 0.5
    with pytest.raises(CapabilityError, match="no quiet moment"), timing(lock, timeout=0.05):
        pass
    other.end()
    with timing(lock, timeout=0.5):
        pass


def test_a_timing_keeps_everything_out_until_its_process_is_killed(lock: Path) -> None:
    other = Holder("timing", lock)
    other.wait_in()
    for mode in (computing, timing):
        with pytest.raises(CapabilityError, match="held"), mode(lock, timeout=0.05):
            pass
    other.kill()
    with timing(lock, timeout=2.0):
        pass


def test_a_waiting_timing_goes_before_new_computations(lock: Path) -> None:
    """The starvation case: computations overlap without a gap, yet the timing gets its turn."""
    order: list[str] = []
    first_is_in, release = threading.Event(), threading.Event()

    def first() -> None:
        with computing(lock):
            first_is_in.set()
            release.wait(10)

    def wait_and_time() -> None:
        with timing(lock):
            order.append("timing")

    def late() -> None:
        with computing(lock):
            order.append("late computation")

    threads = [threading.Thread(target=f) for f in (first, wait_and_time, late)]
    threads[0].start()
    assert first_is_in.wait(5)
    threads[1].start()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:  # until the timing stands in the turnstile
        try:
            with computing(lock, timeout=0.0):
                pass
        except CapabilityError:
            break
    threads[2].start()
    time.sleep(0.05)
    assert order == []
    release.set()
    for thread in threads:
        thread.join(10)
    assert sorted(order) == ["late computation", "timing"] and order[0] == "timing"


def test_two_busy_processes_never_compute_while_one_times(lock: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    command = [sys.executable, "-c", _WORK, str(lock), str(log)]
    workers = [subprocess.Popen(command) for _ in range(2)]
    assert [w.wait(30) for w in workers] == [0, 0]
    inside: dict[tuple[str, str], int] = {}
    timed: dict[str, int] = {}
    for line in log.read_text().splitlines():
        pid, what, edge = line.split()
        if what == "ready":
            continue
        if edge == "-":
            del inside[pid, what]
            continue
        if what == "time":
            timed[pid] = timed.get(pid, 0) + 1
            assert not inside, f"{inside} while {pid} times"
        else:
            assert all(kind == "compute" for _, kind in inside), f"{pid} computes while {inside}"
        inside[pid, what] = 1
    assert not inside and list(timed.values()) == [20, 20]


def test_nesting_is_harmless_or_an_error_but_never_a_deadlock(lock: Path) -> None:
    with computing(lock):
        with computing(lock, timeout=0.1) as waited:
            assert waited == 0.0
        with pytest.raises(RuntimeError, match="wait for itself"), timing(lock):
            pass
    with timing(lock), timing(lock, timeout=0.1), computing(lock, timeout=0.1):
        pass
    with timing(lock, timeout=0.1):  # all of the above was given back
        pass


def test_the_lock_is_given_back_after_an_error(lock: Path) -> None:
    with pytest.raises(KeyError), timing(lock):
        raise KeyError("a failing measurement")
    with timing(lock, timeout=0.1):
        pass


def test_a_forked_child_does_not_keep_its_parents_lock(lock: Path) -> None:
    with timing(lock):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    with timing(lock, timeout=0.1):
        pass
    os.write(write, b"x")
    os.waitpid(child, 0)
    os.close(read)
    os.close(write)


def test_a_lock_that_cannot_be_opened_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="AUTOCOMP_QUIET_LOCK"), timing(tmp_path / "no" / "lock"):
        pass


def test_a_file_system_without_locks_names_the_remedy(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, mode: int) -> None:
        if mode != fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(CapabilityError, match=r"No locks available.*local disk"), computing(lock):
        pass


def test_default_path_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOCOMP_QUIET_LOCK", str(tmp_path / "mine"))
    assert default_path() == tmp_path / "mine"
    monkeypatch.delenv("AUTOCOMP_QUIET_LOCK")
    assert default_path().name == f"autocomp-quiet-{os.getuid()}.lock"
