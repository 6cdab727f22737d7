"""Solve, measure the top few, refit, solve again: the default searcher.

The first trials are points of the front that the additive tables predict. From then on every ask fits
residual predictors to the history and pools candidates from three sources: the predicted front of the
corrected tables, allocations near measured front points under corrected and sampled tables (a trust region:
what was learned holds where it was measured), and mutated front points. Where the study can profile around a
candidate, costs are estimated anew at front points, and allocation goes on from there. The pool is ranked
by expected hypervolume improvement, and a batch is picked one by one as if the picks before had been
measured. With one objective there is no front to cover: see ``descent``.

Without tables (sampling schedules, merged checkpoints) the pool is a few children of the evolution searcher
of which the predictor picks: with a predictor that knows nothing it is that searcher. Unless candidates have
traits, every second pick goes on from the best of the pool to where the predictors expect most (``climb``):
half of the trials are what the model likes best, half what evolution would have tried, and each mends the
other's errors. With several objectives the first candidates, and some of every pool, are random ones: nothing
says which part of the front the baselines are near to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import InfeasibleError
from autocomp.objective import Objective
from autocomp.pareto import is_feasible, loss_row, non_dominated
from autocomp.predictors.additive import AdditivePredictor
from autocomp.predictors.base import Prediction, Predictor
from autocomp.predictors.choose import BestOf, make_predictor
from autocomp.predictors.residual import ResidualPredictor
from autocomp.searchers.acquisition import Improvement, Scene, pick_batch
from autocomp.searchers.base import Problem, Searcher
from autocomp.searchers.climb import climb, neighbour
from autocomp.searchers.common import admissible, seen_fingerprints, spread_order
from autocomp.searchers.descent import Descent
from autocomp.searchers.evolution import Breeder, EvolutionSearcher, select
from autocomp.searchers.ilp import (
    Allocator,
    IlpSearcher,
    cost_and_sides,
    front_plan,
    hard_budgets,
    side_mixes,
)
from autocomp.searchers.local import blended
from autocomp.searchers.random import RandomSearcher, draw
from autocomp.space import AdditiveTable, Candidate
from autocomp.trial import Trial

Floats = NDArray[np.float64]

TRUSTED = 30.0
"""How much the pool grows for a predictor that ranks left-out trials without error."""
CLIMBERS, STEPS, ROUNDS = 6, 40, 6
"""Of a climb: where it sets out, steps that are looked at from each, and rounds for predictors that rank
left-out trials without error; fewer by the square of Kendall's tau."""


