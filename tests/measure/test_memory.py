"""Bytes of weights, and peaks."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from autocomp.measure import memory
from autocomp.measure.memory import PeakMemory, peak_memory, weights_bytes


def test_parameters_and_buffers_count_in_their_own_size() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20)).half()
    # BatchNorm: weight, bias, two running statistics in half, and an int64 counter.
    assert weights_bytes(model) == 2 * (10 * 20 + 20) + 2 * 4 * 20 + 8


def test_tied_weights_count_once() -> None:
    embedding, head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
    model = nn.ModuleList([embedding, head])
    assert weights_bytes(model) == 2 * 4 * 50 * 8
    head.weight = embedding.weight
    assert weights_bytes(model) == 4 * 50 * 8
    head.weight = nn.Parameter(embedding.weight.data)  # another object, the same memory
    assert weights_bytes(model) == 4 * 50 * 8


def test_views_count_what_they_see_of_a_shared_block() -> None:
    block = torch.zeros(1000)
    model = nn.Module()
    model.register_buffer("a", block[:100])
    model.register_buffer("b", block[50:150])
    model.register_buffer("c", block[900:].view(10, 10).T)
    assert weights_bytes(model) == 4 * (150 + 100)


def test_empty_and_meta_tensors() -> None:
    model = nn.Module()
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer("meta", torch.zeros(10, device="meta"))
    assert weights_bytes(model) == 40
    assert weights_bytes(nn.Identity()) == 0


def work(megabytes: int = 40) -> None:
    """Touches fresh pages and gives them back. Straight from the kernel: an allocator may hand out a hole of
    its heap that is resident already, and then the process does not grow."""
    with mmap.mmap(-1, megabytes * 10**6) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1


@pytest.mark.parametrize("permitted", [True, False])
def test_peak_memory_sees_memory_that_is_given_back(permitted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not permitted:
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    elif not memory._reset_high_water():
        pytest.skip("this kernel doesn't let a process reset its high-water mark")
    work(200)  # an earlier, higher peak must not show
    with peak_memory() as small:
        pass
    with peak_memory() as found:
        work()
    assert found.method == ("VmHWM" if permitted else "sampled")
    assert 30e6 < found.increase_bytes < 120e6
    assert small.increase_bytes < 20e6
    assert found.peak_mb == found.peak_bytes / 1e6


def test_the_peak_is_there_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[PeakMemory] = []
    for allowed in (True, False):
        if not allowed:
            monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
        with pytest.raises(MemoryError), peak_memory() as peak:
            found.append(peak)
            raise MemoryError
    assert all(p.peak_bytes >= p.start_bytes > 0 for p in found)


def test_no_permission_to_reset_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("read-only /proc")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert memory._reset_high_water() is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak() -> None:
    with peak_memory("cuda") as found:
        torch.zeros(25_000_000, device="cuda")
    assert found.method == "cuda" and 100e6 <= found.increase_bytes < 110e6
