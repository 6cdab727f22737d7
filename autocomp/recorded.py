"""Recordings: what runs measured, as one small file, and a worker that answers from it.

    Recording.of_runs(["runs/mine"]).save("mine.json.gz")
    worker = RecordedWorker(Recording.load("mine.json.gz"))

``SimulatedExecutor(worker)`` then replays a search through the same ``Study`` as the real one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from autocomp.description import Description
from autocomp.errors import RunError
from autocomp.executors.base import ItemFailed
from autocomp.executors.simulated import SimulatedExecutor
from autocomp.history import PROXY, REPORT, SELECTION
from autocomp.nearest import Nearest
from autocomp.profile import ProfileResult
from autocomp.recorded_file import (
    pack_candidates,
    pack_level,
    read_file,
    unpack_candidates,
    unpack_level,
    write_file,
)
from autocomp.recorded_runs import STAND_IN, RunRecord
from autocomp.space import Candidate
from autocomp.trial import Estimate, Failure, Fidelity, Trial

Key = tuple[str, str]
"""(fidelity name, candidate fingerprint)."""


@dataclass(frozen=True)
class Recording:
    """What was measured of one model, on one machine.

    Attributes:
        description: what the worker told about model and space.
        trials: measurements and failures with the seconds that they took; those of one fidelity are together,
            in the order in which they were made. ``Measurement.details`` are not kept.
        profiles: sensitivities and kernel times of the uncompressed model, one a kind. Profiles around other
            candidates are not kept: another search would ask for other ones.
        workers: workers that the run had.
    """

    description: Description
    trials: Mapping[Key, Trial]
    profiles: tuple[ProfileResult, ...] = ()
    workers: int = 1

    @classmethod
    def of_runs(cls, run_dirs: Sequence[str | Path], *, corrected: bool = False) -> Recording:
        """The recording of runs of one model, space, machine and software, finished or not.

        Where several trials have one key, the first that succeeded is kept.

        Args:
            run_dirs: at least one run directory.
            corrected: latencies as the study reads them: corrected for what the device drifted, repeats of
                the report put together. Trials that only time are then left out. Otherwise everything is kept
                as it was measured.

        Raises:
            RunError: a folder is no run, nothing was measured, or the runs differ in what they measured.
        """
        runs = [RunRecord.read(Path(folder), corrected) for folder in run_dirs]
        if not runs:
            raise RunError("no run to record; name at least one run directory")
        for run in runs[1:]:
            run.check_like(runs[0])
        trials: dict[Key, Trial] = {}
        profiles: dict[str, ProfileResult] = {}
        for run in runs:
            for trial in run.trials:
                if trial.key not in trials or (trial.ok and not trials[trial.key].ok):
                    trials[trial.key] = trial
            for profile in run.profiles:
                profiles.setdefault(profile.kind, profile)
        if not trials:
            raise RunError(f"nothing was measured in {', '.join(str(r.folder) for r in runs)}")
        workers = max(r.workers for r in runs)
        return cls(runs[0].description, _numbered(trials.values()), tuple(profiles.values()), workers)

    def at(self, level: str) -> list[Trial]:
        """The trials of one fidelity, by its name."""
        return [t for t in self.trials.values() if t.fidelity.name == level]

    @cached_property
    def levels(self) -> tuple[str, ...]:
        """Names of the fidelities at which quality was scored; timings alone are not among them."""
        return tuple(dict.fromkeys(t.fidelity.name for t in self.trials.values() if t.fidelity.split))

    def save(self, path: str | Path) -> None:
        """Write a gzipped JSON file; equal recordings give equal bytes. Raises ``RunError``."""
        candidates = list(dict.fromkeys(t.candidate for t in self.trials.values()))
        positions = {c: i for i, c in enumerate(candidates)}
        data = {
            "workers": self.workers,
            "description": self.description.to_json(),
            "candidates": pack_candidates(candidates),
            "levels": [pack_level(alike, positions) for alike in _alike(self.trials.values())],
            "profiles": [p.to_json() for p in self.profiles],
        }
        write_file(Path(path).expanduser(), data)

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read what ``save`` wrote.

        Raises:
            RunError: there is no such file, it is cut off or no recording, or a newer autocomp wrote it.
        """
        data = read_file(Path(path).expanduser())
        try:
            candidates = unpack_candidates(data["candidates"])
            trials: list[Trial] = []
            for level in data["levels"]:
                trials += unpack_level(level, candidates, len(trials))
            profiles = tuple(ProfileResult.from_json(p) for p in data["profiles"])
            return cls(
                Description.from_json(data["description"]), _numbered(trials), profiles, data["workers"]
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise RunError(f"the recording {str(path)!r} is damaged ({error!r}); record it again") from None


def _alike(trials: Iterable[Trial]) -> list[list[Trial]]:
    """Trials in groups of one split, number of sequences and timing."""
    groups: dict[Fidelity, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(replace(trial.fidelity, name=""), []).append(trial)
    return list(groups.values())


def _numbered(trials: Iterable[Trial]) -> dict[Key, Trial]:
    """Trials by key, group by group, numbered as they then stand."""
    ordered = [trial for alike in _alike(trials) for trial in alike]
    return {(t.fidelity.name, t.candidate.fingerprint): replace(t, number=i) for i, t in enumerate(ordered)}


class RecordedWorker:
    """Answers as the recorded worker did; has no model and needs none of its files.

    Args:
        recording: what it knows.
        nearest: answer for a candidate that was not measured at a fidelity, too: with its own measurement at
            the most thorough other fidelity, else with that of the nearest measured candidate (fewest
            decisions apart; along ordered options and intervals, the smallest way) and the candidate's own
            exact metrics. ``details["stand_in"]`` then names candidate, fidelity and distance. Repeated
            timings have no stand-in: a value given twice would look twice as sure.
    """

    def __init__(self, recording: Recording, nearest: bool = False) -> None:
        self.recording = recording
        self._nearest = nearest
        self._profiles = {p.kind: p for p in recording.profiles}
        self._timed = {name: self._has_timing(name) for name in recording.levels}
        self._neighbours: dict[str, Nearest] = {}

    def _has_timing(self, level: str) -> bool:
        wanted = set(self.recording.description.timing)
        return not wanted or any(wanted & t.values().keys() for t in self.recording.at(level))

    def describe(self) -> dict[str, Any]:
        """The recorded description, offering the profiles that were recorded and no others."""
        description = self.recording.description
        operations = self._profiles.get("operations")
        timed = {m for row in operations.rows.values() for m in row} if operations else set()
        return replace(
            description,
            profiles=tuple(p for p in description.profiles if p in self._profiles),
            rows={metric: row for metric, row in description.rows.items() if metric in timed},
        ).to_json()

    def profile(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A recorded profile: all of it from shard 0, nothing from the others; each takes its share of time.

        Raises:
            ItemFailed: it was not recorded (``unmeasured``).
        """
        found = self._profiles.get(request["kind"])
        if found is None or request.get("at"):
            where = " around a candidate" if request.get("at") else ""
            raise _unmeasured(f"the profile {request['kind']!r}{where} is not in the recording")
        rows = found.rows if request["shard"] == 0 else {}
        return replace(found, rows=rows, seconds=found.seconds / request["shards"]).to_json()

    def measure(self, candidate: Mapping[str, Any], fidelity: Mapping[str, Any]) -> dict[str, Any]:
        """The recorded measurement.

        Raises:
            ItemFailed: the recorded failure, or ``unmeasured``.
        """
        wanted, level = Candidate.of(candidate), Fidelity(**fidelity)
        if level.timing and not self._timed.get(level.name, True):
            raise _unmeasured(
                f"the recording has no timings at {level.name!r}; record a run with a latency objective, or"
                " drop yours"
            )
        trial = self.recording.trials.get((level.name, wanted.fingerprint))
        if trial is None or replace(trial.fidelity, timing=level.timing) != level:
            # Not measured, or on other data under the same name.
            trial = self._stand_in(wanted, level)
        if trial.measurement is None:
            raise ItemFailed(trial.failure or Failure("error", "recorded without a reason"))
        measured: dict[str, Any] = trial.to_json()["measurement"]
        return measured

    def _stand_in(self, wanted: Candidate, level: Fidelity) -> Trial:
        if not level.split:
            raise _unmeasured(
                f"candidate {wanted.fingerprint} was not timed that often when it was recorded; a replay can"
                " do without: set validation.repeats and validation.reference_every to 0"
            )
        if not self._nearest:
            raise _unmeasured(
                f"candidate {wanted.fingerprint} was not measured at {level.name!r}; record more runs (the"
                " searcher `exhaustive` measures a whole space), or set executor.nearest to true"
            )
        for name in dict.fromkeys((REPORT.name, SELECTION.name, PROXY.name, *self.recording.levels)):
            trial = self.recording.trials.get((name, wanted.fingerprint))
            if trial is not None and trial.ok:
                return _told(trial, 0.0, {})
        if level.name not in self._neighbours:
            known = [t for t in self.recording.at(level.name) if t.ok]
            self._neighbours[level.name] = Nearest(self.recording.description.space, known)
        trial, distance = self._neighbours[level.name].find(wanted)
        if trial is None:
            raise _unmeasured(f"nothing was measured at {level.name!r}; record a run that gets that far")
        exact = {m: Estimate(t.total(wanted)) for m, t in self.recording.description.exact.items()}
        return _told(trial, distance, exact)


def _told(trial: Trial, distance: float, metrics: Mapping[str, Estimate]) -> Trial:
    """The trial with ``metrics`` in place of its own where it has them, and a note of what it is."""
    assert trial.measurement is not None
    own = trial.measurement.metrics
    note = {"candidate": trial.candidate.fingerprint, "fidelity": trial.fidelity.name, "distance": distance}
    mixed = {**own, **{m: e for m, e in metrics.items() if m in own}}
    return replace(trial, measurement=replace(trial.measurement, metrics=mixed, details={STAND_IN: note}))


def _unmeasured(reason: str) -> ItemFailed:
    return ItemFailed(Failure("unmeasured", reason))


def replay_executor(table: str | Path, workers: int = 0, nearest: bool = False) -> SimulatedExecutor:
    """An executor that replays the recording in the file ``table``.

    Args:
        table: what ``Recording.save`` wrote.
        workers: how many to simulate; 0 for as many as the recorded run had.
        nearest: as for ``RecordedWorker``.

    Raises:
        RunError: as ``Recording.load`` does.
    """
    recording = Recording.load(table)
    return SimulatedExecutor(RecordedWorker(recording, nearest), slots=workers or recording.workers)
