"""Latency as an additive table: kernel times by (operation, shape, option), summed over a candidate.

``total = overhead + sum over decisions of the times of the kernel calls that its option makes``. The
overhead (attention, norms, Python) is what a measured uncompressed run leaves after its own kernel times.
Study and residual predictor correct the sum by measured end-to-end samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from autocomp.description import Description
from autocomp.profile import ProfileResult, mean, standard_error
from autocomp.space import AdditiveTable, Value


def operation_keys(description: Description) -> list[str]:
    """Every kernel call that some option makes, once, in a stable order."""
    keys = {
        op
        for row in description.resources.values()
        for resources in row.values()
        if resources.executes
        for op in resources.ops
    }
    return sorted(keys)


def latency_table(
    description: Description, times: ProfileResult, metric: str, measured_base: float | None = None
) -> AdditiveTable:
    """Additive table of ``metric`` (ms) from kernel times.

    Args:
        times: rows are operation keys; the option is the metric's name; samples are ms a call. A metric
            that stands for several passes of the model (``description.rows``) has its sum times their number.
        measured_base: end-to-end ms of the first baseline (uncompressed); sets the overhead. ``None``
            leaves the overhead at zero: differences between candidates are the same.
    """
    passes = description.rows.get(metric, (1, 1.0))[1]
    costs: dict[str, dict[Value, float]] = {}
    errors: dict[str, dict[Value, float]] = {}
    for name, row in description.resources.items():
        for option, resources in row.items():
            if not resources.executes or not all(metric in times.rows.get(op, {}) for op in resources.ops):
                continue
            moments = [(n, times.rows[op][metric]) for op, n in resources.ops.items()]
            costs.setdefault(name, {})[option] = passes * sum(n * mean(m) for n, m in moments)
            variance = sum((n * standard_error(m)) ** 2 for n, m in moments)
            errors.setdefault(name, {})[option] = passes * variance**0.5
    table = AdditiveTable(metric, 0.0, costs, errors)
    return table if measured_base is None else rebase(table, description, measured_base)


def rebase(table: AdditiveTable, description: Description, measured: float) -> AdditiveTable:
    """The same table with its base set so that the first baseline has its measured value; unchanged where
    that baseline has an option without a time."""
    overhead = measured - (table.total(description.baselines[0]) - table.base)
    if not math.isfinite(overhead):
        return table
    return AdditiveTable(table.metric, overhead, table.costs, table.stderr)


def kernel_share(table: AdditiveTable, description: Description, measured: Mapping[str, float]) -> float:
    """Part of the uncompressed latency that is spent in kernels the search can change (0 to 1)."""
    total = measured.get(table.metric, 0.0)
    kernels = table.total(description.baselines[0]) - table.base
    return kernels / total if total > 0 else 0.0
