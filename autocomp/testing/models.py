"""Tiny random models with a byte-level tokenizer, saved as ordinary Hugging Face folders.

Tests of spaces, workloads and exporters need a real checkpoint of each architecture in under a second and
without a download: two layers, width 64, random weights whose logits are spread enough for KL and top-1
agreement to mean something.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 300
END = "<|endoftext|>"
PAD = "<|pad|>"

# transformers' names of the architecture (``model_type``) and what differs from ``_COMMON``.
_LLAMA_LIKE: dict[str, Any] = {
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
_KINDS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_LLAMA_LIKE},
    "llama-tied": {**_LLAMA_LIKE, "tie_word_embeddings": True},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 16, "tie_word_embeddings": True},
    "gpt2": {"n_inner": 128, "tie_word_embeddings": True},
    "gpt_neox": {"intermediate_size": 128, "use_parallel_residual": True},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {**_LLAMA_LIKE, "logits_scaling": 4.0},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 16, "final_logit_softcapping": 5.0},
}
KINDS = tuple(_KINDS)


def tiny_config(kind: str, *, layers: int = 2, hidden: int = 64, context: int = 512) -> PretrainedConfig:
    """Configuration of a tiny model of ``kind`` (one of ``KINDS``; ``*-tied`` shares head and embedding).

    Raises:
        ValueError: an unknown kind.
    """
    from transformers import AutoConfig

    if kind not in _KINDS:
        raise ValueError(f"unknown tiny model {kind!r}; known: {', '.join(KINDS)}")
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 257,
    }
    return AutoConfig.for_model(kind.removesuffix("-tied"), **{**common, **_KINDS[kind]})


def tiny_network(kind: str, *, seed: int = 0, dtype: str = "float32", **sizes: int) -> PreTrainedModel:
    """A tiny random model in evaluation mode.

    Matrices are drawn with standard deviation ``1.5 / sqrt(input width)`` (the usual 0.02 leaves every
    logit near zero at this width, and every compression harmless). Same kind and seed, same weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **sizes))
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return model.to(getattr(torch, dtype)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without merges: one token a byte (ids 0 to 255), then two specials."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([END, PAD])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=END, eos_token=END, pad_token=PAD)


def tiny_model(kind: str, folder: Path, *, seed: int = 0, dtype: str = "float32", **sizes: int) -> Path:
    """Save a tiny model of ``kind`` and its tokenizer to ``folder`` and return the folder.

    Args:
        kind: one of ``KINDS``.
        folder: created when missing.
        seed: of the random weights.
        dtype: storage type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        sizes: ``layers`` (2), ``hidden`` (64), ``context`` (512 tokens).
    """
    from autocomp.workloads.checkpoint import quiet

    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        tiny_network(kind, seed=seed, dtype=dtype, **sizes).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder
