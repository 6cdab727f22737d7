"""What a recording takes from one run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autocomp.description import Description
from autocomp.errors import RunError
from autocomp.history import PROXY, REPORT, SELECTION
from autocomp.job import Job
from autocomp.journal import read_records
from autocomp.profile import ProfileResult
from autocomp.run_files import read_description
from autocomp.trial import Trial

STAND_IN = "stand_in"
"""In a measurement's details: which recorded measurement a replay gave in place of one that is not there."""

_SAME = ("workload", "space", "seed", "device")  # what runs must share for their measurements to be alike


@dataclass(frozen=True)
class RunRecord:
    """What a recording takes from one run directory."""

    folder: Path
    job: Mapping[str, Any]
    description: Description
    trials: tuple[Trial, ...]
    profiles: tuple[ProfileResult, ...]
    workers: int

    @classmethod
    def read(cls, folder: Path, corrected: bool) -> RunRecord:
        records = read_records(folder)
        job: Mapping[str, Any] = next((r["job"] for r in records if r["kind"] == "job"), {})
        made = [Trial.from_json(r["trial"]) for r in records if r["kind"] == "trial"]
        found = _corrected(records, job) if corrected else made
        return cls(
            folder,
            job,
            read_description(folder),
            tuple(_stripped(t) for t in found if not _made_up(t)),
            tuple(ProfileResult.from_json(r["result"]) for r in records if _is_plain_profile(r)),
            max(1, len({t.worker for t in made} - {""})),
        )

    def check_like(self, first: RunRecord) -> None:
        """Raise ``RunError`` unless both runs measured the same things in the same way."""
        ours, theirs = self.description, first.description
        pairs: list[tuple[str, Any, Any]] = [("model", ours.site.fingerprint, theirs.site.fingerprint)]
        pairs += [("search space", ours.space, theirs.space), ("device", ours.device, theirs.device)]
        pairs += [("software", dict(ours.versions), dict(theirs.versions))]
        pairs += [(f"job's {key}", self.job.get(key), first.job.get(key)) for key in _SAME]
        for what, mine, other in pairs:
            if mine != other:
                raise RunError(
                    f"{str(self.folder)!r} and {str(first.folder)!r} differ in the {what}; record them apart"
                )


def _corrected(records: Sequence[Mapping[str, Any]], job: Mapping[str, Any]) -> list[Trial]:
    """A run's trials as its study reads them; without those that only time."""
    from autocomp.api import read_trials

    readings = read_trials(records, Job.of(job))
    return [trial for level in (PROXY, SELECTION, REPORT) for trial in readings.at(level)]


def _stripped(trial: Trial) -> Trial:
    """The trial without what depends on one run alone."""
    measurement = trial.measurement and replace(trial.measurement, details={})
    return replace(trial, measurement=measurement, worker="", attempts=1)


def _made_up(trial: Trial) -> bool:
    """True for what a replay could not look up: it was never measured."""
    if trial.measurement is not None:
        return STAND_IN in trial.measurement.details
    return trial.failure is not None and trial.failure.kind == "unmeasured"


def _is_plain_profile(record: Mapping[str, Any]) -> bool:
    return record["kind"] == "profile" and not record.get("at")
