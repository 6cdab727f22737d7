"""What noise does to a front: objectives without errors, near-ties to time again, and the words for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from autocomp.history import REPORT
from autocomp.objective import Constraint, Objective
from autocomp.pareto import is_feasible
from autocomp.readings import REPEAT, Readings, drift_words
from autocomp.repeats import Pair, boundary, compare, contested
from autocomp.space import Candidate
from autocomp.trial import Trial


def without_errors(
    trials: Sequence[Trial], objectives: Sequence[Objective], exact: Collection[str]
) -> list[str]:
    """Metrics of objectives that are measured, and yet come without a standard error in every trial.

    An error that is not a number counts as unknown, like 0 for what is not exact: a comparison then has
    nothing to go by and takes every difference as certain.
    """
    measured = [t for t in trials if t.ok]
    metrics = [o.metric for o in objectives if o.metric not in exact]
    return [m for m in metrics if measured and not any(t.stderr(m) > 0 for t in measured)]


class NearTies:
    """Points of the validated front whose order in latency is within the noise, and decides.

    A pair is decided at a boundary that allows for looking after every round (``repeats.boundary``). The
    labels of a front look once, at 1.96 standard errors: they may call dominated what here is a tie.

    Args:
        readings: of the run.
        objectives, constraints: of the front.
        repeats: how often a point is timed again at most.
    """

    def __init__(
        self,
        readings: Readings,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint],
        repeats: int,
    ) -> None:
        self._readings, self._repeats, self._z = readings, repeats, boundary(repeats)
        self._objectives, self._constraints = objectives, constraints

    def next_round(self) -> list[Candidate]:
        """Candidates to time again now, in an order; none when all is decided or the repeats are used up.

        Decided and equal ones leave the race (Maron and Moore, "The racing algorithm", Artificial
        Intelligence Review 11, 1997), so that the repeats go where they change the front.
        """
        trials = self._readings.at(REPORT)
        close = {n for p in self._contested(trials) if p.open for n in (p.first, p.second)}
        return [
            t.candidate
            for t in trials
            if t.number in close and len(self._readings.timed(t.candidate, REPEAT)) < self._repeats
        ]

    def verdicts(self) -> list[Pair]:
        """Pairs that were close before they were timed again, or are now, as they stand now."""
        now = {t.number: t for t in self._readings.at(REPORT) if t.ok}
        close = [*self._contested(self._readings.single(REPORT)), *self._contested(now.values())]
        found = {frozenset((p.first, p.second)): p for p in reversed(close)}
        pairs = sorted(found.values(), key=lambda p: (p.first, p.second))
        return [compare(now[p.first], now[p.second], p.metric, self._z) for p in pairs]

    def _contested(self, trials: Iterable[Trial]) -> list[Pair]:
        feasible = [t for t in trials if is_feasible(t, self._objectives, self._constraints)]
        return contested(feasible, self._objectives, self._readings.metrics, self._z)


def noise_summary(readings: Readings, pairs: Sequence[Pair], unknown: Sequence[str]) -> dict[str, Any]:
    """As ``StudyResult.noise``."""
    drift = readings.summary()
    said = drift_words(drift) + [f"{p.verdict}: {p}" for p in pairs]
    said += [f"{m} comes without a standard error: differences in it count as certain" for m in unknown]
    rows = [{**asdict(p), "verdict": p.verdict} for p in pairs]
    return {"drift": drift, "pairs": rows, "unknown": list(unknown), "words": said}
