"""Near-ties in latency: which pairs of points to time again, and what repeated timings say together.

Latencies are compared by their logarithms: noise of a timing is about the same share of it everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocomp.objective import Objective
from autocomp.pareto import loss_row
from autocomp.trial import Trial

Floats = NDArray[np.float64]

#: Two latencies are equal for any use when the interval of their difference lies within this share.
EQUAL = 0.01
#: Standard errors that count as beyond the noise when it is looked at 1, 2, ... 10 times, each time to decide
#: or to go on, so that all looks together err in 5 % of equal pairs (Pocock, Biometrika 64, 1977, table 1;
#: the values to three decimals are those of the same boundary computed by numerical integration).
LOOKS = (1.960, 2.178, 2.289, 2.361, 2.413, 2.453, 2.485, 2.512, 2.535, 2.555)
#: Timings beyond the median of their candidate by this many robust standard deviations are left out.
FAR_OUT = 4.0


def boundary(repeats: int) -> float:
    """Standard errors beyond the noise, for a first timing and that many repeats; see ``LOOKS``."""
    return LOOKS[min(repeats, len(LOOKS) - 1)]


@dataclass(frozen=True)
class Pair:
    """Two points whose order in one timing metric decides whether the first stays on the front.

    Attributes:
        first, second: numbers of the trials; the second is nowhere worse in what is not timed.
        metric: the timing metric.
        difference: log of the first's latency over the second's; about the relative difference.
        stderr: its standard error.
        z: standard errors that count as beyond the noise.
    """

    first: int
    second: int
    metric: str
    difference: float
    stderr: float
    z: float = 1.96

    @property
    def decided(self) -> bool:
        """Whether the order is beyond the noise."""
        return abs(self.difference) > self.z * self.stderr

    @property
    def open(self) -> bool:
        """Whether more timings could matter: undecided, and not known to be equal."""
        return not self.decided and abs(self.difference) + self.z * self.stderr > EQUAL

    @property
    def verdict(self) -> str:
        """``decided`` or ``tie``."""
        return "decided" if self.decided else "tie"

    def __str__(self) -> str:
        error = f"{100 * abs(self.difference):.2g} ± {100 * self.stderr:.2g} %"
        if not self.decided:
            return f"#{self.first} and #{self.second} tie in {self.metric} (they differ by {error})"
        fast, slow = (self.first, self.second) if self.difference < 0 else (self.second, self.first)
        return f"#{fast} is faster than #{slow} in {self.metric}, by {error}"


def contested(
    trials: Sequence[Trial], objectives: Sequence[Objective], timing: Collection[str], z: float = 1.96
) -> list[Pair]:
    """Pairs whose order in a timing metric is within the noise and decides what is on the front.

    That is so when one is, by value, nowhere worse than the other in all objectives that are not timed, and
    the other is not faster beyond the noise in any timed one. Points that are dominated whatever more
    timings would say take no part. Quality is taken as it is: a fixed split gives the same value again.

    Args:
        trials: feasible ones, with finite objectives.
        objectives: of the front.
        timing: names of the timing metrics.
        z: standard errors of a difference that count as beyond the noise.
    """
    timed = [i for i, o in enumerate(objectives) if o.metric in timing]
    if not timed or len(trials) < 2:
        return []
    losses = np.array([loss_row(t, objectives) for t in trials])
    rest = [i for i in range(len(objectives)) if i not in timed]
    logs, errors = _logs(trials, [objectives[i].metric for i in timed])
    logs = logs * [1 if objectives[i].minimize else -1 for i in timed]
    gap = logs[:, None] - logs[None]  # [p, q, metric]: positive where q is better
    spread = np.sqrt(errors[:, None] ** 2 + errors[None] ** 2)
    no_worse = np.all(losses[:, None, rest] >= losses[None][:, :, rest], axis=2)  # q against p
    beaten = (no_worse & np.all(gap > z * spread, axis=2)).any(axis=1)
    unclear = (np.abs(gap) <= z * spread) & (spread > 0)
    wanted = no_worse & unclear.any(axis=2) & ~np.any(gap < -z * spread, axis=2)
    wanted &= ~beaten[:, None] & ~beaten[None] & ~np.eye(len(trials), dtype=bool)
    pairs = []
    for p, q in np.argwhere(wanted):
        if wanted[q, p] and q < p:
            continue  # equal in all that is not timed: one pair, not two
        with np.errstate(divide="ignore", invalid="ignore"):
            clear = np.where(unclear[p, q], np.abs(gap[p, q]) / spread[p, q], -1.0)
        pairs.append(compare(trials[p], trials[q], objectives[timed[int(np.argmax(clear))]].metric, z))
    return pairs


def compare(first: Trial, second: Trial, metric: str, z: float = 1.96) -> Pair:
    """The pair as the two trials stand now; see ``Pair``."""
    logs, errors = _logs([first, second], [metric])
    error = math.hypot(errors[0, 0], errors[1, 0])
    return Pair(first.number, second.number, metric, float(logs[0, 0] - logs[1, 0]), error, z)


def _logs(trials: Sequence[Trial], metrics: Sequence[str]) -> tuple[Floats, Floats]:
    """Logarithms of metrics ``[trials, metrics]`` and their standard errors; an unknown error is 0."""
    values = np.array([[t.value(m) for m in metrics] for t in trials], np.float64)
    errors = np.nan_to_num(np.array([[t.stderr(m) for m in metrics] for t in trials], np.float64))
    floor = np.maximum(values, np.finfo(np.float64).tiny)
    return np.log(floor), errors / floor


def between_variance(groups: Sequence[tuple[Floats, Floats]]) -> float:
    """Variance between repeats beyond what their standard errors claim, common to all groups.

    The moment estimator of DerSimonian and Laird ("Meta-analysis in clinical trials", Controlled Clinical
    Trials 7, 1986, equation 8) with numerators and denominators summed over the groups, which gives a few
    repeats of many candidates the degrees of freedom that those of one lack.

    Args:
        groups: values ``[k]`` and standard errors ``[k]`` of the repeats of one quantity each.
    """
    above = below = 0.0
    for values, errors in groups:
        if len(values) > 1:
            weights = 1.0 / np.maximum(errors**2, 1e-12)
            mean = np.average(values, weights=weights)
            above += float(np.sum(weights * (values - mean) ** 2)) - (len(values) - 1)
            below += float(weights.sum() - (weights**2).sum() / weights.sum())
    return max(0.0, above / below) if below > 0 else 0.0


def pool(values: Floats, errors: Floats, between: float) -> tuple[float, float]:
    """Mean of repeats ``[k]`` by inverse variance, ``1 / (errors^2 + between)``, and its standard error."""
    weights = 1.0 / np.maximum(errors**2 + between, 1e-24)
    return float(np.average(values, weights=weights)), float(1.0 / math.sqrt(weights.sum()))


def without_spikes(groups: Mapping[str, tuple[Floats, Floats]]) -> dict[str, tuple[Floats, Floats]]:
    """Groups without repeats that are far above their group's median: moments that somebody else took.

    The scale is the median absolute deviation over all groups of three or more, which alone are cleaned.
    """
    large = [y for y, _ in groups.values() if len(y) >= 3]
    if not large:
        return dict(groups)
    away = np.concatenate([y - np.median(y) for y in large])
    limit = max(FAR_OUT * 1.4826 * float(np.median(np.abs(away))), 5 * EQUAL)
    cleaned = {}
    for name, (values, errors) in groups.items():
        kept = values - np.median(values) <= limit if len(values) >= 3 else np.ones(len(values), bool)
        cleaned[name] = (values[kept], errors[kept])
    return cleaned
