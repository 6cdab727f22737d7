"""The diffusers scheduler: the sampler's numbers to the bit, in pipelines and after a round trip to disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

from autocomp.diffusion.denoiser import Denoiser
from autocomp.diffusion.noise import NoiseSchedule
from autocomp.diffusion.sampler import Sampler
from autocomp.diffusion.schedule import Schedule, Step, uniform_schedule, uniform_times
from autocomp.diffusion.scheduler import DEFAULT_STEPS, UnifiedScheduler
from autocomp.errors import CapabilityError, SpaceError

CONFIG = {"beta_schedule": "scaled_linear", "beta_end": 0.012, "prediction_type": "v_prediction"}
FLOW = dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
SCHEDULE = Schedule(
    (
        Step(1.0, 1, "data", True),
        Step(1 / 1.2, 2, "noise", relax=0.07),
        Step(0.5523, 3, "data", True),
        Step(0.2, 3, "noise", True),
        Step(0.06, 2),
    ),
    end=1 / 900,
)


@pytest.fixture(scope="module")
def model() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=1000, norm_num_groups=1,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def loop(scheduler: UnifiedScheduler, model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """What a pipeline does, guidance apart."""
    scheduler.set_timesteps(50)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        output = model(given, timestep=t.expand(len(x)), class_labels=labels).sample[:, :4]
        x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.mark.parametrize("config", [CONFIG, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scheduler_and_sampler_agree_to_the_bit(model, config, dtype, tmp_path):
    x, labels = torch.randn(2, 4, 8, 8, dtype=dtype), torch.tensor([3, 500])
    model = copy.deepcopy(model).to(dtype)
    expected = Sampler({"": Denoiser(model)}, config, SCHEDULE)(x, {"class_labels": labels})
    scheduler = UnifiedScheduler.of(config, SCHEDULE)
    assert scheduler.schedule == SCHEDULE
    found = loop(scheduler, model, x, labels)
    assert found.dtype == dtype and torch.equal(found, expected)
    scheduler.save_pretrained(tmp_path)
    again = UnifiedScheduler.from_pretrained(tmp_path)
    kept = {n: v for n, v in scheduler.config.items() if not n.startswith("_")}
    assert again.schedule == SCHEDULE and kept.items() <= again.config.items()
    assert torch.equal(loop(again, model, x, labels), expected)
    assert torch.equal(loop(again, model, x, labels), expected)  # nothing is left of an earlier sampling


def test_a_saved_pipeline_loads_with_it_and_draws_the_same_images(model, tmp_path):
    """diffusers itself finds the class by the module that model_index.json names."""
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    pipeline = DiTPipeline(model, vae, UnifiedScheduler.of(CONFIG, SCHEDULE))
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["autocomp.diffusion.scheduler", "UnifiedScheduler"]
    loaded = DiTPipeline.from_pretrained(tmp_path)
    images = []
    for each in (pipeline, loaded):
        each.set_progress_bar_config(disable=True)
        images.append(
            each([3, 500], generator=torch.manual_seed(2), guidance_scale=1.5, output_type="np").images
        )
    assert np.array_equal(*images)
    noise = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(2))
    latents = Sampler({"": Denoiser(model)}, CONFIG, SCHEDULE, 1.5)(
        noise, {"class_labels": torch.tensor([3, 500])}
    )
    with torch.no_grad():
        expected = (vae.decode(1 / vae.config.scaling_factor * latents).sample / 2 + 0.5).clamp(0, 1)
    assert np.array_equal(images[0], expected.permute(0, 2, 3, 1).numpy())


def test_begin_index_starts_the_solver_anew(model):
    """As image-to-image pipelines do: the rest of the schedule is a schedule of its own."""
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    rest = Schedule(SCHEDULE.steps[2:], SCHEDULE.end)
    expected = Sampler({"": Denoiser(model)}, CONFIG, rest)(x, {"class_labels": labels})
    scheduler = UnifiedScheduler.of(CONFIG, SCHEDULE)
    for place in (True, False):  # told, or found by the first timestep
        scheduler.set_timesteps(5)
        if place:
            scheduler.set_begin_index(2)
        y = x
        with torch.no_grad():
            for t in scheduler.timesteps[2:]:
                output = model(y, timestep=t.expand(2), class_labels=labels).sample[:, :4]
                (y,) = scheduler.step(output, t, y, return_dict=False)
        assert torch.equal(y, expected)
        assert scheduler.step_index == 5


def test_steps_that_do_not_exist_are_errors():
    scheduler = UnifiedScheduler.of(CONFIG, SCHEDULE)
    x = torch.randn(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"timestep 123\.0 is none of"):
        scheduler.step(x, 123.0, x)
    scheduler.set_timesteps()
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="all 5 steps are done"):
        scheduler.step(x, 0.0, x)


def test_noise_is_added_as_in_training():
    scheduler, reference = (
        UnifiedScheduler.of(CONFIG, SCHEDULE),
        DDPMScheduler(beta_schedule="scaled_linear", beta_end=0.012),
    )
    clean, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 400, 999])
    torch.testing.assert_close(scheduler.add_noise(clean, noise, t), reference.add_noise(clean, noise, t))
    assert len(scheduler) == 1000


def test_without_a_schedule_it_has_a_default():
    scheduler = UnifiedScheduler()
    expected = uniform_schedule(uniform_times(DEFAULT_STEPS), order=2)
    assert scheduler.schedule == expected
    assert scheduler.timesteps[0] == 999.0
    flow = UnifiedScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", shift=3.0)
    assert [s.time for s in flow.schedule.steps] == NoiseSchedule.of(FLOW).default_times(DEFAULT_STEPS)


def test_trained_betas_survive_the_round_trip(tmp_path: Path):
    betas = np.linspace(0.01, 0.3, 10)
    scheduler = UnifiedScheduler.of({"trained_betas": betas, "num_train_timesteps": 10}, SCHEDULE)
    scheduler.save_pretrained(tmp_path)
    again = UnifiedScheduler.from_pretrained(tmp_path)
    assert again.noise.log_alphas.tolist() == scheduler.noise.log_alphas.tolist()
    assert again.noise.alpha(1.0) ** 2 == pytest.approx(np.prod(1 - betas))


def test_what_is_no_schedule_or_no_noise_is_refused():
    with pytest.raises(SpaceError):
        UnifiedScheduler(steps=[{"time": 0.5}, {"time": 0.7}])
    with pytest.raises(CapabilityError):
        UnifiedScheduler.of({"sigma_max": 80.0}, SCHEDULE)
