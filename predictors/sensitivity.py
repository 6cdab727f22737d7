"""Sensitivity of quality to each (decision, option), as one additive cost each, with its noise.

All methods return ``ProfileResult`` moments whose samples are folds of calibration sequences. Costs are in
nats a token where the method allows it, else in the method's own unit (only their ratios matter then).

- ``fisher``: half of sum(g^2 * dW^2): second-order Taylor term with the empirical diagonal Fisher as Hessian.
  ``g`` is the gradient of a sequence's summed loss.
- ``first_order``: |sum(g * dW)| of the averaged gradient (LLM-MQ, section 3.2).
- ``activation``: ||X dW'||^2 / ||X W'||^2, the relative output error on calibration activations.
- ``measured``: KL of the model with this one change.
- ``neighbourhood``: change of the KL when one decision leaves a given candidate: the first-order term of the
  KL's own gradient at that candidate plus the Fisher second-order term. At an operating point the gradient
  is not zero, and it carries the interactions with every other choice that costs at the uncompressed point
  miss; a hybrid search solves again with these costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from autocomp.errors import SpaceError
from autocomp.profile import Moments, ProfileResult
from autocomp.search_spaces.base import Part
from autocomp.space import Decision, Value
from autocomp.workloads.base import Built

GRADIENT_METHODS = ("fisher", "first_order")
BASE = "base"
METHODS = (*GRADIENT_METHODS, "activation", "measured")

Delta = Callable[[Part, Value], torch.Tensor | None]
"""Change of a part's weight under an option, float32 ``[out, in]``; ``None`` for no change."""

Rows = dict[str, dict[Value, Moments]]


def gradient_sensitivity(
    built: Built,
    sequences: torch.Tensor,
    decisions: Sequence[Decision],
    delta: Delta,
    *,
    method: str = "fisher",
    folds: int = 4,
) -> ProfileResult:
    """``fisher`` or ``first_order`` costs from backward passes of the next-token loss.

    Args:
        built: the model in its original state.
        sequences: ``[n, L]`` token ids; split into ``folds`` groups whose spread gives the noise.
        decisions: every part named in ``sites`` must be a weight of its own or borrow one.
        delta: weight change of (part, option).

    Returns:
        One sample a fold for each (decision, option).
    """
    if method not in GRADIENT_METHODS:
        raise SpaceError(f"{method!r} is no gradient method; use one of {GRADIENT_METHODS}")
    started = time.perf_counter()
    rows: Rows = {d.name: {} for d in decisions}
    parts = _owned_parts(built, decisions)
    for fold in sequences.chunk(min(folds, len(sequences))):
        sums = _accumulate(built, fold, parts, squared=method == "fisher")
        scale = 0.5 / fold.numel() if method == "fisher" else 1.0 / fold.numel()
        for decision in decisions:
            for option in decision.options:
                cost = scale * _decision_cost(decision, option, parts, sums, delta, method)
                _add(rows[decision.name], option, cost)
    return ProfileResult(f"sensitivity:{method}", rows, time.perf_counter() - started)


def _owned_parts(built: Built, decisions: Iterable[Decision]) -> dict[str, Part]:
    parts = {path: built.site.part(path) for d in decisions for path in d.sites}
    return {path: part for path, part in parts.items() if not part.shared_with}


def _decision_cost(
    decision: Decision,
    option: Value,
    parts: Mapping[str, Part],
    sums: Mapping[str, torch.Tensor],
    delta: Delta,
    method: str,
) -> float:
    total = 0.0
    for path in decision.sites:
        if path not in parts:
            continue
        change = delta(parts[path], option)
        if change is not None:
            change = change.to(sums[path].device)
            term = change.square_() if method == "fisher" else change
            total += float(torch.dot(sums[path].flatten(), term.flatten()))
    # The absolute value is taken over the whole decision, after the sum, as in LLM-MQ.
    return abs(total)


def _accumulate(
    built: Built, sequences: torch.Tensor, parts: Mapping[str, Part], *, squared: bool
) -> dict[str, torch.Tensor]:
    """Sum over sequences of g^2 (or of g) of the next-token loss: path -> float32 ``[out, in]``."""
    sums: dict[str, torch.Tensor] = {}
    with _gradients(built, parts) as backward:
        for sequence in sequences:
            backward(_sequence_loss(built, sequence[None]), sums, squared=squared)
    return {path: _as_rows(built, path, total) for path, total in sums.items()}


class _Backward(Protocol):
    def __call__(
        self, loss: torch.Tensor, sums: dict[str, torch.Tensor], *, squared: bool, retain: bool = False
    ) -> None: ...


