"""Train one class-conditional DiT on Fashion-MNIST and save it as a diffusers folder.

Velocity prediction (arXiv 2202.00512; a small model's error in the noise would be blown up at the noisy end),
linear betas, a tenth of the labels dropped for classifier-free guidance. The saved model is
the exponential moving average; ``--snapshots`` also keeps raw checkpoints on the way (for LCSC).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import data
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

#: name -> (patch, width, heads, layers, batch, steps)
SIZES = {
    "tiny": (4, 64, 2, 1, 128, 3000),
    "small": (4, 64, 2, 3, 128, 5000),
    "medium": (4, 128, 4, 4, 128, 1000),
    "fine": (2, 64, 2, 4, 64, 2000),
}
EMA = 0.998
WARM_UP = 200


def build(size: str) -> DiTTransformer2DModel:
    patch, width, heads, layers, *_ = SIZES[size]
    return DiTTransformer2DModel(
        sample_size=28, patch_size=patch, in_channels=1, out_channels=1, norm_num_groups=1, num_layers=layers,
        num_attention_heads=heads, attention_head_dim=width // heads, num_embeds_ada_norm=len(data.CLASSES),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--out", type=Path, default=Path("checkpoints"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--snapshots", type=int, default=0, help="raw checkpoints over the last half")
    args = parser.parse_args()
    torch.manual_seed(0)
    batch, steps = SIZES[args.size][4], args.steps or SIZES[args.size][5]
    images, labels = data.load("train")
    model, noise = (
        build(args.size).train(),
        DDPMScheduler(num_train_timesteps=1000, prediction_type="v_prediction"),
    )
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0, betas=(0.9, 0.99))
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, WARM_UP)
    every = steps // 2 // args.snapshots if args.snapshots else 0
    start, losses = time.time(), []
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (batch,))
        clean, eps, t = images[rows], torch.randn(batch, 1, 28, 28), torch.randint(1000, (batch,))
        with torch.autocast("cpu", torch.bfloat16):
            guess = model(noise.add_noise(clean, eps, t), timestep=t, class_labels=labels[rows]).sample
        loss = (guess.float() - noise.get_velocity(clean, eps, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
        decay = min(EMA, step / (step + 10))
        with torch.no_grad():
            for kept, fresh in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(fresh, 1 - decay)
        losses.append(loss.item())
        if every and step > steps // 2 and (steps - step) % every == 0:
            copy.deepcopy(model).half().save_pretrained(args.out / f"{args.size}-snapshots" / f"{step:05d}")
        if step % 100 == 0:
            mean = sum(losses[-100:]) / 100
            print(f"{args.size} step {step}: loss {mean:.4f}, {time.time() - start:.0f} s", flush=True)
    folder = args.out / args.size
    average.half().save_pretrained(folder / "transformer")
    noise.save_pretrained(folder / "scheduler")
    record = {
        "steps": steps,
        "batch": batch,
        "seconds": round(time.time() - start),
        "loss": sum(losses[-200:]) / 200,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
