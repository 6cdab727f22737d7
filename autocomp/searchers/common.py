"""What several searchers need: tables as losses, budgets known before measuring, spreading, fingerprints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autocomp.objective import Constraint, Objective
from autocomp.searchers.base import Problem
from autocomp.space import AdditiveTable, Candidate, Value
from autocomp.trial import Trial

Budget = tuple[AdditiveTable, float]
Floats = NDArray[np.float64]


def seen_fingerprints(history: Sequence[Trial], pending: Sequence[Candidate]) -> set[str]:
    return {t.candidate.fingerprint for t in history} | {c.fingerprint for c in pending}


def scaled(table: AdditiveTable, factor: float, metric: str | None = None) -> AdditiveTable:
    """The table with base, costs and errors multiplied by ``factor``."""

    def times(rows: Mapping[str, Mapping[Value, float]], by: float) -> dict[str, dict[Value, float]]:
        return {n: {o: by * c for o, c in row.items()} for n, row in rows.items()}

    return AdditiveTable(
        metric or table.metric,
        factor * table.base,
        times(table.costs, factor),
        times(table.stderr, abs(factor)),
        table.exact,
    )


def summed(tables: Sequence[AdditiveTable], weights: Sequence[float], metric: str) -> AdditiveTable:
    """The weighted sum of tables; a decision that one of them lacks costs nothing in it."""
    parts = [scaled(t, w) for t, w in zip(tables, weights, strict=True)]
    costs: dict[str, dict[Value, float]] = {}
    for name in sorted({n for p in parts for n in p.costs}):
        rows = [p.costs[name] for p in parts if name in p.costs]
        options = {o: None for row in rows for o in row}
        costs[name] = {o: math.fsum(row.get(o, math.nan) for row in rows) for o in options}
    return AdditiveTable(metric, sum(p.base for p in parts), costs, exact=all(p.exact for p in parts))


def span(table: AdditiveTable) -> float:
    """Sum over decisions of the range of their finite costs: the table's natural unit (1 when it is flat)."""
    total = 0.0
    for row in table.costs.values():
        finite = [c for c in row.values() if math.isfinite(c)]
        total += max(finite) - min(finite) if finite else 0.0
    return total or 1.0


def loss_tables(objectives: Iterable[Objective], tables: Mapping[str, AdditiveTable]) -> list[AdditiveTable]:
    """A table of the loss for each objective that has a table (negated for an objective to maximise)."""
    found = [(o, tables[o.metric]) for o in objectives if o.metric in tables]
    return [t if o.minimize else scaled(t, -1.0) for o, t in found]


def table_budgets(
    constraints: Iterable[Constraint], tables: Mapping[str, AdditiveTable], *, exact: bool | None = None
) -> list[Budget]:
    """Bounds on metrics that have a table; ``exact`` keeps only exact or only modelled tables."""
    budgets = []
    for c in constraints:
        table = tables.get(c.metric)
        if table is not None and (exact is None or table.exact == exact):
            budgets.append((table, c.bound) if c.upper else (scaled(table, -1.0), -c.bound))
    return budgets


def admissible(problem: Problem, candidate: Candidate) -> bool:
    """True when the candidate is in the space and meets every bound that is known before measuring."""
    if problem.space.violations(candidate):
        return False
    budgets = table_budgets(problem.constraints, problem.tables, exact=True)
    totals = [(table.total(candidate), upper) for table, upper in budgets]
    return all(total <= upper + 1e-9 * max(1.0, abs(upper)) for total, upper in totals)


def spread_order(losses: Floats, taken: Floats | None = None) -> list[int]:
    """Rows of ``losses [n, m]`` so that every prefix covers the front: farthest point first.

    Each objective is scaled to its range. Starts with the best row of each objective, or, with rows
    ``taken [k, m]`` that are there already, with what is farthest from those.
    """
    if len(losses) == 0:
        return []
    everything = losses if taken is None or not len(taken) else np.vstack([losses, taken])
    low, width = everything.min(axis=0), np.ptp(everything, axis=0)
    unit = np.where(width > 0, width, 1.0)
    points = (losses - low) / unit
    order: list[int] = []
    distance = np.full(len(points), np.inf)
    for row in [] if taken is None else (np.asarray(taken) - low) / unit:
        distance = np.minimum(distance, np.linalg.norm(points - row, axis=1))
    queue = (
        [] if taken is not None and len(taken) else list(dict.fromkeys(np.argmin(points, axis=0).tolist()))
    )
    while len(order) < len(points):
        pick = queue.pop(0) if queue else int(np.argmax(distance))
        order.append(pick)
        distance = np.minimum(distance, np.linalg.norm(points - points[pick], axis=1))
        distance[order] = -1.0
    return order
