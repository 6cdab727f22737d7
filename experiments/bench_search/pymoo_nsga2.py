"""pymoo's NSGA-II as a searcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autocomp.objective import Constraint
from autocomp.pareto import is_feasible, loss_row
from autocomp.repair import moving_groups
from autocomp.searchers.base import Problem
from autocomp.searchers.common import admissible, seen_fingerprints
from autocomp.searchers.random import RandomSearcher, draw
from autocomp.space import Candidate, Choice, Interval, Value
from autocomp.trial import Trial


class PymooSearcher:
    """pymoo's NSGA-II with its mixed-variable operators, asked for a few children at a time.

    The population is what its survival (rank and crowding) keeps of all that was measured; constraints
    are violations in pymoo's sense. Children are made by its tournament selection, crossovers and mutations
    for integers, choices, reals and switches, and repaired to the space.

    Args:
        population: survivors that breed.
        patience: rounds of breeding before giving up.
    """

    def __init__(self, problem: Problem, *, population: int = 24, patience: int = 20) -> None:
        self.problem, self.population, self.patience = problem, population, patience
        self.codec = _Codec(problem)

    @staticmethod
    def unsupported(problem: Problem) -> list[str]:
        return RandomSearcher.unsupported(problem)

    def ask(self, n: int, history: Sequence[Trial], pending: Sequence[Candidate]) -> list[Candidate]:
        """See ``Searcher.ask``."""
        rng = self.problem.rng(len(history) + len(pending))
        seen = seen_fingerprints(history, pending)
        usable = [
            t for t in history if is_feasible(t, self.problem.objectives) and self.codec.knows(t.candidate)
        ]
        exact = [t for t in self.problem.tables.values() if t.exact]
        found: dict[str, Candidate] = {}
        for _ in range(self.patience):
            if len(found) >= n:
                break
            if len(usable) < self.population:  # the first generation is drawn as that of our searchers
                children = [draw(self.problem.space, rng, exact) for _ in range(n)]
            else:
                bred = self._bred(usable, n, int(rng.integers(2**31)))
                children = [self.problem.space.repair(self.codec.values(x), rng) for x in bred]
            for child in children:
                if child.fingerprint not in seen and admissible(self.problem, child):
                    found[child.fingerprint] = child
        return list(found.values())[:n]

    def _bred(self, usable: Sequence[Trial], n: int, seed: int) -> list[dict[str, Any]]:
        from pymoo.algorithms.moo.nsga2 import NSGA2, binary_tournament
        from pymoo.core.mixed import MixedVariableDuplicateElimination, MixedVariableMating
        from pymoo.core.population import Population
        from pymoo.core.problem import Problem as PymooProblem
        from pymoo.operators.selection.tournament import TournamentSelection

        objectives = self.problem.objectives
        space = PymooProblem(vars=self.codec.variables(), n_obj=len(objectives), n_ieq_constr=1)
        selection = TournamentSelection(func_comp=binary_tournament)
        different = MixedVariableDuplicateElimination()
        mating = MixedVariableMating(selection=selection, eliminate_duplicates=different)
        algorithm = NSGA2(pop_size=self.population, mating=mating, eliminate_duplicates=different)
        algorithm.setup(space, seed=seed, verbose=False)
        people = Population.new(
            X=np.array([self.codec.variables_of(t.candidate) for t in usable]),
            F=np.array([loss_row(t, objectives) for t in usable]),
            G=np.array([[_broken(t, self.problem.constraints)] for t in usable]),
        )
        people = algorithm.survival.do(
            space, people, n_survive=self.population, algorithm=algorithm, random_state=algorithm.random_state
        )
        children = mating.do(space, people, n, algorithm=algorithm, random_state=algorithm.random_state)
        return [dict(child.X) for child in children]


def _broken(trial: Trial, constraints: Sequence[Constraint]) -> float:
    return float(sum(c.violation(trial.value(c.metric)) / max(abs(c.bound), 1e-12) for c in constraints))


class _Codec:
    """Between a space and pymoo's variables: one a group, two for a nullable interval."""

    def __init__(self, problem: Problem) -> None:
        self.space = problem.space
        self.groups = moving_groups(problem.space)

    def variables(self) -> dict[str, Any]:
        from pymoo.core.variable import Binary, Integer, Real
        from pymoo.core.variable import Choice as PymooChoice

        found: dict[str, Any] = {}
        for names in self.groups:
            domain = self.space.by_name[names[0]].domain
            if isinstance(domain, Interval):
                found[names[0]] = Real(bounds=(domain.low, domain.high))
                if domain.nullable:
                    found[f"{names[0]}/used"] = Binary()
            elif domain.ordered:
                found[names[0]] = Integer(bounds=(0, len(domain.options) - 1))
            else:
                found[names[0]] = PymooChoice(options=list(range(len(domain.options))))
        return found

    def values(self, x: Mapping[str, Any]) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for names in self.groups:
            domain, raw = self.space.by_name[names[0]].domain, x[names[0]]
            value: Value
            if isinstance(domain, Choice):
                value = domain.options[int(raw)]
            else:
                value = float(raw) if bool(x.get(f"{names[0]}/used", True)) else None
            found.update(dict.fromkeys(names, value))
        return found

    def knows(self, candidate: Candidate) -> bool:
        return not self.space.violations(candidate)

    def variables_of(self, candidate: Candidate) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for names in self.groups:
            domain, value = self.space.by_name[names[0]].domain, candidate[names[0]]
            if isinstance(domain, Choice):
                found[names[0]] = domain.index(value)
                continue
            middle = 0.5 * (domain.low + domain.high)
            found[names[0]] = middle if value is None else float(value)
            if domain.nullable:
                found[f"{names[0]}/used"] = value is not None
        return found
