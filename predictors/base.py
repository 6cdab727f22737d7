"""The interface of a predictor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from autocomp.space import Candidate
from autocomp.trial import Trial


@dataclass(frozen=True)
class Prediction:
    """Means and standard deviations of one metric, shape ``[candidates]``, in the metric's unit."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]


def log_normal(middle: NDArray[np.float64], deviation: NDArray[np.float64]) -> Prediction:
    """Median and standard deviation of what has a normal logarithm with these, shape ``[candidates]``."""
    value = np.exp(np.clip(middle, -600, 600))
    return Prediction(value, value * np.sqrt(np.expm1(np.minimum(deviation**2, 4.0))) + 1e-300)


class Predictor(Protocol):
    """Learns one metric from trials. Usable before the first ``fit`` (then from its prior alone)."""

    def fit(self, trials: Sequence[Trial]) -> Self:
        """Learn from the trials that have the metric; failed and NaN ones are ignored."""
        ...

    def predict(self, candidates: Sequence[Candidate]) -> Prediction: ...
