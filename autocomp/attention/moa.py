"""Reading the plans that MoA publishes: ``{"alphas": [layer][head], "betas": [layer][head]}``.

There a head sees the last ``alpha + beta * N`` tokens and the first block of 64 (arXiv 2406.14909, section 3;
repository thu-nics/MoA, ``examples/*/moa_alpha_beta.json``). Our rules count the sink in, so 64 is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autocomp.attention.plan import DENSE, Rule
from autocomp.errors import SpaceError

SINK = 64
LENGTH = 4096
"""Where groups of heads are compared: a length between those that MoA profiles."""


def read_plan(data: Any, shapes: Sequence[tuple[int, int]], sink: int = SINK) -> list[tuple[Rule, ...]]:
    """Rules of every layer's key/value heads.

    Heads that share keys may be listed each or once; a shared cache must keep what its widest head needs
    (compared at ``LENGTH`` tokens).

    Args:
        data: what the JSON file holds.
        shapes: ``(key/value heads, query heads of each)`` of every attention layer of the model.
        sink: first tokens that stay visible.

    Raises:
        SpaceError: it is no such plan, or one of another model: it names what differs.
    """
    if not isinstance(data, dict) or not {"alphas", "betas"} <= set(data):
        raise SpaceError("a MoA plan holds 'alphas' and 'betas', each a list of numbers per layer")
    alphas, betas = data["alphas"], data["betas"]
    if len(alphas) != len(shapes) or len(betas) != len(shapes):
        raise SpaceError(
            f"the MoA plan is for {len(alphas)} layers (betas: {len(betas)}), this model has {len(shapes)}"
        )
    return [
        _layer(i, a, b, shape, sink)
        for i, (a, b, shape) in enumerate(zip(alphas, betas, shapes, strict=True))
    ]


def _layer(index: int, alphas: Any, betas: Any, shape: tuple[int, int], sink: int) -> tuple[Rule, ...]:
    groups, each = shape
    if len(alphas) != len(betas) or len(alphas) not in (groups, groups * each):
        raise SpaceError(
            f"layer {index} of the MoA plan has {len(alphas)} alphas and {len(betas)} betas; this model has"
            f" {groups} key/value heads and {groups * each} heads"
        )
    try:
        rules = [_rule(float(a), float(b), sink) for a, b in zip(alphas, betas, strict=True)]
    except (TypeError, ValueError) as error:
        raise SpaceError(f"layer {index} of the MoA plan: {error}") from None
    size = len(rules) // groups
    return tuple(
        max(rules[g * size : (g + 1) * size], key=lambda rule: (rule.span(LENGTH), rule.beta))
        for g in range(groups)
    )


def _rule(alpha: float, beta: float, sink: int) -> Rule:
    if not 0.0 <= beta <= 1.0 or alpha != round(alpha):
        raise ValueError(f"alpha must be a whole number and beta from 0 to 1; got {alpha}, {beta}")
    return DENSE if beta == 1.0 and alpha >= 0 else Rule(round(alpha) + sink, beta, sink)
