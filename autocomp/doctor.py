"""What this machine can execute, what is missing, and how to get it.

Every finding is guarded on its own: a broken driver or a package that fails to import becomes a line with
the reason, never a stack trace.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from typing import Any, Literal

from autocomp import __version__
from autocomp.errors import JobError

Status = Literal["ok", "note", "missing", "broken"]

OPTIONS = (
    "w16", "w8", "w8g128", "w6g64", "w5g64", "w4g32", "w4g64", "w4g128", "w4g64a", "w4g64o0.5", "w3g64",
    "w2g64",
)  # fmt: skip
"""Weight formats that are asked about, largest first."""
SHAPE = (2048, 2048)
"""(output, input features): an attention projection of a model with 1 B weights."""

CACHES = ("dense/k16v16", "dense/k8v8", "dense/k8v4", "dense/k4v4", "a0b0.25s16/k16v16", "a0b0.25s16/k8v4")
"""What a key/value head may keep, see ``autocomp.attention.plan``."""
CACHE_SHAPE = (4, 128, 4096)
"""(query heads of one key/value head, features, tokens in the cache)."""

_COMPILERS = (
    ("gcc", "CPU kernels that are compiled here", "apt install build-essential"),
    ("g++", "CPU kernels that are compiled here", "apt install build-essential"),
    ("nvcc", "CUDA sources only; Triton kernels do without", "install the CUDA toolkit"),
)
_TOOLS = (("optuna-dashboard", "browse RUN_DIR/optuna.log", "pip install optuna-dashboard"),)


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        name: what was looked at.
        status: ``ok``; ``note`` (works, but see the remedy); ``missing`` (optional); ``broken`` (needed).
        value: version, model, backend, or why not.
        remedy: what to do about it; empty when there is nothing to do.
        detail: the long story, in the JSON form only.
    """

    name: str
    status: Status
    value: str
    remedy: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Section:
    """Findings under a heading."""

    title: str
    findings: tuple[Finding, ...]


def examine(device: str = "", speed: bool = True) -> list[Section]:
    """Look at everything.

    Args:
        device: ``cpu`` or ``cuda``; by default the CPU, and CUDA where torch sees a GPU.
        speed: also time each option against bfloat16 (some seconds).

    Raises:
        JobError: ``device`` is neither.
    """
    if device not in ("", "cpu", "cuda"):
        raise JobError(f"--device {device!r} is not known; use cpu or cuda")
    devices = [device] if device else ["cpu", *(["cuda"] if _has_cuda() else [])]
    sections = [
        Section("machine", tuple(_guard("machine", _machine))),
        Section("compilers", tuple(_compiler(*c) for c in _COMPILERS)),
        Section("packages", tuple(_guard("packages", _packages))),
    ]
    for name in devices:
        found = tuple(_guard("kernels", partial(_kernels, name, SHAPE, speed)))
        sections.append(
            Section(f"weight formats on {name}: one {SHAPE[0]}x{SHAPE[1]} linear, 1 token", found)
        )
        heads, dim, tokens = CACHE_SHAPE
        caches = tuple(_guard("caches", partial(_caches, name, speed)))
        title = (
            f"key/value caches on {name}: a head with {heads} queries of {dim}, {tokens} tokens, 1 new one"
        )
        sections.append(Section(title, caches))
        operators = tuple(_guard("operators", partial(_operators, name)))
        sections.append(Section(f"other operators on {name}", operators))
    return sections


def broken(sections: Sequence[Section]) -> bool:
    """True when something that autocomp needs is not there."""
    return any(f.status == "broken" for s in sections for f in s.findings)


def to_json(sections: Sequence[Section]) -> dict[str, Any]:
    return {s.title: [asdict(f) for f in s.findings] for s in sections}


