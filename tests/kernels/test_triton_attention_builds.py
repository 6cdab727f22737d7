"""What the compiler makes of the attention kernels for three architectures, and how they are registered."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from autocomp.kernels.attention import OPERATORS
from autocomp.kernels.triton import attention_launch
from autocomp.kernels.triton.attention_cases import SMALL, Arguments, Cases
from autocomp.kernels.triton.attention_ops import IMPLEMENTATIONS, MODULES, SUPPORTS, kernel, register
from autocomp.testing.attention import check_operator
from autocomp.testing.triton_aot import ARCHITECTURES, Build, check_build, compile_all, compile_kernel

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HIDDEN = (1, 32, 8, 256, 128)
WIDE = (1, 8, 8, 256, 256)
RINGS = ([64, 2000], [4], [1500])
LLAMA = (1, 32, 8, 128)
ALL_MODES = ([100], [0, 1, 2, 3], 77)


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(n > 0 for n in grid) and max(grid[1:]) <= 65535
        return lambda *args, **keywords: self.launches.append((args, keywords))


def launches(name: str, arguments: Arguments, capability: int) -> list[Callable[[], Build]]:
    """Builds of all that one call of an operator launches on a device of this capability."""
    module = importlib.import_module(f"autocomp.kernels.triton.{MODULES[name]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_launch, "ASSUMED", (capability, 132))
        recorders = [Recorder(f) for n, f in vars(module).items() if n.endswith("_kernel")]
        for recorder in recorders:
            patch.setattr(module, recorder.function.__name__, recorder)
        kernel(name)(*arguments)
    return [
        functools.partial(compile_kernel, recorder.function, capability, *map(_described, args), **keywords)
        for recorder in recorders
        for args, keywords in recorder.launches
    ]


def _described(argument: Any) -> Any:
    return argument.dtype if isinstance(argument, torch.Tensor) else argument


def drawn(name: str, dtype: torch.dtype, *parts: Any, **keywords: Any) -> Arguments:
    arguments: Arguments = getattr(Cases("cpu", dtype), name)(*parts, **keywords)
    return arguments


def built(calls: list[tuple[str, Arguments]], capability: int) -> list[Build]:
    return compile_all([build for name, args in calls for build in launches(name, args, capability)])


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_prefill_runs_on_the_matrix_units(capability: int) -> None:
    calls = [
        ("attention_spans", drawn("attention_spans", BF16, HIDDEN, [100, 200], [4])),
        ("attention_window_residual", drawn("attention_window_residual", BF16, HIDDEN, *ALL_MODES)),
        ("attention_block_sparse", drawn("attention_block_sparse", BF16, HIDDEN, 64, 0.5)),
    ]
    found = built(calls, capability)
    assert len(found) == 4
    for build in found:
        check_build(build, mma="best")


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_decoding_runs_on_the_matrix_units(capability: int) -> None:
    """With 16 rows, which the small instruction has on every architecture; merging needs none."""
    calls = [
        ("decode_attention_kv", drawn("decode_attention_kv", BF16, (1, 32, 8, 2048, 128), (8, 8), [200])),
        ("decode_attention_kv", drawn("decode_attention_kv", BF16, HIDDEN, (4, 4), [200])),
        ("decode_attention_cache", drawn("decode_attention_cache", BF16, LLAMA, (16, 16), *RINGS)),
        ("decode_attention_cache", drawn("decode_attention_cache", BF16, LLAMA, (8, 4), *RINGS)),
    ]
    found = built(calls, capability)
    assert sorted(b.name for b in found) == ["decode_kernel"] * 4 + ["merge_kernel"] * 3
    for build in found:
        check_build(build, mma="mma.sync" if build.name == "decode_kernel" else "none")


def test_other_widths_types_and_helpers() -> None:
    calls = [
        ("attention_spans", drawn("attention_spans", F16, (1, 4, 4, 200, 80), [100], [4])),
        ("attention_spans", drawn("attention_spans", BF16, WIDE, [100], [4])),
        ("attention_spans", drawn("attention_spans", F32, HIDDEN, [100], [4])),
        ("attention_window_residual", drawn("attention_window_residual", BF16, WIDE, *ALL_MODES)),
        ("attention_block_sparse", drawn("attention_block_sparse", F16, HIDDEN, 128, 0.5, ordered=False)),
        ("decode_attention_kv", drawn("decode_attention_kv", F16, WIDE, (8, 4), [200], 30.0, 50)),
        ("decode_attention_kv", drawn("decode_attention_kv", F32, HIDDEN, (8, 8), [200])),
        ("decode_attention_cache", drawn("decode_attention_cache", BF16, LLAMA, (16, 16), [100], [4], [200])),
        ("decode_attention_cache", drawn("decode_attention_cache", F16, LLAMA, (4, 16), *RINGS, 30.0)),
        ("kv_quantize", (torch.zeros(1, 8, 64, 128, dtype=BF16), 4)),
        ("cache_append", drawn("cache_append", BF16, (1, 8, 128), (16, 16), [7], [2], [20])),
        ("cache_append", drawn("cache_append", BF16, (1, 8, 128), (8, 4), [7], [2], [20])),
    ]
    for build in built(calls, 90):
        check_build(build)


def test_a_wide_head_fits_a_small_device() -> None:
    """Like sm_86, which has the least shared memory."""
    calls = [
        ("attention_spans", drawn("attention_spans", F16, WIDE, [100], [4])),
        ("attention_block_sparse", drawn("attention_block_sparse", F16, WIDE, 64, 0.5)),
        ("decode_attention_kv", drawn("decode_attention_kv", F16, (1, 64, 1, 128, 128), (8, 8), [100])),
    ]
    for build in built(calls, 86):
        check_build(build, mma=None if build.name == "merge_kernel" else "mma.sync")


@pytest.mark.parametrize("constant, dtype, codes", [("HALF_1024", F16, 256), ("BFLOAT_128", BF16, 16)])
def test_codes_in_the_mantissa_are_exact(constant: str, dtype: torch.dtype, codes: int) -> None:
    """What the interpreter can't tell of bfloat16."""
    from autocomp.kernels.triton import attention_decode_kernels

    base = getattr(attention_decode_kernels, constant).value
    code = torch.arange(codes, dtype=torch.int16)
    shift = torch.tensor([base], dtype=torch.int16).view(dtype).float()
    assert torch.equal((code | base).view(dtype).float(), shift + code)
    assert shift.item() == {F16: 1024.0, BF16: 128.0}[dtype]


