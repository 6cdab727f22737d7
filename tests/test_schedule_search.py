"""Whole searches over sampling schedules of a tiny DiT: floats, slots that may be empty, no sensitivities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autocomp
from autocomp.run_files import read_space
from autocomp.search_spaces.schedules import Schedules
from autocomp.search_spaces.schedules_config import SchedulesConfig
from autocomp.space import Ordered, Slots
from autocomp.testing.diffusion import digits_npz, tiny_classifier_folder, tiny_dit_folder
from autocomp.testing.fakes import InlineExecutor
from autocomp.worker import ModelWorker

SPACES: dict[str, dict[str, Any]] = {
    "evolution": {"slots": 5, "min_steps": 2, "search": ["time", "order"]},
    "hybrid": {"slots": 4, "skip": True, "search": ["model", "corrector"]},
}
OPTIONS: dict[str, dict[str, Any]] = {"evolution": {"population": 4}, "hybrid": {"first": 2, "pool": 20}}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, apart: Path) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("dit")
    data = {"calibration": 2, "proxy": 8, "selection": 8, "report": 8, "batch": 8}
    return {
        "workload": {
            "kind": "diffusion",
            "model": str(tiny_dit_folder(root / "own", layers=1)),
            "zoo": {"other": str(tiny_dit_folder(root / "other", seed=1, layers=1))},
            "sampler": {"name": "ddim", "steps": 6},
            "features": str(tiny_classifier_folder(root / "classifier")),
            "data": data | {"real": str(digits_npz(root / "real.npz", 64))},
            "scenario": {"batch": 1, "threads": 1, "repeats": 1},
        },
        "objectives": ["min fd", "min image_ms"],
        "sensitivity": {"method": "none"},
        "tracking": {"uri": "", "optuna": False},
        "validation": {"audit": 2, "promote": 3, "report": 2},
    }


@pytest.mark.parametrize("name", SPACES)
def test_a_search_returns_schedules(name: str, job: dict[str, Any], tmp_path: Path) -> None:
    worker = ModelWorker({**job, "space": [{"schedules": SPACES[name]}]})
    baselines = len(worker.describe()["baselines"])
    whole = {
        **job, "space": [{"schedules": SPACES[name]}], "budget": {"trials": baselines + 6},
        "searcher": {"name": name, "options": OPTIONS[name]},
    }  # fmt: skip
    events: list[str] = []
    found = autocomp.search(
        whole, run_dir=tmp_path / "run", executor=InlineExecutor(worker),
        on_event=lambda e: events.append(e.text),
    )  # fmt: skip
    space = read_space(tmp_path / "run")
    kinds = {type(c) for c in space.constraints}
    assert found.status == "finished" and Slots in kinds and (Ordered in kinds) == (name == "evolution")
    assert not any("nothing more to propose" in e for e in events)
    reader, lengths = Schedules(SchedulesConfig(**SPACES[name])), set()
    for point in found.front.points:
        trial = point.trial
        assert trial.ok and not space.violations(trial.candidate)
        schedule = reader.schedule(trial.candidate.values)
        assert schedule is not None and trial.value("nfe") == len(schedule)
        lengths.add(len(schedule))
    assert len(lengths) > 1
    assert worker.built.pristine and worker.built.state["schedule"] is worker.built.state["default_schedule"]


def test_a_schedule_joins_other_spaces(job: dict[str, Any], apart: Path) -> None:
    """Sensitivities are of the weights alone, and the first baseline is the model as it is."""
    spaces = [{"schedules": {"steps": 3}}, {"bitwidths": {"options": ["w8", "w16"], "granularity": "block"}}]
    worker = ModelWorker({**job, "space": spaces, "objectives": ["min fd", "min memory_mb"]})
    result = worker.profile({"kind": "sensitivity:measured", "shard": 0, "shards": 1})
    names = {n.partition("@")[0] for n in result["rows"]}
    assert names and all(n.startswith("bitwidths/") for n in names - {"base"}), names
    first = worker.describe()["baselines"][0]
    assert {v for n, v in first.items() if n.startswith("bitwidths")} == {"w16"}
    assert [first[f"schedules/time.{i}"] for i in range(3)] == pytest.approx([1, 2 / 3, 1 / 3])
    metrics = worker.measure(first, {"name": "proxy", "split": "proxy", "timing": False})["metrics"]
    assert metrics["nfe"]["value"] == 3
