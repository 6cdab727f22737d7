"""Results of profile jobs (sensitivities, kernel times) as sums that add up across workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autocomp.space import AdditiveTable, Value

Moments = tuple[int, float, float]
"""Count, sum, sum of squares."""


@dataclass(frozen=True)
class ProfileRequest:
    """One profile job: which profile, which part of it (``shard`` of ``shards``), and around which candidate
    (``at``: its fingerprint; empty for the uncompressed model)."""

    kind: str
    shard: int = 0
    shards: int = 1
    at: str = ""

    @property
    def id(self) -> str:
        where = f"@{self.at}" if self.at else ""
        return f"profile/{self.kind}{where}/{self.shard}-of-{self.shards}"


@dataclass(frozen=True)
class ProfileResult:
    """Moments of samples for each (row, option). Rows are decision names or operation keys.

    Two shards merge by adding their moments, whether they split the samples or the rows.
    """

    kind: str
    rows: Mapping[str, Mapping[Value, Moments]]
    seconds: float = 0.0
    details: Mapping[str, Any] | None = None

    @staticmethod
    def merge(results: Iterable[ProfileResult]) -> ProfileResult:
        """Raises ``ValueError`` when the results are of different kinds or there are none."""
        parts = list(results)
        kinds = {p.kind for p in parts}
        if len(kinds) != 1:
            raise ValueError(f"can't merge profiles of kinds {sorted(kinds)}")
        rows: dict[str, dict[Value, Moments]] = {}
        for part in parts:
            for name, options in part.rows.items():
                row = rows.setdefault(name, {})
                for option, (n, s, q) in options.items():
                    n0, s0, q0 = row.get(option, (0, 0.0, 0.0))
                    row[option] = (n0 + n, s0 + s, q0 + q)
        details = {k: v for p in parts for k, v in (p.details or {}).items()}
        return ProfileResult(kinds.pop(), rows, sum(p.seconds for p in parts), details)

    def table(self, metric: str, base: float = 0.0) -> AdditiveTable:
        """Means and their standard errors as an additive table of ``metric``."""
        costs = {r: {o: mean(m) for o, m in row.items()} for r, row in self.rows.items()}
        stderr = {r: {o: standard_error(m) for o, m in row.items()} for r, row in self.rows.items()}
        return AdditiveTable(metric, base, costs, stderr)

    def to_json(self) -> dict[str, Any]:
        rows = {r: [[o, *m] for o, m in row.items()] for r, row in self.rows.items()}
        return {"kind": self.kind, "rows": rows, "seconds": self.seconds, "details": self.details or {}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProfileResult:
        rows = {r: {o: (n, s, q) for o, n, s, q in row} for r, row in data["rows"].items()}
        return cls(data["kind"], rows, data["seconds"], data["details"])


def mean(moments: Moments) -> float:
    n, total, _ = moments
    return total / n if n else math.nan


def standard_error(moments: Moments) -> float:
    """Standard error of the mean; 0 when there is a single sample."""
    n, total, squares = moments
    if n < 2:
        return 0.0
    return math.sqrt(max(0.0, squares / n - (total / n) ** 2) / (n - 1))