@contextmanager
def _gradients(built: Built, parts: Mapping[str, Part]) -> Iterator[_Backward]:
    """A function that adds a loss's gradients (or their squares) to sums, one weight at a time.

    Each weight's gradient is consumed and freed by a hook as soon as it is there, so that the peak is one
    weight's gradient beyond the sums. Flags and gradients of the model are as before at the end.
    """
    weights = {path: _weight(built, path) for path in parts}
    flags = {p: p.requires_grad for p in built.model.parameters()}
    target: dict[str, torch.Tensor] = {}
    squares = False

    def collector(path: str) -> Callable[[torch.Tensor], None]:
        def collect(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.float()
            weight.grad = None
            term = gradient.square_() if squares else gradient
            target[path] = target[path].add_(term) if path in target else term

        return collect

    def backward(
        loss: torch.Tensor, sums: dict[str, torch.Tensor], *, squared: bool, retain: bool = False
    ) -> None:
        nonlocal target, squares
        target, squares = sums, squared
        torch.autograd.backward(loss, inputs=list(weights.values()), retain_graph=retain)

    handles = []
    for parameter in flags:
        parameter.requires_grad_(False)
    for path, weight in weights.items():
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(collector(path)))
    try:
        yield backward
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


def neighbourhood_sensitivity(
    built: Built,
    sequences: torch.Tensor,
    decisions: Sequence[Decision],
    current: Mapping[str, Value],
    move: Callable[[Part, Value, Value], torch.Tensor | None],
    divergence: Callable[[torch.Tensor, int], torch.Tensor],
    *,
    positions: Sequence[int],
    folds: int = 2,
) -> ProfileResult:
    """Change of the KL (nats a token) when one decision leaves ``current``, around the model as it is now.

    First order from the gradient of KL(uncompressed || current); second order half of sum(g^2 * dW^2)
    with the next-token loss's gradients there (empirical Fisher).

    Args:
        built: the model at ``current`` in its scoring state.
        sequences: ``[n, L]`` token ids.
        move: (part, from option, to option) -> weight change, float32 ``[out, in]``; ``None`` for none.
        divergence: (logits ``[1, L, V]``, position in the split) -> summed KL, a scalar with gradient.
        positions: where the sequences stand in the split that the uncompressed outputs were kept for.

    Returns:
        One sample a fold for each (decision, option); the row ``BASE`` holds the KL itself.
    """
    started = time.perf_counter()
    rows: Rows = {d.name: {} for d in decisions} | {BASE: {}}
    parts = _owned_parts(built, decisions)
    chunks = torch.arange(len(sequences)).chunk(min(folds, len(sequences)))
    for chunk in chunks:
        first: dict[str, torch.Tensor] = {}
        second: dict[str, torch.Tensor] = {}
        total = 0.0
        with _gradients(built, parts) as backward:
            for i in chunk.tolist():
                ids = sequences[i : i + 1].to(built.device)
                logits = built.model(input_ids=ids, use_cache=False).logits
                kl = divergence(logits, positions[i])
                total += float(kl.detach())
                backward(kl, first, squared=False, retain=True)
                backward(_next_token_loss(logits, ids), second, squared=True)
        tokens = len(chunk) * sequences.shape[1]
        _add(rows[BASE], "kl", total / tokens)
        gradients = {p: _as_rows(built, p, g) for p, g in first.items()}
        fisher = {p: _as_rows(built, p, g) for p, g in second.items()}
        for decision in decisions:
            here = current[decision.name]
            for option in decision.options:
                cost = 0.0
                for path in decision.sites:
                    change = move(parts[path], here, option) if path in parts and option != here else None
                    if change is not None:
                        cost += float((gradients[path] * change).sum())
                        cost += 0.5 * float((fisher[path] * change.square_()).sum())
                _add(rows[decision.name], option, cost / tokens)
    return ProfileResult("neighbourhood", rows, time.perf_counter() - started)


def _sequence_loss(built: Built, ids: torch.Tensor) -> torch.Tensor:
    """Summed next-token cross-entropy of one sequence in nats, a scalar."""
    logits = built.model(input_ids=ids.to(built.device), use_cache=False).logits
    return _next_token_loss(logits, ids)


def _next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    targets = ids[:, 1:].flatten().to(logits.device)
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, reduction="sum")


def _weight(built: Built, path: str) -> torch.nn.Parameter:
    weight = built.model.get_submodule(path).weight
    assert isinstance(weight, torch.nn.Parameter)
    return weight


