"""Every feasible candidate of a small space, one after the other; its runs become complete recordings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, pairwise

from autocomp.errors import InfeasibleError, JobError
from autocomp.searchers.base import Problem
from autocomp.searchers.common import admissible, seen_fingerprints
from autocomp.space import AtMostDistinct, Candidate, LinearBudget, SearchSpace, SpaceConstraint, Tied, Value
from autocomp.trial import Trial

Row = tuple[Value, ...]
Check = Callable[[Mapping[str, Value]], bool]

LIMIT = 100_000
_EFFORT = 10  # steps of the count for each candidate of the limit, before a space counts as too big


class ExhaustiveSearcher:
    """Proposes the candidates of a categorical space in mixed-radix order: the last decision turns fastest.

    Args:
        limit: the most candidates that the space may have, before bounds on exact metrics are applied.
        shuffle: in a random order that depends on the problem's seed alone; a run that is stopped early then
            holds a fair sample.

    Raises:
        JobError: the space has an interval, or more candidates than ``limit``.
    """

    def __init__(self, problem: Problem, *, limit: int = LIMIT, shuffle: bool = False) -> None:
        reasons = self.unsupported(problem, limit)
        if reasons:
            raise JobError("searcher 'exhaustive' can't take this space: " + "; ".join(reasons))
        self.problem = problem
        self._names = [d.name for d in problem.space]
        self._rows = assignments(problem.space)
        if shuffle:
            rows = list(self._rows)
            self._rows = (rows[i] for i in problem.rng(0).permutation(len(rows)))
        self._known: list[tuple[str, Row]] = []  # (fingerprint, options) of feasible candidates, in order

    @staticmethod
    def unsupported(problem: Problem, limit: int = LIMIT) -> list[str]:
        space = problem.space
        if not space.decisions:
            return ["there is nothing to decide"]
        if not space.is_categorical:
            name = next(d.name for d in space if not d.options)
            return [f"{name} is an interval, which can't be enumerated; offer options in its place"]
        if _exceeds(space, limit):
            return [
                f"the space has more than {limit} candidates; offer fewer options, raise"
                " searcher.options.limit, or use the searcher `random`"
            ]
        return []

    def ask(self, n: int, history: Sequence[Trial], pending: Sequence[Candidate]) -> list[Candidate]:
        """See ``Searcher.ask``. The order is kept between calls, the answers depend on the arguments alone.

        Raises:
            InfeasibleError: no candidate meets the constraints.
        """
        seen = seen_fingerprints(history, pending)
        fresh = (self._candidate(row) for fingerprint, row in self._feasible() if fingerprint not in seen)
        found = list(islice(fresh, n))
        if not found and n > 0 and not self._known:
            raise InfeasibleError("no candidate of the space meets the constraints; loosen a bound")
        return found

    def _candidate(self, row: Row) -> Candidate:
        return Candidate.of(dict(zip(self._names, row, strict=True)))

    def _feasible(self) -> Iterator[tuple[str, Row]]:
        """Feasible candidates in order: first those that earlier calls came across, then new ones."""
        yield from self._known
        for row in self._rows:
            candidate = self._candidate(row)
            if admissible(self.problem, candidate):
                self._known.append((candidate.fingerprint, row))
                yield self._known[-1]


def assignments(space: SearchSpace) -> Iterator[Row]:
    """All rows of options (in the order of the decisions) that meet the constraints but for budgets.

    A row is given up as soon as the decisions made so far break a constraint.
    Budgets sum over everything and are left to the caller.
    """
    return (row for row in _walk(space) if row is not None)


def _walk(space: SearchSpace) -> Iterator[Row | None]:
    """Depth first; ``None`` for each step that does not complete a row."""
    names = [d.name for d in space]
    checks = _checks(space)
    values: dict[str, Value] = {}
    options = [iter(space.decisions[0].options)] if names else []
    while options:
        depth = len(options) - 1
        try:
            values[names[depth]] = next(options[-1])
        except StopIteration:
            options.pop()
            continue
        if any(broken(values) for broken in checks[depth]):
            yield None
        elif depth + 1 < len(names):
            options.append(iter(space.decisions[depth + 1].options))
            yield None
        else:
            yield tuple(values[n] for n in names)


def _checks(space: SearchSpace) -> list[list[Check]]:
    """For each decision: what to look at once it and all before it are made."""
    place = {d.name: i for i, d in enumerate(space)}
    checks: list[list[Check]] = [[] for _ in place]
    for constraint in space.constraints:
        names = sorted(constraint.names, key=place.__getitem__)
        if isinstance(constraint, Tied):
            for before, name in pairwise(names):
                checks[place[name]].append(_differ(before, name))
        elif isinstance(constraint, AtMostDistinct):
            for i, name in enumerate(names):
                checks[place[name]].append(_too_many(constraint, names, i + 1))
        elif names and not isinstance(constraint, LinearBudget):
            checks[place[names[-1]]].append(_violated(constraint))
    return checks


def _differ(a: str, b: str) -> Check:
    return lambda values: repr(values[a]) != repr(values[b])


def _too_many(constraint: AtMostDistinct, names: Sequence[str], made: int) -> Check:
    return lambda values: len({constraint.key(values[n]) for n in names[:made]}) > constraint.k


def _violated(constraint: SpaceConstraint) -> Check:
    return lambda values: constraint.violation(values) > 0


def _exceeds(space: SearchSpace, limit: int) -> bool:
    """True when the space has more than ``limit`` candidates, or takes too long to count."""
    if math.prod(len(d.options) for d in space) <= limit:
        return False
    structural = tuple(c for c in space.constraints if not isinstance(c, LinearBudget))
    named = {name for c in structural for name in c.names}
    free = math.prod(len(d.options) for d in space if d.name not in named)
    if free > limit or not named:
        return True  # unless the rest has no candidate at all
    rows = 0
    for step, row in enumerate(_walk(SearchSpace(tuple(d for d in space if d.name in named), structural))):
        rows += row is not None
        if rows * free > limit or step > _EFFORT * limit:
            return True
    return False
