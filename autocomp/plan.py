"""From a job and a worker's description to a searchable problem; everything that can be refused early is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autocomp.description import Description
from autocomp.errors import InfeasibleError
from autocomp.objective import Constraint, Objective, check_metrics
from autocomp.searchers.base import Problem
from autocomp.space import AdditiveTable, Candidate, LinearBudget, SearchSpace, Value


@dataclass(frozen=True)
class Plan:
    """What a study works with once a worker has described itself.

    Attributes:
        space: options that nothing executes are gone when latency matters; exact bounds are budgets.
        baselines: uniform candidates to measure, the uncompressed one first.
        quality: objective metrics that a sensitivity table stands for.
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
    named = [item.metric for item in (*objectives, *constraints)]
    timing = tuple(m for m in description.timing if m in named)
    space, notes = description.space, []
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
    quality = tuple(
        o.metric
        for o in objectives
        if o.metric not in description.exact and o.metric not in description.timing
    )
    return Plan(space.with_constraints(budgets), baselines, quality, timing, tuple(notes))


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
            tables[metric] = _as_quality(
                _within(profiles["sensitivity"], plan.space), metric, smaller_is_better
            )
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


def _as_quality(table: AdditiveTable, metric: str, smaller_is_better: bool) -> AdditiveTable:
    """Sensitivities (a loss) in the metric's own direction; made monotone along ordered options.

    A larger format can't truly hurt quality; where a noisy estimate says so, it takes the value of the
    next smaller one (isotonic from the costly end would hide real losses, so the minimum is carried).
    """
    sign = 1.0 if smaller_is_better else -1.0
    costs = {}
    for name, row in table.costs.items():
        best, fixed = math.inf, {}
        for option, cost in row.items():
            best = min(best, max(0.0, cost))
            fixed[option] = sign * best
        costs[name] = fixed
    base = 0.0 if smaller_is_better else 1.0
    return AdditiveTable(metric, base, costs, table.stderr)
