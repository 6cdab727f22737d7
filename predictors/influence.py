"""Sensitivity of quality to what each key/value group keeps: its span rule and its bits.

An option changes the output o of the group's query heads. With the softmax renormalised exactly over what is
kept, the change do is known without the loss: the layer's attention is computed again under the option's
mask. The loss comes in by its gradient G = dLoss/do, caught in the backward pass, one layer at a time. What
token i adds to first order is ``t_i = G_i . do_i`` (summed over the group's heads and features). For a single
masked entry that is MoA's influence E = A/(1-A) * ((dA*A)1 - dA) (arXiv 2406.14909, App. E.2); for all
masked entries of a row together, with their mass m, their part s of the sum of A * dA, and the row's whole
sum T, it is (m T - s)/(1 - m).

Methods, all in nats a token:

- ``fisher``: half of the sum over blocks of 16 tokens of (sum of t_i)^2, with G of the loss on labels that
  the model draws itself: the second-order term of the KL, which may be added to the weights' ``fisher``
  costs. What neighbouring tokens add is alike, which squares of single tokens miss; with longer blocks the
  sum comes nearer to the KL, but so much noisier that plans chosen by a few sequences get worse. On
  SmolLM2-135M the costs' sum is 0.6 to 0.7 of the measured KL of plans of spans at 1024 tokens, uniform or
  not, about 1 at 2048, and 0.75 to 1 for 4-bit keys or values (8 bits: less than bfloat16's own noise).
- ``first_order``: |sum of t_i| of a sequence, with G of the loss on the text.
- ``influence``: the same for every block of 64 tokens, as MoA takes absolute values of blocks: several times
  the KL, but far less noise between sequences.
- ``attention_neighbourhood``: around a candidate, the first-order term of the KL's own gradient plus the
  Fisher term of the model as it is now.

Rules and bits are not tried together: the t of ``rule/bits`` is that of the rule (with the current bits) plus
that of the bits (with the current rule).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autocomp.errors import SpaceError
from autocomp.predictors.influence_pass import Costs, Watch, asked_layers, watching
from autocomp.predictors.sensitivity import BASE, Rows, _add, sampled_loss
from autocomp.space import Decision, Value
from autocomp.workloads.base import Built

METHODS = ("fisher", "first_order", "influence")
BLOCK = 16
"""Neighbouring tokens whose t are added before they are squared."""
MOA_BLOCK = 64

Batches = Mapping[int, tuple[Tensor, Tensor | None]]
"""Length N -> token ids int64 ``[n, N]``, and bool ``[n, N]``: positions whose next-token loss counts
(``None``: all)."""


def attention_sensitivity(
    built: Built,
    batches: Batches,
    decisions: Sequence[Decision],
    current: Mapping[str, Value],
    *,
    method: str = "fisher",
    folds: int = 2,
) -> Rows:
    """Costs of every option, in nats a token that counts, from one backward pass a sequence.

    Every sequence counts alike, however many of its tokens do. Costs of a decision over several groups are
    the sum of its groups' costs.

    Args:
        built: the model in its scoring state at ``current``.
        batches: their sequences are dealt out to the folds, of which there are as many as the rarest length
            has sequences, at most.
        decisions: options are ``Keep`` labels, sites are key/value groups (``{attention module}.kv{g}``).
        current: decision name -> option that costs are relative to; its own cost is 0.
        method: one of ``METHODS``.
        folds: groups of sequences whose spread gives the noise.

    Returns:
        One sample a fold: row ``{decision}@{N}`` for each length, row ``{decision}`` their mean. A shard that
        lacks a length (no sequences of it) gives no samples of the mean.

    Raises:
        SpaceError: an unknown method, a site that is no group, bits that differ within a layer, or a
            sequence of which no token counts.
        CapabilityError: the model's attention can't be replaced, or has a mask or soft cap of its own.
    """
    if method not in METHODS:
        raise SpaceError(f"{method!r} is no method for attention; use one of {METHODS}")

    def costs(watch: Watch, ids: Tensor, counts: Tensor, row: int, length: int) -> Costs:
        logits = built.model(input_ids=ids, use_cache=False).logits
        if method == "fisher":
            loss = sampled_loss(logits[:, counts], seed=int(ids.sum()))
            return watch.backward(loss, lambda t: curvature(t) / len(counts))
        counts = counts[counts < length - 1]
        text = torch.nn.functional.cross_entropy(
            logits[0, counts].float(), ids[0, counts + 1], reduction="sum"
        )
        size = length if method == "first_order" else MOA_BLOCK
        return watch.backward(text, lambda t: _blocks(t, size).abs().sum(-1) / max(len(counts), 1))

    return _profile(built, batches, decisions, current, costs, folds)


def attention_neighbourhood(
    built: Built,
    batches: Batches,
    decisions: Sequence[Decision],
    current: Mapping[str, Value],
    divergence: Callable[[Tensor, int, int], Tensor],
    *,
    folds: int = 2,
) -> Rows:
    """Change of the KL (nats a token that counts) when one decision leaves ``current``; may be negative.

    Args:
        built, batches, decisions, current, folds: as in ``attention_sensitivity``.
        divergence: (logits ``[1, N, V]``, N, row in that length's batch) -> KL(uncompressed || current)
            summed over the tokens that count, a scalar with gradient.

    Returns:
        As ``attention_sensitivity``, and rows ``base`` and ``base@{N}`` with the KL itself (option ``kl``).
    """

    def costs(watch: Watch, ids: Tensor, counts: Tensor, row: int, length: int) -> Costs:
        logits = built.model(input_ids=ids, use_cache=False).logits
        kl = divergence(logits, length, row)
        found = watch.backward(kl, lambda t: t.sum(-1), retain=True)
        loss = sampled_loss(logits[:, counts], seed=int(ids.sum()))
        second = watch.backward(loss, curvature)
        found = {path: (found[path] + second[path]) / len(counts) for path in found}
        return found | {BASE: kl.detach().double().reshape(1).cpu() / len(counts)}

    return _profile(built, batches, decisions, current, costs, folds)


def curvature(moved: Tensor) -> Tensor:
    """Half of the sum over blocks of ``BLOCK`` tokens of (the block's sum)^2, ``[..., N]`` -> ``[...]``."""
    return 0.5 * _blocks(moved, BLOCK).square().sum(-1)


def _blocks(moved: Tensor, size: int) -> Tensor:
    """Sums over blocks of tokens, the last one may be short: ``[..., N]`` -> ``[..., blocks]``."""
    padded = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % size))
    return padded.unflatten(-1, (-1, size)).sum(-1)


