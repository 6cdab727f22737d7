"""Costs at the operating point: profiles around measured candidates, blended into one table.

Sensitivities of the uncompressed model rank single changes of that model; around a compressed candidate
the same changes cost something else. Profiles around successive incumbents, averaged, allocate better than
any one of them: each is exact only next to its own centre.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from autocomp.searchers.base import LocalModel
from autocomp.searchers.common import scaled, span, summed
from autocomp.space import AdditiveTable, Value


def blended(table: AdditiveTable, local: Sequence[LocalModel]) -> AdditiveTable:
    """``table`` with the mean of the local profiles of its metric in its place; itself without any.

    Each profile is first shifted so that the cheapest option of a decision costs nothing and scaled to
    the span of ``table`` (a change costs more around a 3-bit than around an 8-bit candidate). Entries
    that a profile lacks keep the cost of ``table``, shifted likewise.
    """
    profiles = [m.table for m in local if m.table.metric == table.metric]
    if not profiles:
        return table
    target = span(table)
    floor = _shifted(table, table)
    filled = [_shifted(p, table) for p in profiles]
    parts = [scaled(_completed(p, floor), target / span(p)) for p in filled]
    mean = summed(parts, [1.0 / len(parts)] * len(parts), table.metric)
    return AdditiveTable(table.metric, 0.0, mean.costs)


def _shifted(profile: AdditiveTable, like: AdditiveTable) -> AdditiveTable:
    """Known costs of the decisions of ``like``, less the cheapest option's."""
    costs: dict[str, dict[Value, float]] = {}
    for name in like.costs:
        row = {o: c for o, c in profile.costs.get(name, {}).items() if math.isfinite(c)}
        least = min(row.values(), default=0.0)
        costs[name] = {o: c - least for o, c in row.items()}
    return AdditiveTable(like.metric, 0.0, costs)


def _completed(profile: AdditiveTable, floor: AdditiveTable) -> AdditiveTable:
    costs = {name: {**row, **profile.costs.get(name, {})} for name, row in floor.costs.items()}
    return AdditiveTable(profile.metric, 0.0, costs)
