"""One budget for weights, spans and cache bits: a whole search on a tiny model, and what it hands over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import autocomp
from autocomp.attention import runtime
from autocomp.attention.plan import Keep
from autocomp.choice_map import maps_of
from autocomp.run_files import read_space
from autocomp.space import AtMostDistinct
from autocomp.study import StudyResult
from autocomp.testing.fakes import InlineExecutor
from autocomp.worker import ModelWorker

Json = dict[str, Any]
SPANS = {"spans": ["dense", 0.5], "sink": 2, "key_bits": [16, 8], "value_bits": [4, 16]}


@pytest.fixture(scope="module")
def job(make_job: Callable[..., Json], apart: Path) -> Json:
    found = make_job("llama", options=["w8", "w16"])
    found["workload"]["kind"] = "long_context"
    found["workload"]["data"] = {"calibration": 4, "sequence_length": 32}
    found["workload"]["long"] = {
        "lengths": [192, 256], "unseen": [320], "calibrate_on": "mixed", "stride": 2,
        "documents": {"calibration": 2, "proxy": 1, "selection": 1, "report": 2},
        "retrieval": {
            "pairs": 2, "digits": 2, "prompts": {"calibration": 2, "proxy": 1, "selection": 1, "report": 2},
            "passkeys": {"report": 0},
        },
    }  # fmt: skip
    found["workload"]["scenario"] |= {"context_tokens": 128, "prompt_tokens": 32}
    found["space"].append({"attention": SPANS})
    return found | {
        "objectives": ["min kl", "min memory_mb", "min decode_ms"],
        "budget": {"trials": 13},
        "searcher": {"name": "hybrid", "options": {"profiles": 1}},
        "validation": {"audit": 1, "promote": 3, "report": 3},
    }


@pytest.fixture(scope="module")
def worker(job: Json) -> ModelWorker:
    return ModelWorker(job)


@pytest.fixture(scope="module")
def found(job: Json, worker: ModelWorker, tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    run = tmp_path_factory.mktemp("runs") / "run"
    return autocomp.search(job, run_dir=run, executor=InlineExecutor(worker))


def test_the_space_is_joint_and_its_constraints_hold(found: StudyResult) -> None:
    space = read_space(found.run_dir)
    assert {d.space for d in space} == {"bitwidths", "attention"}
    assert sum(isinstance(c, AtMostDistinct) and c.field == 1 for c in space.constraints) == 2
    for point in found.front.points:
        assert not space.violations(point.trial.candidate)
    searched = [p.trial for p in found.front.points if p.trial.origin == "validate"]
    changed = [{str(v) for v in t.candidate.values.values()} - {"w16", "dense/k16v16"} for t in searched]
    both = [labels for labels in changed if {"/" in label for label in labels} == {True, False}]
    assert both, "no candidate mixes the spaces"


def test_exact_sizes_are_those_of_what_was_allocated(found: StudyResult) -> None:
    for point in found.front.points:
        trial = point.trial
        said, held = trial.value("kv_mb"), trial.value("cache_mb")
        # The tables are for 128 tokens; dense groups also have room for the tokens that are decoded, and
        # windows, sinks and starts are a few numbers a layer.
        assert said <= held + 1e-9 and held <= said * (132 / 128) + 2e-4
        assert trial.value("memory_mb") > said
    dense = next(p.trial for p in found.front.points if p.trial.value("density") == 1.0)
    assert dense.value("kv_mb") >= max(0.0, *(p.trial.value("kv_mb") * 0.4 for p in found.front.points))


def test_lengths_are_scored_apart_and_picked_where_nobody_looked(found: StudyResult) -> None:
    levels = {}
    for line in (found.run_dir / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "trial" and record["trial"]["measurement"]:
            names = set(record["trial"]["measurement"]["metrics"])
            levels.setdefault(record["trial"]["fidelity"]["name"], names)
    assert {"kl_192", "kl_256"} <= levels["proxy"] and "kl_320" not in levels["proxy"]
    assert "kl_320" in levels["selection"] and "kl_192" not in levels["selection"]
    assert {"kl_192", "kl_256", "kl_320", "retrieval_320", "ppl_256"} <= levels["report"]


def test_a_joint_candidate_has_two_maps(found: StudyResult, tmp_path: Path) -> None:
    trial = found.front.points[-1].trial
    maps = maps_of(found.run_dir, trial)
    assert set(maps) == {f"choices_{trial.number}.png", f"spans_{trial.number}.png"}
    for name, draw in maps.items():
        draw(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


def test_what_was_searched_is_what_runs_after_export(
    found: StudyResult, worker: ModelWorker, tmp_path: Path
) -> None:
    windowed = [
        p.trial.candidate for p in found.front.points
        if any("a0b" in str(v) for v in p.trial.candidate.values.values())
    ]  # fmt: skip
    worker.export(windowed[0].to_json(), "native", str(tmp_path / "out"))
    worker.apply(windowed[0], serving=True)
    model = autocomp.load(tmp_path / "out", device="cpu")
    plan = runtime.installed(model)
    assert plan is not None and plan == runtime.installed(worker.built.model)
    ids = torch.arange(60)[None] + 5
    with torch.no_grad():
        ours = worker.built.model(input_ids=ids, use_cache=False).logits
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, ours)
    assert model.generate(ids, max_new_tokens=4).shape[1] >= 61
    worker.restore()
    assert worker.built.pristine


def test_a_profile_around_a_candidate_covers_both_spaces(worker: ModelWorker) -> None:
    names = {n: [d.name for d in row] for n, row in worker.decisions.items()}
    at = dict.fromkeys(names["bitwidths"], "w8") | dict.fromkeys(names["attention"], "a0b0.5s2/k8v4")
    result = worker.profile({"kind": "neighbourhood", "shard": 0, "shards": 1, "candidate": at})
    rows = result["rows"]
    assert {*names["bitwidths"], *names["attention"], "base"} <= set(rows)
    assert f"{names['attention'][0]}@192" in rows
    for name, option in at.items():
        (n, total, _), *_ = [m for o, *m in rows[name] if o == option]
        assert n >= 1 and total == pytest.approx(0.0, abs=1e-6), "staying costs nothing"
    loosest = {o: total for o, _, total, _ in rows[names["attention"][0]]}
    assert Keep().label in loosest and all(abs(x) < 100 for x in loosest.values())


def test_the_epsilon_searcher_takes_the_lengths_as_objectives(
    job: Json, worker: ModelWorker, tmp_path: Path
) -> None:
    wanted = job | {
        "objectives": ["min kl", "min density"],
        "searcher": {"name": "epsilon", "options": {"intervals": 2}},
        "validation": {"audit": 0, "promote": 2, "report": 1},
        "budget": {"trials": 8},
    }
    result = autocomp.search(wanted, run_dir=tmp_path / "run", executor=InlineExecutor(worker))
    proposed = [
        json.loads(line)["trial"]
        for line in (result.run_dir / "journal.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "trial"
    ]
    assert any(t["origin"] == "epsilon" and t["measurement"] for t in proposed)
