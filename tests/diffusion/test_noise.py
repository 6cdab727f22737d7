"""Noise schedules against diffusers' schedulers and against their own inverse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.diffusion.noise import PREDICTIONS, NoiseSchedule
from autocomp.errors import CapabilityError

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
BETAS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"trained_betas": [0.01, 0.02, 0.05, 0.1], "num_train_timesteps": 4},
]


@pytest.mark.parametrize("config", BETAS)
def test_training_timesteps_have_diffusers_alphas(config):
    reference = DDPMScheduler(**config)
    noise = NoiseSchedule.of(reference.config)
    steps = noise.steps
    found = [noise.alpha((k + 1) / steps) ** 2 for k in range(steps)]
    np.testing.assert_allclose(found, reference.alphas_cumprod, rtol=3e-4 if "cos" in str(config) else 3e-5)
    assert noise.model_time((7 + 1) / steps) == pytest.approx(7) and noise.time(7) == (7 + 1) / steps


def test_zero_terminal_snr_is_diffusers_but_for_the_last_timestep():
    config = dict(DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).config)
    noise = NoiseSchedule.of(config)
    found = [noise.alpha((k + 1) / 1000) ** 2 for k in range(999)]
    np.testing.assert_allclose(found, DDIMScheduler(**config).alphas_cumprod[:-1], rtol=3e-3)
    reference = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    assert noise.alpha(1.0) ** 2 == pytest.approx(float(reference.alphas_cumprod[-1]), rel=1e-6)


def test_samples_are_noised_as_in_training():
    reference = DDPMScheduler(beta_schedule="scaled_linear")
    noise, clean, eps = NoiseSchedule.of(reference.config), torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    for k in (0, 500, 999):
        expected = reference.add_noise(clean, eps, torch.full((4,), k))
        time = noise.time(k)
        torch.testing.assert_close(noise.alpha(time) * clean + noise.sigma(time) * eps, expected)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-4, 1.0), st.sampled_from([*BETAS, FLOW]))
def test_inverse_finds_the_time(time, config):
    noise = NoiseSchedule.of(config)
    if math.isfinite(noise.half_log_snr(time)):
        assert noise.inverse(noise.half_log_snr(time)) == pytest.approx(time, rel=1e-6, abs=1e-9)
    assert 0.0 <= noise.sigma(time) <= 1.0


@pytest.mark.parametrize("config", [*BETAS, FLOW])
def test_half_log_snr_rises_to_infinity_as_time_falls(config):
    noise = NoiseSchedule.of(config)
    values = [noise.half_log_snr(t) for t in np.linspace(1.0, 0.0, 333)]
    assert values == sorted(set(values))
    assert values[-1] == math.inf and noise.alpha(0.0) == 1.0 and noise.sigma(0.0) == 0.0
    assert (values[0] == -math.inf) == (noise.kind == "flow")
    assert noise.inverse(-800.0) == 1.0 and noise.inverse(800.0) == pytest.approx(0.0, abs=1e-300)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_split_finds_what_was_mixed(prediction):
    noise = NoiseSchedule.of({"beta_schedule": "linear", "prediction_type": prediction})
    assert noise.prediction == prediction
    clean, eps = np.random.default_rng(0).standard_normal((2, 5))
    for time in (0.9, 0.31):
        alpha, sigma = noise.alpha(time), noise.sigma(time)
        output = {
            "epsilon": eps, "sample": clean, "v_prediction": alpha * eps - sigma * clean,
            "flow_prediction": eps - clean,
        }[prediction]  # fmt: skip
        found = noise.split(output, alpha * clean + sigma * eps, time)
        np.testing.assert_allclose(found, (clean, eps), rtol=1e-9)


def test_default_times_of_flows_are_diffusers_sigmas():
    count = 7
    even = np.linspace(1.0, 1 / count, count)
    plain = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain.set_timesteps(sigmas=even)
    noise = NoiseSchedule.of(plain.config)
    np.testing.assert_allclose(noise.default_times(count), plain.sigmas[:-1], rtol=1e-6)
    np.testing.assert_allclose(
        [noise.model_time(t) for t in noise.default_times(count)], plain.timesteps, rtol=1e-6
    )
    for kind in ("exponential", "linear"):
        moving = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type=kind, max_shift=1.15
        )
        moving.set_timesteps(sigmas=even, mu=1.15)
        found = NoiseSchedule.of(moving.config).default_times(count, tokens=4096)
        np.testing.assert_allclose(found, moving.sigmas[:-1], rtol=1e-6)


def test_default_times_are_diffusers_trailing_timesteps():
    reference = DDIMScheduler(timestep_spacing="trailing")
    reference.set_timesteps(20)
    noise = NoiseSchedule.of(reference.config)
    assert [round(noise.model_time(t)) for t in noise.default_times(20)] == reference.timesteps.tolist()


def test_flows_are_known_by_their_settings():
    assert NoiseSchedule.of(UniPCMultistepScheduler(use_flow_sigmas=True).config).kind == "flow"
    assert (
        NoiseSchedule.of(DPMSolverMultistepScheduler(prediction_type="flow_prediction").config).kind == "flow"
    )
    assert NoiseSchedule.of(UniPCMultistepScheduler().config).kind == "vp"


def test_what_is_neither_is_refused_by_name():
    with pytest.raises(CapabilityError, match="EDMEulerScheduler"):
        NoiseSchedule.of({**EDMEulerScheduler().config, "_class_name": "EDMEulerScheduler"})
    with pytest.raises(CapabilityError, match="'laplace'"):
        NoiseSchedule.of({"beta_schedule": "laplace"})
    with pytest.raises(CapabilityError, match="'score'"):
        NoiseSchedule.of({"beta_schedule": "linear", "prediction_type": "score"})
