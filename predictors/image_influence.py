"""What attention rules do to a diffusion model's output, to first order, for all layers and options at once.

Measuring one changed option replays every recorded call of the model. Here each call is made once, with the
gradients of random projections of its output: with J the derivative of the output by a module's output and
``d`` the change that a rule makes there, ``(v' J d)^2`` over random signs v has the mean ``|J d|^2``
(Hutchinson's estimator), the power that the change has in the output. As in DiTFastAttnV2 (arXiv 2503.22796)
a rule's own error is that of the module's output; here it is weighed by what the rest of the model makes of
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocomp.diffusion.attention import form_of
from autocomp.diffusion.attention_forms import Form, Inputs, Triple, tensors_of
from autocomp.diffusion.attention_plan import Rule, range_of
from autocomp.kernels.attention import attention_window_residual
from autocomp.kernels.attention_diffusion_reference import WINDOW_ADD
from autocomp.space import Value

if TYPE_CHECKING:
    from autocomp.diffusion.denoiser import Denoiser
    from autocomp.workloads.diffusion_teacher import Call

PROBES = 4
"""Random projections of each output."""
Rows = Mapping[str, Mapping[Value, tuple[int, float, float]]]


@dataclass(frozen=True)
class Question:
    """A decision: its module, range of steps (of so many), head (``None``: all) and options."""

    name: str
    path: str
    index: int
    ranges: int
    head: int | None
    options: tuple[str, ...]


@dataclass
class _Seen:
    """What one call showed of a module: its inputs, the text's tokens among them, and its output in the
    graph (the image's, and the text's where it gives one)."""

    x: Inputs
    text: int
    outputs: tuple[Tensor, ...]


@dataclass
class _Layer:
    """A module, its form, and the last dense step before the range that it is in."""

    module: Any
    form: Form
    before: dict[int, Triple] = field(default_factory=dict)


def attention_influence(
    denoiser: Denoiser, batches: Sequence[Sequence[Call]], questions: Sequence[Question], *, seed: int = 0
) -> Rows:
    """Power that each option alone adds to the model's output, as a share of the output's power: an estimate
    of the metric ``noise`` of that single change. Of guided steps it is the output after guidance.

    Args:
        denoiser: the uncompressed model.
        batches: recorded calls by batch, in the order of steps from the first one on.

    Returns:
        Decision -> option -> (images, sum, sum of squares) of the per-image values.
    """
    generator = torch.Generator().manual_seed(seed)
    added: dict[tuple[str, str], list[Tensor]] = {}
    power: list[Tensor] = []
    for calls in batches:
        sums, own = _batch(denoiser, calls, questions, generator)
        power.append(own)
        for key, value in sums.items():
            added.setdefault(key, []).append(value)
    mean = torch.cat(power).mean()
    rows: dict[str, dict[Value, tuple[int, float, float]]] = {q.name: {} for q in questions}
    for q in questions:
        for option in q.options:
            values = torch.cat(added[q.name, option]) / mean
            rows[q.name][option] = (len(values), float(values.sum()), float(values.square().sum()))
    return rows


def _batch(
    denoiser: Denoiser, calls: Sequence[Call], questions: Sequence[Question], generator: torch.Generator
) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """Sums over a batch's calls, float64 ``[images]``: power added by each (decision, option), and power."""
    modules = {q.path: denoiser.model.get_submodule(q.path) for q in questions}
    layers = {path: _Layer(module, form_of(module)) for path, module in modules.items()}
    images = len(calls[0].x) // (2 if calls[0].state.guided else 1)
    sums = {(q.name, o): torch.zeros(images, dtype=torch.float64) for q in questions for o in q.options}
    power = torch.zeros(images, dtype=torch.float64)
    for call in calls:
        seen, gradients, output = _probed(denoiser, call, layers, generator)
        power += output.double().square().flatten(1).sum(1).cpu()
        for path, layer in layers.items():
            mine = [q for q in questions if q.path == path]
            _one_layer(layer, mine, call, seen[path], gradients[path], sums, images)
    return sums, power


