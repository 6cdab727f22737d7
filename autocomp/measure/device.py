"""What a measurement ran on: device, instruction sets, threads, load, software. All of it for the record."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from autocomp import __version__

# Instruction sets that change which kernels run or how fast (x86, then Arm names of /proc/cpuinfo).
_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_bf16", "amx_int8",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_PACKAGES = ("torch", "transformers", "diffusers", "triton", "ray")


def device_name(device: str = "cpu", threads: int | None = None) -> str:
    """One line that tells two machines apart: CPU model, instruction sets and threads, or the GPU.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        threads: CPU threads used; torch's present setting by default.
    """
    place = torch.device(device)
    if place.type == "cuda":
        facts = torch.cuda.get_device_properties(place)
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        return f"{facts.name} (sm_{facts.major}{facts.minor}, {memory})"
    if place.type != "cpu":
        return place.type
    count = threads or torch.get_num_threads()
    flags = " ".join(cpu_flags())
    return f"{cpu_model()}{f' [{flags}]' if flags else ''}, {count} thread{'s' if count != 1 else ''}"


def cpu_model() -> str:
    """The CPU's name with family and model number (virtual machines often hide the rest)."""
    facts = _cpuinfo()
    name = facts.get("model name") or facts.get("CPU part") or platform.processor() or platform.machine()
    numbers = [facts[k] for k in ("cpu family", "model") if k in facts]
    return f"{name} ({'/'.join(numbers)})" if numbers else name


def cpu_flags() -> tuple[str, ...]:
    """Those of the instruction sets that matter here which the CPU has."""
    facts = _cpuinfo()
    has = set((facts.get("flags") or facts.get("Features") or "").split())
    return tuple(flag for flag in _FLAGS if flag in has)


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none (macOS, Windows)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def software_versions() -> dict[str, str]:
    """Versions that a measurement depends on; packages that aren't installed are left out."""
    found = {"python": platform.python_version(), "autocomp": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def set_threads(count: int) -> int:
    """Use ``count`` threads in torch's CPU kernels (0: leave as it is); returns the former number.

    Raises:
        ValueError: a negative number.
    """
    if count < 0:
        raise ValueError(f"threads must be 0 (leave as it is) or more; got {count}")
    former = torch.get_num_threads()
    if count and count != former:
        torch.set_num_threads(count)
    return former


def load_average() -> float | None:
    """Runnable processes over the last minute; ``None`` where the system doesn't say."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def spin_wait_warning(threads: int | None = None) -> str:
    """A warning when idle OpenMP threads spin, which makes timings on busy cores several times too long.

    GNU OpenMP reads ``GOMP_SPINCOUNT`` and ``OMP_WAIT_POLICY`` once, when torch loads: the environment of
    the process at its start counts, what Python set later may have come too late. Empty when all is well
    or there is one thread, which waits for nobody.
    """
    if (threads or torch.get_num_threads()) == 1 or _waits_passively(_initial_environment()):
        return ""
    advice = "start the process with GOMP_SPINCOUNT=0"
    if _waits_passively(dict(os.environ)):
        return f"GOMP_SPINCOUNT or OMP_WAIT_POLICY was set after the process began; to be sure, {advice}"
    return f"idle OpenMP threads spin and timings on busy cores are inflated; {advice}"


def _waits_passively(environment: dict[str, str]) -> bool:
    policy = environment.get("OMP_WAIT_POLICY", "").upper()
    return environment.get("GOMP_SPINCOUNT") == "0" or policy == "PASSIVE"


def _initial_environment() -> dict[str, str]:
    """The environment this process was started with; what it has now where the system doesn't tell."""
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return dict(os.environ)
    return dict(os.fsdecode(e).partition("=")[::2] for e in entries if b"=" in e)


def conditions(device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """The record beside a measurement (JSON): device, threads, load of the last minute, warnings."""
    warnings = [spin_wait_warning(threads)] if torch.device(device).type == "cpu" else []
    load, cores = load_average(), os.cpu_count() or 1
    if load is not None and load > cores:
        warnings.append(f"load average {load} is above the {cores} cores: others compute here")
    return {
        "device": device_name(device, threads),
        "threads": threads or torch.get_num_threads(),
        "load": load,
        "warnings": [w for w in warnings if w],
    }
