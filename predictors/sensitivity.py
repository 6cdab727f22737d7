"""Sensitivity of quality to each (decision, option), as one additive cost each, with its noise.

All methods return ``ProfileResult`` moments whose samples are folds of calibration sequences. Costs are in
nats a token where the method allows it, else in the method's own unit (only their ratios matter then).

- ``fisher``: half of sum(g^2 * dW^2): second-order Taylor term of the KL with the diagonal Fisher as Hessian;
  ``g`` is the gradient of a sequence's summed loss on labels sampled from the model.
- ``first_order``: |sum(g * dW)| of the averaged gradient (LLM-MQ, section 3.2).
- ``activation``: ||X dW'||^2 / ||X W'||^2, the relative output error on calibration activations (of an
  embedding: of the rows that calibration tokens look up).
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

Move = Callable[[Part, Value, Value], torch.Tensor | None]
"""The same from one option to another."""

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
    """``fisher`` or ``first_order`` costs from one backward pass a sequence.

    Args:
        built: the model in its original state.
        sequences: ``[n, L]`` token ids; dealt out to ``folds`` groups whose spread gives the noise.
        decisions: every part named in ``sites`` must be a weight of its own or borrow one.
        delta: weight change of (part, option).

    Returns:
        One sample a fold for each (decision, option); none without sequences.

    Raises:
        SpaceError: ``method`` is not one of ``GRADIENT_METHODS``.
    """
    if method not in GRADIENT_METHODS:
        raise SpaceError(f"{method!r} is no gradient method; use one of {GRADIENT_METHODS}")
    started = time.perf_counter()
    rows: Rows = {d.name: {} for d in decisions}
    parts = _owned_parts(built, decisions)
    for indices in _dealt(len(sequences), folds):
        fold = sequences[indices]
        sums = _accumulate(built, fold, parts, squared=method == "fisher")
        scale = 0.5 / fold.numel() if method == "fisher" else 1.0 / fold.numel()
        for decision in decisions:
            for option in decision.options:
                cost = scale * _decision_cost(decision, option, parts, sums, delta, method)
                _add(rows[decision.name], option, cost)
    return ProfileResult(f"sensitivity:{method}", rows, time.perf_counter() - started)


def _dealt(count: int, folds: int) -> Iterator[list[int]]:
    """Every ``folds``-th of ``count`` positions, for each start that has any.

    Dealt out like the shards of a profile, so that all shards together have the folds of one."""
    return (list(range(start, count, folds)) for start in range(min(folds, count)))


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
        # A weight that no sequence reached (an expert without tokens) has no gradient, hence no cost.
        change = delta(parts[path], option) if path in parts and path in sums else None
        if change is not None:
            total += _dot(sums[path], change.square_() if method == "fisher" else change)
    # The absolute value is taken over the whole decision, after the sum, as in LLM-MQ.
    return abs(total)


def _accumulate(
    built: Built, sequences: torch.Tensor, parts: Mapping[str, Part], *, squared: bool
) -> dict[str, torch.Tensor]:
    """Sum over sequences of g^2 (sampled labels) or of g (the text): path -> float32 ``[out, in]``."""
    sums: dict[str, torch.Tensor] = {}
    with _gradients(built, parts) as backward:
        for sequence in sequences:
            loss = _sequence_loss(built, sequence[None], "sampled" if squared else "text")
            backward(loss, sums, squared=squared)
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
    before = {p: (p.requires_grad, p.grad) for p in built.model.parameters()}
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
    for parameter in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    for path, weight in weights.items():
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(collector(path)))
    try:
        yield backward
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (flag, gradient) in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def neighbourhood_sensitivity(
    built: Built,
    sequences: torch.Tensor,
    decisions: Sequence[Decision],
    current: Mapping[str, Value],
    move: Move,
    divergence: Callable[[torch.Tensor, int], torch.Tensor],
    *,
    positions: Sequence[int],
    folds: int = 2,
) -> ProfileResult:
    """Change of the KL (nats a token) when one decision leaves ``current``, around the model as it is now.

    First order from the gradient of KL(uncompressed || current); second order half of sum(g^2 * dW^2)
    with the Fisher of the current model (see ``sampled_loss``).

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
    rows: Rows = {name: {} for name in (BASE, *(d.name for d in decisions))}
    parts = _owned_parts(built, decisions)
    for fold in _dealt(len(sequences), folds):
        first: dict[str, torch.Tensor] = {}
        second: dict[str, torch.Tensor] = {}
        total = 0.0
        with _gradients(built, parts) as backward:
            for i in fold:
                ids = sequences[i : i + 1].to(built.device)
                logits = built.model(input_ids=ids, use_cache=False).logits
                kl = divergence(logits, positions[i])
                total += float(kl.detach())
                backward(kl, first, squared=False, retain=True)
                backward(sampled_loss(logits, seed=positions[i]), second, squared=True)
        tokens = len(fold) * sequences.shape[1]
        _add(rows[BASE], "kl", total / tokens)
        slopes = {
            path: (_as_rows(built, path, gradient), _as_rows(built, path, second[path]))
            for path, gradient in first.items()
        }
        for decision in decisions:
            here = current[decision.name]
            for option in decision.options:
                cost = _leaving_cost(decision, parts, slopes, move, (here, option))
                _add(rows[decision.name], option, cost / tokens)
    return ProfileResult("neighbourhood", rows, time.perf_counter() - started)


