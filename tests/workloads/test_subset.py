"""Subsets of the proxy split: what their files must say, and what a workload does with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from autocomp.errors import JobError
from autocomp.trial import Fidelity
from autocomp.workloads.base import Built
from autocomp.workloads.causal_lm import CausalLM, DataConfig
from autocomp.workloads.long_context import LongContext
from autocomp.workloads.subset import pool_facts, read_subset

Folder = Callable[[str], Path]
DATA = {"sequence_length": 32, "calibration": 4, "proxy": 12, "selection": 4, "report": 4}
POOL = np.arange(24).reshape(12, 2)
FACTS = pool_facts(POOL, DataConfig.model_validate(DATA), 3)


def workload(folder: Path, prose: list[str], seed: int = 0, **data: Any) -> CausalLM:
    config = {"model": str(folder), "data": {**DATA, "text": prose, **data}}
    return CausalLM(CausalLM.Config.model_validate(config), seed)


def perturbed(work: CausalLM, split: str = "proxy") -> Built:
    """A model whose teacher has seen ``split`` and whose layers are then damaged."""
    built = work.load("cpu")
    work.ensure_teacher(built, split)
    module: Any = built.model.get_submodule("model.layers.1.mlp.down_proj")
    noise = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(1))
    module.weight = torch.nn.Parameter(module.weight + 0.3 * module.weight.std() * noise, requires_grad=False)
    built.changed.add("weights")
    return built


def written(path: Path, **content: Any) -> str:
    path.write_text(json.dumps({"indices": [7, 2, 3], "data": FACTS} | content))
    return str(path)


def test_rows_come_back_rising(tmp_path: Path) -> None:
    assert read_subset(written(tmp_path / "s.json"), FACTS) == [2, 3, 7]


@pytest.mark.parametrize(
    "change, seed, message",
    [
        ({"sequence_length": 64}, 3, "data.sequence_length 32 there and 64 here"),
        ({"report": 5}, 3, "data.report 4 there and 5 here"),  # which moves all splits
        ({}, 4, "seed 3 there and 4 here"),
    ],
)
def test_a_subset_of_other_sequences_is_refused(
    tmp_path: Path, change: dict[str, int], seed: int, message: str
) -> None:
    here = pool_facts(POOL, DataConfig.model_validate(DATA | change), seed)
    with pytest.raises(JobError, match=message) as caught:
        read_subset(written(tmp_path / "s.json"), here)
    assert "autocomp proxy" in str(caught.value)


def test_a_subset_of_another_text_is_refused(tmp_path: Path) -> None:
    here = pool_facts(POOL + 1, DataConfig.model_validate(DATA), 3)
    with pytest.raises(JobError, match="another text or tokenizer"):
        read_subset(written(tmp_path / "s.json"), here)


@pytest.mark.parametrize("data", [None, {}, "proxy"])
def test_a_subset_that_does_not_say_of_what_is_refused(tmp_path: Path, data: Any) -> None:
    with pytest.raises(JobError, match="does not say which sequences"):
        read_subset(written(tmp_path / "s.json", data=data), FACTS)


@pytest.mark.parametrize("indices", [None, [1], [1, 1], [1, 12], [-1, 2], [1.0, 2], [[1], [2]], [True, 2]])
def test_rows_must_be_rows_of_the_split(tmp_path: Path, indices: Any) -> None:
    with pytest.raises(JobError, match="two or more different `indices` below 12"):
        read_subset(written(tmp_path / "s.json", indices=indices), FACTS)


@pytest.mark.parametrize("content", [None, "no json", "\xff"])
def test_files_that_can_not_be_read_are_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "s.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(JobError, match=r"s\.json' can't be read"):
        read_subset(str(path), FACTS)


def test_sequence_values_are_what_the_metrics_are_means_of(tiny: Folder, prose: list[str]) -> None:
    work = workload(tiny("llama"), prose)
    built = perturbed(work)
    values, facts = work.sequence_values(built)
    metrics = work.score(built, Fidelity())[0]
    assert set(values) == set(CausalLM.sequence_metrics) == set(metrics)
    assert {len(row) for row in values.values()} == {12} and facts["data.proxy"] == 12
    assert np.mean(values["kl"]) == pytest.approx(metrics["kl"].value) and metrics["kl"].value > 1e-3
    assert np.std(values["kl"], ddof=1) / 12**0.5 == pytest.approx(metrics["kl"].stderr)
    assert np.mean(values["top1"]) == pytest.approx(metrics["top1"].value)
    assert np.exp(np.mean(values["ppl"])) == pytest.approx(metrics["ppl"].value)


def test_a_subset_is_scored_in_place_of_the_proxy_split(
    tiny: Folder, prose: list[str], tmp_path: Path
) -> None:
    whole = workload(tiny("llama"), prose)
    built = perturbed(whole)
    values, facts = whole.sequence_values(built)
    path = written(tmp_path / "s.json", indices=[9, 1, 4], data=facts)
    few = workload(tiny("llama"), prose, subset=path)
    part = perturbed(few)
    assert torch.equal(few.inputs(part, "proxy"), whole.inputs(built, "proxy")[[1, 4, 9]])
    for split in ("calibration", "selection", "report"):  # whose sequences stay what they were
        assert torch.equal(few.inputs(part, split), whole.inputs(built, split))
    metrics, tokens = few.score(part, Fidelity())
    assert tokens == 3 * 32 and metrics["kl"].n == 3
    assert metrics["kl"].value == pytest.approx(np.mean([values["kl"][i] for i in (1, 4, 9)]), rel=1e-5)
    with pytest.raises(JobError, match=r"which has 3: choose a larger data\.subset"):
        few.inputs(part, "proxy", 4)
    with pytest.raises(JobError, match="chosen from the whole proxy split"):
        few.sequence_values(part)


def test_a_subset_is_checked_before_the_model_is_loaded(
    tiny: Folder, prose: list[str], tmp_path: Path
) -> None:
    path = written(tmp_path / "s.json")  # of no text at all
    work = workload(tiny("llama"), prose, subset=path)
    with pytest.raises(JobError, match="seed 3 there and 0 here"):
        work.load("cpu")


def test_long_texts_have_no_subsets() -> None:
    assert LongContext.sequence_metrics == ()
    with pytest.raises(ValidationError, match=r"data\.subset is for causal_lm"):
        LongContext.Config.model_validate({"model": "m", "data": {"subset": "s.json"}})
