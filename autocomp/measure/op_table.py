"""Times of single operations at decode: the rows of a latency table.

A key names everything the time depends on except the number of tokens: ``linear/576x1536/w4g64`` is a
linear layer with 576 output and 1536 input features, ``linear/64x64/w8@196`` one that reads 196 rows for each
row of the model's input (an image's tokens); ``embedding/49152x576/w8`` a look-up. Those of attention
are in ``attention_table``, those of a diffusion model's attention modules in ``image_attention_table``, those
of its convolutions in ``conv_table``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from autocomp.errors import CapabilityError
from autocomp.kernels import cpu_linear, cpu_step
from autocomp.kernels.backend import DECODE_TOKENS
from autocomp.kernels.modules import PackedEmbedding, PackedLinear
from autocomp.kernels.ops import capability, prepack, random_weight
from autocomp.measure.attention_table import (
    AttentionOperation,
    attention_backend,
    attention_key,
    parse_attention_key,
    time_attention,
)
from autocomp.measure.conv_table import ConvOperation, parse_conv_key, time_conv
from autocomp.measure.image_attention_table import (
    ImageAttentionOperation,
    parse_image_attention_key,
    time_image_attention,
)
from autocomp.measure.timing import Timing, time_calls
from autocomp.quantize.scheme import Scheme

__all__ = [
    "AttentionOperation",
    "ConvOperation",
    "ImageAttentionOperation",
    "Operation",
    "attention_backend",
    "attention_key",
    "op_key",
    "parse_op_key",
    "time_op",
]

COLD_BYTES = 64 * 2**20
"""Copies of a weight add up to this, so that each call finds its own out of the CPU's caches."""
COLD_BYTES_CUDA = 256 * 2**20
"""The same for a GPU: five times the 50 MiB L2 of an H100."""
MAX_COPIES = 256
"""Bound on the calls of one sample while decoding; small weights need many copies to be cold."""
MAX_COPIES_PREFILL = 32
"""The same for many tokens, where a call takes long and the weights' bytes matter less."""

_KEY = re.compile(r"^(linear|embedding)/(\d+)x(\d+)/([a-z0-9.]+)(?:@(\d+))?$")
Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Operation:
    """One kind of call: ``kind`` is ``linear`` or ``embedding``, ``shape`` is (N, K); ``rows`` of its input
    come from one row of the model's."""

    kind: str
    shape: tuple[int, int]
    scheme: Scheme
    rows: int = 1

    @property
    def key(self) -> str:
        rows, columns = self.shape
        return f"{self.kind}/{rows}x{columns}/{self.scheme.label}" + f"@{self.rows}" * (self.rows > 1)


def op_key(shape: tuple[int, int], scheme: Scheme, kind: str = "linear", rows: int = 1) -> str:
    """``linear/NxK/label``, with ``@rows`` where these are not 1."""
    return Operation(kind, shape, scheme, rows).key


def parse_op_key(key: str) -> Operation | AttentionOperation | ImageAttentionOperation | ConvOperation:
    """Inverse of an operation's ``key``; raises ``ValueError`` with the form when ``key`` doesn't have it."""
    if key.startswith("attention/"):
        return parse_attention_key(key)
    if key.startswith("image_attention/"):
        return parse_image_attention_key(key)
    if key.startswith("conv/"):
        return parse_conv_key(key)
    match = _KEY.match(key)
    if match is None:
        raise ValueError(f"{key!r} is not an operation key; they look like 'linear/576x1536/w4g64'")
    kind, rows, columns, label, each = match.groups()
    return Operation(kind, (int(rows), int(columns)), Scheme.parse(label), int(each or 1))


