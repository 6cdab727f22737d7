"""The C decode step (``cpu/step.c``) seen from Python: its structures, and running a list of operations."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from autocomp.kernels import native
from autocomp.kernels.cpu_attention import Cache

_I64, _F64, _PTR = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
DIMS = 4
LINE = 16
"""Floats in a cache line."""
KINDS = {
    name: number
    for start, names in (
        (0, "copy neg abs sqrt rsqrt reciprocal square exp log sin cos tanh sigmoid silu relu gelu gelu_tanh "
            "pow scale shift clamp floor"),
        (32, "add mul div max min"),
        (48, "sum amax softmax topk layer_norm rms_norm cumsum"),
        (64, "matmul"),
        (80, "rows quantize linear attend"),
    )
    for number, name in enumerate(names.split(), start)
}  # fmt: skip
"""Names of ``enum ac_kind`` in ``cpu/step.h``, in its order."""
SHARED = ("linear", "attend")
"""Kinds that every thread takes part in; the others are the first thread's."""


class AcOp(ctypes.Structure):
    """``ac_op`` of ``cpu/step.h``, field by field."""

    _fields_ = (
        ("kind", _I64), ("sync", _I64), ("shared", _I64),
        ("size", _I64 * DIMS), ("stride_out", _I64 * DIMS),
        ("stride_a", _I64 * DIMS), ("stride_b", _I64 * DIMS),
        ("out", _PTR), ("a", _PTR), ("b", _PTR), ("c", _PTR),
        ("alpha", _F64), ("beta", _F64), ("n", _I64 * 4),
        ("object", _PTR), ("input", _PTR), ("pick", _PTR),
    )  # fmt: skip


class AcProgram(ctypes.Structure):
    """``ac_program`` of ``cpu/step.h``."""

    _fields_ = (
        ("ops", _PTR), ("count", _I64), ("position", _I64),
        ("space", _PTR), ("space_size", _I64), ("states", _PTR),
    )  # fmt: skip


class AcInput(ctypes.Structure):
    """``ac_input`` of ``cpu/linear.h``."""

    _fields_ = (
        ("rows", _I64), ("k", _I64),
        ("x", _PTR), ("q", _PTR), ("scale", _PTR), ("sums", _PTR), ("fine", _PTR),
    )  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """``cpu/step.c``, loaded.

    Raises:
        NativeUnavailable: see ``native.load``.
    """
    found = native.load("step")
    found.ac_run.argtypes = (_PTR, ctypes.c_int)
    found.ac_run.restype = None
    found.ac_op_bytes.restype = _I64
    if found.ac_op_bytes() != ctypes.sizeof(AcOp):
        raise native.NativeUnavailable("step.h and cpu_step.py disagree on the size of an operation")
    return found


def program(ops: Sequence[AcOp], caches: Sequence[Cache] = (), threads: int = 1) -> AcProgram:
    """A runnable program.

    Args:
        ops: kept with it; what they point at is the caller's to keep.
        caches: of its attention operations. Only their sizes matter here, not how many tokens they hold.
        threads: most threads that it may be run on, if it has attention operations.
    """
    array = (AcOp * len(ops))(*ops)
    made = AcProgram(ctypes.addressof(array), len(ops))
    made.keep_alive = array
    made.memory = torch.empty(0)
    if caches:
        functions = native.load("attention")
        functions.ac_attend_space.restype = functions.ac_attend_state.restype = _I64
        space = max(functions.ac_attend_space(ctypes.byref(c), _I64(0)) for c in caches) + LINE
        states = max(
            (threads + c.batch * c.kv_heads) * functions.ac_attend_state(ctypes.byref(c)) for c in caches
        )
        made.memory = torch.empty(threads * space + states)
        made.space, made.space_size = made.memory.data_ptr(), space
        made.states = made.memory.data_ptr() + 4 * threads * space
    return made


def run(made: AcProgram, threads: int) -> None:
    """Run all operations of a program once."""
    library().ac_run(ctypes.byref(made), threads)


def quantized_input(rows: int, columns: int) -> AcInput:
    """Room for ``rows`` activations of ``columns`` features in the form that packed weights take."""
    functions = native.load("linear")
    functions.ac_input_bytes.restype = _I64
    size = functions.ac_input_bytes(_I64(rows), _I64(columns))
    memory = torch.zeros(size + 64, dtype=torch.uint8)
    made = AcInput()
    place = _PTR(-(-memory.data_ptr() // 64) * 64)
    functions.ac_input_place(ctypes.byref(made), _I64(rows), _I64(columns), place)
    made.keep_alive = memory
    return made


def repeat(weights: Sequence[Any], x: torch.Tensor, kind: str = "linear") -> Callable[[], None]:
    """A call that multiplies one input with each of the weights in turn, as a decode step does: quantization
    of the input included, all threads meeting before each.

    Args:
        weights: ``AcWeight`` structures of one shape.
        x: float32 ``[M, K]`` for ``linear``; indices ``[M]`` for ``rows``.
        kind: ``linear`` or ``rows`` (embedding look-ups).
    """
    x = x.to(torch.float32).contiguous()
    shape = (len(x), weights[0].n if kind == "linear" else weights[0].k)
    out, ops = torch.empty(shape), []
    held = quantized_input(len(x), weights[0].k)
    for weight in weights:
        if kind == "linear":
            quantize = AcOp(kind=KINDS["quantize"], sync=1, a=x.data_ptr(), input=ctypes.addressof(held))
            ops.append(quantize)
        op = AcOp(kind=KINDS[kind], sync=1, shared=kind in SHARED, a=x.data_ptr(), out=out.data_ptr())
        op.object, op.input, op.n[0] = ctypes.addressof(weight), ctypes.addressof(held), len(x)
        ops.append(op)
    made = program(ops)
    made.used = (weights, x, out, held)
    return lambda: run(made, native.threads())


def repeat_attention(caches: Sequence[Cache], position: int, scale: float) -> Callable[[], None]:
    """A call that stores token number ``position`` in each of the caches in turn and attends to it, as a
    decode step does. The caches, of equal sizes, are the caller's to keep."""
    first = caches[0]
    generator = torch.Generator().manual_seed(0)
    shapes = [(first.batch, heads, first.dim) for heads in (first.heads, first.kv_heads)]
    rows = [torch.randn(shape, generator=generator) for shape in shapes]
    out, threads = torch.empty_like(rows[0]), native.threads()
    q, new = (row.data_ptr() for row in rows)
    ops = [
        AcOp(
            kind=KINDS["attend"], sync=1, shared=1, a=q, b=new, c=new, out=out.data_ptr(), alpha=scale,
            object=ctypes.addressof(cache),
        )
        for cache in caches
    ]  # fmt: skip
    made = program(ops, caches, threads)
    made.position, made.used = position, (caches, rows, out)
    return lambda: run(made, threads)
