"""First-order costs of attention rules against what single changes cost when they are measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from autocomp.diffusion import attention
from autocomp.diffusion.attention_plan import ImageAttentionPlan
from autocomp.diffusion.denoiser import Denoiser
from autocomp.diffusion.sampler import Sampler
from autocomp.diffusion.schedule import uniform_schedule, uniform_times
from autocomp.predictors.image_influence import Question, attention_influence
from autocomp.profile import mean
from autocomp.testing.diffusion import POOLED_WIDTH, TEXT_WIDTH, tiny_flux, tiny_sd3
from autocomp.workloads.diffusion_teacher import Trajectories

STEPS, RANGES, HEADS, IMAGES = 6, 3, 3, 16
PATHS = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
OPTIONS = ("full", "reuse", "w1", "w4", "w4x", "full/cfg", "w4/cfg")
CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "v_prediction"}


@pytest.fixture(scope="module")
def recorded() -> tuple[Denoiser, Trajectories]:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=2, num_attention_heads=HEADS,
        attention_head_dim=8, num_embeds_ada_norm=4, norm_num_groups=1,
    ).eval().requires_grad_(False)  # fmt: skip
    for path in PATHS:
        model.get_submodule(path).to_q.weight.mul_(4)
    denoiser, calls = Denoiser(model), Trajectories()
    sampler = Sampler({"": denoiser}, CONFIG, uniform_schedule(uniform_times(STEPS)), 2.0)
    noise = torch.randn(IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for some in torch.arange(IMAGES).chunk(2):
        calls.begin()
        sampler(noise[some], {"class_labels": some % 4}, calls.observe)
    return denoiser, calls


@pytest.fixture(scope="module", params=["sd3", "flux"])
def joint(request: pytest.FixtureRequest) -> tuple[Denoiser, Trajectories, list[str]]:
    """A model whose text and image are one sequence, with its calls and attention modules."""
    model: Any = tiny_sd3(heads=HEADS) if request.param == "sd3" else tiny_flux(heads=HEADS)
    model.requires_grad_(False)
    paths = list(attention.find(model)[0])
    for path in paths:
        model.get_submodule(path).to_q.weight.mul_(4)
    denoiser, calls = Denoiser(model, (8, 8)), Trajectories()
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    guidance = 2.0 if request.param == "sd3" else 1.0
    sampler = Sampler({"": denoiser}, flow, uniform_schedule(uniform_times(STEPS)), guidance)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(IMAGES, 1, 8, 8, generator=generator)
    text = {
        "encoder_hidden_states": torch.randn(IMAGES, 5, TEXT_WIDTH, generator=generator),
        "pooled_projections": torch.randn(IMAGES, POOLED_WIDTH, generator=generator),
    }
    for some in torch.arange(IMAGES).chunk(2):
        calls.begin()
        sampler(noise[some], {name: rows[some] for name, rows in text.items()}, calls.observe)
    return denoiser, calls, paths


@pytest.mark.parametrize("head", [None, 1])
def test_estimates_of_joint_attention_are_near_too(joint: Any, head: int | None) -> None:
    denoiser, calls, paths = joint
    options = OPTIONS if len(paths) == 2 else OPTIONS[:5]  # Flux has no halves
    questions = [Question(f"{p}.{r}", p, r, RANGES, head, options) for p in paths for r in range(1, RANGES)]
    found = attention_influence(denoiser, calls.batches, questions)
    pairs = []
    for q in questions:
        assert mean(found[q.name]["full"]) == 0
        pairs += [(mean(found[q.name][o]), measured(denoiser, calls, q, o)) for o in options[1:]]
    guess, truth = np.array(pairs).T
    assert (truth > 0).all()
    logs = np.log(guess / truth)
    assert np.abs(logs).max() < np.log(2) and np.abs(logs).mean() < np.log(1.3)
    assert np.corrcoef(np.log(guess), np.log(truth))[0, 1] > 0.95


def measured(denoiser: Denoiser, calls: Trajectories, q: Question, option: str) -> float:
    rows: Any = [["full"] * (1 if q.head is None else HEADS) for _ in range(q.ranges)]
    rows[q.index][q.head or 0] = option
    attention.install(denoiser.model, ImageAttentionPlan.from_json({q.path: rows}))
    try:
        return calls.noise(denoiser).value
    finally:
        attention.remove(denoiser.model)


@pytest.mark.parametrize("head", [None, 1])
def test_estimates_are_near_what_single_changes_cost(recorded: Any, head: int | None) -> None:
    denoiser, calls = recorded
    questions = [Question(f"{p}.{r}", p, r, RANGES, head, OPTIONS) for p in PATHS for r in range(RANGES)]
    found = attention_influence(denoiser, calls.batches, questions)
    pairs = []
    for q in questions:
        assert mean(found[q.name]["full"]) == 0 and found[q.name]["reuse"][0] == IMAGES
        pairs += [(mean(found[q.name][o]), measured(denoiser, calls, q, o)) for o in OPTIONS[1:]]
    guess, truth = np.array(pairs).T
    assert (truth > 0).all()
    logs = np.log(guess / truth)
    assert np.abs(logs).max() < np.log(2) and np.abs(logs).mean() < np.log(1.3)
    assert np.corrcoef(np.log(guess), np.log(truth))[0, 1] > 0.95


def test_another_seed_gives_other_draws_of_the_same(recorded: Any) -> None:
    denoiser, calls = recorded
    question = Question("d", PATHS[0], 1, RANGES, None, ("reuse",))
    first, again, other = (
        mean(attention_influence(denoiser, calls.batches, [question], seed=s)["d"]["reuse"])
        for s in (0, 0, 1)
    )
    assert first == again != other and 0.5 < first / other < 2
