"""Outputs of the uncompressed model, kept for comparison, and the quality metrics computed from them.

KL divergence to the uncompressed model needs its full next-token distribution at every position: for a
vocabulary of 49 152 that is 200 kB a token in float32. Where this fits the memory bound it is kept;
otherwise only what enters the output head is kept (2 kB a token) and the distribution is recomputed with
the original head weight.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autocomp.errors import JobError
from autocomp.trial import Estimate

#: float32 working memory of one softmax chunk, and of the logits of one batch (bytes).
CHUNK_BYTES = 64 * 10**6
BATCH_BYTES = 256 * 10**6

#: Largest deviation of recomputed logits, as a share of the largest logit, by bits of the type's mantissa.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Head:
    """The original output projection and what the model does to its result.

    Attributes:
        weight: ``[vocabulary, width]``, an alias of the parameter's first storage: it survives a swap of the
            module, of the parameter or of ``parameter.data``.
        bias: ``[vocabulary]`` or ``None``.
        finish: logits as computed by the projection -> logits as the model returns them.
        sample: a copy of some rows, to notice that somebody wrote into ``weight``.
    """

    weight: Tensor
    bias: Tensor | None
    finish: Callable[[Tensor], Tensor]
    sample: Tensor

    @classmethod
    def of(cls, module: Any, finish: Callable[[Tensor], Tensor]) -> Head:
        bias = getattr(module, "bias", None)
        weight = module.weight.detach()
        return cls(weight, None if bias is None else bias.detach(), finish, _some_rows(weight).clone())

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., width]`` -> ``[..., vocabulary]`` in the model's type."""
        return self.finish(F.linear(hidden, self.weight, self.bias))

    def check(self) -> None:
        """Raises ``RuntimeError`` when the original weight was overwritten in place."""
        if not torch.equal(_some_rows(self.weight), self.sample):
            raise RuntimeError(
                "the original weight of the output head was overwritten in place; replace the parameter or "
                "the module instead: the teacher's distribution is recomputed from it"
            )


