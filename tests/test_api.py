"""From a job to a loaded export on a tiny model, with real workers; and what survives a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import autocomp
from autocomp.api import front_of, measure, worker_shape
from autocomp.errors import ExportError, InfeasibleError, RunError, SpaceError
from autocomp.journal import read_records
from autocomp.search_spaces.weights import WeightSwapper
from autocomp.space import Candidate
from autocomp.study import Event, StudyResult
from autocomp.testing.fakes import InlineExecutor
from autocomp.trial import Trial
from autocomp.worker import ModelWorker

Json = dict[str, Any]
MakeJob = Callable[..., Json]
MakeWorker = Callable[..., ModelWorker]
OPTIONS = ["w4g32", "w8", "w16"]


@pytest.fixture(scope="module")
def job(make_job: MakeJob, apart: Path) -> Json:
    found = make_job("llama", options=OPTIONS)
    return found | {"budget": {"trials": 8}, "validation": {"audit": 2, "promote": 4, "report": 3}}


@pytest.fixture
def worker(make_worker: MakeWorker) -> ModelWorker:
    """The job's worker in this process."""
    return make_worker("llama", options=OPTIONS)


@dataclass
class Killer:
    """Kills the only worker process, once, while it works on a trial."""

    pid: int = 0

    def __call__(self, event: Event) -> None:
        if event.kind == "trial" and event.busy and event.done >= 4 and not self.pid:
            (process,) = multiprocessing.active_children()
            assert process.pid is not None
            self.pid = process.pid
            os.kill(self.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def finished(job: Json, tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    """A whole search with a worker process that dies on the way."""
    killer = Killer()
    found = autocomp.search(job, run_dir=tmp_path_factory.mktemp("runs") / "run", on_event=killer)
    assert killer.pid, "no worker was killed"
    return found


def trials(run_dir: Path) -> list[Trial]:
    return [Trial.from_json(r["trial"]) for r in read_records(run_dir) if r["kind"] == "trial"]


def keys(found: Sequence[Trial]) -> list[tuple[str, str]]:
    return [t.key for t in found]


def test_a_search_ends_with_a_validated_front(finished: StudyResult) -> None:
    found = trials(finished.run_dir)
    assert finished.status == "finished" and len(set(keys(found))) == len(found)
    assert sum(t.fidelity.name == "proxy" for t in found) == 8
    assert {t.fidelity.name for t in found} == {"proxy", "selection", "report"}
    assert finished.front.front and all(p.trial.fidelity.name == "report" for p in finished.front.points)
    assert all(p.trial.value("decode_ms") > 0 for p in finished.front.points)
    uncompressed = next(t for t in found if set(t.candidate.values.values()) == {"w16"})
    assert uncompressed.value("kl") == 0.0
    assert front_of(finished.run_dir) == finished.front


def test_a_killed_worker_is_replaced_and_its_trial_tried_again(finished: StudyResult) -> None:
    found = trials(finished.run_dir)
    hit = [t for t in found if t.attempts > 1 or not t.ok]
    assert len(hit) <= 1, "one death touches one trial"
    assert all(t.ok or (t.failure is not None and "signal 9" in t.failure.reason) for t in hit)
    assert sum(t.ok for t in found) >= len(found) - 1


def test_the_front_is_exported_and_runs(finished: StudyResult, worker: ModelWorker, tmp_path: Path) -> None:
    folder = autocomp.export(finished.run_dir, "memory_mb <= 10, min memory_mb", out=tmp_path / "out")
    chosen = finished.front.select("min memory_mb").candidate
    assert json.loads((folder / "autocomp.json").read_text())["candidate"] == chosen.to_json()
    model = autocomp.load(folder, device="cpu")
    ids = worker.built.state["splits"]["report"][:1]
    worker.apply(chosen, serving=True)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, worker.built.model(input_ids=ids).logits)
    worker.restore()
    tokens = model.generate(ids[:, :4], attention_mask=torch.ones(1, 4), max_new_tokens=5, do_sample=False)
    assert 4 < tokens.shape[1] <= 9
    with pytest.raises(ExportError, match="not an empty folder"):
        autocomp.export(finished.run_dir, "min memory_mb", out=folder)
    with pytest.raises(InfeasibleError, match="no point of the front"):
        autocomp.export(finished.run_dir, "memory_mb <= 0.001, min kl", out=tmp_path / "other")


def test_a_point_of_the_front_goes_to_other_software(finished: StudyResult, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    autocomp.export(finished.run_dir, "min memory_mb", format="compressed-tensors", out=tmp_path / "out")
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())


def test_resuming_a_finished_run_measures_nothing(finished: StudyResult, worker: ModelWorker) -> None:
    before = (finished.run_dir / "journal.jsonl").read_bytes()
    executor = InlineExecutor(worker, before=lambda item: calls.append(item.method))
    calls: list[str] = []
    again = autocomp.resume(finished.run_dir, executor=executor)
    assert calls == ["describe"] and again.front == finished.front
    assert (finished.run_dir / "journal.jsonl").read_bytes() == before


def test_public_functions_are_no_packages() -> None:
    """A package of the same name would take a function's place as soon as something imports it."""
    import pkgutil

    assert not {m.name for m in pkgutil.iter_modules(autocomp.__path__)} & set(autocomp.__all__)


def test_folders_that_are_no_runs_or_exports_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no native export"):
        autocomp.load(tmp_path)
    for call in (front_of, autocomp.resume):
        with pytest.raises(RunError, match="not a run directory"):
            call(tmp_path)
    (tmp_path / "journal.jsonl").write_text("")
    for call in (front_of, autocomp.resume):
        with pytest.raises(RunError, match="holds no job"):
            call(tmp_path)


def test_measure_takes_one_option_everywhere_or_a_candidate(job: Json) -> None:
    found = measure(job, {"*": "w8"})
    assert found.fidelity.name == "report" and set(found.candidate.values.values()) == {"w8"}
    assert found.value("kl") > 0 and found.value("decode_ms") > 0
    assert found.value("avg_bits") == pytest.approx(8.0)
    same = measure(job, found.candidate, overrides=["workload.scenario.repeats=1"])
    assert same.value("kl") == found.value("kl")
    with pytest.raises(SpaceError, match="'w5' is not in"):
        measure(job, {"*": "w5"})


def test_cores_are_shared_out() -> None:
    assert worker_shape(0, 0, 0, cores=2) == (2, 1)
    assert worker_shape(0, 0, 0, cores=16) == (4, 4)
    assert worker_shape(0, 0, 1, cores=16) == (1, 16)
    assert worker_shape(3, 2, 0, cores=16) == (3, 2)
    assert worker_shape(0, 0, 0, cores=1) == (1, 1)


@pytest.mark.slow
def test_a_search_on_ray(job: Json, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    changes = ["executor.name=ray", "budget.trials=5", "validation.audit=0", "validation.promote=1"]
    found = autocomp.search(job, overrides=changes, run_dir=tmp_path / "run")
    assert found.status == "finished" and len(found.hypervolume) == 5
    assert all(t.ok for t in trials(tmp_path / "run"))


# -- kills --------------------------------------------------------------------------------------------------

DRIVER = """
import json, sys
import autocomp

if __name__ == "__main__":
    autocomp.search(json.load(open(sys.argv[1])), run_dir=sys.argv[2])
"""


def wait_for(condition: Callable[[], Any], seconds: float = 90.0) -> Any:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


@pytest.mark.slow
def test_a_killed_driver_loses_at_most_what_was_under_way(
    job: Json, worker: ModelWorker, tmp_path: Path
) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "job.json").write_text(json.dumps(job))
    run_dir = tmp_path / "run"
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "job.json"), str(run_dir)]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        journal = run_dir / "journal.jsonl"
        wait_for(lambda: journal.is_file() and journal.read_bytes().count(b'"kind":"trial"') >= 4)
        children = psutil.Process(driver.pid).children(recursive=True)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "workers outlived their driver"
    before = trials(run_dir)
    assert len(before) >= 4 and not any(r["kind"] == "finished" for r in read_records(run_dir))
    measured: list[tuple[str, str]] = []

    def note(item: Any) -> None:
        if item.method == "measure":
            candidate = Candidate.of(item.kwargs["candidate"])
            measured.append((candidate.fingerprint, item.kwargs["fidelity"]["name"]))

    resumed = autocomp.resume(run_dir, executor=InlineExecutor(worker, before=note))
    after = trials(run_dir)
    assert resumed.status == "finished" and after[: len(before)] == before
    assert len(set(keys(after))) == len(after) and not set(measured) & set(keys(before))
    assert sorted(measured) == sorted(keys(after[len(before) :]))
    assert sum(t.fidelity.name == "proxy" for t in after) == 8


