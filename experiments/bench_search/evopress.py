"""EvoPress's search as a searcher over sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from autocomp.pareto import is_feasible, loss_row
from autocomp.repair import moving_groups
from autocomp.searchers.base import Problem
from autocomp.searchers.common import admissible, seen_fingerprints
from autocomp.searchers.ilp import cost_and_sides, space_reasons
from autocomp.space import Candidate, Value
from autocomp.trial import Trial


class EvoPressSearcher:
    """(1 + lambda) with level switches at fixed sizes, after EvoPress (arXiv 2410.14649, algorithm 1).

    EvoPress searches one size at a time: an offspring raises the level of one layer and lowers another's,
    ``min(U{1..3}, U{1..3})`` times; many offspring are scored on few tokens, the best of them on more, and
    the winner replaces its parent unless that is better. Our adaptation to fronts and to measured trials:

    - ``sizes`` bounds, evenly spaced between the smallest and the largest total of the first exact table,
      take turns; a turn is one generation of as many trials as are asked for.
    - Groups differ in size, so that after a raise random other groups are lowered until the bound holds.
    - The few-token stage is the problem's additive table: it costs nothing here, which favours EvoPress.
      ``offspring`` children are ranked by it and the best are measured.
    - The parent is the best measured trial within the bound, whoever asked for it; the first generation of
      a size is ranked among random candidates that fill it.

    Args:
        sizes: bounds.
        offspring: children that are ranked for each one that is measured.
    """

    def __init__(self, problem: Problem, *, sizes: int = 8, offspring: int = 4) -> None:
        self.problem, self.offspring = problem, offspring
        cost, sides = cost_and_sides(problem, problem.tables)
        self.cost, self.size = cost, sides[0]
        groups, by_name = moving_groups(problem.space), problem.space.by_name
        self.groups = [g for g in groups if len(by_name[g[0]].options) > 1] or groups
        self.levels = {g: self._levels(g) for g in self.groups}
        low, high = (self.size.total(self._all_at(end)) for end in (0, -1))
        self.bounds = [low + (high - low) * (i + 1) / (sizes + 1) for i in range(sizes)]

    @staticmethod
    def unsupported(problem: Problem) -> list[str]:
        reasons = space_reasons(problem.space)
        exact = [t for t in problem.tables.values() if t.exact]
        if len(exact) == len(problem.tables) or not exact:
            reasons.append("sizes need an exact table and the first stage a modelled one")
        return reasons

    def ask(self, n: int, history: Sequence[Trial], pending: Sequence[Candidate]) -> list[Candidate]:
        """See ``Searcher.ask``."""
        if n <= 0:
            return []
        step = len(history) + len(pending)
        rng = self.problem.rng(step)
        turn = max(step - len(self.problem.baselines), 0) // n
        bound = self.bounds[turn % len(self.bounds)]
        parent = None if turn < len(self.bounds) else self._parent(history, bound)
        seen = seen_fingerprints(history, pending)
        found: dict[str, Candidate] = {}
        for _ in range(40 * n):
            if len(found) >= n * self.offspring:
                break
            child = self._filled(bound, rng) if parent is None else self._switched(parent, bound, rng)
            if child.fingerprint not in seen and admissible(self.problem, child):
                found[child.fingerprint] = child
        return sorted(found.values(), key=self.cost.total)[:n]

    def _parent(self, history: Sequence[Trial], bound: float) -> Candidate | None:
        """The best measured trial within the bound."""
        objectives = [o for o in self.problem.objectives if o.metric == self.cost.metric]
        usable = [t for t in history if is_feasible(t, objectives, self.problem.constraints)]
        fitting = [
            t
            for t in usable
            if not self.problem.space.violations(t.candidate) and self._fits(t.candidate.values, bound)
        ]
        return min(fitting, key=lambda t: loss_row(t, objectives)).candidate if fitting else None

    def _levels(self, names: tuple[str, ...]) -> list[Value]:
        """Options of a group by rising size."""
        domains = [self.problem.space.by_name[n].domain for n in names]
        shared = [
            o for o in self.problem.space.by_name[names[0]].options if all(d.contains(o) for d in domains)
        ]
        return sorted(shared, key=lambda o: sum(self.size.cost(n, o) for n in names))

    def _all_at(self, level: int) -> Candidate:
        fixed: dict[str, Value] = {d.name: d.options[0] for d in self.problem.space}
        return Candidate.of({**fixed, **{n: levels[level] for g, levels in self.levels.items() for n in g}})

    def _fits(self, values: Mapping[str, Value], bound: float) -> bool:
        total = self.size.base + sum(self.size.cost(n, v) for n, v in values.items())
        return total <= bound * (1 + 1e-12)

    def _moved(self, values: dict[str, Value], names: tuple[str, ...], by: int) -> bool:
        """Move a group by one level in place; false at its end."""
        levels = self.levels[names]
        at = next(i for i, o in enumerate(levels) if repr(o) == repr(values[names[0]])) + by
        if not 0 <= at < len(levels):
            return False
        values.update(dict.fromkeys(names, levels[at]))
        return True

    def _switched(self, parent: Candidate, bound: float, rng: np.random.Generator) -> Candidate:
        values = dict(parent.values)
        for _ in range(int(rng.integers(1, 4, size=2).min())):
            raised = self.groups[int(rng.integers(len(self.groups)))]
            if not self._moved(values, raised, 1):
                continue
            for i in rng.permutation(len(self.groups)):
                if self._fits(values, bound):
                    break
                if self.groups[int(i)] != raised:
                    self._moved(values, self.groups[int(i)], -1)
        return self.problem.space.repair(values, rng)

    def _filled(self, bound: float, rng: np.random.Generator) -> Candidate:
        """Random raises from the smallest model on, as long as they fit."""
        values = dict(self._all_at(0).values)
        count = len(self.groups)
        draws = rng.integers(count, size=count * max(len(levels) for levels in self.levels.values()))
        for i in (*draws, *rng.permutation(count)):  # the permutation fills what room is left
            names = self.groups[int(i)]
            before = values[names[0]]
            if self._moved(values, names, 1) and not self._fits(values, bound):
                values.update(dict.fromkeys(names, before))
        return self.problem.space.repair(values, rng)
