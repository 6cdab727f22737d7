"""The weights of a layer's experts, grouped in pools, and the layouts that pools can have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from autocomp.kernels.moe import CANONICAL, Pools, moe_grouped_linear
from autocomp.kernels.packing import pack
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

Weight = QuantizedTensor | torch.Tensor
DENSE = Scheme(16)


class Layout(Protocol):
    """How the pools of one implementation of ``moe_grouped_linear`` lie in memory."""

    name: str
    """What the operator's argument ``layout`` says."""

    device_type: str
    """``cpu`` or ``cuda``."""

    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str:
        """Why it can't hold experts of ``shape`` (N, K) in ``scheme`` (``w16``: dense) in this process;
        empty when it can."""
        ...

    def pools(self, experts: Sequence[Weight], device: torch.device) -> Pools:
        """Codes, scale and zero of one class on ``device``: experts alike in all but their numbers."""
        ...


class CanonicalLayout:
    """What every device and the reference read; see ``moe_grouped_linear``."""

    name = CANONICAL
    device_type = ""

    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str:
        del scheme, shape
        return ""

    def pools(self, experts: Sequence[Weight], device: torch.device) -> Pools:
        packed = [e for e in experts if isinstance(e, QuantizedTensor)]
        none = torch.empty(0, dtype=torch.uint8, device=device)
        if not packed:
            return torch.stack([e for e in experts if isinstance(e, torch.Tensor)]).to(device), none, none
        codes = torch.stack([pack(e.codes, e.scheme.bits) for e in packed]).to(device)
        scale = torch.stack([e.scale for e in packed]).to(device)
        zero = [e.zero for e in packed if e.zero is not None]
        return codes, scale, torch.stack(zero).to(device) if zero else none


_layouts: list[Layout] = []


@cache
def load_builtin() -> None:
    """Register our own implementations and their layouts, once. Not at the import of this module, because
    they import it."""
    from autocomp.kernels import cpu_moe

    cpu_moe.register()
    if torch.cuda.is_available():
        from autocomp.kernels.triton import moe as triton_moe

        triton_moe.register()


def register_layout(layout: Layout) -> None:
    """Make ``layout`` the first choice on its device; one of the same name is replaced."""
    _layouts[:] = [layout, *(former for former in _layouts if former.name != layout.name)]


@dataclass(frozen=True, eq=False)
class GroupedWeights:
    """The weights of all experts of one projection, in the form that ``moe_grouped_linear`` takes.

    Attributes:
        shape: ``(N, K)`` of every expert.
        remap: int32 ``[C, E]``, see ``moe_grouped_linear``; so are the tuples, one entry a class.
        layout: of the pools.
    """

    shape: tuple[int, int]
    remap: torch.Tensor
    codes: tuple[torch.Tensor, ...]
    scale: tuple[torch.Tensor, ...]
    zero: tuple[torch.Tensor, ...]
    bits: tuple[int, ...]
    group: tuple[int, ...]
    layout: str

    @classmethod
    def build(
        cls,
        weights: Sequence[Weight],
        place: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        layout: str = "",
    ) -> GroupedWeights:
        """Put experts into pools; the weights are not kept.

        Args:
            weights: ``[N, K]`` each, quantized or dense, in any mixture of schemes without outliers.
            place: for each of the router's experts the index into ``weights`` that serves it, or -1 when it
                is pruned; several may name the same (merged). Default: one each, in order.
            device: where it will run.
            layout: name of a layout; default the first of the device that takes all of the schemes.

        Raises:
            ValueError: no weights, different shapes, outliers, or a place that doesn't exist.
        """
        device = torch.device(device)
        place = range(len(weights)) if place is None else place
        shape = _common_shape(weights, place)
        classes: dict[tuple[Scheme, torch.dtype], list[int]] = {}
        for index, weight in enumerate(weights):
            classes.setdefault(_class_of(weight), []).append(index)
        chosen = _choose(layout, [scheme for scheme, _ in classes], shape, device.type)
        remap = torch.full((len(classes), len(place)), -1, dtype=torch.int32)
        pools = []
        for c, members in enumerate(classes.values()):
            for e, p in enumerate(place):
                if p in members:
                    remap[c, e] = members.index(p)
            pools.append(chosen.pools([weights[m] for m in members], device))
        codes, scale, zero = zip(*pools)
        return cls(
            shape, remap.to(device), codes, scale, zero, tuple(s.bits for s, _ in classes),
            tuple(s.group for s, _ in classes), chosen.name,
        )  # fmt: skip

    def __call__(
        self, x: torch.Tensor, expert: torch.Tensor, route_weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``moe_grouped_linear`` with these weights."""
        pools = (list(self.codes), list(self.scale), list(self.zero), list(self.bits), list(self.group))
        y: torch.Tensor = moe_grouped_linear(
            x, expert, route_weight, self.remap, *pools, self.shape[0], self.layout
        )
        return y

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(t.nbytes for t in (self.remap, *self.codes, *self.scale, *self.zero))


def _common_shape(weights: Sequence[Weight], place: Sequence[int]) -> tuple[int, int]:
    shapes = {tuple(weight.shape) for weight in weights}
    if len(shapes) != 1 or any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"the experts need one shape [N, K]; got {sorted(shapes)}")
    if wrong := [p for p in place if not -1 <= p < len(weights)]:
        raise ValueError(f"places must be -1 (pruned) to {len(weights) - 1}; got {wrong}")
    rows, columns = shapes.pop()
    return rows, columns


def _class_of(weight: Weight) -> tuple[Scheme, torch.dtype]:
    """Weights of the same class can share a pool."""
    if isinstance(weight, torch.Tensor):
        return DENSE, weight.dtype
    if weight.scheme.outliers:
        raise ValueError(f"experts can't have outliers; got {weight.scheme}: quantize without o..")
    return weight.scheme, weight.scale.dtype


def _choose(name: str, schemes: Sequence[Scheme], shape: tuple[int, int], device_type: str) -> Layout:
    load_builtin()
    reasons = []
    for layout in (*_layouts, CanonicalLayout()):
        if name not in ("", layout.name) or layout.device_type not in ("", device_type):
            continue
        reason = next(filter(None, (layout.refuses(scheme, shape) for scheme in schemes)), "")
        if not reason:
            return layout
        reasons.append(f"{layout.name}: {reason}")
    raise ValueError(f"no layout {name!r} for experts on {device_type} ({'; '.join(reasons) or 'unknown'})")
