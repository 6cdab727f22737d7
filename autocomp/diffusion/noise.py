"""How much noise a sample holds at a time, and what a model's output says about it. Numbers only: no torch.

Time runs from 1 (pure noise) to 0 (clean). A sample is ``alpha(t) * clean + sigma(t) * noise``; half log-SNR
is ``log(alpha / sigma)``, the variable in which the solvers expand (DPM-Solver, arXiv 2206.00927).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import CapabilityError

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")

T = TypeVar("T", bound="Linear")


class Linear(Protocol):
    """What can be added up and scaled: a torch tensor, a numpy array, a float."""

    def __mul__(self: T, other: float) -> T: ...
    def __add__(self: T, other: T) -> T: ...


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise of a diffusers scheduler configuration, at every real time in [0, 1].

    Attributes:
        kind: ``vp`` has ``alpha^2 + sigma^2 = 1`` from betas, log alpha interpolated linearly between the
            training timesteps (and 0 at time 0) as DPM-Solver does; ``flow`` has ``alpha = 1 - t`` and
            ``sigma = t``.
        prediction: what the model returns; one of ``PREDICTIONS``.
        steps: K, the number of training timesteps.
        shift: a flow's default times are moved towards noise by it (arXiv 2403.03206, section 5.3.2).
        log_alphas: of a ``vp`` schedule at times 0, 1/K, ..., 1; empty for ``flow``.
        dynamic: a flow's settings for a shift that grows with the number of image tokens, if it does.
    """

    kind: Literal["vp", "flow"]
    prediction: str
    steps: int = 1000
    shift: float = 1.0
    log_alphas: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False, compare=False)
    dynamic: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers scheduler's configuration; its class does not matter, only how noise is defined.

        Raises:
            CapabilityError: for one without betas that is no flow (EDM, consistency models), and for an
                unknown beta schedule or prediction type.
        """
        steps = int(config.get("num_train_timesteps", 1000))
        if _is_flow(config):
            dynamic = dict(config) if config.get("use_dynamic_shifting") else {}
            return cls("flow", "flow_prediction", steps, float(config.get("shift") or 1.0), dynamic=dynamic)
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS[:3]:
            raise CapabilityError(f"prediction_type {prediction!r} is not one of {', '.join(PREDICTIONS)}")
        alphas = np.cumprod(1.0 - _betas(config, steps))
        if config.get("rescale_betas_zero_snr"):
            alphas = _zero_terminal(alphas)
        return cls("vp", prediction, steps, log_alphas=np.concatenate([[0.0], 0.5 * np.log(alphas)]))

    def alpha(self, time: float) -> float:
        return 1.0 - time if self.kind == "flow" else math.exp(self._log_alpha(time))

    def sigma(self, time: float) -> float:
        return float(time) if self.kind == "flow" else math.sqrt(-math.expm1(2.0 * self._log_alpha(time)))

    def half_log_snr(self, time: float) -> float:
        """log(alpha / sigma): +inf at time 0, and -inf where a flow is pure noise."""
        alpha, sigma = self.alpha(time), self.sigma(time)
        if sigma <= 0.0:
            return math.inf
        return math.log(alpha) - math.log(sigma) if alpha > 0.0 else -math.inf

    def inverse(self, half_log_snr: float) -> float:
        """The time at which half log-SNR has this value, within [0, 1]."""
        if self.kind == "flow":
            return 1.0 / (1.0 + math.exp(min(half_log_snr, 700.0)))
        log_alpha = -0.5 * float(np.logaddexp(0.0, -2.0 * half_log_snr))
        times = np.linspace(1.0, 0.0, self.steps + 1)
        return float(np.interp(log_alpha, self.log_alphas[::-1], times))

    def model_time(self, time: float) -> float:
        """What the model gets as timestep: training timestep k, counted from 0, is time (k + 1) / K. Flow
        models count from 1, as ``FlowMatchEulerDiscreteScheduler`` does."""
        return time * self.steps - (self.kind == "vp")

    def time(self, model_time: float) -> float:
        """The inverse of ``model_time``."""
        return (model_time + (self.kind == "vp")) / self.steps

    def default_times(self, count: int, tokens: int | None = None) -> list[float]:
        """``count`` falling times from 1, evenly spaced; a flow's are shifted as its configuration says.

        Args:
            tokens: of the image, for configurations whose shift depends on it (Flux); 4096 unless given.
        """
        even = [(count - i) / count for i in range(count)]
        shift = self._dynamic_shift(tokens or 4096) if self.dynamic else self.shift
        return [shift * t / (1.0 + (shift - 1.0) * t) for t in even]

    def clean(self, time: float) -> tuple[float, float]:
        """(a, b) with clean image = a * sample + b * model output."""
        alpha, sigma = self.alpha(time), self.sigma(time)
        if self.prediction == "epsilon":
            return 1.0 / alpha, -sigma / alpha
        if self.prediction == "v_prediction":
            return alpha, -sigma
        return (0.0, 1.0) if self.prediction == "sample" else (1.0, -sigma)

    def noise(self, time: float) -> tuple[float, float]:
        """(a, b) with noise = a * sample + b * model output."""
        alpha, sigma = self.alpha(time), self.sigma(time)
        if self.prediction == "epsilon":
            return 0.0, 1.0
        if self.prediction == "v_prediction":
            return sigma, alpha
        return (1.0 / sigma, -alpha / sigma) if self.prediction == "sample" else (1.0, alpha)

    def split(self, output: T, sample: T, time: float) -> tuple[T, T]:
        """(clean image, noise) that a model output at this sample and time stands for, of its shape."""
        (a, b), (c, d) = self.clean(time), self.noise(time)
        return sample * a + output * b, sample * c + output * d

    def _log_alpha(self, time: float) -> float:
        place = time * self.steps
        below = min(max(int(place), 0), self.steps - 1)
        first, second = self.log_alphas[below], self.log_alphas[below + 1]
        return float(first + (place - below) * (second - first))

    def _dynamic_shift(self, tokens: int) -> float:
        """Linear between two token counts; configurations of the exponential type give its logarithm."""
        few, many = self.dynamic.get("base_image_seq_len", 256), self.dynamic.get("max_image_seq_len", 4096)
        low, high = self.dynamic.get("base_shift", 0.5), self.dynamic.get("max_shift", 1.15)
        mu = low + (high - low) * (tokens - few) / (many - few)
        return mu if self.dynamic.get("time_shift_type") == "linear" else math.exp(mu)


def _is_flow(config: Mapping[str, Any]) -> bool:
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return True
    return "shift" in config and not _has_betas(config)


def _has_betas(config: Mapping[str, Any]) -> bool:
    return any(config.get(k) is not None for k in ("beta_schedule", "beta_start", "trained_betas"))


def _betas(config: Mapping[str, Any], steps: int) -> NDArray[np.float64]:
    if not _has_betas(config):
        name = config.get("_class_name", "this scheduler")
        raise CapabilityError(
            f"{name} defines its noise neither by betas nor as a flow; it can't be sampled here"
        )
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], dtype=np.float64)
    kind = config.get("beta_schedule", "linear")
    low, high = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if kind == "linear":
        return np.linspace(low, high, steps)
    if kind == "scaled_linear":
        return np.linspace(math.sqrt(low), math.sqrt(high), steps) ** 2
    if kind == "sigmoid":
        return low + (high - low) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, steps)))
    if kind == "squaredcos_cap_v2":  # arXiv 2102.09672, equation 17
        bars = np.cos((np.linspace(0.0, 1.0, steps + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1.0 - bars[1:] / bars[:-1], 0.999)
    raise CapabilityError(
        f"beta_schedule {kind!r} is unknown; known: linear, scaled_linear, sigmoid, squaredcos_cap_v2"
    )


def _zero_terminal(alphas: NDArray[Any]) -> NDArray[np.float64]:
    """Rescaled so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1), but for 2^-24: half
    log-SNR stays finite, with diffusers' own number."""
    roots = np.sqrt(alphas)
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return np.maximum(roots**2, 2.0**-24)
