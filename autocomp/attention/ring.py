"""One attention layer's cache that keeps of every key/value group what its span rule says, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autocomp.attention.plan import LayerPlan
from autocomp.errors import CapabilityError
from autocomp.kernels.attention import OPERATORS
from autocomp.kernels.attention_reference import kv_dequantize
from autocomp.kernels.cpu_attention import Cache as AcCache

GROWTH = 256
"""Least number of tokens that groups which are full and keep more get room for."""
_STORED = ("k", "v", "k_scale", "k_min", "v_scale", "v_min")


class Ring:
    """Keys and values of one layer: a ring of its own for every group, quantized when the plan says so.

    Group g owns slots ``head_start[g]`` to ``head_start[g + 1]``; token t of a sequence lies in its slot
    ``t if t < sink[g] else sink[g] + (t - sink[g]) % window[g]`` (``kernels/cpu/attention.h``). What a group
    has dropped is gone. A group with room for fewer tokens than it keeps grows when it is full.

    Args:
        plan: rules and bits; the layer's own sliding window is a ring of that window without a sink.
        heads: query heads; dim: of a head; batch: sequences.
        tokens: length of the prompt: N of the span rules.
        capacity: tokens that a group has room for at first (fewer when it keeps fewer).
        dtype: of what is not quantized.

    Attributes:
        k, v: ``[batch, slots, dim]`` in ``dtype``, or codes uint8 ``[batch, slots, dim * bits / 8]``.
        k_scale, k_min, v_scale, v_min: float32 ``[batch, slots]``, ``None`` when not quantized.
        head_start: int64 ``[groups + 1]``; window, sink: int32 ``[groups]``.
        key_bits, value_bits: as the kernels take them: 32 or 16 (``dtype``), 8, 4.
        lengths: tokens that each sequence has seen.

    Raises:
        ValueError: heads that don't share the groups evenly, or an odd dim with 4 bits.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    k_min: Tensor | None
    v_scale: Tensor | None
    v_min: Tensor | None

    def __init__(
        self, plan: LayerPlan, *, heads: int, dim: int, batch: int, tokens: int, capacity: int,
        dtype: torch.dtype, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        if heads % len(plan.rules):
            raise ValueError(f"{heads} query heads can't share {len(plan.rules)} key/value groups evenly")
        if dim % 2 and 4 in (plan.key_bits, plan.value_bits):
            raise ValueError(f"4-bit codes lie two in a byte: dim must be even, not {dim}; use 8 bits")
        self.plan, self.heads, self.dim, self.tokens = plan, heads, dim, tokens
        self.dtype, self.device = dtype, torch.device(device)
        self.key_bits, self.value_bits = (
            8 * dtype.itemsize if bits == 16 else bits for bits in (plan.key_bits, plan.value_bits)
        )
        #: ``(window, sink)`` of each group; window 0: it keeps everything.
        self.limits = plan.limits(tokens)
        self._allocate(batch, max(1, capacity))
        self._set_lengths([0] * batch)

    @property
    def batch(self) -> int:
        return int(self.k.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (*self._stored().values(), self.head_start, self.window, self.sink))

    @property
    def struct(self) -> AcCache:
        """``ac_cache`` over the present tensors, which must outlive it; growing makes others.

        Raises:
            CapabilityError: not on the CPU, or a dtype that C doesn't read.
        """
        if self.device.type != "cpu" or self.dtype not in (torch.float32, torch.bfloat16):
            raise CapabilityError(
                f"C reads caches of float32 or bfloat16 on the CPU, not {self.dtype} on {self.device}"
            )
        sizes = (self.batch, self.heads, len(self.limits), self.dim, 0, self.key_bits, self.value_bits)
        stored = (None if t is None else t.data_ptr() for t in (getattr(self, n) for n in _STORED))
        rings = (t.data_ptr() for t in (self.window, self.sink, self.head_start))
        return AcCache(*sizes, *stored, *rings)

    @property
    def backend(self) -> str:
        """What executes ``attend``: ``cpu`` (our C), ``triton`` or ``reference``."""
        q = torch.empty(self.batch, self.heads, 1, self.dim, dtype=self.dtype, device=self.device)
        return OPERATORS["decode_attention_cache"].choose(*self._attend_arguments(q, 1.0, 0.0))

    @torch.no_grad()
    def fill(self, k: Tensor, v: Tensor, starts: Sequence[int] | None = None, *, first: int = 0) -> None:
        """Replace the contents by a prompt's.

        Args:
            k, v: ``[batch, groups, S, dim]``, any float dtype.
            starts: left padding of each sequence, which is not stored.
            first: number of the first token given, where earlier ones were dropped by a sliding window.
        """
        self._set_lengths([first] * self.batch)
        self._extend(k, v, starts or [0] * self.batch)

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> None:
        """Store the tokens that come next: ``[batch, groups, dim]``, or ``[batch, groups, n, dim]``."""
        if k.ndim == 4 and k.shape[2] != 1:
            self._extend(k, v, [0] * self.batch)
            return
        self._make_room(max(self.lengths) + 1)
        shape = (self.batch, len(self.limits), self.dim)
        OPERATORS["cache_append"](
            *self._stored_or_none(), k.reshape(shape), v.reshape(shape),
            self.head_start, self.window, self.sink, self._seen, self.key_bits, self.value_bits,
        )  # fmt: skip
        self._set_lengths([n + 1 for n in self.lengths])

    def attend(self, q: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
        """Attention of each sequence's last token, ``q [batch, heads, 1, dim]``, over what is kept."""
        out: Tensor = OPERATORS["decode_attention_cache"](*self._attend_arguments(q, scale, softcap))
        return out

    def _attend_arguments(self, q: Tensor, scale: float, softcap: float) -> tuple[Any, ...]:
        rings = (self.head_start, self.window, self.sink, self._seen)
        return (q, *self._stored_or_none(), *rings, self.key_bits, self.value_bits, scale, softcap)

    def kept(self, b: int, g: int) -> tuple[Tensor, Tensor, Tensor]:
        """What group ``g`` of sequence ``b`` keeps, in the order of positions: positions int64 ``[n]``, keys
        and values float32 ``[n, dim]``."""
        runs = self._runs(g, self.lengths[b])
        base = int(self._starts[g])
        tokens = [torch.arange(t, t + n, device=self.device) for t, _, n in runs]
        slots = [torch.arange(base + s, base + s + n, device=self.device) for _, s, n in runs]
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        at = torch.cat([none, *slots])
        keys = _wide(self.k[b, at], self.k_scale, self.k_min, self.key_bits, b, at)
        values = _wide(self.v[b, at], self.v_scale, self.v_min, self.value_bits, b, at)
        return torch.cat([none, *tokens]), keys, values

    @torch.no_grad()
    def copy_from(self, other: Ring) -> None:
        """Take over the contents of a ring of the same limits and bits, whatever its capacity.

        Raises:
            ValueError: it differs in more than its capacity.
        """
        mine = (self.limits, self.plan.key_bits, self.plan.value_bits, self.batch, self.dim)
        theirs = (other.limits, other.plan.key_bits, other.plan.value_bits, other.batch, other.dim)
        if mine != theirs:
            raise ValueError(f"can't take over a ring of {theirs}; this one is of {mine}")
        self._make_room(max(other.lengths))
        self._copy_rows(other._stored(), other._starts)
        self._set_lengths(list(other.lengths))

    def rewind(self, tokens: int) -> None:
        """Count ``tokens`` fewer, for timing only: what a group dropped for them is not restored."""
        self._set_lengths([n - tokens for n in self.lengths])

    def select(self, index: Tensor) -> None:
        """Make the sequences those numbered in ``index``, int64 ``[n]`` (beam search)."""
        index = index.to(self.device)
        with torch.inference_mode(False):
            for name, tensor in self._stored().items():
                setattr(self, name, tensor.index_select(0, index))
        self._set_lengths([self.lengths[i] for i in index.tolist()])

    def repeat(self, n: int) -> None:
        """Make ``n`` copies of each sequence, one after another."""
        self.select(torch.arange(self.batch).repeat_interleave(n))

    def drops(self, length: int) -> bool:
        """Whether some group has dropped something of a sequence of ``length`` tokens."""
        return any(window and length > window + sink for window, sink in self.limits)

    # -- memory -----------------------------------------------------------------------------------

    @torch.inference_mode(False)  # tensors made in inference mode couldn't be written to outside of it
    def _allocate(self, batch: int, capacity: int) -> None:
        slots = [min(w + s, capacity) if w else capacity for w, s in self.limits]
        sinks = [min(sink, n) for (_, sink), n in zip(self.limits, slots)]
        windows = [n - sink for n, sink in zip(slots, sinks)]
        self._starts = [sum(slots[:g]) for g in range(len(slots) + 1)]
        self.head_start = torch.tensor(self._starts, dtype=torch.int64, device=self.device)
        self.window = torch.tensor(windows, dtype=torch.int32, device=self.device)
        self.sink = torch.tensor(sinks, dtype=torch.int32, device=self.device)
        for name, bits in (("k", self.plan.key_bits), ("v", self.plan.value_bits)):
            width, dtype = (self.dim, self.dtype) if bits == 16 else (self.dim * bits // 8, torch.uint8)
            shape = (batch, self._starts[-1])
            setattr(self, name, torch.zeros(*shape, width, dtype=dtype, device=self.device))
            for extra in ("scale", "min"):
                made = None if bits == 16 else torch.zeros(shape, device=self.device)
                setattr(self, f"{name}_{extra}", made)

    def _stored_or_none(self) -> list[Tensor | None]:
        return [getattr(self, name) for name in _STORED]

    def _stored(self) -> dict[str, Tensor]:
        return {name: t for name, t in zip(_STORED, self._stored_or_none()) if t is not None}

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self._seen = torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def _make_room(self, length: int) -> None:
        """Grow when a group is too small for what it keeps of ``length`` tokens."""
        slots = [b - a for a, b in zip(self._starts, self._starts[1:])]
        wanted = [min(w + s, length) if w else length for w, s in self.limits]
        if all(have >= want for have, want in zip(slots, wanted)):
            return
        former, starts = self._stored(), self._starts
        self._allocate(self.batch, max(length, max(slots) + max(GROWTH, max(slots) // 4)))
        self._copy_rows(former, starts)

    def _copy_rows(self, former: dict[str, Tensor], starts: list[int]) -> None:
        """A group that has not dropped anything has token t in slot t whatever its size; one that has is as
        large as it gets. So the first slots move to the first slots."""
        for name, target in self._stored().items():
            for g in range(len(self.limits)):
                old, new = starts[g], self._starts[g]
                n = min(starts[g + 1] - old, self._starts[g + 1] - new)
                target[:, new : new + n].copy_(former[name][:, old : old + n])

    # -- tokens -----------------------------------------------------------------------------------

    def _runs(self, g: int, length: int, first: int = 0) -> list[tuple[int, int, int]]:
        """Tokens from ``first`` on that group ``g`` keeps of ``length``: runs ``(token, slot, count)`` of
        successive slots, in the order of tokens."""
        slots = self._starts[g + 1] - self._starts[g]
        sink = min(self.limits[g][1], slots)
        window = slots - sink
        runs = [(first, first, min(sink, length) - first)]
        token = max(sink, length - window, first)
        while token < length:
            slot = (token - sink) % window
            count = min(length - token, window - slot)
            runs.append((token, sink + slot, count))
            token += count
        return [run for run in runs if run[2] > 0]

    def _extend(self, k: Tensor, v: Tensor, starts: Sequence[int]) -> None:
        size = k.shape[2]
        ends = [n + size - start for n, start in zip(self.lengths, starts)]
        self._make_room(max(ends))
        alike = len(set(starts)) == len(set(self.lengths)) == 1
        for b in [0] if alike else range(self.batch):
            rows = slice(None) if alike else slice(b, b + 1)
            shift = starts[b] - self.lengths[b]
            for g in range(len(self.limits)):
                for token, slot, count in self._runs(g, ends[b], self.lengths[b]):
                    columns = slice(token + shift, token + shift + count)
                    self._write("k", self.plan.key_bits, rows, self._starts[g] + slot, k[rows, g, columns])
                    self._write("v", self.plan.value_bits, rows, self._starts[g] + slot, v[rows, g, columns])
        self._set_lengths(ends)

    def _write(self, name: str, bits: int, rows: slice, slot: int, x: Tensor) -> None:
        """``x [b, n, dim]`` to the slots from ``slot`` on."""
        at = slice(slot, slot + x.shape[1])
        if bits == 16:
            getattr(self, name)[rows, at] = x
            return
        parts = OPERATORS["kv_quantize"](x.unsqueeze(1), bits)
        for field, part in zip((name, f"{name}_scale", f"{name}_min"), parts):
            getattr(self, field)[rows, at] = part.squeeze(1)


def _wide(rows: Tensor, scale: Tensor | None, low: Tensor | None, bits: int, b: int, at: Tensor) -> Tensor:
    if scale is None or low is None:
        return rows.float()
    return kv_dequantize(rows, scale[b, at], low[b, at], bits)
