"""A study as an Optuna study in a journal file, whatever searcher ran it.

Every trial, of ILP and evolution too, becomes a finished Optuna trial, so that ``optuna-dashboard
RUN_DIR/optuna.log`` and Optuna's own plots work. The mirror is write-only: no search reads it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from autocomp.errors import RunError
from autocomp.objective import Constraint, Objective
from autocomp.run_files import read_space
from autocomp.space import Choice, Decision, SearchSpace
from autocomp.trial import Trial

NUMBER = "trial"  # the user attribute that holds a trial's number in the study


class OptunaTracker:
    """Mirrors a study into Optuna's journal storage.

    Args:
        path: the journal; ``RUN_DIR/optuna.log`` when empty.
        study_name: the name of the run directory when empty.
    """

    def __init__(self, path: str | Path = "", study_name: str = "", **options: object) -> None:
        del options
        self._path, self._name = str(path), study_name
        self._run_dir = Path()
        self._study: optuna.Study | None = None
        self._space: SearchSpace | None = None
        self._objectives: tuple[Objective, ...] = ()
        self._constraints: tuple[Constraint, ...] = ()
        self._known: set[int] = set()

    def start(self, job: Mapping[str, Any], run_dir: Path) -> None:
        """Create the study, or load it and learn which trials it has.

        Raises:
            RunError: the file holds a study of this name with other objectives.
        """
        self._run_dir = run_dir.resolve()
        self._objectives = tuple(Objective.parse(o) for o in job["objectives"])
        self._constraints = tuple(Constraint.parse(c) for c in job.get("constraints", ()))
        path = Path(self._path).expanduser().absolute() if self._path else self._run_dir / "optuna.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        self._study = self._load(path, self._name or self._run_dir.name)
        done = self._study.get_trials(deepcopy=False)
        self._known = {int(t.user_attrs[NUMBER]) for t in done if NUMBER in t.user_attrs}
        if not done:
            self._study.set_user_attr("job", dict(job))

    def _load(self, path: Path, name: str) -> optuna.Study:
        directions = ["minimize" if o.minimize else "maximize" for o in self._objectives]
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # "A new study created ..." is not ours to say
        try:
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(path))),
                sampler=optuna.samplers.RandomSampler(),  # never asked: this study only records
                study_name=name,
                directions=directions,
                load_if_exists=True,
            )
        finally:
            optuna.logging.set_verbosity(verbosity)
        if [d.name.lower() for d in study.directions] != directions:
            raise RunError(f"{path} holds a study {name!r} with other objectives; move the file away")
        if study.metric_names is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names([o.metric for o in self._objectives])
        return study

    def trial(self, trial: Trial) -> None:
        """Add a finished trial, unless the study has its number already.

        Raises:
            RunError: ``start`` did not succeed, or the run directory has no readable description.
        """
        if trial.number in self._known:
            return
        if self._study is None:
            raise RunError("the Optuna mirror was not started")
        if self._space is None:
            self._space = read_space(self._run_dir)
        self._study.add_trial(frozen(trial, self._space, self._objectives, self._constraints))
        self._known.add(trial.number)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing: Optuna computes its own hypervolume and best values from the trials."""

    def finish(self, summary: Mapping[str, Any], artifacts: Sequence[Path], status: str) -> None:
        """Record how the study ended and which trials are on its front."""
        del artifacts
        if self._study is None:
            return
        points = summary.get("front", {}).get("points", [])
        members = [p["trial"]["number"] for p in points if p["label"] != "dominated"]
        self._study.set_user_attr("status", status)
        self._study.set_user_attr("front", members)


def distribution(decision: Decision) -> BaseDistribution:
    """Categorical for a choice, ordered or not (Optuna's integers have no labels); float for an interval."""
    if isinstance(decision.domain, Choice):
        return CategoricalDistribution(decision.domain.options)
    return FloatDistribution(decision.domain.low, decision.domain.high)


def frozen(
    trial: Trial,
    space: SearchSpace,
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint] = (),
) -> FrozenTrial:
    """The trial in Optuna's form.

    Unused slots (``None`` in a nullable interval) are parameters that the trial does not have. A trial
    without a finite value for each objective is ``FAIL``. Constraint values are signed distances to the
    bound, feasible when not above 0.
    """
    values = trial.candidate.values
    used = [d for d in space if d.name in values and not (values[d.name] is None and not d.options)]
    losses = [trial.value(o.metric) for o in objectives]
    complete = trial.ok and all(math.isfinite(v) for v in losses)
    signed = {str(c): (1 if c.upper else -1) * (trial.value(c.metric) - c.bound) for c in constraints}
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if complete else TrialState.FAIL,
        values=losses if complete else None,
        params={d.name: values[d.name] for d in used},
        distributions={d.name: distribution(d) for d in used},
        user_attrs=_attributes(trial),
        constraints={k: v for k, v in signed.items() if math.isfinite(v)} if complete else None,
    )


def _attributes(trial: Trial) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        NUMBER: trial.number,
        "fingerprint": trial.candidate.fingerprint,
        "origin": trial.origin,
        "fidelity": trial.fidelity.name,
    }
    if trial.failure is not None:
        attributes |= {"failure": trial.failure.kind, "reason": trial.failure.reason}
    if trial.measurement is not None:
        attributes["device"] = trial.measurement.device
        for name, estimate in trial.measurement.metrics.items():
            attributes[name] = estimate.value if math.isfinite(estimate.value) else str(estimate.value)
            if estimate.stderr > 0:
                attributes[f"{name}_stderr"] = estimate.stderr
    return attributes


def cut_torn_line(path: Path) -> None:
    """Drop an unfinished last line, which a killed writer leaves and the next append would corrupt."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
