"""The solver against exact integrals, exact solutions, and the schedulers that diffusers ships."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from scipy.integrate import quad
from torch import Tensor

from autocomp.diffusion.noise import NoiseSchedule
from autocomp.diffusion.schedule import Schedule, Step, uniform_schedule, uniform_times
from autocomp.diffusion.solver import History, phi, plan, update

VP = NoiseSchedule.of({"beta_schedule": "linear"})
FLOW = NoiseSchedule.of({"shift": 1.0})
Model = Callable[[Tensor, float], Tensor]


def solve(noise: NoiseSchedule, schedule: Schedule, x: Tensor, model: Model) -> list[Tensor]:
    """The samples after each step; ``model`` gets sample and time."""
    history, found = History(), []
    for step, move in zip(schedule.steps, plan(noise, schedule), strict=True):
        x = history.move(move, x, model(x, step.time))
        found.append(x)
    return found


def wavy(x: Tensor, time: float) -> Tensor:
    """Some smooth nonlinear function of both."""
    return torch.tanh(0.8 * x + torch.sin(3 * x.flip(-1)) * time) + 0.3 * time


# -- formulas


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("z", [-7.0, -1.0, -0.99, -1e-3, 1e-6, 0.5, 2.5])
def test_phi_is_its_integral(k, z):
    exact, _ = quad(
        lambda u: math.exp((1 - u) * z) * u ** (k - 1) / math.factorial(k - 1), 0, 1, epsabs=1e-13
    )
    assert phi(k, z) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("order, corrector", [(1, False), (3, False), (2, True), (3, True)])
def test_updates_are_exact_for_polynomials(order, corrector, prediction):
    """Where the clean image (or the noise) is a polynomial in half log-SNR of as many terms as outputs are
    read, one step is the integral of the ODE. With two outputs it is not, by design (phi_2 is replaced)."""
    times, end = [0.5, 0.62, 0.7, 0.85], 0.4
    if corrector:
        times, end = [0.4, *times[:3]], 0.4
    start = times[corrector]
    terms = order + corrector
    here, there = VP.half_log_snr(start), VP.half_log_snr(end)

    def f(snr: float) -> float:
        return sum((k + 1) * (snr - here) ** k for k in range(terms))

    sign = 1.0 if prediction == "data" else -1.0
    integral, _ = quad(lambda u: math.exp(sign * u) * f(u), here, there, epsabs=1e-13)
    if prediction == "data":
        exact = VP.sigma(end) / VP.sigma(start) * 0.7 + VP.sigma(end) * integral
    else:
        exact = VP.alpha(end) / VP.alpha(start) * 0.7 - VP.alpha(end) * integral
    found = update(VP, Step(0.5, order, prediction), times, end, corrector=corrector)
    # What the model returns for samples of 0.7 so that the clean image, or the noise, is f.
    values = [f(VP.half_log_snr(t)) for t in times[: len(found.outputs)]]
    if prediction == "data":
        values = [(0.7 - VP.alpha(t) * v) / VP.sigma(t) for t, v in zip(times, values)]
    result = (found.base + sum(found.samples)) * 0.7 + np.dot(found.outputs, values)
    assert result == pytest.approx(exact, rel=1e-9)


def test_first_order_is_one_formula_for_data_and_noise():
    s, t = 0.7, 0.4
    x, eps = 0.3, -1.1
    h = VP.half_log_snr(t) - VP.half_log_snr(s)
    by_hand = VP.alpha(t) / VP.alpha(s) * x - VP.sigma(t) * math.expm1(h) * eps
    for prediction in ("data", "noise"):
        found = update(VP, Step(s, 1, prediction), [s], t)
        assert (found.base + found.samples[0]) * x + found.outputs[0] * eps == pytest.approx(
            by_hand, rel=1e-12
        )


def test_relax_scales_the_derivative_terms():
    s, r, t = 0.6, 0.8, 0.5
    h = VP.half_log_snr(t) - VP.half_log_snr(s)
    first, plain = update(VP, Step(s, 1), [s, r], t), update(VP, Step(s, 2), [s, r], t)
    relaxed = update(VP, Step(s, 2, relax=0.3), [s, r], t)
    assert update(VP, Step(s, 2, relax=0.0), [s, r], t) == plain
    slope = plain.outputs[0] - first.outputs[0]
    assert relaxed.outputs[0] - first.outputs[0] == pytest.approx(slope * (1 + 0.3 * h), rel=1e-9)
    assert relaxed.outputs[1] == pytest.approx(plain.outputs[1] * (1 + 0.3 * h), rel=1e-9)
    assert relaxed != plain and update(VP, Step(s, 1, relax=0.3), [s, r], t) == first


# -- order of convergence on Gaussian data, whose ODE is solved exactly


def gaussian_error(
    noise: NoiseSchedule, steps: int, change: Callable[[int, Step], Step], first: float, end: float
) -> float:
    """Largest error at ``end`` for data N(0.4, 0.5^2): (x - alpha mean) / std(x) stays as it was."""
    mean, spread = 0.4, 0.5

    def std(t: float) -> float:
        return math.hypot(noise.alpha(t) * spread, noise.sigma(t))

    def model(x: Tensor, t: float) -> Tensor:
        eps = noise.sigma(t) * (x - noise.alpha(t) * mean) / std(t) ** 2
        if noise.kind == "vp":
            return eps
        return eps - (x - noise.sigma(t) * eps) / noise.alpha(t)

    low, high = noise.half_log_snr(first), noise.half_log_snr(end)
    times = [noise.inverse(low + (high - low) * i / steps) for i in range(steps)]
    schedule = Schedule(tuple(change(i, Step(t)) for i, t in enumerate(times)), end)
    unit = torch.tensor([-1.5, 0.2, 1.0], dtype=torch.float64)
    x = noise.alpha(first) * mean + std(first) * unit
    exact = noise.alpha(end) * mean + std(end) * unit
    return float((solve(noise, schedule, x, model)[-1] - exact).abs().max())


def started(
    order: int, prediction: str, corrector: bool = False, relax: float = 0.0
) -> Callable[[int, Step], Step]:
    """Every step of this order; the first one corrected, so that it does not spoil order 3."""
    return lambda i, s: replace(
        s,
        order=min(order, i + 1),
        prediction=prediction,
        corrector=corrector or (i == 0 and order > 1),
        relax=relax,
    )


@pytest.mark.parametrize("noise, first", [(VP, 0.9), (FLOW, 0.95)], ids=["vp", "flow"])
@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize(
    "order, corrector, relax, expected",
    [
        (1, False, 0.0, 1), (2, False, 0.0, 2), (2, False, 0.4, 2), (3, False, 0.0, 3),
        (1, True, 0.0, 2), (2, True, 0.0, 3), (3, True, 0.0, 4),
    ],
)  # fmt: skip
def test_error_falls_with_the_power_of_the_order(noise, first, prediction, order, corrector, relax, expected):
    change = started(order, prediction, corrector, relax)
    errors = [gaussian_error(noise, n, change, first, 0.3) for n in (80, 160, 320)]
    rate = math.log2(errors[1] / errors[2])
    assert rate > expected - 0.2, errors
    if expected < 4:  # the highest one has not settled yet where it comes out higher
        assert rate < expected + 0.2, errors


def test_mixed_predictions_keep_second_order():
    def change(i: int, step: Step) -> Step:
        return replace(step, order=2, prediction=("data", "noise")[i % 2], corrector=i % 3 == 0)

    errors = [gaussian_error(VP, n, change, 0.9, 0.02) for n in (160, 320)]
    assert math.log2(errors[0] / errors[1]) > 1.75


# -- what diffusers ships, at the same timesteps. Spacing "trailing" gives time (n - i) / n, and the last step
# -- goes to the clean image: DDIM's set_alpha_to_one, the others' final_sigmas_type "zero".


def reference(scheduler, count: int, x: Tensor, model: Model = wavy, **kwargs) -> list[Tensor]:
    scheduler.set_timesteps(count, **kwargs)
    found = []
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.get("use_flow_sigmas")
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, float(t + (not flow)) / 1000), t, x).prev_sample
        found.append(x)
    return found


def noise_of(scheduler) -> NoiseSchedule:
    return NoiseSchedule.of(scheduler.config)


def lowered(count: int, order: int, **fields) -> Schedule:
    """Evenly spaced, the order rising at the start and falling at the end (``lower_order_final``)."""
    times = uniform_times(count)
    return Schedule(tuple(Step(t, min(order, count - i), **fields) for i, t in enumerate(times)))


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 2e-5) -> None:
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected)):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"after step {i}: {m}"
        )


START = torch.randn(2, 1, 4, 4, generator=torch.manual_seed(3))
KINDS = [
    {"prediction_type": "epsilon"},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample", "beta_schedule": "scaled_linear"},
]


@pytest.mark.parametrize("config", KINDS)
def test_order_one_is_ddim(config):
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True, **config)
    found = solve(noise_of(scheduler), uniform_schedule(uniform_times(10)), START, wavy)
    assert_same(found, reference(scheduler, 10, START), 1e-4)


def test_end_at_the_first_training_timestep_is_ddim_without_alpha_one():
    """DDIM's other ending, and ``end`` > 0: the last update goes to training timestep 0, or time 1 / 1000."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=False)
    found = solve(noise_of(scheduler), uniform_schedule(uniform_times(10), end=1e-3), START, wavy)
    assert_same(found, reference(scheduler, 10, START), 1e-4)
    full = solve(noise_of(scheduler), uniform_schedule(uniform_times(10)), START, wavy)
    assert (full[-1] - found[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("prediction, algorithm", [("data", "dpmsolver++"), ("noise", "dpmsolver")])
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_order_two_is_dpm_solver_multistep(prediction, algorithm, config):
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", lower_order_final=True,
        timestep_spacing="trailing", final_sigmas_type="zero", **config,
    )  # fmt: skip
    end = 0.0
    if algorithm == "dpmsolver":  # which diffusers only lets end before the clean image
        scheduler = DPMSolverMultistepScheduler(
            algorithm_type=algorithm, solver_order=2, solver_type="midpoint", timestep_spacing="trailing",
            final_sigmas_type="sigma_min", **config,
        )  # fmt: skip
        end = 1e-3
    schedule = Schedule(lowered(10, 2, prediction=prediction).steps, end)
    expected = reference(scheduler, 10, START)
    assert_same(solve(noise_of(scheduler), schedule, START, wavy), expected, 3e-4 if end else 1e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("corrector", [False, True])
def test_correctors_and_order_three_are_unipc(order, corrector):
    """With B(h) = e^h - 1 ("bh2"), the variant that diffusers defaults to, where two outputs are read; from
    three on B(h) cancels."""
    scheduler = UniPCMultistepScheduler(
        solver_order=order, solver_type="bh2", predict_x0=True, lower_order_final=True,
        timestep_spacing="trailing", final_sigmas_type="zero",
        disable_corrector=[] if corrector else list(range(10)),
    )  # fmt: skip
    found = solve(noise_of(scheduler), lowered(10, order, corrector=corrector), START, wavy)
    assert_same(found, reference(scheduler, 10, START), 1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_one_on_a_flow_is_eulers_step(shift):
    """Along the line between the model's clean image and its noise the velocity is constant: the exponential
    step and Euler's are the same point of this line."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    noise = noise_of(scheduler)
    found = solve(noise, uniform_schedule(noise.default_times(8)), START, wavy)
    even = np.linspace(1.0, 1 / 8, 8)
    assert_same(found, reference(scheduler, 8, START, sigmas=even))


def test_higher_orders_on_a_flow_are_diffusers_away_from_pure_noise():
    """diffusers starts at sigma 0.999 where ours may start at 1, at which half log-SNR is infinite."""
    for order, scheduler in (
        (
            2,
            DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2
            ),
        ),
        (3, UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=3)),
    ):
        expected = reference(scheduler, 8, START)
        times = scheduler.sigmas[:-1].double().tolist()
        corrector = order == 3
        steps = tuple(Step(t, min(order, 8 - i), "data", corrector) for i, t in enumerate(times))
        # diffusers' timesteps are cut to integers, sigmas are not: the model must see the same in both.
        seen = dict(zip(times, (scheduler.timesteps / 1000).tolist()))
        found = solve(noise_of(scheduler), Schedule(steps), START, lambda x, t, seen=seen: wavy(x, seen[t]))
        assert_same(found, expected, 1e-4)


# -- infinite half log-SNR


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("corrector", [False, True])
def test_a_flow_may_start_at_pure_noise_and_end_at_the_image(prediction, corrector):
    """The call at time 1 is infinitely far in half log-SNR, so that no derivative can be taken to it: the
    second step is of order 1, the third of order 2."""
    times = uniform_times(4)
    full = Schedule(tuple(Step(t, 3, prediction, corrector, relax=0.1) for t in times))
    moves = plan(FLOW, full)
    assert all(
        math.isfinite(w) for m in moves for w in (m.advance.base, *m.advance.samples, *m.advance.outputs)
    )
    assert moves[0] == plan(FLOW, uniform_schedule(times))[0]
    second = moves[1].advance
    assert all(w == 0.0 for w in (*second.samples[1:], *second.outputs[1:]))
    third = moves[2].advance
    assert third.outputs[1] != 0.0 and all(w == 0.0 for w in third.outputs[2:])
    assert torch.isfinite(solve(FLOW, full, START, wavy)[-1]).all()


def test_the_last_step_to_the_image_is_the_models_guess():
    schedule = Schedule((Step(1.0), Step(0.5, 2), Step(0.25, 3, "noise")))
    samples = solve(VP, schedule, START, wavy)
    clean, _ = VP.split(wavy(samples[1], 0.25), samples[1], 0.25)
    torch.testing.assert_close(samples[2], clean)


def test_samples_keep_their_dtype():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        found = solve(VP, uniform_schedule(uniform_times(3), order=2), START.to(dtype), wavy)
        assert {x.dtype for x in found} == {dtype}
