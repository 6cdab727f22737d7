"""What every key/value group of a model keeps: a span rule, and bits for keys and values. No torch here.

A rule is MoA's (arXiv 2406.14909, section 3.2): a group that serves an input of N tokens keeps
``S(N) = alpha + beta * N`` of them, the first ``sink`` and the last ones (attention sinks: StreamingLLM,
arXiv 2309.17453). N is the length of the prompt; the span then stays while tokens are generated. Prompts
shorter than what was profiled are served with the spans of the shortest profiled length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autocomp.errors import SpaceError

_RULE = re.compile(r"^a(-?\d+)b(\d+(?:\.\d+)?)s(\d+)$")
_BITS = re.compile(r"^k(\d+)v(\d+)$")
KV_BITS = (16, 8, 4)
SCALE_BYTES = 8
"""Of one quantized key or value: its scale and its minimum, float32 each."""


@dataclass(frozen=True, order=True)
class Rule:
    """How many tokens a group keeps: ``alpha + beta * N``, of which the first ``sink`` stay for ever.

    ``Rule(0, 1.0, 0)`` keeps all (``DENSE``).
    """

    alpha: int
    beta: float
    sink: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0 or self.sink < 0:
            raise SpaceError(f"a span rule has beta from 0 to 1 and sink >= 0; got {self.beta}, {self.sink}")

    @property
    def label(self) -> str:
        """``dense``, or ``a512b0s16``, ``a0b0.25s16``."""
        return "dense" if self == DENSE else f"a{self.alpha}b{self.beta:g}s{self.sink}"

    @classmethod
    def parse(cls, label: str) -> Rule:
        """Inverse of ``label``. Raises ``SpaceError`` with the form when it is none."""
        if label == "dense":
            return DENSE
        match = _RULE.match(label)
        if match is None:
            raise SpaceError(
                f"{label!r} is no span rule; they look like 'dense', 'a512b0s16' (512 tokens, the first 16 of"
                " them for ever) or 'a0b0.25s16' (a quarter of the prompt's length)"
            )
        return cls(int(match[1]), float(match[2]), int(match[3]))

    def span(self, tokens: int) -> int:
        """Tokens kept of an input of ``tokens``: at least the sink and the token itself, at most all."""
        return tokens if self == DENSE else min(tokens, self.sink + self.window(tokens))

    def window(self, tokens: int) -> int:
        """The last tokens kept beside the sink, for an input of ``tokens``; at least 1, and 0 for all.

        It may be more than the input has: tokens that are generated fill it.
        """
        return 0 if self == DENSE else max(1, round(self.alpha + self.beta * tokens) - self.sink)


DENSE = Rule(0, 1.0, 0)


@dataclass(frozen=True)
class Keep:
    """What one key/value group keeps: a rule, and bits of keys and of values.

    As text, which is how a search space offers it: ``a512b0s16/k8v4``.
    """

    rule: Rule = DENSE
    key_bits: int = 16
    value_bits: int = 16

    def __post_init__(self) -> None:
        for bits in (self.key_bits, self.value_bits):
            if bits not in KV_BITS:
                raise SpaceError(f"keys and values are kept in {KV_BITS} bits; got {bits}")

    @property
    def label(self) -> str:
        return f"{self.rule.label}/k{self.key_bits}v{self.value_bits}"

    @classmethod
    def parse(cls, label: str) -> Keep:
        """Inverse of ``label``. Raises ``SpaceError``."""
        rule, _, bits = label.partition("/")
        match = _BITS.match(bits or "k16v16")
        if match is None:
            raise SpaceError(f"{label!r}: bits of keys and values look like 'k8v4'")
        return cls(Rule.parse(rule), int(match[1]), int(match[2]))

    def token_bytes(self, dim: int, itemsize: int = 2) -> float:
        """Bytes of one token's key and value of ``dim`` features; ``itemsize``: of an uncompressed number."""
        return sum(
            dim * itemsize if bits == 16 else dim * bits / 8 + SCALE_BYTES
            for bits in (self.key_bits, self.value_bits)
        )


@dataclass(frozen=True)
class LayerPlan:
    """One attention layer.

    Attributes:
        rules: one a key/value group.
        key_bits, value_bits: of the whole layer.
        window: the layer's own sliding window in tokens, 0 for none; its groups are then dense in it.
        shortest: shorter inputs are served as those of this length: the shortest that the rules were profiled
            at. A quarter of a prompt of 40 tokens is no context, and saves nothing.
    """

    rules: tuple[Rule, ...]
    key_bits: int = 16
    value_bits: int = 16
    window: int = 0
    shortest: int = 0

    def __post_init__(self) -> None:
        Keep(DENSE, self.key_bits, self.value_bits)
        if self.window and any(rule != DENSE for rule in self.rules):
            raise SpaceError("a layer with a sliding window of its own takes no span rules")

    @property
    def plain(self) -> bool:
        """Whether the layer is as the model has it."""
        return self.key_bits == self.value_bits == 16 and all(rule == DENSE for rule in self.rules)

    def limits(self, tokens: int) -> list[tuple[int, int]]:
        """``(window, sink)`` of each group for an input of ``tokens``; window 0 is unbounded."""
        if self.window:
            return [(self.window, 0)] * len(self.rules)
        tokens = max(tokens, self.shortest)
        return [(w, rule.sink if w else 0) for rule in self.rules for w in [rule.window(tokens)]]


@dataclass(frozen=True)
class AttentionPlan:
    """Layer index -> plan, for every attention layer of a model."""

    layers: Mapping[int, LayerPlan]

    @property
    def plain(self) -> bool:
        return all(layer.plain for layer in self.layers.values())

    def density(self, tokens: int) -> float:
        """Share of an input's tokens that is kept, mean over groups (a sliding window counts as all)."""
        rules = [rule for layer in self.layers.values() for rule in layer.rules]
        return sum(rule.span(tokens) for rule in rules) / (tokens * len(rules))

    def to_json(self) -> dict[str, Any]:
        return {
            str(index): {
                "rules": [rule.label for rule in layer.rules],
                "key_bits": layer.key_bits,
                "value_bits": layer.value_bits,
                "window": layer.window,
                "shortest": layer.shortest,
            }
            for index, layer in sorted(self.layers.items())
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AttentionPlan:
        """Inverse of ``to_json``. Raises ``SpaceError`` for what is none."""
        try:
            layers = {
                int(index): LayerPlan(
                    tuple(Rule.parse(label) for label in entry["rules"]),
                    int(entry["key_bits"]),
                    int(entry["value_bits"]),
                    int(entry["window"]),
                    int(entry.get("shortest", 0)),
                )
                for index, entry in data.items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SpaceError(f"this is no attention plan: {type(error).__name__}: {error}") from error
        return cls(layers)


def uniform(layers: Sequence[int], groups: int, keep: Keep) -> AttentionPlan:
    """The plan that keeps the same everywhere."""
    layer = LayerPlan((keep.rule,) * groups, keep.key_bits, keep.value_bits)
    return AttentionPlan(dict.fromkeys(layers, layer))
