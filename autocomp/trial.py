"""Records of what was measured: estimates with their noise, measurements, failures, trials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from autocomp.space import Candidate

FailureKind = Literal["oom", "nan", "crash", "timeout", "invalid", "error", "unmeasured"]


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, in the metric's own unit. ``n`` counts independent samples."""

    value: float
    stderr: float = 0.0
    n: int = 1


@dataclass(frozen=True)
class Fidelity:
    """How much a measurement may cost.

    Attributes:
        name: ``proxy``, ``selection``, ``report`` or whatever a job calls it; part of the trial's key.
        split: which data split quality is scored on; empty when it is not (latency alone is measured).
        sequences: number of sequences scored (0: the whole split).
        timing: whether latency is measured.
    """

    name: str = "proxy"
    split: str = "proxy"
    sequences: int = 0
    timing: bool = True


@dataclass(frozen=True)
class Measurement:
    """What a worker found for one candidate.

    Attributes:
        metrics: metric name -> estimate. Latency in ms, memory in MB (10**6 bytes).
        device: what it ran on, as printed by the worker (name, threads).
        seconds: wall time that the measurement took.
        tokens: tokens scored (for budgets).
        details: anything worth keeping (interquartile range, backends, load); JSON.
    """

    metrics: Mapping[str, Estimate]
    device: str
    seconds: float = 0.0
    tokens: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def value(self, metric: str) -> float:
        """The metric's value; NaN when it was not measured."""
        estimate = self.metrics.get(metric)
        return math.nan if estimate is None else estimate.value


@dataclass(frozen=True)
class Failure:
    """Why there is no measurement, and the wall seconds that it took to find out (0: not known)."""

    kind: FailureKind
    reason: str
    seconds: float = field(default=0.0, compare=False)


def _rows(metrics: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: vars(estimate) for name, estimate in metrics.items()}


@dataclass(frozen=True)
class Trial:
    """A candidate at a fidelity, with its measurement or its failure; immutable.

    Attributes:
        number: position in the history, from 0.
        origin: who asked for it: ``baseline``, ``audit``, the searcher's name, ``promote`` or ``validate``.
        attempts: how often it was tried (a crashed worker's trial is tried again).
    """

    number: int
    candidate: Candidate
    fidelity: Fidelity
    origin: str
    measurement: Measurement | None = None
    failure: Failure | None = None
    worker: str = ""
    attempts: int = 1

    @property
    def ok(self) -> bool:
        return self.measurement is not None

    @property
    def key(self) -> tuple[str, str]:
        """What must never be measured twice: (candidate fingerprint, fidelity name)."""
        return (self.candidate.fingerprint, self.fidelity.name)

    def value(self, metric: str) -> float:
        return math.nan if self.measurement is None else self.measurement.value(metric)

    def values(self) -> dict[str, float]:
        return {} if self.measurement is None else {k: e.value for k, e in self.measurement.metrics.items()}

    def stderr(self, metric: str) -> float:
        estimate = None if self.measurement is None else self.measurement.metrics.get(metric)
        return 0.0 if estimate is None else estimate.stderr

    def to_json(self) -> dict[str, Any]:
        # Spelled out: ``asdict`` copies every nested value and would be a third of the driver's time.
        m = self.measurement
        return {
            "number": self.number,
            "candidate": self.candidate.to_json(),
            "fidelity": vars(self.fidelity),
            "origin": self.origin,
            "measurement": None if m is None else {**vars(m), "metrics": _rows(m.metrics)},
            "failure": None if self.failure is None else vars(self.failure),
            "worker": self.worker,
            "attempts": self.attempts,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        measured, failed = data.get("measurement"), data.get("failure")
        measurement = None
        if measured is not None:
            metrics = {k: Estimate(**e) for k, e in measured["metrics"].items()}
            measurement = Measurement(**{**measured, "metrics": metrics})
        return cls(
            number=data["number"],
            candidate=Candidate.of(data["candidate"]),
            fidelity=Fidelity(**data["fidelity"]),
            origin=data["origin"],
            measurement=measurement,
            failure=None if failed is None else Failure(**failed),
            worker=data.get("worker", ""),
            attempts=data.get("attempts", 1),
        )