def text(sections: Sequence[Section]) -> str:
    """Aligned plain text: a mark, the name, the value, and the remedy on a line of its own."""
    marks = {"ok": "  ok", "note": "note", "missing": "  --", "broken": " BAD"}
    width = max((len(f.name) for s in sections for f in s.findings), default=0)
    lines = [f"autocomp {__version__}"]
    for section in sections:
        lines += ["", section.title]
        for f in section.findings:
            lines.append(f"  {marks[f.status]}  {f.name:<{width}}  {f.value}".rstrip())
            if f.remedy:
                indent = " " * (width + 10)
                told = textwrap.wrap(f.remedy, 107 - len(indent))
                lines += [f"{indent}{'   ' if i else '-> '}{line}" for i, line in enumerate(told)]
    return "\n".join(lines)


def _guard(name: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What ``look`` finds, up to the error that it may end with."""
    try:
        yield from look()
    except ImportError as error:
        missing = error.name or str(error)
        yield Finding(name, "broken", f"can't import {missing}", "reinstall: pip install -U autocomp")
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:200]
        remedy = "`autocomp doctor --json` has the whole story"
        yield Finding(name, "broken", f"{type(error).__name__}: {first}", remedy, traceback.format_exc())


def _has_cuda() -> bool:
    try:
        import torch

        return bool(torch.cuda.is_available())
    except Exception:
        return False  # the package section says what is wrong with torch


def _machine() -> Iterator[Finding]:
    import psutil

    python = platform.python_version()
    yield Finding("system", "ok", f"{platform.system()} {platform.release()}, Python {python}")
    memory = psutil.virtual_memory()
    available, total = memory.available / 1e9, memory.total / 1e9
    yield Finding("memory", "ok", f"{total:.1f} GB, {available:.1f} GB available")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("CPU cores", "ok", f"{usable} usable of {os.cpu_count()}")
    yield from _load(usable)
    from autocomp.measure import device

    yield Finding("CPU", "ok", device.device_name("cpu"))
    warning = device.spin_wait_warning()
    if warning:
        remedy = "the workers of a search get it; set it for timings of your own"
        yield Finding("threads", "note", warning, remedy)
    yield from _gpus()


def _load(cores: int) -> Iterator[Finding]:
    """Other work on the machine is the commonest reason for a latency that nobody can repeat."""
    if not hasattr(os, "getloadavg"):
        return
    load = os.getloadavg()[0]
    busy = load > 0.5 * cores
    remedy = "latencies taken now will be noisy; stop other work before a search" if busy else ""
    yield Finding("load, last minute", "note" if busy else "ok", f"{load:.1f}", remedy)


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda:
            reason = f"torch is built for CUDA {torch.version.cuda} but sees no GPU"
            yield Finding("GPU", "missing", reason, "if there is one, check nvidia-smi")
        else:
            remedy = "only where there is an NVIDIA GPU: install torch for CUDA"
            yield Finding("GPU", "missing", "torch is built without CUDA", remedy)
        return
    from autocomp.measure import device

    for index in range(torch.cuda.device_count()):
        free, _ = torch.cuda.mem_get_info(index)
        value = f"{device.device_name(f'cuda:{index}')}, {free / 1e9:.1f} GB free"
        yield Finding(f"GPU {index}", "ok", value)


def _compiler(name: str, purpose: str, remedy: str) -> Finding:
    path = shutil.which(name)
    if path is None:
        return Finding(name, "missing", purpose, remedy)
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(name, "note", f"{path} does not run: {error}", remedy)
    lines = [line for line in shown.stdout.splitlines() if any(c.isdigit() for c in line)]
    released = [line for line in lines if "release" in line]
    return Finding(name, "ok", (released or lines or [path])[0].strip())


def _packages() -> Iterator[Finding]:
    """The project's own requirements, read from its metadata, against what is installed."""
    from packaging.requirements import Requirement

    for line in metadata.requires("autocomp") or ():
        requirement = Requirement(line)
        marker = requirement.marker
        extras = [e for e in ("", "export") if marker is None or marker.evaluate({"extra": e})]
        if extras and requirement.name != "autocomp":
            yield _package(requirement.name, str(requirement.specifier), extras[0])
    for name, purpose, remedy in _TOOLS:
        yield _tool(name, purpose, remedy)


def _package(name: str, wanted: str, extra: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    remedy = f"pip install 'autocomp[{extra}]'" if extra else f"pip install '{name}{wanted}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "missing" if extra else "broken", f"not installed (wanted {wanted})", remedy)
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding(name, "note", f"{version}, but {wanted} is wanted", remedy)
    return Finding(name, "ok", version)


def _tool(name: str, purpose: str, remedy: str) -> Finding:
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", f"not installed; optional: {purpose}", remedy)


def _kernels(device: str, shape: tuple[int, int], speed: bool) -> Iterator[Finding]:
    """Which backend runs each weight format, its time and how many times faster than 16 bits it is. What has
    none can be searched for size, not for latency."""
    from autocomp.kernels.ops import capability
    from autocomp.quantize.scheme import Scheme

    dense = 0.0
    for label in OPTIONS:
        found = capability(Scheme.parse(label), shape, device)
        if not found.native:
            brief = found.reason.split(" (", 1)[0]  # what each backend said stands behind it
            yield Finding(label, "missing", "simulated only, no latency", brief, found.reason)
        elif not speed:
            yield Finding(label, "ok", found.backend)
        else:
            took = _time(label, shape, device)
            dense = dense or took
            slower = took > dense
            yield Finding(
                label, "note" if slower else "ok",
                f"{found.backend:<10} {took:8.4f} ms  {dense / took:5.2f}x",
                "slower than 16 bits: it saves memory, not time" if slower else "",
            )  # fmt: skip


def _time(label: str, shape: tuple[int, int], device: str) -> float:
    """Median milliseconds, weights out of the caches; on a CPU as in the lean decode step."""
    from autocomp.kernels import native
    from autocomp.measure.op_table import op_key, time_op
    from autocomp.quantize.scheme import Scheme

    lean = device == "cpu" and not native.unavailable("step")
    return time_op(op_key(shape, Scheme.parse(label)), tokens=1, device=device, lean=lean).median_ms


def _caches(device: str, speed: bool) -> Iterator[Finding]:
    """What attends over each kind of cache, its time and how many times faster than all tokens in 16 bits."""
    from autocomp.attention.plan import Keep
    from autocomp.kernels import native
    from autocomp.measure.op_table import attention_backend, attention_key, time_op

    heads, dim, tokens = CACHE_SHAPE
    dense = 0.0
    for label in CACHES:
        keep = Keep.parse(label)
        backend, reason = attention_backend(keep, device, dim)
        if reason:
            yield Finding(label, "missing", "simulated only, no latency", reason)
        elif not speed:
            yield Finding(label, "ok", backend)
        else:
            lean = device == "cpu" and not native.unavailable("step")
            key = attention_key(heads, dim, keep, tokens)
            took = time_op(key, tokens=1, device=device, lean=lean).median_ms
            dense = dense or took
            slower = took > 1.05 * dense
            yield Finding(
                label, "note" if slower else "ok",
                f"{backend:<10} {took:8.4f} ms  {dense / took:5.2f}x",
                "slower than 16 bits: it saves memory, not time" if slower else "",
            )  # fmt: skip


def _operators(device: str) -> Iterator[Finding]:
    """Which implementation each of the other operators has here."""
    from autocomp.kernels import catalogue

    for operator in catalogue.operators():
        if operator.name == "linear_wna16":  # the weight formats above
            continue
        reasons = []
        for implementation in operator.implementations:
            if implementation.device_type != device:
                continue
            reason = implementation.unusable()
            if not reason:
                yield Finding(operator.name, "ok", implementation.name)
                break
            reasons.append(f"{implementation.name}: {reason}")
        else:
            told = "; ".join(reasons) or "nothing faster for this device"
            yield Finding(operator.name, "note", "reference (plain torch)", told[:200], told)
