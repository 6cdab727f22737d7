"""What a diffusion job samples from and compares with: noise, conditions, real images, a classifier."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocomp.errors import JobError
from autocomp.workloads.diffusion_discovery import UNREADABLE, quiet, read_json

LABELS = "class_labels"


def sample_noise(seed: int, split: str, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise float32 ``[n, *shape]`` on the CPU; a sample's depends on (seed, split, index)
    alone, so that every candidate, batch size and subset sees the same."""
    rows = []
    for index in indices:
        digest = hashlib.sha256(f"{seed}/{split}/{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.randn(*shape, generator=generator))
    return torch.stack(rows)


class Conditions:
    """Condition tensors of samples by index: class labels in turn, or the rows of a file in turn.

    Args:
        names: tensors that the model needs.
        file: ``.safetensors`` with one tensor each (rows first) and, for guidance, ``null_{name}``.
        classes: labels that there are; for models that need ``class_labels`` only.

    Raises:
        JobError: the file is missing, can't be read, or lacks a tensor.
    """

    def __init__(self, names: Sequence[str], file: str, classes: int = 0) -> None:
        self.classes = classes if tuple(names) == (LABELS,) and not file else 0
        self.rows: Mapping[str, Tensor] = {}
        self.null: Mapping[str, Tensor] = {}
        if names and not self.classes:
            if not file:
                raise JobError(
                    f"workload.conditions: this model needs the tensors {', '.join(names)} for every sample; "
                    "name a .safetensors file with them (rows first)"
                )
            tensors = _tensors(file)
            absent = [n for n in names if n not in tensors]
            if absent:
                raise JobError(
                    f"workload.conditions: {file} lacks {', '.join(absent)}; it has {sorted(tensors)}"
                )
            self.null = {n: t for n, t in tensors.items() if n.startswith("null_")}
            self.rows = {n: t for n, t in tensors.items() if n not in self.null}
        elif file:
            raise JobError("workload.conditions: this model takes no condition tensors; leave the file out")

    def of(self, indices: Sequence[int], device: str) -> dict[str, Tensor]:
        """Conditions of these samples, with the ``null_`` tensors."""
        rows = torch.as_tensor(list(indices))
        if self.classes:
            return {LABELS: (rows % self.classes).to(device)}
        found = {name: t[rows % len(t)].to(device) for name, t in self.rows.items()}
        return found | {name: t.to(device) for name, t in self.null.items()}

    def labels(self, indices: Sequence[int], classes: int) -> Tensor | None:
        """Labels int64 ``[n]`` of these samples; ``None`` when the model has none or not ``classes``."""
        same = self.classes and self.classes == classes
        return torch.as_tensor(list(indices)) % classes if same else None


def _tensors(file: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = Path(file).expanduser()
    if not path.is_file():
        raise JobError(f"workload.conditions: there is no file {file!r}")
    try:
        return load_file(path)
    except UNREADABLE as error:
        raise JobError(f"workload.conditions: {file} can't be read: {error}") from None


def read_real(file: str) -> Tensor:
    """Images of a ``.npz`` file as uint8 ``[n, C, H, W]``.

    Raises:
        JobError: no such file, no array ``images``, or one of another type or shape.
    """
    path = Path(file).expanduser()
    try:
        with np.load(path) as data:
            images = data["images"]
    except (OSError, ValueError, KeyError) as error:
        raise JobError(
            f"workload.data.real: {file!r} must be a .npz file with an array `images`: {error}"
        ) from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) < 2:
        raise JobError(
            "workload.data.real: `images` must be at least two of uint8 [n, H, W] or [n, H, W, C]; it is "
            f"{images.dtype} {images.shape}"
        )
    rows = torch.from_numpy(images)
    return rows[:, None] if rows.ndim == 3 else rows.permute(0, 3, 1, 2).contiguous()


def read_subset(file: str) -> list[int]:
    """Indices of samples from a ``.json`` file: a list, or a mapping with ``indices``.

    Raises:
        JobError: it can't be read, or holds something else.
    """
    try:
        data = json.loads(Path(file).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise JobError(f"workload.data.subset: {file!r} can't be read: {error}") from None
    indices = data.get("indices") if isinstance(data, dict) else data
    if not isinstance(indices, list) or not all(isinstance(i, int) and i >= 0 for i in indices):
        indices = []
    if len(indices) < 2 or len(set(indices)) != len(indices):
        raise JobError(
            f"workload.data.subset: {file} must hold two or more different indices of samples (a list, or a "
            "mapping with `indices`)"
        )
    return indices


class Extractor:
    """An image classifier of transformers as a feature extractor.

    Features are what enters its last linear layer with one output a class (a ResNet's pooled output, a
    ViT's class token). Images are brought to the channels and the size that it wants; where the folder has
    a ``preprocessor_config.json``, to its mean and standard deviation too, otherwise they stay in [-1, 1].

    Attributes:
        classes: number of labels.

    Raises:
        JobError: no such folder, no classifier in it, or one without such a layer.
    """

    def __init__(self, folder: str, device: str) -> None:
        from transformers import AutoModelForImageClassification

        path = Path(folder).expanduser()
        if not (path / "config.json").is_file():
            raise JobError(f"workload.features: {folder!r} is no folder with a config.json")
        try:
            with quiet():
                model, info = AutoModelForImageClassification.from_pretrained(
                    path, local_files_only=True, output_loading_info=True
                )
        except UNREADABLE as error:
            raise JobError(
                f"workload.features: {folder} can't be loaded as an image classifier: {error}"
            ) from error
        if info["missing_keys"]:
            raise JobError(
                f"workload.features: {folder} lacks the weights {sorted(info['missing_keys'])[:3]}"
            )
        self.model = model.to(device).eval().requires_grad_(False)
        self.classes = int(model.config.num_labels)
        self._head = _head(model, self.classes, folder)
        self._channels = int(getattr(model.config, "num_channels", 3))
        size = getattr(model.config, "image_size", None)
        self._size = (size, size) if isinstance(size, int) else size
        self._norm = _normalization(path, self._channels, device)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[n, d]`` and logits ``[n, classes]`` of images float32 ``[n, C, H, W]`` in [-1, 1]."""
        kept: list[Tensor] = []
        handle = self._head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        try:
            with torch.inference_mode():
                logits = self.model(pixel_values=self._prepared(images)).logits
        finally:
            handle.remove()
        return kept[0].flatten(1).float(), logits.float()

    def features(self, images: Tensor, batch: int) -> np.ndarray:
        """Features float32 ``[n, d]`` of images uint8 ``[n, C, H, W]``, some at a time."""
        device = self._norm[0].device
        rows = [self(part.to(device).float() / 127.5 - 1.0)[0].cpu() for part in images.split(batch)]
        return torch.cat(rows).numpy()

    def _prepared(self, images: Tensor) -> Tensor:
        if images.shape[1] != self._channels:
            if images.shape[1] != 1:
                raise JobError(
                    f"workload.features: the classifier reads images of {self._channels} channels; these "
                    f"have {images.shape[1]}"
                )
            images = images.expand(-1, self._channels, -1, -1)
        if self._size is not None and tuple(images.shape[-2:]) != tuple(self._size):
            images = nn.functional.interpolate(images, tuple(self._size), mode="bilinear", antialias=True)
        mean, std = self._norm
        return ((images + 1.0) / 2.0 - mean) / std


def _head(model: nn.Module, classes: int, folder: str) -> nn.Linear:
    """The last linear layer with one output a class."""
    found = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not found:
        raise JobError(
            f"workload.features: {folder} has no linear layer with {classes} outputs, whose input could "
            "serve as features"
        )
    return found[-1]


def _normalization(folder: Path, channels: int, device: str) -> tuple[Tensor, Tensor]:
    key = "workload.features"
    config: dict[str, Any] = read_json(folder / "preprocessor_config.json", key, missing_ok=True)
    mean, std = [0.5], [0.5]
    if config:
        plain = not config.get("do_normalize", True)
        mean = [0.0] if plain else config.get("image_mean") or mean
        std = [1.0] if plain else config.get("image_std") or std
    rows = [torch.tensor(v, device=device).expand(channels).view(-1, 1, 1) for v in (mean, std)]
    return rows[0], rows[1]
