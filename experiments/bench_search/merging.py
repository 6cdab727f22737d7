"""Merging experts: which expert goes where, with which weights, at how many bits. Mixed decisions, no tables.

Eight experts, vectors ``w_j`` used with frequencies ``f_j``, are served by up to four merged ones.
Decisions: ``route/j`` (categorical: the merged expert that stands for expert ``j``), a 4 x 8 matrix
``merge/r.j`` whose rows are weights that sum to one, and ``bits/r`` (ordinal). Merged expert ``r`` is
``sum_j M[r, j] w_j``. Objectives are the error that the model sees,

    sum_j f_j (|w_j - merged(route_j)|^2 + q(bits(route_j))) / (variance of all experts)

and the memory of the merged experts that something is routed to.

The exact front: for a given partition the best merged expert is the weighted mean of its members, which is a
row of weights that sum to one; what is left are 2,795 partitions and the bits of their parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from bench_problem import BenchProblem, Floats, instance_rng, judge, noisy

from autocomp.objective import Objective
from autocomp.pareto import non_dominated
from autocomp.searchers.base import Problem
from autocomp.space import Candidate, Choice, Decision, Interval, SearchSpace, SumTo, Value
from autocomp.trial import Estimate

EXPERTS, MERGED, SIZE = 8, 4, 16
BITS = (2, 3, 4, 8)
NOISE = 0.005


@dataclass(frozen=True)
class Experts:
    """One instance: ``vectors [experts, size]`` and how often each is used, ``frequency [experts]``."""

    vectors: Floats
    frequency: Floats

    @property
    def variance(self) -> float:
        """Weighted variance of all experts: the error of a single merged one."""
        return self.scatter(tuple(range(EXPERTS)))

    def scatter(self, members: tuple[int, ...]) -> float:
        """Weighted squared distances of experts from their weighted mean."""
        rows, weight = self.vectors[list(members)], self.frequency[list(members)]
        mean = weight @ rows / weight.sum()
        return float(weight @ np.sum((rows - mean) ** 2, axis=1))

    def losses(self, route: list[int], weights: Floats, bits: list[int]) -> Floats:
        """(error, memory_mb) of a full assignment; ``weights [merged, experts]``."""
        gap = np.sum((self.vectors - (weights @ self.vectors)[route]) ** 2, axis=1) / self.variance
        error = float(self.frequency @ (gap + np.array([rounding(bits[r]) for r in route])))
        return np.array([error, sum(bits[r] / 8.0 for r in set(route))])


def rounding(bits: int) -> float:
    """Error of rounding to that many bits, in units of the experts' variance."""
    return 0.3 * 4.0 ** -(bits - 2)


def draw_experts(rng: np.random.Generator) -> Experts:
    """Three clusters with members at different distances from their middle."""
    middles = rng.normal(size=(3, SIZE))
    cluster = rng.integers(3, size=EXPERTS)
    apart = rng.uniform(0.2, 0.8, size=(EXPERTS, 1))
    return Experts(
        middles[cluster] + apart * rng.normal(size=(EXPERTS, SIZE)), rng.dirichlet(np.full(EXPERTS, 2.0))
    )


def partitions(items: int, parts: int) -> Iterator[list[tuple[int, ...]]]:
    """All ways to split ``items`` numbers into at most ``parts`` non-empty sets."""

    def grow(found: list[list[int]], item: int) -> Iterator[list[tuple[int, ...]]]:
        if item == items:
            yield [tuple(part) for part in found]
            return
        for i in range(len(found)):
            yield from grow([[*p, item] if j == i else p for j, p in enumerate(found)], item + 1)
        if len(found) < parts:
            yield from grow([*found, [item]], item + 1)

    return grow([], 0)


def exact_front(experts: Experts) -> Floats:
    """Every point (error, memory_mb) of the front, ``[points, 2]``, by enumeration."""
    scatter: dict[tuple[int, ...], float] = {}
    choices = {k: np.array(list(product(BITS, repeat=k))) for k in range(1, MERGED + 1)}
    levels = {k: np.vectorize(rounding)(bits) for k, bits in choices.items()}
    best: dict[float, float] = {}
    for parts in partitions(EXPERTS, MERGED):
        for part in parts:
            if part not in scatter:
                scatter[part] = experts.scatter(part) / experts.variance
        load = np.array([experts.frequency[list(part)].sum() for part in parts])
        error = sum(scatter[part] for part in parts) + levels[len(parts)] @ load
        memory = choices[len(parts)].sum(axis=1) / 8.0
        for m in np.unique(memory):
            least = float(error[memory == m].min())
            best[float(m)] = min(best.get(float(m), np.inf), least)
    points = np.array([[e, m] for m, e in best.items()])
    return points[non_dominated(points)]


def make_space() -> SearchSpace:
    routes = [Decision(f"route/{j}", Choice(tuple(range(MERGED))), space="route") for j in range(EXPERTS)]
    bits = [Decision(f"bits/{r}", Choice(BITS, ordered=True), space="bits", block=r) for r in range(MERGED)]
    weights = [
        Decision(f"merge/{r}.{j}", Interval(0.0, 1.0), space="merge", block=r)
        for r in range(MERGED)
        for j in range(EXPERTS)
    ]
    rows = [SumTo(tuple(f"merge/{r}.{j}" for j in range(EXPERTS))) for r in range(MERGED)]
    return SearchSpace((*routes, *bits, *weights), tuple(rows))


def even_candidate(parts: int, bits: int) -> Candidate:
    """Neighbouring experts share a merged one, which is their plain mean."""
    route = [j * parts // EXPERTS for j in range(EXPERTS)]
    values: dict[str, Value] = {f"route/{j}": r for j, r in enumerate(route)}
    for r in range(MERGED):
        members = [j for j in range(EXPERTS) if route[j] == r] or list(range(EXPERTS))
        values |= {f"merge/{r}.{j}": (j in members) / len(members) for j in range(EXPERTS)}
        values[f"bits/{r}"] = bits
    return Candidate.of(values)


def mixed_problem(seed: int) -> BenchProblem:
    """44 decisions: 8 categorical, 4 ordinal, 32 floats in four rows that sum to one."""
    experts = draw_experts(instance_rng("mixed", seed))
    problem = Problem(
        space=make_space(),
        objectives=(Objective("error"), Objective("memory_mb")),
        baselines=tuple(even_candidate(parts, bits) for parts, bits in ((4, 8), (4, 4), (2, 4), (1, 2))),
        seed=seed,
    )

    def truth(candidate: Candidate) -> Floats:
        weights = [[candidate[f"merge/{r}.{j}"] for j in range(EXPERTS)] for r in range(MERGED)]
        route = [int(candidate[f"route/{j}"] or 0) for j in range(EXPERTS)]
        bits = [int(candidate[f"bits/{r}"] or 0) for r in range(MERGED)]
        return experts.losses(route, np.array(weights, dtype=np.float64), bits)

    def measure(candidate: Candidate, rng: np.random.Generator) -> dict[str, Estimate]:
        error, memory = truth(candidate)
        return {"error": noisy(float(error), NOISE, rng), "memory_mb": Estimate(float(memory))}

    front, log = exact_front(experts), (False, False)
    corner, volume = judge(front, np.array([truth(c) for c in problem.baselines]), log)
    return BenchProblem("mixed", problem, measure, truth, corner, volume, 300, log, True, front)
