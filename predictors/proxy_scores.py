"""Models that were measured on many samples, scored again on some of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import SpaceError
from autocomp.measure.images import Gaussian, frechet, gaussian, influence

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_COMPONENTS = 24
"""Components of the features whose moments are ``shared``: 324 of them."""


class Score(Protocol):
    """Models scored on sets of samples.

    Attributes:
        models, samples: how many there are.
        full: value of each model on all samples, ``[models]``.
        parts: first-order contribution of each sample to it, ``[models, samples]``: the value on a set is
            about the mean over the set. For a mean it is the matrix itself.
        shared: what else of each sample bears on the value of models that are not among these,
            ``[rows, samples]``; may have no rows.
    """

    @property
    def models(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def full(self) -> Floats: ...
    @property
    def parts(self) -> Floats: ...
    @property
    def shared(self) -> Floats: ...
    def __call__(self, sets: Indices) -> Floats:
        """Values ``[sets, models]`` of sets of samples, ``[sets, size]``."""
        ...

    def of(self, models: Indices) -> Score:
        """The same for some of the models."""
        ...


@dataclass(frozen=True, eq=False)
class MeanScore:
    """The mean of a value per sample (CLIP score, MSE, ...); ``matrix [models, samples]``."""

    matrix: Floats

    def __post_init__(self) -> None:
        _check(self.matrix, 2)

    @property
    def models(self) -> int:
        return len(self.matrix)

    @property
    def samples(self) -> int:
        return self.matrix.shape[1]

    @property
    def full(self) -> Floats:
        return np.asarray(self.matrix.mean(axis=1))

    @property
    def parts(self) -> Floats:
        return self.matrix

    @property
    def shared(self) -> Floats:
        return self.matrix[:0]

    def __call__(self, sets: Indices) -> Floats:
        return set_means(self.matrix, sets)

    def of(self, models: Indices) -> MeanScore:
        return MeanScore(self.matrix[models])


@dataclass(frozen=True, eq=False)
class LogMeanScore:
    """The logarithm of the mean of a value that is never negative (the KL divergence of a sequence).

    Ranks are those of the mean. Errors count in proportion to it: between models whose values span decades,
    those close to the uncompressed one are the ones to be told apart, and their differences are small.

    Args:
        matrix: ``[models, samples]``; no model's mean may be zero.
    """

    matrix: Floats

    def __post_init__(self) -> None:
        _check(self.matrix, 2)
        lowest, mean = float(self.matrix.min()), float(self.matrix.mean(axis=1).min())
        if lowest < 0.0 or mean <= 0.0:
            raise SpaceError(
                "logarithms need values that are never negative and a positive mean of each model; got a "
                f"value of {lowest:.3g} and a mean of {mean:.3g}: leave the uncompressed model out, or use "
                "MeanScore"
            )

    @property
    def models(self) -> int:
        return len(self.matrix)

    @property
    def samples(self) -> int:
        return self.matrix.shape[1]

    @property
    def full(self) -> Floats:
        return np.asarray(np.log(self.matrix.mean(axis=1)))

    @property
    def parts(self) -> Floats:
        means = self.matrix.mean(axis=1, keepdims=True)
        return np.asarray(np.log(means) + self.matrix / means - 1.0)

    @property
    def shared(self) -> Floats:
        return self.matrix[:0]

    def __call__(self, sets: Indices) -> Floats:
        return np.asarray(np.log(np.maximum(set_means(self.matrix, sets), 1e-300)))

    def of(self, models: Indices) -> LogMeanScore:
        return LogMeanScore(self.matrix[models])


@dataclass(frozen=True, eq=False)
class FrechetScore:
    """The Frechet distance of features to a Gaussian (FID and the like).

    Args:
        features: ``[models, samples, d]``, any floating type.
        reference: statistics of what is aimed at (real images, or those of the uncompressed model).
    """

    features: NDArray[np.floating]
    reference: Gaussian

    def __post_init__(self) -> None:
        _check(self.features, 3)

    @property
    def models(self) -> int:
        return len(self.features)

    @property
    def samples(self) -> int:
        return self.features.shape[1]

    @cached_property
    def full(self) -> Floats:
        return np.array([frechet(gaussian(x), self.reference) for x in self.features])

    @cached_property
    def parts(self) -> Floats:
        """The distance plus each sample's influence on it."""
        found = np.stack([influence(x, self.reference) for x in self.features])
        return np.asarray(self.full[:, None] + found)

    @property
    def shared(self) -> Floats:
        """First and second moments of the features' mean over models, along its largest components."""
        centred = self.features.mean(axis=0, dtype=np.float64)
        centred = centred - centred.mean(axis=0)
        values, vectors = np.linalg.eigh(centred.T @ centred)
        found = centred @ vectors[:, np.argsort(-values)[:_COMPONENTS]]
        a, b = np.triu_indices(found.shape[1])
        return np.concatenate([found, found[:, a] * found[:, b]], axis=1).T

    def __call__(self, sets: Indices) -> Floats:
        return np.array([self._distances(self.features[:, s].astype(np.float64)) for s in sets])

    def _distances(self, x: Floats) -> Floats:
        """Distances ``[models]`` of features ``[models, n, d]``, all in one call of LAPACK."""
        middle, size = x.mean(axis=1), x.shape[1]
        centred = x - middle[:, None]
        rooted = centred @ self.reference.root
        values = np.linalg.eigvalsh(rooted.transpose(0, 2, 1) @ rooted / (size - 1))
        cross = np.sqrt(np.maximum(values, 0.0)).sum(axis=1)
        spread = np.square(centred).sum(axis=(1, 2)) / (size - 1) + np.trace(self.reference.cov)
        gap = np.square(middle - self.reference.mean).sum(axis=1)
        return np.asarray(np.maximum(gap + spread - 2.0 * cross, 0.0))

    def of(self, models: Indices) -> FrechetScore:
        some = FrechetScore(self.features[models], self.reference)
        for name in ("full", "parts"):  # what is known already stays known
            if name in vars(self):
                vars(some)[name] = vars(self)[name][models]
        return some


def _check(values: NDArray[np.floating], axes: int) -> None:
    if values.ndim != axes or 0 in values.shape or not np.isfinite(values).all():
        raise SpaceError(f"scores must be a finite array of {axes} axes; got shape {values.shape}")


def set_means(matrix: Floats, sets: Indices) -> Floats:
    """Mean of each row over each set, ``[sets, rows]``."""
    from scipy.sparse import csr_matrix

    count, size = sets.shape
    ones = np.full(count * size, 1.0 / size)
    pick = csr_matrix((ones, sets.ravel(), np.arange(count + 1) * size), (count, matrix.shape[1]))
    return np.asarray(pick @ matrix.T)
