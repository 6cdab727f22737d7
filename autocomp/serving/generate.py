"""A prompt in, text and its speed out: from an export or from any model folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autocomp.attention.cache import new_cache
from autocomp.errors import ExportError
from autocomp.exporters.base import ENVELOPE
from autocomp.exporters.native import load_native
from autocomp.serving.decoder import LeanDecoder, choose_token
from autocomp.serving.record import Unsupported
from autocomp.workloads import checkpoint
from autocomp.workloads.serving import cpu_threads


@dataclass(frozen=True)
class Generated:
    """A continuation.

    Attributes:
        text: what the model wrote.
        runtime: ``lean`` or ``eager``; ``reason``: why it isn't lean.
        prompt_tokens, new_tokens: token counts.
        prefill_ms: the whole prompt. decode_ms: one new token, the mean over all but the first (which the
            prompt's pass gives); 0 when there was only one.
    """

    text: str
    runtime: str
    reason: str
    prompt_tokens: int
    new_tokens: int
    prefill_ms: float
    decode_ms: float


def generate_text(
    folder: str | Path, prompt: str, *, new_tokens: int = 64, chat: bool | None = None, threads: int = 0,
    temperature: float = 0.0, seed: int = 0,
) -> Generated:  # fmt: skip
    """Continue ``prompt`` with the model in ``folder``: a native export, or a plain Hugging Face folder.

    Args:
        new_tokens: most tokens to write; an end token stops earlier.
        chat: put the prompt into the tokenizer's chat template; by default when it has one.
        threads: CPU threads; 0 for torch's number.
        temperature: 0 for the likeliest token each time.

    Raises:
        ExportError: the folder doesn't exist, or is a damaged export.
        JobError: it holds no model that can be loaded.
        ValueError: ``new_tokens`` below 1.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be 1 or more; got {new_tokens}")
    model, tokenizer = _load(Path(folder))
    ids = _encode(tokenizer, prompt, chat)
    stop = _end_tokens(model, tokenizer)
    with cpu_threads(threads), torch.no_grad():
        runtime: _Lean | _Eager
        try:
            runtime, reason = _Lean(LeanDecoder(model, capacity=ids.shape[1] + new_tokens)), ""
        except Unsupported as error:
            runtime, reason = _Eager(model), str(error)
        started = time.perf_counter()
        logits = runtime.prefill(ids)
        prefill_ms = (time.perf_counter() - started) * 1e3
        generator = torch.Generator(device=logits.device).manual_seed(seed)
        tokens: list[int] = []
        started = time.perf_counter()
        while True:
            token = choose_token(logits, temperature, generator)
            if int(token) in stop:
                break
            tokens.append(int(token))
            if len(tokens) == new_tokens:
                break
            logits = runtime.step(token)
        steps = max(0, len(tokens) - (len(tokens) == new_tokens))
        decode_ms = (time.perf_counter() - started) * 1e3 / steps if steps else 0.0
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Generated(text, runtime.name, reason, ids.shape[1], len(tokens), prefill_ms, decode_ms)


class _Lean:
    name = "lean"

    def __init__(self, decoder: LeanDecoder) -> None:
        self.prefill, self.step = decoder.prefill, decoder.step


class _Eager:
    """The same two calls by the model's own forward."""

    name = "eager"

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None

    def prefill(self, ids: Tensor) -> Tensor:
        self._cache = new_cache(self._model)
        return self._run(ids.to(self._model.device))

    def step(self, token: Tensor) -> Tensor:
        return self._run(token.view(-1, 1))

    def _run(self, ids: Tensor) -> Tensor:
        output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1].float()
        return logits


def _load(folder: Path) -> tuple[Any, Any]:
    if not folder.is_dir():
        raise ExportError(f"there is no folder {str(folder)!r}")
    source = checkpoint.locate(str(folder))
    if (folder / ENVELOPE).is_file():
        return load_native(folder), checkpoint.load_tokenizer(source)
    return checkpoint.load_model(source, "auto"), checkpoint.load_tokenizer(source)


def _encode(tokenizer: Any, prompt: str, chat: bool | None) -> Tensor:
    ids: Tensor
    if chat if chat is not None else bool(getattr(tokenizer, "chat_template", None)):
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty")
    return ids


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """End tokens of the generation configuration and of the tokenizer."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return {int(t) for t in [*listed, tokenizer.eos_token_id] if t is not None}
