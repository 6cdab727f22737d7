"""The Optuna mirror, read back with Optuna itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from autocomp.errors import RunError
from autocomp.objective import Objective
from autocomp.pareto import ParetoFront
from autocomp.tracking.optuna import OptunaTracker
from autocomp.trial import Trial

MakeTrial = Callable[..., Trial]


def read(path: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(path)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.load_study(study_name=None, storage=storage, sampler=optuna.samplers.RandomSampler())


def test_trials_of_any_searcher_become_optuna_trials(
    run_dir: Path, job: dict[str, Any], trial: MakeTrial
) -> None:
    tracker = OptunaTracker()
    tracker.start(job, run_dir)
    trials = [trial(0), trial(1, kl=0.5, memory=250.0), trial(2, failed=True), trial(3, kl=float("nan"))]
    for t in trials:
        tracker.trial(t)
    front = ParetoFront.of(trials, [Objective("kl")])
    tracker.finish({"front": front.to_json()}, [], "finished")

    study = read(run_dir / "optuna.log")
    assert study.study_name == "run-1" and study.metric_names == ["kl", "speed"]
    assert [d.name for d in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    first, second, failed, nan = study.trials
    assert first.values == [0.1, 10.0]
    assert first.params == {
        "bitwidths/layers.0.up": "w4", "bitwidths/layers.1.up": "w4", "bitwidths/layers.2.up": "w4",
        "schedule/t0": 0.0,
    }  # fmt: skip
    assert "schedule/t0" not in second.params  # an unused slot
    assert first.constraints == {"memory_mb <= 200": -100.0}
    assert second.constraints == {"memory_mb <= 200": 50.0}
    assert first.user_attrs["kl_stderr"] == 0.01 and first.user_attrs["worst"] == "inf"
    assert failed.state is TrialState.FAIL and failed.user_attrs["reason"] == "needs 3 GB"
    assert nan.state is TrialState.FAIL
    assert study.user_attrs["status"] == "finished" and study.user_attrs["front"] == [0]
    assert study.user_attrs["job"]["objectives"] == ["min kl", "max speed"]


def test_a_resumed_study_repeats_no_trial(run_dir: Path, job: dict[str, Any], trial: MakeTrial) -> None:
    for last in (2, 4):
        tracker = OptunaTracker(run_dir / "optuna.log")
        tracker.start(job, run_dir)
        for n in range(last):
            tracker.trial(trial(n))
    study = read(run_dir / "optuna.log")
    assert [t.user_attrs["trial"] for t in study.trials] == [0, 1, 2, 3]


def test_a_line_that_a_kill_tore_is_cut_off(run_dir: Path, job: dict[str, Any], trial: MakeTrial) -> None:
    path = run_dir / "optuna.log"
    first = OptunaTracker()
    first.start(job, run_dir)
    first.trial(trial(0))
    first.trial(trial(1))
    path.write_bytes(path.read_bytes()[:-20])
    second = OptunaTracker()
    second.start(job, run_dir)
    for n in range(3):
        second.trial(trial(n))
    assert [t.user_attrs["trial"] for t in read(path).trials] == [0, 1, 2]


def test_a_missing_description_is_named(tmp_path: Path, job: dict[str, Any], trial: MakeTrial) -> None:
    tracker = OptunaTracker()
    with pytest.raises(RunError, match="not started"):
        tracker.trial(trial(0))
    tracker.start(job, tmp_path)
    with pytest.raises(RunError, match=r"description\.json.*missing"):
        tracker.trial(trial(0))


def test_another_studys_file_is_refused(run_dir: Path, job: dict[str, Any]) -> None:
    OptunaTracker().start(job, run_dir)
    with pytest.raises(RunError, match="other objectives"):
        OptunaTracker().start({**job, "objectives": ["min kl"]}, run_dir)


def test_one_objective_and_a_name_of_its_own(run_dir: Path, job: dict[str, Any], trial: MakeTrial) -> None:
    tracker = OptunaTracker(study_name="mine")
    tracker.start({**job, "objectives": ["max speed"]}, run_dir)
    tracker.trial(trial(5))
    tracker.progress(5, {"hypervolume": 1.0})
    study = read(run_dir / "optuna.log")
    assert study.study_name == "mine" and study.best_value == 15.0


def test_finish_without_start_does_nothing() -> None:
    OptunaTracker().finish({}, [], "stopped")
