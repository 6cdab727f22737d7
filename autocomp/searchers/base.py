"""What a searcher is given and what it must do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from autocomp.objective import Constraint, Objective
from autocomp.space import AdditiveTable, Candidate, SearchSpace
from autocomp.trial import Trial


@dataclass(frozen=True)
class LocalModel:
    """Costs around one candidate: ``table.cost(decision, option)`` is the change of the metric when that
    decision alone leaves the candidate (0 for staying); ``table.base`` is the metric at the candidate."""

    candidate: Candidate
    table: AdditiveTable


@dataclass(frozen=True)
class Problem:
    """Everything that is known before the first trial.

    Attributes:
        space: what may vary.
        objectives: at least one; every one is treated as its ``loss`` (smaller is better).
        constraints: bounds on metrics. Bounds on exact tables are also in ``space`` as ``LinearBudget``.
        tables: additive models by metric: exact ones (bytes), sensitivities, latency tables. May be empty.
        baselines: candidates that the study measures anyway (uniform ones, first the uncompressed one).
        local: what was profiled around candidates that the searcher asked to know better
            (``wants_profile``), oldest first.
        can_profile: whether such a profile can be had.
        traits: further features of a candidate that need no measuring, for predictors; ``None`` for none.
        seed: all randomness of a searcher comes from ``(seed, len(history) + len(pending))``.
    """

    space: SearchSpace
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...] = ()
    tables: Mapping[str, AdditiveTable] = field(default_factory=dict)
    baselines: tuple[Candidate, ...] = ()
    seed: int = 0
    local: tuple[LocalModel, ...] = ()
    can_profile: bool = False
    traits: Callable[[Candidate], Sequence[float]] | None = None

    def rng(self, step: int) -> np.random.Generator:
        """A generator that depends on the seed and on how far the search is, and on nothing else."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, step]))


@runtime_checkable
class Searcher(Protocol):
    """``ask`` is a pure function of its arguments and the constructor's; that makes resume free."""

    def ask(self, n: int, history: Sequence[Trial], pending: Sequence[Candidate]) -> list[Candidate]:
        """At most ``n`` new candidates, none of them in ``history`` or ``pending``, all inside the space.

        An empty list means that the searcher has nothing more to propose.
        ``history`` holds trials of the search fidelity, failed ones included.
        """
        ...


@runtime_checkable
class ProfilingSearcher(Searcher, Protocol):
    """A searcher that may ask for a profile around a candidate before it goes on."""

    def wants_profile(self, history: Sequence[Trial]) -> Candidate | None:
        """A candidate of ``history`` that is not in ``problem.local`` yet, or ``None``. The study profiles
        it and builds the searcher anew with the result in ``problem.local``."""
        ...


class SearcherFactory(Protocol):
    """A searcher class: built from a problem and keyword options."""

    def __call__(self, problem: Problem, **options: object) -> Searcher: ...


def unsupported(searcher: object, problem: Problem) -> list[str]:
    """Reasons why a searcher (class or object) can't take the problem, asked before anything runs.

    A searcher states them in an optional static method ``unsupported(problem) -> list[str]``. Options of the
    searcher that it names as further parameters are passed on when a job sets them.
    """
    check = getattr(searcher, "unsupported", None)
    return list(check(problem)) if check is not None else []
