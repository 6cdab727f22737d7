"""How the attention modules of diffusers read their inputs and hand out results, by form of module.

Inside, every sequence is the text's tokens and then the image's, as our operators want it; a module's own
order may be the other one (SD3). A form does what the stock processor of its modules does, operation by
operation, so that full attention in the module's own order gives the stock processor's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from autocomp.diffusion.state import SamplingState
from autocomp.errors import CapabilityError

Triple = tuple[Tensor, Tensor, Tensor]
Output = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """What a module is called with.

    Attributes:
        hidden: ``[batch, tokens, width]``: the image's, or text and image in one (``flux_single``).
        context: ``[batch, text tokens, width]``, the text beside the image; ``None`` without.
        rotary: cosines and sines ``[text and image tokens, features a head]``; ``None`` without.
    """

    hidden: Tensor
    context: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
        """From the arguments of a module's call."""
        names = ("hidden_states", "encoder_hidden_states")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return cls(given[names[0]], given.get(names[1]), given.get("image_rotary_emb"))

    def rows(self, count: int) -> Inputs:
        """The first ``count`` rows of the batch."""
        return Inputs(
            self.hidden[:count], None if self.context is None else self.context[:count], self.rotary
        )


class Form:
    """Self-attention over an image's tokens, through ``AttnProcessor2_0`` (or SD3's without text).

    Attributes:
        name: in keys of latency tables.
        text_first: whether the module's own order is [text; image].
        joins: it takes the text beside the image.
        turns: it takes rotary position embeddings.
    """

    name: ClassVar[str] = "attention"
    text_first: ClassVar[bool] = True
    joins: ClassVar[bool] = False
    turns: ClassVar[bool] = False

    def text_tokens(self, x: Inputs, state: SamplingState) -> int:
        """Tokens of the text in the joint sequence."""
        del state
        return 0 if x.context is None else x.context.shape[1]

    def project(self, attn: Any, x: Inputs, text_first: bool = True) -> Triple:
        """Queries, keys and values ``[batch, heads, tokens, dim]``, normalized, turned and in this order."""
        del text_first
        return _normed(attn, _heads(attn, x.hidden, attn.to_q, attn.to_k, attn.to_v), "norm_q", "norm_k")

    def finish(self, attn: Any, out: Tensor, text: int, text_first: bool = True) -> Output:
        """The module's output from the heads' ``[batch, heads, tokens, dim]``; ``text`` tokens are text's."""
        del text, text_first
        return _projected(attn.to_out, _flat(out))

    def turned(self, attn: Any, gradients: Sequence[Tensor | None], text: int) -> Tensor:
        """Gradient by the heads' outputs ``[batch, heads, text and image tokens, dim]``, given that by each
        tensor of the module's output (``None``: nothing depends on it); ``text`` tokens are the text's."""
        del text
        (gradient,) = gradients
        assert gradient is not None
        return _split(gradient @ attn.to_out[0].weight, attn.heads)


class Joint(Form):
    """The joint attention of SD3's blocks (arXiv 2403.03206), through ``JointAttnProcessor2_0``.

    Its own order is [image; text]. In a model's last block the text's output is not projected
    (``context_pre_only``) and nobody reads it.
    """

    name = "joint"
    text_first = False
    joins = True

    def project(self, attn: Any, x: Inputs, text_first: bool = True) -> Triple:
        image = super().project(attn, x)
        if x.context is None:
            return image
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = _normed(attn, _heads(attn, x.context, *layers), "norm_added_q", "norm_added_k")
        first, second = (text, image) if text_first else (image, text)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(first, second, strict=True))
        return q, k, v

    def finish(self, attn: Any, out: Tensor, text: int, text_first: bool = True) -> Output:
        y = _flat(out)
        if not text:
            return _projected(attn.to_out, y)
        at = text if text_first else y.shape[1] - text
        image, words = (y[:, at:], y[:, :at]) if text_first else (y[:, :at], y[:, at:])
        return _projected(attn.to_out, image), words if attn.to_add_out is None else attn.to_add_out(words)

    def turned(self, attn: Any, gradients: Sequence[Tensor | None], text: int) -> Tensor:
        image = gradients[0]
        assert image is not None
        if len(gradients) == 1:
            return super().turned(attn, gradients, text)
        words = gradients[1]
        if words is None:
            words = image.new_zeros(len(image), text, attn.to_out[0].in_features)
        elif attn.to_add_out is not None:
            words = words @ attn.to_add_out.weight
        return _split(torch.cat([words, image @ attn.to_out[0].weight], dim=1), attn.heads)


