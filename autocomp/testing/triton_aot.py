"""Checks of Triton kernels on a machine without a GPU: cross-compilation, and a run in the interpreter.

Cross-compiling gives what the GPU would run: registers, spills, shared memory, and which matrix unit the dots
go to. ``launch`` arguments are written as in a real launch, with a ``torch.dtype`` in place of each tensor::

    build = compile_kernel(my_kernel, 90, torch.float16, torch.int32, 4096, BLOCK=64, num_warps=4)
    check_build(build, mma="wgmma")

Numbers come from the interpreter, which Triton chooses when a kernel is decorated, so those tests need a
process of their own::

    INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

    @pytest.mark.skipif(INTERPRETED, reason="is the inner run")
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.skipif(not INTERPRETED, reason="runs through test_in_the_interpreter")
    def test_a_kernel() -> None: ...
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = (80, 90, 100)
MMA = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
"""The matrix instructions of an architecture, for dots whose left tile has 64 rows or more."""
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may use."""
SPILL_LIMIT = 64
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
    torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip


@dataclass(frozen=True)
class Build:
    """What the compiler made of one launch.

    Attributes:
        name: of the kernel.
        architecture: 80, 90, ...
        registers: per thread.
        spill: bytes of local memory per thread; more than a few mean that registers did not suffice.
        shared: bytes of shared memory per block.
        mma: matrix instructions in the code, out of ``mma.sync``, ``wgmma``, ``tcgen05``.
        ptx: the code.
    """

    name: str
    architecture: int
    registers: int
    spill: int
    shared: int
    mma: frozenset[str]
    ptx: str

    def __str__(self) -> str:
        mma = ", ".join(sorted(self.mma)) or "no mma"
        told = f"{self.registers} registers, {self.spill} B spilled, {self.shared} B shared, {mma}"
        return f"{self.name} on sm_{self.architecture}: {told}"


def compile_kernel(kernel: Any, architecture: int, *args: Any, **keywords: Any) -> Build:
    """Cross-compile one launch of a ``@triton.jit`` kernel.

    Args:
        kernel: the decorated function.
        architecture: compute capability times ten.
        args: as in the launch, with a ``torch.dtype`` for a tensor (taken to be aligned to 16 bytes) and
            ``None`` for an absent one. Integers are specialized as a launch would: 1, and multiples of 16.
        keywords: constexprs and the launch options (``num_warps``, ``num_stages``, ...).

    Raises:
        RuntimeError: the kernel was decorated for the interpreter.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    if not hasattr(kernel, "cache_key"):
        raise RuntimeError(f"{kernel} is interpreted; unset TRITON_INTERPRET to compile it")
    options = {"enable_fp_fusion": True} | {n: keywords.pop(n) for n in _OPTIONS if n in keywords}
    signature, constants, attributes = _specialized(kernel, args, keywords)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = build(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spill = _resources(made.asm["cubin"])
    ptx = made.asm["ptx"]
    mma = frozenset(name for name in ("mma.sync", "wgmma", "tcgen05") if f"{name}." in ptx)
    return Build(kernel.__name__, architecture, registers, spill, made.metadata.shared, mma, ptx)


def compile_all(cases: list[Callable[[], Build]]) -> list[Build]:
    """Run cases like ``functools.partial(compile_kernel, ...)`` side by side, results in their order. The
    assembler is a process of its own and the optimizer lets other threads run."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        futures = [pool.submit(case) for case in cases]
        wait(futures)
    return [_result(case, future) for case, future in zip(cases, futures)]


def _result(case: Callable[[], Build], future: Future[Build]) -> Build:
    try:
        return future.result()
    except SystemError:
        # Python 3.11 counts the depth of its parser once for all threads (python/cpython#106905).
        return case()


def check_build(
    build: Build, mma: str | None = None, spill: int = SPILL_LIMIT, shared: int | None = None
) -> None:
    """Assert that a build fits its architecture.

    Args:
        mma: the matrix instruction it must use: a name, ``"best"`` for the architecture's own (:data:`MMA`),
            ``"any"`` for one of them, ``"none"`` for no dots at all; ``None`` to leave that open.
        spill: largest accepted spill in bytes per thread.
        shared: largest accepted shared memory in bytes; the architecture's limit if ``None``.
    """
    limit = SHARED_LIMIT[build.architecture] if shared is None else shared
    assert build.shared <= limit, f"{build}: over {limit} B of shared memory; make the tiles smaller"
    assert build.spill <= spill, f"{build}: spills over {spill} B; use smaller tiles or more warps"
    wanted = MMA[build.architecture] if mma == "best" else mma
    if wanted == "none":
        assert not build.mma, f"{build}: uses matrix instructions where none are wanted"
    elif wanted == "any":
        assert build.mma, f"{build}: its dots do not use the matrix units"
    elif wanted is not None:
        assert wanted in build.mma, f"{build}: does not use {wanted}"


def run_interpreted(file: str | Path, timeout: float = 240.0) -> None:
    """Run a test file with pytest in a process where Triton interprets; raises ``AssertionError`` with its
    output when a test fails, or when none ran."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    told = f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert done.returncode == 0, told
    assert re.search(r"\b\d+ passed", done.stdout), told


def _specialized(
    kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Signature, constants and alignment of a launch, by what Triton's own launcher does."""
    names = [p.name for p in kernel.params]
    given = dict(zip(names, args)) | keywords
    given = {p.name: p.default for p in kernel.params if p.has_default} | given
    if sorted(given) != sorted(names):
        wrong = sorted(set(given) ^ set(names))
        raise TypeError(f"{kernel.__name__} takes {names}; missing or unknown: {wrong}")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        constant = parameter.is_constexpr or value is None
        if not constant and not parameter.do_not_specialize and type(value) is int and value == 1:
            constant = True
        signature[parameter.name] = "constexpr" if constant else _type(parameter, value)
        if constant:
            constants[parameter.name] = value
        elif _aligned(parameter, value):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _aligned(parameter: Any, value: Any) -> bool:
    """Whether a launch would tell the compiler that this argument is a multiple of 16."""
    if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
        return False
    return isinstance(value, torch.dtype) or (type(value) is int and value % 16 == 0)


def _type(parameter: Any, value: Any) -> str:
    if isinstance(value, torch.dtype):
        return f"*{_TYPES[value]}"
    if parameter.annotation_type:
        return str(parameter.annotation_type)
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"argument {parameter.name} must be a dtype, a number or None; got {value!r}")


@functools.cache
def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (stack frame: what was spilled) per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    registers = [int(n) for n in re.findall(r"REG:(\d+)", told)]
    stack = [int(n) for n in re.findall(r"STACK:(\d+)", told)]
    local = [int(n) for n in re.findall(r"LOCAL:(\d+)", told)]
    if not registers or not stack:
        raise RuntimeError(f"cuobjdump told nothing about registers: {told[:300]}")
    return max(registers), max(stack) + max(local, default=0)
