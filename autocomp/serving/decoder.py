"""Decoding a language model on the CPU with one call into C per token."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor

from autocomp.attention.cache import new_cache
from autocomp.attention.plan import AttentionPlan
from autocomp.attention.ring import Ring
from autocomp.attention.runtime import installed
from autocomp.kernels import native
from autocomp.serving.caches import Cache
from autocomp.serving.lower import Lowering
from autocomp.serving.program import Program
from autocomp.serving.record import Unsupported, record
from autocomp.serving.rules import RULES
from autocomp.serving.verify import verify as compare


class LeanDecoder:
    """Rings of keys and values, float32 activations, one call into C per token.

    Prompts go through the model itself (large products are torch's business); then the recorded decode step
    takes over. The weights are the model's own, packed or not: nothing is copied but small constants.

    Args:
        model: a causal language model of transformers on the CPU in evaluation mode, with or without packed
            modules.
        batch: sequences decoded at once; all of them have the same length.
        capacity: tokens that the caches hold, prompt included; by default what the model was made for, at
            most 4096.
        threads: CPU threads; 0 for torch's number.
        verify: compare with the model on a few tokens, in float32 and without a plan, before it is trusted.
        plan: what the attention layers keep; by default the plan that the model runs by. The N of its rules
            is the prompt's length (the capacity, when decoding begins without a prompt).

    Raises:
        Unsupported: the model can't be run this way; the message says why.
        ValueError: a number out of range, or a plan that is not the one the model runs by.
    """

    def __init__(
        self, model: Any, *, batch: int = 1, capacity: int = 0, threads: int = 0, verify: bool = True,
        plan: AttentionPlan | None = None,
    ) -> None:  # fmt: skip
        if batch < 1 or capacity < 0 or threads < 0:
            raise ValueError(
                f"batch must be 1 or more, capacity and threads 0 or more; got {batch}, {capacity}, {threads}"
            )
        own = installed(model)
        if own is not None and plan not in (None, own):
            raise ValueError("the model runs by another attention plan: install this one, or leave plan out")
        if next(model.parameters()).device.type != "cpu":
            raise Unsupported("the lean path runs on the CPU")
        self.model, self.threads, self.position = model, threads or native.threads(), 0
        self._reached = 0
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        text = model.config.get_text_config()
        longest = int(getattr(text, "max_position_embeddings", 0) or 4096)
        self.capacity = capacity or min(longest, 4096)
        self.vocabulary = int(text.vocab_size)
        try:
            lowered = _recorded(model, batch, 1)
            if verify:
                _same_at_another_position(
                    lowered, _recorded(model, batch, max(2, min(longest, self.capacity) - 1))
                )
                compare(model, lowered)
            dtype = _cache_dtype(model)
            self._program = Program(lowered, self.capacity, dtype, self.threads, plan or own)
        except native.NativeUnavailable as error:
            raise Unsupported(str(error)) from error

    @property
    def batch(self) -> int:
        return self._program.batch

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps beside the model's weights: caches and buffers."""
        return self._program.nbytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of the tensors that hold keys and values now, with their scales."""
        return self._program.cache_bytes

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Run a prompt, int64 ``[batch, length]``, from the beginning; the logits that follow it, float32
        ``[batch, vocabulary]``.

        Raises:
            ValueError: wrong shape, an id outside of the vocabulary, or a prompt longer than the capacity.
        """
        length = self._check(ids)
        cache = new_cache(self.model)
        output: Any = self.model(input_ids=ids, use_cache=True, past_key_values=cache, **self._last_only)
        self.load_cache(output.past_key_values, length)
        logits: Tensor = output.logits
        return logits[:, -1].float()

    def load_cache(self, cache: Any, length: int) -> None:
        """Take over the cache of a prompt of ``length`` tokens: transformers' own or a ``SpanCache``.

        Raises:
            Unsupported: a cache that doesn't hold keys and values per layer, or holds sequences of unlike
                lengths.
            ValueError: more tokens than the capacity, or a ``SpanCache`` of another plan.
        """
        if length > self.capacity:
            raise ValueError(f"a prompt of {length} tokens doesn't fit in a cache of {self.capacity}")
        for ours in self._program.caches:
            layer = cache.layers[ours.layer]
            ring: Ring | None = getattr(layer, "ring", None)
            if ring is None:
                _fill(ours, layer, length)
            elif any(seen != length for seen in ring.lengths):
                raise Unsupported(f"its sequences must all have {length} tokens, not {ring.lengths}")
            else:
                ours.renew(ring.tokens).copy_from(ring)
        self.position = self._reached = length

    def step(self, ids: Tensor) -> Tensor:
        """Decode one token of every sequence: int64 ``[batch]``; the logits after it, float32
        ``[batch, vocabulary]``, overwritten by the next step.

        Raises:
            ValueError: the cache is full, or an id lies outside of the vocabulary.
        """
        if self.position >= self.capacity:
            raise ValueError(
                f"the cache is full ({self.capacity} tokens): make a decoder with a larger capacity"
            )
        self._check(ids.view(-1, 1))
        logits = self._program.run(ids, self.position, self.threads)
        self.position += 1
        return logits

    def rewind(self, position: int, *, exact: bool = True) -> None:
        """Forget what came after the first ``position`` tokens.

        Args:
            exact: refuse when a span has dropped tokens that it would keep now. Without, decoding goes on
                with later tokens in their place: right for timing, wrong for text, until the next prompt.

        Raises:
            ValueError: more than were decoded, or an exact rewind that is impossible.
        """
        if not 0 <= position <= self.position:
            raise ValueError(f"can't rewind to {position}: {self.position} tokens were decoded")
        self._reached = max(self._reached, self.position)
        if (
            exact
            and position < self._reached
            and any(c.ring.drops(self._reached) for c in self._program.caches)
        ):
            raise ValueError(
                f"can't rewind to {position}: after {self._reached} tokens, spans have dropped what they kept"
                " there; start from the prompt again (exact=False is for timing)"
            )
        self.position = position

    @torch.no_grad()
    def generate(
        self, ids: Tensor, max_new_tokens: int, *, stop: tuple[int, ...] = (), temperature: float = 0.0,
        seed: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Continue a prompt, int64 ``[batch, length]``; prompt and continuation, ``[batch, length + n]``.

        Args:
            stop: token ids that end a sequence; generation ends when all sequences have met one.
            temperature: 0 takes the likeliest token, otherwise tokens are drawn.
            seed: of the drawing.

        Raises:
            ValueError: see ``prefill``; also when prompt and continuation don't fit in the cache.
        """
        if ids.shape[1] + max_new_tokens > self.capacity:
            raise ValueError(
                f"{ids.shape[1]} + {max_new_tokens} tokens don't fit in a cache of {self.capacity}"
            )
        generator = torch.Generator()
        if seed is not None:
            generator.manual_seed(seed)
        pieces, logits = [ids], self.prefill(ids)
        ended = torch.zeros(len(ids), dtype=torch.bool)
        for i in itertools.count(1):
            token = choose_token(logits, temperature, generator)
            pieces.append(token.unsqueeze(1))
            ended |= torch.isin(token, torch.tensor(stop, dtype=token.dtype))
            if i >= max_new_tokens or bool(ended.all()):
                return torch.cat(pieces, dim=1)
            logits = self.step(token)
        raise AssertionError("not reached")

    def _check(self, ids: Tensor) -> int:
        if ids.ndim != 2 or ids.shape[0] != self.batch or ids.shape[1] < 1:
            raise ValueError(f"token ids must be [{self.batch}, length]; got {tuple(ids.shape)}")
        if ids.shape[1] > self.capacity:
            raise ValueError(f"a prompt of {ids.shape[1]} tokens doesn't fit in a cache of {self.capacity}")
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= self.vocabulary:
            raise ValueError(f"token ids must be 0 to {self.vocabulary - 1}; got {low} to {high}")
        return int(ids.shape[1])


def choose_token(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token for each row of ``logits [B, V]``: the likeliest, or one drawn at a temperature above 0."""
    if temperature <= 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)


def _fill(ours: Cache, layer: Any, length: int) -> None:
    """Keys and values of one of transformers' layers."""
    keys: Tensor | None = getattr(layer, "keys", None)
    values: Tensor | None = getattr(layer, "values", None)
    ring = ours.renew(length)
    shape = (ring.batch, len(ring.limits), ring.dim)
    if keys is None or values is None or (keys.shape[0], keys.shape[1], keys.shape[-1]) != shape:
        raise Unsupported(f"the model's cache of layer {ours.layer} is none of keys and values")
    kept = min(keys.shape[2], length)  # a sliding window has dropped the first ones
    ring.fill(keys[:, :, -kept:], values[:, :, -kept:], first=length - kept)


def _cache_dtype(model: Any) -> torch.dtype:
    return torch.float32 if model.dtype == torch.float32 else torch.bfloat16


def _recorded(model: Any, batch: int, position: int) -> Lowering:
    ids = torch.zeros(batch, 1, dtype=torch.int64)
    return Lowering(record(model, ids, position), RULES)


def _same_at_another_position(one: Lowering, other: Lowering) -> None:
    """What Python decides by the position (a rotary embedding that changes with the length) can't be in a
    fixed list of operations.

    Raises:
        Unsupported: the two recordings differ.
    """
    same = len(one.steps) == len(other.steps)
    for a, b in zip(one.steps, other.steps):
        same = same and (a.kind, a.alpha, a.beta, a.n) == (b.kind, b.alpha, b.beta, b.n)
        same = same and all(_same_constant(x, y) for x, y in zip((a.a, a.b, a.c), (b.a, b.b, b.c)))
    if not same:
        raise Unsupported("the model computes differently at different positions")


def _same_constant(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    if isinstance(a.buffer, Tensor) or isinstance(b.buffer, Tensor):
        both = isinstance(a.buffer, Tensor) and isinstance(b.buffer, Tensor)
        return both and torch.equal(a.buffer, b.buffer)
    return bool(a.size == b.size and a.stride == b.stride)
