"""What each attention module of a diffusion transformer does at each step of a sampling. No torch here.

The shortcuts are those of DiTFastAttn (arXiv 2406.08552, section 3), per layer and range of steps, or per
head (DiTFastAttnV2, arXiv 2503.22796): attention in a window with the residual of the last full step, reuse
of an earlier output, and one half of a guided batch computed for both. Where text and image are one sequence
(SD3, Flux), windows are among the image's tokens: the text's see all and are seen by all, an "arrow" in the
matrix of scores (DiTFastAttnV2, section 3). Reuse and shared halves take the text's output along.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from autocomp.errors import SpaceError

_WINDOW = re.compile(r"^w(\d+)(x?)$")
_FORMS = (
    "'full', 'w12' (12 tokens to each side, plus the residual of the last full step), 'w12x' (without it),"
    " 'reuse' (the output of the last step that computed it), or 'full/cfg', 'w12/cfg' (one half of a guided"
    " batch for both)"
)


@dataclass(frozen=True)
class Rule:
    """What a layer or head does at one step.

    Attributes:
        kind: ``full`` attention, attention in a ``window``, or ``reuse`` of the output of the last step that
            computed it (AST).
        window: tokens to each side that a token of the image sees, itself (and a joint text) aside.
        residual: a window's output gets ``full - window`` of the last full step added (WA-RS).
        shared: in a guided batch, computed for the conditional half and copied to the other (ASC).
    """

    kind: Literal["full", "window", "reuse"] = "full"
    window: int = 0
    residual: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        if self.window < 0 or (self.kind != "window" and (self.window or self.residual)):
            raise SpaceError(f"only a window has a width (at least 0) and a residual; got {self}")
        if self.kind == "reuse" and self.shared:
            raise SpaceError("'reuse/cfg' computes nothing that could be shared; use 'reuse'")

    @property
    def label(self) -> str:
        """``full``, ``w12``, ``w12x``, ``reuse``, and ``/cfg`` behind it where the halves share."""
        text = self.kind
        if self.kind == "window":
            text = f"w{self.window}{'' if self.residual else 'x'}"  # type: ignore[assignment]
        return text + "/cfg" * self.shared

    @classmethod
    def parse(cls, label: str) -> Rule:
        """Inverse of ``label``. Raises ``SpaceError`` with the forms when it is none."""
        text, slash, end = label.partition("/")
        window = _WINDOW.match(text)
        if (slash and end != "cfg") or (window is None and text not in ("full", "reuse")):
            raise SpaceError(f"{label!r} is no attention rule; they look like {_FORMS}")
        if window is not None:
            return cls("window", int(window[1]), not window[2], bool(slash))
        return cls("full" if text == "full" else "reuse", shared=bool(slash))


FULL = Rule()


def range_of(step: int, total: int, ranges: int) -> int:
    """Range that step number ``step`` of ``total`` is in, when these are cut into ``ranges`` equal parts."""
    return min(step * ranges // total, ranges - 1)


@dataclass(frozen=True)
class LayerPlan:
    """One attention module: ``rules[range]`` holds one rule for all heads, or one for each."""

    rules: tuple[tuple[Rule, ...], ...]

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.rules} - {1}
        if not self.rules or 0 in widths or len(widths) > 1:
            raise SpaceError("a layer needs a rule, or one for each head, in every range of steps")

    @property
    def plain(self) -> bool:
        """Whether the module is as the model has it."""
        return all(rule == FULL for row in self.rules for rule in row)

    @property
    def heads(self) -> int:
        """Heads that have rules of their own; 1 when all share one."""
        return max(len(row) for row in self.rules)

    def at(self, step: int, total: int) -> tuple[Rule, ...]:
        """The rules of a step, ``heads`` of them."""
        row = self.rules[range_of(step, total, len(self.rules))]
        return row * (self.heads // len(row))

    def actions(self, total: int, start: int = 0) -> tuple[Action, ...]:
        """What to do at steps ``start`` to ``total - 1``; the first of them is always full."""
        rows = [self.at(step, total) for step in range(start, total)]
        rows[0] = tuple(Rule("full", shared=r.shared) for r in rows[0])
        return tuple(_action(rows, i) for i in range(len(rows)))


@dataclass(frozen=True)
class Action:
    """What one module does at one step, given what comes later.

    A tuple has an entry a head, or a single one for all heads.

    Attributes:
        rules: of the heads.
        saves: windows whose residual later steps add before the head's next full step, in order of first use;
            empty for heads that are not full.
        live: windows whose residual is still needed after this step.
        keep_output: the next step reuses the module's whole output.
        keep_heads: the next step that computes anything reuses the output of some head.
    """

    rules: tuple[Rule, ...]
    saves: tuple[tuple[int, ...], ...]
    live: tuple[tuple[int, ...], ...]
    keep_output: bool
    keep_heads: bool

    @cached_property
    def reuses(self) -> bool:
        """Nothing is computed: every head reuses."""
        return _reuses(self.rules)

    @cached_property
    def dense(self) -> bool:
        """Plain attention in all heads, of which nothing is saved."""
        return all(r.kind == "full" for r in self.rules) and not any(self.saves)


def _reuses(rules: Sequence[Rule]) -> bool:
    return all(r.kind == "reuse" for r in rules)


def _action(rows: Sequence[tuple[Rule, ...]], i: int) -> Action:
    live = tuple(_windows([row[h] for row in rows[i + 1 :]]) for h in range(len(rows[i])))
    saves = tuple(live[h] if rule.kind == "full" else () for h, rule in enumerate(rows[i]))
    computing = next((row for row in rows[i + 1 :] if not _reuses(row)), ())
    return Action(
        rules=rows[i],
        saves=saves,
        live=live,
        keep_output=i + 1 < len(rows) and _reuses(rows[i + 1]),
        keep_heads=any(r.kind == "reuse" for r in computing),
    )


def _windows(later: Sequence[Rule]) -> tuple[int, ...]:
    """Windows that add a residual before the next full step."""
    found: dict[int, None] = {}
    for rule in later:
        if rule.kind == "full":
            break
        if rule.residual:
            found[rule.window] = None
    return tuple(found)


@dataclass(frozen=True)
class ImageAttentionPlan:
    """Module path -> plan, for attention modules of a model; modules without one stay as they are."""

    layers: Mapping[str, LayerPlan]

    @property
    def plain(self) -> bool:
        return all(layer.plain for layer in self.layers.values())

    def held_bytes(
        self, shapes: Mapping[str, tuple[int, int, int]], total: int, batch: int, itemsize: int
    ) -> int:
        """The most bytes of residuals and outputs that are held between two of ``total`` steps.

        Args:
            shapes: module path -> (heads, features a head, tokens, a joint text's counted).
            batch: rows of the model's input, both halves of a guided batch counted.
            itemsize: bytes of a number.
        """
        steps = [0] * total
        for path, layer in self.layers.items():
            heads, dim, tokens = shapes[path]
            for i, count in enumerate(_held(layer, total)):
                steps[i] += count * batch * heads * dim * tokens * itemsize
        return max(steps, default=0)

    def to_json(self) -> dict[str, Any]:
        return {
            path: [[rule.label for rule in row] for row in layer.rules]
            for path, layer in sorted(self.layers.items())
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageAttentionPlan:
        """Inverse of ``to_json``. Raises ``SpaceError`` for what is none."""
        try:
            layers = {
                str(path): LayerPlan(tuple(tuple(Rule.parse(label) for label in row) for row in rows))
                for path, rows in data.items()
            }
        except (AttributeError, TypeError) as error:
            raise SpaceError(f"this is no attention plan: {type(error).__name__}: {error}") from None
        return cls(layers)


def _held(layer: LayerPlan, total: int) -> list[int]:
    """Tensors of the size of an attention output that a layer holds after each step."""
    actions = layer.actions(total)
    slots: list[list[int | None]] = []
    held = []
    for action in actions:
        if not action.reuses:
            slots = next_slots(slots, action)
        used = sum(any(window is not None for window in slot) for slot in slots)
        held.append(used + action.keep_output + action.keep_heads)
    return held


def next_slots(slots: Sequence[Sequence[int | None]], action: Action) -> list[list[int | None]]:
    """Which residuals are held after ``action``: ``slots[k][head]`` is a window, ``None`` for nothing.

    A full step puts a head's k-th window into slot k; what no later step adds is gone.
    """
    most = max(len(slots), *(len(s) for s in action.saves))
    fresh: list[list[int | None]] = [
        list(slots[k]) if k < len(slots) else [None] * len(action.rules) for k in range(most)
    ]
    for h, rule in enumerate(action.rules):
        for k in range(most):
            if rule.kind == "full":
                fresh[k][h] = action.saves[h][k] if k < len(action.saves[h]) else None
            elif fresh[k][h] not in action.live[h]:
                fresh[k][h] = None
    while fresh and not any(window is not None for window in fresh[-1]):
        fresh.pop()
    return fresh
