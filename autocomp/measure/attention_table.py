"""Times of attention for one key/value group: the rows of a latency table that attention decisions need.

The key ``attention/3x64/a512b0s16/k8v4@4096`` is a group of 3 query heads of 64 features that keeps what the
label says, in a cache that has seen 4096 tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from autocomp.attention.plan import Keep, LayerPlan
from autocomp.attention.ring import Ring
from autocomp.kernels import cpu_step, native
from autocomp.kernels.attention import OPERATORS
from autocomp.measure.timing import Timing, time_calls

MOST_SEQUENCES = 64
"""Up to this many tokens are the batch of a decode step, more are a prompt."""
_KEY = re.compile(r"^attention/(\d+)x(\d+)/([^@]+)@(\d+)$")
_ROOM = 8


@dataclass(frozen=True)
class AttentionOperation:
    """Attention of one key/value group.

    Attributes:
        heads: query heads of the group; dim: of a head.
        keep: its span rule and bits.
        context: tokens in the cache, and N of the rule, at decode.
    """

    heads: int
    dim: int
    keep: Keep
    context: int

    @property
    def key(self) -> str:
        return f"attention/{self.heads}x{self.dim}/{self.keep.label}@{self.context}"


def parse_attention_key(key: str) -> AttentionOperation:
    """Inverse of ``AttentionOperation.key``.

    Raises:
        ValueError: it doesn't have the form, which the message gives.
        SpaceError: the label is none.
    """
    match = _KEY.match(key)
    if match is None or min(int(match[i]) for i in (1, 2, 4)) < 1:
        raise ValueError(
            f"{key!r} is not an operation key; of attention they look like 'attention/3x64/dense/k8v8@4096'"
        )
    return AttentionOperation(int(match[1]), int(match[2]), Keep.parse(match[3]), int(match[4]))


def attention_key(heads: int, dim: int, keep: Keep, context: int) -> str:
    """``attention/{heads}x{dim}/{keep}@{context}``; see ``AttentionOperation``."""
    return AttentionOperation(heads, dim, keep, context).key


def attention_backend(keep: Keep, device: str, dim: int = 64) -> tuple[str, str]:
    """What executes decode attention over a cache of these bits, and why nothing does.

    Returns:
        ``cpu`` (our C), ``triton`` or ``reference`` (plain torch), and a reason: empty unless quantized keys
        or values would have to be expanded before use.
    """
    backend = _backend(device, dim, keep.key_bits, keep.value_bits)
    quantized = min(keep.key_bits, keep.value_bits) < 16
    label = f"k{keep.key_bits}v{keep.value_bits}"
    reason = f"no kernel here reads a cache of {label} with heads of {dim} features on {device}; use k16v16"
    return backend, reason if quantized and backend == "reference" else ""


@functools.cache
def _backend(device: str, dim: int, key_bits: int, value_bits: int) -> str:
    op = AttentionOperation(1, dim, Keep(key_bits=key_bits, value_bits=value_bits), 1)
    return _ring(op, 1, torch.bfloat16, device).backend


def time_attention(
    op: AttentionOperation, tokens: int, dtype: torch.dtype, device: str, *, repeats: int,
    min_seconds: float, lean: bool, cold_bytes: int, most_copies: int,
) -> Timing:  # fmt: skip
    """Time one call: at decode (``tokens`` sequences) storing a token in a ring and attending to it; for a
    prompt (more than ``MOST_SEQUENCES`` tokens, one sequence, N of the rule) attention within the span and
    filling the ring.

    Args:
        lean: at decode, the C operations of the lean path (where there are any), without Python between them.
        cold_bytes, most_copies: calls rotate through so many rings that each finds its own out of the caches.

    The others are those of ``op_table.time_op``.
    """
    with torch.inference_mode():
        if tokens > MOST_SEQUENCES:
            calls = [_prompt(op, tokens, dtype, device)]
        else:
            lean = lean and not native.unavailable("step")
            if lean and dtype != torch.float32:
                dtype = torch.bfloat16  # as the lean path keeps float16, too
            rings = _rings(op, tokens, dtype, device, cold_bytes, most_copies)
            if lean:
                return time_calls(
                    _lean(rings, op), warmup=2, repeats=repeats, device=device, min_seconds=min_seconds,
                    calls=len(rings),
                )  # fmt: skip
            calls = [_step(ring, op, dtype) for ring in rings]

        def round_trip() -> None:
            for call in calls:
                call()

        return time_calls(
            round_trip, warmup=2, repeats=repeats, device=device, min_seconds=min_seconds, calls=len(calls)
        )


def _ring(op: AttentionOperation, batch: int, dtype: torch.dtype, device: str) -> Ring:
    plan = LayerPlan((op.keep.rule,), op.keep.key_bits, op.keep.value_bits)
    return Ring(
        plan, heads=op.heads, dim=op.dim, batch=batch, tokens=op.context, capacity=op.context + _ROOM,
        dtype=dtype, device=device,
    )  # fmt: skip


def _rings(
    op: AttentionOperation, batch: int, dtype: torch.dtype, device: str, cold_bytes: int, most: int
) -> list[Ring]:
    """Copies of one full ring."""
    first = _ring(op, batch, dtype, device)
    shape = (batch, 1, op.context, op.dim)
    rows = torch.randn(shape, generator=_seeded()).to(device, dtype)
    first.fill(rows, rows)
    rings = [first]
    while len(rings) < min(most, -(-cold_bytes // first.nbytes)):
        rings.append(_ring(op, batch, dtype, device))
        rings[-1].copy_from(first)
    return rings


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _lean(rings: list[Ring], op: AttentionOperation) -> Callable[[], None]:
    structs = [ring.struct for ring in rings]
    call = cpu_step.repeat_attention(structs, op.context, op.dim**-0.5)
    call.keep_alive = rings  # type: ignore[attr-defined]
    return call


def _step(ring: Ring, op: AttentionOperation, dtype: torch.dtype) -> Callable[[], None]:
    q = torch.randn(ring.batch, op.heads, 1, op.dim, generator=_seeded()).to(ring.device, dtype)
    new = q[:, :1, 0].contiguous().unsqueeze(1)

    def call() -> None:
        ring.append(new, new)
        ring.attend(q, op.dim**-0.5)
        ring.rewind(1)

    return call


def _prompt(op: AttentionOperation, tokens: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    prompt = AttentionOperation(op.heads, op.dim, op.keep, tokens)
    ring = _ring(prompt, 1, dtype, device)
    q = torch.randn(1, op.heads, tokens, op.dim, generator=_seeded()).to(device, dtype)
    k = v = q[:, :1].contiguous()
    window, sink = (
        torch.full((op.heads,), n, dtype=torch.int32, device=device)
        for n in (ring.limits[0][0] or tokens, ring.limits[0][1])
    )

    def call() -> None:
        ring.fill(k, v)
        OPERATORS["attention_spans"](q, k, v, window, sink, op.dim**-0.5)

    return call
