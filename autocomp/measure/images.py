"""How far images are from other images: Frechet distance of features, PSNR and SSIM, with their noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autocomp.trial import Estimate

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]

#: Decibels that stand for "the same image": the peak signal-to-noise ratio of equal images is infinite.
MAX_PSNR = 100.0
#: Eigenvalues below this share of the largest one count as zero: features that never vary.
RANK_TOLERANCE = 1e-10
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


@dataclass(frozen=True)
class Gaussian:
    """Mean ``[d]`` and covariance ``[d, d]`` (divided by n - 1) of ``n`` feature vectors, float64."""

    mean: Array
    cov: Array
    n: int

    @cached_property
    def root(self) -> Array:
        """Square root of the covariance."""
        return _power(self.cov, 0.5)


def gaussian(features: NDArray[np.floating]) -> Gaussian:
    """Statistics of features ``[n, d]``.

    Raises:
        ValueError: not a matrix, fewer than two rows, or a value that is not finite.
    """
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or len(rows) < 2 or not np.isfinite(rows).all():
        raise ValueError(f"need finite features [n >= 2, d]; got {rows.shape} (or NaN among them)")
    mean = rows.mean(0)
    centred = rows - mean
    return Gaussian(mean, centred.T @ centred / (len(rows) - 1), len(rows))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance of two normal distributions, as in FID (arXiv 1706.08500):
    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_b^1/2 C_a C_b^1/2)^1/2)``; exactly 0 for equal statistics.

    Of samples it is biased upwards, by a term that falls like 1/n and grows with the number of features:
    compare numbers of equal n only.
    """
    if np.array_equal(a.mean, b.mean) and np.array_equal(a.cov, b.cov):
        return 0.0
    root = b.root
    cross = np.sqrt(np.linalg.eigvalsh(_symmetric(root @ a.cov @ root)).clip(0.0)).sum()
    shift = a.mean - b.mean
    return float(max(0.0, shift @ shift + np.trace(a.cov) + np.trace(b.cov) - 2.0 * cross))


def influence(features: NDArray[np.floating], reference: Gaussian) -> Array:
    """Influence ``[n]`` of each row of ``features [n, d]`` on the distance to ``reference``: how fast the
    distance changes when more weight is put on that row. Their mean is 0; their standard deviation over
    ``sqrt(n)`` is the standard error (delta method), with the reference taken as known.

    The derivative by the mean is ``2 (m - m_r)``, that by the covariance ``I - A``, where
    ``A = C_r^1/2 (C_r^1/2 C C_r^1/2)^-1/2 C_r^1/2`` is the optimal transport map to the reference. Where
    ``C`` is singular (fewer images than features), the inverse is taken in its range.
    """
    own = gaussian(features)
    root = reference.root
    transport = root @ _power(root @ own.cov @ root, -0.5) @ root
    slope = np.eye(len(own.mean)) - transport
    centred = np.asarray(features, np.float64) - own.mean
    spread = np.einsum("ni,ij,nj->n", centred, slope, centred)
    values: Array = 2.0 * centred @ (own.mean - reference.mean) + spread - spread.mean()
    return values


def fd_estimate(features: NDArray[np.floating], reference: Gaussian) -> Estimate:
    """Frechet distance of ``features [n, d]`` to the reference and its standard error; see ``influence``."""
    n = len(features)
    stderr = influence(features, reference).std(ddof=1) / math.sqrt(n)
    return Estimate(frechet(gaussian(features), reference), float(stderr), n)


def mean_estimate(values: NDArray[np.floating]) -> Estimate:
    """Mean of one number an image, with its standard error."""
    rows = np.asarray(values, np.float64)
    n = len(rows)
    return Estimate(float(rows.mean()), float(rows.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0, n)


def ratio_estimate(numerators: NDArray[np.floating], denominators: NDArray[np.floating]) -> Estimate:
    """Sum of numerators over sum of denominators, one of each an image; standard error by the delta method.
    0 where all numerators are; not a number where only the denominators are 0."""
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    n = len(above)
    if not above.any():
        return Estimate(0.0, 0.0, n)
    ratio = float(above.sum() / below.sum()) if below.any() else math.nan
    error = (above - ratio * below).std(ddof=1) / (below.mean() * math.sqrt(n)) if n > 1 else 0.0
    return Estimate(ratio, float(error), n)


def mse(images: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference an image: float32 ``[n]`` from two ``[n, C, H, W]``."""
    return (images.float() - reference.float()).square().flatten(1).mean(1)


def psnr(images: Tensor, reference: Tensor, span: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio an image in dB, ``10 log10(span^2 / mse)``, at most ``MAX_PSNR``: ``[n]``.
    ``span`` is the distance from black to white: 2 for images in [-1, 1]."""
    error = mse(images, reference).double()
    floor = span**2 * 10 ** (-MAX_PSNR / 10)
    return (10.0 * (span**2 / error.clamp(min=floor)).log10()).float()


def ssim(images: Tensor, reference: Tensor, span: float = 2.0) -> Tensor:
    """Structural similarity an image: ``[n]`` from two ``[n, C, H, W]`` (Wang et al. 2004, "Image quality
    assessment: from error visibility to structural similarity", equation 13).

    Gaussian window of 11 pixels and standard deviation 1.5, cut to the largest odd size that fits smaller
    images; positions where the window lies inside the image; K1 = 0.01, K2 = 0.03; mean over positions and
    channels.
    """
    import torch

    x, y = images.double(), reference.double()
    channels, side = x.shape[1], min(SSIM_WINDOW, *x.shape[-2:])
    side -= 1 - side % 2
    steps = torch.arange(side, dtype=torch.float64, device=x.device) - side // 2
    line = (-(steps**2) / (2 * SSIM_SIGMA**2)).exp()
    window = (torch.outer(line, line) / line.sum() ** 2).expand(channels, 1, side, side)

    def mean(values: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(values, window, groups=channels)

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    found = (2 * mx * my + c1) * (2 * both + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return found.flatten(1).mean(1).float()


def _symmetric(matrix: Array) -> Array:
    return (matrix + matrix.T) / 2


def _power(matrix: Array, exponent: float) -> Array:
    """Power of a symmetric matrix without negative eigenvalues; a negative power in its range."""
    values, vectors = np.linalg.eigh(_symmetric(matrix))
    floor = RANK_TOLERANCE * max(values[-1], 0.0)
    powers = np.zeros_like(values)
    kept = values > floor
    powers[kept] = values[kept] ** exponent
    found: Array = (vectors * powers) @ vectors.T
    return found