class HybridSearcher:
    """ILP and predictors where the problem has additive tables, predictor-guided evolution where not.

    Args:
        points: bounds of an ILP sweep.
        first: successful trials of its own before learning starts; they cover the tables' front.
        pool: mutated candidates that are scored at each ask. 0: 200; where there are no tables 64 with traits
            and 24 without, and there up to ``1 + TRUSTED`` times as many, with the cube of Kendall's tau of
            left-out trials. Of many children a poor predictor would pick its own errors.
        local: share of the decisions that an allocation near a measured point may change.
        kind: of predictor: ``additive``, ``ridge``, ``gp``, ``trees``, ``boosted``, ``ranking`` or ``best``
            (see ``make_predictor``); by default ``trees`` where candidates have traits, ``gp`` where there
            are floats, else ``ridge``.
        gap: optimality gap of a solve; above the tables' own error nothing is won by less.
        time_limit: seconds a solve.
        profiles: profiles around front points that may be asked for, one after the first trials and
            one more after every ``first`` others.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        points: int = 12,
        first: int = 8,
        pool: int = 0,
        local: float = 0.2,
        kind: str = "",
        gap: float = 1e-2,
        time_limit: float = 10.0,
        profiles: int = 6,
    ) -> None:
        self.problem = problem
        self.points, self.first, self.local = points, first, local
        self.kind = kind or _default_kind(problem)
        self.gap, self.time_limit = gap, time_limit
        self.profiles = profiles
        self.prior = {m: blended(t, problem.local) for m, t in problem.tables.items()}
        self.breeder = Breeder(problem.space, mutation=2.0)
        self.additive = not IlpSearcher.unsupported(problem)
        self.descent = Descent(problem, rounds=profiles) if Descent.suits(problem) and profiles else None
        self.starter: IlpSearcher | EvolutionSearcher
        self.opening: Searcher
        if self.additive:
            self.opening = self.starter = IlpSearcher(problem, points=points, gap=gap, time_limit=time_limit)
        else:
            self.starter = EvolutionSearcher(problem)
            self.breeder = self.starter.breeder
            self.opening = RandomSearcher(problem) if len(problem.objectives) > 1 else self.starter
        self.pool = pool or (200 if self.additive else 64 if problem.traits else 24)
        self.climbs = not (self.additive or problem.traits)
        self.grows = self.climbs and not pool

    @staticmethod
    def unsupported(problem: Problem) -> list[str]:
        return EvolutionSearcher.unsupported(problem)

    def ask(self, n: int, history: Sequence[Trial], pending: Sequence[Candidate]) -> list[Candidate]:
        """See ``Searcher.ask``.

        Raises:
            InfeasibleError: the constraints on exact tables can't be met.
        """
        if n <= 0:
            return []
        if self.descent is not None:
            return self.descent.ask(history, pending)[:n]
        usable = [t for t in history if is_feasible(t, self.problem.objectives)]
        own = _own(usable)
        opening = len(own) < self.first
        if len(usable) < 2 or (opening and not self.additive):
            return self.opening.ask(n, history, pending)
        rng = self.problem.rng(len(history) + len(pending))
        models = self._fit(history)
        # The first trials are to cover all of the predicted front.
        found = self._planned(models, rng) if opening else self._pool(models, history, rng)
        seen = seen_fingerprints(history, pending)
        chosen = self._choose(n, self._fresh(found, seen), models, usable, pending, seen, rng)
        if len(chosen) < n:
            chosen += self.starter.ask(n - len(chosen), history, [*pending, *chosen])
        return chosen

    def wants_profile(self, history: Sequence[Trial]) -> Candidate | None:
        """The front point that is farthest from all that were profiled, when it is time for another."""
        if self.descent is not None:
            return self.descent.wants_profile(history)
        objectives, local = self.problem.objectives, self.problem.local
        own = _own(t for t in history if is_feasible(t, objectives, self.problem.constraints))
        due = min(self.profiles, len(own) // max(self.first, 1))
        if not (self.additive and self.problem.can_profile) or len(local) >= due:
            return None
        done = {m.candidate.fingerprint for m in local}
        front = [own[int(i)] for i in np.flatnonzero(non_dominated([loss_row(t, objectives) for t in own]))]
        fresh = [t for t in front if t.candidate.fingerprint not in done]
        if not fresh:
            return None
        losses = np.array([loss_row(t, objectives) for t in fresh])
        known = [loss_row(t, objectives) for t in history if t.ok and t.candidate.fingerprint in done]
        if known:
            return fresh[spread_order(losses, np.array(known))[0]].candidate
        # The first one: the point next to the middle of the front, by rank in each objective.
        ranks = np.argsort(np.argsort(losses, axis=0), axis=0)
        return fresh[int(np.argmin(np.abs(ranks - (len(fresh) - 1) / 2).sum(axis=1)))].candidate

    # --- what is known ------------------------------------------------------------------------------------

    def _fit(self, history: Sequence[Trial]) -> dict[str, Predictor]:
        """A predictor for each metric that an objective or constraint names."""
        names = [o.metric for o in self.problem.objectives] + [c.metric for c in self.problem.constraints]
        models: dict[str, Predictor] = {}
        for metric in dict.fromkeys(names):
            table = self.prior.get(metric)
            if table is not None and table.exact:
                models[metric] = AdditivePredictor(table)
            else:
                models[metric] = make_predictor(
                    self.kind, metric, table, self.problem.space, self.problem.traits
                ).fit(history)
        return models

    def _tables(
        self,
        models: Mapping[str, Predictor],
        rng: np.random.Generator | None = None,
        around: Candidate | None = None,
    ) -> dict[str, AdditiveTable]:
        """The problem's tables after what was learned, or a sample of what they may be; near a candidate,
        where one is given."""
        tables = dict(self.prior)
        for metric, model in models.items():
            known = model.predictors.get("ridge") if isinstance(model, BestOf) else model
            if isinstance(known, ResidualPredictor) and known.table is not None:
                tables[metric] = known.corrected(rng, around)
        return tables

    # --- candidates ---------------------------------------------------------------------------------------

    def _pool(
        self,
        models: Mapping[str, Predictor],
        history: Sequence[Trial],
        rng: np.random.Generator,
    ) -> list[Candidate]:
        count = 32 if isinstance(self.starter, IlpSearcher) else self.starter.population
        parents = select(history, self.problem.objectives, self.problem.constraints, count)
        size = round(self.pool * (1.0 + TRUSTED * _trust(models) ** 3)) if self.grows else self.pool
        bred = [self.breeder.child([p.candidate for p in parents], rng) for _ in range(size)]
        planned: list[Candidate] = []
        if self.additive:
            planned = [*self._planned(models, rng), *self._allocated(models, parents, rng)]
            planned += self._around_profiles(models)
        elif self.opening is not self.starter:
            bred += [draw(self.problem.space, rng, []) for _ in range(size // 2)]
        return [*planned, *bred]

    def _fresh(self, candidates: Iterable[Candidate], seen: set[str]) -> list[Candidate]:
        """Each candidate once that was not asked for and keeps to what is known before measuring."""
        fresh = {c.fingerprint: c for c in candidates if c.fingerprint not in seen}
        return [c for c in fresh.values() if admissible(self.problem, c)]

    def _planned(self, models: Mapping[str, Predictor], rng: np.random.Generator) -> list[Candidate]:
        """The front of the corrected tables, at bounds that differ from ask to ask."""
        points = self.points + int(rng.integers(self.points))
        try:
            return front_plan(self.problem, self._tables(models), points, self.gap, self.time_limit)
        except InfeasibleError:
            return []

    def _allocated(
        self, models: Mapping[str, Predictor], parents: Sequence[Trial], rng: np.random.Generator
    ) -> list[Candidate]:
        """Re-allocations at the size of measured points with few changes, half of them by sampled tables."""
        found: list[Candidate] = []
        centers = self._centers(parents)
        for sample in (False, True):
            tables = self._tables(models, rng if sample else None)
            cost, sides = cost_and_sides(self.problem, tables)
            allocator = Allocator(self.problem.space, cost)
            budgets = [allocator.row(b) for b in hard_budgets(self.problem, tables)]
            mixes = side_mixes(sides)
            for i, center in enumerate(centers):
                mix = mixes[i % len(mixes)] if mixes else None
                rows = [*budgets, *([allocator.row((mix, mix.total(center)))] if mix else [])]
                changes = max(1, round(self.local * len(allocator.groups) * (0.25 if i % 2 else 1.0)))
                try:
                    rows.append(allocator.near(center, changes))
                    near = self._tables(models, rng if sample else None, center)
                    local = allocator.minimising(cost_and_sides(self.problem, near)[0])
                    found.append(local.solve(rows, (), self.gap, self.time_limit).candidate)
                except InfeasibleError:
                    continue  # the centre breaks a budget by more than the trust region can mend
        return found

    def _around_profiles(self, models: Mapping[str, Predictor]) -> list[Candidate]:
        """Allocations by the latest profiles as they are, next to the candidates that they are about."""
        found: list[Candidate] = []
        for model in self.problem.local[-2:]:
            tables = {**self._tables(models), model.table.metric: model.table}
            cost, sides = cost_and_sides(self.problem, tables)
            allocator = Allocator(self.problem.space, cost)
            for share, mix in product((0.1, 0.3), side_mixes(sides)):
                changes = max(1, round(share * len(allocator.groups)))
                try:
                    rows = [allocator.row((mix, mix.total(model.candidate)))]
                    rows.append(allocator.near(model.candidate, changes))
                    found.append(allocator.solve(rows, (), self.gap, self.time_limit).candidate)
                except InfeasibleError:
                    continue
        return found

    def _centers(self, parents: Sequence[Trial], count: int = 6) -> list[Candidate]:
        """Measured front points, spread out."""
        if not parents:
            return []
        losses = np.array([loss_row(t, self.problem.objectives) for t in parents])
        front = np.flatnonzero(non_dominated(losses))
        return [parents[int(front[i])].candidate for i in spread_order(losses[front])[:count]]

    # --- choice -------------------------------------------------------------------------------------------

    def _choose(
        self,
        n: int,
        pool: list[Candidate],
        models: Mapping[str, Predictor],
        usable: Sequence[Trial],
        pending: Sequence[Candidate],
        seen: set[str],
        rng: np.random.Generator,
    ) -> list[Candidate]:
        if not pool:
            return []
        objectives = self.problem.objectives
        feasible = [t for t in usable if is_feasible(t, objectives, self.problem.constraints)] or list(usable)
        measured = np.array([loss_row(t, objectives) for t in feasible])
        known = [c for c in pending if not self.problem.space.violations(c)]
        mean, std, chance = self._outlook(models, [*pool, *known])
        size = len(pool)
        scene = Scene(measured, mean[:size], std[:size], chance[:size], mean[size:])
        step = len(usable) + len(pending)
        climbs = sum((step + i) % 2 for i in range(n)) if self.climbs else 0  # however large batches are
        chosen = [pool[i] for i in pick_batch(scene, n - climbs, rng)]
        seen = seen | seen_fingerprints((), chosen)
        while climbs and (left := [c for c in pool if c.fingerprint not in seen]):
            taken = self._outlook(models, [*known, *chosen])[0]
            improvement = Improvement(measured, np.vstack([scene.mean, taken]), rng)
            improvement.take(taken)
            chosen.append(self._climbed(left, improvement, models, seen, rng))
            seen.add(chosen[-1].fingerprint)
            climbs -= 1
        return chosen

    def _climbed(
        self,
        pool: Sequence[Candidate],
        improvement: Improvement,
        models: Mapping[str, Predictor],
        seen: set[str],
        rng: np.random.Generator,
    ) -> Candidate:
        """What the predictors expect most of, some steps away from the best of the pool: more steps the
        better they rank."""

        def value(candidates: Sequence[Candidate]) -> Floats:
            mean, std, chance = self._outlook(models, candidates)
            return improvement.expected(mean, std) * chance

        def steps(candidate: Candidate) -> list[Candidate]:
            return self._fresh((neighbour(self.breeder, candidate, rng) for _ in range(STEPS)), seen)

        order = np.argsort(-value(pool), kind="stable")[:CLIMBERS]
        return climb([pool[int(i)] for i in order], value, steps, round(ROUNDS * _trust(models) ** 2))

    def _outlook(
        self, models: Mapping[str, Predictor], candidates: Sequence[Candidate]
    ) -> tuple[Floats, Floats, Floats]:
        """Predicted losses, their deviations, both ``[n, objectives]``, and chance ``[n]`` of feasibility."""
        if not candidates:
            none = np.zeros((0, len(self.problem.objectives)))
            return none, none, np.zeros(0)
        predictions = {metric: model.predict(candidates) for metric, model in models.items()}
        return *_losses(self.problem.objectives, predictions), self._chance(predictions)

    def _chance(self, predictions: Mapping[str, Prediction]) -> Floats:
        """Probability that all constraints hold, ``[candidates]``, with normal errors."""
        from scipy.stats import norm

        total = np.ones(len(next(iter(predictions.values())).mean))
        for c in self.problem.constraints:
            p = predictions[c.metric]
            room = (c.bound - p.mean) if c.upper else (p.mean - c.bound)
            total = total * norm.cdf(room / np.maximum(p.std, 1e-12 * max(1.0, abs(c.bound))))
        return np.asarray(total)


def _default_kind(problem: Problem) -> str:
    if problem.traits is not None:
        return "trees"
    return "ridge" if problem.space.is_categorical else "gp"


def _trust(models: Mapping[str, Predictor]) -> float:
    """The least Kendall's tau of left-out trials, 0 to 1, of the predictors that say one."""
    taus = [float(t) for m in models.values() if (t := getattr(m, "cross_validated", None)) is not None]
    return min((max(0.0, t) if math.isfinite(t) else 0.0 for t in taus), default=0.0)


def _own(trials: Iterable[Trial]) -> list[Trial]:
    """Trials that the search asked for."""
    return [t for t in trials if t.origin not in ("baseline", "audit")]


def _losses(objectives: Iterable[Objective], predictions: Mapping[str, Prediction]) -> tuple[Floats, Floats]:
    """Predicted losses and their standard deviations, both ``[candidates, objectives]``."""
    wanted = list(objectives)
    mean = np.column_stack([(1.0 if o.minimize else -1.0) * predictions[o.metric].mean for o in wanted])
    std = np.column_stack([predictions[o.metric].doubt for o in wanted])
    return np.nan_to_num(mean, nan=math.inf), std
