"""Few sequences first: candidates that are clearly beaten on them never cost the whole proxy split.

Staged evaluation as in successive halving (Jamieson and Talwalkar, AISTATS 2016), with a bound in place of
a fixed share: what may still reach the front goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from autocomp.errors import JobError
from autocomp.history import PROXY
from autocomp.job import Job
from autocomp.objective import Constraint, Objective
from autocomp.pareto import is_feasible, loss_row
from autocomp.readings import Readings
from autocomp.space import Candidate
from autocomp.trial import Estimate, Fidelity, Trial

#: A candidate is dropped when it is beaten although each of its metrics is better by so many standard errors.
OPTIMISM = 2.0
#: Candidates measured both ways before values of a stage are translated into those of the whole split.
ENOUGH = 5


def stage_of(sequences: int) -> Fidelity:
    """The first ``sequences`` of the proxy split; the same ones for every candidate."""
    return Fidelity(f"proxy-{sequences}", "proxy", sequences)


class Stages:
    """Which candidates of a search go on to more sequences.

    A candidate is dropped when another one of its stage, on the same sequences, is nowhere worse than its
    optimistic bound: its value, better by ``OPTIMISM`` standard errors in every objective. Standard errors
    are of single candidates, so this errs towards going on. What breaks a constraint goes on as well.

    Args:
        sizes: sequences of each stage, ascending; none to measure all candidates on the whole split at once.
        objectives, constraints: of the search.
    """

    def __init__(
        self, sizes: Sequence[int], objectives: Sequence[Objective], constraints: Sequence[Constraint]
    ) -> None:
        self.levels = (*map(stage_of, sizes), PROXY)
        self._names = [level.name for level in self.levels]
        self._objectives, self._constraints = tuple(objectives), tuple(constraints)
        self._over: dict[str, Trial] = {}  # fingerprint -> trial of a stage that was the last

    @classmethod
    def of(cls, job: Job, objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> Stages:
        """Those of a job. Raises ``JobError`` when the last stage is no part of the proxy split."""
        sizes, whole = job.budget.stages, job.workload.get("data", {}).get("proxy", 0)
        if sizes and whole and sizes[-1] >= whole:
            raise JobError(
                f"budget.stages = {list(sizes)}: the whole proxy split has {whole} sequences, and comes by"
                " itself; name smaller numbers, or raise workload.data.proxy"
            )
        return cls(sizes, objectives, constraints)

    @property
    def dropped(self) -> int:
        """Candidates that ended at a stage, failed ones included."""
        return len(self._over)

    def resume(self, readings: Readings) -> list[tuple[Candidate, Fidelity]]:
        """Candidates that earlier sessions left between two stages, and where they go on."""
        onward = []
        for level, following in zip(self.levels, self.levels[1:], strict=False):
            done = {t.candidate for t in readings.at(following)}
            for trial in readings.at(level):
                if trial.candidate not in done and self.after(trial, readings) is not None:
                    onward.append((trial.candidate, following))
        return onward

    def after(self, trial: Trial, readings: Readings) -> Fidelity | None:
        """Where the candidate of a new trial goes on; ``None`` when it is dropped, failed, or done."""
        place = self._names.index(trial.fidelity.name) if trial.fidelity.name in self._names else -1
        if place in (-1, len(self.levels) - 1):
            return None
        if trial.ok and not self._beaten(trial, readings.at(self.levels[place])):
            return self.levels[place + 1]
        self._over[trial.candidate.fingerprint] = trial
        return None

    def _beaten(self, trial: Trial, others: Iterable[Trial]) -> bool:
        mine = next((t for t in others if t.number == trial.number), trial)
        if not is_feasible(mine, self._objectives, self._constraints):
            return False
        errors = np.nan_to_num([mine.stderr(o.metric) for o in self._objectives])
        bound = np.array(loss_row(mine, self._objectives)) - OPTIMISM * errors
        rivals = [
            loss_row(t, self._objectives)
            for t in others
            if t.candidate != mine.candidate and is_feasible(t, self._objectives, self._constraints)
        ]
        table = np.array(rivals).reshape(-1, len(self._objectives))
        return bool((np.all(table <= bound, axis=1) & np.any(table < bound, axis=1)).any())

    def seen(self, readings: Readings) -> list[Trial]:
        """What a searcher gets to see, in the order of the trials: those of the whole split, and of what was
        dropped its last stage, translated to the whole split by candidates that were measured on both."""
        whole = readings.at(PROXY)
        if not self._over:
            return whole
        known = {t.candidate: t for t in whole}
        ended: list[Trial] = []
        for level in self.levels[:-1]:
            trials = readings.at(level)
            both = [(t, known[t.candidate]) for t in trials if t.candidate in known]
            last = [t for t in trials if t.candidate.fingerprint in self._over and t.candidate not in known]
            last = [t for t in last if self._over[t.candidate.fingerprint].number == t.number]
            ended += translated(last, both)
        return sorted([*whole, *ended], key=lambda t: t.number)


def translated(trials: Sequence[Trial], both: Sequence[tuple[Trial, Trial]]) -> list[Trial]:
    """Trials of a stage as trials of the whole split.

    The first sequences are easier or harder than all by about the same factor for every candidate (positive
    metrics) or the same amount (others): the median over ``both`` (stage, whole), when there are ``ENOUGH``.
    How much single candidates depart from it is added to the standard errors.
    """
    names = {m for t in trials if t.measurement is not None for m in t.measurement.metrics}
    rules = {m: _rule(m, both) for m in names} if len(both) >= ENOUGH else {}
    found = []
    for trial in trials:
        m = trial.measurement
        if m is not None:
            metrics = {n: _apply(e, *rules[n]) if n in rules else e for n, e in m.metrics.items()}
            trial = replace(trial, measurement=replace(m, metrics=metrics))
        found.append(replace(trial, fidelity=PROXY))
    return found


def _rule(metric: str, both: Sequence[tuple[Trial, Trial]]) -> tuple[bool, float, float]:
    """Whether the metric is translated by a factor, its logarithm (or the amount), and its spread."""
    values = np.array([(a.value(metric), b.value(metric)) for a, b in both if a.ok and b.ok])
    values = values.reshape(-1, 2)[np.isfinite(values.reshape(-1, 2)).all(axis=1)]
    if len(values) < ENOUGH:
        return False, 0.0, 0.0
    positive = bool((values > 0).all())
    change = np.diff(np.log(values) if positive else values, axis=1)[:, 0]
    middle = float(np.median(change))
    return positive, middle, 1.4826 * float(np.median(np.abs(change - middle)))


def _apply(estimate: Estimate, positive: bool, change: float, spread: float) -> Estimate:
    if not positive or estimate.value <= 0:
        move = 0.0 if positive else change
        return Estimate(estimate.value + move, math.hypot(estimate.stderr, spread), estimate.n)
    value = estimate.value * math.exp(change)
    return Estimate(value, value * math.hypot(estimate.stderr / estimate.value, spread), estimate.n)
