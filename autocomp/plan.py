"""From a job and a worker's description to a searchable problem; everything that can be refused early is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autocomp.description import Description
from autocomp.errors import InfeasibleError
from autocomp.objective import Constraint, Objective, check_metrics
from autocomp.searchers.base import Problem
from autocomp.space import AdditiveTable, Candidate, Choice, LinearBudget, SearchSpace, Value

NOISE_SIGMA = 2.0


@dataclass(frozen=True)
class Plan:
    """What a study works with once a worker has described itself.

    Attributes:
        space: options that nothing executes are gone when latency matters; exact bounds are budgets.
        baselines: uniform candidates to measure, the uncompressed one first.
        quality: metrics of objectives and constraints that a sensitivity table stands for.
        timing: timing metrics that some objective or constraint names.
        notes: what was left out and why, for the user.
    """

    space: SearchSpace
    baselines: tuple[Candidate, ...]
    quality: tuple[str, ...]
    timing: tuple[str, ...]
    notes: tuple[str, ...]


def make_plan(
    description: Description, objectives: Sequence[Objective], constraints: Sequence[Constraint]
) -> Plan:
    """Check metrics, drop what the device can't execute, turn exact bounds into budgets.

    Raises:
        ObjectiveError: an objective or constraint names an unknown metric.
        InfeasibleError: a budget lies below the smallest reachable value, or nothing can be executed.
    """
    check_metrics([*objectives, *constraints], list(description.metrics))
    named = [*(o.metric for o in objectives), *(c.metric for c in constraints)]
    timing = tuple(m for m in description.timing if m in named)
    space = description.space
    notes: list[str] = []
    baselines = description.baselines
    if timing:
        space, notes = executable_space(description)
        baselines = tuple(b for b in baselines if not space.violations(b))
    budgets = [
        budget
        for c in constraints
        if (table := description.exact.get(c.metric)) is not None
        for budget in [_budget(table, c, space)]
    ]
    known = {*description.exact, *description.timing, *description.counts}
    quality = tuple(dict.fromkeys(m for m in named if m not in known))
    told = (*description.notes, *notes)
    return Plan(space.with_constraints(budgets), baselines, quality, timing, told)


def executable_space(description: Description) -> tuple[SearchSpace, list[str]]:
    """The space without options that nothing executes on the device, and a note for each reason."""
    allowed: dict[str, list[Value]] = {}
    dropped: dict[tuple[Value, str], int] = {}
    for decision in description.space:
        row = description.resources.get(decision.name, {})
        options = [o for o in decision.options if o not in row or row[o].executes]
        for option in decision.options:
            if option not in options:
                key = (option, row[option].reason)
                dropped[key] = dropped.get(key, 0) + 1
        if not options and decision.options:
            reason = row[decision.options[0]].reason
            raise InfeasibleError(
                f"{decision.name}: {description.device} executes none of {list(decision.options)} ({reason});"
                " offer other options, or drop the latency objectives"
            )
        allowed[decision.name] = options
    space = description.space.restrict({n: o for n, o in allowed.items() if o})
    notes = [
        f"{option} is left out of {count} decision{'s' * (count > 1)}: {reason}"
        for (option, reason), count in dropped.items()
    ]
    return space, notes


def _budget(table: AdditiveTable, constraint: Constraint, space: SearchSpace) -> LinearBudget:
    """The constraint as an upper budget, after checking that some candidate can meet it."""
    sign = 1.0 if constraint.upper else -1.0
    turned = AdditiveTable(
        table.metric if constraint.upper else f"-{table.metric}",
        sign * table.base,
        {n: {o: sign * c for o, c in row.items()} for n, row in table.costs.items()},
        exact=True,
    )
    reachable = turned.base + sum(
        min(turned.cost(d.name, o) for o in d.options) for d in space if d.name in turned.costs
    )
    upper = sign * constraint.bound
    if reachable > upper + 1e-9 * max(1.0, abs(upper)):
        word = "smallest" if constraint.upper else "largest"
        raise InfeasibleError(
            f"the constraint '{constraint}' can't be met: the {word} reachable {table.metric} is"
            f" {sign * reachable:.6g}; loosen it, or offer smaller options"
        )
    return LinearBudget(turned, upper)


def make_problem(
    plan: Plan,
    description: Description,
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
    profiles: Mapping[str, AdditiveTable],
    seed: int,
) -> Problem:
    """The searcher's problem: exact tables, latency tables, and the sensitivity in place of each quality."""
    tables: dict[str, AdditiveTable] = {m: _within(t, plan.space) for m, t in description.exact.items()}
    for metric, table in profiles.items():
        if metric != "sensitivity":
            tables[metric] = _within(table, plan.space)
    if "sensitivity" in profiles:
        for metric in plan.quality:
            smaller_is_better = description.metrics.get(metric, True)
            for name in (metric, *_at_lengths(profiles["sensitivity"], metric)):
                tables[name] = _as_quality(profiles["sensitivity"], plan.space, name, smaller_is_better)
    baselines = tuple(b for b in plan.baselines if not plan.space.violations(b))
    can_profile = "neighbourhood" in description.profiles and "kl" in plan.quality
    return Problem(
        plan.space, tuple(objectives), tuple(constraints), tables, baselines, seed, (), can_profile
    )


