"""One way to call the diffusion models of diffusers, whatever their signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from autocomp.diffusion.state import SamplingState, state_of
from autocomp.errors import CapabilityError

#: guidance-distilled models (Flux) get this where the conditions name no ``guidance``; diffusers' own default
EMBEDDED_GUIDANCE = 3.5
#: what Flux pipelines and VAEs of 8 pixels a latent start from
FLUX_SIZE = 128
PIXELS_PER_LATENT = 8

_TEXT = "encoder_hidden_states"
_POOLED = "pooled_projections"
_LABELS = "class_labels"


class Denoiser:
    """A model as a function of sample, timestep and named condition tensors.

    Attributes:
        model: the module that is called; may be changed in place.
        family: ``dit``, ``unet``, ``unet-text``, ``pixart``, ``sd3`` or ``flux``, by forward's signature.
        channels: of the sample; a learned variance in the output is dropped.
        size: (height, width) of the sample.
        conditions: names of the tensors that it needs, each [B, ...]. Used where they are given, but not
            needed: ``encoder_attention_mask`` (pixart, unet-text), ``resolution`` and ``aspect_ratio``
            (pixart), ``guidance`` (flux).
    """

    def __init__(self, model: nn.Module, size: tuple[int, int] | None = None) -> None:
        """Raises ``CapabilityError``, with the reason, for a model that can't be called this way.

        Args:
            size: of the sample, for models whose configuration names none (Flux), or to sample another one.
        """
        family, reason = _family(model)
        if reason:
            raise CapabilityError(reason)
        self.model, self.family = model, family
        self.config = cast(Any, model.config)
        self.channels = self.config.in_channels // (4 if family == "flux" else 1)
        self.size = size or _size(self.config)
        self.conditions = _conditions(family, self.config)
        self._arguments = _ARGUMENTS[family]

    @staticmethod
    def refusal(model: nn.Module) -> str | None:
        """Why this model can't be called; None if it can."""
        return _family(model)[1] or None

    @property
    def state(self) -> SamplingState:
        return state_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def __call__(self, x: Tensor, model_time: float, conditions: Mapping[str, Tensor]) -> Tensor:
        """The model's output for samples [B, C, H, W] at one timestep, in the dtype of ``x``.

        Raises:
            CapabilityError: for a condition that is missing.
        """
        missing = [n for n in self.conditions if n not in conditions]
        if missing:
            raise CapabilityError(
                f"a {self.family} model needs the conditions {missing}; got {sorted(conditions)}"
            )
        if self.family in ("sd3", "flux"):
            self.state.text = conditions[_TEXT].shape[1]
        dtype = self.dtype
        time = torch.full((len(x),), model_time, dtype=torch.float32, device=x.device)
        output = self.model(**self._arguments(self, x.to(dtype), time, conditions), return_dict=False)[0]
        if self.family == "flux":
            output = _unpack(output, *x.shape[-2:])
        return output[:, : self.channels].to(x.dtype)

    def null(self, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The conditions of the unguided half: the class after the last label; for text the tensors given as
        ``null_{name}`` (one row, or as many), else zeros. Masks and sizes stay unless a null is given.

        Raises:
            CapabilityError: for class labels without a class to spare.
        """
        rows = {n: c for n, c in conditions.items() if not n.startswith("null_")}
        return {name: self._null(name, value, conditions.get(f"null_{name}")) for name, value in rows.items()}

    def _null(self, name: str, value: Tensor, given: Tensor | None) -> Tensor:
        if given is not None:
            return given.to(value).expand_as(value)
        if name == _LABELS:
            return torch.full_like(value, self.null_label)
        return torch.zeros_like(value) if name in self.conditions else value

    @property
    def null_label(self) -> int:
        """The class label that stands for none: DiT's own, the last one of a UNet."""
        if self.family == "dit":
            return int(self.config.num_embeds_ada_norm)
        return int(self.config.num_class_embeds) - 1


def _family(model: nn.Module) -> tuple[str, str]:
    """(family, ""), or ("", why not). By arguments of forward: a copy is as good as the original."""
    names = set(inspect.signature(model.forward).parameters)
    config: Any = getattr(model, "config", None)
    kind = type(model).__name__
    if config is None or not hasattr(config, "in_channels"):
        return "", f"{kind} has no diffusers configuration with in_channels"
    if {"img_ids", "txt_ids", _POOLED, _TEXT} <= names:
        return "flux", ""
    if {_POOLED, _TEXT, "hidden_states"} <= names:
        return "sd3", ""
    if "hidden_states" in names and _TEXT in names and "added_cond_kwargs" in names and _LABELS not in names:
        return "pixart", ""
    if {"hidden_states", _LABELS} <= names and _TEXT not in names:
        return "dit", ""
    if {"sample", _TEXT, "encoder_attention_mask", "added_cond_kwargs"} <= names:
        odd = _more_than_text(config)
        return ("", f"{kind} is conditioned on more than text: {odd}") if odd else ("unet-text", "")
    if {"sample", _LABELS} <= names and _TEXT not in names:
        if config.get("class_embed_type") is not None:
            return (
                "",
                f"{kind} with class_embed_type {config.class_embed_type!r}: only class labels are known",
            )
        return "unet", ""
    known = "DiT-, PixArt-, SD3- and FluxTransformer2DModel, UNet2DModel and UNet2DConditionModel"
    return "", f"{kind} is called with {sorted(names)}; known are the calls of {known}"


def _more_than_text(config: Any) -> dict[str, Any]:
    """Settings of a UNet2DConditionModel that ask for conditions nobody gives here."""
    known = {"addition_embed_type": ("text_time",), "encoder_hid_dim_type": ("text_proj",)}
    names = ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds")
    return {n: config.get(n) for n in names if config.get(n) not in (None, *known.get(n, ()))}


def _size(config: Any) -> tuple[int, int]:
    size = config.get("sample_size") or FLUX_SIZE
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _conditions(family: str, config: Any) -> tuple[str, ...]:
    if family == "dit":
        return (_LABELS,)
    if family == "unet":
        return (_LABELS,) if config.get("num_class_embeds") else ()
    if family == "unet-text":
        return (_TEXT, "text_embeds", "time_ids") if config.get("addition_embed_type") else (_TEXT,)
    return (_TEXT,) if family == "pixart" else (_TEXT, _POOLED)


Arguments = Callable[[Denoiser, Tensor, Tensor, Mapping[str, Tensor]], dict[str, Any]]


def _cast(conditions: Mapping[str, Tensor], x: Tensor, *names: str) -> dict[str, Tensor]:
    """Those of the named conditions that are there; floating ones in the dtype of ``x``."""
    found = {n: conditions[n] for n in names if n in conditions}
    return {n: c.to(x.dtype) if c.is_floating_point() else c for n, c in found.items()}


def _dit(_: Denoiser, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"hidden_states": x, "timestep": time, **_cast(conditions, x, _LABELS)}


def _unet(_: Denoiser, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"sample": x, "timestep": time, **_cast(conditions, x, _LABELS)}


def _unet_text(_: Denoiser, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
    added = _cast(conditions, x, "text_embeds", "time_ids")
    text = _cast(conditions, x, _TEXT, "encoder_attention_mask")
    return {"sample": x, "timestep": time, "added_cond_kwargs": added or None, **text}


def _pixart(denoiser: Denoiser, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
    """Models with size conditions get the sample's own size in pixels unless it is among the conditions."""
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if denoiser.model.use_additional_conditions:
        height, width = (side * PIXELS_PER_LATENT for side in x.shape[-2:])
        added["resolution"] = x.new_tensor([[height, width]]).expand(len(x), 2)
        added["aspect_ratio"] = x.new_tensor([[height / width]]).expand(len(x), 1)
        added |= _cast(conditions, x, "resolution", "aspect_ratio")
    text = _cast(conditions, x, _TEXT, "encoder_attention_mask")
    return {"hidden_states": x, "timestep": time, "added_cond_kwargs": added, **text}


def _sd3(_: Denoiser, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"hidden_states": x, "timestep": time, **_cast(conditions, x, _TEXT, _POOLED)}


def _flux(denoiser: Denoiser, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
    """Patches of 2x2 latents are tokens; positions are made here. The model counts time up to 1."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    ids = x.new_zeros(height, width, 3)
    ids[..., 1] += torch.arange(height, device=x.device)[:, None]
    ids[..., 2] += torch.arange(width, device=x.device)
    text = _cast(conditions, x, _TEXT, _POOLED)
    guidance = None
    if denoiser.config.guidance_embeds:
        given = conditions.get("guidance")
        guidance = torch.full_like(time, EMBEDDED_GUIDANCE) if given is None else given.float()
    return {
        "hidden_states": _pack(x), "timestep": time.to(x.dtype) / 1000, "guidance": guidance,
        "img_ids": ids.flatten(0, 1), "txt_ids": x.new_zeros(text[_TEXT].shape[1], 3), **text,
    }  # fmt: skip


_ARGUMENTS: dict[str, Arguments] = {
    "dit": _dit, "unet": _unet, "unet-text": _unet_text, "pixart": _pixart, "sd3": _sd3, "flux": _flux,
}  # fmt: skip


def _pack(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, (H / 2) (W / 2), 4 C]."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def _unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``_pack`` for samples of this size."""
    b, _, features = tokens.shape
    x = tokens.view(b, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, features // 4, height, width)
