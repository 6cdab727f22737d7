"""The trained model, the classifier and the real images, for scripts that sample many schedules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

from autocomp.diffusion.denoiser import Denoiser
from autocomp.diffusion.sampler import Sampler
from autocomp.diffusion.schedule import Schedule
from autocomp.measure.images import gaussian
from autocomp.quantize.rounding import quantize
from autocomp.quantize.scheme import Scheme
from autocomp.workloads.diffusion_images import Extractor, read_real, sample_noise

GUIDANCE = 1.2
CLASSES = 10


class Lab:
    """Samples images with any schedule and any weight scheme, always from the same noise and labels.

    Args:
        folder: with the trained model ``size``, ``classifier`` and ``real.npz``.
        weights: label of a scheme for every linear layer of the transformer blocks, ``w16`` for none.
    """

    def __init__(self, folder: Path, size: str, weights: str = "w16") -> None:
        path = folder / size / "transformer"
        model = (
            DiTTransformer2DModel.from_pretrained(path, torch_dtype=torch.float32)
            .eval()
            .requires_grad_(False)
        )
        self.config = dict(DDPMScheduler.from_pretrained(folder / size / "scheduler").config)
        self.extractor = Extractor(str(folder / "classifier"), "cpu")
        self.real = gaussian(self.extractor.features(read_real(str(folder / "real.npz")), 250))
        self.model = model
        self._linears = {
            n: m for n, m in model.transformer_blocks.named_modules() if isinstance(m, torch.nn.Linear)
        }
        self._originals = {n: m.weight.detach().clone() for n, m in self._linears.items()}
        self.denoiser = Denoiser(model)
        self.weigh(weights)

    def weigh(self, weights: str) -> None:
        """Put the values of a scheme into the linear layers, from the original ones."""
        scheme = Scheme.parse(weights)
        for name, module in self._linears.items():
            original = self._originals[name]
            rounded = original if scheme.is_dense else quantize(original, scheme, method="mse").dequantize()
            module.weight.data.copy_(rounded)

    def sample(
        self, schedule: Schedule, images: int | Sequence[int], batch: int = 250
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features ``[images, d]`` and whether the classifier sees the label, ``[images]``; of the first
        ``images`` samples, or of those with the given numbers."""
        sampler = Sampler({"": self.denoiser}, self.config, schedule, GUIDANCE)
        rows, right = [], []
        chosen = list(range(images)) if isinstance(images, int) else list(images)
        for index in (chosen[i : i + batch] for i in range(0, len(chosen), batch)):
            noise, labels = (
                sample_noise(0, "proxy", index, (1, *self.denoiser.size)),
                torch.tensor(index) % CLASSES,
            )
            with torch.autocast("cpu", torch.bfloat16):  # halves the time; the distance moves by a thousandth
                made = sampler(noise, {"class_labels": labels})
            features, logits = self.extractor(made.float().clamp(-1, 1))
            rows.append(features.numpy())
            right.append((logits.argmax(1) == labels).numpy())
        return np.concatenate(rows), np.concatenate(right)
