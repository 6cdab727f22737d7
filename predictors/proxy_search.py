"""Searches for the few samples that rank models as all samples do, and what they are judged by.

``match``     least squares on first-order values: a set whose mean contribution of each model differs from
              the full set's by the same amount for all models ranks them alike. Swaps bring this error down.
``frequency`` FlashEval's (arXiv 2403.16379): draw sets, keep those that rank best, go on with the samples
              that occur in them most often.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autocomp.predictors.proxy_scores import Floats, Indices, Score, set_means

_CHUNK = 64
"""Sets drawn at a time, to bound memory."""


@dataclass(frozen=True)
class Ranking:
    """Pairs of models that the full set tells apart, and which one it calls larger.

    A pair counts when its values differ by more than ``margin`` standard errors of their difference; the
    errors are of paired samples.
    """

    first: Indices
    second: Indices
    sign: Floats
    pairs: int

    @classmethod
    def of(cls, score: Score, margin: float) -> Ranking:
        a, b = np.triu_indices(score.models, 1)
        error = _paired_errors(score.parts)[a, b]
        gap = score.full[a] - score.full[b]
        clear = np.abs(gap) > np.maximum(margin * error, 1e-12 * np.abs(score.full).max())
        return cls(a[clear], b[clear], np.sign(gap[clear]), len(a))

    def tau(self, values: Floats) -> Floats:
        """Kendall's tau over the pairs, of values ``[..., models]``; NaN without a pair."""
        if not len(self.sign):
            return np.full(values.shape[:-1], math.nan)
        found = np.sign(values[..., self.first] - values[..., self.second])
        return np.asarray((found * self.sign).mean(axis=-1))


def _paired_errors(parts: Floats) -> Floats:
    """Standard error of the difference of each two models on the same samples, ``[models, models]``."""
    covariance = np.atleast_2d(np.cov(parts))
    variance = np.diag(covariance)
    return np.sqrt(np.maximum(variance[:, None] + variance[None] - 2.0 * covariance, 0.0) / parts.shape[1])


# --- searches ---------------------------------------------------------------------------------------------


def match(
    score: Score, size: int, rng: np.random.Generator, *, share: float = 1.0, passes: int = 4, pool: int = 256
) -> Indices:
    """A set on which all models' values are off by the same amount, as nearly as swaps get there.

    The values' first-order part is a mean over the set; what is left (of a Frechet distance, what few samples
    add to it) is computed for the set at hand and taken as given in the next pass.

    Args:
        share: weight of what bears on other models, beside that of the models themselves.
        passes: times that what is left is computed anew.
        pool: samples tried at each swap.
    """
    chosen = rng.permutation(score.samples)[:size]
    if size >= score.samples:
        return np.sort(chosen)
    parts = _centred(score.parts)
    own = parts - parts.mean(axis=0, keepdims=True)
    rows = np.concatenate([own, share * _as_large(_centred(score.shared), own)])
    rest = np.zeros(score.models)
    best, least = chosen, math.inf
    for _ in range(passes):
        goal = np.concatenate([-size * rest, np.zeros(len(rows) - len(rest))])
        chosen = _swapped(rows, chosen, goal, pool, rng)
        off = score(chosen[None])[0] - score.full
        off = off - off.mean()
        if float(off @ off) < least:
            best, least = chosen, float(off @ off)
        found = off - own[:, chosen].mean(axis=1)
        if np.allclose(found, rest, rtol=0.0, atol=1e-9 * float(np.abs(score.full).max())):
            break
        rest = found
    return np.sort(best)


def _centred(rows: Floats) -> Floats:
    return np.asarray(rows - rows.mean(axis=1, keepdims=True))


def _as_large(rows: Floats, others: Floats) -> Floats:
    """``rows`` scaled to the sum of squares of ``others``."""
    return rows * math.sqrt(float(np.square(others).sum()) / max(float(np.square(rows).sum()), 1e-300))


def _swapped(
    rows: Floats, start: Indices, goal: Floats, pool: int, rng: np.random.Generator, sweeps: int = 20
) -> Indices:
    """``start`` after swaps that bring the sum of its columns of ``rows [q, samples]`` to ``goal``."""
    chosen, columns = start.copy(), np.ascontiguousarray(rows.T)
    squares = np.einsum("nq,nq->n", columns, columns)
    gap = columns[chosen].sum(axis=0) - goal
    outside = np.setdiff1d(np.arange(len(columns)), chosen)
    for _ in range(sweeps):
        before = float(gap @ gap)
        for place in rng.permutation(len(chosen)):
            tried = rng.integers(len(outside), size=min(pool, len(outside)))
            base = gap - columns[chosen[place]]
            errors = squares[outside[tried]] + 2.0 * (columns[outside[tried]] @ base)
            best = int(errors.argmin())
            if float(base @ base) + errors[best] < float(gap @ gap) * (1.0 - 1e-9):
                swap = outside[tried[best]]
                gap = base + columns[swap]
                outside[tried[best]], chosen[place] = chosen[place], swap
        if float(gap @ gap) > 0.9 * before:
            break
    return chosen


def frequency(
    score: Score, size: int, rng: np.random.Generator, *, margin: float = 1.0, draws: int = 2000,
    keep: float = 1 / 30, rounds: int = 10,
) -> Indices:  # fmt: skip
    """Iterative search of FlashEval (section 4.2): the pool shrinks to samples frequent in good sets.

    Args:
        margin: standard errors below which two models are tied.
        draws: sets a round (the paper draws 3 million).
        keep: share of them, the best by tau, whose samples are counted.
        rounds: pools, geometrically from all samples down to ``size``.
    """
    ranking, parts = Ranking.of(score, margin), score.parts
    pool, best, top = np.arange(score.samples), rng.permutation(score.samples)[:size], -math.inf
    for step in range(1, rounds + 1):
        sets = np.concatenate([_drawn(pool, size, n, rng) for n in _chunks(draws)])
        taus = np.nan_to_num(ranking.tau(set_means(parts, sets)))
        good = np.argsort(-taus, kind="stable")[: max(1, round(keep * draws))]
        if taus[good[0]] > top:
            top, best = float(taus[good[0]]), sets[good[0]]
        left = max(size, round(score.samples * (size / score.samples) ** (step / rounds)))
        counts = np.bincount(sets[good].ravel(), minlength=score.samples) + 1e-3 * rng.random(score.samples)
        pool = pool[np.argsort(-counts[pool], kind="stable")[:left]]
    return np.sort(best)


def _chunks(count: int) -> list[int]:
    return [min(_CHUNK, count - i) for i in range(0, count, _CHUNK)]


def _drawn(pool: Indices, size: int, count: int, rng: np.random.Generator) -> Indices:
    """``count`` sets of ``size`` different samples of the pool."""
    if size >= len(pool):
        return np.tile(pool, (count, 1))
    return pool[np.argpartition(rng.random((count, len(pool))), size, axis=1)[:, :size]]
