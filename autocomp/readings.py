"""Trials as they are to be read: latencies corrected for a device's drift, repeated timings put together.

The journal keeps what was measured. Correction happens here, each time trials are read, with what is known
of the device by then: timings of one reference candidate, the uncompressed model (``measure.drift``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.history import REPORT
from autocomp.measure.drift import ENOUGH, Curve, fit
from autocomp.repeats import between_variance, pool, without_spikes
from autocomp.space import Candidate
from autocomp.trial import Estimate, Fidelity, Trial

if TYPE_CHECKING:
    from autocomp.plan import Plan

REFERENCE, REPEAT = "reference", "repeat"  # origins of trials that are timed only
#: Relative standard error of a correction from which on it is called uncertain.
UNCERTAIN = 0.02


class Readings:
    """All trials of a run with the times at which they came, and their corrected values.

    What is read of one fidelity is as if the device had kept the speed that it had at that fidelity's
    first trial. A place whose speed never changed beyond the noise is left alone, but for the standard
    errors: they take in how much timings of the reference scatter beyond theirs.

    Args:
        reference: the candidate that is timed again and again; ``None`` reads everything as measured.
        metrics: names of timing metrics to correct.
        shared: whether all workers of one machine have one device (a CPU), so that they drift as one.
    """

    def __init__(
        self, reference: Candidate | None = None, metrics: Sequence[str] = (), shared: bool = True
    ) -> None:
        self.reference, self.metrics, self.shared = reference, tuple(metrics), shared
        self._levels: dict[str, list[tuple[Trial, float]]] = {}
        self._timings: dict[str, list[tuple[Trial, float]]] = {}  # fingerprint -> timing-only trials
        self._seen: dict[tuple[str, str], list[tuple[float, Estimate]]] = {}
        self._curves: dict[tuple[str, str], Curve] = {}
        self._read: dict[str, list[Trial]] = {}

    @classmethod
    def of(cls, plan: Plan, shared: bool = True) -> Readings:
        """Empty, for a plan: its timing metrics, and its first baseline as the reference."""
        reference = plan.baselines[0] if plan.timing and plan.baselines else None
        return cls(reference, plan.timing, shared)

    def add(self, trial: Trial, elapsed: float) -> None:
        """Take in a trial that came ``elapsed`` seconds after the search began."""
        if trial.fidelity.split:
            self._levels.setdefault(trial.fidelity.name, []).append((trial, elapsed))
        else:
            self._timings.setdefault(trial.candidate.fingerprint, []).append((trial, elapsed))
        if trial.candidate == self.reference and trial.measurement is not None:
            for metric in self.metrics:
                estimate = trial.measurement.metrics.get(metric)
                if estimate is not None and estimate.value > 0:
                    key = (metric, self.place(trial))
                    self._seen.setdefault(key, []).append((elapsed, estimate))
                    self._curves.pop(key, None)
                    self._read.clear()

    def place(self, trial: Trial) -> str:
        """The device that a trial ran on: its machine, or its worker where each has a device of its own."""
        return trial.worker.rpartition("/")[0] if self.shared else trial.worker

    def curves(self, metric: str) -> dict[str, Curve]:
        """Place -> speed over time."""
        places = [p for m, p in self._seen if m == metric]
        return {place: self._curve(metric, place) for place in places}

    def _curve(self, metric: str, place: str) -> Curve:
        key = (metric, place)
        if key not in self._curves:
            times = [t for t, _ in self._seen[key]]
            values = [e.value for _, e in self._seen[key]]
            errors = [e.stderr / e.value for _, e in self._seen[key]]
            self._curves[key] = fit(times, [math.log(v) for v in values], errors)
        return self._curves[key]

    # -- reading -----------------------------------------------------------------------------------

    def at(self, level: Fidelity) -> list[Trial]:
        """Trials of a fidelity in the order they came; of the report, repeats are put together with them.

        A trial that nothing changes comes back as the object it was. ``details["read"]`` of the others holds,
        by metric, what was measured (``raw``, ``raw_stderr``), the ``factor`` and the number of ``repeats``.
        """
        rows = self._levels.get(level.name, [])
        if not self.metrics:
            return [trial for trial, _ in rows]
        read = self._read.setdefault(level.name, [])
        for trial, elapsed in rows[len(read) :]:
            read.append(self._corrected(trial, elapsed, level.name))
        return self._with_repeats(read) if level.name == REPORT.name else list(read)

    def single(self, level: Fidelity) -> list[Trial]:
        """As ``at``, without the repeats."""
        self.at(level)
        return list(self._read.get(level.name, [])) if self.metrics else self.at(level)

    def timed(self, candidate: Candidate, origin: str = REPEAT) -> list[Trial]:
        """Timing-only trials of the candidate that were asked for that reason, failed ones included."""
        return [t for t, _ in self._timings.get(candidate.fingerprint, ()) if t.origin == origin]

    def timings(self, candidate: Candidate) -> int:
        """Number of timing-only trials of the candidate."""
        return len(self._timings.get(candidate.fingerprint, ()))

    def _corrected(self, trial: Trial, elapsed: float, level: str) -> Trial:
        if trial.measurement is None:
            return trial
        changed: dict[str, Estimate] = {}
        notes: dict[str, dict[str, float]] = {}
        for metric in self.metrics:
            found = trial.measurement.metrics.get(metric)
            factor, variance = self._factor(metric, self.place(trial), elapsed, level)
            if found is None or not found.value > 0 or (factor, variance) == (1.0, 0.0):
                continue
            own = 0.0 if math.isnan(found.stderr) else found.stderr / found.value
            value = factor * found.value
            changed[metric] = Estimate(value, value * math.sqrt(own**2 + variance), found.n)
            notes[metric] = {"raw": found.value, "raw_stderr": found.stderr, "factor": factor}
        return _changed(trial, changed, notes)

    def _factor(self, metric: str, place: str, elapsed: float, level: str) -> tuple[float, float]:
        """What to multiply a time of that moment with, and the relative variance of that and of the noise."""
        curves = self.curves(metric)
        here = curves.get(place)
        if here is None:
            return 1.0, 0.0
        noise = here.noise**2
        anchor, began = self._anchor(level, curves)
        far = anchor != place and min(len(here.times), len(curves[anchor].times)) >= ENOUGH
        if not (here.drifts or far):
            return 1.0, noise
        now, variance = here.at(elapsed)
        then = curves[anchor if far else place].at(began)[0]
        return math.exp(then - now), noise + variance

    def _anchor(self, level: str, curves: Mapping[str, Curve]) -> tuple[str, float]:
        """Place and moment of the fidelity's first trial: everything is read at the speed of then."""
        rows = self._levels.get(level, ())
        found = next(((self.place(t), e) for t, e in rows if self.place(t) in curves), None)
        return found if found is not None else (next(iter(curves)), 0.0)

    def _with_repeats(self, read: Sequence[Trial]) -> list[Trial]:
        """Every trial's latencies put together with those of its repeats, corrected to the same speed."""
        again = {t.candidate.fingerprint: self._repeated(t.candidate) for t in read}
        if not any(again.values()):
            return list(read)
        pooled = list(read)
        for metric in self.metrics:
            groups = {
                t.candidate.fingerprint: _group([t, *again[t.candidate.fingerprint]], metric)
                for t in read
                if t.ok and t.value(metric) > 0
            }
            groups = without_spikes(groups)
            between = between_variance(list(groups.values()))
            pooled = [_pooled(t, metric, groups.get(t.candidate.fingerprint), between) for t in pooled]
        return pooled

    def _repeated(self, candidate: Candidate) -> list[Trial]:
        rows = self._timings.get(candidate.fingerprint, ())
        return [self._corrected(t, e, REPORT.name) for t, e in rows if t.origin == REPEAT and t.ok]

    # -- telling -----------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """By timing metric and place, what the references say; JSON.

        ``references`` is their number; ``noise``, ``drifts``, ``change`` and ``evidence`` are as in
        ``Curve``; ``uncertain`` are numbers of trials whose correction is known worse than ``UNCERTAIN``;
        ``times`` (s) and ``level`` (the metric's unit) are of the smoothed reference; ``measured`` are its
        timings, ``[time, value, stderr]``.
        """
        return {
            metric: {
                place: {
                    "references": len(curve.times) + curve.dropped,
                    "noise": curve.noise,
                    "drifts": curve.drifts,
                    "change": curve.change if curve.drifts else 0.0,
                    "evidence": curve.evidence,
                    "uncertain": self._uncertain(metric, place, curve),
                    "times": curve.times.tolist(),
                    "level": np.exp(curve.level).tolist(),
                    "measured": [[t, e.value, e.stderr] for t, e in self._seen[metric, place]],
                }
                for place, curve in self.curves(metric).items()
            }
            for metric in self.metrics
        }

    def _uncertain(self, metric: str, place: str, curve: Curve) -> list[int]:
        """Numbers of trials whose correction is known worse than ``UNCERTAIN``: a jump was near them."""
        if not curve.drifts:
            return []
        return [
            trial.number
            for rows in self._levels.values()
            for trial, elapsed in rows
            if self.place(trial) == place and metric in trial.values()
            if math.sqrt(curve.at(elapsed)[1]) > UNCERTAIN
        ]


def drift_words(summary: Mapping[str, Any]) -> list[str]:
    """``Readings.summary`` in sentences, for the user; nothing where there are too few references."""
    said = []
    for metric, places in summary.items():
        for place, found in places.items():
            if found["references"] < ENOUGH:
                continue
            where = f" on {place}" if len(places) > 1 else ""
            start = f"{metric}: {found['references']} timings of the uncompressed model{where}"
            noise = f"single timings scatter by {100 * found['noise']:.2g} % beyond their standard errors"
            if not found["drifts"]:
                said.append(f"{start} show no drift of the device; {noise}")
                continue
            change, count = 100 * found["change"], len(found["uncertain"])
            text = f"{start} show that the device became up to {abs(change):.0f} % "
            text += f"{'slower' if change > 0 else 'faster'}; latencies are corrected, and {noise}"
            if count:
                text += f"; the correction of {count} trials is uncertain, with standard errors to match"
            said.append(text)
    return said


def _group(trials: Iterable[Trial], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of a metric and their standard errors."""
    known = [(t.value(metric), t.stderr(metric)) for t in trials if t.value(metric) > 0]
    values = np.array([v for v, _ in known])
    errors = np.nan_to_num(np.array([e for _, e in known]))
    return np.log(values), errors / values


def _pooled(trial: Trial, metric: str, group: tuple[np.ndarray, np.ndarray] | None, between: float) -> Trial:
    if group is None or trial.measurement is None or (len(group[0]) < 2 and between == 0.0):
        return trial
    mean, error = pool(*group, between)
    first = trial.measurement.metrics[metric]
    value = math.exp(mean)
    notes = {"raw": first.value, "raw_stderr": first.stderr, "factor": 1.0}
    notes |= trial.measurement.details.get("read", {}).get(metric, {})
    notes["repeats"] = len(group[0]) - 1
    return _changed(trial, {metric: Estimate(value, value * error, len(group[0]) * first.n)}, {metric: notes})


def _changed(
    trial: Trial, metrics: Mapping[str, Estimate], notes: Mapping[str, Mapping[str, float]]
) -> Trial:
    """The trial with these metrics in place of its own, and a note of what they were."""
    m = trial.measurement
    if m is None or not metrics:
        return trial
    details = {**m.details, "read": {**m.details.get("read", {}), **notes}}
    return replace(trial, measurement=replace(m, metrics={**m.metrics, **metrics}, details=details))
