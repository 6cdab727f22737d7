"""Objectives, constraints and selections, parsed from the strings that users write.

``min kl`` · ``max accuracy`` · ``memory_mb <= 200`` · ``kl <= 0.1, min decode_ms``
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autocomp.errors import ObjectiveError

_NAME = r"[A-Za-z_][A-Za-z0-9_./-]*"
_OBJECTIVE = re.compile(rf"^(min|max|minimize|maximize)\s+({_NAME})$")
_NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_CONSTRAINT = re.compile(rf"^({_NAME})\s*(<=|>=|<|>)\s*({_NUMBER})$")


@dataclass(frozen=True)
class Objective:
    """A metric and its direction."""

    metric: str
    minimize: bool = True

    @classmethod
    def parse(cls, text: str) -> Objective:
        match = _OBJECTIVE.match(text.strip())
        if match is None:
            raise ObjectiveError(f"can't read the objective {text!r}; write 'min METRIC' or 'max METRIC'")
        return cls(match[2], match[1].startswith("min"))

    def loss(self, value: float) -> float:
        """The value with its sign turned so that smaller is better."""
        return value if self.minimize else -value

    def __str__(self) -> str:
        return f"{'min' if self.minimize else 'max'} {self.metric}"


@dataclass(frozen=True)
class Constraint:
    """A bound on a measured or computed metric. ``<`` and ``>`` are read as ``<=`` and ``>=``."""

    metric: str
    upper: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> Constraint:
        match = _CONSTRAINT.match(text.strip())
        if match is None:
            raise ObjectiveError(
                f"can't read the constraint {text!r}; write 'METRIC <= NUMBER' or 'METRIC >= NUMBER'"
            )
        return cls(match[1], match[2].startswith("<"), float(match[3]))

    def violation(self, value: float) -> float:
        """How far ``value`` is outside the bound (0 inside), in the metric's unit. NaN is outside.

        A billionth of the bound is forgiven: a sum of many floats that meets its bound exactly (4.0 bits on
        average) may come out a rounding error beyond it.
        """
        if value != value:
            return float("inf")
        gap = value - self.bound if self.upper else self.bound - value
        return gap if gap > 1e-9 * max(1.0, abs(self.bound)) else 0.0

    def __str__(self) -> str:
        return f"{self.metric} {'<=' if self.upper else '>='} {self.bound:.15g}"


@dataclass(frozen=True)
class Selection:
    """How to pick one point of a front: bounds first, then one objective. ``kl <= 0.1, min decode_ms``."""

    constraints: tuple[Constraint, ...]
    objective: Objective

    @classmethod
    def parse(cls, text: str) -> Selection:
        parts = [p.strip() for p in text.split(",") if p.strip()]
        objectives = [Objective.parse(p) for p in parts if _OBJECTIVE.match(p)]
        constraints = tuple(Constraint.parse(p) for p in parts if not _OBJECTIVE.match(p))
        if len(objectives) != 1:
            raise ObjectiveError(
                f"the selection {text!r} has {len(objectives)} objectives; write bounds and one objective,"
                " like 'kl <= 0.1, min decode_ms'"
            )
        return cls(constraints, objectives[0])

    def admits(self, metrics: Mapping[str, float]) -> bool:
        return all(c.violation(metrics.get(c.metric, float("nan"))) == 0 for c in self.constraints)

    def __str__(self) -> str:
        return ", ".join(map(str, [*self.constraints, self.objective]))


def check_metrics(wanted: Sequence[Objective | Constraint], known: Sequence[str]) -> None:
    """Raise ``ObjectiveError`` when an objective or constraint names a metric that nobody measures."""
    for item in wanted:
        if item.metric not in known:
            raise ObjectiveError(f"unknown metric {item.metric!r} in '{item}'; known: {sorted(known)}")
