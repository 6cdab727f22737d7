"""What a schedule does to Gaussian classes, for which all is known: it tells schedules apart unmeasured.

Data of one class are normal with mean m and variance v, those of all classes have mean 0 and variance
v + m^2. One number stands for a direction in image space: a small v for details, a large one for coarse
structure, m for what sets the class apart. The perfect model is then linear, and so is every solver, guidance
included: a sampler turns noise z into ``a z + b``. True is ``sqrt(v) z + m``; how far off a and b are, over a
range of v and m, is the discretisation error (and the push of guidance) of that schedule without any model.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from autocomp.diffusion.noise import NoiseSchedule
from autocomp.diffusion.schedule import Schedule
from autocomp.diffusion.solver import History, plan

Floats = NDArray[np.float64]

VARIANCES = np.logspace(-4.0, 1.5, 16)
"""Of images scaled to [-1, 1]: from a thousandth of the range up to what hundreds of pixels share."""
CLASSES = tuple((v, r * v**0.5) for v in np.logspace(-3.0, 1.0, 8) for r in (1.0, 3.0))
"""Variances and means of classes that lie one and three standard deviations from the middle."""
SCALE = 1.5
"""Of guidance, where a schedule guides: which steps do so matters here, not how much."""
LEVELS = (-np.inf, -2.5, -1.0, 0.0, 1.0, 2.5, np.inf)
"""Bounds of bands of half log-SNR in which steps are counted."""
_FLOOR, _LARGE = 1e-3, 1e6


def response(
    noise: NoiseSchedule, schedule: Schedule, variances: Floats, means: Floats, guidance: float = SCALE
) -> tuple[Floats, Floats]:
    """How a schedule spreads and centres Gaussian classes.

    Args:
        variances, means: of the classes, ``[n]``; variances above 0.
        guidance: scale at the steps that are guided.

    Returns:
        a and b, ``[n]`` each: noise z becomes ``a z + b``; ``sqrt(variances)`` and ``means`` would be exact
        without guidance. Which model a step calls plays no part.
    """
    v, m = torch.from_numpy(variances), torch.from_numpy(means)
    whole, one = v + m * m, torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    x, history = torch.stack([torch.ones_like(v), torch.zeros_like(v)]), History()
    for step, move in zip(schedule.steps, plan(noise, schedule), strict=True):
        alpha, sigma = noise.alpha(step.time), noise.sigma(step.time)
        clean = (alpha * v * x + sigma**2 * m * one) / (alpha**2 * v + sigma**2)
        if step.guidance:
            free = alpha * whole * x / (alpha**2 * whole + sigma**2)
            clean = free + guidance * (clean - free)
        x = history.move(move, x, _output(noise, step.time, x, clean))
    return x[0].numpy(), x[1].numpy()


def _output(noise: NoiseSchedule, time: float, x: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """What a model of this kind of prediction returns at ``x`` when it means the image ``clean``."""
    (a, b), (c, d) = noise.clean(time), noise.noise(time)
    if abs(b) > abs(d):
        return (clean - a * x) / b
    rest = (x - noise.alpha(time) * clean) / noise.sigma(time)
    return (rest - c * x) / d


def traits(noise: NoiseSchedule, schedule: Schedule, *, guided: bool = True) -> list[float]:
    """Features for a predictor: spread and centre of Gaussian classes, and where steps and guidance lie.

    ``guided`` is false for a model that is never guided.
    """
    scale = SCALE if guided else 1.0
    plain, _ = response(noise, schedule, VARIANCES, np.zeros_like(VARIANCES), scale)
    v, m = (np.array(column) for column in zip(*CLASSES, strict=True))
    spread, centre = response(noise, schedule, v, m, scale)
    features = [*_both(plain / np.sqrt(VARIANCES)), *_both(spread / np.sqrt(v)), *_curve(centre / m)]
    return [*map(float, features), *_places(noise, schedule)]


def _curve(gains: Floats) -> Floats:
    bounded = np.clip(np.nan_to_num(gains, nan=_LARGE), -_LARGE, _LARGE)
    return np.asarray(np.sign(bounded) * np.log1p(np.abs(bounded)))


def _both(gains: Floats) -> Floats:
    """Gains on a scale that is linear around 0 and keeps the sign, and on one that tells small ones apart."""
    bounded = np.clip(np.nan_to_num(np.abs(gains), nan=_LARGE), 0.0, _LARGE)
    return np.concatenate([_curve(gains), np.log(bounded + _FLOOR)])


def _places(noise: NoiseSchedule, schedule: Schedule) -> list[float]:
    """Steps, guided ones, first and last time; steps and guided steps in bands of half log-SNR."""
    steps = schedule.steps
    found = [len(steps), sum(s.guidance for s in steps), steps[0].time, steps[-1].time]
    levels = [(noise.half_log_snr(s.time), s.guidance) for s in steps]
    for low, high in pairwise(LEVELS):
        inside = [g for level, g in levels if low <= level < high]
        found += [len(inside), sum(inside)]
    return [float(x) for x in found]
