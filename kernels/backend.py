"""What a kernel backend is: a way to hold one quantized weight and to multiply with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

DECODE_TOKENS = 8
"""Rows of activations up to which a linear counts as decoding: the weights' bytes set its time."""

CPU_INT4_GROUPS = (256, 128, 64, 32)
"""Group sizes of the 4-bit operators in torch (the same on CPU and CUDA), largest first."""


@dataclass(frozen=True)
class WeightState:
    """A weight in the private layout of one backend. The only copy that is kept for serving.

    Attributes:
        backend: who made it and who alone can read it.
        scheme: how the weight was quantized.
        shape: ``(N, K)``, output and input features.
        tensors: everything that stays in memory, by the backend's own names.
        meta: small integers that the backend needs beside the tensors (its group size, its tiling).
    """

    backend: Backend
    scheme: Scheme
    shape: tuple[int, int]
    tensors: Mapping[str, torch.Tensor]
    meta: Mapping[str, int] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes that this state holds on its device."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Backend(Protocol):
    """One implementation of ``linear_wna16`` (16-bit activations, weights of n bits).

    A backend keeps ONE copy of a weight and must multiply any number of rows with it; ``tokens`` in
    ``supports`` tells it what the caller cares about, so that a kernel which only pays at decode can
    say so.
    """

    name: str
    native: bool
    """Whether its time may stand for the scheme's. The reference's may not."""

    probe: tuple[Scheme, tuple[int, int]]
    """A small case that ``ops.self_check`` runs before the backend is trusted. A backend with several code
    paths has ``probes`` too, a tuple of such cases, which are run instead."""

    def supports(self, scheme: Scheme, shape: tuple[int, int], device_type: str, tokens: int) -> str:
        """Why it can't run ``scheme`` at ``shape`` on ``cpu`` or ``cuda``; empty when it can.

        Must answer without touching memory: some operators crash the process on shapes outside of
        their contract, so what isn't refused here is executed.
        """
        ...

    def prepack(self, weight: QuantizedTensor, device: torch.device) -> WeightState:
        """Bring a weight into the backend's layout on ``device``."""
        ...

    def linear(self, x: torch.Tensor, state: WeightState) -> torch.Tensor:
        """``x @ W.T``: ``x [M, K]`` contiguous, any float dtype, M >= 1; gives ``[M, N]`` in ``x.dtype``."""
        ...

    def rows(self, index: torch.Tensor, state: WeightState) -> torch.Tensor | None:
        """Dequantized rows of the weight, float32 ``[T, K]`` for int64 ``index [T]`` (an embedding look-up);
        ``None`` when the layout doesn't allow it."""
        ...
