"""A whole search of attention rules on a tiny diffusion transformer: profiles, latency table, memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import autocomp
from autocomp.testing.diffusion import tiny_dit_folder
from autocomp.testing.fakes import InlineExecutor
from autocomp.worker import ModelWorker

PATHS = [f"transformer_blocks.{i}.attn1" for i in (0, 1)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tiny_dit_folder(tmp_path_factory.mktemp("dit"))
    return {
        "workload": {
            "kind": "diffusion", "model": str(folder), "guidance": 1.5,
            "sampler": {"name": "ddim", "steps": 6},
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
    assert len(result.front.front) >= 2, "the uncompressed model and something faster or as good"
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
