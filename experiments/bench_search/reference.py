"""Reference fronts that no formula gives, by methods that know the problem; writes ``references.json``.

    python reference.py interaction noisy --seeds 0 1 2 3 4 5 6 7 8 9
    python reference.py schedule --seeds 0

*interaction, noisy*: for a price of memory (and time) and a number of 2-bit groups the best allocation is a
shortest path through the blocks, because only neighbours interact. A sweep over prices gives every point on
the convex hulls, one hull for each number of 2-bit groups; single changes of these fill the gaps. With two
objectives the prices also prove a bound that no front can beat (Lagrangian duality; Everett, Operations
Research 11, 1963); it is stored as ``upper``.

*smollm2* and other names in ``problems.MODELLED``: from the best measured ones on, all changes of one
decision and random ones of two, until they add next to nothing to the hypervolume.

*schedule*: times by quasi-Newton from several starts for each list of solvers, lists by local search, for
each number of evaluations.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from allocation import BITS, FIXED_MS, GROUPS, Allocation, group_units, instance_of, summed_groups
from bench_problem import REFERENCES, Floats, corner_of, judge, judged
from numpy.typing import NDArray
from problems import MODELLED
from recorded_table import loaded, logarithmic, usable
from scipy.optimize import minimize
from steps import GAP, LEAST, MODEL_ERROR, SLOTS, SOLVERS, evaluations, solve_errors
from surrogate import choices, codes_of, truth_of

from autocomp.objective import Objective
from autocomp.pareto import hypervolume, non_dominated

ALLOCATIONS = ("interaction", "noisy")
KEPT = 64
"""Points of a front that are stored, for plots and for what perfect knowledge could do."""
MODELLED_KEPT = 400
"""The same for the front of a regression."""


@dataclass(frozen=True)
class Chain:
    """Blocks of an instance as stages of a path; a state is an allocation of one block.

    Attributes:
        codes: options of a state's groups, ``[blocks][states, groups]``; states that another one beats in
            everything are left out.
        error, units, low, time: of each state, ``[blocks][states]``: divergence, unit bits, groups at 2
            bits, ms.
    """

    instance: Allocation
    codes: list[NDArray[np.intp]]
    error: list[Floats]
    units: list[Floats]
    low: list[NDArray[np.intp]]
    time: list[Floats]

    @classmethod
    def of(cls, instance: Allocation, *, timed: bool) -> Chain:
        every = np.array(list(product(range(len(BITS)), repeat=len(GROUPS))))
        units = (np.array(BITS)[every] * group_units()).sum(axis=1).astype(float)
        low = (every == 0).sum(axis=1)
        chain = cls(instance, [], [], [], [], [])
        groups = np.arange(len(GROUPS))
        for error, time_ in zip(instance.group_error, summed_groups(instance.time)):
            e, t = error[groups, every].sum(axis=1), time_[groups, every].sum(axis=1)
            columns = [e, units, low.astype(float), *([t] if timed else [])]
            keep = np.flatnonzero(non_dominated(np.column_stack(columns)))
            chain.codes.append(every[keep])
            for rows, column in zip((chain.error, chain.units, chain.low, chain.time), (e, units, low, t)):
                rows.append(column[keep])
        return chain

    def best(self, unit_price: float, time_price: float) -> tuple[Floats, NDArray[np.intp]]:
        """For each number of 2-bit groups the least priced sum ``[n]``, and its allocation.

        Allocations are ``[n, blocks, groups]``. Sums that can't be had are infinite, and their allocations
        mean nothing.
        """
        most = sum(int(low.max()) for low in self.low) + 1
        value = np.full((most, len(self.error[0])), np.inf)
        prices = [e + unit_price * u + time_price * t for e, u, t in zip(self.error, self.units, self.time)]
        value[self.low[0], np.arange(len(self.low[0]))] = prices[0]
        came: list[NDArray[np.intp]] = []
        for b in range(1, len(self.error)):
            pair = 2.0 * self.instance.coherence[b - 1] * np.sqrt(np.outer(self.error[b - 1], self.error[b]))
            through = value[:, :, None] + pair[None]
            before = through.argmin(axis=1)
            least = np.take_along_axis(through, before[:, None, :], axis=1)[:, 0] + prices[b]
            value, came_here = np.full_like(least, np.inf), np.zeros_like(before)
            for count in np.unique(self.low[b]):
                states = np.flatnonzero(self.low[b] == count)
                value[count:, states] = least[: most - count, states]
                came_here[count:, states] = before[: most - count, states]
            came.append(came_here)
        return value.min(axis=1), self._traced(value.argmin(axis=1), came)

    def _traced(self, state: NDArray[np.intp], came: list[NDArray[np.intp]]) -> NDArray[np.intp]:
        """Allocations whose last states are ``state [n]``, ``[n, blocks, groups]``."""
        count = np.arange(len(state))
        found = np.zeros((len(state), self.instance.blocks, len(GROUPS)), dtype=np.intp)
        for b in reversed(range(self.instance.blocks)):
            found[:, b] = self.codes[b][state]
            if b:
                before = came[b - 1][count, state]
                count = np.maximum(count - self.low[b][state], 0)
                state = before
        return found


def losses_of(instance: Allocation, codes: NDArray[np.intp], *, timed: bool) -> Floats:
    """True losses ``[n, objectives]`` of allocations ``[n, blocks, groups]``."""
    blocks, groups = np.arange(instance.blocks)[:, None], np.arange(len(GROUPS))[None]
    at_block = instance.group_error[blocks, groups, codes].sum(axis=2)
    kl = at_block.sum(axis=1)
    kl += 2.0 * (instance.coherence * np.sqrt(at_block[:, :-1] * at_block[:, 1:])).sum(axis=1)
    kl *= instance.cliff_factor((codes == 0).mean(axis=(1, 2)))
    units = (np.array(BITS)[codes] * group_units()).sum(axis=(1, 2))
    columns = [kl, np.asarray(instance.memory_mb(units.astype(float)))]
    if timed:
        ms = summed_groups(instance.time)[blocks, groups, codes].sum(axis=(1, 2))
        columns.append(FIXED_MS + ms)
    return np.column_stack(columns)


def with_neighbours(instance: Allocation, codes: NDArray[np.intp]) -> NDArray[np.intp]:
    """The front among ``codes [n, blocks, groups]`` and all that differ from one of them in one group."""
    changes = list(product(*(range(size) for size in (*codes.shape[1:], len(BITS)))))

    def changed(which: int) -> NDArray[np.intp]:
        block, group, option = changes[which]
        found = codes.copy()
        found[:, block, group] = option
        return found

    losses = [losses_of(instance, changed(i), timed=False) for i in range(len(changes))]
    kept = front_rows(np.vstack(losses))
    which, row = np.divmod(kept, len(codes))
    return np.vstack([changed(int(i))[row[which == i]] for i in np.unique(which)])


def front_rows(losses: Floats) -> NDArray[np.intp]:
    """Indices of the front of ``losses [n, objectives]``; of equal rows one is kept."""
    unique = np.unique(losses, axis=0, return_index=True)[1]
    if losses.shape[1] == 2:  # by the second objective, the first has to fall
        order = unique[np.lexsort((losses[unique, 0], losses[unique, 1]))]
        least = np.minimum.accumulate(losses[order, 0])
        return np.asarray(order[np.concatenate([[True], losses[order, 0][1:] < least[:-1]])])
    return np.asarray(unique[non_dominated(losses[unique])])


def allocation_reference(name: str, seed: int, *, prices: int = 300, rounds: int = 2) -> dict[str, Any]:
    """Reference of one instance; see above."""
    instance, timed = instance_of(name, seed), name == "noisy"
    log = (True, False, False)[: 2 + timed]
    chain = Chain.of(instance, timed=timed)
    per_unit = np.logspace(-8.0, 0.0, prices)
    pairs = [(p, 0.0) for p in per_unit]
    if timed:  # a unit bit and a microsecond cost about the same
        angles = np.linspace(0.0, 0.5 * np.pi, 25)
        pairs = [(p * np.cos(a), p * 3e3 * np.sin(a)) for p in per_unit[:: prices // 60] for a in angles]
    bounds, allocations = [], []
    for unit_price, time_price in pairs:
        value, codes = chain.best(unit_price, time_price)
        allocations.append(codes[np.isfinite(value)])
        bounds.append(value)
    codes = np.vstack(allocations)
    codes = codes[front_rows(losses_of(instance, codes, timed=timed))]
    for _ in range(0 if timed else rounds):  # three objectives have points enough on their hulls
        codes = with_neighbours(instance, codes)
    losses = losses_of(instance, codes, timed=timed)
    uniform = np.array([np.full((instance.blocks, len(GROUPS)), o) for o in range(len(BITS))])
    corner, volume = judge(losses, losses_of(instance, uniform, timed=timed), log)
    found: dict[str, Any] = {"corner": corner, "volume": volume, "points": len(losses)}
    if not timed:
        found["upper"] = _upper_bound(instance, per_unit, np.array(bounds), corner, log)
    found["front"] = thinned(losses, log).tolist()
    return found


def _upper_bound(
    instance: Allocation, per_unit: Floats, bounds: Floats, corner: tuple[float, ...], log: tuple[bool, ...]
) -> float:
    """A hypervolume that no front can exceed: from below, ``bounds [prices, counts]`` limit the divergence at
    every number of unit bits."""
    units = float(group_units().sum() * instance.blocks)
    spent = np.arange(BITS[0] * units, BITS[-1] * units + 1.0)
    groups = instance.blocks * len(GROUPS)
    least = np.full(len(spent), np.inf)
    for count in range(bounds.shape[1]):
        known = np.isfinite(bounds[:, count])
        if known.any():
            below = (bounds[known, count, None] - np.outer(per_unit[known], spent)).max(axis=0)
            least = np.minimum(least, instance.cliff_factor(count / groups) * np.maximum(below, 0.0))
    lowest = instance.error.min(axis=2).sum()  # the additive part alone, at its best
    rows = judged(np.column_stack([np.maximum(least, lowest), np.asarray(instance.memory_mb(spent))]), log)
    return hypervolume(rows, corner)


def thinned(losses: Floats, log: tuple[bool, ...], kept: int = KEPT) -> Floats:
    """At most ``kept`` rows, farthest point first from the best of each objective, in judged units."""
    from autocomp.searchers.common import spread_order

    return losses[spread_order(judged(losses, log))[:kept]]


# --- recordings that a regression continues ---------------------------------------------------------------


def modelled_reference(
    name: str, *, kept: int = 400, pairs: int = 20_000, enough: float = 3e-4, quiet: int = 2
) -> dict[str, Any]:
    """A front of the regression of a recording: local search from the measured candidates.

    Args:
        name: a key of ``problems.MODELLED``.
        kept: points of the front whose neighbours are looked at in each round, other ones each time.
        pairs: random changes of two decisions in each round.
        enough: relative gain of the hypervolume below which a round counts as quiet.
        quiet: such rounds in a row after which the search ends.

    The corner is that of the uniform candidates alone.
    """
    objectives = tuple(Objective.parse(o) for o in MODELLED[name])
    path = REFERENCES.parent / name / "table.json.gz"
    truth, problem = truth_of(path, objectives)
    rng = np.random.default_rng(0)
    sizes = np.array([len(d.options) for d in choices(problem.space)])
    codes = codes_of(problem.space, [t.candidate for t in usable(loaded(path), objectives)])
    baselines = truth.losses(problem.baselines)
    log = logarithmic(baselines)
    corner = corner_of(baselines, baselines, log)
    losses, volume, still = truth.at(codes), 0.0, 0
    while True:
        best = front_rows(losses)
        codes, losses = codes[best], losses[best]
        before, volume = volume, hypervolume(judged(losses, log), corner)
        still = still + 1 if volume < before * (1 + enough) else 0
        print(f"{len(codes)} points, hypervolume {volume:.6f}", flush=True)
        if still == quiet:
            break
        centers = codes[rng.permutation(len(codes))[:kept]]
        new = np.vstack([_single_changes(centers, sizes), _double_changes(codes, sizes, pairs, rng)])
        new = np.unique(new, axis=0)
        codes, losses = np.vstack([codes, new]), np.vstack([losses, truth.at(new)])
    front = thinned(losses, log, MODELLED_KEPT).tolist()
    return {"points": len(losses), "corner": corner, "volume": volume, "front": front}


def _single_changes(codes: NDArray[np.intp], sizes: NDArray[np.intp]) -> NDArray[np.intp]:
    """All candidates that differ in one decision, ``[n, decisions]``."""
    found = []
    for j, size in enumerate(sizes):
        for option in range(size):
            changed = codes[codes[:, j] != option].copy()
            changed[:, j] = option
            found.append(changed)
    return np.vstack(found)


def _double_changes(
    codes: NDArray[np.intp], sizes: NDArray[np.intp], count: int, rng: np.random.Generator
) -> NDArray[np.intp]:
    """``count`` random ones that differ in at most two decisions."""
    found = codes[rng.integers(len(codes), size=count)].copy()
    for _ in range(2):
        at = rng.integers(len(sizes), size=count)
        found[np.arange(count), at] = rng.integers(sizes[at])
    return found


# --- schedules --------------------------------------------------------------------------------------------


def schedule_reference(seed: int, *, rounds: int = 40) -> dict[str, Any]:
    """The best error that was found for each number of evaluations."""
    rng = np.random.default_rng(seed)
    best: dict[int, tuple[float, list[str], Floats]] = {}
    for count in range(LEAST, 2 * SLOTS + 1):
        for attempt in range(rounds):
            if count in best and best[count][0] < 0.1 * MODEL_ERROR:
                break  # what is left is the model's own error
            solvers = _random_solvers(count, rng)
            if count in best and attempt % 2:
                solvers = _changed(best[count][1], count, rng)
            starts = [np.linspace(1.0, 0.0, len(solvers), endpoint=False) ** p for p in (0.7, 1.0, 2.0)]
            if count in best and len(best[count][2]) == len(solvers):
                starts.append(best[count][2])
            for start in starts:
                error, times = _best_times(start, solvers)
                if count not in best or error < best[count][0]:
                    best[count] = error, solvers, times
        print(count, f"{best[count][0]:.5f}", *best[count][1], np.round(best[count][2], 3), flush=True)
    front = np.array([[np.hypot(error, MODEL_ERROR), float(count)] for count, (error, _, _) in best.items()])
    front = front[front_rows(front)]
    return {"points": len(front), "front": front.tolist()}


def _random_solvers(count: int, rng: np.random.Generator) -> list[str]:
    """Names with ``count`` evaluations together, in as many slots as there are."""
    while True:
        steps = int(rng.integers(max(LEAST, (count + 1) // 2), min(SLOTS, count) + 1))
        found = [SOLVERS[int(rng.choice([0, 2]))] for _ in range(steps)]
        for i in rng.permutation(steps)[: count - steps]:
            found[int(i)] = "heun"
        if evaluations(found) == count:
            return found


def _changed(solvers: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Two names swapped, or one changed for another of the same price."""
    found = list(solvers)
    i, j = (int(k) for k in rng.integers(len(found), size=2))
    found[i], found[j] = found[j], found[i]
    if rng.random() < 0.5 and found[i] != "heun":
        found[i] = "ab2" if found[i] == "euler" else "euler"
    return found if evaluations(found) == count else solvers


