"""Few sequences first: what is clearly beaten stays there, and nothing else does."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import autocomp.study
from autocomp.errors import JobError
from autocomp.executors.base import WorkItem
from autocomp.history import PROXY
from autocomp.job import Job
from autocomp.journal import read_records
from autocomp.objective import Constraint, Objective
from autocomp.pareto import non_dominated
from autocomp.readings import Readings
from autocomp.searchers.base import Problem
from autocomp.searchers.random import RandomSearcher
from autocomp.space import Candidate
from autocomp.staging import Stages, stage_of, translated
from autocomp.study import Study, StudyResult
from autocomp.testing.fakes import BITS, FakeWorker, InlineExecutor
from autocomp.trial import Estimate, Failure, Fidelity, Measurement, Trial

WHOLE, FEW = 32, 4
OBJECTIVES = (Objective("kl"), Objective("mb"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocomp.study, "artifacts", lambda result: [])


class Sequences(FakeWorker):
    """Sequences differ in difficulty, by the same factor for every candidate, and a little by themselves."""

    def truth(self, candidate: Mapping[str, Any]) -> float:
        return float(super().measure(candidate, {"name": "", "split": "proxy"})["metrics"]["kl"]["value"])

    def measure(self, candidate: Mapping[str, Any], fidelity: Mapping[str, Any]) -> dict[str, Any]:
        found = super().measure(candidate, fidelity)
        count = fidelity["sequences"] or WHOLE
        factors = np.exp(np.random.default_rng(0).normal(0, 0.3, WHOLE))[:count]
        seed = zlib.crc32(repr(sorted(candidate.items())).encode())
        own = np.random.default_rng(seed).normal(1, 0.05, WHOLE)[:count]
        rows = found["metrics"]["kl"]["value"] * factors * own
        found["metrics"]["kl"] = {
            "value": float(rows.mean()), "stderr": float(rows.std(ddof=1) / math.sqrt(count)), "n": count
        }  # fmt: skip
        found["tokens"] = 100 * count
        return found


def run(
    folder: Path,
    worker: FakeWorker,
    stages: Sequence[int],
    before: Any = None,
    searcher: Any = RandomSearcher,
) -> tuple[Study, StudyResult]:
    job = {
        "workload": {"kind": "causal_lm", "model": "none", "data": {"proxy": WHOLE}},
        "space": [{"bitwidths": {}}],
        "objectives": ["min kl", "min memory_mb"],
        "budget": {"trials": 60, "stages": list(stages)},
        "validation": {"audit": 4, "promote": 12, "report": 8},
    }
    executor = InlineExecutor(worker, before=before)
    study = Study(Job.of(job), folder, executor=executor, searcher=searcher)
    return study, study.run()


def journal(folder: Path) -> list[Trial]:
    return [Trial.from_json(r["trial"]) for r in read_records(folder) if r["kind"] == "trial"]


def test_what_is_dropped_is_beaten_and_costs_little(tmp_path: Path) -> None:
    worker = Sequences(decisions=4)
    _, result = run(tmp_path, worker, [FEW])
    trials = journal(tmp_path)
    few = {t.candidate for t in trials if t.fidelity == stage_of(FEW)}
    whole = {t.candidate for t in trials if t.fidelity.name == "proxy"}
    dropped = few - whole
    assert result.status == "finished" and len(few | whole) == 60
    assert len(few) == 60 - 8 and len(dropped) > 15, "baselines and audit take the whole split"
    losses = np.array(
        [(worker.truth(c.values), sum(BITS[str(v)] for v in c.values.values())) for c in few | whole]
    )
    best = {c for c, kept in zip(few | whole, non_dominated(losses), strict=True) if kept}
    assert not best & dropped, "a candidate of the true front was dropped"
    spent = sum(t.measurement.tokens for t in trials if t.fidelity.split == "proxy" and t.measurement)
    assert spent < 0.8 * 60 * 100 * WHOLE


def test_searchers_see_what_was_dropped_and_never_get_it_measured_again(tmp_path: Path) -> None:
    asked: list[list[Trial]] = []

    def make(problem: Problem) -> Any:
        class Watched(RandomSearcher):
            def ask(self, n: int, history: Sequence[Trial], pending: Sequence[Candidate]) -> list[Candidate]:
                asked.append(list(history))
                assert len({t.candidate for t in history}) == len(history)
                return super().ask(n, history, pending)

        return Watched(problem)

    worker = Sequences(decisions=4)
    run(tmp_path, worker, [FEW, 16], searcher=make)
    assert len(set(worker.measured)) == len(worker.measured)
    last = asked[-1]
    assert {t.fidelity for t in last} == {PROXY} and len(last) > 50
    assert [t.number for t in last] == sorted(t.number for t in last)
    error = np.array(
        [math.log(t.value("kl") / worker.truth(t.candidate.values)) for t in last if t.value("kl")]
    )
    assert np.ptp(error) < 0.35, "values of a stage are not on the scale of the whole split"


@pytest.mark.parametrize("stop_at", [9, 20, 47, 70])
def test_resume_goes_on_between_two_stages(tmp_path: Path, stop_at: int) -> None:
    worker, count = Sequences(decisions=4), 0

    def interrupt(item: WorkItem) -> None:
        nonlocal count
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt

    _, stopped = run(tmp_path, worker, [FEW], before=interrupt)
    assert stopped.status == "stopped"
    study, result = run(tmp_path, worker, [FEW])
    assert result.status == "finished"
    assert len(set(worker.measured)) == len(worker.measured)
    stages = Stages((FEW,), study.objectives, ())
    assert stages.resume(study.readings) == [], "a candidate was left between two stages"
    assert stages.dropped + len(study.history.at(PROXY)) == 60


def test_without_stages_nothing_changes(tmp_path: Path) -> None:
    study, _ = run(tmp_path, Sequences(decisions=4), [])
    assert {t.fidelity.name for t in journal(tmp_path)} == {"proxy", "selection", "report"}
    assert Stages((), study.objectives, ()).seen(study.readings) == study.history.at(PROXY)


def test_stages_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="the whole proxy split has 32"):
        run(tmp_path, Sequences(decisions=4), [WHOLE])
    with pytest.raises(JobError, match="must grow"):
        run(tmp_path, Sequences(decisions=4), [8, 4])
    with pytest.raises(JobError, match="stages"):
        run(tmp_path, Sequences(decisions=4), [0])


def trial(number: int, kl: float, mb: float, level: Fidelity = PROXY, error: float = 0.1) -> Trial:
    found = Measurement({"kl": Estimate(kl, error), "mb": Estimate(mb)}, "toy")
    return Trial(number, Candidate.of({"a": number}), level, "x", found)


def decide(others: Sequence[Trial], new: Trial, constraints: Sequence[Constraint] = ()) -> Fidelity | None:
    readings, stages = Readings(), Stages((FEW,), OBJECTIVES, constraints)
    for t in (*others, new):
        readings.add(t, 0.0)
    return stages.after(new, readings)


def test_only_a_candidate_beaten_at_its_best_is_dropped() -> None:
    few = stage_of(FEW)
    rival = trial(0, 1.0, 10.0, few)
    drop: Callable[..., bool] = lambda *a, **k: decide([rival], trial(1, *a, few, **k)) is None  # noqa: E731
    assert drop(1.5, 10.0) and drop(1.5, 11.0)
    assert not drop(1.1, 10.0), "within two standard errors"
    assert not drop(1.5, 9.9), "smaller"
    assert not drop(1.5, 10.0, error=0.4), "not known well enough"
    assert decide([trial(0, 1.0, 10.0)], trial(1, 1.5, 10.0, few)) == PROXY, "the rival saw other sequences"
    assert decide([rival], trial(1, 1.5, 12.0, few), [Constraint.parse("mb <= 11")]) == PROXY
    failed = Trial(1, Candidate.of({"a": 1}), few, "x", failure=Failure("nan", "kl is nan"))
    assert decide([rival], failed) is None


def test_values_of_a_stage_are_translated() -> None:
    few = stage_of(FEW)
    both = [(trial(i, 1.0 + i, 5.0, few), trial(i, 2.0 + 2 * i, 5.0)) for i in range(6)]
    (found,) = translated([trial(9, 3.0, 7.0, few)], both)
    assert found.fidelity == PROXY and found.number == 9
    assert found.value("kl") == pytest.approx(6.0) and found.stderr("kl") == pytest.approx(0.2)
    assert found.value("mb") == 7.0
    (same,) = translated([trial(9, 3.0, 7.0, few)], both[:4])
    assert same.value("kl") == 3.0
    shifted = [(trial(i, float(i), 5.0, few), trial(i, i - 1.0, 5.0)) for i in range(6)]
    (moved,) = translated([trial(9, 3.0, 7.0, few)], shifted)
    assert moved.value("kl") == pytest.approx(2.0)
