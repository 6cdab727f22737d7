"""Schedules as values: what they refuse, what they count, and their JSON."""

from __future__ import annotations

import json
import math

import pytest

from autocomp.diffusion.schedule import Schedule, Step, uniform_schedule, uniform_times
from autocomp.errors import SpaceError


@pytest.mark.parametrize(
    "values",
    [{"time": 0.0}, {"time": 1.1}, {"order": 0}, {"order": 4}, {"prediction": "x"}, {"relax": math.inf}],
)
def test_step_names_the_value_that_is_out_of_range(values):
    field, value = next(iter(values.items()))
    with pytest.raises(SpaceError, match=field) as caught:
        Step(**{"time": 0.5} | values)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    "times, end", [((), 0.0), ((0.5, 0.5), 0.0), ((0.5, 0.7), 0.0), ((0.5,), 0.5), ((0.5,), -0.1)]
)
def test_times_must_fall_to_the_end(times, end):
    with pytest.raises(SpaceError):
        Schedule(tuple(Step(t) for t in times), end)


def test_evaluations_count_both_halves_and_models_are_named_once():
    schedule = Schedule(
        (Step(1.0, model="b"), Step(0.7, guidance=False), Step(0.4, model="b", guidance=False))
    )
    assert schedule.evaluations == 4
    assert schedule.models == ("b", "")


def test_json_keeps_every_field():
    steps = (Step(0.9, 3, "noise", True, -0.25, False, "small"), Step(1 / 3, 2))
    schedule = Schedule(steps, 1e-3)
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.parametrize(
    "data", [{}, {"steps": [{"order": 1}]}, {"steps": [{"time": 0.5, "speed": 2}]}, {"steps": 3}]
)
def test_json_of_something_else_is_refused(data):
    with pytest.raises(SpaceError, match="no schedule"):
        Schedule.from_json(data)


def test_power_moves_times_towards_the_image():
    assert uniform_times(4) == [1.0, 0.75, 0.5, 0.25]
    assert uniform_times(4, power=2.0) == [1.0, 0.5625, 0.25, 0.0625]
    schedule = uniform_schedule(uniform_times(2), order=2, corrector=True, end=0.01)
    assert schedule.steps[1] == Step(0.5, 2, "data", True) and schedule.end == 0.01
