"""Bytes that a model's weights hold, and the peak memory of a piece of work."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

MB = 10**6
SAMPLE_SECONDS = 0.002
_RESET_PEAK = "5"  # written to /proc/self/clear_refs: start VmHWM again from the present (proc(5))


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and packed weights of ``model``, each byte of memory once.

    Tied weights and views into a shared block count once; of a larger block only the viewed part counts.
    Modules that keep weights outside of parameters and buffers offer them as ``resident_tensors()``.
    """
    spans: dict[str, list[tuple[int, int]]] = {}
    unbacked: dict[int, int] = {}
    for tensor in _all_tensors(model):
        if tensor.numel() == 0:
            continue
        if tensor.device.type == "meta":
            unbacked[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            spans.setdefault(str(tensor.device), []).append(_span(tensor))
    return sum(_union(list_) for list_ in spans.values()) + sum(unbacked.values())


def _all_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        packed = getattr(module, "resident_tensors", None)
        if callable(packed):
            yield from packed()


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First address and the one after the last byte that the tensor can reach through its strides."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size()


def _union(spans: Iterable[tuple[int, int]]) -> int:
    """Length of the union of half-open intervals."""
    total, reached = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


@dataclass
class PeakMemory:
    """Filled in when the ``peak_memory`` block ends.

    Attributes:
        peak_bytes: highest memory of the process (CPU: resident set; CUDA: allocated by torch).
        start_bytes: the same when the block began.
        method: ``cuda`` | ``VmHWM`` (kernel's own high-water mark) | ``sampled`` (every 2 ms: short peaks
            may be missed).
    """

    peak_bytes: int = 0
    start_bytes: int = 0
    method: str = ""

    @property
    def increase_bytes(self) -> int:
        return max(0, self.peak_bytes - self.start_bytes)

    @property
    def peak_mb(self) -> float:
        """Peak in 10**6 bytes."""
        return self.peak_bytes / MB


@contextmanager
def peak_memory(device: str = "cpu") -> Iterator[PeakMemory]:
    """Peak memory of the block, on the CPU for the whole process.

    Linux's high-water mark is reset at the start where the kernel permits; elsewhere a thread samples the
    resident set. Blocks must not be nested: an inner one resets the outer one's mark.
    """
    found = PeakMemory()
    if torch.device(device).type == "cuda":
        with _cuda_peak(found, device):
            yield found
    elif _reset_high_water():
        found.method, found.start_bytes = "VmHWM", resident_bytes()
        try:
            yield found
        finally:
            found.peak_bytes = max(_high_water(), found.start_bytes)
    else:
        with _sampled_peak(found):
            yield found


@contextmanager
def _cuda_peak(found: PeakMemory, device: str) -> Iterator[None]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    found.method, found.start_bytes = "cuda", torch.cuda.memory_allocated(device)
    try:
        yield
    finally:
        torch.cuda.synchronize(device)
        found.peak_bytes = torch.cuda.max_memory_allocated(device)


@contextmanager
def _sampled_peak(found: PeakMemory) -> Iterator[None]:
    found.method, found.start_bytes = "sampled", resident_bytes()
    found.peak_bytes = found.start_bytes
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            found.peak_bytes = max(found.peak_bytes, resident_bytes())

    thread = threading.Thread(target=watch, name="autocomp-peak-memory", daemon=True)
    thread.start()
    try:
        yield
    finally:
        found.peak_bytes = max(found.peak_bytes, resident_bytes())
        stop.set()
        thread.join()


def resident_bytes() -> int:
    """Resident set of this process now."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def _reset_high_water() -> bool:
    """Start VmHWM again from the present; false where the kernel or a container doesn't let us."""
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        return _high_water() > 0
    except OSError:
        return False


def _high_water() -> int:
    """VmHWM in bytes; 0 where the kernel doesn't report it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
