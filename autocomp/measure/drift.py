"""Drift of a device: what repeated timings of one reference candidate say about its speed over time.

The logarithm of the reference's time is modelled as a random walk seen through noise (the local level
model: Durbin and Koopman, "Time Series Analysis by State Space Methods", 2nd edition, chapter 2), or as
one jump at the largest step. How far it goes and how much single timings scatter beyond their standard
errors are the values of the largest likelihood on a grid; going nowhere is one of them, so steady devices
stay uncorrected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

#: What the likelihood must gain (in nats) before steps of the reference count as drift and not as noise.
EVIDENCE = 3.0
#: Smallest change of speed that is worth a correction (0.01: one percent).
WORTHWHILE = 0.01
#: Fewest references that say anything about scatter or drift.
ENOUGH = 4
#: A single timing's scatter beyond its standard error: a percent on quiet machines, tens on shared ones.
TYPICAL_NOISE, NOISE_SPREAD = 0.01, 1.5
_NOISE = np.concatenate([[0.0], np.geomspace(1e-3, 0.5, 28)])
_WALK = np.concatenate([[0.0], np.geomspace(5e-3, 3.0, 24)])
_SMALLEST = 1e-12  # variance of a timing that claims to be exact


@dataclass(frozen=True)
class Curve:
    """The speed of a device over time, as log-times of the reference.

    Attributes:
        times: seconds, ascending; when the reference was timed.
        level: smoothed log-time of the reference at these times.
        variance: of ``level``.
        noise: scatter of single timings beyond their own standard errors, relative (0.02: two percent); the
            root of the mean square over what the references allow.
        evidence: gain of the log-likelihood by drift over none, in nats.
        dropped: references left out as spikes (slower than both neighbours, and by far).
    """

    times: Floats
    level: Floats
    variance: Floats
    noise: float
    evidence: float
    dropped: int = 0

    @property
    def drifts(self) -> bool:
        """Whether the speed changed beyond the noise, and by enough to matter."""
        return self.evidence > EVIDENCE and float(np.ptp(self.level)) > WORTHWHILE

    @property
    def change(self) -> float:
        """The largest change against the first reference, relative and signed; 0.2 is 20 percent slower."""
        away = self.level - self.level[0]
        return math.expm1(float(away[int(np.argmax(np.abs(away)))]))

    def at(self, time: float) -> tuple[float, float]:
        """Log-time of the reference at ``time`` seconds, and its variance; flat outside the references.

        Between two references that differ by D the line between them is the mean also when the speed
        jumped once, at a moment that is equally likely to be any: a share ``a`` of the way it has then
        jumped with probability ``a``, which adds the variance ``D^2 a (1 - a)``.
        """
        after = int(np.searchsorted(self.times, time))
        if after in (0, len(self.times)):
            end = min(after, len(self.times) - 1)
            return float(self.level[end]), float(self.variance[end])
        before = after - 1
        share = (time - self.times[before]) / (self.times[after] - self.times[before])
        step = self.level[after] - self.level[before]
        spread = (1 - share) * self.variance[before] + share * self.variance[after]
        level = self.level[before] + share * step
        return float(level), float(spread + step**2 * share * (1 - share))


def fit(times: ArrayLike, logs: ArrayLike, stderr: ArrayLike) -> Curve:
    """The curve through references.

    Args:
        times: seconds ``[n]``, in any order.
        logs: logarithms of the reference's time ``[n]``.
        stderr: their standard errors (relative errors of the times) ``[n]``; what is not finite counts as 0.

    With fewer than ``ENOUGH`` references the curve is flat and claims no noise.

    Raises:
        ValueError: no references, or lists of different lengths.
    """
    when, seen, claimed = (np.asarray(x, np.float64) for x in (times, logs, stderr))
    if not len(when) == len(seen) == len(claimed) or not len(when):
        raise ValueError(f"need as many times, logs and errors; got {len(when)}, {len(seen)}, {len(claimed)}")
    order = np.argsort(when, kind="stable")
    when, seen, claimed = when[order], seen[order], np.nan_to_num(claimed[order], posinf=0.0) ** 2
    kept = ~_spikes(seen, claimed)
    dropped = int(np.sum(~kept))
    when, seen, claimed = when[kept], seen[kept], claimed[kept]
    if len(when) < ENOUGH:
        mean, error = _mean(seen, claimed)
        return Curve(when, np.full(len(when), mean), np.full(len(when), error), 0.0, 0.0, dropped)
    likelihood, filtered, noise, walk = _models(when, seen, claimed)
    score = likelihood - 0.5 * (np.log(np.maximum(noise, _NOISE[1]) / TYPICAL_NOISE) / NOISE_SPREAD) ** 2
    moving, still = (np.where(m, score, -np.inf) for m in (walk > 0, walk == 0))
    evidence = float(moving.max() - still.max())
    likely = moving if evidence > EVIDENCE else still
    level, variance = _smooth(*(a[:, int(np.argmax(likely))] for a in filtered))
    # The mean over the grid, not its best point: few references often scatter less than they might have.
    weights = np.exp(likely - likely.max())
    scatter = math.sqrt(float(np.average(noise**2, weights=weights)))
    scatter = scatter if scatter > 0.1 * _NOISE[1] else 0.0
    return Curve(when, level, variance, scatter, evidence, dropped)


def _models(
    when: Floats, seen: Floats, claimed: Floats
) -> tuple[Floats, tuple[Floats, Floats, Floats], Floats, Floats]:
    """Filter all models of the grid: log-likelihoods ``[g]`` and results of ``_filter``, then the noise and
    the distance gone of each ``[g]``. A jump pays for the choice of its place among ``n - 1``."""
    noise, walk, jumps = (a.ravel() for a in np.meshgrid(_NOISE, _WALK, [False, True], indexing="ij"))
    steady = np.diff(when) / max(float(np.ptp(when)), 1e-9)
    largest = np.zeros(len(steady))
    largest[int(np.argmax(np.abs(np.diff(seen))))] = 1.0
    moves = np.where(jumps, largest[:, None], steady[:, None]) * walk**2
    likelihood, filtered = _filter(seen, claimed, moves, noise)
    price = np.where(jumps & (walk > 0), math.log(len(steady)), 0.0)
    return likelihood - price, filtered, noise, walk


def _mean(logs: Floats, variances: Floats) -> tuple[float, float]:
    """Mean by inverse variance, and its variance."""
    weights = 1.0 / np.maximum(variances, _SMALLEST)
    return float(np.average(logs, weights=weights)), float(1.0 / weights.sum())


def _spikes(logs: Floats, claimed: Floats) -> NDArray[np.bool_]:
    """References far slower than both neighbours: moments that somebody else took, not a new speed."""
    found = np.zeros(len(logs), dtype=bool)
    if len(logs) < ENOUGH + 1:
        return found
    steps = np.abs(np.diff(logs))
    usual = 1.4826 * float(np.median(steps)) + math.sqrt(float(np.median(claimed)))
    above = np.minimum(logs[1:-1] - logs[:-2], logs[1:-1] - logs[2:])
    found[1:-1] = above > max(5.0 * usual, 5 * WORTHWHILE)
    return found


def _filter(
    logs: Floats, claimed: Floats, moves: Floats, noise: Floats
) -> tuple[Floats, tuple[Floats, Floats, Floats]]:
    """Kalman filter of ``g`` models: ``noise [g]``, and ``moves [n - 1, g]``, variances of the level's steps.

    Returns:
        Log-likelihood ``[g]`` given the first reference (up to a constant), and filtered means, filtered
        variances and predicted variances, each ``[n, g]``.
    """
    variance = np.maximum(claimed[:, None] + noise**2, _SMALLEST)
    shape = (len(logs), len(noise))
    means, after, before = np.empty(shape), np.empty(shape), np.empty(shape)
    means[0], after[0], before[0] = logs[0], variance[0], variance[0]
    likelihood = np.zeros(len(noise))
    for i in range(1, len(logs)):
        before[i] = after[i - 1] + moves[i - 1]
        total = before[i] + variance[i]
        surprise = logs[i] - means[i - 1]
        likelihood -= 0.5 * (np.log(total) + surprise**2 / total)
        gain = before[i] / total
        means[i] = means[i - 1] + gain * surprise
        after[i] = (1 - gain) * before[i]
    return likelihood, (means, after, before)


def _smooth(means: Floats, after: Floats, before: Floats) -> tuple[Floats, Floats]:
    """Rauch-Tung-Striebel smoother of one filtered random walk; all ``[n]``."""
    level, variance = means.copy(), after.copy()
    for i in range(len(means) - 2, -1, -1):
        gain = after[i] / before[i + 1]
        level[i] += gain * (level[i + 1] - level[i])
        variance[i] += gain**2 * (variance[i + 1] - before[i + 1])
    return level, variance