def test_registration_costs_no_import_of_triton() -> None:
    code = "import sys, autocomp.kernels.triton.attention_ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("name", MODULES)
def test_without_a_gpu_the_reason_is_told(name: str) -> None:
    assert IMPLEMENTATIONS[name].unusable() == "no CUDA device"


@pytest.mark.parametrize("name", SMALL)
def test_types(name: str) -> None:
    for build in SMALL[name]:
        assert all(SUPPORTS[name](*build(Cases("cpu", dtype))) == "" for dtype in (BF16, F16, F32))
    assert "float64" in SUPPORTS[name](*SMALL[name][0](Cases("cpu", torch.float64)))


def test_what_is_not_supported_says_why() -> None:
    spans, sparse, kv, decode, append = (
        SUPPORTS[n]
        for n in (
            "attention_spans", "attention_block_sparse", "decode_attention_kv", "decode_attention_cache",
            "cache_append",
        )
    )  # fmt: skip
    assert "264" in spans(*drawn("attention_spans", F16, (1, 2, 2, 16, 264), [1], [0]))
    assert "136" in spans(*drawn("attention_spans", F32, (1, 2, 2, 16, 136), [1], [0]))
    assert "48" in sparse(*drawn("attention_block_sparse", F16, (1, 1, 1, 96, 16), 48, 1.0))
    assert "65 and 1" in kv(*drawn("decode_attention_kv", F16, (1, 65, 1, 9, 16), (8, 8), [9]))
    rings = drawn("decode_attention_cache", F16, (1, 65, 1, 16), (8, 16), [9], [1], [9])
    assert "65 and 1" in decode(*rings)
    assert "share one" in decode(rings[0].bfloat16(), *rings[1:])
    k, v, scale, minimum, *rest = drawn("cache_append", F16, (1, 2, 16), (8, 16), [9], [1], [9])
    apart = torch.zeros(1, 2 * minimum.shape[1])[:, ::2]
    assert "strides of its minimum" in append(k, v, scale, apart, *rest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_on_the_gpu(name: str, dtype: torch.dtype) -> None:
    assert IMPLEMENTATIONS[name].unusable() == ""
    register()
    assert check_operator(OPERATORS[name], "triton", "cuda", (dtype,)) > 0
