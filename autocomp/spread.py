"""Choosing a few trials that cover a front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocomp.objective import Objective
from autocomp.pareto import loss_row
from autocomp.trial import Trial


def spread(trials: Sequence[Trial], objectives: Sequence[Objective], count: int) -> list[Trial]:
    """At most ``count`` trials: the best of each objective, then always the one farthest from those chosen.

    Distances are between ranks, so that one far-off point (an uncompressed model beside 2-bit ones) does
    not crowd out the interesting middle.
    """
    if len(trials) <= count:
        return list(trials)
    losses = np.array([loss_row(t, objectives) for t in trials])
    ranks = losses.argsort(axis=0).argsort(axis=0).astype(float)
    chosen = list(dict.fromkeys(int(i) for i in losses.argmin(axis=0)))[:count]
    distance = np.full(len(trials), np.inf)
    for i in chosen:
        distance = np.minimum(distance, np.abs(ranks - ranks[i]).sum(axis=1))
    while len(chosen) < count:
        farthest = int(distance.argmax())
        chosen.append(farthest)
        distance = np.minimum(distance, np.abs(ranks - ranks[farthest]).sum(axis=1))
    return [trials[i] for i in sorted(chosen)]
