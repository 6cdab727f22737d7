"""NSGA-II over any space, rebuilt from the history at every ask (Deb et al., IEEE TEVC 6(2), 2002).

Operators know domains only. Crossover: uniform over groups that move together or over whole blocks (a step of
a schedule with its time and solver, as in USF, arXiv 2312.07243), or all floats along the line through both
parents. Mutation: a new option for a categorical decision, a neighbour for an ordinal one, a Gaussian step
for an interval, on and off for a nullable one. Children are repaired by the space's constraints; those that
break a bound which is known exactly are never proposed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import InfeasibleError
from autocomp.objective import Constraint, Objective
from autocomp.pareto import loss_row, non_dominated
from autocomp.repair import moving_groups
from autocomp.searchers.base import Problem
from autocomp.searchers.common import admissible, seen_fingerprints
from autocomp.searchers.random import RandomSearcher, draw
from autocomp.searchers.rows import RowChanges
from autocomp.space import Candidate, Choice, Interval, Ordered, SearchSpace, Value
from autocomp.trial import Trial

Floats = NDArray[np.float64]

BLEND = 0.33
"""Share of crossovers that place a child's floats on the line through its parents', up to ``BEYOND`` outside:
an order and a sum that both parents keep, the child keeps."""
BEYOND = 0.25
BLOCKS = 0.5
"""Share of the other crossovers in which whole blocks are inherited."""
ROWS = 0.25
"""Share of children that have a change of a whole row (``rows.py``) and no mutation, where there are rows."""
NEAR = 0.5
"""Share of the mutations of a float in an ordered row whose step is ``NEAR_STEP`` of the distance to its
nearest neighbour: timesteps crowd towards the image, where the usual step would throw them about."""
NEAR_STEP = 0.7


class EvolutionSearcher:
    """NSGA-II: parents are the best ``population`` trials of the history.

    Args:
        population: number of parents. 0: 24, or 5 where a single objective is minimised over floats (a
            schedule and some hundred trials: what was found is refined, not spread).
        random: share of random proposals until ``population`` trials succeeded. By default half of them, and
            a tenth where there are floats: random schedules are poor ones, and the baselines are there.
        mutation: expected number of groups that a mutation changes. 0: 1.5, or 2.5 where there are floats.
        crossover: probability that a child has two parents.
        seeds: candidates to propose first (ILP solutions, say); the study measures the problem's
            baselines by itself, and they are parents like all others.
        patience: attempts for each wanted child before giving up.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        population: int = 0,
        random: float | None = None,
        mutation: float = 0.0,
        crossover: float = 0.9,
        seeds: Sequence[Candidate] = (),
        patience: int = 40,
    ) -> None:
        self.problem, self.patience = problem, patience
        floats = not problem.space.is_categorical
        self.population = population or (5 if floats and len(problem.objectives) == 1 else 24)
        self.random = (0.1 if floats else 0.5) if random is None else random
        self.breeder = Breeder(problem.space, mutation or (2.5 if floats else 1.5), crossover)
        self.seeds = tuple(seeds)

    @staticmethod
    def unsupported(problem: Problem) -> list[str]:
        return RandomSearcher.unsupported(problem)

    def ask(self, n: int, history: Sequence[Trial], pending: Sequence[Candidate]) -> list[Candidate]:
        """See ``Searcher.ask``.

        Raises:
            InfeasibleError: no feasible candidate is found at the start.
        """
        rng = self.problem.rng(len(history) + len(pending))
        seen = seen_fingerprints(history, pending)
        found = self._unseen_seeds(n, seen)
        parents = select(history, self.problem.objectives, self.problem.constraints, self.population)
        tables = [t for t in self.problem.tables.values() if t.exact]
        rejected = 0
        for _ in range(self.patience * max(n, 1)):
            if len(found) >= n:
                break
            young = len(parents) < self.population and rng.random() < self.random
            if len(parents) < 2 or young:
                child = draw(self.problem.space, rng, tables)
            else:
                child = self.breeder.child([p.candidate for p in parents], rng)
            if child.fingerprint in seen:
                continue
            if not admissible(self.problem, child):
                rejected += 1
                continue
            seen.add(child.fingerprint)
            found.append(child)
        if rejected and not found and not history and not pending:
            raise InfeasibleError(
                f"none of {rejected} random candidates meets the constraints; loosen a bound"
            )
        return found

    def _unseen_seeds(self, n: int, seen: set[str]) -> list[Candidate]:
        fresh = {c.fingerprint: c for c in self.seeds if c.fingerprint not in seen}
        found = [c for c in fresh.values() if admissible(self.problem, c)][:n]
        seen.update(c.fingerprint for c in found)
        return found


