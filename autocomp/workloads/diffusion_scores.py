"""Scores of images against those of the uncompressed model and against their labels; images pass by once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from autocomp.measure.images import mean_estimate, mse, psnr, ssim
from autocomp.trial import Estimate
from autocomp.workloads.diffusion_images import Extractor
from autocomp.workloads.diffusion_teacher import Teacher

DRIFT = {"mse": mse, "psnr": psnr, "ssim": ssim}


def compare(
    pictures: Iterable[tuple[int, Tensor]], teacher: Teacher, extractor: Extractor | None,
    labels: Tensor | None,
) -> tuple[dict[str, Estimate], np.ndarray | None]:  # fmt: skip
    """Drift (``mse``, ``psnr``, ``ssim``) on the images that the teacher kept and, with an extractor,
    ``content`` of all; also their features float32 ``[n, d]``.

    Args:
        pictures: position of the first image, and images float32 ``[b, C, H, W]`` in [-1, 1].
        teacher: of the same samples.
        extractor: of features and classes.
        labels: classes that the images should be of, int64 ``[n]``; without them those of the teacher's.
    """
    rows: dict[str, list[Tensor]] = {}
    for first, images in pictures:
        here, end = images.cpu(), first + len(images)
        there = teacher.image_rows(first, end)
        found = {name: score(here[: len(there)], there) for name, score in DRIFT.items() if len(there)}
        if extractor is not None:
            features, logits = extractor(images)
            wanted = teacher.chance_rows(first, end).argmax(1) if labels is None else labels[first:end]
            found |= {"features": features.cpu(), "content": (logits.argmax(1).cpu() == wanted).float()}
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
    every = {name: torch.cat(values).numpy() for name, values in rows.items()}
    looked: np.ndarray | None = every.pop("features", None)
    return {name: mean_estimate(values) for name, values in every.items()}, looked


def content_loss(
    pictures: Iterable[tuple[int, Tensor]], teacher: Teacher, extractor: Extractor
) -> Estimate:  # fmt: skip
    """Mean total variation distance (0 to 1) between the classifier's probabilities of these images and of
    the teacher's."""
    moved = []
    for first, images in pictures:
        chances = extractor(images)[1].softmax(1).cpu()
        moved.append(0.5 * (chances - teacher.chance_rows(first, first + len(images))).abs().sum(1))
    return mean_estimate(torch.cat(moved).numpy())
