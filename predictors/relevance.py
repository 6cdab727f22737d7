"""How much each decision matters to a Gaussian process: automatic relevance determination.

(Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, section 5.1; gradients by eq. 5.9.)
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from autocomp.predictors.posterior import Data, Dual, Scales
from autocomp.predictors.tuning import FOLDS, Tuned

Floats = NDArray[np.float64]
Integers = NDArray[np.intp]

LEAST = 16
"""Trials from which relevances are learned: by fewer they would be guessed."""
MOST = 100
"""Decisions up to which they are learned: for more it takes seconds, and the trials say little of each."""
RELEVANCE = 1.7
"""Prior deviation of the logarithm of a decision's relevance: most of them within a factor of 30."""
LEAST_GP = 0.1
"""Deviation of the GP from which relevances are learned, if not more."""
_STEPS = 25


def with_relevance(data: Data, tuned: Tuned, owners: Integers) -> Tuned:
    """Scales with relevances where these predict left-out trials better, else ``tuned`` as it is.

    There are as many relevances as decisions, so they are learned anew without each fifth of the trials: of
    trials that they have seen, predictions would look better than they are.

    Args:
        data: ``n`` trials; nothing is learned of fewer than ``LEAST``, or more than ``MOST`` decisions.
        tuned: of these trials; effects and curves stay as they are there.
        owners: number of the decision that each place belongs to, ``[q]``.
    """
    if len(data) < LEAST or not 0 < len(np.unique(owners)) <= MOST:
        return tuned
    mean, std = np.empty(len(data)), np.empty(len(data))
    for fold in range(FOLDS):
        out = np.arange(len(data)) % FOLDS == fold
        rest, left = data[np.flatnonzero(~out)], data[np.flatnonzero(out)]
        scales, _ = learn_relevance(rest, tuned.scales, owners)
        mean[out], variance = Dual(rest, scales).predict(left.inputs)
        std[out] = np.sqrt(np.maximum(variance, 0.0) + scales.noise**2 + left.errors)
    if _density(data.target, mean, std) < _density(data.target, tuned.mean, tuned.std):
        return tuned
    scales, likelihood = learn_relevance(data, tuned.scales, owners)
    return Tuned(scales, likelihood, mean, std)


def _density(target: Floats, mean: Floats, std: Floats) -> float:
    """Logarithm of the normal density of ``target [n]`` but for a constant."""
    return -float(np.sum(0.5 * ((target - mean) / std) ** 2 + np.log(std)))


def learn_relevance(data: Data, start: Scales, owners: Integers) -> tuple[Scales, float]:
    """Relevances, the GP's deviation and the noise by gradient ascent; of order ``n^3`` a step.

    Args:
        data: ``n`` trials.
        start: where the ascent begins.
        owners: number of the decision that each place belongs to, ``[q]``.

    Returns:
        The scales, and the logarithm of the likelihood times the priors but for constants.
    """
    count, places, n = int(owners.max(initial=-1)) + 1, data.inputs.places, len(data)
    features = data.inputs.whitened(start)
    rest = features @ features.T
    # Of the logarithms of relevances, of the GP and of the noise.
    begin = np.concatenate([np.zeros(count), np.log([max(start.smooth, LEAST_GP), start.noise])])
    deviation = np.concatenate([np.full(count, RELEVANCE), np.ones(2)])

    def scales(x: Floats) -> Scales:
        relevance = np.exp(x[:count])[owners]
        return replace(start, smooth=math.exp(x[-2]), noise=math.exp(x[-1]), relevance=relevance)

    def loss(x: Floats) -> tuple[float, Floats]:
        now, pull = scales(x), (x - begin) / deviation
        gp = now.gp(data.inputs, data.inputs)
        kernel = rest + gp
        kernel[np.diag_indices_from(kernel)] += now.noise**2 + data.errors
        factor = cho_factor(kernel, lower=True, check_finite=False)
        solved = cho_solve(factor, data.target, check_finite=False)
        likelihood = -0.5 * float(data.target @ solved) - float(np.log(np.diag(factor[0])).sum())
        # Twice the slope of the likelihood in each entry of the kernel, and what the GP's entries make of it.
        slope = np.outer(solved, solved) - cho_solve(factor, np.eye(n), check_finite=False)
        weighted = slope * gp
        squares = weighted.sum(axis=1) @ places**2 - np.sum(places * (weighted @ places), axis=0)
        moved = np.bincount(owners, squares * np.exp(2.0 * x[:count])[owners], count) / -(now.length**2)
        gradient = [*moved, weighted.sum(), now.noise**2 * np.trace(slope)]
        return 0.5 * float(pull @ pull) - likelihood, pull / deviation - np.array(gradient)

    bounds = [(-4.0, 3.0)] * count + [(-5.0, 2.0), (-6.0, 1.0)]
    found = minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _STEPS})
    return scales(found.x), -float(found.fun)
