"""Activation bits of a diffusion model's linears by range of time, installed as hooks.

A linear's input is rounded per token, dynamically, in groups of ``A8_GROUP`` features, symmetrically: with
``a`` the largest magnitude in a group, ``q = round_half_even(x * (top / a))`` and ``x' = q * (a / top)``;
``top`` is 127 for 8 bits, 31 for 6, 7 for 4 (dynamic and per token as in ViDiT-Q, arXiv 2406.02540, in finer
groups). A packed linear at 8 bits multiplies the int8 numbers themselves (``ops.linear_wna8``); everything
else is rounded and then multiplied as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autocomp.diffusion.state import SamplingState, state_of
from autocomp.errors import SpaceError
from autocomp.kernels.convolution import PackedConv2d
from autocomp.kernels.modules import PackedLinear
from autocomp.kernels.ops import A8_GROUP

BITS = (4, 6, 8, 16)
_KEY = "_autocomp_activations"


@dataclass(frozen=True)
class ActivationPlan:
    """Path of a linear -> its activation bits in each range of time, the noisiest first.

    All linears have equally many ranges, of equal length: with R of them, range r is times in
    ``(1 - (r + 1) / R, 1 - r / R]``. Linears that are not named have 16 bits.
    """

    bits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = sorted({b for row in self.bits.values() for b in row} - set(BITS))
        if wrong:
            raise SpaceError(f"activations have {BITS} bits; got {wrong}")
        if len({len(row) for row in self.bits.values()} - {0}) > 1 or not all(self.bits.values()):
            raise SpaceError("every linear of an activation plan needs equally many ranges, one or more")

    @property
    def ranges(self) -> int:
        return len(next(iter(self.bits.values()), (16,)))

    @property
    def plain(self) -> bool:
        """Whether it changes nothing."""
        return all(b == 16 for row in self.bits.values() for b in row)

    def range_of(self, time: float) -> int:
        """The range that ``time`` in (0, 1] lies in."""
        return time_range(time, self.ranges)

    def to_json(self) -> dict[str, Any]:
        return {"bits": {path: list(row) for path, row in self.bits.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ActivationPlan:
        """Raises ``SpaceError`` for anything that ``to_json`` does not give."""
        try:
            return cls({str(path): tuple(int(b) for b in row) for path, row in data["bits"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpaceError(f"this is no activation plan ({error}): {data!r:.200}") from None


def time_range(time: float, ranges: int) -> int:
    """Which of ``ranges`` equal parts of (0, 1], the noisiest first, ``time`` lies in."""
    return min(ranges - 1, max(0, int((1.0 - time) * ranges + 1e-9)))


def round_activations(x: torch.Tensor, bits: int) -> torch.Tensor:
    """``x [..., K]`` of any float dtype as ``bits``-bit numbers (see the module); 16 gives ``x`` itself.

    A group with a NaN or an infinity becomes NaN.
    """
    if bits == 16:
        return x
    features, top = x.shape[-1], float((1 << (bits - 1)) - 1)
    grouped = nn.functional.pad(x.float(), (0, -features % A8_GROUP)).unflatten(-1, (-1, A8_GROUP))
    peak = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    rounded = (grouped * (top / peak)).round() * (peak * (1.0 / top))
    return rounded.flatten(-2)[..., :features].to(x.dtype)


def multiplies_int8(module: nn.Module) -> bool:
    """Whether a module multiplies 8-bit activations by a kernel of its own."""
    return isinstance(module, PackedLinear) and hasattr(module.state.backend, "linear_a8")


class _Runtime:
    """The hooks of one model. Bits change where a model call finds itself in another range."""

    def __init__(self, model: nn.Module, plan: ActivationPlan) -> None:
        self.plan = plan
        self.state: SamplingState = state_of(model)
        self.range = -1
        self.kernels: list[tuple[PackedLinear, tuple[int, ...]]] = []
        self.handles = [model.register_forward_pre_hook(self._enter)]
        for path, row in plan.bits.items():
            module = model.get_submodule(path)
            if isinstance(module, PackedLinear) and multiplies_int8(module):
                self.kernels.append((module, row))
                row = tuple(16 if b == 8 else b for b in row)
            if any(b < 16 for b in row):
                self.handles.append(module.register_forward_pre_hook(self._rounding(row)))

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module, args
        now = self.plan.range_of(self.state.time)
        if now == self.range:
            return
        self.range = now
        for linear, row in self.kernels:
            linear.activation_bits = 8 if row[now] == 8 else 16

    def _rounding(self, row: tuple[int, ...]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            del module
            return (round_activations(args[0], row[self.range]), *args[1:])

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for linear, _ in self.kernels:
            linear.activation_bits = 16


def install(model: nn.Module, plan: ActivationPlan) -> None:
    """Make ``model`` follow ``plan`` (in place of an earlier one), by the modules that it has now: install
    again after linears were replaced.

    Raises:
        SpaceError: the plan names a module that the model lacks, or a convolution; the model then has no
            plan.
    """
    remove(model)
    if plan.plain:
        return
    modules = dict(model.named_modules())
    unknown = sorted(set(plan.bits) - set(modules))
    if unknown:
        raise SpaceError(f"the activation plan names modules that the model lacks: {unknown[:3]}")
    convolutions = [p for p in plan.bits if isinstance(modules[p], nn.Conv2d | PackedConv2d)]
    if convolutions:
        raise SpaceError(
            f"inputs of convolutions are not rounded, and the activation plan names {convolutions[:3]}; name"
            " linears"
        )
    model.__dict__[_KEY] = _Runtime(model, plan)


def remove(model: nn.Module) -> None:
    """Take the plan away; nothing happens where there is none."""
    runtime = model.__dict__.pop(_KEY, None)
    if runtime is not None:
        runtime.remove()


def installed(model: nn.Module) -> ActivationPlan | None:
    """The plan that ``model`` follows."""
    runtime = model.__dict__.get(_KEY)
    return None if runtime is None else runtime.plan
