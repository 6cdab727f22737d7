"""The MLflow tracker against a real SQLite store."""

from __future__ import annotations

import fcntl
import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from autocomp.errors import JobError
from autocomp.objective import Objective
from autocomp.pareto import ParetoFront
from autocomp.tracking import mlflow as module
from autocomp.tracking.mlflow import MlflowTracker, absolute_uri, flatten
from autocomp.trial import Trial

MakeTrial = Callable[..., Trial]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Making the tables takes seconds: once for all tests."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    module._write_ahead(path)
    client = MlflowClient(f"sqlite:///{path}")
    client.search_experiments()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return path


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    yield f"sqlite:///{tmp_path / 'mlflow.db'}"


def parents_and_children(uri: str) -> tuple[list[Run], list[Run]]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("autocomp")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    return parents, sorted(children, key=lambda r: int(r.data.tags["trial"]))


def artifact(uri: str, run: Run, name: str) -> Any:
    local = MlflowClient(uri).download_artifacts(run.info.run_id, name)
    return json.loads(Path(local).read_text())


def summary_of(trials: list[Trial]) -> dict[str, Any]:
    front = ParetoFront.of(trials, [Objective("kl"), Objective("speed", minimize=False)])
    return {"front": front.to_json(), "status": "finished"}


def test_a_study_is_one_parent_with_a_child_a_trial(
    uri: str, run_dir: Path, job: dict[str, Any], trial: MakeTrial, tmp_path: Path
) -> None:
    picture = tmp_path / "front.html"
    picture.write_text("<html>")
    trials = [trial(0, kl=0.1), trial(1, kl=0.5, memory=50.0), trial(2, failed=True), trial(3, kl=0.9)]
    tracker = MlflowTracker(uri)
    tracker.start(job, run_dir)
    for t in trials:
        tracker.trial(t)
        tracker.progress(t.number, {"hypervolume": float(t.number), "bad": float("nan")})
    worse = trial(4, kl=2.0)
    tracker.trial(worse)
    tracker.finish(summary_of([*trials[:2], trials[3]]), [picture, tmp_path / "missing.png"], "finished")

    (parent,), children = parents_and_children(uri)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["model"] == "some/model" and parent.data.tags["run_dir"] == str(run_dir)
    assert parent.data.params["workload.scenario.batch"] == "1"
    assert parent.data.params["space.0.bitwidths.bits"] == "[4, 8]"
    assert parent.data.metrics == {"hypervolume": 3.0}
    history = MlflowClient(uri).get_metric_history(parent.info.run_id, "hypervolume")
    assert [m.step for m in history] == [0, 1, 2, 3]
    assert {f.path for f in MlflowClient(uri).list_artifacts(parent.info.run_id)} == {
        "front.html", "front_5_trials.json", "job.json", "summary.json",
    }  # fmt: skip
    assert artifact(uri, parent, "job.json") == job
    table = artifact(uri, parent, "front_5_trials.json")
    assert len(table["data"]) == 3 and "kl_stderr" in table["columns"]

    assert len(children) == 5
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {parent.info.run_id}
    first, failed = children[0], children[2]
    assert first.info.status == "FINISHED" and failed.info.status == "FAILED"
    assert first.data.metrics == {
        "kl": 0.1, "kl_stderr": 0.01, "speed": 10.0, "speed_stderr": 0.5, "memory_mb": 100.0, "seconds": 2.0,
    }  # fmt: skip
    assert artifact(uri, first, "candidate.json") == trials[0].candidate.to_json()
    assert first.data.tags["origin"] == "hybrid" and first.data.tags["fidelity"] == "proxy"
    assert failed.data.tags["failure"] == "oom" and failed.data.tags["reason"] == "needs 3 GB"
    assert [c.data.tags["pareto"] for c in children] == ["true", "true", "false", "true", "false"]


def test_a_resumed_study_continues_its_parent_and_repeats_no_child(
    uri: str, run_dir: Path, job: dict[str, Any], trial: MakeTrial
) -> None:
    first = MlflowTracker(uri)
    first.start(job, run_dir)
    for n in range(3):
        first.trial(trial(n))
        first.progress(n, {"hypervolume": 1.0})
    first.finish(summary_of([trial(0), trial(2)]), [], "stopped")
    assert parents_and_children(uri)[0][0].info.status == "KILLED"

    second = MlflowTracker(uri)
    second.start(job, run_dir)
    assert parents_and_children(uri)[0][0].info.status == "RUNNING"
    for n in range(5):  # the study tells the whole history again
        second.trial(trial(n))
        second.progress(n, {"hypervolume": 1.0})
    second.finish(summary_of([trial(0), trial(4)]), [], "finished")

    (parent,), children = parents_and_children(uri)
    assert [c.data.tags["trial"] for c in children] == ["0", "1", "2", "3", "4"]
    assert [c.data.tags["pareto"] for c in children] == ["false", "false", "false", "false", "true"]
    history = MlflowClient(uri).get_metric_history(parent.info.run_id, "hypervolume")
    assert [m.step for m in history] == [0, 1, 2, 3, 4]


