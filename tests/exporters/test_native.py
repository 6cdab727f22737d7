"""The native format: the same numbers after reloading, and plain words about damaged folders."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import autocomp
from autocomp.errors import ExportError
from autocomp.exporters.base import quantized_parts, save_sharded
from autocomp.exporters.native import VERSION, NativeExporter, load_native
from autocomp.kernels.modules import PackedEmbedding, PackedLinear
from autocomp.search_spaces.weights import WeightSwapper
from autocomp.space import Candidate
from autocomp.worker import ModelWorker

MakeWorker = Callable[..., ModelWorker]
KINDS = ["llama", "llama-tied", "gpt2", "gpt_neox", "opt", "qwen3", "gemma2", "granite"]
LABELS = ["w3g32", "w4g32ao0.5", "w16", "w8", "w2g16a"]


def mixed(worker: ModelWorker) -> Candidate:
    """Every label somewhere; the ends at their first."""
    cycle = enumerate(worker.decisions["bitwidths"])
    return Candidate.of({d.name: d.options[i % len(d.options)] for i, d in cycle})


@torch.inference_mode()
def outputs(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = model.generate(
        input_ids=ids[:, :8], attention_mask=torch.ones_like(ids[:, :8]), max_new_tokens=6, min_new_tokens=6,
        do_sample=False,
    )  # fmt: skip
    return model(input_ids=ids).logits, tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reloaded_export_gives_the_same_bits(
    make_worker: MakeWorker, kind: str, dtype: str, tmp_path: Path
) -> None:
    ends = (
        {"head": ["w4g32"], "embeddings": ["w8"]} if kind in ("llama", "gpt_neox") else {"embeddings": ["w8"]}
    )
    if kind in ("opt", "granite", "gemma2"):
        ends = {"embeddings": ["w3g32a"]}
    worker = make_worker(kind, dtype, options=LABELS, **ends)
    candidate = mixed(worker)
    folder = tmp_path / "out"
    worker.export(candidate.to_json(), "native", str(folder))
    ids = worker.built.state["splits"]["report"][:2]
    worker.apply(candidate, serving=True)
    wanted = outputs(worker.built.model, ids)
    worker.restore()
    model = autocomp.load(folder, device="cpu")
    found = outputs(model, ids)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert model.dtype == getattr(torch, dtype) and not model.training
    assert not any(p.requires_grad for p in model.parameters()), "packed weights can't be trained"
    packed = {n for n, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}
    assert packed == set(quantized_parts(worker, candidate))


def test_the_uncompressed_model_can_be_exported(make_worker: MakeWorker, tmp_path: Path) -> None:
    worker = make_worker("llama-tied")
    whole = {d.name: "w16" for d in worker.decisions["bitwidths"]}
    worker.export(whole, "native", str(tmp_path / "out"))
    ids = worker.built.state["splits"]["report"][:2]
    model = autocomp.load(tmp_path / "out")
    assert torch.equal(outputs(model, ids)[0], outputs(worker.built.model, ids)[0])
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight, "tied again"


def test_the_packed_tensors_are_those_of_the_search(make_worker: MakeWorker, tmp_path: Path) -> None:
    worker = make_worker("llama", options=LABELS)
    candidate = mixed(worker)
    worker.export(candidate.to_json(), "native", str(tmp_path / "out"))
    envelope = json.loads((tmp_path / "out" / "autocomp.json").read_text())
    assert Candidate.of(envelope["candidate"]) == candidate
    swapper = WeightSwapper.of(worker.built)
    stored = load_file(tmp_path / "out" / "autocomp-0001.safetensors")
    for path, entry in envelope["modules"].items():
        state = swapper.quantized(path, entry["scheme"], "rtn").to_state()
        for name, tensor in state.items():
            assert torch.equal(stored[f"packed/{path}/{name}"], tensor)


def test_a_tokenizer_comes_along(make_worker: MakeWorker, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    worker = make_worker("llama")
    worker.export(mixed(worker).to_json(), "native", str(tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("green ships")["input_ids"]) == "green ships"


# -- folders that are not what they should be --------------------------------------------------


@pytest.fixture
def exported(make_worker: MakeWorker, tmp_path: Path) -> Path:
    worker = make_worker("llama")
    worker.export(mixed(worker).to_json(), "native", str(tmp_path / "out"))
    return tmp_path / "out"


def change_envelope(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    envelope = json.loads((folder / "autocomp.json").read_text())
    change(envelope)
    (folder / "autocomp.json").write_text(json.dumps(envelope))


def test_a_newer_format_asks_for_an_upgrade(exported: Path) -> None:
    change_envelope(exported, lambda e: e.update(version=VERSION + 1))
    with pytest.raises(ExportError, match=r"format version 3; this autocomp .* reads up to 2: upgrade it"):
        load_native(exported)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no envelope": (lambda f: (f / "autocomp.json").unlink(), "has no autocomp.json"),
    "half an envelope": (lambda f: os.truncate(f / "autocomp.json", 100), "can't read"),
    "another file": (lambda f: (f / "autocomp.json").write_text("[1]"), "not an autocomp export"),
    "an envelope without tensors": (lambda f: change_envelope(f, lambda e: e.pop("files")), "lacks .'files'"),
    "a version in words": (lambda f: change_envelope(f, lambda e: e.update(version="one")), "damaged"),
    "another scheme": (
        lambda f: change_envelope(f, lambda e: e["modules"][next(iter(e["modules"]))].update(scheme="w6")),
        "don't fit together",
    ),
    "an unknown module": (
        lambda f: change_envelope(
            f, lambda e: e["modules"].update(nowhere=next(iter(e["modules"].values())))
        ),
        "don't fit together",
    ),
    "no weights": (lambda f: (f / "autocomp-0001.safetensors").unlink(), "can't read the weights"),
    "half the weights": (
        lambda f: os.truncate(f / "autocomp-0001.safetensors", 5000),
        "can't read the weights",
    ),
    "a tensor less": (lambda f: drop(f, "dense/model.norm.weight"), "lacks the tensors"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "can't read the configuration"),
    "half a configuration": (lambda f: os.truncate(f / "config.json", 40), "can't read the configuration"),
}


def drop(folder: Path, name: str) -> None:
    file = folder / "autocomp-0001.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    change_envelope(folder, lambda e: e["files"].pop(name))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_named_with_the_reason(exported: Path, damage: str) -> None:
    do, message = DAMAGE[damage]
    do(exported)
    with pytest.raises(ExportError, match=message) as caught:
        autocomp.load(exported)
    assert "out" in str(caught.value)


def test_other_folders_are_no_exports(tmp_path: Path, make_job: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ExportError, match="there is no folder"):
        autocomp.load(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="no native export"):
        autocomp.load(make_job("llama")["workload"]["model"])


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocomp.exporters.base.SHARD_BYTES", 1000)
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(6)} | {"large": torch.zeros(600)}
    files = save_sharded(tensors, tmp_path, "model")
    assert len(set(files.values())) == 4
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / files[name])[name], tensor)
    for file in set(files.values()) - {files["large"]}:
        assert sum(t.nbytes for t in load_file(tmp_path / file).values()) <= 1000


def test_choices_of_other_spaces_are_refused(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pruning:
        name = "pruning"

    worker = make_worker("llama")
    monkeypatch.setattr(worker, "spaces", [*worker.spaces, Pruning()])
    (reason,) = NativeExporter().supports(worker, mixed(make_worker("llama")))
    assert "pruning" in reason