def _as_rows(built: Built, path: str, tensor: torch.Tensor) -> torch.Tensor:
    """``[out, in]`` whatever the module stores (``Conv1D`` keeps ``[in, out]``)."""
    return tensor.T.contiguous() if type(built.model.get_submodule(path)).__name__ == "Conv1D" else tensor


def activation_sensitivity(
    built: Built,
    decisions: Sequence[Decision],
    delta: Delta,
    gram: Callable[[str], torch.Tensor],
) -> ProfileResult:
    """``activation`` costs: relative output error, summed over the decision's parts.

    Args:
        gram: path -> X'X of the part's inputs on calibration data, ``[in, in]`` float32.
    """
    started = time.perf_counter()
    rows: Rows = {d.name: {} for d in decisions}
    for decision in decisions:
        for option in decision.options:
            cost = 0.0
            for path, part in _owned_parts(built, [decision]).items():
                change = delta(part, option)
                if change is None or part.kind != "linear":
                    continue
                product = gram(path)
                weight = _as_rows(built, path, _weight(built, path).detach()).float()
                cost += _quadratic(change, product) / max(_quadratic(weight, product), 1e-30)
            _add(rows[decision.name], option, cost)
    return ProfileResult("sensitivity:activation", rows, time.perf_counter() - started)


def _quadratic(weight: torch.Tensor, gram: torch.Tensor) -> float:
    return float(((weight @ gram) * weight).sum())


def measured_sensitivity(
    decisions: Sequence[Decision], options_score: Callable[[str, Value], tuple[float, int]]
) -> ProfileResult:
    """``measured`` costs: the KL of single changes. Works for any space.

    Args:
        options_score: (decision name, option) -> (KL in nats a token, number of sequences).
    """
    started = time.perf_counter()
    rows: Rows = {}
    for decision in decisions:
        scores = [(o, *options_score(decision.name, o)) for o in decision.options]
        # Tiny negative values are measuring noise of near-lossless options, not a gain.
        rows[decision.name] = {o: (1, max(0.0, kl), max(0.0, kl) ** 2) for o, kl, _ in scores}
    return ProfileResult("sensitivity:measured", rows, time.perf_counter() - started)


def _add(row: dict[Value, Moments], option: Value, sample: float) -> None:
    n, total, squares = row.get(option, (0, 0.0, 0.0))
    row[option] = (n + 1, total + sample, squares + sample * sample)


class GramStore:
    """X'X of the inputs of linears on calibration data, a bounded number of them at a time.

    Parts that read the same input (a tie) share one matrix. When a wanted matrix is not there, one pass
    over the calibration data collects as many following parts as fit into ``max_bytes``.
    """

    def __init__(self, built: Built, sequences: torch.Tensor, max_bytes: int = 2 << 30) -> None:
        self.built, self.sequences, self.max_bytes = built, sequences, max_bytes
        self._grams: dict[str, torch.Tensor] = {}

    def __call__(self, path: str) -> torch.Tensor:
        """``[in, in]`` float32, summed over all tokens."""
        part = self.built.site.part(path)
        tie = part.tie or path
        if tie not in self._grams:
            if not self.built.state.get("pristine", True):
                raise SpaceError(
                    "calibration activations must come from the original model; restore it first"
                )
            self._grams = {}
            self._collect(list(self._following(path)))
        return self._grams[tie]

    def _following(self, path: str) -> Iterator[Part]:
        """The part and those after it, one a tie, while their matrices fit."""
        parts = [p for p in self.built.site.parts if p.kind == "linear" and p.role != "head"]
        start = next((i for i, p in enumerate(parts) if p.path == path), None)
        if start is None:
            yield self.built.site.part(path)
            return
        seen: set[str] = set()
        size = 0
        for part in parts[start:]:
            if (part.tie or part.path) in seen:
                continue
            size += 4 * part.shape[1] ** 2
            if seen and size > self.max_bytes:
                return
            seen.add(part.tie or part.path)
            yield part

    def _collect(self, parts: Sequence[Part]) -> None:
        handles = []
        for part in parts:
            module = self.built.model.get_submodule(part.path)
            handles.append(module.register_forward_pre_hook(self._hook(part.tie or part.path)))
        try:
            with torch.inference_mode():
                for batch in self.sequences.split(4):
                    self.built.model(input_ids=batch.to(self.built.device), use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, tie: str) -> Callable[..., None]:
        def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            product = x.T @ x
            self._grams[tie] = product if tie not in self._grams else self._grams[tie].add_(product)

        return record