def _leaving_cost(
    decision: Decision,
    parts: Mapping[str, Part],
    slopes: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    move: Move,
    options: tuple[Value, Value],
) -> float:
    """Sum over the decision's weights of g * dW + h * dW^2 / 2 from one option to the other; ``slopes``:
    path -> (g, h)."""
    cost = 0.0
    for path in decision.sites:
        change = move(parts[path], *options) if path in slopes else None
        if change is not None:
            gradient, fisher = slopes[path]
            cost += float((gradient * change).sum())
            cost += 0.5 * float((fisher * change.square_()).sum())
    return cost


def _sequence_loss(built: Built, ids: torch.Tensor, labels: str) -> torch.Tensor:
    """Summed cross-entropy of one sequence in nats, a scalar: on the text, or on sampled labels."""
    logits = built.model(input_ids=ids.to(built.device), use_cache=False).logits
    return sampled_loss(logits, seed=int(ids.sum())) if labels == "sampled" else _text_loss(logits, ids)


def _text_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    targets = ids[:, 1:].flatten().to(logits.device)
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, reduction="sum")


def sampled_loss(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Summed cross-entropy on labels drawn from the model's own distribution, ``logits [1, L, V]``.

    The squares of its gradients estimate the Fisher matrix proper, which is the Hessian of the KL at the
    model. Squares of the text's gradients (the "empirical Fisher") overestimate it several times, the more
    the worse the model predicts the text.
    """
    rows = logits.float().flatten(0, 1)
    generator = torch.Generator(device=rows.device).manual_seed(seed)
    with torch.no_grad():
        # Exponential race: argmax of p / e draws from p without a cumulative sum over the vocabulary.
        race = torch.empty_like(rows).exponential_(generator=generator)
        labels = (rows.softmax(-1) / race).argmax(-1)
    return torch.nn.functional.cross_entropy(rows, labels, reduction="sum")


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
        gram: path -> X'X of the part's inputs on calibration data, ``[in, in]`` float32; of an embedding,
            whose inputs are one-hot, the diagonal ``[rows]``: how often each token occurs.
    """
    started = time.perf_counter()
    rows: Rows = {d.name: {} for d in decisions}
    for decision in decisions:
        for option in decision.options:
            cost = sum(_output_error(built, built.site.part(p), option, delta, gram) for p in decision.sites)
            _add(rows[decision.name], option, cost)
    return ProfileResult("sensitivity:activation", rows, time.perf_counter() - started)


def _output_error(
    built: Built, part: Part, option: Value, delta: Delta, gram: Callable[[str], torch.Tensor]
) -> float:
    owner = built.site.part(part.shared_with) if part.shared_with else part
    change = delta(owner, option)
    if change is None:
        return 0.0
    product = gram(part.path)
    weight = _as_rows(built, owner.path, _weight(built, owner.path).detach()).float()
    return _quadratic(change, product) / max(_quadratic(weight, product), 1e-30)


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a.flatten(), b.to(a.device).flatten()))


def _quadratic(weight: torch.Tensor, gram: torch.Tensor) -> float:
    """Squared norm of the output: X W' with dense inputs, looked-up rows with one-hot ones."""
    if gram.ndim == 1:
        return float((weight.square().sum(-1) * gram).sum())
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