def _profile(
    built: Built,
    batches: Batches,
    decisions: Sequence[Decision],
    current: Mapping[str, Value],
    costs: Callable[[Watch, Tensor, Tensor, int, int], Costs],
    folds: int,
) -> Rows:
    """Means of ``costs(watch, ids [1, N], positions that count, row, N)`` over folds and lengths."""
    rows: Rows = {d.name: {} for d in decisions}
    present = {length: batch for length, batch in batches.items() if len(batch[0])}
    folds = min([folds, *(len(ids) for ids, _ in present.values())]) if present else 0
    with watching(built.model, asked_layers(decisions, current)) as watch:
        for fold in range(folds):
            means = []
            for length, (ids, mask) in present.items():
                found = [
                    costs(watch, ids[i : i + 1].to(built.device), _counted(mask, i, ids), i, length)
                    for i in range(fold, len(ids), folds)
                ]
                means.append({path: sum(f[path] for f in found) / len(found) for path in found[0]})
                _note(rows, decisions, means[-1], f"@{length}")
            if len(means) == len(batches):
                _note(rows, decisions, {p: sum(m[p] for m in means) / len(means) for p in means[0]}, "")
    return rows


def _counted(mask: Tensor | None, row: int, ids: Tensor) -> Tensor:
    """int64 positions of sequence ``row`` that count."""
    if mask is None:
        return torch.arange(ids.shape[1])
    found = mask[row].nonzero().flatten().cpu()
    if not len(found):
        raise SpaceError(
            f"no token of sequence {row} of {ids.shape[1]} tokens counts; leave the sequence out"
        )
    return found


def _note(rows: Rows, decisions: Sequence[Decision], costs: Mapping[str, Any], suffix: str) -> None:
    """Add one sample to every row: the sum over the decision's groups."""
    for decision in decisions:
        total = sum(costs[path] for path in decision.sites)
        row = rows.setdefault(decision.name + suffix, {})
        for option, cost in zip(decision.options, total.tolist()):
            _add(row, option, cost)
    if BASE in costs:
        _add(rows.setdefault(BASE + suffix, {}), "kl", float(costs[BASE]))
