"""One knapsack instance: presolve, then branch and bound by HiGHS through PuLP (CBC when HiGHS is missing).

Of PuLP only ``LpProblem``, ``add_variable``, ``lpSum``, ``getSolver`` and ``value`` are used, which
releases 3.3 and 4 share. HiGHS runs on one thread: that is deterministic, and more threads can hang it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import CapabilityError, InfeasibleError
from autocomp.searchers.blocks import Limit
from autocomp.searchers.columns import first_master, whole_master
from autocomp.searchers.mckp import Dual, Floats, Ints, Knapsack, Row, greedy, solve_dual, undominated

Mask = NDArray[np.bool_]

FIRST_GAP = 0.02
"""Gap of the solve over some joint choices, which only says how dear those of a better solution may be."""


def solve_knapsack(
    problem: Knapsack, gap: float, time_limit: float, explain: bool = True
) -> tuple[Ints, float]:
    """Best assignment ``[groups]`` found, and a proven lower bound on its cost.

    Raises:
        InfeasibleError: nothing meets the rows; names the smallest reachable total, which takes further
            solves, when it is to ``explain``.
        CapabilityError: no solver is installed.
    """
    _check_rows(problem)
    found, bound = _search(problem, gap, time_limit)
    if found is None:
        if explain:
            _explain(problem, time_limit)
        raise InfeasibleError(f"nothing meets {', '.join(str(r) for r in problem.rows)} together")
    return found, bound


def _search(
    problem: Knapsack, gap: float, time_limit: float, dual: Dual | None = None
) -> tuple[Ints | None, float]:
    """As ``solve_knapsack``; ``None`` where nothing is found. ``dual``: a good one, when it is known."""
    if dual is None:
        problem = replace(problem, rows=tuple(r for r in problem.rows if _may_bind(problem, r)))
        dual = solve_dual(problem)
    if not dual.bound <= _dearest(problem):  # the relaxation is infeasible already
        return None, math.inf
    if problem.structure.blocks:
        return _search_blocks(problem, dual, gap, time_limit)
    known = greedy(problem, dual)
    if known is not None and _close(problem, known, dual.bound, gap):
        return known, max(dual.bound, 0.0)
    return _finish(problem, dual, known, undominated(problem), gap, time_limit)


def _search_blocks(problem: Knapsack, dual: Dual, gap: float, time_limit: float) -> tuple[Ints | None, float]:
    """Solve over a few joint choices of each block, then over all that can be part of something better."""
    first = first_master(problem, dual)
    found, _ = _search(first.knapsack, max(gap, FIRST_GAP), time_limit, first.dual(dual))
    known = None if found is None else first.expand(found)
    if known is not None and not problem.feasible(known):  # a block whose limits were too many to be priced
        known = None
    if known is not None and _close(problem, known, dual.bound, gap):
        return known, max(dual.bound, 0.0)
    ceiling = _dearest(problem) if known is None else problem.value(known) + _tiny(problem)
    whole = whole_master(problem, dual, ceiling)
    if whole is None:
        return _finish(problem, dual, known, problem.mask, gap, time_limit)
    found, bound = _search(whole.knapsack, gap, time_limit, whole.dual(dual))
    if found is not None and (known is None or whole.knapsack.value(found) < problem.value(known)):
        known = whole.expand(found)
    return known, max(dual.bound, min(bound, ceiling), 0.0)


def _finish(
    problem: Knapsack, dual: Dual, known: Ints | None, keep: Mask, gap: float, time_limit: float
) -> tuple[Ints | None, float]:
    """Branch and bound over what may be in a solution better than ``known``."""
    bound = max(dual.bound, 0.0)
    if known is not None:
        keep = keep & (dual.bound + dual.reduced <= problem.value(known) + _tiny(problem))
        keep[known] = True
    found, proven = _branch_and_bound(problem, keep, known, gap, time_limit)
    # What was dropped costs at least the known solution; what was kept costs at least `proven`.
    ceiling = problem.value(known) if known is not None else math.inf
    return found, max(bound, min(proven, ceiling))


def _close(problem: Knapsack, known: Ints, bound: float, gap: float) -> bool:
    value = problem.value(known)
    return value - max(bound, 0.0) <= gap * value + _tiny(problem)


def _tiny(problem: Knapsack) -> float:
    return 1e-12 * float(problem.cost.sum() or 1.0)


def _may_bind(problem: Knapsack, row: Row) -> bool:
    """Whether some assignment is over the row."""
    heaviest = -problem.cheapest(-row.weight)[1]
    return float(heaviest.sum()) > row.upper


def _dearest(problem: Knapsack) -> float:
    """No assignment costs more than this."""
    most = np.maximum.reduceat(np.where(problem.mask, problem.cost, 0.0), problem.groups.start)
    return float(most.sum()) * (1.0 + 1e-6) + 1e-300


def _check_rows(problem: Knapsack) -> None:
    """Raise ``InfeasibleError`` when a row by itself is over with the lightest option everywhere."""
    for row in problem.rows:
        reachable = problem.optimum(row.weight)[1]
        if math.isinf(reachable):
            raise InfeasibleError("no choice meets the limits on different values; allow more of them")
        if reachable > row.upper + row.slack:
            raise InfeasibleError(_too_tight(row, reachable, ""))


def _too_tight(row: Row, reachable: float, others: str) -> str:
    return (
        f"{row} can't be met{others}: the smallest reachable total is {row.base + reachable:.6g}; "
        "raise the budget or allow cheaper options"
    )


def _branch_and_bound(
    problem: Knapsack, keep: Mask, known: Ints | None, gap: float, time_limit: float
) -> tuple[Ints | None, float]:
    """Solve the core with PuLP; a budget that rounding breaks by a hair is tightened and solved again."""
    margin = np.zeros(len(problem.rows))
    proven = -math.inf
    for attempt in range(4):
        x, bound = _solve_core(problem, keep, margin, gap, time_limit)
        proven = bound if attempt == 0 else proven
        if x is None:
            break
        if problem.feasible(x):
            better = known is None or problem.value(x) <= problem.value(known)
            return (x if better else known), proven
        over = np.array([float(r.weight[x].sum()) - r.upper for r in problem.rows])
        margin += np.where(over > 0, 1.5 * over, 0.0)
    return known, proven


def _solve_core(
    problem: Knapsack, keep: Mask, margin: Floats, gap: float, time_limit: float
) -> tuple[Ints | None, float]:
    import pulp

    groups = problem.groups
    core = np.flatnonzero(keep)
    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    take = {int(i): model.add_variable(f"x{i}", cat="Binary") for i in core}
    scale = float(problem.cost[core].mean()) or 1.0
    model += pulp.lpSum(float(problem.cost[i]) / scale * v for i, v in take.items() if problem.cost[i])
    for members in np.split(core, np.flatnonzero(np.diff(groups.owner[core])) + 1):
        model += pulp.lpSum(take[int(i)] for i in members) == 1
    for row, less in zip(problem.rows, margin, strict=True):
        # Less the lightest option of each group, in the row's own unit: small, well-scaled numbers.
        least = np.minimum.reduceat(np.where(keep, row.weight, np.inf), groups.start)
        weight = row.weight - least[groups.owner]
        unit = float(weight[core].mean()) or 1.0
        room = (row.upper - float(least.sum()) - float(less)) / unit
        model += pulp.lpSum(float(weight[i]) / unit * v for i, v in take.items() if weight[i]) <= room
    for number, limit in enumerate(problem.structure.limits):
        _limit_values(model, pulp, problem, take, number, limit)
    for x in problem.exclude:
        if all(int(i) in take for i in x):
            model += pulp.lpSum(take[int(i)] for i in x) <= len(x) - 1
    ok, bound = _run(model, pulp, gap, time_limit)
    if not ok:
        return None, bound
    level = np.full(len(groups.owner), -1.0)
    level[core] = [take[int(i)].varValue or 0.0 for i in core]
    order = np.lexsort((-level, groups.owner))
    return order[groups.start], bound * scale


def _limit_values(
    model: Any,
    pulp: Any,
    problem: Knapsack,
    take: Mapping[int, Any],
    number: int,
    limit: Limit,
) -> None:
    """Binary ``used[key]`` is at least a group's options with that key; at most k of them are one."""
    used: dict[str, Any] = {}
    for g, keys in zip(limit.groups, limit.keys, strict=True):
        carried: dict[str, list[Any]] = {}
        for o, key in enumerate(keys):
            option = take.get(int(problem.groups.start[g]) + o)
            if option is not None:
                carried.setdefault(key, []).append(option)
        for key, options in carried.items():
            if key not in used:
                used[key] = model.add_variable(f"used{number}_{len(used)}", cat="Binary")
            model += pulp.lpSum(options) <= used[key]
    model += pulp.lpSum(used.values()) <= limit.k


