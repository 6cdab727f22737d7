"""What profiles of attention look at in the workload ``long_context``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autocomp.attention.cache import new_cache
from autocomp.space import content_hash
from autocomp.workloads.base import Built


def calibration_rows(built: Built, on: str, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences int64 ``[n, length]`` and bool ``[n, length]``: positions whose next-token loss counts.

    Args:
        built: with the splits and prompts of ``LongContext``.
        on: ``LongConfig.calibrate_on``; of ``mixed``, documents come before prompts.
        length: one of ``LongConfig.lengths``.
        seed: of the continuations.

    Raises:
        RuntimeError: the model has to continue texts and is compressed.
    """
    found = []
    if on != "retrieval":
        ids, begin = built.state["splits"][f"calibration@{length}"], 0
        if on == "continuation":
            half = length // 2
            ids = _continued(built, ids[:, :half], length, seed)
            begin = half - 1  # the last position of the text predicts the first continued token
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, begin:-1] = True
        found.append((ids, mask))
    if on in ("retrieval", "mixed"):
        name = f"calibration@{length}/prompts"
        ids = built.state["splits"][name]
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in zip(mask, built.state["prompts"][name]):
            row[torch.from_numpy(prompt.positions).to(row.device)] = True
        found.append((ids, mask))
    return torch.cat([ids for ids, _ in found]), torch.cat([mask for _, mask in found])


def _continued(built: Built, begin: Tensor, length: int, seed: int) -> Tensor:
    """``begin`` ``[n, L]`` with the uncompressed model's own continuation, sampled: ``[n, length]``."""
    if not built.pristine:
        raise RuntimeError(
            "the uncompressed model has to continue the calibration texts and is compressed: restore the "
            "originals first"
        )
    generator = torch.Generator(begin.device).manual_seed(int(content_hash([seed, length]), 16) % 2**63)
    model: Any = built.model
    tokens, cache, last = [begin], new_cache(model), begin
    with torch.inference_mode():
        for _ in range(length - begin.shape[1]):
            output = model(input_ids=last, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chances = output.logits[:, -1].float().softmax(-1)
            last = torch.multinomial(chances, 1, generator=generator)
            tokens.append(last)
    return torch.cat(tokens, 1).clone()