def time_op(
    key: str,
    tokens: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    *,
    repeats: int = 20,
    min_seconds: float = 0.0,
    lean: bool = False,
) -> Timing:
    """Time one call through the very modules that serve it (``F.linear``, ``F.embedding`` for ``w16``), or
    through the operations of the lean decode step.

    Weights are random and rotate through enough copies that, as in a whole model, each call reads its
    weight from memory and not from a cache. A sample is one round over all copies, divided by their number.

    Args:
        key: from ``op_key``, or of an ``AttentionOperation``, ``ImageAttentionOperation`` or
            ``ConvOperation``.
        tokens: rows of activations (M), or indices looked up, before the key's own rows; else see
            ``time_attention``, ``time_image_attention`` and ``time_conv``.
        dtype: of activations, and of the weights under ``w16``.
        device: ``cpu`` or ``cuda``.
        repeats, min_seconds: as in ``time_calls``.
        lean: on a CPU and at decode, time the C operations that the lean path runs, without Python between
            them; more tokens are the modules' business in any case.

    Raises:
        CapabilityError: the device can only simulate this linear, so it has no latency there.
        ValueError: a malformed key, or fewer than one token.
    """
    op = parse_op_key(key)
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1; got {tokens}")
    if isinstance(op, AttentionOperation):
        on_cuda = torch.device(device).type == "cuda"
        return time_attention(
            op, tokens, dtype, device, repeats=repeats, min_seconds=min_seconds,
            lean=lean and device == "cpu", cold_bytes=COLD_BYTES_CUDA if on_cuda else COLD_BYTES,
            most_copies=MAX_COPIES,
        )  # fmt: skip
    if isinstance(op, ImageAttentionOperation):
        return time_image_attention(
            op, tokens, dtype, device, repeats=repeats, min_seconds=min_seconds, cold_bytes=COLD_BYTES
        )
    if isinstance(op, ConvOperation):
        return time_conv(
            op, tokens, dtype, device, repeats=repeats, min_seconds=min_seconds, cold_bytes=COLD_BYTES
        )
    tokens *= op.rows
    found = capability(op.scheme, op.shape, torch.device(device).type)
    if op.kind == "linear" and not found.native:
        raise CapabilityError(f"{key} has no latency here: {found.reason}")
    if lean and device == "cpu" and tokens <= DECODE_TOKENS and found.backend in ("torch", "cpu"):
        weights, x = _native_weights(op, tokens, dtype)
        loop = cpu_step.repeat(weights, x, kind="linear" if op.kind == "linear" else "rows")
        return time_calls(
            loop, warmup=2, repeats=repeats, device=device, min_seconds=min_seconds, calls=len(weights)
        )
    with torch.inference_mode():
        calls = _rotating(op, tokens, dtype, torch.device(device))

        def round_trip() -> None:
            for call in calls:
                call()

        return time_calls(
            round_trip, warmup=2, repeats=repeats, device=device, min_seconds=min_seconds, calls=len(calls)
        )


def _rotating(op: Operation, tokens: int, dtype: torch.dtype, device: torch.device) -> list[Call]:
    """Equal calls, each with a weight of its own."""
    x = _input(op, tokens).to(device)
    make = _dense_calls if op.scheme.is_dense else _packed_calls
    return make(op, x.to(dtype) if x.is_floating_point() else x, _copies(op, tokens, device), dtype, device)


def _input(op: Operation, tokens: int) -> torch.Tensor:
    """Activations, float32 ``[tokens, K]``, or indices, int64 ``[tokens]``."""
    rows, columns = op.shape
    generator = torch.Generator().manual_seed(0)
    if op.kind == "linear":
        return torch.randn(tokens, columns, generator=generator)
    return torch.randint(0, rows, (tokens,), generator=generator)


def _copies(op: Operation, tokens: int, device: torch.device) -> int:
    """Weights that are needed for each call to find its own out of the caches."""
    rows, columns = op.shape
    one = 2 * rows * columns if op.scheme.is_dense else op.scheme.weight_bytes(rows, columns)
    cold = COLD_BYTES_CUDA if device.type == "cuda" else COLD_BYTES
    most = MAX_COPIES if tokens <= DECODE_TOKENS else MAX_COPIES_PREFILL
    return max(1, min(most, -(-cold // max(1, one))))


def _native_weights(
    op: Operation, tokens: int, dtype: torch.dtype
) -> tuple[list[cpu_linear.AcWeight], torch.Tensor]:
    """Copies of one weight as the C kernels read them, and an input."""
    generator = torch.Generator().manual_seed(1)
    if op.scheme.is_dense:
        dense = (torch.randn(op.shape, generator=generator) / op.shape[1] ** 0.5).to(dtype)
    else:
        state = prepack(random_weight(op.scheme, op.shape), "cpu")
    weights = []
    for _ in range(_copies(op, tokens, torch.device("cpu"))):
        if op.scheme.is_dense:
            owner: Any = dense.clone()
            weight = cpu_linear.dense_weight(owner)
        else:
            owner = replace(state, tensors={n: t.clone() for n, t in state.tensors.items()})
            weight = cpu_linear.AcWeight.from_buffer_copy(cpu_linear.native_weight(owner))
        weight.owner = owner  # the struct only points into it
        weights.append(weight)
    return weights, _input(op, tokens).float()


def _dense_calls(
    op: Operation, x: torch.Tensor, copies: int, dtype: torch.dtype, device: torch.device
) -> list[Call]:
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(op.shape, generator=generator) / op.shape[1] ** 0.5).to(device, dtype)
    run = F.linear if op.kind == "linear" else F.embedding
    return [partial(run, x, weight.clone()) for _ in range(copies)]


def _packed_calls(
    op: Operation, x: torch.Tensor, copies: int, dtype: torch.dtype, device: torch.device
) -> list[Call]:
    weight = random_weight(op.scheme, op.shape)
    module: PackedLinear | PackedEmbedding
    if op.kind == "linear":
        module = PackedLinear(weight, device=device, dtype=dtype)
    else:
        module = PackedEmbedding(weight, device=device, dtype=dtype)
    return [partial(copy.deepcopy(module), x) for _ in range(copies)]
