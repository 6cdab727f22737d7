"""A lowered decode step with memory, weights and caches: ready to run in C."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autocomp.attention.plan import AttentionPlan
from autocomp.kernels import cpu_linear, cpu_step, native
from autocomp.kernels.cpu_step import KINDS, LINE, SHARED, AcInput, AcOp, AcProgram, quantized_input
from autocomp.kernels.cpu_step import program as make_program
from autocomp.kernels.modules import PackedEmbedding, PackedLinear
from autocomp.serving.caches import Cache, make
from autocomp.serving.lower import Lowering, Place, Step
from autocomp.serving.record import Unsupported, storage


class Program:
    """Buffers, weights and caches of a decode step, and the C structures that point at them.

    Args:
        lowered: the steps.
        capacity: tokens that the caches hold.
        cache_dtype: ``float32`` or ``bfloat16``, of what is not quantized.
        plan: what the attention layers keep; ``None`` for everything.
        threads: most threads it will run on.

    Raises:
        Unsupported: a packed weight that the C kernels don't hold.
        NativeUnavailable: there are no C kernels.
    """

    def __init__(
        self, lowered: Lowering, capacity: int, cache_dtype: torch.dtype, threads: int,
        plan: AttentionPlan | None = None,
    ) -> None:  # fmt: skip
        cpu_step.library()  # says at once when there is none
        self._keep: list[Any] = []
        self._inputs: dict[tuple[int, int], AcInput] = {}
        self._weights: dict[Any, Any] = {}
        self.caches: list[Cache] = []
        steps = list(_with_quantization(_without_copies(lowered)))
        self._offsets = _plan_memory(lowered, steps)
        total = max(offset + lowered.sizes[b] for b, offset in self._offsets.items()) + LINE
        self._arena = torch.zeros(total + LINE)
        self._base = -(-self._arena.data_ptr() // (4 * LINE)) * 4 * LINE
        make_cache = partial(make, plan=plan, capacity=capacity, dtype=cache_dtype)
        ops = [self._op(step, make_cache) for step in steps]
        _synchronize(steps, ops, self._offsets)
        self._program: AcProgram = make_program(ops, [c.struct for c in self.caches], threads)
        ids, positions = (lowered.place(t) for t in (lowered.recording.ids, lowered.recording.positions))
        self.batch = lowered.recording.ids.shape[0]
        self._ids, self._positions = self._view(ids), self._view(positions)
        self.logits = self._view(lowered.logits).view(self.batch, -1)
        self.count = len(ops)

    def run(self, ids: Tensor, position: int, threads: int) -> Tensor:
        """One decode step: ``ids`` int64 ``[batch]`` at ``position``; logits float32 ``[batch, vocabulary]``,
        overwritten by the next call."""
        self._ids.copy_(ids.view_as(self._ids))
        self._positions.fill_(position)
        self._program.position = position
        cpu_step.run(self._program, threads)
        return self.logits

    @property
    def nbytes(self) -> int:
        """Bytes of buffers and caches (weights belong to the model)."""
        return self._arena.nbytes + self._program.memory.nbytes + self.cache_bytes

    @property
    def cache_bytes(self) -> int:
        return sum(cache.ring.nbytes for cache in self.caches)

    # -- addresses ----------------------------------------------------------------------------------

    def _address(self, place: Place | None) -> int | None:
        if place is None:
            return None
        if isinstance(place.buffer, Tensor):
            self._keep.append(place.buffer)
            return place.buffer.data_ptr() + 4 * place.offset
        return self._base + 4 * (self._offsets[place.buffer] + place.offset)

    def _view(self, place: Place) -> Tensor:
        assert isinstance(place.buffer, int)
        first = (self._base - self._arena.data_ptr()) // 4 + self._offsets[place.buffer] + place.offset
        return self._arena.as_strided(place.size, place.stride, first)

    def _op(self, step: Step, make_cache: Callable[[dict[str, Any]], Cache]) -> AcOp:
        op = AcOp(kind=KINDS[step.kind], shared=step.kind in SHARED, alpha=step.alpha, beta=step.beta)
        op.out, op.a, op.b, op.c = (self._address(p) for p in (step.out, step.a, step.b, step.c))
        op.pick = self._address(step.pick)
        if KINDS[step.kind] < KINDS["sum"]:
            op.size[:] = step.out.size
        if KINDS[step.kind] < KINDS["sum"] or step.kind == "matmul":
            for name, place in (("stride_out", step.out), ("stride_a", step.a), ("stride_b", step.b)):
                if place is not None:
                    getattr(op, name)[:] = place.stride
        op.n[: len(step.n)] = step.n
        if step.kind in ("quantize", "linear"):
            op.input = self._input(*step.n)
        if step.kind in ("linear", "rows"):
            op.object = self._weight(step.weight)
        if step.kind == "attend":
            cache = make_cache(step.attention)
            self.caches.append(cache)
            op.object = ctypes.addressof(cache.struct)
        return op

    def _input(self, rows: int, columns: int) -> int:
        """Address of the quantized form of ``rows`` inputs of ``columns`` features."""
        if (rows, columns) not in self._inputs:
            self._inputs[rows, columns] = quantized_input(rows, columns)
        return ctypes.addressof(self._inputs[rows, columns])

    def _weight(self, weight: Any) -> int:
        """Address of the ``ac_weight`` (of the first, for a stack of them)."""
        if isinstance(weight, torch.nn.Module):
            key: Any = id(weight)
        else:  # the same matrix may be used with and without a bias
            matrix, bias = weight
            key = (
                matrix.data_ptr(),
                matrix.shape,
                matrix.stride(),
                None if bias is None else bias.data_ptr(),
            )
        if key not in self._weights:
            self._weights[key] = (*_native_weights(weight), weight)
        return ctypes.addressof(self._weights[key][0])


def _native_weights(weight: Any) -> tuple[Any, list[Any]]:
    """An ``ac_weight``, or an array of them for experts, and what it points into."""
    if isinstance(weight, PackedLinear | PackedEmbedding):
        if weight.backend != "cpu":
            held = weight.backend
            raise Unsupported(f"a weight {weight.state.scheme} is packed for {held}, not for our C kernels")
        struct = cpu_linear.AcWeight.from_buffer_copy(cpu_linear.native_weight(weight.state))
        bias = getattr(weight, "bias", None)
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        struct.bias = native.pointer(bias)
        return struct, [weight.state, bias]
    matrix, bias = weight
    # A transposed weight (Conv1D) is copied: the kernels read rows.
    matrix = matrix.detach().contiguous()
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    if matrix.ndim == 2:
        return cpu_linear.dense_weight(matrix, bias), [matrix, bias]
    parts = [cpu_linear.dense_weight(m, None) for m in matrix]
    return (cpu_linear.AcWeight * len(parts))(*parts), [matrix]


def _without_copies(lowered: Lowering) -> list[Step]:
    """Drops copies of whole buffers that only change the dtype: their readers read the source, as long as
    neither is written again."""
    writes: dict[int, int] = defaultdict(int)
    for step in lowered.steps:
        for place in step.writes():
            if isinstance(place.buffer, int):
                writes[place.buffer] += 1
    kept_outputs = {lowered.logits.buffer}
    instead: dict[int, Place] = {}
    steps = []
    for original in lowered.steps:
        step = _redirected(original, instead)
        source, target = step.a, step.out
        if (
            step.kind == "copy" and source is not None and isinstance(target.buffer, int)
            and isinstance(source.buffer, int) and target.buffer not in kept_outputs
            and writes[target.buffer] == 1 and writes[source.buffer] <= 1
            and source.stride == target.stride and _length(target) == lowered.sizes[target.buffer]
        ):  # fmt: skip
            instead[target.buffer] = Place(source.buffer, source.offset - target.offset, (), ())
        else:
            steps.append(step)
    return steps


def _length(place: Place) -> int:
    total = 1
    for size in place.size:
        total *= size
    return total


def _redirected(step: Step, instead: dict[int, Place]) -> Step:
    def follow(place: Place | None) -> Place | None:
        if place is None or not isinstance(place.buffer, int) or place.buffer not in instead:
            return place
        target = instead[place.buffer]
        return Place(target.buffer, target.offset + place.offset, place.size, place.stride)

    return replace(step, a=follow(step.a), b=follow(step.b), c=follow(step.c), pick=follow(step.pick))


def _with_quantization(steps: Iterable[Step]) -> Iterable[Step]:
    """Before a linear, its input is quantized, unless the last quantization of that size was of the same."""
    current: dict[tuple[int, ...], Place] = {}
    for step in steps:
        if step.kind == "linear":
            assert step.a is not None
            if current.get(step.n) != step.a:
                slot = Place(_slot(step.n), 0, (), ())
                yield Step("quantize", slot, step.a, n=step.n)
                current[step.n] = step.a
            step = replace(step, b=Place(_slot(step.n), 0, (), ()))
        yield step
        written = {p.buffer for p in step.writes() if isinstance(p.buffer, int)}
        current = {n: place for n, place in current.items() if place.buffer not in written}


def _slot(n: tuple[int, ...]) -> int:
    """A stand-in buffer for the quantized inputs of a size, so that reads and writes of it are ordered."""
    return -(1 << 40) - (n[0] << 24) - n[1]


def _is_slot(buffer: Any) -> bool:
    return isinstance(buffer, int) and buffer <= -(1 << 40)


def _plan_memory(lowered: Lowering, steps: list[Step]) -> dict[int, int]:
    """Offset (floats) of every buffer; one whose last reader has run makes room for the next of its size."""
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        for place in (*step.reads(), *step.writes()):
            if isinstance(place.buffer, int):
                last[place.buffer] = i
    inputs = [storage(t) for t in (lowered.recording.ids, lowered.recording.positions)]
    last |= dict.fromkeys([*inputs, lowered.logits.buffer], len(steps))  # type: ignore[list-item]
    offsets: dict[int, int] = {}
    free: dict[int, list[int]] = defaultdict(list)
    end = 0
    ending: dict[int, list[int]] = defaultdict(list)
    for buffer, i in last.items():
        ending[i].append(buffer)
    touched: list[list[Any]] = [inputs]
    touched += [[p.buffer for p in (*step.writes(), *step.reads())] for step in steps]
    for i, buffers in enumerate(touched):
        for buffer in buffers:
            if isinstance(buffer, int) and buffer not in offsets:
                size = 0 if _is_slot(buffer) else -(-lowered.sizes[buffer] // LINE) * LINE
                if free[size] and size:
                    offsets[buffer] = free[size].pop()
                else:
                    offsets[buffer], end = end, end + size
        for buffer in ending[i - 1] if i else []:
            if not _is_slot(buffer):
                free[-(-lowered.sizes[buffer] // LINE) * LINE].append(offsets[buffer])
    lowered.sizes.update({b: 0 for b in offsets if _is_slot(b)})
    return offsets


def _synchronize(steps: list[Step], ops: list[AcOp], offsets: dict[int, int]) -> None:
    """Put a meeting of all threads before every operation that depends on one that ran on other threads."""

    def physical(places: Iterable[Place]) -> set[Any]:
        found: set[Any] = set()
        for place in places:
            if isinstance(place.buffer, int):
                found.add(place.buffer if _is_slot(place.buffer) else offsets[place.buffer])
        return found

    read: dict[bool, set[Any]] = {True: set(), False: set()}
    written: dict[bool, set[Any]] = {True: set(), False: set()}
    for step, op in zip(steps, ops):
        reads, writes = physical(step.reads()), physical(step.writes())
        # An operation of thread 0 may follow its own; everything else must wait for what it depends on.
        others = (True, False) if op.shared else (True,)
        if any(reads & written[o] or writes & (read[o] | written[o]) for o in others):
            op.sync = 1
            read, written = {True: set(), False: set()}, {True: set(), False: set()}
        read[bool(op.shared)] |= reads
        written[bool(op.shared)] |= writes
