"""From what single documents and prompts gave to the metrics of ``long_context``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from autocomp.trial import Estimate
from autocomp.workloads.teacher import estimate, summarize


@dataclass(frozen=True)
class PromptScore:
    """What a model made of one retrieval prompt.

    Attributes:
        length: tokens of the prompt.
        kind: ``key_value`` or ``passkey``.
        kl: KL(uncompressed || current), mean over the tokens of the answers, in nats.
        right: whether each answer was given.
        depths: where the answers' facts stand, as shares of the prompt.
    """

    length: int
    kind: str
    kl: float
    right: tuple[bool, ...]
    depths: tuple[float, ...]


def gather(
    documents: Mapping[int, Tensor], prompts: Sequence[PromptScore], about: str
) -> dict[str, Estimate]:
    """Metrics over all lengths and, with ``_{length}`` in their names, at each.

    ``ppl``, ``top1`` and ``text_kl`` are of documents, ``answer_kl`` of all prompts, ``retrieval`` and
    ``passkey`` are the shares of right answers. ``kl`` is what the search minimizes: see ``about``. Metrics
    of prompts are there if there are prompts, and ``text_kl`` with them.

    Means over lengths are taken a document at a time, and standard errors are over documents: one document's
    lengths are not independent. Prompts are; standard errors are over prompts.

    Args:
        documents: length -> float64 ``[n, 3]`` as from ``teacher.sequence_scores``, same documents in rows.
        prompts: of all lengths.
        about: what ``kl`` is: ``text``, ``retrieval`` or (the mean of both) ``mixed``.
    """
    found = _metrics(torch.stack(list(documents.values())).mean(0), prompts, about)
    for length, scores in documents.items():
        here = _metrics(scores, [p for p in prompts if p.length == length], about)
        found |= {f"{name}_{length}": value for name, value in here.items()}
    return found


def _metrics(scores: Tensor, prompts: Sequence[PromptScore], about: str) -> dict[str, Estimate]:
    found = summarize(scores)
    if not prompts:
        return found
    found["text_kl"] = found["kl"]
    found["answer_kl"] = _mean([p.kl for p in prompts])
    for name, kind in (("retrieval", "key_value"), ("passkey", "passkey")):
        shares = [fmean(p.right) for p in prompts if p.kind == kind]
        if shares:
            found[name] = _mean(shares)
    if about == "retrieval":
        found["kl"] = found["answer_kl"]
    elif about == "mixed":
        found["kl"] = _middle(found["text_kl"], found["answer_kl"])
    return found


def _mean(values: Sequence[float]) -> Estimate:
    return estimate(torch.tensor(values, dtype=torch.float64))


def _middle(a: Estimate, b: Estimate) -> Estimate:
    """Mean of two independent estimates."""
    return Estimate((a.value + b.value) / 2, math.hypot(a.stderr, b.stderr) / 2, min(a.n, b.n))
