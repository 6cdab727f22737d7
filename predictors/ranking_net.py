"""A small recurrent network that orders candidates, several of them at once. Torch is loaded when it trains.

Each step is embedded by a linear layer, a gated recurrent unit (Cho et al., arXiv 1406.1078) reads the steps
in their order, its normalised states are averaged (as in OMS-DPM, arXiv 2306.08860) and a small head makes
one score of that, of the last state and of the features of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autocomp.predictors.sequence import Sequences

if TYPE_CHECKING:
    from torch import Generator, Tensor

Floats = NDArray[np.float64]
_CLIP = 5.0
"""Standard deviations to which the features of a whole are cut."""


@dataclass(frozen=True)
class Training:
    """How the networks are trained.

    Attributes:
        members: networks; each leaves out one part of the trials, so that all are predicted unseen.
        width: of the embedding and the recurrent state.
        epochs: steps of Adam, on all trials or on ``batch`` random ones; 20 or more.
        rate, decay: learning rate (warmed up, then falling to 0) and weight decay.
        regression: weight of the squared error beside the pairwise loss.
        seed: of the weights and the batches.
    """

    members: int = 5
    width: int = 32
    epochs: int = 200
    batch: int = 256
    rate: float = 1e-2
    decay: float = 1e-2
    regression: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.members < 2 or self.epochs < 20:
            raise ValueError(f"need members >= 2 and epochs >= 20; got {self.members} and {self.epochs}")


@dataclass(frozen=True)
class Networks:
    """Trained members: weights with a leading axis of members, and how features are scaled.

    Scores are ``prior + network``, in units of the target.
    """

    weights: Mapping[str, Tensor]
    step_scale: tuple[Floats, Floats]
    whole_scale: tuple[Floats, Floats]

    def __call__(self, data: Sequences, prior: Floats) -> Floats:
        """Scores ``[members, n]``."""
        import torch

        with torch.no_grad():
            weights = {k: v.double() for k, v in self.weights.items()}
            inputs = [torch.from_numpy(x) for x in self._scaled(data)]
            found: Floats = (_forward(weights, *inputs) + torch.from_numpy(prior)).numpy()
        return found

    def _scaled(self, data: Sequences) -> tuple[Floats, Floats, Floats]:
        (m, s), (wm, ws) = self.step_scale, self.whole_scale
        used = data.used.astype(np.float64)
        steps = (data.steps - m) / s * used[:, :, None]
        return steps, used, np.clip((data.whole - wm) / ws, -_CLIP, _CLIP)


def train(
    data: Sequences, target: Floats, errors: Floats, prior: Floats, parts: NDArray[np.intp], how: Training
) -> Networks:
    """Fit ``how.members`` networks to the order of ``target``.

    Args:
        target: what is to be ordered, ``[n]``, of about unit variance.
        errors: its standard errors; a pair counts when it differs by more than its own.
        prior: scores to start from, ``[n]``, in the target's unit.
        parts: the part of each trial, ``[n]``; member ``k`` does not see part ``k``.
    """
    import torch

    generator = torch.Generator().manual_seed(how.seed)
    steps = data.steps[data.used] if data.used.any() else np.zeros((1, data.steps.shape[2]))
    networks = Networks({}, _scale(steps), _scale(data.whole))
    inputs = [torch.from_numpy(x).float() for x in networks._scaled(data)]
    weights = _start(data.steps.shape[2], data.whole.shape[1], how, generator)
    y, noise, base = (torch.from_numpy(x).float() for x in (target, errors, prior))
    seen = torch.from_numpy(parts[None] != np.arange(how.members)[:, None]).float()
    optimizer = torch.optim.AdamW(weights.values(), how.rate, weight_decay=how.decay)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.rate, total_steps=how.epochs, pct_start=0.1)
    for _ in range(how.epochs):
        rows = torch.arange(len(y))
        if len(y) > how.batch:
            rows = torch.randperm(len(y), generator=generator)[: how.batch]
        scores = _forward(weights, *(x[rows] for x in inputs)) + base[rows]
        loss = _loss(scores, y[rows], noise[rows], seen[:, rows], how.regression)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pace.step()
    return Networks({k: v.detach() for k, v in weights.items()}, networks.step_scale, networks.whole_scale)


def _scale(features: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each column; 1 where it does not vary."""
    spread = features.std(axis=0)
    return features.mean(axis=0), np.where(spread > 1e-6, spread, 1.0)


def _loss(scores: Tensor, y: Tensor, noise: Tensor, seen: Tensor, regression: float) -> Tensor:
    """Sum over members of the logistic loss of pairs (RankNet), each member's mean over the pairs it sees."""
    from torch.nn.functional import softplus

    gap = y[:, None] - y[None]
    clear = (gap > (noise[:, None].square() + noise[None].square()).sqrt()).to(y.dtype)
    pairs = clear * seen[:, :, None] * seen[:, None, :]
    share = pairs / pairs.sum((1, 2), keepdim=True).clamp_min(1.0)
    loss = (softplus(-2.0 * (scores[:, :, None] - scores[:, None, :])) * share).sum()
    if regression:
        errors = (scores - y.clamp(-3.0, 3.0)).square() * seen
        loss = loss + regression * (errors.sum(1) / seen.sum(1).clamp_min(1.0)).sum()
    return loss


def _start(features: int, whole: int, how: Training, generator: Generator) -> dict[str, Tensor]:
    """Random weights; the head's last layer starts small, so that scores start at the prior."""
    import torch

    width, members = how.width, how.members
    shapes = {
        "embed": (features, width), "input": (width, 3 * width), "state": (width, 3 * width),
        "head": (2 * width + whole, width), "score": (width, 1),
    }  # fmt: skip
    weights = {}
    for name, (fan, out) in shapes.items():
        size = (0.3 if name == "score" else 1.0) / math.sqrt(max(fan, 1))
        weights[name] = size * torch.randn(members, fan, out, generator=generator)
        if name not in ("state", "score"):
            weights[f"{name}_bias"] = torch.zeros(members, 1, out)
    return {k: v.requires_grad_() for k, v in weights.items()}


def _forward(weights: Mapping[str, Tensor], steps: Tensor, used: Tensor, whole: Tensor) -> Tensor:
    """Scores ``[members, n]`` of ``steps [n, l, f]``, ``used [n, l]`` and ``whole [n, g]``."""
    import torch
    from torch.nn.functional import normalize, silu

    w = weights
    (n, length, features), (members, _, width) = steps.shape, w["embed"].shape
    flat = steps.reshape(1, n * length, features).expand(members, -1, -1)
    given = silu(flat @ w["embed"] + w["embed_bias"]) @ w["input"] + w["input_bias"]
    given = given.view(members, n, length, 3 * width)
    state = steps.new_zeros(members, n, width)
    total = steps.new_zeros(members, n, width)
    for i in range(length):
        own, there = state @ w["state"], used[None, :, i, None]
        gates = torch.sigmoid(given[:, :, i, : 2 * width] + own[..., : 2 * width])
        fresh = torch.tanh(given[:, :, i, 2 * width :] + gates[..., :width] * own[..., 2 * width :])
        state = state + there * (1.0 - gates[..., width:]) * (fresh - state)
        total = total + there * normalize(state, dim=-1)
    pooled = torch.cat([normalize(total, dim=-1), state, whole[None].expand(members, -1, -1)], dim=2)
    hidden = silu(pooled @ w["head"] + w["head_bias"])
    return (hidden @ w["score"])[..., 0]
