"""The C attention kernels: every instruction set, what they write, threads, the decode step's interface."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from autocomp.kernels import attention_probe, cpu_attention, cpu_attention_tiles, native
from autocomp.kernels import attention_reference as reference
from autocomp.kernels.attention import OPERATORS
from autocomp.kernels.triton.attention_cases import Cases

Tensor = torch.Tensor
needs_compiler = pytest.mark.skipif(bool(native.unavailable("attention")), reason="no C compiler")

EVERYTHING = """
import sys, torch
from autocomp.kernels.attention import OPERATORS
from autocomp.testing.attention import check_operator
torch.set_num_threads(1)
for operator in OPERATORS.values():
    check_operator(operator, sys.argv[1], dtypes=(torch.float32,))
    if operator.name in ("attention_spans", "decode_attention_cache", "cache_append"):
        check_operator(operator, sys.argv[1], dtypes=(torch.bfloat16,))
    print(operator.name, operator.implementations[-1].unusable())
"""


def run_apart(implementation: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EVERYTHING, implementation],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="variants of x86-64")
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
def test_every_instruction_set_conforms(march: str) -> None:
    if march == "x86-64-v3" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this CPU has no AVX2")
    assert len(run_apart("cpu", AUTOCOMP_MARCH=march).splitlines()) == len(OPERATORS)


def test_without_a_compiler_the_reference_takes_over() -> None:
    code = """
from autocomp.kernels import attention_probe
from autocomp.kernels.attention import OPERATORS
for name, operator in OPERATORS.items():
    args = attention_probe.arguments(name)
    operator(*args)
    print(operator.choose(*args), operator.implementations[-1].unusable())
"""
    environment = os.environ | {"CC": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(OPERATORS)
    assert all(line.startswith("reference C kernels") and "no C compiler" in line for line in lines), lines


@pytest.fixture
def guarded_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """``torch.empty`` gives memory between guard zones; at the end the zones must be as they were."""
    made: list[Tensor] = []
    plain = torch.empty

    def empty(*shape: object, dtype: torch.dtype = torch.float32) -> Tensor:
        size = plain(*shape, dtype=dtype, device="meta")
        nbytes = size.numel() * size.element_size()
        whole = torch.full((nbytes + 512,), 170, dtype=torch.uint8)
        made.append(whole[:256])
        made.append(whole[256 + nbytes :])
        return whole[256 : 256 + nbytes].view(dtype).view(size.shape)

    monkeypatch.setattr(cpu_attention.torch, "empty", empty)
    yield made
    assert made and all(bool((zone == 170).all()) for zone in made)


@needs_compiler
@pytest.mark.parametrize("name", [n for n in OPERATORS if n != "cache_append"])
@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_is_written_beside_results_and_work_space(
    name: str, threads: int, guarded_empty: list[Tensor]
) -> None:
    module = cpu_attention if hasattr(cpu_attention, name) else cpu_attention_tiles
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert attention_probe.check(name, getattr(module, name)) == ""
    finally:
        torch.set_num_threads(former)


@needs_compiler
def test_sequences_that_are_split_among_threads_merge_to_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 1, 3000, 64, generator=generator) for _ in range(2))
    q = torch.randn(1, 3, 1, 64, generator=generator) * 4
    args = (
        q,
        *reference.kv_quantize(k, 8),
        *reference.kv_quantize(v, 8),
        torch.tensor([2999]).int(),
        8,
        8,
        0.125,
    )
    wanted = reference.decode_attention_kv(q.double(), *args[1:])
    former = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = cpu_attention.decode_attention_kv(*args)
            assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    finally:
        torch.set_num_threads(former)


@needs_compiler
@pytest.mark.parametrize("bits", [(16, 16), (8, 4)])
def test_rings_that_are_split_among_threads_merge_to_the_same(bits: tuple[int, int]) -> None:
    """Rings and sequences of very different lengths, so that a thread gets pieces of several."""
    sizes, lengths = (3, 9, 3, 64), [5000, 0, 700]
    args = Cases("cpu", torch.bfloat16).decode_attention_cache(sizes, bits, [3000, 100, 1], [0, 16], lengths)
    args = (args[0].float() * 4, *args[1:])
    wanted = reference.decode_attention_cache(args[0].double(), *args[1:])
    former = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = cpu_attention.decode_attention_cache(*args)
            assert float((found - wanted).norm() / wanted.norm()) < 1e-4
            assert not found[1].any()
    finally:
        torch.set_num_threads(former)


@needs_compiler
@pytest.mark.parametrize(("key_bits", "value_bits"), [(32, 32), (16, 16), (8, 8), (4, 4), (8, 16), (16, 4)])
def test_the_decode_steps_interface_on_rings_with_a_models_window(key_bits: int, value_bits: int) -> None:
    """``ac_cache_append`` and ``ac_attend`` on rings of equal capacity, against lists of tokens."""
    library, dim, capacity, seen_back = native.load("attention"), 40, 24, 15
    library.ac_attend_space.restype = ctypes.c_int64
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(60, 2, 2, dim, generator=generator) for _ in range(2)]  # [position, b, head]
    q = torch.randn(2, 6, dim, generator=generator)
    memory = [torch.zeros(2 * 2 * capacity * dim, dtype=torch.float32) for _ in range(2)]
    extra = [torch.zeros(2 * 2 * capacity) for _ in range(4)]
    window, sink = torch.tensor([20, 7]).int(), torch.tensor([4, 17]).int()
    pointers = [t.data_ptr() for t in (*memory, *extra, window, sink)]
    c = cpu_attention.Cache(2, 6, 2, dim, capacity, key_bits, value_bits, *pointers, None)
    space = torch.zeros(library.ac_attend_space(ctypes.byref(c), ctypes.c_int64(60)))
    for length in (1, 9, 26, 60):
        for position in range(length):
            for b, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
                rows = (native.pointer(t[position].contiguous()) for t in tokens)
                library.ac_cache_append(ctypes.byref(c), *rows, *map(ctypes.c_int64, (position, b, head)))
        for limit, softcap in ((0, 0.0), (seen_back, 3.0)):
            out = torch.full((2, 6, dim), torch.nan)
            for b, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
                library.ac_attend(
                    ctypes.byref(c), native.pointer(q), native.pointer(out),
                    *map(ctypes.c_int64, (length, b, head)), ctypes.c_float(0.2), ctypes.c_float(softcap),
                    ctypes.c_int64(limit), native.pointer(space),
                )  # fmt: skip
                w, s = int(window[head]), int(sink[head])
                kept = [t for t in range(length) if t < s or length - 1 - t < w]
                kept = [t for t in kept if not limit or t >= length - limit]
                k, v = (as_stored(t[kept, b, head], bits) for t, bits in zip(tokens, (key_bits, value_bits)))
                group = slice(head * 3, head * 3 + 3)
                wanted = reference.attend(
                    q[b, group].view(1, 3, 1, dim).double(),
                    k,
                    v,
                    torch.ones(1, dtype=torch.bool),
                    0.2,
                    softcap,
                )
                error = (out[b, group] - wanted[0, :, 0]).norm() / wanted.norm()
                assert error < 1e-4, (length, limit, b, head, float(error))


def as_stored(x: Tensor, bits: int) -> Tensor:
    """Rows ``[T, dim]`` as a cache of ``bits`` holds them, ``[1, 1, T, dim]``."""
    x = x[None, None]
    if bits == 32:
        return x
    if bits == 16:
        return x.bfloat16().float()
    return reference.kv_dequantize(*reference.kv_quantize(x, bits), bits)