def test_a_child_that_a_kill_cut_off_is_written_again(
    uri: str, run_dir: Path, job: dict[str, Any], trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = MlflowTracker(uri)
    first.start(job, run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", _raise)
        with pytest.raises(MlflowException):
            first.trial(trial(0))
    second = MlflowTracker(uri)
    second.start(job, run_dir)
    second.trial(trial(0))
    _, children = parents_and_children(uri)
    assert len(children) == 1 and children[0].data.metrics["kl"] == 0.1


def test_a_store_that_fails_is_left_alone_for_a_while_and_then_gets_everything(
    uri: str, run_dir: Path, job: dict[str, Any], trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MlflowTracker(uri)
    tracker.start(job, run_dir)
    calls: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", partial(_raise, calls))
        with pytest.raises(MlflowException):
            tracker.trial(trial(0))
        tracker.trial(trial(1))  # silent: the store is not asked again so soon
        tracker.progress(1, {"hypervolume": 1.0})
    assert calls == ["called"]
    tracker.finish({}, [], "finished")
    _, children = parents_and_children(uri)
    assert [c.data.tags["trial"] for c in children] == ["0", "1"]


def test_no_run_of_the_environment_or_the_caller_captures_anything(
    uri: str, run_dir: Path, job: dict[str, Any], trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "12345")
    tracker = MlflowTracker(uri)
    tracker.start(job, run_dir)
    tracker.trial(trial(0))
    (parent,), (child,) = parents_and_children(uri)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.info.run_id != "f" * 32


def test_a_vanished_parent_is_replaced(uri: str, run_dir: Path, job: dict[str, Any]) -> None:
    tracker = MlflowTracker(uri)
    tracker.start(job, run_dir)
    state = json.loads((run_dir / "tracking.json").read_text())
    state["mlflow"]["run_id"] = "0" * 32
    (run_dir / "tracking.json").write_text(json.dumps(state))
    MlflowTracker(uri).start(job, run_dir)
    (run_dir / "tracking.json").write_text("{ torn")
    MlflowTracker(uri).start(job, run_dir)
    assert len(parents_and_children(uri)[0]) == 3


def test_folders_are_refused_with_the_remedy() -> None:
    for bad in ("mlruns", "./mlruns", "file:///tmp/mlruns", ""):
        with pytest.raises(JobError, match=r"sqlite:///mlflow\.db"):
            MlflowTracker(bad)
    assert absolute_uri("http://host:5000") == "http://host:5000"
    assert absolute_uri("postgresql+psycopg2://u@h/db") == "postgresql+psycopg2://u@h/db"


def test_a_relative_database_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///x.db") == f"sqlite:///{tmp_path / 'x.db'}"
    assert absolute_uri("sqlite:////a/x.db") == "sqlite:////a/x.db"


def test_artifacts_lie_beside_the_database(uri: str, run_dir: Path, job: dict[str, Any]) -> None:
    MlflowTracker(uri).start(job, run_dir)
    experiment = MlflowClient(uri).get_experiment_by_name("autocomp")
    assert experiment.artifact_location == (run_dir.parent / "mlartifacts" / "autocomp").as_uri()


def test_a_deleted_experiment_is_an_error_with_the_remedy(
    uri: str, run_dir: Path, job: dict[str, Any]
) -> None:
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("autocomp"))
    with pytest.raises(JobError, match="mlflow experiments restore"):
        MlflowTracker(uri).start(job, run_dir)


def test_ending_before_the_start_records_nothing(uri: str) -> None:
    MlflowTracker(uri).finish({}, [], "stopped")
    assert MlflowClient(uri).get_experiment_by_name("autocomp") is None


def test_flatten_keeps_lists_of_values_whole_and_cuts_long_ones() -> None:
    flat = flatten({"a": {"b": [1, 2]}, "c": [{"d": None}, {"e": "x" * 9999}], "bad key(%)": True})
    assert flat["a.b"] == "[1, 2]" and flat["c.0.d"] == "null" and flat["bad key___"] == "true"
    assert len(flat["c.1.e"]) == 500


def test_a_trial_costs_milliseconds(uri: str, run_dir: Path, job: dict[str, Any], trial: MakeTrial) -> None:
    tracker = MlflowTracker(uri)
    tracker.start(job, run_dir)
    tracker.trial(trial(0))
    started = time.process_time()
    for n in range(1, 21):
        tracker.trial(trial(n))
    assert (time.process_time() - started) / 20 < 0.1  # about 0.02 s; a guard against a new round trip


def test_drivers_make_the_tables_one_after_the_other(
    uri: str, run_dir: Path, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    connect = module._connect

    def watched(uri: str) -> MlflowClient:
        with open(uri.removeprefix("sqlite:///") + ".lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken.append(True)
        return connect(uri)

    monkeypatch.setattr(module, "_connect", watched)
    MlflowTracker(uri).start(job, run_dir)
    assert taken == [True]


def test_the_database_is_switched_to_write_ahead_logging(
    uri: str, run_dir: Path, job: dict[str, Any]
) -> None:
    MlflowTracker(uri).start(job, run_dir)
    database = sqlite3.connect(uri.removeprefix("sqlite:///"))
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()
    module._write_ahead(Path("/nonexistent/x.db"))  # a file that can't be opened is MLflow's to report


def _raise(calls: list[str] | None = None, *_: object, **__: object) -> None:
    if isinstance(calls, list):
        calls.append("called")
    raise MlflowException("the store is away")
