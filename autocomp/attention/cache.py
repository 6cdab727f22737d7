"""A cache for transformers that keeps of every key/value group what a plan says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from autocomp.attention.plan import LayerPlan
from autocomp.attention.ring import Ring
from autocomp.attention.runtime import installed, prompt_attention, real_tokens
from autocomp.errors import CapabilityError

ROOM = 256
"""Tokens that dense groups have room for beyond the prompt before their ring grows."""


class SpanLayer(CacheLayerMixin):
    """One layer's ring, made when the prompt comes: its length is the N of the span rules.

    ``update`` hands the new keys on, marked with this layer; ``attend`` (called by the attention function,
    which knows the padding) stores them and attends to what is kept.
    """

    is_croppable = False

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        self.plan = plan
        self.ring: Ring | None = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        del value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        marked = key_states.view(key_states.shape)  # a tensor of our own to put the mark on
        marked.autocomp_layer = self  # type: ignore[attr-defined]
        return marked, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention of new tokens ``[B, H, Q, D]``: a prompt into an empty ring, or tokens after it."""
        if self.ring is None:
            tokens = k.shape[2]
            rows = None if mask is None else real_tokens(mask[:, -tokens:])
            if rows is not None and any(last != tokens for _, last in rows):
                raise CapabilityError("with a cache, prompts are padded on the left; set padding_side='left'")
            self.ring = Ring(
                self.plan, heads=q.shape[1], dim=q.shape[-1], batch=q.shape[0], tokens=tokens,
                capacity=tokens + ROOM, dtype=k.dtype, device=str(k.device),
            )  # fmt: skip
            self.ring.fill(k, v, None if rows is None else [first for first, _ in rows])
            return prompt_attention(q, k, v, self.plan, scale, mask)
        if mask is not None and not bool(mask[:, -k.shape[2] :].all()):
            raise CapabilityError("tokens that follow a prompt can't be padding")
        out = []
        for i in range(k.shape[2]):  # one by one: each sees what its predecessors left in the ring
            self.ring.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
            out.append(self.ring.attend(q[:, :, i : i + 1], scale))
        return torch.cat(out, dim=2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.ring, self.seen = None, 0

    def offload(self) -> None:
        raise CapabilityError("a SpanCache is not offloaded")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.ring is not None:
            self.ring.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.ring is not None:
            self.ring.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.ring is not None:
            self.ring.repeat(repeats)

    def rewind(self, tokens: int) -> None:
        """See ``SpanCache.rewind``."""
        if self.ring is not None:
            self.ring.rewind(self.seen - tokens)
        self.seen = tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the ring's tensors."""
        return 0 if self.ring is None else self.ring.nbytes


class SpanCache(Cache):
    """A cache for a model that runs by a plan; ``generate`` makes one by itself.

    Prompts of several tokens are attended to in full precision, then stored as the plan says; the spans are
    those for the (padded) prompt's length. It can't be cropped: what a window dropped is gone.

    Raises:
        CapabilityError: the model has no plan.
    """

    def __init__(self, model: Any) -> None:
        plan = installed(model)
        if plan is None:
            raise CapabilityError("this model has no attention plan; use the cache that transformers makes")
        super().__init__(layers=[SpanLayer(plan.layers[i]) for i in range(len(plan.layers))])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, scales and minima that are held now."""
        return sum(layer.nbytes for layer in self.layers)

    def rewind(self, tokens: int) -> None:
        """Count from ``tokens`` again, for timing only: what windows dropped since then is not restored."""
        for layer in self.layers:
            layer.rewind(tokens)

    def crop(self, max_length: int) -> None:
        raise CapabilityError(f"a SpanCache can't be cropped to {max_length}: what a window dropped is gone")


def new_cache(model: Any) -> SpanCache | None:
    """The cache that ``model`` needs: ours when it runs by a plan, else ``None`` (transformers' own)."""
    return None if installed(model) is None else SpanCache(model)
