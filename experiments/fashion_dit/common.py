"""What the scripts here share: where things lie, noise and labels by seed, statistics of the real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from autocomp.measure.images import Gaussian, gaussian

HERE = Path(__file__).parent
CHECKPOINTS = HERE / "checkpoints"
CLASSES = 10


def noise_of(seeds: range) -> torch.Tensor:
    """Standard normal ``[n, 1, 28, 28]``; a seed always gives the same image's noise."""
    return torch.stack([torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(s)) for s in seeds])


def labels_of(seeds: range) -> torch.Tensor:
    return torch.tensor([s % CLASSES for s in seeds])


@torch.inference_mode()
def reference(extractor: Any) -> Gaussian:
    """Features' statistics of the real images."""
    pixels = torch.from_numpy(np.load(CHECKPOINTS / "real.npz")["images"]).float()[:, None] / 127.5 - 1
    return gaussian(
        np.concatenate([extractor.resnet(x).pooler_output.flatten(1).numpy() for x in pixels.split(500)])
    )
