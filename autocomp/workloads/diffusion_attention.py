"""Find the attention modules of a diffusion model that plans can be for, by watching one call of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from autocomp.diffusion.attention import form_of, is_attention, refusal
from autocomp.diffusion.attention_forms import Inputs
from autocomp.diffusion.state import SamplingState
from autocomp.search_spaces.base import Part


class Seen:
    """What one call showed of an attention module: the tokens it read, and what speaks against it.

    Attributes:
        shape: (heads, features a head, the image's tokens), and the text's where they are joint.
        form: name of its ``Form``; empty when it has none.
    """

    def __init__(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: SamplingState
    ) -> None:
        self.refusal, self.form = refusal(module), ""
        self.shape: tuple[int, ...] = ()
        if self.refusal:
            return
        form, x = form_of(module), Inputs.of(args, kwargs)
        if x.context is not None and x.context is not x.hidden and not form.joins:
            self.refusal = "it reads text or other tokens beside the image"
        elif x.rotary is not None and not form.turns:
            self.refusal = "it uses rotary position embeddings"
        else:
            tokens = x.hidden.shape[1] if x.hidden.ndim == 3 else x.hidden.shape[-2:].numel()
            text = form.text_tokens(x, state)
            image = tokens if form.joins else tokens - text  # one sequence holds both
            self.form = form.name
            width = module.to_q.weight.shape[0] // module.heads
            self.shape = (module.heads, width, image, text) if text else (module.heads, width, image)


@contextmanager
def watched_attention(
    modules: Mapping[str, nn.Module], seen: dict[str, Seen], state: SamplingState
) -> Iterator[None]:
    """While this is open, note in ``seen`` what the first call of each attention module shows.

    Args:
        state: that of the model.
    """

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(path, Seen(module, args, kwargs, state))

        return hook

    found = {p: m for p, m in modules.items() if is_attention(m)}
    handles = [m.register_forward_pre_hook(watch(p), with_kwargs=True) for p, m in found.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_parts(
    seen: Mapping[str, Seen], family: str, block: Callable[[str], int | None]
) -> tuple[tuple[Part, ...], dict[str, str]]:
    """Parts of kind ``image_attention``, and why there are none (by that kind) when there are none.

    Args:
        block: index of the block that a path is in.
    """
    parts = tuple(
        Part(path, "image_attention", s.shape, block(path), path, s.form)
        for path, s in seen.items()
        if not s.refusal
    )
    if parts:
        return parts, {}
    reason = f"this {family} model has no attention module of diffusers"
    if seen:
        path, first = next(iter(seen.items()))
        reason = f"none of its attention modules is one that plans are for: {path}: {first.refusal}"
    return (), {"image_attention": reason}