class Breeder:
    """Crossover and mutation that keep to a space.

    Args:
        space: what may vary.
        mutation: expected number of mutated groups a child.
        crossover: probability of two parents instead of one.
        step: standard deviation of a mutated float, as a share of its interval (USF, arXiv 2312.07243: 0.06).
    """

    def __init__(
        self, space: SearchSpace, mutation: float = 1.5, crossover: float = 0.9, step: float = 0.06
    ) -> None:
        self.space, self.mutation, self.crossover, self.step = space, mutation, crossover, step
        groups = moving_groups(space)
        self.groups = [g for g in groups if _varies(space.by_name[g[0]].domain)] or groups
        self.blocks = self._blocks()
        self.row_changes = RowChanges(space, self.groups)
        self.rows = {n: c.names for c in space.constraints if isinstance(c, Ordered) for n in c.names}
        self.floats = [n for g in self.groups for n in g if isinstance(space.by_name[n].domain, Interval)]

    def _blocks(self) -> list[tuple[str, ...]]:
        """Names that are inherited together when blocks are (a slot of a schedule, a layer)."""
        rows: dict[object, tuple[str, ...]] = {}
        for names in self.groups:
            block = self.space.by_name[names[0]].block
            key: object = names if block is None else block
            rows[key] = (*rows.get(key, ()), *names)
        return list(rows.values())

    def child(self, parents: Sequence[Candidate], rng: np.random.Generator) -> Candidate:
        """A child of ``parents``, which are sorted best first, chosen by binary tournaments."""
        first = parents[self._tournament(len(parents), rng)]
        values = dict(first.values)
        if rng.random() < self.crossover:
            second = parents[self._tournament(len(parents), rng)]
            if self.floats and rng.random() < BLEND:
                self._blend(values, second, rng)
            else:
                for names in self.blocks if rng.random() < BLOCKS else self.groups:
                    if rng.random() < 0.5:
                        values.update((n, second[n]) for n in names)
        if self.row_changes and rng.random() < ROWS and self.row_changes.change(values, rng):
            return self.space.repair(values, rng)
        return self.mutate(values, rng)

    def _blend(self, values: dict[str, Value], second: Candidate, rng: np.random.Generator) -> None:
        """Move the floats that both parents have towards the second one's, or away from them."""
        share = float(rng.uniform(-BEYOND, 1.0 + BEYOND))
        for n in self.floats:
            here, there = values[n], second[n]
            if here is not None and there is not None:
                values[n] = float(here) + share * (float(there) - float(here))

    def mutate(self, values: dict[str, Value], rng: np.random.Generator) -> Candidate:
        """Change at least one group of ``values`` (where one can change) and repair."""
        rate = min(1.0, self.mutation / len(self.groups))
        hit = rng.random(len(self.groups)) < rate
        if not hit.any():
            hit[int(rng.integers(len(hit)))] = True
        for index in np.flatnonzero(hit):
            names = self.groups[int(index)]
            domain = self.space.by_name[names[0]].domain
            if isinstance(domain, Interval):
                moved = self.moved(names[0], domain, values, rng)
            else:
                moved = _mutated(domain, values[names[0]], rng)
            values.update(dict.fromkeys(names, moved))
        return self.space.repair(values, rng)

    def moved(self, name: str, domain: Interval, values: dict[str, Value], rng: np.random.Generator) -> Value:
        """A Gaussian step; one in five mutations switches a nullable slot."""
        value = values[name]
        if value is None or (domain.nullable and rng.random() < 0.2):
            return float(rng.uniform(domain.low, domain.high)) if value is None else None
        width = self.step * (domain.high - domain.low)
        if name in self.rows and rng.random() < NEAR:
            others = [v for n in self.rows[name] if n != name and (v := values[n]) is not None]
            width = NEAR_STEP * _room(float(value), [float(v) for v in others], domain)
        moved = float(value) + width * float(rng.standard_normal())
        return float(np.clip(moved, domain.low, domain.high))

    @staticmethod
    def _tournament(size: int, rng: np.random.Generator) -> int:
        return int(rng.integers(size, size=2).min())


