"""NSGA-II over any space, rebuilt from the history at every ask (Deb et al., IEEE TEVC 6(2), 2002).

Operators know domains only: uniform crossover over groups that move together, a new option for a
categorical decision, a neighbour for an ordinal one, a Gaussian step for an interval, on and off for a
nullable one. Children are repaired by the space's constraints; those that break a bound which is known
exactly are never proposed.
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
from autocomp.space import Candidate, Choice, Interval, SearchSpace, Value
from autocomp.trial import Trial

Floats = NDArray[np.float64]


class EvolutionSearcher:
    """NSGA-II: parents are the best ``population`` trials of the history.

    Args:
        population: number of parents; until that many trials succeeded, half of the proposals are random.
        mutation: expected number of groups that a mutation changes.
        crossover: probability that a child has two parents.
        seeds: candidates to propose first (ILP solutions, say); the study measures the problem's
            baselines by itself, and they are parents like all others.
        patience: attempts for each wanted child before giving up.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        population: int = 24,
        mutation: float = 1.5,
        crossover: float = 0.9,
        seeds: Sequence[Candidate] = (),
        patience: int = 40,
    ) -> None:
        self.problem, self.population, self.patience = problem, population, patience
        self.breeder = Breeder(problem.space, mutation, crossover)
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
            young = len(parents) < self.population and rng.random() < 0.5
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
    """

    def __init__(self, space: SearchSpace, mutation: float = 1.5, crossover: float = 0.9) -> None:
        self.space, self.mutation, self.crossover = space, mutation, crossover
        self.groups = moving_groups(space)

    def child(self, parents: Sequence[Candidate], rng: np.random.Generator) -> Candidate:
        """A child of ``parents``, which are sorted best first, chosen by binary tournaments."""
        first = parents[self._tournament(len(parents), rng)]
        values = dict(first.values)
        if rng.random() < self.crossover:
            second = parents[self._tournament(len(parents), rng)]
            for names in self.groups:
                if rng.random() < 0.5:
                    values.update((n, second[n]) for n in names)
        return self.mutate(values, rng)

    def mutate(self, values: dict[str, Value], rng: np.random.Generator) -> Candidate:
        """Change at least one group of ``values`` (where one can change) and repair."""
        rate = min(1.0, self.mutation / len(self.groups))
        hit = rng.random(len(self.groups)) < rate
        if not hit.any():
            hit[int(rng.integers(len(hit)))] = True
        for index in np.flatnonzero(hit):
            names = self.groups[int(index)]
            domain = self.space.by_name[names[0]].domain
            values.update(dict.fromkeys(names, _mutated(domain, values[names[0]], rng)))
        return self.space.repair(values, rng)

    @staticmethod
    def _tournament(size: int, rng: np.random.Generator) -> int:
        return int(rng.integers(size, size=2).min())


def _mutated(domain: Choice | Interval, value: Value, rng: np.random.Generator) -> Value:
    if isinstance(domain, Interval):
        return _mutated_float(domain, value, rng)
    if len(domain.options) == 1:
        return value
    at = domain.index(value) if domain.contains(value) else 0
    if domain.ordered and rng.random() < 0.8:
        step = 1 if rng.random() < 0.5 else -1
        step = step if 0 <= at + step < len(domain.options) else -step
        return domain.options[at + step]
    other = int(rng.integers(len(domain.options) - 1))
    return domain.options[other + (other >= at)]


def _mutated_float(domain: Interval, value: Value, rng: np.random.Generator) -> Value:
    """A Gaussian step of a tenth of the range; one in five mutations switches a nullable slot."""
    if value is None or (domain.nullable and rng.random() < 0.2):
        return float(rng.uniform(domain.low, domain.high)) if value is None else None
    moved = float(value) + 0.1 * (domain.high - domain.low) * float(rng.standard_normal())
    return float(np.clip(moved, domain.low, domain.high))


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
