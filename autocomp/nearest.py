"""The measured candidate nearest to another one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import SpaceError
from autocomp.space import Candidate, Choice, Decision, SearchSpace, Value
from autocomp.trial import Trial

_FOREIGN = -1.0  # an option that the space does not offer: a whole step from all that it does


class Nearest:
    """Looks up the nearest of ``trials`` in ``space``.

    A decision is 1 apart when options differ; along ordered options and intervals, the share of the whole
    range (so that a neighbouring option is nearer than a far one); 1 when only one of two slots is unused.

    Args:
        space: decisions and their domains.
        trials: candidates of that space; of equally near ones the earliest wins.
    """

    def __init__(self, space: SearchSpace, trials: Sequence[Trial]) -> None:
        self._trials = list(trials)
        self._decisions = space.decisions
        self._graded = np.array([_is_graded(d) for d in space], dtype=bool)
        rows = [self._code(t.candidate) for t in trials]
        self._codes = np.array(rows, dtype=np.float64).reshape(len(rows), len(space))

    def _code(self, candidate: Candidate) -> NDArray[np.float64]:
        return np.array([_code(d, candidate.values.get(d.name)) for d in self._decisions], dtype=np.float64)

    def find(self, candidate: Candidate) -> tuple[Trial | None, float]:
        """The nearest trial and its distance; ``None`` when there are no trials."""
        if not self._trials:
            return None, float("inf")
        mine = self._code(candidate)
        apart = np.abs(self._codes - mine)
        unused = np.isnan(self._codes).astype(int) + np.isnan(mine)
        apart = np.where(self._graded & (self._codes >= 0) & (mine >= 0), apart, apart != 0)
        apart = np.where(unused == 0, apart, unused == 1)
        distances = apart.sum(axis=1)
        best = int(np.argmin(distances))
        return self._trials[best], float(distances[best])


def _is_graded(decision: Decision) -> bool:
    return not isinstance(decision.domain, Choice) or decision.domain.ordered


def _code(decision: Decision, value: Value) -> float:
    """Where a value stands: 0 to 1 on a graded domain, its number among unordered options, NaN for a null."""
    domain = decision.domain
    if isinstance(domain, Choice):
        try:
            position = domain.index(value)
        except SpaceError:
            return _FOREIGN
        return position / max(1, len(domain.options) - 1) if domain.ordered else float(position)
    if value is None:
        return float("nan")
    return (float(value) - domain.low) / ((domain.high - domain.low) or 1.0)
