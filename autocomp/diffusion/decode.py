"""From what a sampling gives to images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def decode(vae: nn.Module | None, samples: Tensor) -> Tensor:
    """Images ``[B, C, H, W]`` in [-1, 1] of a sampler's samples; with a VAE these are its scaled latents.

    Raises:
        FloatingPointError: the VAE gives NaN or infinity.
    """
    if vae is not None:
        coder: Any = vae
        shift = getattr(coder.config, "shift_factor", None) or 0.0
        with torch.inference_mode():
            scaled = samples / coder.config.scaling_factor + shift
            samples = coder.decode(scaled.to(coder.dtype), return_dict=False)[0].float()
        if not torch.isfinite(samples).all():
            raise FloatingPointError("the VAE gives NaN or infinity")
    return samples.clamp(-1.0, 1.0)
