from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autocomp.errors import JobError
from autocomp.testing.models import tiny_network
from autocomp.trial import Fidelity
from autocomp.workloads import checkpoint
from autocomp.workloads.causal_lm import CausalLM
from autocomp.workloads.checkpoint import Source, fingerprint, load_model, load_tokenizer, locate, save_assets

Folder = Callable[[str], Path]


def test_locate(tiny: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(tiny("llama"))) == Source(tiny("llama").resolve())
    monkeypatch.setenv("HOME", str(tiny("llama").parent))
    assert locate("~/llama") == Source(tiny("llama").resolve())
    (tmp_path / "model.gguf").touch()
    expected = Source(tmp_path.resolve(), "model.gguf")
    assert locate(str(tmp_path)) == expected == locate(str(tmp_path / "model.gguf"))


def test_locate_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"hf download org/name --local-dir \./name.*model: \./name"):
        locate("org/name")
    with pytest.raises(JobError, match="check the path"):
        locate(str(tmp_path / "nowhere"))
    with pytest.raises(JobError, match="it has neither"):
        locate(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(JobError, match=r"2 \.gguf files \(a\.gguf, b\.gguf\)"):
        locate(str(tmp_path))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(JobError, match=r"no \.gguf"):
        locate(str(tmp_path / "weights.bin"))


def test_dtypes(tiny: Folder) -> None:
    source = locate(str(tiny("llama")))
    assert load_model(source, "auto").dtype == torch.float32
    model = load_model(source, "bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_loading_is_silent(tiny: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    source = locate(str(tiny("gpt2")))
    load_model(source, "auto")
    load_tokenizer(source)
    assert capfd.readouterr() == ("", "")


def test_damaged_folders(tiny: Folder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny("llama"), tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JobError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        load_model(locate(str(folder)), "auto")
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(JobError, match="can't be loaded as a causal language model"):
        load_model(locate(str(folder)), "auto")
    (folder / "config.json").write_text(
        '{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}'
    )
    with pytest.raises(JobError, match=r"already quantized \(awq\); give the original"):
        load_model(locate(str(folder)), "auto")
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(JobError, match="can't be loaded"):
        load_model(locate(str(folder)), "auto")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(JobError, match="no usable tokenizer"):
        load_tokenizer(locate(str(folder)))
    (folder / "broken.gguf").write_bytes(b"GGUF garbage")
    with pytest.raises(JobError, match=r"broken\.gguf can't be loaded"):
        load_model(locate(str(folder / "broken.gguf")), "auto")


def test_fingerprint_is_about_the_weights_alone(tiny: Folder, tmp_path: Path) -> None:
    here = load_model(locate(str(tiny("llama-tied"))), "auto")
    there = load_model(locate(str(shutil.copytree(tiny("llama-tied"), tmp_path / "elsewhere"))), "auto")
    first = fingerprint(here)
    assert len(first) == 64 and fingerprint(there) == first
    there.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    assert fingerprint(there) != first
    assert fingerprint(here.to(torch.bfloat16)) != first
    # Same weights, but the model divides its logits.
    assert fingerprint(tiny_network("llama")) != fingerprint(tiny_network("granite"))


def test_save_writes_everything_but_the_weights(tiny: Folder, tmp_path: Path) -> None:
    source = locate(str(tiny("qwen3")))
    model, tokenizer = load_model(source, "bfloat16"), load_tokenizer(source)
    folder = tmp_path / "deep" / "out"
    save_assets(model, tokenizer, source, folder)
    names = {f.name for f in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any(n.endswith((".safetensors", ".bin")) for n in names)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["dtype"] == "bfloat16"
    assert str(source.folder) not in (folder / "config.json").read_text()
    assert load_tokenizer(Source(folder))("text").input_ids == tokenizer("text").input_ids


def test_quiet_gives_everything_back() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), checkpoint.quiet():
        assert not logging.is_progress_bar_enabled()
        raise KeyError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.slow
@pytest.mark.skipif(
    "AUTOCOMP_SMOLLM2" not in os.environ,
    reason="set AUTOCOMP_SMOLLM2 to a folder with the SmolLM2-135M-Instruct GGUF file",
)
def test_a_real_gguf_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path / "cache"))
    scenario = {"prompt_tokens": 32, "context_tokens": 32, "decode_tokens": 2, "repeats": 2}
    config = {"model": os.environ["AUTOCOMP_SMOLLM2"], "scenario": scenario}
    work = CausalLM(CausalLM.Config.model_validate(config))
    built = work.load("cpu")
    assert built.model.dtype == torch.bfloat16
    start = time.perf_counter()
    assert fingerprint(built.model) == built.site.fingerprint
    assert time.perf_counter() - start < 2.0
    metrics, _ = work.score(built, Fidelity(sequences=2))
    assert metrics["kl"].value == pytest.approx(0.0, abs=1e-5) and 5 < metrics["ppl"].value < 60
    assert work.time(built)[0]["decode_ms"].value > 0
    start = time.perf_counter()
    assert work.load("cpu").site == built.site  # from the converted copy
    assert time.perf_counter() - start < 10.0
    work.save(built, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in saved and saved["architectures"] == ["LlamaForCausalLM"]
    assert capfd.readouterr() == ("", "")
