"""Running a model's attention by a plan: one function in transformers' table of attention implementations.

Works for every model that calls attention through that table. Without a cache (scoring, training) each query
sees what its group would have kept and quantized keys and values are simulated; with a ``SpanCache`` the
kernels work on what is really kept.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocomp.attention.plan import AttentionPlan, LayerPlan
from autocomp.attention.probe import attention_calls, refusal
from autocomp.errors import CapabilityError
from autocomp.kernels.attention import OPERATORS
from autocomp.kernels.attention_reference import kv_dequantize

if TYPE_CHECKING:
    from autocomp.workloads.base import Built

NAME = "autocomp_spans"
"""Our name in transformers' tables of attention and of mask functions."""
_PLAN = "autocomp_plan"
_LAYER = "autocomp_layer"


def install(model: Any, plan: AttentionPlan) -> None:
    """Make ``model`` run by ``plan``, with ``generate`` using a ``SpanCache``; replaces an earlier plan.

    Raises:
        CapabilityError: the plan doesn't have the model's layers or key/value heads, or the model does not
            let its attention be replaced.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    remove(model)
    layers = attention_layers(model)
    if set(layers) != set(plan.layers):
        raise CapabilityError(
            f"the plan is for the attention layers {_few(plan.layers)}, the model has {_few(layers)}"
        )
    _check_groups(model, plan)
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, padding_only)
    former = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise CapabilityError(f"{type(model).__name__} does not let its attention be replaced")
    for index, module in layers.items():
        setattr(module, _LAYER, plan.layers[index])
    model.__dict__[_PLAN] = plan
    model.__dict__["_autocomp_former_attention"] = former
    model.__dict__["generate"] = functools.partial(_generate, model)


def _check_groups(model: Any, plan: AttentionPlan) -> None:
    for call in attention_calls(model):
        layer = plan.layers[call.layer]
        if len(layer.rules) != call.groups:
            raise CapabilityError(
                f"the plan has {len(layer.rules)} rules for layer {call.layer}, which has {call.groups}"
                " key/value heads"
            )
        if layer.window != call.window:
            raise CapabilityError(
                f"layer {call.layer} has a sliding window of {call.window} tokens, the plan {layer.window}"
            )


def remove(model: Any) -> None:
    """Undo ``install``; nothing happens without a plan."""
    if installed(model) is None:
        return
    for module in attention_layers(model).values():
        if hasattr(module, _LAYER):
            delattr(module, _LAYER)
    model.set_attn_implementation(model.__dict__.pop("_autocomp_former_attention"))
    for name in (_PLAN, "generate"):
        model.__dict__.pop(name, None)


@contextmanager
def plain_attention(built: Built) -> Iterator[None]:
    """The model's own attention for a while; the plan comes back afterwards."""
    plan = installed(built.model)
    remove(built.model)
    changed = "attention" in built.changed
    built.changed.discard("attention")
    try:
        yield
    finally:
        if plan is not None:
            install(built.model, plan)
        if changed:
            built.changed.add("attention")


def installed(model: Any) -> AttentionPlan | None:
    """The plan that ``model`` runs by."""
    found: AttentionPlan | None = model.__dict__.get(_PLAN)
    return found


def attention_layers(model: Any) -> dict[int, nn.Module]:
    """Layer number -> attention module.

    Raises:
        CapabilityError: no plan can run this model.
    """
    reason = refusal(model)
    if reason:
        raise CapabilityError(f"attention can't be planned for this model: {reason}")
    return {call.layer: model.get_submodule(call.path) for call in attention_calls(model)}


def _few(layers: Any) -> str:
    found = sorted(layers)
    return f"{found[:4]}{'...' if len(found) > 4 else ''} ({len(found)})"


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    from autocomp.attention.cache import SpanCache

    if kwargs.get("use_cache", True) and kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = SpanCache(model)
    return type(model).generate(model, *args, **kwargs)


