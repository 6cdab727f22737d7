"""Trials for the trackers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from autocomp.description import Description
from autocomp.search_spaces.base import ModelSite
from autocomp.space import Candidate, Choice, Decision, Interval, SearchSpace
from autocomp.trial import Estimate, Failure, Fidelity, Measurement, Trial

JOB = {
    "workload": {"kind": "causal_lm", "model": "some/model", "scenario": {"batch": 1}},
    "space": [{"bitwidths": {"bits": [4, 8]}}],
    "objectives": ["min kl", "max speed"],
    "constraints": ["memory_mb <= 200"],
}
SPACE = SearchSpace(
    (
        *(
            Decision(f"bitwidths/layers.{i}.up", Choice(("w4", "w8"), True), (), "bitwidths", i)
            for i in range(3)
        ),
        Decision("schedule/t0", Interval(0.0, 1.0, nullable=True), (), "schedule"),
    )
)


def make_trial(number: int, *, kl: float = 0.1, failed: bool = False, memory: float = 100.0) -> Trial:
    values = {d.name: d.options[number % 2] for d in SPACE if d.options}
    values["bitwidths/layers.0.up"] = ("w4", "w8")[number // 2 % 2]
    candidate = Candidate.of({**values, "schedule/t0": None if number % 2 else number / 1000})
    if failed:
        return Trial(number, candidate, Fidelity(), "hybrid", failure=Failure("oom", "needs 3 GB"))
    metrics = {
        "kl": Estimate(kl, 0.01),
        "speed": Estimate(10.0 + number, 0.5),
        "memory_mb": Estimate(memory),
        "worst": Estimate(float("inf")),
    }
    return Trial(number, candidate, Fidelity(), "hybrid", Measurement(metrics, "cpu, 1 thread", seconds=2.0))


@pytest.fixture
def trial() -> Callable[..., Trial]:
    return make_trial


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run-1"
    folder.mkdir()
    site = ModelSite("llama", (), 0, "0" * 16)
    described = Description(site, SPACE, (), {}, {}, {"kl": True, "speed": False}, ("speed",))
    (folder / "description.json").write_text(json.dumps(described.to_json()))
    return folder


@pytest.fixture
def job() -> dict[str, object]:
    return dict(JOB)


@pytest.fixture
def space() -> SearchSpace:
    return SPACE
