"""The interface of a tracker, and the one that does nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from autocomp.trial import Trial


class Tracker(Protocol):
    """Told about everything that is in the journal, in order; may be told again after a resume.

    A tracker must not end a search: the study catches what it raises, warns once and goes on.
    """

    def start(self, job: Mapping[str, Any], run_dir: Path) -> None:
        """Begin or continue (same ``run_dir``) the record of a study with its resolved job."""
        ...

    def trial(self, trial: Trial) -> None:
        """A trial has ended. Called once a trial; again after a resume only for new trials."""
        ...

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Running figures of the study (hypervolume, best values) after ``step`` trials."""
        ...

    def finish(self, summary: Mapping[str, Any], artifacts: Sequence[Path], status: str) -> None:
        """The end: front and audit as JSON, files to keep, ``finished``, ``stopped`` or ``failed``."""
        ...


class NullTracker:
    """Tracks nothing."""

    def __init__(self, **options: object) -> None:
        del options

    def start(self, job: Mapping[str, Any], run_dir: Path) -> None: ...

    def trial(self, trial: Trial) -> None: ...

    def progress(self, step: int, values: Mapping[str, float]) -> None: ...

    def finish(self, summary: Mapping[str, Any], artifacts: Sequence[Path], status: str) -> None: ...
