"""What a candidate's attention keeps, sorted into layers and key/value groups: what ``span_map`` draws."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from autocomp.attention.plan import Keep
from autocomp.errors import SpaceError
from autocomp.space import Candidate, Decision, SearchSpace, SpaceConstraint

_SITE = re.compile(r"^(?P<module>.+)\.kv(?P<group>\d+)$")
Bits = tuple[int, int]


def is_attention(decision: Decision) -> bool:
    """Whether a decision is about what key/value groups keep: one of the ``attention`` space, with sites
    that end in ``.kv0``, ``.kv1`` ..."""
    return decision.space == "attention" and bool(decision.sites) and all(map(_SITE.match, decision.sites))


def without_attention(space: SearchSpace) -> SearchSpace:
    """The other decisions and what holds between them; the same space when attention is all there is."""
    others = tuple(d for d in space if not is_attention(d))
    if not others or len(others) == len(space):
        return space
    names = {d.name for d in others}
    kept: tuple[SpaceConstraint, ...] = tuple(c for c in space.constraints if names.issuperset(c.names))
    return SearchSpace(others, kept)


@dataclass(frozen=True)
class SpanMap:
    """What a candidate keeps, by layer.

    Attributes:
        layers: attention modules in the model's order -> what each of their groups keeps.
        labels: names of the layers for the axis: their blocks.
        windows: the layers' own sliding windows in tokens, 0 for none.
        tokens: the context.
        whole: whether the groups of each layer share a decision, so that one row shows them all.
    """

    layers: Mapping[str, Mapping[int, Keep]]
    labels: tuple[str, ...]
    windows: tuple[int, ...]
    tokens: int
    whole: bool

    @cached_property
    def shares(self) -> np.ndarray[Any, Any]:
        """Float64 ``[groups, layers]``: the share of the context that is kept; NaN: no such group."""
        table = np.full((1 + max(max(groups) for groups in self.layers.values()), len(self.layers)), np.nan)
        for x, (groups, window) in enumerate(zip(self.layers.values(), self.windows, strict=True)):
            for g, keep in groups.items():
                table[g, x] = min(keep.rule.span(self.tokens), window or self.tokens) / self.tokens
        return table

    @property
    def density(self) -> float:
        """Mean share that is kept of what the groups would see: the metric ``density``."""
        seen = np.array([min(self.tokens, w or self.tokens) / self.tokens for w in self.windows])
        return float(np.nanmean(self.shares / seen))

    @property
    def bits(self) -> tuple[Bits, ...]:
        """``(key bits, value bits)`` of each layer; they are alike in a layer, which has one cache."""
        found = []
        for module, groups in self.layers.items():
            pairs = sorted({(k.key_bits, k.value_bits) for k in groups.values()})
            if len(pairs) > 1:
                raise SpaceError(f"groups of {module} keep keys and values in different bits: {pairs}")
            found.append(pairs[0])
        return tuple(found)


def layout(
    space: SearchSpace, candidate: Candidate, tokens: int, windows: Mapping[str, int] | None = None
) -> SpanMap:
    """Sort a candidate's attention into layers and groups.

    Args:
        space: has decisions of the ``attention`` space; others are left out.
        candidate: belongs to ``space``.
        tokens: length of the context, at least 1.
        windows: sites (``model.layers.0.self_attn.kv0``) -> their layer's own window; 0 or absent: none.

    Raises:
        SpaceError: there is no attention in the space, or the candidate does not belong to it.
    """
    space.check(candidate)
    decisions = [d for d in space if is_attention(d)]
    if not decisions or tokens < 1:
        raise SpaceError(
            f"a span map needs decisions of the attention space and a context; got {len(decisions)} decisions"
            f" and {tokens} tokens"
        )
    layers: dict[str, dict[int, Keep]] = {}
    own: dict[str, int] = {}
    blocks: dict[str, int | None] = {}
    deciders: dict[str, set[str]] = {}
    for decision in decisions:
        keep = Keep.parse(str(candidate[decision.name]))
        for site in decision.sites:
            module, group = _split(site)
            layers.setdefault(module, {})[group] = keep
            own[module] = (windows or {}).get(site, 0)
            blocks[module] = decision.block
            deciders.setdefault(module, set()).add(decision.name)
    whole = all(len(names) == 1 for names in deciders.values())
    order = sorted(layers, key=_natural)
    labels = tuple(_label(module, blocks[module]) for module in order)
    return SpanMap({m: layers[m] for m in order}, labels, tuple(own[m] for m in order), tokens, whole)


def _split(site: str) -> tuple[str, int]:
    match = _SITE.match(site)
    assert match is not None  # is_attention looked
    return match["module"], int(match["group"])


def _natural(module: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(p), "") if p.isdigit() else (0, p) for p in re.split(r"(\d+)", module)]


def _label(module: str, block: int | None) -> str:
    number = re.search(r"(?<![^.])\d+(?![^.])", module)
    return str(block) if block is not None else number[0] if number else module.rsplit(".", 1)[-1]
