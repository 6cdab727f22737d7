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
    """Means and standard deviations of one metric, shape ``[candidates]``, in the metric's unit.

    Attributes:
        mean: expected value.
        std: of a measurement around it: what is not known of the candidate, and the measurement's own noise.
        noise: that noise alone, by the standard errors of the trials; ``None`` where it is not told apart.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    noise: NDArray[np.float64] | None = None

    @property
    def doubt(self) -> NDArray[np.float64]:
        """Standard deviation of the true value, ``[candidates]``: a tenth of ``std`` or more."""
        if self.noise is None:
            return self.std
        return np.asarray(np.sqrt(np.maximum(self.std**2 - self.noise**2, 0.01 * self.std**2)))


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
