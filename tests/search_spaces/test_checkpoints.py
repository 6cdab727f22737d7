"""Merged checkpoints: the arithmetic, the way back, what is written on top of them, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from autocomp.errors import SpaceError
from autocomp.search_spaces.base import ModelSite
from autocomp.search_spaces.checkpoints import Checkpoints, CheckpointsConfig, exponential
from autocomp.space import Candidate, SearchSpace
from autocomp.testing.diffusion import tiny_dit_folder
from autocomp.worker import ModelWorker

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
COUNT = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, apart: Path) -> list[Path]:
    root = tmp_path_factory.mktemp("run")
    return [tiny_dit_folder(root / f"{i}", seed=i, dtype="float16" if i else "float32") for i in range(COUNT)]


@pytest.fixture(scope="module")
def job(folders: list[Path]) -> dict[str, Any]:
    """The loaded model is the first checkpoint; the others are named as folder, subfolder and file."""
    named = [str(folders[0]), str(folders[1] / "transformer"), str(folders[2]), str(folders[3] / WEIGHTS)]
    workload = {
        "kind": "diffusion", "model": str(folders[0]), "snapshots": named, "sampler": {"steps": 2},
        "data": {"calibration": 2, "proxy": 4, "selection": 4, "report": 4, "batch": 4},
    }  # fmt: skip
    return {
        "workload": workload, "space": [{"checkpoints": {}}], "objectives": ["min mse"],
        "sensitivity": {"method": "none"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def worker(job: dict[str, Any]) -> ModelWorker:
    return ModelWorker(job)


def coefficients(*row: float) -> dict[str, Any]:
    return {f"checkpoints/weight.{i}": a for i, a in enumerate(row)}


def weights(worker: ModelWorker) -> dict[str, torch.Tensor]:
    return {n: w.clone() for n, w in worker.built.model.state_dict().items()}


def test_weights_are_the_combination(worker: ModelWorker, folders: list[Path]) -> None:
    row = (0.5, -0.25, 1.0, -0.25)
    worker.apply(Candidate.of(coefficients(*row)), serving=False)
    saved = [load_file(f / WEIGHTS) for f in folders]
    for name, found in weights(worker).items():
        wanted = sum(a * s[name].double() for a, s in zip(row, saved, strict=True))
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
    assert "checkpoints" in worker.built.changed
    worker.restore()
    assert worker.built.pristine
    for name, found in weights(worker).items():
        assert torch.equal(found, saved[0][name])


def test_what_is_quantized_are_the_merged_weights(job: dict[str, Any]) -> None:
    """A new merge under an old label quantizes anew, and what is left afterwards is the loaded model."""
    bits = {"options": ["w8g16", "w16"], "granularity": "model", "method": "rtn"}
    worker = ModelWorker({**job, "space": [{"checkpoints": {}}, {"bitwidths": bits}]})
    before = weights(worker)
    part = next(p for p in worker.built.site.parts if p.role == "body")
    module = worker.built.model.get_submodule(part.path)
    dense, rough = [], []
    for row in ((0.0, 0.0, 0.0, 1.0), (0.0, 0.5, 0.5, 0.0)):
        candidate = Candidate.of(coefficients(*row) | {"bitwidths/model": "w16"})
        worker.apply(candidate, serving=False)
        dense.append(module.weight.detach().clone())
        worker.apply(candidate.replace({"bitwidths/model": "w8g16"}), serving=False)
        rough.append(module.weight.detach().clone())
    for exact, rounded in zip(dense, rough, strict=True):
        worst = (rounded - exact).abs().max()
        assert 0 < worst < 0.02 * exact.abs().max()
    assert (rough[0] - rough[1]).abs().max() > 0.1 * dense[0].abs().max()
    worker.restore()
    assert all(torch.equal(w, before[n]) for n, w in weights(worker).items())


def test_candidates_are_measured(worker: ModelWorker) -> None:
    fidelity = {"name": "proxy", "split": "proxy", "timing": False}
    same = worker.measure(coefficients(1.0, 0.0, 0.0, 0.0), fidelity)["metrics"]["mse"]["value"]
    other = worker.measure(coefficients(0.0, 0.0, 0.0, 1.0), fidelity)["metrics"]["mse"]["value"]
    assert same == pytest.approx(0.0, abs=1e-9) and other > 1e-3
    with pytest.raises(SpaceError, match=r"SumTo.*is off by 0\.5"):
        worker.measure(coefficients(1.0, 0.5, 0.0, 0.0), fidelity)


def test_baselines_are_the_usual_averages(worker: ModelWorker) -> None:
    baselines = [Candidate.of(b) for b in worker.describe()["baselines"]]
    rows = [[b[f"checkpoints/weight.{i}"] for i in range(COUNT)] for b in baselines]
    assert rows[0] == [0.0, 0.0, 0.0, 1.0]  # the neutral candidate: the last checkpoint
    assert [0.25] * COUNT in rows
    assert exponential(3, 0.5) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert sum(any(np.allclose(r, exponential(COUNT, d)) for r in rows) for d in (0.5, 0.7, 0.85)) == 3
    assert all(sum(r) == pytest.approx(1.0) for r in rows)


def test_ridge_shrinks_towards_an_average() -> None:
    site = ModelSite("dit", (), 0, "hash", snapshots=3)
    free, held = (Checkpoints(CheckpointsConfig(ridge=r)) for r in (0.0, 1.0))
    decisions = free.decisions(site)
    space = SearchSpace(tuple(decisions), tuple(free.constraints(site, decisions)))
    drawn = space.sample(np.random.default_rng(0))
    row, near = free.coefficients(drawn.values), held.coefficients(drawn.values)
    assert row is not None and near is not None and sum(row) == pytest.approx(1.0) == sum(near)
    center = exponential(3, 0.7)
    assert near == pytest.approx([(a + b) / 2 for a, b in zip(row, center, strict=True)])
    assert free.coefficients({d.name: None for d in decisions}) is None


def test_other_architectures_are_refused(worker: ModelWorker, folders: list[Path], tmp_path: Path) -> None:
    from autocomp.search_spaces.merging import Merger

    deeper = tiny_dit_folder(tmp_path / "deeper", layers=3)
    narrow = tmp_path / "narrow.safetensors"
    tensors = load_file(folders[1] / WEIGHTS)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first][:1].clone()}, narrow)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    known = worker.built.state["snapshots"]
    try:
        for path, words in (
            (deeper, "another architecture"),
            (narrow, f"{first} differs"),
            (broken, "can't be read"),
            (folders[1] / "scheduler", "holds no .safetensors"),
        ):
            worker.built.state["snapshots"] = [*known[:3], path]
            with pytest.raises(SpaceError, match=words):
                Merger(worker.built)
    finally:
        worker.built.state["snapshots"] = known


def test_wrong_settings_are_explained() -> None:
    with pytest.raises(ValidationError, match="must hold 0 and 1"):
        CheckpointsConfig(low=0.1)
    with pytest.raises(ValidationError, match="between 0 and 1"):
        CheckpointsConfig(decays=(1.0,))
    with pytest.raises(SpaceError, match=r"names 1;.*workload\.snapshots"):
        Checkpoints(CheckpointsConfig()).decisions(ModelSite("dit", (), 0, "hash", snapshots=1))
