"""Write the real images that generated ones are compared with: 10,000 of the training set, in one file."""

from __future__ import annotations

import argparse
from pathlib import Path

import data
import numpy as np

COUNT = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/real.npz"))
    args = parser.parse_args()
    images, labels = data.load("train")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pixels = ((images[:COUNT, 0] + 1) * 127.5).round().numpy().astype(np.uint8)
    np.savez_compressed(args.out, images=pixels, labels=labels[:COUNT].numpy())


if __name__ == "__main__":
    main()
