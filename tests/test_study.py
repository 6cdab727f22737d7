"""The loop: phases, budgets, resume, failures; on a worker whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autocomp.errors import InfeasibleError, JobError, ObjectiveError, RunError
from autocomp.executors.base import WorkItem
from autocomp.history import hypervolume_curve
from autocomp.job import Job
from autocomp.journal import read_records
from autocomp.searchers.base import Problem, Searcher
from autocomp.searchers.random import RandomSearcher
from autocomp.study import Event, Study, StudyResult
from autocomp.testing.fakes import FakeWorker, InlineExecutor
from autocomp.trial import Trial

JOB: dict[str, Any] = {
    "workload": {"kind": "causal_lm", "model": "none"},
    "space": [{"bitwidths": {}}],
    "objectives": ["min kl", "min decode_ms", "min memory_mb"],
    "budget": {"trials": 24},
    "validation": {"audit": 4, "promote": 12, "report": 8},
}


def run(
    folder: Path,
    worker: FakeWorker | None = None,
    searcher: Any = None,
    before: Any = None,
    **changes: Any,
) -> tuple[StudyResult, FakeWorker, list[Event]]:
    worker = worker or FakeWorker()
    executor = InlineExecutor(worker, before=before)
    events: list[Event] = []
    job = Job.of({**JOB, **changes})
    study = Study(job, folder, executor=executor, searcher=searcher or RandomSearcher, on_event=events.append)
    result = study.run()
    assert executor.closed
    return result, worker, events


def trials(folder: Path) -> list[Trial]:
    return [Trial.from_json(r["trial"]) for r in read_records(folder) if r["kind"] == "trial"]


def test_phases_budget_and_validated_front(tmp_path: Path) -> None:
    result, worker, events = run(tmp_path)
    assert result.status == "finished"
    at_proxy = [t for t in trials(tmp_path) if t.fidelity.name == "proxy"]
    assert len(at_proxy) == 24
    assert [t.origin for t in at_proxy[:4]] == ["baseline"] * 4
    assert {t.origin for t in at_proxy} == {"baseline", "audit", "hybrid"}
    assert all(p.trial.fidelity.name == "report" for p in result.front.points)
    assert len(set(worker.measured)) == len(worker.measured), "something was measured twice"
    assert result.hypervolume == sorted(result.hypervolume) and len(result.hypervolume) == 24
    assert -1 <= result.audit["kl"]["spearman"] <= 1
    assert any(e.kind == "trial" and e.done == 24 for e in events)
    for name in ("job.yaml", "description.json", "front.json", "journal.jsonl"):
        assert (tmp_path / name).is_file()


def test_baselines_are_on_the_report_split_and_nothing_dominated_is_returned(tmp_path: Path) -> None:
    result, worker, _ = run(tmp_path)
    reported = {fingerprint for fingerprint, level in worker.measured if level == "report"}
    baselines = {t.candidate.fingerprint for t in trials(tmp_path) if t.origin == "baseline"}
    assert baselines <= reported
    losses = [(p.trial.value("kl"), p.trial.value("memory_mb")) for p in result.front.front]
    assert not any(a[0] < b[0] and a[1] < b[1] for a in losses for b in losses)


def test_a_finished_run_measures_nothing_again(tmp_path: Path) -> None:
    first, _, _ = run(tmp_path)
    again, worker, _ = run(tmp_path)
    assert worker.measured == []
    assert again.front == first.front


@pytest.mark.parametrize("stop_at", [0, 1, 5, 12, 27, 40])
def test_stopped_anywhere_resume_gives_the_same_study(tmp_path: Path, stop_at: int) -> None:
    whole, _, _ = run(tmp_path / "whole")
    count = 0

    def interrupt(item: WorkItem) -> None:
        nonlocal count
        count += 1
        if count > stop_at:
            raise KeyboardInterrupt

    worker = FakeWorker()
    stopped, _, events = run(tmp_path / "cut", worker, before=interrupt)
    assert stopped.status == "stopped" and "resume" in events[-1].text
    before = trials(tmp_path / "cut")
    resumed, _, _ = run(tmp_path / "cut", worker)
    assert resumed.status == "finished"
    assert trials(tmp_path / "cut")[: len(before)] == before
    assert len(resumed.hypervolume) == len(whole.hypervolume)
    assert len(set(worker.measured)) == len(worker.measured), "a candidate was measured twice"


def test_resume_may_raise_the_budget_but_not_change_the_question(tmp_path: Path) -> None:
    run(tmp_path)
    _, worker, _ = run(tmp_path, budget={"trials": 30})
    assert sum(level == "proxy" for _, level in worker.measured) == 6
    with pytest.raises(RunError, match="another job"):
        run(tmp_path, objectives=["min kl"])


def test_another_model_or_device_is_refused(tmp_path: Path) -> None:
    run(tmp_path)

    class Elsewhere(FakeWorker):
        def describe(self) -> dict[str, Any]:
            return {**super().describe(), "device": "other device"}

    with pytest.raises(RunError, match="other device"):
        run(tmp_path, Elsewhere())
    with pytest.raises(RunError, match="has changed"):
        run(tmp_path, FakeWorker(decisions=9))


def test_failing_candidates_are_trials_with_a_reason(tmp_path: Path) -> None:
    result, _, _ = run(tmp_path, FakeWorker(broken="w3g64"))
    failed = [t for t in trials(tmp_path) if t.failure is not None]
    assert failed and all(t.failure is not None and t.failure.kind == "nan" for t in failed)
    assert result.status == "finished" and result.front.front


def test_what_nothing_executes_is_left_out_with_a_note(tmp_path: Path) -> None:
    _, _, events = run(tmp_path, FakeWorker(unexecutable="w3g64"))
    assert any("w3g64 is left out" in e.text for e in events)
    chosen = {v for t in trials(tmp_path) for v in t.candidate.values.values()}
    assert "w3g64" not in chosen and "w4g64" in chosen


def test_without_latency_every_option_may_be_used(tmp_path: Path) -> None:
    run(tmp_path, FakeWorker(unexecutable="w3g64"), objectives=["min kl", "min memory_mb"])
    assert "w3g64" in {v for t in trials(tmp_path) for v in t.candidate.values.values()}


def test_exact_budgets_hold_for_every_searched_candidate(tmp_path: Path) -> None:
    run(tmp_path, constraints=["memory_mb <= 40", "avg_bits >= 3.5"])
    for trial in trials(tmp_path):
        if trial.origin not in ("baseline", "reference", "validate"):
            assert trial.value("memory_mb") <= 40 and trial.value("avg_bits") >= 3.5


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"constraints": ["memory_mb <= 20"]}, InfeasibleError, "smallest reachable memory_mb is 25"),
        ({"constraints": ["avg_bits >= 17"]}, InfeasibleError, "largest reachable avg_bits is 16"),
        ({"objectives": ["min speed"]}, ObjectiveError, "'speed'"),
        ({"sensitivity": {"method": "measured"}}, JobError, "fisher, none"),
    ],
)
def test_what_cannot_work_is_refused_before_measuring(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    worker = FakeWorker()
    with pytest.raises(error, match=text):
        run(tmp_path, worker, **changes)
    assert len(worker.measured) <= 4


def test_a_broken_tracker_does_not_stop_the_search(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            def fail(*args: Any) -> None:
                raise ConnectionError("server is down")

            return fail

    study = Study(
        Job.of(JOB), tmp_path, executor=InlineExecutor(FakeWorker()), searcher=RandomSearcher,
        trackers=[Broken()],
    )  # fmt: skip
    assert study.run().status == "finished"
    assert caplog.text.count("server is down") == 1


def test_a_searcher_object_and_invalid_proposals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make(problem: Problem) -> Searcher:
        class Stubborn:
            def ask(self, n: int, history: Any, pending: Any) -> list[Any]:
                from autocomp.space import Candidate

                return [Candidate.of({"nothing": 1}), *problem.baselines]

        return Stubborn()

    result, worker, _ = run(tmp_path, searcher=make)
    assert result.status == "finished" and "invalid candidate" in caplog.text
    assert sum(level == "proxy" for _, level in worker.measured) == 8  # baselines and audit, then nothing new


def test_hypervolume_curve_never_falls(tmp_path: Path) -> None:
    run(tmp_path)
    curve = hypervolume_curve(trials(tmp_path)[:24], Job.of(JOB).parsed_objectives())
    assert curve == sorted(curve) and curve[-1] > 0


def test_token_and_time_budgets_end_the_search(tmp_path: Path) -> None:
    _, worker, _ = run(tmp_path / "tokens", budget={"trials": 50, "tokens": 1200})
    assert 12 <= sum(level == "proxy" for _, level in worker.measured) <= 16
    _, worker, _ = run(tmp_path / "time", budget={"trials": 50, "minutes": 1e-9})
    assert sum(level == "proxy" for _, level in worker.measured) == 8


def test_front_json_can_be_read_back(tmp_path: Path) -> None:
    from autocomp.api import front_of

    result, _, _ = run(tmp_path)
    assert front_of(tmp_path) == result.front
    assert json.loads((tmp_path / "front.json").read_text())["status"] == "finished"