def _some_rows(weight: Tensor) -> Tensor:
    return weight[:: max(1, weight.shape[0] // 64)]


def finishing_steps(config: Any) -> list[Callable[[Tensor], Tensor]]:
    """What models are known to do after the head, as far as ``config`` asks for it: scaling (Cohere:
    ``logit_scale``; Granite divides by ``logits_scaling``, HyperCLOVA X multiplies) and soft-capping
    (Gemma: ``c tanh(x / c)``). The caller keeps the one that reproduces the model's own logits."""
    steps: list[Callable[[Tensor], Tensor]] = [lambda x: x]
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale:
            steps += [lambda x, s=scale: x * s, lambda x, s=scale: x / s]  # type: ignore[misc]
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        steps.append(lambda x: torch.tanh(x / cap) * cap)
    return steps


class Teacher:
    """Reference outputs for one split, filled from the front and never changed.

    Modes, fastest first among those that fit ``limit_bytes``: ``log_probs`` (float32), ``hidden`` (input of
    the head; needs a head whose result can be reproduced), ``half`` (log-probabilities in float16).
    """

    def __init__(self, mode: str, head: Head | None) -> None:
        self.mode = mode
        self.head = head
        self.rows: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, logits: Tensor, hidden: Tensor | None) -> None:
        """Keep the outputs for some more sequences: ``[b, L, vocabulary]`` and ``[b, L, width]``."""
        if self.mode == "hidden" and hidden is not None:
            self.rows += hidden.clone().unbind(0)
            return
        dtype = torch.float32 if self.mode == "log_probs" else torch.float16
        for row in logits:
            self.rows.append(torch.cat([F.log_softmax(c.float(), -1).to(dtype) for c in _chunks(row)]))

    def log_probs(self, index: int, tokens: slice) -> Tensor:
        """float32 ``[tokens, vocabulary]`` of sequence ``index``."""
        kept = self.rows[index][tokens]
        if self.mode == "log_probs":
            return kept
        # Rounded log-probabilities are normalized again: a KL to them can't be negative.
        logits = self.head.logits(kept) if self.mode == "hidden" and self.head else kept
        return F.log_softmax(logits.float(), -1)


def choose_mode(tokens: int, width: int, vocabulary: int, limit_bytes: int, head: Head | None) -> str:
    """The mode for ``tokens`` tokens (all splits together); see ``Teacher``.

    Raises:
        JobError: nothing fits the bound.
    """
    if 4 * tokens * vocabulary <= limit_bytes:
        return "log_probs"
    if head is not None and head.weight.element_size() * tokens * width <= limit_bytes:
        return "hidden"
    if 2 * tokens * vocabulary <= limit_bytes:
        return "half"
    per_token = head.weight.element_size() * width if head is not None else 2 * vocabulary
    raise JobError(
        f"the uncompressed model's outputs for {tokens} tokens take {per_token * tokens / 1e6:.3g} MB, more "
        f"than data.teacher_mb = {limit_bytes / 1e6:.3g}: raise it, or lower the number of sequences"
    )


def match_head(model: Any, hidden: Tensor, logits: Tensor) -> Head | None:
    """The head with the finishing step that turns ``hidden`` into the model's own ``logits``, or ``None``."""
    module = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = float(logits.abs().max())
    best: tuple[float, Head | None] = (math.inf, None)
    for finish in finishing_steps(config):
        head = Head.of(module, finish)
        error = float((head.logits(hidden) - logits).abs().max())
        best = min(best, (error, head), key=lambda pair: pair[0])
    return best[1] if best[0] <= _TOLERANCE.get(logits.dtype, 1e-4) * scale else None


def forward(model: Any, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
    """Logits ``[b, L, vocabulary]`` of ``tokens`` ``[b, L]``, no cache.

    ``keep`` (int64 ``[K]``): positions whose logits are wanted; the others are not computed where the model
    can skip them. The result is then ``[b, K, vocabulary]``.
    """
    skips = keep is not None and "logits_to_keep" in inspect.signature(model.forward).parameters
    with torch.inference_mode():
        some = {"logits_to_keep": keep} if skips else {}
        logits: Tensor = model(input_ids=tokens, use_cache=False, **some).logits
    return logits if keep is None or skips else logits[:, keep]


def forward_with_hidden(
    model: Any, tokens: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``forward`` and what entered the output head, ``[b, L or K, width]`` (``None`` for a model without
    one)."""
    module = model.get_output_embeddings()
    seen: list[Tensor] = []
    if module is None:
        return forward(model, tokens, keep), None
    handle = module.register_forward_pre_hook(lambda _, args: seen.extend(args[:1]))
    try:
        logits = forward(model, tokens, keep)
    finally:
        handle.remove()
    # A head that is bypassed, or called in pieces, is treated like a missing one.
    whole = len(seen) == 1 and seen[0].shape[:2] == logits.shape[:2]
    return logits, seen[0] if whole else None


def batches(tokens: Tensor, vocabulary: int) -> Iterator[tuple[int, Tensor]]:
    """Consecutive rows of ``tokens`` ``[n, L]`` with their first index, as many as ``BATCH_BYTES`` of
    float32 logits allow (at least one)."""
    size = max(1, BATCH_BYTES // (4 * tokens.shape[1] * vocabulary))
    for start in range(0, len(tokens), size):
        yield start, tokens[start : start + size]


def _chunks(logits: Tensor) -> Sequence[Tensor]:
    return logits.split(max(1, CHUNK_BYTES // (4 * logits.shape[-1])))


def compare(
    model: Any, tokens: Tensor, teacher: Teacher, vocabulary: int, keep: Tensor | None = None
) -> dict[str, Estimate]:
    """``kl`` (nats a token), ``ppl`` and ``top1`` of ``model`` as it is on ``tokens`` ``[n, L]``; see
    ``sequence_scores`` and ``summarize``."""
    return summarize(sequence_scores(model, tokens, teacher, vocabulary, keep))


def sequence_scores(
    model: Any, tokens: Tensor, teacher: Teacher, vocabulary: int, keep: Tensor | None = None
) -> Tensor:
    """What ``model`` as it is makes of each sequence of ``tokens`` ``[n, L]``: float64 ``[n, 3]``.

    KL(uncompressed || current), the negative log-likelihood of the next token, and the share of positions
    where both have the same most likely token: means over all positions, or over ``keep`` (int64 ``[K]``,
    ascending), for which the teacher's outputs must have been recorded.

    Raises:
        FloatingPointError: the model gives NaN or infinity.
    """
    if teacher.head is not None:
        teacher.head.check()
    rows = []
    with torch.inference_mode():
        for start, batch in batches(tokens, vocabulary):
            logits = forward(model, batch, keep)
            rows += [score_sequence(logits[i], batch[i], teacher, start + i, keep) for i in range(len(batch))]
    return torch.tensor(rows, dtype=torch.float64)


def summarize(scores: Tensor) -> dict[str, Estimate]:
    """``kl``, ``ppl`` and ``top1`` from ``sequence_scores`` ``[n, 3]``; ``ppl`` is the exponential of the
    mean negative log-likelihood.

    Standard errors are over sequences (tokens of one sequence are not independent); that of ``ppl`` by the
    delta method. A single sequence has standard error 0.
    """
    kl, nll, top1 = scores.unbind(1)
    likelihood = estimate(nll)
    perplexity = math.exp(min(likelihood.value, 700.0))  # beyond that float64 overflows
    return {
        "kl": estimate(kl),
        "ppl": Estimate(perplexity, perplexity * likelihood.stderr, likelihood.n),
        "top1": estimate(top1),
    }


def score_sequence(
    logits: Tensor, tokens: Tensor, teacher: Teacher, index: int, keep: Tensor | None = None
) -> tuple[float, float, float]:
    """One row of ``sequence_scores`` from ``logits`` ``[L or K, vocabulary]`` of ``tokens`` ``[L]``, which is
    sequence ``index`` of the teacher. Raises ``FloatingPointError``."""
    positions = torch.arange(len(tokens), device=tokens.device) if keep is None else keep
    following = tokens[positions[positions < len(tokens) - 1] + 1]
    kl = torch.zeros((), dtype=torch.float64, device=logits.device)
    nll, same = kl.clone(), kl.clone()
    start = 0
    for chunk in _chunks(logits):
        stop = start + len(chunk)
        ours, theirs = F.log_softmax(chunk.float(), -1), teacher.log_probs(index, slice(start, stop))
        kl += _divergence(theirs, ours)
        same += (ours.argmax(-1) == theirs.argmax(-1)).sum()
        targets = following[start:stop]
        nll -= ours[: len(targets)].gather(-1, targets[:, None]).sum(dtype=torch.float64)
        start = stop
    n = len(positions)
    values = (float(kl) / n, float(nll) / max(1, len(following)), float(same) / n)
    if not all(map(math.isfinite, values)):
        bad = int((~torch.isfinite(logits)).any(-1).sum())
        raise FloatingPointError(
            f"the logits of sequence {index} hold NaN or infinity at {bad} of {n} positions "
            f"(kl {values[0]}, negative log-likelihood {values[1]})"
        )
    return values


def summed_divergence(logits: Tensor, teacher: Teacher, index: int, mask: Tensor | None = None) -> Tensor:
    """Sum over tokens of KL(uncompressed || ``logits [L, vocabulary]``) for one sequence, differentiable.

    ``mask`` (bool ``[L]``): the tokens that count.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    start = 0
    for chunk in _chunks(logits):
        stop = start + len(chunk)
        # A clone: what was recorded in inference mode can't be saved for a backward pass.
        theirs = teacher.log_probs(index, slice(start, stop)).clone()
        ours = F.log_softmax(chunk.float(), -1)
        if mask is not None:
            theirs, ours = theirs[mask[start:stop]], ours[mask[start:stop]]
        total = total + F.kl_div(ours, theirs, reduction="sum", log_target=True)
        start = stop
    return total


def _divergence(theirs: Tensor, ours: Tensor) -> Tensor:
    """Sum over rows of KL(theirs || ours), in float64; both are log-probabilities."""
    terms = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    if bool(torch.isnan(terms).any()):
        # exp(-inf) * (-inf - x) is NaN where the limit is 0: a token that the teacher rules out.
        pieces = F.kl_div(ours, theirs, reduction="none", log_target=True)
        terms = pieces.masked_fill(theirs == -math.inf, 0.0).sum(-1)
    return terms.clamp_min(0.0).sum(dtype=torch.float64)


def estimate(values: Tensor) -> Estimate:
    """Mean of ``values [n]`` and its standard error (0 for a single one)."""
    n = len(values)
    stderr = float(values.std(correction=1)) / math.sqrt(n) if n > 1 else 0.0
    return Estimate(float(values.mean()), stderr, n)
