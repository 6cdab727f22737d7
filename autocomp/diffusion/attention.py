"""Plans of self-attention in diffusers models: which modules can have one, installing, removing.

See ``attention_plan`` for what a plan says and ``attention_processor`` for how it is run.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

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
    "install",
    "installed",
    "refusal",
    "remove",
    "resident_tensors",
]


def refusal(module: nn.Module) -> str:
    """Why the attention of this module can't be planned; empty when it can."""
    if not isinstance(module, Attention):
        return f"{type(module).__name__} is no diffusers Attention with separate queries, keys and values"
    processor = module.processor
    if isinstance(processor, PlannedAttention):
        processor = processor.former
    found = {
        "its queries look at another sequence (cross-attention)": module.is_cross_attention
        or module.only_cross_attention,
        "it joins two sequences": module.added_kv_proj_dim is not None,
        "it is causal": module.is_causal,
        "it normalizes over groups or space": module.group_norm is not None
        or module.spatial_norm is not None
        or module.norm_cross is not None,
        "it adds its own input or rescales": module.residual_connection
        or module.rescale_output_factor != 1.0,
        "its heads share keys": module.inner_kv_dim != module.inner_dim,
        "its scores have a scale of their own": not module.scale_qk,
        "it has no projection of its output": module.to_out is None,
        "its projections are fused": module.fused_projections,
    }
    reason = next((text for text, wrong in found.items() if wrong), "")
    if not reason and type(processor) is not AttnProcessor2_0:
        reason = f"it runs through {type(processor).__name__}, not AttnProcessor2_0"
    return reason


def find(model: nn.Module) -> tuple[dict[str, Attention], dict[str, str]]:
    """Attention modules of a model by path: those that can be planned, and the others with the reason."""
    fitting: dict[str, Attention] = {}
    refused: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, Attention):
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
    made: dict[str, PlannedAttention] = {}
    for path, layer in plan.layers.items():
        module = modules.get(path)
        if module is None:
            raise SpaceError(f"the plan names {path!r}, which this {type(model).__name__} has not")
        reason = refusal(module)
        if reason:
            raise CapabilityError(f"the attention of {path} can't be planned: {reason}")
        assert isinstance(module, Attention)
        former = module.processor
        former = former.former if isinstance(former, PlannedAttention) else former
        made[path] = PlannedAttention(layer, module.heads, state, former)
    remove(model)
    for path, processor in made.items():
        if not processor.plan.plain:
            modules[path].set_processor(processor)


def remove(model: nn.Module) -> None:
    """Put every module's own processor back. Does nothing to a model without a plan."""
    for module in model.modules():
        if isinstance(module, Attention) and isinstance(module.processor, PlannedAttention):
            module.set_processor(module.processor.former)


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
    return {
        path: module.processor
        for path, module in model.named_modules()
        if isinstance(module, Attention) and isinstance(module.processor, PlannedAttention)
    }
