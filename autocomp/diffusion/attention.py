"""Plans of attention in diffusers models: which modules can have one, installing, removing.

See ``attention_plan`` for what a plan says, ``attention_processor`` for how it is run and
``attention_forms`` for the modules: plain self-attention, the joint attention of SD3 and that of Flux.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from autocomp.diffusion.attention_forms import FORMS, Form
from autocomp.diffusion.attention_plan import FULL, ImageAttentionPlan, LayerPlan, Rule
from autocomp.diffusion.attention_processor import PlannedAttention
from autocomp.diffusion.state import SamplingState, state_of
from autocomp.errors import CapabilityError, SpaceError

__all__ = [
    "FULL",
    "ImageAttentionPlan",
    "LayerPlan",
    "PlannedAttention",
    "Rule",
    "find",
    "form_of",
    "install",
    "installed",
    "is_attention",
    "refusal",
    "remove",
    "resident_tensors",
]

#: Processors whose work ours can do. By name: importing that of Flux takes seconds.
_MODELS = "diffusers.models."
PLAIN = _MODELS + "attention_processor.AttnProcessor2_0"
JOINT = _MODELS + "attention_processor.JointAttnProcessor2_0"
FLUX = _MODELS + "transformers.transformer_flux.FluxAttnProcessor"


def is_attention(module: nn.Module) -> bool:
    """Whether this is a module of diffusers that attends through a processor."""
    return isinstance(module, (Attention, AttentionModuleMixin))


def refusal(module: nn.Module) -> str:
    """Why the attention of this module can't be planned; empty when it can."""
    return _form(module)[1]


def form_of(module: nn.Module) -> Form:
    """How this module is called. Raises ``CapabilityError`` when its attention can't be planned."""
    name, reason = _form(module)
    if reason:
        raise CapabilityError(f"the attention of this {type(module).__name__} can't be planned: {reason}")
    return FORMS[name]


def _form(module: nn.Module) -> tuple[str, str]:
    """Name of the module's form, or "" and the reason why it has none."""
    if not is_attention(module):
        return "", f"{type(module).__name__} is no diffusers Attention with separate queries, keys and values"
    processor = getattr(module, "processor", None)
    if isinstance(processor, PlannedAttention):
        processor = processor.former
    kind = f"{type(processor).__module__}.{type(processor).__name__}"
    if getattr(module, "fused_projections", False):
        return "", "its projections are fused"
    if kind == FLUX:
        return _flux_form(module, processor)
    if not isinstance(module, Attention):
        return "", f"a {type(module).__name__} runs through {type(processor).__name__}, which has no plans"
    name = "joint" if module.added_kv_proj_dim is not None else "attention"
    reason = _oddity(module)
    if not reason and name == "joint" and (kind != JOINT or module.add_q_proj is None):
        reason = f"it joins two sequences through {type(processor).__name__}, not JointAttnProcessor2_0"
    if not reason and kind not in (PLAIN, JOINT):
        reason = f"it runs through {type(processor).__name__}, not AttnProcessor2_0"
    return ("", reason) if reason else (name, "")


def _oddity(module: Attention) -> str:
    """What a module of the class ``Attention`` does beside attention in heads of their own."""
    found = {
        "its queries look at another sequence (cross-attention)": module.is_cross_attention
        or module.only_cross_attention,
        "it is causal": module.is_causal,
        "it normalizes over groups or space": module.group_norm is not None
        or module.spatial_norm is not None
        or module.norm_cross is not None,
        "it adds its own input or rescales": module.residual_connection
        or module.rescale_output_factor != 1.0,
        "its heads share keys": module.inner_kv_dim != module.inner_dim,
        "its scores have a scale of their own": not module.scale_qk,
        "it has no projection of its output": module.to_out is None,
    }
    return next((text for text, wrong in found.items() if wrong), "")


def _flux_form(module: Any, processor: Any) -> tuple[str, str]:
    backend = getattr(processor, "_attention_backend", None)
    if backend is not None or getattr(processor, "_parallel_config", None) is not None:
        return "", f"it attends by the backend {backend!r} or on several devices; keep both at their defaults"
    joint, single = module.added_kv_proj_dim is not None, bool(module.pre_only)
    if joint == single:
        return "", "it is neither of a double-stream block of Flux nor of a single-stream one"
    return ("flux" if joint else "flux_single"), ""


def find(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Attention modules of a model by path: those that can be planned, and the others with the reason."""
    fitting: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    for path, module in model.named_modules():
        if is_attention(module):
            reason = refusal(module)
            if reason:
                refused[path] = reason
            else:
                fitting[path] = module
    return fitting, refused


def install(model: nn.Module, plan: ImageAttentionPlan, state: SamplingState | None = None) -> None:
    """Make the model follow ``plan`` in place of an earlier one. Modules whose rules are all full, and those
    that it doesn't name, stay untouched: they give the model's own numbers bit for bit.

    Args:
        state: where a sampling is; by default the model's own, which its ``Sampler`` writes.

    Raises:
        CapabilityError: the plan names a module that can't be planned.
        SpaceError: it names none of this model, or has rules for another number of heads.
    """
    state = state_of(model) if state is None else state
    modules = dict(model.named_modules())
    made: dict[str, tuple[Any, PlannedAttention]] = {}
    for path, layer in plan.layers.items():
        module = modules.get(path)
        if module is None:
            raise SpaceError(f"the plan names {path!r}, which this {type(model).__name__} has not")
        name, reason = _form(module)
        if reason:
            raise CapabilityError(f"the attention of {path} can't be planned: {reason}")
        owner: Any = module
        former = owner.processor
        former = former.former if isinstance(former, PlannedAttention) else former
        made[path] = owner, PlannedAttention(layer, owner.heads, state, former, FORMS[name])
    remove(model)
    for owner, processor in made.values():
        if not processor.plan.plain:
            owner.set_processor(processor)


def remove(model: nn.Module) -> None:
    """Put every module's own processor back. Does nothing to a model without a plan."""
    modules = dict(model.named_modules())
    for path, processor in _processors(model).items():
        owner: Any = modules[path]
        owner.set_processor(processor.former)


def installed(model: nn.Module) -> ImageAttentionPlan | None:
    """The plan that the model follows, without modules that are plain; ``None`` when there is none."""
    layers = {path: p.plan for path, p in _processors(model).items()}
    return ImageAttentionPlan(layers) if layers else None


def resident_tensors(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Module path -> residuals and outputs that it holds at this moment; every storage is there once."""
    seen: set[int] = set()
    found: dict[str, list[torch.Tensor]] = {}
    for path, processor in _processors(model).items():
        for tensor in processor.resident_tensors():
            if tensor.untyped_storage().data_ptr() not in seen:
                seen.add(tensor.untyped_storage().data_ptr())
                found.setdefault(path, []).append(tensor)
    return found


def _processors(model: nn.Module) -> dict[str, PlannedAttention]:
    found = {path: getattr(module, "processor", None) for path, module in model.named_modules()}
    return {path: p for path, p in found.items() if isinstance(p, PlannedAttention)}