def _run(model: Any, pulp: Any, gap: float, time_limit: float) -> tuple[bool, float]:
    """Solve; returns whether there is a solution and the proven bound in the model's own units."""
    for name in ("HiGHS", "PULP_CBC_CMD", "COIN_CMD"):
        try:
            solver = pulp.getSolver(name, msg=False, threads=1, timeLimit=time_limit, gapRel=gap)
        except pulp.PulpError:
            continue
        if solver.available():
            break
    else:
        raise CapabilityError("no ILP solver found; install one with `pip install highspy`")
    result = model.solve(solver)
    if hasattr(result, "has_solution"):  # PuLP 4
        return bool(result.has_solution), float(
            result.best_bound if result.best_bound is not None else -math.inf
        )
    ok = model.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    engine: Any = getattr(model, "solverModel", None)
    if ok and hasattr(engine, "getInfo"):
        return ok, float(engine.getInfo().mip_dual_bound)
    proven = ok and model.sol_status == pulp.LpSolutionOptimal
    return ok, float(pulp.value(model.objective) or 0.0) * (1.0 - gap) if proven else -math.inf


def _explain(problem: Knapsack, time_limit: float) -> NoReturn:
    """Raise ``InfeasibleError`` that names the first budget which can't be met, and what can be reached."""
    for i, row in enumerate(problem.rows):
        least = problem.cheapest(row.weight)[1]
        shifted = row.weight - least[problem.groups.owner]
        relaxed = replace(
            problem, cost=np.where(problem.mask, shifted, 0.0), rows=problem.rows[:i], exclude=()
        )
        x, _ = _search(relaxed, 0.0, time_limit)
        if x is None:
            break
        reachable = float(row.weight[x].sum())
        if reachable > row.upper + row.slack:
            others = f" together with {', '.join(str(r) for r in problem.rows[:i])}" if i else ""
            raise InfeasibleError(_too_tight(row, reachable, others))
    rows = ", ".join(str(r) for r in problem.rows) or "the space's structure"
    raise InfeasibleError(
        f"nothing meets {rows}, {len(problem.exclude)} candidates excluded, in {time_limit} s"
    )
