"""Attention plans in exports: what was searched is what runs after loading, in C too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import autocomp
from autocomp.attention.cache import SpanCache
from autocomp.errors import ExportError
from autocomp.serving import LeanDecoder
from autocomp.space import Candidate
from autocomp.testing.exporters import candidates, tiny_worker


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Candidate, torch.Tensor]:
    folder = tmp_path_factory.mktemp("plan")
    worker = tiny_worker(folder)
    candidate = candidates(worker)[-1]
    worker.export(candidate.to_json(), "native", str(folder / "out"))
    worker.apply(candidate, serving=False)
    ids = worker.workload.inputs(worker.built, "report", 2)  # type: ignore[attr-defined]
    with torch.inference_mode():
        return folder / "out", candidate, worker.built.model(input_ids=ids, use_cache=False).logits


def test_the_plan_is_in_the_envelope_and_runs(exported: tuple[Path, Candidate, torch.Tensor]) -> None:
    folder, _, _ = exported
    envelope = json.loads((folder / "autocomp.json").read_text())
    assert envelope["version"] == 2
    assert envelope["attention"]["0"] == {
        "rules": ["a8b0s2", "dense"], "key_bits": 8, "value_bits": 4, "window": 0, "shortest": 32,
    }  # fmt: skip
    model = autocomp.load(folder)
    ids = torch.arange(40)[None] + 5
    cache = SpanCache(model)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert out.shape == (1, 50)
    # The first group of each layer keeps 8 tokens whatever comes.
    assert [layer.ring.window[0].item() + layer.ring.sink[0].item() for layer in cache.layers] == [8, 8]
    lean = LeanDecoder(model, capacity=64)
    assert torch.equal(lean.generate(ids, 10), out)


def test_models_without_a_plan_stay_readable_by_older_versions(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path)
    worker.export(candidates(worker)[0].to_json(), "native", str(tmp_path / "out"))
    envelope = json.loads((tmp_path / "out" / "autocomp.json").read_text())
    assert envelope["version"] == 1 and "attention" not in envelope


def test_a_damaged_plan_is_named(exported: tuple[Path, Candidate, torch.Tensor], tmp_path: Path) -> None:
    folder, _, _ = exported
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    envelope = json.loads((broken / "autocomp.json").read_text())
    for damage in ({"0": {"rules": ["w7"]}}, {"0": envelope["attention"]["0"]}):
        envelope["attention"] = damage
        (broken / "autocomp.json").write_text(json.dumps(envelope))
        with pytest.raises(ExportError, match="attention plan"):
            autocomp.load(broken)


def test_formats_that_hold_weights_only_say_so(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path)
    wanted = candidates(worker)[-1]
    with pytest.raises(ExportError, match="attention spans"):
        worker.export(wanted.to_json(), "compressed-tensors", str(tmp_path / "out"))