def _varies(domain: Choice | Interval) -> bool:
    if isinstance(domain, Choice):
        return len(domain.options) > 1
    return domain.nullable or domain.low < domain.high


def _room(at: float, others: Sequence[float], domain: Interval) -> float:
    """Distance to the nearest of ``others`` or end of the interval; its width where all of them are here."""
    distances = [abs(at - x) for x in (*others, domain.low, domain.high) if x != at]
    return min(distances, default=domain.high - domain.low)


def _mutated(domain: Choice, value: Value, rng: np.random.Generator) -> Value:
    if len(domain.options) == 1:
        return value
    at = domain.index(value) if domain.contains(value) else 0
    if domain.ordered and rng.random() < 0.8:
        step = 1 if rng.random() < 0.5 else -1
        step = step if 0 <= at + step < len(domain.options) else -step
        return domain.options[at + step]
    other = int(rng.integers(len(domain.options) - 1))
    return domain.options[other + (other >= at)]


# --- selection --------------------------------------------------------------------------------------------


def select(
    history: Sequence[Trial], objectives: Sequence[Objective], constraints: Sequence[Constraint], size: int
) -> list[Trial]:
    """The best ``size`` measured trials: constraint domination, then rank, then crowding distance."""
    usable = [t for t in history if t.ok and all(map(math.isfinite, loss_row(t, objectives)))]
    if not usable:
        return []
    broken = np.array([violation(t, constraints) for t in usable])
    losses = np.array([loss_row(t, objectives) for t in usable])
    feasible = np.flatnonzero(broken == 0)
    order = [int(feasible[i]) for i in nsga_order(losses[feasible], size)]
    worse = [int(i) for i in np.argsort(broken, kind="stable") if broken[i] > 0]
    return [usable[i] for i in [*order, *worse][:size]]


def violation(trial: Trial, constraints: Sequence[Constraint]) -> float:
    """Sum of the violations, each relative to its bound."""
    return float(sum(c.violation(trial.value(c.metric)) / max(abs(c.bound), 1e-12) for c in constraints))


def nsga_order(losses: Floats, size: int | None = None) -> list[int]:
    """Rows of ``losses [n, m]`` by non-dominated rank, within a rank by falling crowding distance."""
    left = np.arange(len(losses))
    order: list[int] = []
    while len(left) and (size is None or len(order) < size):
        mask = non_dominated(losses[left])
        rank = left[mask]
        distance = crowding(losses[rank])
        order += [int(rank[i]) for i in np.argsort(-distance, kind="stable")]
        left = left[~mask]
    return order


def crowding(losses: Floats) -> Floats:
    """Crowding distance ``[n]`` of mutually non-dominated rows; infinite at the ends of an objective."""
    distance = np.zeros(len(losses))
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        width = float(column[order[-1]] - column[order[0]])
        distance[order[[0, -1]]] = np.inf
        if width > 0 and len(order) > 2:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / width
    return distance