def _best_times(start: Floats, solvers: list[str]) -> tuple[float, Floats]:
    """Falling times in (0, 1] of least error, by L-BFGS-B on the logarithms of the gaps."""

    def times_of(z: Floats) -> Floats:
        """``z [n, steps + 1]`` -> falling times ``[n, steps]``; the first gap is what is left above."""
        share = np.exp(z - z.max(axis=1, keepdims=True))
        share = GAP + (1.0 - GAP * z.shape[1]) * share / share.sum(axis=1, keepdims=True)
        # The gap before the first time may be nothing: a schedule may begin at time 1 itself.
        share[:, 0] -= GAP
        return np.asarray(1.0 - np.cumsum(share, axis=1)[:, :-1])

    def value(z: Floats) -> tuple[float, Floats]:
        moved = np.vstack([z, z + 1e-6 * np.eye(len(z))])
        logs = np.log(solve_errors(times_of(moved), solvers))
        return float(logs[0]), (logs[1:] - logs[0]) / 1e-6

    gaps = np.maximum(-np.diff(np.concatenate([[1.0], start, [0.0]])), 1e-4)
    found = minimize(value, np.log(gaps), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    times = times_of(found.x[None])[0]
    return float(solve_errors(times[None], solvers)[0]), times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problems", nargs="+", choices=(*ALLOCATIONS, "schedule", *MODELLED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    for name, seed in product(given.problems, given.seeds):
        if name not in ALLOCATIONS and seed:
            continue  # one instance
        began = time.perf_counter()
        if name in ALLOCATIONS:
            found = allocation_reference(name, seed)
        else:
            found = schedule_reference(seed) if name == "schedule" else modelled_reference(name)
        known = json.loads(REFERENCES.read_text()) if REFERENCES.exists() else {}
        known.setdefault(name, {})[str(seed)] = _rounded(found)
        REFERENCES.write_text(json.dumps(known, sort_keys=True) + "\n")
        shown = {k: round(found[k], 5) for k in ("points", "volume", "upper") if k in found}
        print(f"{name} {seed}: {shown}, {time.perf_counter() - began:.0f} s")


def _rounded(data: Any) -> Any:
    """Seven significant digits: small files, and far below what the volumes are compared at."""
    if isinstance(data, float):
        return float(f"{data:.7g}")
    if isinstance(data, dict):
        return {k: _rounded(v) for k, v in data.items()}
    return [_rounded(v) for v in data] if isinstance(data, list | tuple) else data


if __name__ == "__main__":
    main()
