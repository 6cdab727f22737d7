"""What a study tells: events for displays, trials for trackers, the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autocomp.history import PROXY, RunningVolume
from autocomp.objective import Objective
from autocomp.pareto import ParetoFront
from autocomp.tracking.base import Tracker
from autocomp.trial import Trial

logger = logging.getLogger("autocomp")


@dataclass(frozen=True)
class Event:
    """Something that a user may want to see. ``kind``: ``phase``, ``trial`` or ``message``."""

    kind: str
    text: str
    trial: Trial | None = None
    done: int = 0
    total: int = 0
    busy: int = 0
    best: Mapping[str, float] = field(default_factory=dict)
    eta_s: float | None = None


@dataclass(frozen=True)
class StudyResult:
    """What a study returns.

    Attributes:
        front: the validated front; before validation (``stopped``) the front of the proxy measurements.
        status: ``finished`` or ``stopped``.
        audit: rank correlation of predicted against measured, as JSON; empty when there was none.
        hypervolume: after each proxy trial, against one fixed reference.
        noise: what is known of it, as JSON: ``drift`` (``Readings.summary``), ``pairs`` of points that were
            close in latency with their verdicts, ``unknown`` (objectives without standard errors), and all of
            this in sentences (``words``).
    """

    run_dir: Path
    front: ParetoFront
    status: str
    audit: Mapping[str, Any]
    hypervolume: Sequence[float]
    seconds: float
    noise: Mapping[str, Any] = field(default_factory=dict)


class Guarded:
    """A tracker whose errors are logged once and never stop a study."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._warned = tracker, False

    def __getattr__(self, name: str) -> Callable[..., None]:
        method = getattr(self._tracker, name)

        def call(*args: Any) -> None:
            try:
                method(*args)
            except Exception as error:  # a tracker's server, disk or schema must not cost a measurement
                if not self._warned:
                    logger.warning("%s failed, going on without it: %s", type(self._tracker).__name__, error)
                self._warned = True

        return call


class Trackers:
    """All trackers as one. They hear of trials that score quality; timings alone only serve these."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._all = [Guarded(t) for t in trackers]
        self.volume: RunningVolume | None = None  # set when the search begins: progress is told from then on

    def start(self, job: Mapping[str, Any], run_dir: Path) -> None:
        for tracker in self._all:
            tracker.start(job, run_dir)

    def trial(self, trial: Trial) -> None:
        if not trial.fidelity.split:
            return
        for tracker in self._all:
            tracker.trial(trial)
        if trial.fidelity.name == PROXY.name and self.volume is not None:
            volume = self.volume.add(trial)
            for tracker in self._all:
                tracker.progress(trial.number, {"hypervolume": volume})

    def finish(self, summary: Mapping[str, Any], artifacts: Sequence[Path], status: str) -> None:
        for tracker in self._all:
            tracker.finish(summary, artifacts, status)


def trial_words(trial: Trial, objectives: Sequence[Objective]) -> str:
    """One line about a trial: who asked for it, and its objectives or why it failed."""
    text = f"trial {trial.number} ({trial.origin}, {trial.fidelity.name}): "
    if trial.failure is not None:
        return text + f"{trial.failure.kind}: {trial.failure.reason}"
    known = trial.values()
    shown = [o.metric for o in objectives if trial.fidelity.split or o.metric in known]
    return text + ", ".join(f"{metric} {trial.value(metric):.4g}" for metric in shown)


def artifacts(result: StudyResult) -> list[Path]:
    """Figures and tables of the run; a drawing that fails is logged and left out."""
    from autocomp.report import write_artifacts

    try:
        return write_artifacts(result)
    except Exception as error:  # a picture must not cost a result
        logger.warning("could not draw the figures: %s", error)
        return [result.run_dir / "front.json"]
