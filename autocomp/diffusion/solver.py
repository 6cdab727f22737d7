"""One multistep formula for DDIM, DPM-Solver(++), UniPC and what lies between, as in USF (arXiv 2312.07243).

In half log-SNR l, with h the step from l_s to l_t, both forms of the diffusion ODE are linear plus a model
term, expanded in powers of h with derivatives f^(k) at l_s:

    data:   x_t = (sigma_t / sigma_s) x_s + alpha_t sum_k h^(k+1) phi_(k+1)(-h) f^(k),  f the clean image
    noise:  x_t = (alpha_t / alpha_s) x_s - sigma_t sum_k h^(k+1) phi_(k+1)(h)  f^(k),  f the noise

with phi_1(z) = (e^z - 1) / z and phi_(k+1)(z) = (phi_k(z) - 1/k!) / z. The derivatives are those of the
polynomial through the last outputs of the model, and for the corrector through the next one too (UniPC,
arXiv 2302.04867, whose B(h) cancels from three outputs on). With two outputs phi_2 is replaced by phi_1 / 2,
as in DPM-Solver++(2M) (arXiv 2211.01095) and UniPC-B2.

The clean image and the noise are linear in what the model returned and the sample that it got, so an update
is one linear combination of these. Its coefficients depend on the schedule only: ``plan`` computes them
once, as Python floats.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autocomp.diffusion.noise import NoiseSchedule
from autocomp.diffusion.schedule import MAX_ORDER, Schedule, Step

#: outputs that a corrector of the highest order reads
DEPTH = MAX_ORDER + 1


@dataclass(frozen=True)
class Update:
    """``base * x + sum_j samples[j] * x_j + outputs[j] * o_j``: x is where the step starts (corrected, if it
    was), x_j the sample that the model got j calls ago and o_j what it returned."""

    base: float
    samples: tuple[float, ...]
    outputs: tuple[float, ...]


@dataclass(frozen=True)
class Move:
    """What follows a model call: maybe the start of this step is corrected, then the next one is predicted.

    ``correct`` reads as base the (corrected) start of the step before.
    """

    advance: Update
    correct: Update | None = None


def phi(k: int, z: float) -> float:
    """phi_k(z), k >= 1, of the exponential integrators; by its series where the recursion would cancel."""
    if abs(z) < 1.0:
        return sum(z**n / math.factorial(n + k) for n in range(20))
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1.0 / math.factorial(j)) / z
    return value


def plan(noise: NoiseSchedule, schedule: Schedule) -> tuple[Move, ...]:
    """One ``Move`` for each step of the schedule: all that a sampler has to know about the solver."""
    steps, moves = schedule.steps, []
    for i, step in enumerate(steps):
        times = [s.time for s in steps[max(0, i + 1 - DEPTH) : i + 1]][::-1]
        advance = update(noise, step, times, steps[i + 1].time if i + 1 < len(steps) else schedule.end)
        if i and steps[i - 1].corrector:
            moves.append(Move(advance, update(noise, steps[i - 1], times, step.time, corrector=True)))
        else:  # the step starts from the sample that the model gets
            first = advance.samples[0] + advance.base
            moves.append(Move(Update(0.0, (first, *advance.samples[1:]), advance.outputs)))
    return tuple(moves)


def update(
    noise: NoiseSchedule, step: Step, times: Sequence[float], end: float, *, corrector: bool = False
) -> Update:
    """The update to time ``end`` that a step names, from model calls at ``times``, newest first.

    A predictor starts at ``times[0]``; a corrector at ``times[1]``, and also reads the call at ``times[0]``,
    which is ``end``. The order falls to the number of calls that there have been, those at infinite half
    log-SNR (a flow's pure noise) not counted; where the step is infinite in half log-SNR it falls to 1.
    """
    start = 1 if corrector else 0
    here, there = noise.half_log_snr(times[start]), noise.half_log_snr(end)
    snrs = [noise.half_log_snr(t) for t in times[: start + step.order]]
    h = there - here
    # Order 1 is one formula for both predictions: the data form has no pole where a flow is pure noise.
    data = step.prediction == "data" or math.isinf(h) or (step.order == 1 and not corrector)
    others = {j: 1.0 if j < start else (s - here) / h for j, s in enumerate(snrs) if j != start}
    others = {j: r for j, r in others.items() if r == 1.0 or (math.isfinite(r) and math.isfinite(h))}
    inner, differences = _weights(-h if data else h, list(others.values()))
    relax = 1.0 + step.relax * h if math.isfinite(h) else 1.0
    scale = noise.alpha(end) if data else noise.sigma(end)
    weights = [0.0] * len(snrs)
    weights[start] = scale * inner
    for j, weight in zip(others, differences, strict=True):
        weights[j] += scale * relax * weight
        weights[start] -= scale * relax * weight
    parts = [noise.clean(t) if data else noise.noise(t) for t in times[: len(snrs)]]
    if data:
        base = noise.sigma(end) / noise.sigma(times[start])
    else:
        base = noise.alpha(end) / noise.alpha(times[start])
    return Update(
        base,
        tuple(w * on_sample for w, (on_sample, _) in zip(weights, parts, strict=True)),
        tuple(w * on_output for w, (_, on_output) in zip(weights, parts, strict=True)),
    )


def _weights(z: float, offsets: Sequence[float]) -> tuple[float, list[float]]:
    """Weights of f at the start, and of its differences to f at each offset (in units of the step).

    ``z`` is -h for the data form and h for the noise form. They lack the factor in front of the form's sum,
    but have its sign.
    """
    sign = 1.0 if z < 0 else -1.0
    whole = sign * abs(math.expm1(z))
    if len(offsets) < 2:
        return whole, [0.5 * whole / r for r in offsets]
    orders = range(1, len(offsets) + 1)
    powers = np.array([[r ** (i - 1) for r in offsets] for i in orders])
    moments = np.array([math.factorial(i) * abs(z) * phi(i + 1, z) for i in orders])
    solved = np.linalg.solve(powers, moments)
    return whole, [sign * float(c) / r for c, r in zip(solved, offsets, strict=True)]


class History:
    """The last model calls of a sampling, and the two moves that use them."""

    def __init__(self) -> None:
        self._samples: deque[Tensor] = deque(maxlen=DEPTH)
        self._outputs: deque[Tensor] = deque(maxlen=DEPTH)
        self._start: Tensor | None = None

    def move(self, move: Move, sample: Tensor, output: Tensor) -> Tensor:
        """The sample at the next time, from the one that the model got and what it returned (same shapes).

        Computed in float32 (float64 for float64 samples); the result has the sample's dtype.
        """
        self._samples.appendleft(sample)
        self._outputs.appendleft(output)
        start = sample
        if move.correct is not None:
            assert self._start is not None
            start = self._combine(move.correct, self._start)
        self._start = start
        return self._combine(move.advance, start).to(sample.dtype)

    def _combine(self, update: Update, start: Tensor) -> Tensor:
        terms = [
            (update.base, start),
            *zip(update.samples, self._samples),
            *zip(update.outputs, self._outputs),
        ]
        terms = [(weight, x) for weight, x in terms if weight != 0.0]
        wide = torch.promote_types(start.dtype, torch.float32)
        total = terms[0][1].to(wide) * terms[0][0]
        for weight, x in terms[1:]:
            total.add_(x, alpha=weight)
        return total