def _within(table: AdditiveTable, space: SearchSpace) -> AdditiveTable:
    """The table without options that are not in the space."""

    def keep(rows: Mapping[str, Mapping[Value, float]]) -> dict[str, dict[Value, float]]:
        return {
            d.name: {o: rows[d.name][o] for o in d.options if o in rows[d.name]}
            for d in space
            if d.name in rows
        }

    return AdditiveTable(table.metric, table.base, keep(table.costs), keep(table.stderr), table.exact)


def _as_quality(
    sensitivity: AdditiveTable, space: SearchSpace, metric: str, smaller_is_better: bool
) -> AdditiveTable:
    """Sensitivities (a loss) in the metric's own direction, without differences that are only noise.

    Along ordered options (smallest storage first) an option that seems to hurt more than a smaller one, but
    within ``NOISE_SIGMA`` of their errors, takes the smaller one's cost: noise must not make a searcher pay
    for storage or shun it. A clear difference stays: per-row 4 bits can lose to grouped 3 bits.

    A metric at one length (``kl_1024``) takes the rows that were profiled there (``{decision}@1024``), and
    the plain ones of decisions that have none; a metric may have rows of its own (``{decision}@content``).
    """
    table = _within(_own_rows(_at_length(sensitivity, metric), metric), space)
    sign = 1.0 if smaller_is_better else -1.0
    costs = {}
    for name, row in table.costs.items():
        fixed = {o: max(0.0, cost) for o, cost in row.items()}
        domain = space.by_name[name].domain
        if isinstance(domain, Choice) and domain.ordered:
            fixed = _without_noise(fixed, table.stderr.get(name, {}))
        costs[name] = {o: sign * cost for o, cost in fixed.items()}
    return AdditiveTable(metric, 0.0 if smaller_is_better else 1.0, costs, table.stderr)


def _at_lengths(sensitivity: AdditiveTable, metric: str) -> list[str]:
    """``kl_1024``, ``kl_2048``: the metric at each length that was profiled, where there are several."""
    found = {int(n.rpartition("@")[2]) for n in sensitivity.costs if n.rpartition("@")[2].isdigit()}
    return [f"{metric}_{n}" for n in sorted(found)] if len(found) > 1 else []


def _at_length(table: AdditiveTable, metric: str) -> AdditiveTable:
    """The table with the rows of the metric's own length in place of the plain ones."""
    length = metric.rpartition("_")[2]
    return _own_rows(table, length) if length.isdigit() else table


def _own_rows(table: AdditiveTable, mark: str) -> AdditiveTable:
    """The table with the rows ``{decision}@{mark}`` in place of the plain ones."""

    def own(rows: Mapping[str, Mapping[Value, float]]) -> dict[str, Mapping[Value, float]]:
        end = f"@{mark}"
        return {**rows, **{n.removesuffix(end): row for n, row in rows.items() if n.endswith(end)}}

    return AdditiveTable(table.metric, table.base, own(table.costs), own(table.stderr), table.exact)


def _without_noise(row: Mapping[Value, float], stderr: Mapping[Value, float]) -> dict[Value, float]:
    best, error, fixed = math.inf, 0.0, {}
    for option, cost in row.items():
        own = stderr.get(option, 0.0)
        if cost <= best:
            best, error = cost, own
        fixed[option] = best if cost - best <= NOISE_SIGMA * math.hypot(own, error) else cost
    return fixed