def _probed(
    denoiser: Denoiser, call: Call, layers: Mapping[str, _Layer], generator: torch.Generator
) -> tuple[dict[str, _Seen], dict[str, list[Tensor]], Tensor]:
    """One call with its modules' outputs and, for each random projection, the gradients by their heads'
    outputs ``[batch, heads, text and image tokens, dim]``."""
    seen: dict[str, _Seen] = {}

    def watch(path: str) -> Any:
        form = layers[path].form

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = Inputs.of(args, kwargs)
            seen[path] = _Seen(x, form.text_tokens(x, denoiser.state), tensors_of(output))

        return hook

    handles = [
        layer.module.register_forward_hook(watch(path), with_kwargs=True) for path, layer in layers.items()
    ]
    try:
        with torch.enable_grad():
            # clone: recorded tensors may be of inference mode, which autograd refuses
            x = call.x.clone().requires_grad_()
            conditions = {name: value.clone() for name, value in call.conditions.items()}
            output = call.state.combined(denoiser(x, call.model_time, conditions))
            gradients: dict[str, list[Tensor]] = {path: [] for path in layers}
            for i in range(PROBES):
                signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
                wanted = [t for p in layers for t in seen[p].outputs]
                found = iter(  # nothing depends on the text's output of SD3's last block
                    torch.autograd.grad(
                        (output * signs).sum(), wanted, retain_graph=i + 1 < PROBES, allow_unused=True
                    )
                )
                for path, layer in layers.items():
                    own = [next(found) for _ in seen[path].outputs]
                    gradients[path].append(layer.form.turned(layer.module, own, seen[path].text))
    finally:
        for handle in handles:
            handle.remove()
    return seen, gradients, output.detach()


@torch.no_grad()
def _one_layer(
    layer: _Layer, questions: Sequence[Question], call: Call, seen: _Seen, gradients: Sequence[Tensor],
    sums: Mapping[tuple[str, str], Tensor], images: int,
) -> None:  # fmt: skip
    """Add what every option of the questions about this call's step does to ``sums``."""
    step, total = call.state.index, call.state.total
    now = layer.form.project(layer.module, seen.x)
    asked = [q for q in questions if step and range_of(step, total, q.ranges) == q.index]
    changes: dict[tuple[str, int], list[Tensor]] = {}
    for q in asked:
        for option in q.options:
            key = option, q.ranges
            if key not in changes:
                rule, before = Rule.parse(option), layer.before[q.ranges]
                change = _change(rule, now, before, call.state.guided, seen.text)
                changes[key] = [(g * change).double().sum((2, 3)) for g in gradients]  # [batch, heads] each
            for found in changes[key]:
                part = found.sum(1) if q.head is None else found[:, q.head]
                sums[q.name, option].add_(_by_image(part, images).square(), alpha=1 / len(gradients))
    for ranges in {q.ranges for q in questions}:
        ends = step + 1 < total and range_of(step + 1, total, ranges) != range_of(step, total, ranges)
        if step == 0 or ends:  # what the options of the next range go back to
            layer.before[ranges] = now


def _change(rule: Rule, now: Triple, before: Triple, guided: bool, text: int) -> Tensor:
    """What the rule changes in the heads' outputs ``[batch, heads, tokens, dim]``, when ``before`` was the
    last full step."""
    full = F.scaled_dot_product_attention(*now)
    if rule.kind == "reuse":
        out = F.scaled_dot_product_attention(*before)
    elif rule.kind == "window":
        out = _window(now, rule.window, text)
        if rule.residual:
            out = out + F.scaled_dot_product_attention(*before) - _window(before, rule.window, text)
    else:
        out = full
    if rule.shared and guided:
        out = torch.cat([out[: len(out) // 2]] * 2)
    return out - full


def _window(parts: Triple, window: int, text: int) -> Tensor:
    q, k, v = parts
    width, mode = (
        torch.full((q.shape[1],), n, dtype=torch.int32, device=q.device) for n in (window, WINDOW_ADD)
    )
    out: Tensor = attention_window_residual(q, k, v, width, text, None, mode)[0]
    return out


def _by_image(rows: Tensor, images: int) -> Tensor:
    """Per-row values of a batch, the halves of a guided one added up, float64 on the CPU."""
    return rows.double().unflatten(0, (-1, images)).sum(0).cpu()
