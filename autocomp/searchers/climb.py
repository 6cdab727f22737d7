"""Steps uphill from a few candidates, by whatever values them: how an acquisition function is maximised.

Among some hundred children of measured points there is hardly ever the point that a model would most like to
see, and in a space of floats it is soon clear to a Gaussian process where that is. (Local search from the
best of a random sample: Hutter, Hoos and Leyton-Brown, SMAC, LION 2011, section 4.3.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from autocomp.searchers.evolution import Breeder
from autocomp.space import Candidate, Interval, Value

Floats = NDArray[np.float64]

ENDS = 0.35
"""Share of the changes of a float that put it at an end of its interval: best values often lie there."""
ANYWHERE = 0.15
"""Share of those that put it anywhere; the others are the usual small step."""
TWO = 0.3
"""Share of steps that change two groups."""


def climb(
    starts: Sequence[Candidate],
    value: Callable[[Sequence[Candidate]], Floats],
    steps: Callable[[Candidate], list[Candidate]],
    rounds: int,
) -> Candidate:
    """The best candidate on the ways up from ``starts``, each of which goes to its best step in every round.

    Args:
        starts: at least one.
        value: of candidates, ``[n]``; more is better.
        steps: candidates near one; none that must not be the answer.
        rounds: at most; ends early when no way leads further.
    """
    tops, heights = list(starts), value(list(starts))
    for _ in range(rounds):
        near = [steps(top) for top in tops]
        flat = [c for row in near for c in row]
        if not flat:
            break
        found, at, moved = value(flat), 0, False
        for i, row in enumerate(near):
            part = found[at : at + len(row)]
            at += len(row)
            if len(part) and part.max() > heights[i]:
                tops[i], heights[i], moved = row[int(np.argmax(part))], part.max(), True
        if not moved:
            break
    return tops[int(np.argmax(heights))]


def neighbour(breeder: Breeder, candidate: Candidate, rng: np.random.Generator) -> Candidate:
    """``candidate`` with one group or two changed, to any value, and repaired; may be itself."""
    values: dict[str, Value] = dict(candidate.values)
    for _ in range(1 + (rng.random() < TWO)):
        names = breeder.groups[int(rng.integers(len(breeder.groups)))]
        domain = breeder.space.by_name[names[0]].domain
        moved: Value
        if isinstance(domain, Interval):
            chance = rng.random()
            if chance < ENDS:
                moved = domain.low if rng.random() < 0.5 else domain.high
            elif chance < ENDS + ANYWHERE:
                moved = float(rng.uniform(domain.low, domain.high))
            else:
                moved = breeder.moved(names[0], domain, values, rng)
        else:
            moved = domain.options[int(rng.integers(len(domain.options)))]
        values.update(dict.fromkeys(names, moved))
    return breeder.space.repair(values, rng)
