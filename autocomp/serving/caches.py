"""The caches of a decode step: a ring for each attention layer."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import torch

from autocomp.attention.plan import DENSE, AttentionPlan, LayerPlan
from autocomp.attention.ring import Ring
from autocomp.kernels.cpu_attention import Cache as AcCache
from autocomp.serving.record import Unsupported


class Cache:
    """The ring of one attention layer, behind a structure whose address stays the same.

    Attributes:
        layer: the model's number of the layer.
        plan: what its groups keep.
        ring: holds keys and values. Its own count of tokens is that of its last filling: steps don't count.
        struct: what the step's operations point at.

    Raises:
        Unsupported: the plan is for other key/value heads or another sliding window.
    """

    def __init__(
        self, facts: dict[str, Any], plan: LayerPlan | None, capacity: int, dtype: torch.dtype
    ) -> None:
        groups, self.layer = int(facts["kv_heads"]), int(facts["layer"])
        self.plan = plan or LayerPlan((DENSE,) * groups)
        if len(self.plan.rules) != groups or self.plan.window not in (0, facts["window"]):
            raise Unsupported(
                f"the plan for layer {self.layer} has {len(self.plan.rules)} key/value groups and a window of"
                f" {self.plan.window}, the model {groups} and {facts['window']}"
            )
        self._make = partial(
            Ring, self.plan, heads=facts["heads"], dim=facts["dim"], batch=facts["batch"], capacity=capacity,
            dtype=dtype,
        )  # fmt: skip
        self.struct = AcCache()
        self.ring = self.renew(capacity)

    def renew(self, tokens: int) -> Ring:
        """The ring for a prompt of ``tokens``, to be filled: the present one where that changes nothing."""
        if self.struct.batch == 0 or self.ring.limits != self.plan.limits(tokens):
            self.ring = self._make(tokens=tokens)
            ctypes.pointer(self.struct)[0] = self.ring.struct
        return self.ring


def make(facts: dict[str, Any], plan: AttentionPlan | None, capacity: int, dtype: torch.dtype) -> Cache:
    """The cache for an attention call; ``plan`` ``None`` keeps everything.

    Raises:
        Unsupported: the plan doesn't know the layer, or see ``Cache``.
    """
    if plan is not None and facts["layer"] not in plan.layers:
        raise Unsupported(f"the attention plan says nothing of layer {facts['layer']}")
    return Cache(facts, None if plan is None else plan.layers[facts["layer"]], capacity, dtype)
