"""Sampling: which model is called with what, by which halves, and what happens to numbers that are none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor, nn

from autocomp.diffusion.denoiser import Denoiser
from autocomp.diffusion.noise import NoiseSchedule
from autocomp.diffusion.sampler import Sampler
from autocomp.diffusion.schedule import Schedule, Step, uniform_schedule, uniform_times
from autocomp.errors import SpaceError

CONFIG = {"beta_schedule": "linear", "prediction_type": "v_prediction"}
LABELS = {"class_labels": torch.tensor([1, 4, 9])}
NOISE = torch.randn(3, 1, 8, 8, generator=torch.manual_seed(5))
MIXED = Schedule(
    (
        Step(1.0, 1, "data", True),
        Step(0.81, 2, "noise", guidance=False),
        Step(0.5523, 3, "data", True, relax=-0.1),
        Step(0.2, 3, "noise", True),
        Step(0.06, 2),
    ),
    end=1e-3,
)


def dit(seed: int = 0) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=10, norm_num_groups=1,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser(dit())


class Watch:
    """Keeps what an observer saw."""

    def __init__(self) -> None:
        self.states, self.calls = [], []

    def __call__(self, state, x, time, conditions, output) -> None:
        self.states.append(dataclasses.replace(state))
        self.calls.append((x, time, conditions, output))


def test_a_pipelines_loop_gives_the_same_images(denoiser):
    """Guidance as DiTPipeline computes it, DDIM as diffusers steps it."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction")
    scheduler.set_timesteps(5)
    x, both = NOISE, torch.cat([LABELS["class_labels"], torch.full((3,), 10)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = denoiser.model(torch.cat([x, x]), timestep=t.expand(6), class_labels=both).sample
            aimed, free = out.chunk(2)
            x = scheduler.step(free + 1.7 * (aimed - free), t, x).prev_sample
    schedule = uniform_schedule(uniform_times(5))
    found = Sampler({"": denoiser}, scheduler.config, schedule, 1.7)(NOISE, LABELS)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    unguided = Sampler({"": denoiser}, scheduler.config, schedule, 1.0)(NOISE, LABELS)
    assert (unguided - found).abs().max() > 1e-2


def test_the_state_tells_step_time_and_halves(denoiser):
    watch, before = Watch(), denoiser.state.started
    Sampler({"": denoiser}, CONFIG, MIXED, 2.0)(NOISE, LABELS, watch)
    assert [s.index for s in watch.states] == [0, 1, 2, 3, 4]
    assert [s.time for s in watch.states] == [s.time for s in MIXED.steps]
    assert [s.guided for s in watch.states] == [True, False, True, True, True]
    assert {(s.total, s.model, s.started) for s in watch.states} == {(5, "", before + 1)}
    noise = NoiseSchedule.of(CONFIG)
    for state, (x, time, conditions, output) in zip(watch.states, watch.calls):
        assert time == noise.model_time(state.time)
        assert len(x) == len(output) == len(conditions["class_labels"]) == (6 if state.guided else 3)
        if state.guided:
            assert torch.equal(x[:3], x[3:])
            assert conditions["class_labels"].tolist() == [1, 4, 9, 10, 10, 10]
        else:
            assert conditions["class_labels"].tolist() == [1, 4, 9]


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
def test_guidance_interpolates_between_the_halves(denoiser, guidance):
    """One step to the image is affine in the output, so that guidance moves along a line there too."""
    schedule = Schedule((Step(1.0),))
    aimed = Sampler({"": denoiser}, CONFIG, schedule)(NOISE, LABELS)
    free = Sampler({"": denoiser}, CONFIG, schedule)(NOISE, {"class_labels": torch.full((3,), 10)})
    found = Sampler({"": denoiser}, CONFIG, schedule, guidance)(NOISE, LABELS)
    torch.testing.assert_close(found, free + guidance * (aimed - free), rtol=1e-4, atol=1e-5)


def test_each_step_calls_its_model(denoiser):
    other = Denoiser(dit(1))
    models = {"": denoiser, "other": other}
    names = ("other", "", "other")
    schedule = Schedule(tuple(Step(t, 2, model=n) for t, n in zip((1.0, 0.6, 0.3), names)))
    watch = Watch()
    Sampler(models, CONFIG, schedule, 1.5)(NOISE, LABELS, watch)
    assert tuple(s.model for s in watch.states) == names and [s.index for s in watch.states] == [0, 1, 2]
    for state, (x, time, conditions, output) in zip(watch.states, watch.calls):
        with torch.no_grad():
            assert torch.equal(models[state.model](x, time, conditions), output)
    assert other.state.index == 2 and denoiser.state.index == 1
    with pytest.raises(SpaceError, match="'third'"):
        Sampler(models, CONFIG, Schedule((Step(1.0, model="third"),)))


def test_a_model_without_conditions_is_never_doubled():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,),
        norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).eval()  # fmt: skip
    watch = Watch()
    found = Sampler({"": Denoiser(unet)}, CONFIG, MIXED, 3.0)(NOISE, {}, watch)
    assert found.shape == NOISE.shape and {len(x) for x, *_ in watch.calls} == {3}


def test_samples_are_reproducible_and_rows_are_apart(denoiser):
    sampler = Sampler({"": denoiser}, CONFIG, MIXED, 1.5)
    kept = NOISE.clone()
    all_three = sampler(NOISE, LABELS)
    assert torch.equal(sampler(NOISE, LABELS), all_three) and torch.equal(NOISE, kept)
    alone = sampler(NOISE[1:2], {"class_labels": LABELS["class_labels"][1:2]})
    torch.testing.assert_close(alone, all_three[1:2], rtol=1e-4, atol=1e-4)


def test_flows_run_from_pure_noise(denoiser):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=[(6 - i) / 6 for i in range(6)])
    x = NOISE
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = denoiser.model(x, timestep=t.expand(3), class_labels=LABELS["class_labels"]).sample
            x = scheduler.step(output, t, x).prev_sample
    times = NoiseSchedule.of(scheduler.config).default_times(6)
    assert times[0] == 1.0
    found = Sampler({"": denoiser}, scheduler.config, uniform_schedule(times))(NOISE, LABELS)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    high = Sampler({"": denoiser}, scheduler.config, uniform_schedule(times, order=3, corrector=True))
    torch.testing.assert_close(
        high(NOISE, LABELS), x, rtol=0, atol=0.2
    )  # the same image, less exactly solved


def test_numbers_that_are_none_name_the_step_that_began_it():
    model = dit()
    denoiser = Denoiser(model)

    def spoil(_module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (output[0] * float("nan"),) if denoiser.state.index == 2 else output

    with (
        model.register_forward_hook(spoil),
        pytest.raises(FloatingPointError, match=r"step 3 of 5 \(time 0\.5523\)"),
    ):
        Sampler({"": denoiser}, CONFIG, MIXED, 1.5)(NOISE, LABELS)


def test_samples_that_overflow_are_told_from_outputs_that_did(denoiser):
    wild = Schedule((Step(1.0), Step(0.9, 2, relax=1e30), Step(0.5)))
    with pytest.raises(FloatingPointError, match=r"overflowed|step 3 of 3"):
        Sampler({"": denoiser}, CONFIG, wild)(NOISE * 1e9, LABELS)