class Flux(Joint):
    """The attention of Flux's double-stream blocks: text first, rotary positions, through
    ``FluxAttnProcessor``."""

    name = "flux"
    text_first = True
    turns = True

    def project(self, attn: Any, x: Inputs, text_first: bool = True) -> Triple:
        q, k, v = _rows(attn, x.hidden, attn.to_q, attn.to_k, attn.to_v)
        q, k = attn.norm_q(q), attn.norm_k(k)
        if x.context is not None:
            tq, tk, tv = _rows(attn, x.context, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            tq, tk = attn.norm_added_q(tq), attn.norm_added_k(tk)
            q, k, v = (torch.cat(pair, dim=1) for pair in ((tq, q), (tk, k), (tv, v)))
        if x.rotary is not None:
            from diffusers.models.embeddings import apply_rotary_emb

            q, k = (apply_rotary_emb(y, x.rotary, sequence_dim=1) for y in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def finish(self, attn: Any, out: Tensor, text: int, text_first: bool = True) -> Output:
        y = _flat(out)
        image, words = y[:, text:].contiguous(), y[:, :text].contiguous()
        return _projected(attn.to_out, image), attn.to_add_out(words)


class FluxSingle(Flux):
    """The attention of Flux's single-stream blocks: text and image come as one sequence, and the heads'
    outputs go as they are into a projection of the block."""

    name = "flux_single"
    joins = False

    def text_tokens(self, x: Inputs, state: SamplingState) -> int:
        """Written down by whoever calls the model: the sequence doesn't show it.

        Raises:
            CapabilityError: nobody did, or it is of another call.
        """
        if not 0 < state.text < x.hidden.shape[1]:
            raise CapabilityError(
                f"a single-stream module of Flux can't see how many of its {x.hidden.shape[1]} tokens are the"
                f" text's (the state says {state.text}); call the model through autocomp's Denoiser, which"
                " writes it down"
            )
        return state.text

    def finish(self, attn: Any, out: Tensor, text: int, text_first: bool = True) -> Output:
        return _flat(out)

    def turned(self, attn: Any, gradients: Sequence[Tensor | None], text: int) -> Tensor:
        (gradient,) = gradients
        assert gradient is not None
        return _split(gradient, attn.heads)


FORMS: dict[str, Form] = {form.name: form for form in (Form(), Joint(), Flux(), FluxSingle())}


def tensors_of(output: Output) -> tuple[Tensor, ...]:
    """The tensors of a module's output: the image's, and the text's where there is one."""
    return output if isinstance(output, tuple) else (output,)


def _heads(attn: Any, x: Tensor, *layers: Any) -> Triple:
    """``[batch, heads, tokens, dim]`` of each layer."""
    q, k, v = (_split(layer(x), attn.heads) for layer in layers)
    return q, k, v


def _rows(attn: Any, x: Tensor, *layers: Any) -> Triple:
    """``[batch, tokens, heads, dim]`` of each layer, the layout that rotary embeddings of Flux turn."""
    q, k, v = (layer(x).unflatten(-1, (attn.heads, -1)) for layer in layers)
    return q, k, v


def _normed(attn: Any, parts: Triple, query: str, key: str) -> Triple:
    q, k, v = parts
    norm_q, norm_k = getattr(attn, query), getattr(attn, key)
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


def _split(x: Tensor, heads: int) -> Tensor:
    """``[batch, tokens, heads * dim]`` -> ``[batch, heads, tokens, dim]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _flat(out: Tensor) -> Tensor:
    """The inverse of ``_split``."""
    return out.transpose(1, 2).flatten(2)


def _projected(layers: Any, x: Tensor) -> Tensor:
    """A linear layer and its dropout."""
    found: Tensor = layers[1](layers[0](x))
    return found
