from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from autocomp.errors import JobError
from autocomp.testing.models import tiny_network, tiny_tokenizer
from autocomp.workloads import _gguf
from autocomp.workloads.checkpoint import Source, fingerprint, load_model, load_tokenizer

Folder = Callable[[str], Path]

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.layers": "blk",
}  # fmt: skip


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp stores the rows of q and k for rotary pairs (0, 1), (2, 3), ..."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A tiny Llama as a GGUF file, attention and MLP weights in Q8_0."""
    import gguf

    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(300)
    vocabulary = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    tokens = [t for t, _ in vocabulary] + ["ab"] + [f"[unused{i}]" for i in range(299 - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * (len(tokens) - 256))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    for name, tensor in tiny_network("llama").state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            tensor = interleave(tensor, 4 if "q_proj" in name else 2)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if name.startswith("blk") and tensor.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Source(file.parent, file.name)


def test_weights_are_unpacked_and_can_be_saved(source: Source, tmp_path: Path) -> None:
    model, expected = load_model(source, "float32"), tiny_network("llama")
    assert {type(m).__name__ for m in model.modules()} == {type(m).__name__ for m in expected.modules()}
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        ours, theirs = model(tokens).logits, expected(tokens).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 0.03  # Q8_0 rounds to 8 bits
    model.save_pretrained(tmp_path)
    assert load_model(source, "auto").dtype == torch.bfloat16


def test_the_copy_is_made_once_and_is_the_same(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path))
    copy = _gguf.convert(source, "auto")
    assert copy.gguf == "" and copy.folder.parent == tmp_path / "gguf"
    assert fingerprint(load_model(copy, "auto")) == fingerprint(load_model(source, "auto"))
    text = "some text, né"
    assert load_tokenizer(copy)(text).input_ids == load_tokenizer(source)(text).input_ids
    assert [f.name for f in copy.folder.parent.iterdir()] == [copy.folder.name]  # no scratch folder is left

    def never(*args: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(_gguf, "load_model", never)
    assert _gguf.convert(source, "bfloat16") == copy


def test_changed_content_or_type_is_another_copy(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path))
    changed = tmp_path / "other.gguf"
    original = source.folder / source.gguf
    changed.write_bytes(original.read_bytes()[:-1] + b"\x55")
    folders = {
        _gguf.converted_folder(original, "bfloat16"),
        _gguf.converted_folder(original, "float32"),
        _gguf.converted_folder(changed, "bfloat16"),
    }
    assert len(folders) == 3


def test_without_a_cache_the_file_itself_is_read(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path / "file"))  # no folder can be made below a file
    with caplog.at_level(logging.WARNING):
        assert _gguf.convert(source, "auto") == source
    assert "each start will convert it" in caplog.text


def test_two_workers_convert_at_once(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path))
    folder = _gguf.converted_folder(source.folder / source.gguf, "bfloat16")
    load = load_tokenizer

    def meanwhile(found: Source) -> object:
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")  # the other worker's
        return load(found)

    monkeypatch.setattr(_gguf, "load_tokenizer", meanwhile)
    assert _gguf.convert(source, "auto") == Source(folder)
    assert (folder / "config.json").read_text() == "{}" and len(list(folder.parent.iterdir())) == 1


def test_garbage_is_a_job_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path))
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(JobError, match=r"bad\.gguf can't be loaded"):
        _gguf.convert(Source(tmp_path, "bad.gguf"), "auto")
