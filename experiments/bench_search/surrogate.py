"""What a table that is not exhaustive says about all other configurations: a regression with a stated error.

As in NAS-Bench-301 (arXiv 2008.09777): searches are judged on a model of the measurements. It is a Gaussian
process, none of the predictors that the searchers use; ``held_out`` tells how well it ranks what it has not
seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bench_problem import Floats
from scipy.stats import kendalltau

from autocomp.space import Candidate, Choice, SearchSpace
from autocomp.trial import Trial

TUNED_ON = 400
"""Trials from which scales are learned; all of them answer."""
FOLDS = 5


@dataclass(frozen=True)
class Surrogate:
    """One metric of the candidates of a space.

    Attributes:
        space: categorical decisions; ordinal ones are coded by their place, others by what they are.
        model: a fitted regressor of scikit-learn.
        log: whether it learned the logarithm.
    """

    space: SearchSpace
    model: Any
    log: bool

    @classmethod
    def of(cls, space: SearchSpace, trials: Sequence[Trial], metric: str) -> Surrogate:
        """Learn ``metric`` of measured ``trials``."""
        values = np.array([t.value(metric) for t in trials])
        log = bool(values.min() > 0)
        return cls(space, _fitted(coded(space, [t.candidate for t in trials]), _target(values, log)), log)

    def predict(self, candidates: Sequence[Candidate]) -> Floats:
        """Of each candidate, in the metric's unit, ``[n]``."""
        found = np.asarray(self.model.predict(coded(self.space, candidates)))
        return np.exp(found) if self.log else found


def held_out(space: SearchSpace, trials: Sequence[Trial], metric: str) -> tuple[float, float]:
    """Kendall's tau of left-out fifths, and the root mean square of their relative errors."""
    rows, values = coded(space, [t.candidate for t in trials]), np.array([t.value(metric) for t in trials])
    target = _target(values, bool(values.min() > 0))
    found = np.zeros(len(target))
    fold = np.arange(len(target)) % FOLDS
    for k in range(FOLDS):
        found[fold == k] = _fitted(rows[fold != k], target[fold != k]).predict(rows[fold == k])
    return float(kendalltau(found, target).statistic), float(np.sqrt(np.mean((found - target) ** 2)))


def coded(space: SearchSpace, candidates: Sequence[Candidate]) -> Floats:
    """A column for each ordinal decision (0 to 1), one for each option of the others, ``[n, columns]``."""
    columns: list[list[float]] = []
    for d in space.decisions:
        domain = d.domain
        assert isinstance(domain, Choice), f"{d.name} is no categorical decision"
        at = [domain.index(c[d.name]) for c in candidates]
        if domain.ordered:
            columns.append([i / max(len(domain.options) - 1, 1) for i in at])
        else:
            columns += [[float(i == k) for i in at] for k in range(len(domain.options))]
    return np.array(columns, dtype=np.float64).T


def _target(values: Floats, log: bool) -> Floats:
    return np.log(values) if log else values


def _fitted(rows: Floats, target: Floats) -> Any:
    """A process with a linear part and a smooth one; scales by likelihood on some of the trials."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

    smooth = ConstantKernel(1.0, (1e-3, 1e3)) * RBF(3.0, (0.3, 100.0))
    kernel = ConstantKernel(1.0, (1e-4, 1e3)) * DotProduct(1.0) + smooth + WhiteKernel(1e-3, (1e-7, 1.0))
    some = np.linspace(0, len(rows) - 1, min(TUNED_ON, len(rows))).astype(int)
    tuned = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0).fit(rows[some], target[some])
    whole = GaussianProcessRegressor(tuned.kernel_, optimizer=None, normalize_y=True)
    return whole.fit(rows, target)
