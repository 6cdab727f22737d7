"""``autocomp proxy``: which candidates are scored, what is kept, and how good the chosen sequences are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from autocomp import api, cli
from autocomp.errors import JobError, RunError, SpaceError
from autocomp.executors.base import WorkItem
from autocomp.job import Job
from autocomp.journal import read_records
from autocomp.objective import Objective
from autocomp.predictors.proxy_set import ProxySet
from autocomp.profile import ProfileResult, mean
from autocomp.proxy import choose_proxy
from autocomp.searchers.base import Problem
from autocomp.sequence_scores import SequenceScores, draw_candidates
from autocomp.space import AdditiveTable, Candidate, Choice, Decision, SearchSpace
from autocomp.testing.fakes import BITS, LOSS, OPTIONS, FakeWorker, InlineExecutor

SEQUENCES = 60
JOB: dict[str, Any] = {
    "workload": {"kind": "causal_lm", "model": "none", "data": {"proxy": SEQUENCES}},
    "space": [{"bitwidths": {}}],
    "objectives": ["min kl", "min decode_ms", "min memory_mb"],
}
FACTS = {"split": "proxy", "seed": 0}


class SequenceWorker(FakeWorker):
    """The fake worker, whose loss differs between sequences: each one minds the decisions differently."""

    def __init__(self, broken: str = "") -> None:
        super().__init__(decisions=8)
        self.asked: list[str] = []
        self.bad = broken
        self.minds = np.random.default_rng(0).gamma(1.0, size=(SEQUENCES, len(self.names)))

    def describe(self) -> dict[str, Any]:
        found = super().describe()
        return found | {"profiles": [*found["profiles"], "sequences"]}

    def profile(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(request["kind"])
        if request["kind"] != "sequences":
            return super().profile(request)
        chosen = request["candidate"]
        if self.bad and self.bad in chosen.values():
            raise FloatingPointError("kl is nan")
        losses = [self.weight(i) * LOSS[chosen[n]] for i, n in enumerate(self.names)]
        values = (self.minds @ np.array(losses)).tolist()
        rows = {"kl": {i: (1, v, v * v) for i, v in enumerate(values)}}
        return ProfileResult("sequences", rows, 0.0, {"data": FACTS}).to_json()  # type: ignore[arg-type]


def choose(folder: Path, worker: FakeWorker | None = None, job: Any = None, **options: Any) -> ProxySet:
    executor = InlineExecutor(worker or SequenceWorker(), before=options.pop("before", None))
    asked = {"out": folder / "subset.json", "run_dir": folder / "run", **options}
    try:
        return choose_proxy(job or JOB, executor=executor, **asked)
    finally:
        assert executor.closed


def test_the_chosen_sequences_rank_as_all_do(tmp_path: Path) -> None:
    found = choose(tmp_path)
    assert len(found.indices) == SEQUENCES // 10 and found.final and found.halves == 5
    assert found.tau_test > 0.97 > found.random_mean
    assert found.plain_test > found.random_plain
    assert dict(found.data) == FACTS
    assert str(ProxySet.load(tmp_path / "subset.json")).replace("nan", "") == str(found).replace("nan", "")


def test_candidates_that_fail_are_left_out_and_named(tmp_path: Path) -> None:
    said: list[str] = []
    choose(tmp_path, SequenceWorker(broken="w3g64"), say=said.append)
    records = read_records(tmp_path / "run")
    scored = [r for r in records if r["kind"] == "sequences"]
    assert 6 < len(scored) < 30 and not any("w3g64" in r["candidate"].values() for r in scored)
    assert sum("is left out: kl is nan" in line for line in said) == 30 - len(scored)


def test_what_was_scored_is_not_scored_again(tmp_path: Path) -> None:
    def stop(item: WorkItem) -> None:
        if len(first.asked) == 12:
            raise KeyboardInterrupt

    first, second = SequenceWorker(), SequenceWorker()
    with pytest.raises(KeyboardInterrupt):
        choose(tmp_path, first, before=stop)
    resumed = choose(tmp_path, second)
    assert "sensitivity:fisher" not in second.asked
    assert first.asked.count("sequences") + second.asked.count("sequences") == 30
    assert resumed.indices == choose(tmp_path / "anew").indices


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    choose(tmp_path)
    with pytest.raises(RunError, match="choose a new directory"):
        choose(tmp_path, candidates=20)
    with pytest.raises(RunError, match="choose a new directory"):
        choose(tmp_path, job=Job.of(JOB, ["seed=1"]))
    choose(tmp_path, job=Job.of(JOB, ["budget.trials=5", "executor.workers=1"]), size=12)  # may differ


def test_sequences_are_chosen_from_all_even_when_the_job_has_a_subset(tmp_path: Path) -> None:
    choose(tmp_path, job=Job.of(JOB, ["workload.data.subset=old.json"]))
    (asked,) = (r["asked"] for r in read_records(tmp_path / "run") if r["kind"] == "proxy")
    assert asked["job"]["workload"]["data"]["subset"] == ""


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": SEQUENCES}, "60 of 60 sequences is no subset"),
        ({"size": 1}, "1 of 60 sequences is no subset"),
        ({"candidates": 5}, "5 candidates are too few"),
        ({"metric": "decode_ms"}, "no mean over sequences; use one of kl, ppl, top1"),
        ({"overrides": ["workload.kind=long_context"]}, "long_context is not scored by single sequences"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_worker_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("autocomp.proxy.make_executor", lambda job: pytest.fail("a worker was started"))
    with pytest.raises(JobError, match=message):
        choose_proxy(JOB, out=tmp_path / "s.json", run_dir=tmp_path / "run", **options)
    assert not (tmp_path / "s.json").exists()


def test_without_a_scored_candidate_there_is_an_error(tmp_path: Path) -> None:
    class Hopeless(SequenceWorker):
        def profile(self, request: Mapping[str, Any]) -> dict[str, Any]:
            if request["kind"] == "sequences":
                raise FloatingPointError("kl is nan")
            return super().profile(request)

    with pytest.raises(RunError, match="no candidate could be scored"):
        choose(tmp_path, Hopeless())


def test_the_uncompressed_model_by_another_name_takes_no_part() -> None:
    candidates = tuple(Candidate.of({"a": str(i)}) for i in range(3))
    values = {"kl": np.array([[0.1, 0.3], [1e-9, -1e-9], [0.2, 0.1]]), "top1": np.full((3, 2), 0.5)}
    scores = SequenceScores(candidates, ("mixed",) * 3, values, {})
    assert scores.score("kl").models == 2 and scores.score("top1").models == 3
    with pytest.raises(SpaceError, match="finite"):
        replace(scores, values={"top1": np.full((3, 2), np.nan)}).score("top1")


# --- candidates --------------------------------------------------------------------------------------------


def problem(decisions: int = 12, tables: bool = True) -> Problem:
    names = [f"d{i}" for i in range(decisions)]
    space = SearchSpace(tuple(Decision(n, Choice(OPTIONS, ordered=True)) for n in names))
    memory = AdditiveTable("memory_mb", 0.0, {n: dict(BITS) for n in names}, exact=True)  # type: ignore[arg-type]
    kl = AdditiveTable("kl", 0.0, {n: {o: (i + 1) * x for o, x in LOSS.items()} for i, n in enumerate(names)})
    baselines = tuple(Candidate.of(dict.fromkeys(names, o)) for o in reversed(OPTIONS))
    known = {"kl": kl, "memory_mb": memory} if tables else {}
    return Problem(space, (Objective("kl"), Objective("memory_mb")), (), known, baselines, 0)


def test_candidates_are_of_all_kinds_and_differ() -> None:
    asked = problem()
    found = draw_candidates(asked, 30)
    assert len(found) == 30 and asked.baselines[0] not in found
    kinds = list(found.values())
    assert kinds.count("uniform") == 3 and kinds.count("allocated") == 12 and kinds.count("mixed") == 15
    assert not any(asked.space.violations(c) for c in found)
    assert draw_candidates(asked, 30) == found


def test_mixed_candidates_spread_over_the_range() -> None:
    """As those drawn decision by decision do not: their sums are all near the middle."""
    asked = problem(decisions=60)
    table = asked.tables["memory_mb"]
    rng = np.random.default_rng(0)
    drawn = [table.total(asked.space.sample(rng)) for _ in range(40)]
    mixed = [table.total(c) for c, kind in draw_candidates(asked, 60).items() if kind == "mixed"]
    assert np.std(mixed) > 2.0 * np.std(drawn)


def test_without_tables_the_rest_is_mixed() -> None:
    kinds = list(draw_candidates(problem(tables=False), 20).values())
    assert kinds.count("uniform") == 3 and kinds.count("mixed") == 17


def test_a_small_space_gives_what_it_has() -> None:
    assert len(draw_candidates(problem(decisions=1), 30)) <= 4


# --- from the model to the search ---------------------------------------------------------------------------


def test_a_worker_scores_single_sequences(make_worker: Callable[..., Any]) -> None:
    worker = make_worker("llama")
    candidate = {d.name: "w3g32" for d in worker.decisions["bitwidths"]}
    request = {"kind": "sequences", "shard": 0, "shards": 1, "candidate": candidate}
    found = ProfileResult.from_json(json.loads(json.dumps(worker.profile(request))))
    measured = worker.measure(candidate, {"name": "any", "split": "proxy", "sequences": 0, "timing": False})
    assert "sequences" in worker.describe()["profiles"]
    assert list(found.rows["kl"]) == list(range(6))
    assert np.mean([mean(m) for m in found.rows["kl"].values()]) == pytest.approx(
        measured["metrics"]["kl"]["value"]
    )
    assert found.details is not None and found.details["data"]["data.proxy"] == 6
    with pytest.raises(SpaceError):
        worker.profile(request | {"candidate": {"nothing": "w8"}})


def test_a_job_searches_on_the_file_that_the_command_wrote(
    make_job: Callable[..., Any],
    make_worker: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command line on a real model, then a worker that scores the chosen sequences only."""
    from autocomp.worker import ModelWorker

    whole = make_worker("llama")
    monkeypatch.setattr("autocomp.proxy.make_executor", lambda job: InlineExecutor(whole))
    made = make_job("llama") | {"output": str(tmp_path / "runs"), "objectives": ["min kl", "min memory_mb"]}
    job, out = tmp_path / "job.yaml", tmp_path / "subset.json"
    job.write_text(json.dumps(made))
    asked = ["proxy", str(job), "--out", str(out), "--size", "2", "--candidates", "8", "--json"]
    done = CliRunner().invoke(cli.app, asked)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["indices"]
    assert rows == json.loads(out.read_text())["indices"] and len(rows) == 2
    few = ModelWorker(Job.of(made, [f"workload.data.subset={out}"]).resolved())
    candidate = {d.name: "w4g32" for d in few.decisions["bitwidths"]}
    found = few.measure(candidate, {"name": "proxy", "split": "proxy", "sequences": 0, "timing": False})
    assert found["tokens"] == 2 * 24 and found["metrics"]["kl"]["n"] == 2
    request = {"kind": "sequences", "shard": 0, "shards": 1, "candidate": candidate}
    single = ProfileResult.from_json(whole.profile(request)).rows["kl"]
    assert found["metrics"]["kl"]["value"] == pytest.approx(
        np.mean([mean(single[i]) for i in rows]), rel=1e-5
    )


def test_the_command_says_what_was_found_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autocomp.proxy.make_executor", lambda job: InlineExecutor(SequenceWorker()))
    monkeypatch.setattr(api, "new_run_dir", lambda job: tmp_path / "run")
    job, out = tmp_path / "job.yaml", tmp_path / "s.json"
    job.write_text(json.dumps(JOB))
    done = CliRunner().invoke(cli.app, ["proxy", str(job), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "6 of 60: Kendall's tau" in done.stdout and "chosen" in done.stdout and "random" in done.stdout
    assert f"-o workload.data.subset={out}" in done.stdout
    assert "run directory" in done.stderr and "30. " in done.stderr
    nowhere = tmp_path / "no" / "folder.json"
    failed = CliRunner().invoke(cli.app, ["proxy", str(job), "--out", str(nowhere), "-q"])
    assert failed.exit_code == 2 and "what was scored is in" in failed.stderr
