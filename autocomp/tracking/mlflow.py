"""A study in MLflow: one parent run, one child run a measured trial.

Only ``MlflowClient`` with explicit run ids is used: there is no active run, so neither a run that the
caller has open nor ``MLFLOW_RUN_ID`` in the environment can capture what is logged here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run
from mlflow.exceptions import MlflowException

from autocomp import report
from autocomp.errors import JobError
from autocomp.pareto import ParetoFront
from autocomp.trial import Trial

log = logging.getLogger("autocomp.tracking.mlflow")

STATE_FILE = "tracking.json"
_SQL_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")
_BATCH = 100  # MLflow's limit of params and tags in one request
_KEY_LENGTH, _PARAM_LENGTH, _TAG_LENGTH = 250, 500, 5000
_RETRY_AFTER_S = 30.0
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowTracker:
    """Writes a study to an MLflow tracking store.

    The parent run carries the job (params), hypervolume and best values over trials (metrics), figures,
    the front and its table (artifacts). Each child carries one trial: metrics with ``<name>_stderr``,
    ``candidate.json``, and the tags ``trial``, ``origin``, ``fidelity``, ``status``, ``failure``,
    ``reason``, and after the end ``pareto``: ``tags.pareto = 'true'`` in the UI's filter shows the front.

    When the store does not answer, the trials wait in memory and are sent with a later one; the call
    that failed raises, and no further call is tried for 30 seconds, so that a dead server costs little.

    Args:
        uri: ``sqlite:///file.db`` (relative to the current directory), another database, or ``http(s)``.
        experiment: name of the experiment; made when missing.

    Raises:
        JobError: ``uri`` names a plain folder, which MLflow 3 no longer writes.
    """

    def __init__(
        self, uri: str = "sqlite:///mlflow.db", experiment: str = "autocomp", **options: object
    ) -> None:
        del options
        self._uri = absolute_uri(uri)
        self._experiment = experiment
        self._client: MlflowClient | None = None
        self._job: Mapping[str, Any] = {}
        self._run_dir = Path()
        self._experiment_id = ""
        self._parent = ""
        self._last_step = -1
        self._children: dict[int, str] = {}  # trial number -> run id
        self._pareto: dict[int, str] = {}  # trial number -> value of its pareto tag
        self._backlog: list[Trial] = []
        self._quiet_until = 0.0

    def start(self, job: Mapping[str, Any], run_dir: Path) -> None:
        """Open the parent run, or the one that ``run_dir/tracking.json`` names."""
        self._job, self._run_dir = dict(job), run_dir.resolve()
        self._parent = ""
        with self._guarded():
            self._open()

    def trial(self, trial: Trial) -> None:
        """Log a trial as a child run; a trial number that is already there is not logged again."""
        if trial.number not in self._children:
            self._backlog.append(trial)
        if time.monotonic() < self._quiet_until:
            return
        with self._guarded():
            self._flush()

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Log running figures with the number of trials as the step; earlier steps are skipped."""
        if step <= self._last_step or time.monotonic() < self._quiet_until:
            return
        with self._guarded():
            self._open()
            self._log(self._parent, _metrics(values, step))
            self._last_step = step

    def finish(self, summary: Mapping[str, Any], artifacts: Sequence[Path], status: str) -> None:
        """Send what is waiting, mark the front, keep the files, and close the parent run."""
        if not self._run_dir.is_absolute():
            return  # stopped before it was started: there is nothing to record
        with self._guarded():
            self._flush()
            client = self._open()
            for path in artifacts:
                if path.is_dir():
                    client.log_artifacts(self._parent, str(path), path.name)
                elif path.is_file():
                    client.log_artifact(self._parent, str(path))
            client.log_dict(self._parent, dict(summary), "summary.json")
            self._mark_front(summary)
            client.set_terminated(self._parent, _STATUS.get(status, "FAILED"))

    # The parent run

    def _open(self) -> MlflowClient:
        """The client, with the parent run made or found."""
        if self._client is None:
            with _alone(self._uri):
                self._client = _connect(self._uri)
        if not self._parent:
            self._experiment_id = _experiment(self._client, self._experiment, self._uri).experiment_id
            found = self._previous_run(self._client)
            if found is None:
                self._create_parent(self._client)
            else:
                self._adopt_parent(self._client, found)
        return self._client

    def _previous_run(self, client: MlflowClient) -> Run | None:
        """The parent run of an earlier session of this study in the same store, if it is still there."""
        path = self._run_dir / STATE_FILE
        try:
            state = json.loads(path.read_text())["mlflow"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if state.get("uri") != self._uri or state.get("experiment_id") != self._experiment_id:
            return None
        try:
            run = client.get_run(state["run_id"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise  # the store does not answer: a second parent run would split the study
            log.warning("MLflow run %s is gone from %s; starting a new one", state["run_id"], self._uri)
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _create_parent(self, client: MlflowClient) -> None:
        workload = self._job.get("workload", {})
        model = str(workload.get("model", "")) if isinstance(workload, Mapping) else ""
        tags = {"run_dir": str(self._run_dir), "model": model, "autocomp.kind": "study"}
        run = client.create_run(self._experiment_id, tags=tags, run_name=self._run_dir.name)
        self._parent = run.info.run_id
        self._save_state()
        params = [Param(k, v) for k, v in flatten(self._job).items()]
        for i in range(0, len(params), _BATCH):
            client.log_batch(self._parent, params=params[i : i + _BATCH])
        client.log_dict(self._parent, dict(self._job), "job.json")

    def _save_state(self) -> None:
        state = {"uri": self._uri, "experiment_id": self._experiment_id, "run_id": self._parent}
        temporary = self._run_dir / f"{STATE_FILE}.tmp"
        temporary.write_text(json.dumps({"mlflow": state}, indent=2) + "\n")
        temporary.replace(self._run_dir / STATE_FILE)

    def _adopt_parent(self, client: MlflowClient, run: Run) -> None:
        """Continue a run: learn which trials and steps it has, and set it running again."""
        run_id = run.info.run_id
        query = f"tags.`mlflow.parentRunId` = '{run_id}'"
        token: str | None = ""
        while token is not None:
            page = client.search_runs([self._experiment_id], query, page_token=token or None)
            for child in page:
                # A child that is still running was cut off before its metrics: it is written again.
                if child.info.status != "RUNNING" and "trial" in child.data.tags:
                    self._children[int(child.data.tags["trial"])] = child.info.run_id
                    self._pareto[int(child.data.tags["trial"])] = child.data.tags.get("pareto", "")
                else:
                    client.delete_run(child.info.run_id)
            token = page.token or None
        steps = [m.step for key in run.data.metrics for m in client.get_metric_history(run_id, key)]
        self._last_step = max(steps, default=-1)
        client.update_run(run_id, status="RUNNING")
        self._parent = run_id

    # Children

    def _flush(self) -> None:
        client = self._open()
        while self._backlog:
            trial = self._backlog[0]
            if trial.number not in self._children:
                self._children[trial.number] = self._write(client, trial)
            self._backlog.pop(0)

    def _write(self, client: MlflowClient, trial: Trial) -> str:
        """One child run: created with its tags, filled by one batch, closed."""
        now = int(time.time() * 1000)
        seconds = trial.measurement.seconds if trial.measurement is not None else 0.0
        name = f"trial {trial.number:04d}"
        run = client.create_run(self._experiment_id, now - int(1000 * seconds), self._tags(trial), name)
        run_id = str(run.info.run_id)
        _put_json(client, run, trial.candidate.to_json(), "candidate.json")
        self._log(run_id, _trial_metrics(trial))
        client.set_terminated(run_id, "FINISHED" if trial.ok else "FAILED", now)
        return run_id

    def _tags(self, trial: Trial) -> dict[str, str]:
        tags = {
            "mlflow.parentRunId": self._parent,
            "autocomp.kind": "trial",
            "trial": str(trial.number),
            "fingerprint": trial.candidate.fingerprint,
            "origin": trial.origin,
            "fidelity": trial.fidelity.name,
            "status": "ok" if trial.ok else "failed",
            "choices": report.describe(trial.candidate)[:_TAG_LENGTH],
        }
        if trial.measurement is not None:
            tags["device"] = trial.measurement.device
        if trial.failure is not None:
            tags |= {"failure": trial.failure.kind, "reason": trial.failure.reason[:_TAG_LENGTH]}
        return tags

    def _mark_front(self, summary: Mapping[str, Any]) -> None:
        """Tag every child as on the front or not, and log the front's table once."""
        if "front" not in summary:
            return
        front = ParetoFront.from_json(summary["front"])
        members = {p.trial.number for p in front.front}
        client = self._open()
        for number, run_id in self._children.items():
            value = "true" if number in members else "false"
            if self._pareto.get(number) != value:
                client.set_tag(run_id, "pareto", value)
                self._pareto[number] = value
        rows = [r for r in front.rows() if r["label"] != "dominated"]
        # log_table appends to a table that exists: a name for each number of trials keeps it one front.
        name = f"front_{len(self._children)}_trials.json"
        if rows and name not in {f.path for f in client.list_artifacts(self._parent)}:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            client.log_table(self._parent, {c: [row.get(c) for row in rows] for c in columns}, name)

    # The store

    def _log(self, run_id: str, metrics: Sequence[Metric]) -> None:
        if metrics:
            self._open().log_batch(run_id, metrics=metrics)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """After an error, leave the store alone for a while."""
        try:
            yield
        except Exception:
            self._quiet_until = time.monotonic() + _RETRY_AFTER_S
            raise


def absolute_uri(uri: str) -> str:
    """The URI with a relative SQLite path made absolute, so that a resume elsewhere finds the same file.

    Raises:
        JobError: a folder or ``file:`` URI, or a scheme that MLflow does not know.
    """
    scheme = urlparse(uri).scheme.split("+")[0]
    if scheme in ("http", "https", "databricks", "databricks-uc") or uri == "databricks":
        return uri
    if scheme not in _SQL_SCHEMES:
        raise JobError(
            f"tracking.uri {uri!r} is not a database or server: MLflow 3 no longer writes run folders;"
            " use 'sqlite:///mlflow.db' or 'http://HOST:5000' (`mlflow migrate-filestore` moves old runs)"
        )
    path = _sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path}"


def _sqlite_path(uri: str) -> Path | None:
    """The absolute path of an SQLite URI; ``None`` for other databases and for one in memory."""
    match = re.match(r"^sqlite(?:\+\w+)?:///(.+)$", uri)
    return None if match is None or match[1] == ":memory:" else Path(match[1]).expanduser().absolute()


def _connect(uri: str) -> MlflowClient:
    """A client that is quiet about migrations and does not wait minutes for a dead server."""
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("http"):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    path = _sqlite_path(uri)
    if path is not None:
        _write_ahead(path)
    return MlflowClient(tracking_uri=uri)  # makes or upgrades the tables of a database


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Keep other drivers out while tables are made: MLflow's migrations fail when two run at once."""
    path = _sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, or its holder is killed
        yield


def _write_ahead(path: Path) -> None:
    """Switch the file to write-ahead logging: a commit is then one sync of the disk in place of three."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=5)) as database:
        database.execute("PRAGMA journal_mode=WAL")


def _experiment(client: MlflowClient, name: str, uri: str) -> Experiment:
    """The experiment of that name; made, with its artifacts beside an SQLite file, when missing.

    Raises:
        JobError: the experiment was deleted; MLflow keeps its name until it is purged.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        path = _sqlite_path(uri)
        folder = None if path is None else path.parent / "mlartifacts" / re.sub(r"[^\w.-]", "_", name)
        try:
            client.create_experiment(name, None if folder is None else folder.as_uri())
        except MlflowException as error:  # another driver made it since
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise JobError(
            f"the MLflow experiment {name!r} in {uri} is deleted; choose another tracking.experiment or run"
            f" `mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    return found


def _put_json(client: MlflowClient, run: Run, data: Mapping[str, Any], name: str) -> None:
    """``log_dict`` that writes a local artifact folder directly: half the cost of a trial otherwise."""
    uri = urlparse(run.info.artifact_uri)
    if uri.scheme != "file":
        client.log_dict(run.info.run_id, dict(data), name)
        return
    folder = Path(url2pathname(uri.path))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(data, indent=1))


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings and lists as dotted keys and short strings; lists of plain values stay one value."""
    if isinstance(tree, Mapping):
        children = [(str(k), v) for k, v in tree.items()]
    elif isinstance(tree, list) and any(isinstance(v, Mapping | list) for v in tree):
        children = [(str(i), v) for i, v in enumerate(tree)]
    else:
        value = tree if isinstance(tree, str) else json.dumps(tree, default=str)
        return {_key(prefix): value[:_PARAM_LENGTH]}
    flat: dict[str, str] = {}
    for key, value in children:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _key(name: str) -> str:
    """``name`` with the characters that MLflow refuses replaced."""
    return re.sub(r"[^\w\-. /:]", "_", name)[:_KEY_LENGTH]


def _metrics(values: Mapping[str, float], step: int = 0) -> list[Metric]:
    """Finite values only: MLflow stores infinity as 1.8e308, which ruins every chart."""
    now = int(time.time() * 1000)
    return [Metric(_key(k), float(v), now, step) for k, v in values.items() if math.isfinite(v)]


def _trial_metrics(trial: Trial) -> list[Metric]:
    if trial.measurement is None:
        return []
    values: dict[str, float] = {}
    for name, estimate in trial.measurement.metrics.items():
        values[name] = estimate.value
        if estimate.stderr > 0:
            values[f"{name}_stderr"] = estimate.stderr
    return _metrics({**values, "seconds": trial.measurement.seconds})
