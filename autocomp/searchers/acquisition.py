"""Expected hypervolume improvement of a pool, by Monte Carlo, picked as a batch.

Points are drawn uniformly in the box between the ideal and the reference point of the measured front; a
candidate improves the volume by the share of not yet dominated points that it dominates. The
expectation over its uncertain losses is a mean over a few quantiles. Objectives that span more than a
decade are taken as logarithms, so that a tenth of a small loss counts like a tenth of a large one.
(Expected hypervolume improvement: Emmerich, 2005; greedy batches as in Daulton, Balandat and Bakshy,
NeurIPS 2020, with the picks' medians in place of joint samples.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocomp.pareto import non_dominated

Floats = NDArray[np.float64]

_SAMPLES = 4096
_QUANTILES = (-1.15, -0.32, 0.32, 1.15)
"""Normal quantiles at 1/8, 3/8, 5/8, 7/8: four equally likely outcomes."""


@dataclass(frozen=True)
class Scene:
    """What is measured and what might be, all losses.

    Attributes:
        measured: ``[k, m]``, at least one row, finite.
        mean: predicted losses of the pool ``[n, m]``.
        std: their standard deviations ``[n, m]``.
        chance: probability ``[n]`` that a candidate meets the constraints.
        pending: predicted losses ``[p, m]`` of what is being measured.
    """

    measured: Floats
    mean: Floats
    std: Floats
    chance: Floats
    pending: Floats


class Improvement:
    """What candidates would add to the volume of a measured front, by points drawn in its box.

    Args:
        measured: losses ``[k, m]``, at least one row, finite.
        promised: predicted losses ``[n, m]`` of candidates, which the box is to hold as well.
        rng: draws the points.
    """

    def __init__(self, measured: Floats, promised: Floats, rng: np.random.Generator) -> None:
        front = measured[non_dominated(measured)]
        low, high = _box(front, promised)
        self.transform = _Transform(np.vstack([front, low[None], high[None]]))
        bottom, top = self.transform(low[None])[0], self.transform(high[None])[0]
        self.points = bottom + (top - bottom) * rng.random((_SAMPLES, len(low)))
        self.take(front)

    def take(self, losses: Floats) -> None:
        """Leave out the points that ``losses [k, m]`` cover, as if they had been measured."""
        self.points = self.points[~_covered(self.points, self.transform(losses))]

    def covers(self, mean: Floats, std: Floats) -> list[NDArray[np.bool_]]:
        """Which of the points each candidate covers, ``[n, points]``, for equally likely outcomes."""
        outcomes = [self.transform.outcome(mean, std, q) for q in _QUANTILES]
        return [_covers(self.points, losses) for losses in outcomes]

    def expected(self, mean: Floats, std: Floats) -> Floats:
        """Expected number of points ``[n]`` that candidates with these losses ``[n, m]`` cover."""
        return np.asarray(np.mean([g.sum(axis=1) for g in self.covers(mean, std)], axis=0))


def pick_batch(scene: Scene, n: int, rng: np.random.Generator) -> list[int]:
    """Indices of up to ``n`` pool members, best first; ties go to the earlier member."""
    improvement = Improvement(scene.measured, scene.mean, rng)
    improvement.take(scene.pending)
    gains = improvement.covers(scene.mean, scene.std)
    middle = _covers(improvement.points, improvement.transform(scene.mean))
    open_points = np.ones(len(improvement.points), dtype=bool)
    left = np.ones(len(scene.mean), dtype=bool)
    order: list[int] = []
    while len(order) < n and left.any():
        counts = sum((g[:, open_points].sum(axis=1) for g in gains), np.zeros(len(left)))
        # A pool that promises nothing is still ordered: by the chance of being feasible, then position.
        score = np.where(left, (counts / len(gains) + 1e-6) * scene.chance, -1.0)
        best = int(np.argmax(score))
        order.append(best)
        left[best] = False
        open_points &= ~middle[best]
    return order


def _box(front: Floats, mean: Floats) -> tuple[Floats, Floats]:
    """Corners of the volume: a little beyond the measured front and the one that the pool promises, whose
    ends may lie beyond all that was measured."""
    finite = mean[np.isfinite(mean).all(axis=1)]
    best, worst = front.min(axis=0), front.max(axis=0)
    if len(finite):
        promised = finite[non_dominated(finite)]
        best, worst = np.minimum(best, promised.min(axis=0)), np.maximum(worst, promised.max(axis=0))
    width = np.where(worst > best, worst - best, np.maximum(np.abs(worst), 1e-12))
    return np.where(
        best > 0, np.maximum(best - 0.1 * width, 0.8 * best), best - 0.1 * width
    ), worst + 0.1 * width


class _Transform:
    """Logarithm for objectives that are positive and span more than a decade, identity for others."""

    def __init__(self, rows: Floats) -> None:
        low, high = rows.min(axis=0), rows.max(axis=0)
        self.log = (low > 0) & (high > 10.0 * low)
        self.floor = np.where(self.log, 1e-3 * low, -np.inf)

    def __call__(self, losses: Floats) -> Floats:
        clipped = np.maximum(losses, self.floor)
        return np.where(self.log, np.log(np.where(self.log, clipped, 1.0)), losses)

    def outcome(self, mean: Floats, std: Floats, quantile: float) -> Floats:
        """Transformed losses at a normal quantile: of the logarithm where that is what counts. (A loss of
        0.3 ± 0.3 is not, in one case of eight, next to nothing.)"""
        relative = std / np.maximum(mean, np.where(self.log, self.floor, 1.0))
        spread = np.sqrt(np.log1p(np.where(self.log, relative, 0.0) ** 2))
        return self(np.where(self.log, mean, mean + quantile * std)) + quantile * spread


def _covers(points: Floats, losses: Floats) -> NDArray[np.bool_]:
    """``[n, samples]``: whether row ``i`` of ``losses [n, m]`` is nowhere worse than a point."""
    found = np.ones((len(losses), len(points)), dtype=bool)
    for j in range(points.shape[1]):
        found &= losses[:, j, None] <= points[None, :, j]
    return found


def _covered(points: Floats, losses: Floats) -> NDArray[np.bool_]:
    return np.asarray(_covers(points, losses).any(axis=0))