def padding_only(
    batch_size: int, q_length: int, kv_length: int, *args: Any, attention_mask: Tensor | None = None, **_: Any
) -> Tensor | None:
    """The mask that ``attend`` wants: bool ``[batch, tokens]`` with false for padding, ``None`` for none."""
    del batch_size, q_length, kv_length, args
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Transformers' attention interface.

    Args:
        query: ``[B, H, Q, D]``; key, value: ``[B, Hkv, Q, D]``, those of the new tokens.
        mask: from ``padding_only``; padding on the left, or on the right without a cache.

    Returns:
        ``[B, Q, H, D]`` and ``None``.

    Raises:
        CapabilityError: a mask of the model's own, padding in the middle, or a cache that isn't ours.
    """
    plan: LayerPlan = getattr(module, _LAYER)
    scaling = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if mask is not None and mask.ndim != 2:
        raise CapabilityError("attention spans go with padding masks [batch, tokens] only")
    layer = getattr(key, "autocomp_layer", None)
    if layer is not None:
        out: Tensor = layer.attend(query, key, value, mask, scale)
    elif key.shape[2] != query.shape[2]:
        raise CapabilityError(
            "this model runs by a plan of attention spans: give it past_key_values="
            "autocomp.attention.cache.SpanCache(model), or call model.generate, which does so"
        )
    else:
        key = simulated(key, plan.key_bits)
        value = simulated(value, plan.value_bits)
        out = prompt_attention(query, key, value, plan, scale, mask)
    return out.transpose(1, 2).contiguous(), None


def simulated(x: Tensor, bits: int) -> Tensor:
    """``x [B, Hkv, S, D]`` as a cache of ``bits`` gives it back; gradients go straight through."""
    if bits == 16:
        return x
    with torch.no_grad():
        codes, scale, minimum = OPERATORS["kv_quantize"](x.detach(), bits)
        kept = kv_dequantize(codes, scale, minimum, bits).to(x.dtype)
    return x + (kept - x).detach() if x.requires_grad else kept


def prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: LayerPlan, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Causal attention of whole sequences, ``[B, H, S, D]``, each group within its span for N = S.

    Padding (false in ``mask [B, S]``) may be on the left or on the right; its rows are zeros.
    """
    if mask is None:
        return _attend_rows(q, k, v, plan, scale)
    out = torch.zeros_like(q)
    for b, (first, last) in enumerate(real_tokens(mask[:, -q.shape[2] :])):
        rows = (slice(b, b + 1), slice(None), slice(first, last))
        out[rows] = _attend_rows(q[rows], k[rows], v[rows], plan, scale, tokens=q.shape[2])
    return out


def real_tokens(mask: Tensor) -> list[tuple[int, int]]:
    """First and one past the last token of every row of ``mask [B, S]``.

    Raises:
        CapabilityError: padding between tokens, or a row without any.
    """
    found = []
    for row in mask.bool().tolist():
        count = sum(row)
        first = row.index(True) if count else 0
        if not count or not all(row[first : first + count]):
            raise CapabilityError("padding must be at one end of a sequence, which holds a token at least")
        found.append((first, first + count))
    return found


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, plan: LayerPlan, scale: float, tokens: int = 0) -> Tensor:
    length = q.shape[2]
    limits = [(w or length, s) for w, s in plan.limits(tokens or length)]
    dense = all(w + s >= length for w, s in limits)
    graded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    # Our C is faster than torch's CPU attention, dense or not, but has no gradient.
    if dense and (graded or q.device.type != "cpu"):
        return dense_attention(q, k, v, scale)
    per_head = torch.tensor(limits, dtype=torch.int32, device=q.device)
    per_head = per_head.repeat_interleave(q.shape[1] // len(limits), dim=0)
    window, sink = (t.contiguous() for t in per_head.unbind(1))
    if graded:
        from autocomp.attention.autograd import spans_attention

        return spans_attention(q, k, v, window, sink, scale)
    out: Tensor = OPERATORS["attention_spans"](q, k, v, window, sink, scale)
    return out


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention by torch, ``[B, H, S, D]`` with grouped keys ``[B, Hkv, S, D]``."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=scale)
