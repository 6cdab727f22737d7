"""The compressed-tensors format, read back by the software it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoModelForCausalLM

from autocomp.errors import CapabilityError, ExportError
from autocomp.exporters.compressed_tensors import CompressedTensorsExporter, quantization_config
from autocomp.quantize.scheme import Scheme
from autocomp.space import Candidate
from autocomp.worker import ModelWorker
from autocomp.workloads.checkpoint import quiet

MakeWorker = Callable[..., ModelWorker]


def mixed(worker: ModelWorker) -> Candidate:
    cycle = enumerate(worker.decisions["bitwidths"])
    return Candidate.of({d.name: d.options[i % len(d.options)] for i, d in cycle})


def exported(worker: ModelWorker, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    worker.export(mixed(worker).to_json(), "compressed-tensors", str(folder))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / file)
    assert set(index["weight_map"]) == set(tensors)
    return json.loads((folder / "config.json").read_text()), tensors


@torch.inference_mode()
def scoring_logits(worker: ModelWorker, candidate: Candidate) -> torch.Tensor:
    worker.apply(candidate, serving=False)
    logits: torch.Tensor = worker.built.model(input_ids=worker.built.state["splits"]["report"][:2]).logits
    worker.restore()
    return logits


SYMMETRIC = ["w4g32", "w8", "w8g32", "w16"]
ASYMMETRIC = ["w4g32a", "w8a", "w8g32a", "w4g32", "w16"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("options", [SYMMETRIC, ["w3g32", "w2g32", "w6", "w16"]])
def test_transformers_computes_what_was_scored(
    make_worker: MakeWorker, kind: str, dtype: str, options: list[str], tmp_path: Path
) -> None:
    worker = make_worker(kind, dtype, options=options)
    exported(worker, tmp_path / "out")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        found = model(input_ids=worker.built.state["splits"]["report"][:2]).logits
    wanted = scoring_logits(worker, mixed(worker))
    # The same weights to the bit: an integer code of 8 bits times a 16-bit scale is exact in float32, and
    # in bfloat16 it is rounded once by both. What may differ is the order of summation in the product.
    bound = 1e-5 if dtype == "float32" else 2**-7
    assert model.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("options", [SYMMETRIC, ASYMMETRIC, ["w3g32a", "w5g32", "w2g16a"]])
def test_every_module_decompresses_to_the_searched_weight(
    make_worker: MakeWorker, kind: str, dtype: str, options: list[str], tmp_path: Path
) -> None:
    """Through the package's own decompression, with each module's scheme as the config names it."""
    worker = make_worker(kind, dtype, options=options)
    config, tensors = exported(worker, tmp_path / "out")
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    worker.apply(mixed(worker), serving=False)
    seen = 0
    for group in parsed.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(group.format)
        for path in group.targets:
            state = {n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")}
            state["weight_scale"] = state["weight_scale"].to(getattr(torch, dtype))  # as a loader casts it
            weight = compressor.decompress(state, group)["weight"]
            assert torch.equal(weight, worker.built.model.get_submodule(path).weight), path
            seen += 1
    worker.restore()
    assert seen >= sum(label != "w16" for label in mixed(worker).values.values()) > 0


def test_the_config_says_what_loaders_look_for(make_worker: MakeWorker, tmp_path: Path) -> None:
    worker = make_worker("llama", options=ASYMMETRIC)
    config, tensors = exported(worker, tmp_path / "out")
    found = config["quantization_config"]
    assert found["quant_method"] == "compressed-tensors" and found["format"] == "pack-quantized"
    assert found["quantization_status"] == "compressed" and config["architectures"] == ["LlamaForCausalLM"]
    linears = {p.path for p in worker.built.site.parts if p.kind == "linear"}
    targets = [t for g in found["config_groups"].values() for t in g["targets"]]
    assert len(set(targets)) == len(targets) and set(targets) | set(found["ignore"]) == linears
    assert not set(targets) & set(found["ignore"]) and "lm_head" in found["ignore"]
    for group in found["config_groups"].values():
        weights = group["weights"]
        strategy = "group" if weights.get("group_size") else "channel"
        assert (weights["type"], weights["strategy"]) == ("int", strategy)
        for path in group["targets"]:
            rows, columns = shape = worker.built.site.part(path).shape
            words = -(-columns * weights["num_bits"] // 32)
            assert tensors[f"{path}.weight_packed"].shape == (rows, words)
            assert tensors[f"{path}.weight_packed"].dtype == torch.int32
            assert tensors[f"{path}.weight_shape"].tolist() == list(shape)
            assert (f"{path}.weight_zero_point" in tensors) == (not weights["symmetric"])
            assert f"{path}.weight" not in tensors
    for path in found["ignore"]:
        assert f"{path}.weight" in tensors
    record = json.loads((tmp_path / "out" / "autocomp_candidate.json").read_text())
    assert Candidate.of(record["candidate"]) == mixed(worker)


def test_a_tied_head_stays_tied(make_worker: MakeWorker, tmp_path: Path) -> None:
    worker = make_worker("llama-tied", options=["w8"])
    config, tensors = exported(worker, tmp_path / "out")
    assert config["tie_word_embeddings"] and "lm_head.weight" not in tensors
    assert config["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    ("kind", "bitwidths", "reason"),
    [
        ("llama", {"options": ["w4g32o0.5"]}, "no 16-bit outliers"),
        ("llama-tied", {"options": ["w8"], "embeddings": ["w8"]}, "no packed embeddings"),
        ("gpt2", {"options": ["w8"]}, "a Conv1D can't be loaded"),
        ("llama", {"options": ["w4g24"]}, "group 24 does not divide 64 inputs"),
        ("llama", {"options": ["w4g32", "w8"], "granularity": "linear"}, "fused groups mix formats"),
        ("llama", {"options": ["w8", "w16"], "granularity": "linear"}, "fused groups mix formats"),
    ],
)
def test_what_the_format_cannot_hold_is_said_before_measuring(
    make_worker: MakeWorker, kind: str, bitwidths: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    worker = make_worker(kind, **bitwidths)
    reasons = CompressedTensorsExporter().supports(worker, mixed(worker))
    assert any(reason in r for r in reasons) and len(reasons) <= 5
    with pytest.raises(ExportError, match=reason):
        worker.export(mixed(worker).to_json(), "compressed-tensors", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_supported_candidates_have_no_reasons(make_worker: MakeWorker) -> None:
    for options in (SYMMETRIC, ASYMMETRIC):
        worker = make_worker("qwen3", options=options)
        assert CompressedTensorsExporter().supports(worker, mixed(worker)) == []


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "compressed_tensors.quantization", None)
    with pytest.raises(CapabilityError, match=r"pip install 'autocomp\[export\]'"):
        quantization_config({"a": Scheme(8)}, ["a"])