# -- profiles around candidates ------------------------------------------------------------


def test_hybrid_search_under_one_budget_profiles_around_its_incumbents(
    make_worker: MakeWorker, make_job: MakeJob, tmp_path: Path
) -> None:
    options = ["w2g32", "w3g32", "w4g32", "w8", "w16"]
    job = make_job("llama", options=options) | {
        "objectives": ["min kl"],
        "constraints": ["avg_bits <= 5"],
        "searcher": {"name": "hybrid"},
        "budget": {"trials": 20},
        "validation": {"audit": 2, "promote": 3, "report": 2},
    }
    worker = make_worker("llama", options=options)
    found = autocomp.search(job, run_dir=tmp_path / "run", executor=InlineExecutor(worker))
    profiles = [r for r in read_records(tmp_path / "run") if r["kind"] == "profile" and r["at"]]
    assert found.status == "finished" and profiles
    measured = {t.candidate.fingerprint for t in trials(tmp_path / "run")}
    assert {r["at"] for r in profiles} <= measured, "profiles are for candidates that were measured"
    searched = [t for t in trials(tmp_path / "run") if t.origin == "hybrid"]
    assert searched and all(t.value("avg_bits") <= 5 + 1e-9 for t in searched)
    uniform = min(
        (t for t in trials(tmp_path / "run") if t.origin == "baseline" and t.value("avg_bits") <= 5),
        key=lambda t: t.value("kl"),
    )
    assert min(t.value("kl") for t in searched) < uniform.value("kl"), "no better than the uniform baseline"
    assert WeightSwapper.of(worker.built).bank.built > 0
