"""Fashion-MNIST as tensors, from Debian's package ``dataset-fashion-mnist`` or a folder with its files."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip


def load(split: str, folder: Path = FOLDER) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 1, 28, 28) float32 in [-1, 1] and labels (n,) int64; ``split`` is ``train`` or ``test``.

    Raises ``SystemExit`` with the remedy when the files are not there.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    names = (folder / f"{prefix}-images-idx3-ubyte.gz", folder / f"{prefix}-labels-idx1-ubyte.gz")
    missing = [n for n in names if not n.is_file()]
    if missing:
        raise SystemExit(
            f"Fashion-MNIST is not in {folder}: install Debian's package dataset-fashion-mnist, or set "
            "FASHION_MNIST to a folder with the four *-ubyte.gz files of the data set"
        )
    images = np.frombuffer(gzip.decompress(names[0].read_bytes()), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = np.frombuffer(gzip.decompress(names[1].read_bytes()), np.uint8, offset=8)
    return torch.from_numpy(images.copy()).float() / 127.5 - 1, torch.from_numpy(labels.astype(np.int64))
