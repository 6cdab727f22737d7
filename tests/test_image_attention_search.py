"""Whole searches of attention rules on tiny diffusion transformers: profiles, latency table, memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import autocomp
from autocomp.testing.diffusion import SIZE, tiny_dit_folder, tiny_flux_folder, tiny_sd3_folder
from autocomp.testing.fakes import InlineExecutor
from autocomp.worker import ModelWorker
from autocomp.workloads.diffusion_config import DiffusionConfig

PATHS = [f"transformer_blocks.{i}.attn1" for i in (0, 1)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return job_of(tiny_dit_folder(tmp_path_factory.mktemp("dit")))


def job_of(folder: Path, sampler: str = "ddim", **workload: Any) -> dict[str, Any]:
    return {
        "workload": {
            "kind": "diffusion", "model": str(folder), "guidance": 1.5, **workload,
            "sampler": {"name": sampler, "steps": 6},
            "data": {"calibration": 4, "proxy": 4, "selection": 4, "report": 4, "batch": 4},
            "scenario": {"batch": 2, "threads": 1, "repeats": 2},
        },
        "space": [{"diffusion_attention": {"ranges": 3, "options": ["reuse", "w2", "full/cfg"]}}],
        "objectives": ["min noise", "min image_ms"],
        "searcher": {"name": "ilp"},
        "sensitivity": {"method": "first_order", "sequences": 4},
        "budget": {"trials": 7},
        "validation": {"audit": 2, "promote": 2, "report": 2},
        "device": "cpu",
        "tracking": {"uri": "", "optuna": False},
    }  # fmt: skip


@pytest.fixture(scope="module")
def worker(job: dict[str, Any], apart: Path) -> Iterator[ModelWorker]:
    yield ModelWorker(job)
    gc.unfreeze()


def check_trials(records: list[dict[str, Any]]) -> None:
    """Something else than the uncompressed model came through to the report split, and was measured. Which
    of them is faster is up to the machine: whole samplings of these models take milliseconds."""
    trials = [r["trial"] for r in records if r["kind"] == "trial"]
    reported = [t["measurement"]["metrics"] for t in trials if t["fidelity"]["split"] == "report"]
    assert any(m["noise"]["value"] == 0 for m in reported) and all(
        m["image_ms"]["value"] > 0 for m in reported
    )
    assert all((m["noise"]["value"] > 0) == (m["attention_share"]["value"] < 1 - 1e-9) for m in reported)
    assert len({m["attention_share"]["value"] for m in reported}) >= 2


def test_a_search_of_attention_rules(job: dict[str, Any], worker: ModelWorker, tmp_path: Path) -> None:
    result = autocomp.search(job, run_dir=tmp_path / "run", executor=InlineExecutor(worker, slots=1))
    assert result.status == "finished"
    records = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    profiles = {r["result"]["kind"]: r["result"]["rows"] for r in records if r["kind"] == "profile"}
    assert set(profiles) == {"sensitivity:first_order", "operations"}
    assert set(profiles["sensitivity:first_order"]) == {
        f"diffusion_attention/{path}.{r}" for path in PATHS for r in range(3)
    }
    labels = {key.partition("x64/")[2] for key in profiles["operations"]}
    assert labels == {"full", "reuse", "w2", "full/cfg"}
    check_trials(records)
    assert result.audit["noise"]


def test_what_a_plan_holds_counts_as_memory(worker: ModelWorker) -> None:
    full = dict.fromkeys([f"diffusion_attention/{p}.{r}" for p in PATHS for r in range(3)], "full")
    fidelity = {"name": "proxy", "split": "proxy", "sequences": 4, "timing": True}
    dense = worker.measure(full, fidelity)["metrics"]
    window = worker.measure({**full, f"diffusion_attention/{PATHS[1]}.1": "w2"}, fidelity)["metrics"]
    held = 2 * 2 * 16 * 64 * 4 / 1e6  # batch, halves, tokens, width, bytes
    assert window["memory_mb"]["value"] - dense["memory_mb"]["value"] == pytest.approx(held)
    assert window["resident_mb"]["value"] - dense["resident_mb"]["value"] == pytest.approx(held)
    assert window["noise"]["value"] > 0 == dense["noise"]["value"]
    assert window["attention_share"]["value"] < dense["attention_share"]["value"] == pytest.approx(1)


def test_the_latency_table_counts_steps_and_rows(worker: ModelWorker) -> None:
    from autocomp.description import Description
    from autocomp.predictors.latency import latency_table, operation_keys
    from autocomp.profile import ProfileResult

    description = Description.from_json(worker.describe())
    assert description.rows == {"image_ms": (4, 3.0), "step_ms": (4, 1.0)}
    keys = operation_keys(description)
    cost = {"full": 4.0, "w2": 2.0, "full/cfg": 3.0, "reuse": 1.0}
    rows = {key: {"image_ms": (1, cost[key.partition("x64/")[2]], 0.0)} for key in keys}
    table = latency_table(description, ProfileResult("operations", rows), "image_ms")
    # Two of six steps a range, the first of all full; an image is half of a batch's time.
    first, second = (table.costs[f"diffusion_attention/{PATHS[0]}.{r}"] for r in (0, 1))
    assert first["full"] == pytest.approx((4 + 4) / 2) and first["reuse"] == pytest.approx((4 + 1) / 2)
    assert second["w2"] == pytest.approx((2 + 2) / 2) and second["full/cfg"] == pytest.approx((3 + 3) / 2)


def text_of(folder: Path) -> dict[str, Any]:
    return {"conditions": str(folder / "conditions.safetensors")}


@pytest.mark.parametrize("method", ["first_order", "measured"])
def test_a_search_where_text_and_image_are_one_sequence(method: str, apart: Path, tmp_path: Path) -> None:
    """SD3: joint attention in both blocks, and of the image alone in the first one."""
    folder = tiny_sd3_folder(tmp_path / "sd3", dual=True, rms=True)
    job = job_of(folder, "euler", **text_of(folder))
    job["sensitivity"] = {"method": method, "sequences": 2}
    worker = ModelWorker(job)
    paths = [f"transformer_blocks.{name}" for name in ("0.attn", "0.attn2", "1.attn")]
    parts = {p.path: (p.shape, p.role) for p in worker.built.site.image_attention}
    assert parts == {
        paths[0]: ((4, 16, 16, 5), "joint"), paths[1]: ((4, 16, 16), "attention"),
        paths[2]: ((4, 16, 16, 5), "joint"),
    }  # fmt: skip
    result = autocomp.search(job, run_dir=tmp_path / "run", executor=InlineExecutor(worker, slots=1))
    gc.unfreeze()
    assert result.status == "finished"
    records = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    profiles = {r["result"]["kind"]: r["result"]["rows"] for r in records if r["kind"] == "profile"}
    assert set(profiles[f"sensitivity:{method}"]) == {
        f"diffusion_attention/{path}.{r}" for path in paths for r in range(3)
    }
    check_trials(records)
    labels = {key.partition("x64/")[2] for key in profiles["operations"]}
    rules = ("full", "reuse", "w2", "full/cfg")
    assert labels == {*rules, *(f"joint/{rule}" for rule in rules)}
    assert result.audit["noise"]


def test_a_size_is_a_height_and_a_width() -> None:
    assert (
        DiffusionConfig(model="m", size=(8, 16)).size == (8, 16) and DiffusionConfig(model="m").size is None
    )
    with pytest.raises(ValidationError, match=r"1 or more; got \[0, 8\]"):
        DiffusionConfig(model="m", size=(0, 8))


def test_what_a_joint_plan_holds_counts_the_text(apart: Path, tmp_path: Path) -> None:
    """Flux, which has no halves: it learned what guidance gives."""
    folder = tiny_flux_folder(tmp_path / "flux")
    job = job_of(folder, "euler", **text_of(folder), size=[SIZE, SIZE])
    job["workload"]["guidance"] = 1.0
    job["space"] = [{"diffusion_attention": {"ranges": 3}}]
    worker = ModelWorker(job)
    gc.unfreeze()
    double, single = "transformer_blocks.0.attn", "single_transformer_blocks.1.attn"
    parts = {p.path: (p.shape, p.role) for p in worker.built.site.image_attention}
    assert (parts[double], parts[single]) == (((4, 16, 16, 5), "flux"), ((4, 16, 16, 5), "flux_single"))
    decisions = {d.name: d for d in worker.decisions["diffusion_attention"]}
    assert {d.options for d in decisions.values()} == {("reuse", "w1", "w2", "full")}
    full = dict.fromkeys(decisions, "full")
    fidelity = {"name": "proxy", "split": "proxy", "sequences": 4, "timing": True}
    dense = worker.measure(full, fidelity)["metrics"]
    for path in (double, single):
        window = worker.measure({**full, f"diffusion_attention/{path}.1": "w2"}, fidelity)["metrics"]
        held = 2 * (16 + 5) * 64 * 4 / 1e6  # batch, tokens of image and text, width, bytes
        assert window["memory_mb"]["value"] - dense["memory_mb"]["value"] == pytest.approx(held)
        assert window["resident_mb"]["value"] - dense["resident_mb"]["value"] == pytest.approx(held)
        assert window["noise"]["value"] > 0 == dense["noise"]["value"]
        share = (window["attention_share"]["value"], dense["attention_share"]["value"])
        assert share[0] < share[1] == pytest.approx(1)
