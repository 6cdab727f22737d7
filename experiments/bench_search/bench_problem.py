"""A problem of the benchmark: what a searcher is told, how a candidate is measured, and what is true."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocomp.pareto import hypervolume
from autocomp.searchers.base import Problem
from autocomp.space import Candidate
from autocomp.trial import Estimate, Failure

Floats = NDArray[np.float64]
REFERENCES = Path(__file__).parent / "references.json"

MARGIN = 0.1
"""The corner lies this share of the range beyond the worst values of reference front and baselines."""


@dataclass(frozen=True)
class BenchProblem:
    """A search problem with a known answer.

    Attributes:
        name: a key of ``PROBLEMS``.
        problem: what a searcher is told. Tables may be off, as profiles are.
        measure: metrics of a candidate as a worker would find them, noise included; a ``Failure`` for a
            candidate that can't be measured.
        truth: the losses ``[objectives]`` without noise, in the objectives' units.
        corner: the reference point of the hypervolume, in judged units (see ``judged``).
        reference_volume: hypervolume of the best front there is, in judged units: what counts as 100 %.
        budget: measured trials of a search, baselines included.
        log: objectives that are judged by their decimal logarithm, because the front spans decades.
        exact: whether the reference is the true front (and not the best one known).
        front: losses ``[points, objectives]`` of the reference front where it is at hand, in any order.
    """

    name: str
    problem: Problem
    measure: Callable[[Candidate, np.random.Generator], dict[str, Estimate] | Failure]
    truth: Callable[[Candidate], Floats]
    corner: tuple[float, ...]
    reference_volume: float
    budget: int
    log: tuple[bool, ...]
    exact: bool = True
    front: Floats | None = None

    def judged(self, losses: Floats) -> Floats:
        """Losses ``[n, m]`` in the units in which fronts are compared."""
        return judged(losses, self.log)

    def volume(self, losses: Floats) -> float:
        """Hypervolume of true losses ``[n, m]`` as a share of the reference's."""
        return hypervolume(self.judged(losses), self.corner) / self.reference_volume


def judged(losses: Floats, log: tuple[bool, ...]) -> Floats:
    """Decimal logarithms of the columns in ``log``, the others as they are; ``[n, m]``."""
    rows = np.array(losses, dtype=np.float64).reshape(-1, len(log))
    for j, wanted in enumerate(log):
        if wanted:
            rows[:, j] = np.log10(rows[:, j])
    return rows


def corner_of(front: Floats, baselines: Floats, log: tuple[bool, ...]) -> tuple[float, ...]:
    """Corner, in judged units, for a front and the baselines' true losses, ``[points, objectives]`` each."""
    rows = np.vstack([judged(front, log), judged(baselines, log)])
    return tuple(map(float, rows.max(axis=0) + MARGIN * np.ptp(rows, axis=0)))


def judge(front: Floats, baselines: Floats, log: tuple[bool, ...]) -> tuple[tuple[float, ...], float]:
    """Corner and hypervolume of a reference front, in judged units."""
    corner = corner_of(front, baselines, log)
    return corner, hypervolume(judged(front, log), corner)


def stored_reference(name: str, seed: int) -> Mapping[str, Any]:
    """Corner and volume that ``reference.py`` found for one instance of a problem.

    Raises:
        KeyError: it was never computed.
    """
    known = json.loads(REFERENCES.read_text()).get(name, {}) if REFERENCES.exists() else {}
    if str(seed) not in known:
        raise KeyError(
            f"no reference front of {name!r} for seed {seed}; run: python reference.py {name} --seeds {seed}"
        )
    return dict(known[str(seed)])


def instance_rng(name: str, seed: int) -> np.random.Generator:
    """Draws the instance; independent of the searchers' generators."""
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))


def noisy(value: float, relative: float, rng: np.random.Generator) -> Estimate:
    """A positive number measured with normal noise of ``relative`` standard deviation, and its error."""
    found = float(value) * max(1.0 + relative * float(rng.standard_normal()), 0.05)
    return Estimate(found, relative * found)
