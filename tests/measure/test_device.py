"""The record of what a measurement ran on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from autocomp.measure import device
from autocomp.measure.device import (
    conditions,
    device_name,
    load_average,
    set_threads,
    software_versions,
    spin_wait_warning,
)  # fmt: skip

_CPUINFO = """processor\t: 0
model name\t: Some CPU @ 3 GHz
cpu family\t: 6
model\t\t: 143
flags\t\t: fpu avx2 avx512f amx_int8 sse

processor\t: 1
model name\t: Another
"""


@pytest.fixture
def cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: _CPUINFO)


def test_cpu_name_tells_model_instruction_sets_and_threads(cpuinfo: None) -> None:
    assert device_name("cpu", 1) == "Some CPU @ 3 GHz (6/143) [avx2 avx512f amx_int8], 1 thread"
    assert device_name("cpu", 8).endswith("8 threads")


def test_a_machine_without_cpuinfo_still_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert device_name("cpu", 2).endswith(", 2 threads") and len(device_name("cpu", 2)) > 11
    assert device.cpu_flags() == ()


def test_versions_name_what_is_installed_and_only_that() -> None:
    found = software_versions()
    assert found["torch"] == torch.__version__ and found["python"].count(".") == 2
    assert {"autocomp", "transformers"} <= set(found)
    assert all(isinstance(v, str) for v in found.values())


def test_missing_packages_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_PACKAGES", ("torch", "no-such-package-anywhere"))
    assert set(software_versions()) == {"python", "autocomp", "torch"}


def test_set_threads_returns_the_former_number() -> None:
    before = torch.get_num_threads()
    try:
        assert set_threads(2) == before
        assert torch.get_num_threads() == 2
        assert set_threads(0) == 2 and torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="-1"):
            set_threads(-1)
    finally:
        set_threads(before)
    assert torch.get_num_threads() == before


def test_load_average_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    load = load_average()
    assert load is not None and load >= 0

    def missing() -> None:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", missing)
    assert load_average() is None


@pytest.mark.parametrize(
    ("start", "now", "words"),
    [
        ({"GOMP_SPINCOUNT": "0"}, {}, ""),
        ({"OMP_WAIT_POLICY": "passive"}, {}, ""),
        ({}, {"GOMP_SPINCOUNT": "0"}, "after the process began"),
        ({}, {}, "inflated; start the process with GOMP_SPINCOUNT=0"),
        ({"GOMP_SPINCOUNT": "1000"}, {}, "inflated"),
    ],
)
def test_spinning_threads_are_warned_about(
    start: dict[str, str], now: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_initial_environment", lambda: start)
    monkeypatch.setattr(os, "environ", now)
    assert (words in spin_wait_warning(2)) if words else spin_wait_warning(2) == ""
    assert spin_wait_warning(1) == ""


def test_the_environment_at_the_start_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/environ").exists():
        pytest.skip("this system doesn't tell what environment a process started with")
    monkeypatch.setenv("AUTOCOMP_SET_LATER", "1")
    found = device._initial_environment()
    assert "PATH" in found and "AUTOCOMP_SET_LATER" not in found


def test_conditions_are_json_and_warn_of_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "load_average", lambda: 999.0)
    found = json.loads(json.dumps(conditions("cpu", 3)))
    assert found["threads"] == 3 and "3 threads" in found["device"] and found["load"] == 999.0
    assert any("999.0" in w for w in found["warnings"])
    monkeypatch.setattr(device, "load_average", lambda: None)
    assert not any("load" in w for w in conditions("cpu", 1)["warnings"])
