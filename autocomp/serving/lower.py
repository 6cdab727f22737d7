"""From recorded ATen operations to the operations of the C step (``kernels/cpu/step.h``).

Everything is float32 there (token ids and positions too, exact up to 2**24), so changes of dtype are copies.
A tensor is where its storage, offset and strides say; a view needs no operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autocomp.serving.record import Note, Recording, Unsupported, storage

DIMS = 4
CONSTANT_LIMIT = 1 << 22
"""Elements of a constant that may be copied as float32; larger ones are weights, with a kind of their own."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: buffer, first element, sizes and strides in elements.

    ``buffer`` is the address of the storage that was recorded (dynamic), or a ``Tensor`` (constant, float32).
    """

    buffer: int | Tensor
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.size), reversed(self.stride)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass
class Step:
    """One operation of the C step, still with places instead of addresses.

    Attributes:
        kind: a key of ``KINDS``.
        out: what it writes. ``also``: a second result (positions of the largest).
        a, b, c: what it reads.
        alpha, beta, n: numbers, see ``step.c``.
        weight: for ``linear`` and ``rows``: a module with packed weights, or ``(weight [N, K] or [E, N, K],
            bias or None)``.
        pick: index of the weight in the first dimension.
        attention: facts of an attention call.
    """

    kind: str
    out: Place
    a: Place | None = None
    b: Place | None = None
    c: Place | None = None
    alpha: float = 1.0
    beta: float = 0.0
    n: tuple[int, ...] = ()
    weight: Any = None
    pick: Place | None = None
    attention: dict[str, Any] = field(default_factory=dict)

    def reads(self) -> Iterator[Place]:
        yield from (p for p in (self.a, self.b, self.c, self.pick) if p is not None and p is not self._also)

    def writes(self) -> Iterator[Place]:
        yield self.out
        if self._also is not None:
            yield self._also

    @property
    def _also(self) -> Place | None:
        return self.b if self.kind == "topk" else None


Rule = Callable[["Lowering", Note], None]


class Lowering:
    """Turns the notes of a recording into steps, by one rule for each operation (``rules.RULES``).

    Attributes:
        steps: in order.
        sizes: elements of each dynamic buffer.
        logits: where the result lies.

    Raises:
        Unsupported: an operation without a rule, or one that its rule refuses.
    """

    def __init__(self, recording: Recording, rules: Mapping[str, Rule]) -> None:
        self.recording = recording
        self.steps: list[Step] = []
        self.sizes: dict[int, int] = {}
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        self._next = -1
        for tensor in (recording.ids, recording.positions):
            self.place(tensor)
        for note in recording.notes:
            rule = rules.get(note.name)
            if rule is None:
                raise Unsupported(f"operation {note.name} is not known to the lean path")
            rule(self, note)
        self.logits = self.dense(self.place(recording.logits))

    def place(self, tensor: Tensor) -> Place:
        """Where ``tensor`` lies; a constant is copied as float32."""
        key = storage(tensor)
        if key not in self.recording.dynamic:
            return self._constant(tensor)
        self.sizes.setdefault(key, tensor.untyped_storage().nbytes() // tensor.element_size())
        return Place(key, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))

    def _constant(self, tensor: Tensor) -> Place:
        key = (
            storage(tensor),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tensor.dtype,
        )
        if key not in self._constants:
            if tensor.numel() > CONSTANT_LIMIT:
                raise Unsupported(
                    f"a constant of shape {tuple(tensor.shape)} is used outside of a linear layer"
                )
            self._constants[key] = tensor.detach().to(torch.float32).contiguous().clone()
        found = self._constants[key]
        return Place(found, 0, tuple(found.shape), tuple(found.stride()))

    def fresh(self, size: Sequence[int]) -> Place:
        """A new contiguous buffer."""
        key, self._next = self._next, self._next - 1
        strides = [1]
        for length in reversed(size[1:]):
            strides.insert(0, strides[0] * length)
        self.sizes[key] = strides[0] * size[0] if size else 1
        return Place(key, 0, tuple(size), tuple(strides) if size else ())

    def dense(self, place: Place) -> Place:
        """The same values in one contiguous run, copied if they aren't."""
        if place.contiguous:
            return place
        copy = self.fresh(place.size)
        self.elementwise("copy", copy, place)
        return copy

    def add(self, step: Step) -> None:
        self.steps.append(step)

    def elementwise(self, kind: str, out: Place, a: Place, b: Place | None = None, **numbers: float) -> None:
        """``out = kind(a, b)``, operands broadcast to ``out``."""
        operands = [out, broadcast(a, out.size)]
        if b is not None:
            operands.append(broadcast(b, out.size))
        merged = merge(operands)
        self.add(Step(kind, *merged, **numbers))  # type: ignore[arg-type]

    def through_dense(self, out: Place, write: Callable[[Place], None]) -> None:
        """``write`` into ``out``, by way of a contiguous buffer when it is none."""
        if out.contiguous:
            write(out)
            return
        dense = self.fresh(out.size)
        write(dense)
        self.elementwise("copy", out, dense)


def broadcast(place: Place, size: tuple[int, ...]) -> Place:
    """``place`` seen with ``size`` (numpy's rules): stride 0 where it repeats."""
    missing = len(size) - len(place.size)
    stride = [0] * missing
    for have, step, want in zip(place.size, place.stride, size[missing:]):
        if have not in (1, want):
            raise Unsupported(f"can't broadcast {place.size} to {size}")
        stride.append(step if have == want and have != 1 else 0)
    return Place(place.buffer, place.offset, size, tuple(stride))


def merge(places: Sequence[Place]) -> list[Place]:
    """The same elementwise loop with as few dimensions as possible, padded to ``DIMS`` with leading ones."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in places]
    for d, size in enumerate(places[0].size):
        steps = [p.stride[d] for p in places]
        if size == 1:
            continue
        if sizes and all(s[-1] == step * size for s, step in zip(strides, steps)):
            sizes[-1] *= size
            for s, step in zip(strides, steps):
                s[-1] = step
        else:
            sizes.append(size)
            for s, step in zip(strides, steps):
                s.append(step)
    if len(sizes) > DIMS:
        raise Unsupported(f"an operation over {len(sizes)} dimensions")
    pad = DIMS - len(sizes)
    return [
        Place(p.buffer, p.offset, (1,) * pad + tuple(sizes), (0,) * pad + tuple(s))
        for p, s in zip(places, strides)
    ]
