"""Train the feature extractor: a small ResNet classifier of Fashion-MNIST, saved as a transformers folder."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import data
import torch
from transformers import ResNetConfig, ResNetForImageClassification


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.inference_mode():
        found = torch.cat([model(x).logits.argmax(1) for x in images.split(500)])
    return (found == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/classifier"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = data.load("train")
    test = data.load("test")
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=32, hidden_sizes=[32, 64, 64], depths=[1, 1, 1],
            layer_type="basic", num_labels=len(data.CLASSES), id2label=dict(enumerate(data.CLASSES)),
        )
    )  # fmt: skip
    steps = args.epochs * (len(images) // args.batch)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    start, step = time.time(), 0
    for _ in range(args.epochs):
        model.train()
        for rows in torch.randperm(len(images))[: steps // args.epochs * args.batch].split(args.batch):
            loss = model(images[rows], labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
        print(
            f"step {step}: test accuracy {accuracy(model, *test):.4f}, {time.time() - start:.0f} s",
            flush=True,
        )
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
