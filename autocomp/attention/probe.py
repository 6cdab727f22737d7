"""Which modules of a model compute attention, and with what: found by watching one tiny forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROBE = "autocomp_probe"
TOKENS = 8
_STATE = "_autocomp_attention_calls"

# Keyword arguments of attention calls that change nothing beyond what a plan knows.
_KNOWN = {
    "dropout", "scaling", "sliding_window", "softcap", "is_causal", "position_ids", "cache_position",
    "use_cache", "output_attentions", "output_hidden_states", "return_dict",
}  # fmt: skip


@dataclass(frozen=True)
class AttentionCall:
    """One attention module.

    Attributes:
        path: of the module in the model.
        layer: the number under which it keeps its keys and values.
        heads, groups, dim: query heads, key/value heads, features a head.
        window: the last tokens that it looks at by itself (its own included), 0 for all.
        refusal: why no plan can run it; empty when one can.
    """

    path: str
    layer: int
    heads: int
    groups: int
    dim: int
    window: int = 0
    refusal: str = ""


def attention_calls(model: Any) -> tuple[AttentionCall, ...]:
    """The attention modules of ``model`` in execution order; empty when it doesn't call attention through
    transformers' table. The result is kept on the model, which must run without a plan the first time."""
    found: tuple[AttentionCall, ...] | None = model.__dict__.get(_STATE)
    if found is None:
        found = model.__dict__[_STATE] = _probe(model)
    return found


def refusal(model: Any) -> str:
    """Why ``model`` can't run by an attention plan; empty when it can."""
    calls = attention_calls(model) if hasattr(model, "set_attn_implementation") else ()
    if not calls:
        return f"{type(model).__name__} does not call attention through transformers' interface"
    layers = [call.layer for call in calls]
    if sorted(layers) != list(range(len(layers))):
        return f"not every layer of {type(model).__name__} keeps keys and values of its own"
    config = model.config.get_text_config()
    depth = int(getattr(config, "num_hidden_layers", len(layers)))
    if depth != len(layers):
        return f"{depth - len(layers)} of {depth} layers of {type(model).__name__} are no attention"
    return next((f"{call.path}: {call.refusal}" for call in calls if call.refusal), "")


def _probe(model: Any) -> tuple[AttentionCall, ...]:
    from transformers import AttentionInterface

    paths: Mapping[int, str] = {id(module): path for path, module in model.named_modules()}
    calls: list[AttentionCall] = []

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        calls.append(_call(module, paths.get(id(module), ""), q, k, v, mask, options))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous(), None

    former = model.config._attn_implementation
    AttentionInterface.register(PROBE, attend)
    tokens = torch.arange(TOKENS, device=next(model.parameters()).device)[None]
    try:
        model.set_attn_implementation(PROBE)
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError):
        return ()  # it wants something of its attention that we don't know
    finally:
        model.set_attn_implementation(former)
        AttentionInterface._global_mapping.pop(PROBE, None)
    return tuple(calls)


def _call(
    module: nn.Module, path: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Any
) -> AttentionCall:
    unknown = sorted(n for n, x in options.items() if n not in _KNOWN and isinstance(x, Tensor))
    index = getattr(module, "layer_idx", None)
    reason = ""
    if index is None or not path:
        reason = "it has no layer_idx"
    elif mask is not None:
        reason = "attention is given a mask of the model's own"
    elif unknown:
        reason = f"attention takes {', '.join(unknown)}"
    elif options.get("softcap"):
        reason = "scores are soft-capped"
    elif k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        reason = "queries, keys and values differ in width"
    elif q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        reason = "keys are not one a token"
    elif not getattr(module, "is_causal", True):
        reason = "it is not causal"
    window, kind = own_window(module, options)
    reason = reason or kind
    layer = -1 if index is None else int(index)
    return AttentionCall(path, layer, q.shape[1], k.shape[1], q.shape[-1], window, reason)


def own_window(module: nn.Module, options: Mapping[str, Any]) -> tuple[int, str]:
    """Tokens that a layer looks back by itself (its own included; 0 for all), and why that can't be told."""
    found = options.get("sliding_window") or getattr(module, "sliding_window", None)
    if found:
        return int(found), ""
    config: Any = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None) or (), getattr(module, "layer_idx", None)
    kind = kinds[layer] if layer is not None and 0 <= layer < len(kinds) else "full_attention"
    if kind not in ("full_attention", "sliding_attention"):
        return 0, f"layer {layer} is of the type {kind}"
    return int(config.sliding_window or 0) if kind == "sliding_attention" else 0, ""
