"""The job tree: every wrong thing is named with its field, its value and what would be valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from autocomp.errors import JobError
from autocomp.job import Job, apply_overrides

SMALL: dict[str, Any] = {
    "workload": {"kind": "causal_lm", "model": "some/folder"},
    "space": [{"bitwidths": {"bits": [3, 4]}}],
}


def test_three_lines_suffice_and_defaults_are_filled_in() -> None:
    resolved = Job.of(SMALL).resolved()
    assert resolved["objectives"] == ["min kl", "min decode_ms", "min memory_mb"]
    assert resolved["executor"]["name"] == "ray"
    assert resolved["space"][0]["bitwidths"]["granularity"] == "tied"
    assert resolved["workload"]["scenario"]["batch"] == 1


def test_the_resolved_job_is_a_job_again() -> None:
    resolved = Job.of(SMALL).resolved()
    assert Job.of(yaml.safe_load(yaml.safe_dump(resolved))).resolved() == resolved


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("budget.trialz=3", ["budget.trialz", "unknown key", "did you mean 'trials'"]),
        ("budget.trials=0", ["budget.trials = 0", "greater than or equal to 1"]),
        ("space.0.bitwidths.bits=[7]", ["space.0.bitwidths", "got 7", "2, 3, 4, 5, 6, 8, 16"]),
        ("space.0.bitwidths.bitz=3", ["space.0.bitwidths.bitz", "did you mean 'bits'"]),
        ("space.0.bitwidths.options=[q4]", ["q4", "w4g64a"]),
        ("space.0.bitwidths.exclude=['(']", ["exclude", "not a regular expression"]),
        ("workload.modle=x", ["workload.modle", "did you mean 'model'"]),
        ("workload.kind=vlm", ["workload.kind = 'vlm'", "causal_lm"]),
        ("workload.scenario.batch=0", ["workload.scenario.batch = 0"]),
        ("objectives=[kl]", ["'kl'", "min METRIC"]),
        ("constraints=['kl < ten']", ["'kl < ten'", "METRIC <= NUMBER"]),
        ("searcher.name=hybird", ["searcher.name = 'hybird'", "Did you mean 'hybrid'"]),
        ("executor.name=slurm", ["executor.name = 'slurm'", "local, ray"]),
        ("sensitivity.method=hessian", ["sensitivity.method = 'hessian'", "fisher"]),
        ("device=tpu", ["device = 'tpu'", "cuda"]),
    ],
)
def test_errors_name_field_value_and_remedy(override: str, expected: list[str]) -> None:
    with pytest.raises(JobError) as caught:
        Job.of(SMALL, [override])
    for text in expected:
        assert text in str(caught.value)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(JobError, match="2 problems"):
        Job.of(SMALL, ["budget.trials=0", "device=tpu"])


@pytest.mark.parametrize("override", ["nokey", "=3", "space.7.bitwidths={}", "seed.deeper.x=1", "seed=[1"])
def test_unreadable_overrides(override: str) -> None:
    with pytest.raises(JobError, match="override"):
        Job.of({**SMALL, "seed": 1}, [override])


def test_overrides_do_not_touch_the_given_tree() -> None:
    tree = {"a": {"b": [1, 2]}}
    assert apply_overrides(tree, ["a.b.1=5", "c.d=x"]) == {"a": {"b": [1, 5]}, "c": {"d": "x"}}
    assert tree == {"a": {"b": [1, 2]}}


def test_missing_file_bad_yaml_and_wrong_root(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no job file"):
        Job.from_yaml(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(JobError, match="can't read"):
        Job.from_yaml(bad)
    bad.write_text("- 1")
    with pytest.raises(JobError, match="mapping"):
        Job.from_yaml(bad)


def test_every_shipped_job_loads() -> None:
    files = sorted(Path(__file__).parents[1].glob("experiments/**/job*.yaml"))
    assert files
    for file in files:
        Job.from_yaml(file)
