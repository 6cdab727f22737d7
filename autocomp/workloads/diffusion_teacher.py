"""What the uncompressed diffusion model did: its images, and its calls on calibration trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from autocomp.measure.images import ratio_estimate
from autocomp.trial import Estimate

if TYPE_CHECKING:
    from autocomp.diffusion.denoiser import Denoiser
    from autocomp.diffusion.state import SamplingState


@dataclass
class Teacher:
    """The uncompressed model on the first ``count`` samples of a split.

    Attributes:
        images: float32 batches ``[b, C, H, W]`` in [-1, 1] on the CPU, of as many samples as fit.
        features: float32 batches ``[b, d]`` of all samples; none without an extractor.
        chances: class probabilities float32 ``[b, classes]``, likewise.
    """

    count: int = 0
    images: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    chances: list[Tensor] = field(default_factory=list)
    kept: int = 0

    def add(self, images: Tensor, seen: tuple[Tensor, Tensor] | None, room: int) -> None:
        """Append a batch; of images, only until ``room`` are kept."""
        self.count += len(images)
        few = images[: max(0, room - self.kept)].cpu()
        if len(few):
            self.images.append(few)
            self.kept += len(few)
        if seen is not None:
            self.features.append(seen[0].cpu())
            self.chances.append(seen[1].softmax(1).cpu())

    def image_rows(self, start: int, end: int) -> Tensor:
        """Those of the images ``start`` to ``end`` (exclusive) that are kept."""
        return _rows(self.images, start, min(end, self.kept))

    def chance_rows(self, start: int, end: int) -> Tensor:
        """Class probabilities of the images ``start`` to ``end`` (exclusive)."""
        return _rows(self.chances, start, end)

    def feature_rows(self, n: int) -> np.ndarray:
        """Features of the first ``n`` samples, float32 ``[n, d]``."""
        found: np.ndarray = _rows(self.features, 0, n).numpy()
        return found


def _rows(batches: list[Tensor], start: int, end: int) -> Tensor:
    if len(batches) > 1:  # joined once, not at every look
        batches[:] = [torch.cat(batches)]
    return batches[0][start : max(start, end)] if batches else torch.empty(0)


@dataclass(frozen=True)
class Call:
    """One call of the uncompressed model while it sampled.

    Attributes:
        state: where the sampling was.
        x, output: ``[b, C, H, W]``, b twice the images of a guided step.
        model_time: the model's timestep argument.
        conditions: the condition tensors that it got.
    """

    state: SamplingState
    x: Tensor
    model_time: float
    conditions: Mapping[str, Tensor]
    output: Tensor


class Trajectories:
    """The uncompressed model's calls on calibration images, by batch and in the order of steps."""

    def __init__(self) -> None:
        self.batches: list[list[Call]] = []

    def begin(self) -> None:
        """What is observed from here on belongs to the next batch."""
        self.batches.append([])

    def observe(
        self, state: SamplingState, x: Tensor, model_time: float, conditions: Mapping[str, Tensor],
        output: Tensor,
    ) -> None:  # fmt: skip
        """Keep one call; an observer of ``Sampler``. Calls of a batch share the condition tensors."""
        self.batches[-1].append(Call(replace(state), x.clone(), model_time, dict(conditions), output.clone()))

    def noise(self, denoiser: Denoiser, images: int = 0) -> Estimate:
        """Noise power that the model as it is adds to its output, as a share of the output's own power:
        ``sum |y' - y|^2 / sum |y|^2`` over all calls of the first ``images`` images (0: all), each with the
        input that the uncompressed model had then. ``-10 log10`` of it is the SQNR in dB. The output of a
        guided step is what guidance makes of its halves: an error of the unconditional one counts by
        ``(scale - 1)^2``, next to nothing at small scales.

        The calls of a batch are made in the order of steps, so that what a model keeps from step to step is
        what it would keep while sampling.
        """
        above, below = [], []
        left = images or sum(_images(calls) for calls in self.batches)
        for calls in self.batches:
            n = _images(calls)
            if left <= 0 or not n:
                break
            powers = replay(denoiser, calls, min(n, left))
            above.append(powers[0])
            below.append(powers[1])
            left -= n
        return ratio_estimate(torch.cat(above).numpy(), torch.cat(below).numpy())


def replay(denoiser: Denoiser, calls: Sequence[Call], images: int) -> tuple[Tensor, Tensor]:
    """Power of the difference to the recorded outputs and of these, float64 ``[images]`` each."""
    total = torch.zeros(2, images, dtype=torch.float64)
    state = denoiser.state
    state.started += 1
    with torch.inference_mode():
        for call in calls:
            state.index, state.time, state.total = call.state.index, call.state.time, call.state.total
            state.guided, state.scale = call.state.guided, call.state.scale
            state.model = call.state.model
            output = state.combined(denoiser(call.x, call.model_time, call.conditions))
            recorded = state.combined(call.output)
            for row, values in enumerate((output - recorded, recorded)):
                total[row] += values.double().square().flatten(1).sum(1).cpu()[:images]
    return total[0], total[1]


def _images(calls: Sequence[Call]) -> int:
    return len(calls[0].x) // (2 if calls[0].state.guided else 1) if calls else 0
