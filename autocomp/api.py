"""The functions behind ``import autocomp`` and the command line."""

from __future__ import annotations

import datetime
import inspect
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.description import Description
from autocomp.errors import ExportError, JobError, RunError
from autocomp.executors.base import Executor, WorkerSpec
from autocomp.history import PROXY, REPORT, SELECTION
from autocomp.job import Job
from autocomp.journal import read_records
from autocomp.objective import Objective
from autocomp.pareto import ParetoFront
from autocomp.plan import make_plan
from autocomp.readings import Readings
from autocomp.registry import EXECUTORS, SEARCHERS
from autocomp.searchers.base import Problem, Searcher
from autocomp.space import Candidate
from autocomp.study import Event, Study, StudyResult
from autocomp.tracking.base import Tracker
from autocomp.trial import Fidelity, Measurement, Trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from autocomp.diffusion.loaded import DiffusionModel

JobLike = Job | Mapping[str, Any] | str | Path


def search(
    job: JobLike,
    *,
    overrides: Sequence[str] = (),
    run_dir: str | Path | None = None,
    searcher: Searcher | Callable[[Problem], Searcher] | None = None,
    executor: Executor | None = None,
    trackers: Sequence[Tracker] | None = None,
    objectives: Sequence[Objective] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> StudyResult:
    """Run a job to the end of its budget and return the validated front.

    Args:
        job: a path to a YAML file, a mapping, or a ``Job``.
        overrides: dotted overrides, ``["budget.trials=20"]``.
        run_dir: where the journal goes; default a new folder below the job's ``output``. A folder of an
            unfinished run of the same job is continued.
        searcher, executor, trackers, objectives: objects that replace what the job names.
        on_event: called with every ``Event`` (progress displays).

    Raises:
        AutocompError: see ``Study.run``; everything measured until then is in ``run_dir``.
    """
    checked = as_job(job, overrides)
    folder = Path(run_dir) if run_dir is not None else new_run_dir(checked)
    runner = executor if executor is not None else make_executor(checked)
    study = Study(
        checked,
        folder,
        executor=runner,
        searcher=searcher if searcher is not None else _searcher_factory(checked),
        trackers=make_trackers(checked, folder) if trackers is None else trackers,
        objectives=objectives,
        on_event=on_event,
        clock=getattr(runner, "clock", time.perf_counter),
    )
    return study.run()


def resume(
    run_dir: str | Path,
    *,
    overrides: Sequence[str] = (),
    on_event: Callable[[Event], None] | None = None,
    **parts: Any,
) -> StudyResult:
    """Continue a run; nothing that is in its journal is measured again. ``parts`` as in ``search``.

    ``overrides`` may change the budget, the executor and the tracking, nothing else.
    """
    job = _job_of(Path(run_dir), read_records(Path(run_dir)))
    return search(job, overrides=overrides, run_dir=run_dir, on_event=on_event, **parts)


def front_of(run_dir: str | Path) -> ParetoFront:
    """The front of a run: the validated one when it is finished, else that of the deepest fidelity so far."""
    folder = Path(run_dir)
    records = read_records(folder)
    summary = folder / "front.json"
    if any(r["kind"] == "finished" for r in records) and summary.is_file():
        return ParetoFront.from_json(json.loads(summary.read_text())["front"])
    job = _job_of(folder, records)
    readings = read_trials(records, job)
    for level in (REPORT, SELECTION, PROXY):
        found = readings.at(level)
        if found:
            return ParetoFront.of(found, job.parsed_objectives(), job.parsed_constraints())
    return ParetoFront((), job.parsed_objectives(), job.parsed_constraints())


def read_trials(records: Sequence[Mapping[str, Any]], job: Job) -> Readings:
    """The trials of a run's journal as its study reads them, corrected for drift of the device."""
    found = [Description.from_json(r["description"]) for r in records if r["kind"] == "description"]
    readings = Readings()
    if found:
        plan = make_plan(found[0], job.parsed_objectives(), job.parsed_constraints())
        readings = Readings.of(plan, shared=job.executor.gpus == 0)
    for record in records:
        if record["kind"] == "trial":
            readings.add(Trial.from_json(record["trial"]), record["elapsed"])
    return readings


def _job_of(run_dir: Path, records: Sequence[Mapping[str, Any]]) -> Job:
    for record in records:
        if record["kind"] == "job":
            return Job.of(record["job"])
    raise RunError(f"{str(run_dir)!r} holds no job; it was never started")


def measure(
    job: JobLike, candidate: Mapping[str, Any] | Candidate, *, overrides: Sequence[str] = ()
) -> Trial:
    """Measure one candidate in this process on the report split.

    ``candidate`` maps decision names to options; a single ``{"*": option}`` takes the option everywhere.
    """
    from autocomp.worker import open_worker

    checked = as_job(job, overrides)
    with open_worker(checked) as worker:
        values = dict(candidate.values if isinstance(candidate, Candidate) else candidate)
        if set(values) == {"*"}:
            names = [d.name for decisions in worker.decisions.values() for d in decisions]
            values = dict.fromkeys(names, values["*"])
        data = worker.measure(values, {"name": "report", "split": "report", "sequences": 0, "timing": True})
    wanted = Candidate.of(values)
    made = Trial.from_json(
        {
            "number": 0, "candidate": wanted.to_json(), "origin": "measure", "measurement": data,
            "fidelity": {"name": "report", "split": "report", "sequences": 0, "timing": True},
        }
    )  # fmt: skip
    return made


def export(run_dir: str | Path, select: str, *, format: str = "native", out: str | Path) -> Path:
    """Write the point of a run's front that ``select`` picks (``"kl <= 0.1, min decode_ms"``) to ``out``.

    Raises:
        InfeasibleError: no point meets the selection.
        ExportError: the format can't hold the candidate, or ``out`` is not empty.
    """
    from autocomp.worker import open_worker

    trial = front_of(run_dir).select(select)
    job = _job_of(Path(run_dir), read_records(Path(run_dir)))
    with open_worker(job) as worker:
        worker.export(trial.candidate.to_json(), format, str(out))
    return Path(out)


def load(folder: str | Path, device: str = "auto") -> PreTrainedModel | DiffusionModel:
    """A model from an export on ``device``, running on the kernels: of a ``native`` export the language model
    (``model.generate`` works), of a ``diffusers`` one a ``DiffusionModel`` (``model.sample`` works).

    Raises:
        ExportError: the folder is no such export, or was written by a newer version.
    """
    from autocomp.exporters.base import export_format

    path = Path(folder)
    if not path.is_dir():
        raise ExportError(f"there is no folder {str(folder)!r}")
    if export_format(path) == "autocomp-diffusers":
        from autocomp.diffusion.loaded import load_diffusion

        return load_diffusion(path, device)
    from autocomp.exporters.native import load_native

    return load_native(path, device)


def as_job(job: JobLike, overrides: Sequence[str] = ()) -> Job:
    """A checked job from whatever the user has."""
    if isinstance(job, str | Path):
        return Job.from_yaml(job, overrides)
    return Job.of(job, overrides)


def new_run_dir(job: Job) -> Path:
    """A folder name of its own, below the job's ``output``."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    root = Path(job.output).expanduser()
    name = f"{Path(str(job.workload.get('model', 'run'))).stem.lower()}-{stamp}"
    path = root / name
    for i in range(2, 1000):
        if not path.exists():
            return path
        path = root / f"{name}-{i}"
    raise JobError(f"{str(root)!r} is full of runs of this second")


def make_executor(job: Job) -> Executor:
    """The executor that the job names, with workers of ``autocomp.worker`` or those of a recording."""
    config = job.executor
    if config.name == "simulated":
        replayed: Executor = EXECUTORS.get(config.name)(config.table, config.workers, config.nearest)
        return replayed
    workers, threads = worker_shape(config.workers, config.threads, config.gpus)
    spec = WorkerSpec(
        target="autocomp.worker:ModelWorker",
        kwargs={"job": job.resolved(), "threads": threads},
        env={"GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        threads=threads,
        gpus=config.gpus,
        memory_mb=config.memory_mb,
        accelerator=config.accelerator,
    )
    options: dict[str, Any] = {"workers": workers, "retries": config.retries}
    if config.name == "ray" and config.address:
        options["address"] = config.address
    executor: Executor = EXECUTORS.get(config.name)(spec, **options)
    return executor


def worker_shape(workers: int, threads: int, gpus: int, cores: int = 0) -> tuple[int, int]:
    """Workers and CPU threads each: what was asked for, else one worker per four cores (two on 2 or 3)."""
    cores = cores or os.cpu_count() or 1
    if not workers:
        workers = 1 if gpus else max(1, cores // 4, min(2, cores))
    return workers, threads or max(1, cores // workers)


def make_trackers(job: Job, run_dir: Path) -> list[Tracker]:
    """MLflow and Optuna trackers, as the job wants them."""
    trackers: list[Tracker] = []
    if job.tracking.uri:
        from autocomp.tracking.mlflow import MlflowTracker

        trackers.append(MlflowTracker(uri=job.tracking.uri, experiment=job.tracking.experiment))
    if job.tracking.optuna:
        from autocomp.tracking.optuna import OptunaTracker

        trackers.append(OptunaTracker(run_dir / "optuna.log"))
    return trackers


class _Named:
    """A searcher by name, built when the problem is known; forwards the class's ``unsupported``, with the
    options that it takes."""

    def __init__(self, job: Job) -> None:
        self._class = SEARCHERS.get(job.searcher.name)
        self._options = job.searcher.options

    def unsupported(self, problem: Problem) -> list[str]:
        check = getattr(self._class, "unsupported", None)
        if check is None:
            return []
        taken = inspect.signature(check).parameters
        return list(check(problem, **{k: v for k, v in self._options.items() if k in taken}))

    def __call__(self, problem: Problem) -> Searcher:
        try:
            searcher: Searcher = self._class(problem, **self._options)
        except TypeError as error:
            raise JobError(f"searcher.options = {self._options}: {error}") from None
        return searcher


def _searcher_factory(job: Job) -> _Named:
    return _Named(job)


__all__ = [
    "Fidelity", "Measurement", "export", "front_of", "load", "measure", "resume", "search",
]  # fmt: skip
