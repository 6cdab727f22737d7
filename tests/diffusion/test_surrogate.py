"""What a schedule does to Gaussian classes, against its known limits and against sampling them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autocomp.diffusion.noise import NoiseSchedule
from autocomp.diffusion.schedule import Schedule, Step, uniform_schedule, uniform_times
from autocomp.diffusion.solver import History, plan
from autocomp.diffusion.surrogate import response, traits

CONFIGS = {
    "epsilon": {"beta_schedule": "linear", "prediction_type": "epsilon"},
    "v_prediction": {"beta_schedule": "linear", "prediction_type": "v_prediction"},
    "sample": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "flow": {"shift": 1.0},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_many_steps_give_the_true_spread_and_centre(kind: str) -> None:
    noise, v, m = NoiseSchedule.of(CONFIGS[kind]), np.array([0.02, 0.3, 4.0]), np.array([0.1, 0.0, -3.0])
    errors = []
    for count in (6, 200):
        schedule = uniform_schedule(uniform_times(count, power=2.0), order=2)
        spread, centre = response(noise, schedule, v, m, guidance=1.0)
        errors.append(max(np.abs(spread / np.sqrt(v) - 1).max(), np.abs(centre - m).max()))
    assert errors[1] < 0.05 < errors[0]  # noise at time 1 is not quite all there is: alpha is above 0 there


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_it_is_what_a_perfect_model_gives(guidance: float) -> None:
    noise, variance, mean = NoiseSchedule.of(CONFIGS["epsilon"]), 0.3, 0.8
    steps = Step(1.0), Step(0.6, 2, "noise", True), Step(0.3, 3, relax=0.2, guidance=False), Step(0.05)
    schedule = Schedule(steps)
    start = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    x, history = start, History()
    for step, move in zip(steps, plan(noise, schedule), strict=True):
        alpha, sigma = noise.alpha(step.time), noise.sigma(step.time)
        # The expected noise given x, of the class and of all classes: Gaussian conditioning.
        given = sigma * (x - alpha * mean) / (alpha**2 * variance + sigma**2)
        free = sigma * x / (alpha**2 * (variance + mean**2) + sigma**2)
        guess = free + guidance * (given - free) if step.guidance else given
        x = history.move(move, x, guess)
    spread, centre = response(noise, schedule, np.array([variance]), np.array([mean]), guidance)
    torch.testing.assert_close(x, start * spread[0] + centre[0], rtol=1e-9, atol=1e-9)


def test_guidance_pushes_away_from_the_middle() -> None:
    noise, v, m = NoiseSchedule.of(CONFIGS["v_prediction"]), np.array([0.1]), np.array([0.5])
    schedule = uniform_schedule(uniform_times(30), order=2)
    plain, guided = (response(noise, schedule, v, m, scale)[1][0] for scale in (1.0, 1.5))
    assert guided > plain + 0.01


def test_traits_are_finite_and_tell_schedules_apart() -> None:
    noise = NoiseSchedule.of(CONFIGS["v_prediction"])
    guided = uniform_schedule(uniform_times(5))
    plain = Schedule(tuple(Step(s.time, guidance=False) for s in guided.steps))
    wild = Schedule((Step(1.0, 3, "noise"), Step(0.999, 3, "noise"), Step(0.001, 3, "noise"), Step(5e-4)))
    rows = [traits(noise, s) for s in (guided, plain, wild, Schedule((Step(1.0),)))]
    assert len({len(r) for r in rows}) == 1 and np.isfinite(rows).all()
    assert rows[0] != rows[1]
    # Without guidance, saying so at a step makes no difference to what comes out.
    never = [np.array(traits(noise, s, guided=False)) for s in (guided, plain)]
    np.testing.assert_allclose(never[0][:80], never[1][:80], rtol=1e-9)
