"""Schedules as a search space: what is decided, what a candidate means, what is always measured."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from autocomp.diffusion.noise import NoiseSchedule
from autocomp.diffusion.schedule import Schedule, Step, uniform_schedule, uniform_times
from autocomp.errors import SpaceError
from autocomp.search_spaces.base import ModelSite
from autocomp.search_spaces.schedules import SPACINGS, Schedules, spaced_times
from autocomp.search_spaces.schedules_config import GAP, SchedulesConfig
from autocomp.searchers.evolution import Breeder
from autocomp.space import Candidate, Choice, Interval, SearchSpace, space_from_json, space_to_json

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
SITE = ModelSite("dit", (), 0, "hash", models=("", "medium"), steps=5, scheduler=LINEAR)
EVERYTHING = ["time", "order", "prediction", "corrector", "relax", "guidance", "model"]

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "times": {"steps": 6, "search": ["time"]},
    "all": {"steps": 4, "search": EVERYTHING, "end": 1e-3},
    "varying": {"slots": 8, "min_steps": 3, "search": EVERYTHING},
    "models": {"slots": 10, "skip": True, "search": ["model", "order"], "times": "logsnr"},
    "given": {"search": ["order", "corrector"], "times": [1.0, 0.6, 0.2]},
    "crowded": {"slots": 60, "search": ["time"], "min_steps": 50},
}


def made(config: dict[str, Any], site: ModelSite = SITE) -> tuple[Schedules, SearchSpace, list[Candidate]]:
    space = Schedules(SchedulesConfig(**config))
    decisions = space.decisions(site)
    whole = SearchSpace(tuple(decisions), tuple(space.constraints(site, decisions)))
    return space, whole, space.baselines(site, decisions)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_candidate_is_a_schedule(name: str) -> None:
    """Samples, children, baselines and the neutral candidate are inside the space and can be run."""
    space, whole, baselines = made(CONFIGS[name])
    assert space_from_json(space_to_json(whole)) == whole
    rng = np.random.default_rng(0)
    drawn = [whole.sample(rng) for _ in range(20)]
    breeder = Breeder(whole, mutation=6.0)
    bred = [breeder.child([*drawn, *baselines], rng) for _ in range(20)]
    neutral = Candidate.of({d.name: space.offered_neutral(d) for d in whole})
    for candidate in (*drawn, *bred, *baselines, neutral):
        assert whole.violations(candidate) == []
        schedule = space.schedule(candidate.values)
        assert schedule is not None and schedule.end == space.config.end
        times = [s.time for s in schedule.steps] + [schedule.end]
        assert all(a - b >= GAP * (1 - 1e-6) for a, b in pairwise(times))
    assert len(set(baselines)) == len(baselines) > 0


def test_equal_schedules_are_equal_candidates() -> None:
    """Whatever unused slots say, and wherever they are, repair gives one candidate."""
    space, whole, _ = made(CONFIGS["varying"])
    rng = np.random.default_rng(1)
    for _ in range(50):
        first = whole.sample(rng)
        values = dict(first.values)
        unused = [i for i in range(8) if values[f"schedules/time.{i}"] is None]
        for i in unused:
            for d in whole:
                if d.block == i and not d.name.startswith("schedules/time"):
                    values[d.name] = d.domain.sample(rng)
        assert whole.repair(values, rng) == first
        assert unused == list(range(8 - len(unused), 8))
        assert space.schedule(values) == space.schedule(first.values)


def test_slots_move_as_wholes() -> None:
    """A step in the middle is dropped: those behind it keep their settings."""
    _, whole, _ = made({"slots": 4, "search": ["time", "prediction"], "min_steps": 2})
    rows = [(1.0, "data"), (None, "noise"), (0.5, "noise"), (0.25, "data")]
    given = {f"schedules/time.{i}": t for i, (t, _) in enumerate(rows)}
    given |= {f"schedules/prediction.{i}": p for i, (_, p) in enumerate(rows)}
    given["schedules/time.1"] = None
    free = Interval(GAP, 1.0, nullable=True)
    slots = tuple(replace(d, domain=free) if isinstance(d.domain, Interval) else d for d in whole)
    nullable = SearchSpace(slots, whole.constraints)
    fixed = nullable.repair(given, np.random.default_rng(0)).values
    assert [fixed[f"schedules/time.{i}"] for i in range(4)] == [1.0, 0.5, 0.25, None]
    assert [fixed[f"schedules/prediction.{i}"] for i in range(4)] == ["data", "noise", "data", "data"]


def test_a_candidate_means_its_steps() -> None:
    space, whole, _ = made({"steps": 3, "search": EVERYTHING, "relax": (-1, 1), "end": 0.01})
    values: dict[str, Any] = {d.name: space.offered_neutral(d) for d in whole}
    values |= {"schedules/time.1": 0.4, "schedules/order.1": 1, "schedules/prediction.1": "noise"}
    values |= {"schedules/corrector.1": True, "schedules/relax.1": 0.25, "schedules/guidance.1": False}
    values["schedules/model.1"] = "medium"
    schedule = space.schedule({**values, "bitwidths/other": "w4"})
    assert schedule is not None and schedule.end == 0.01
    assert schedule.steps[1] == Step(0.4, 1, "noise", True, 0.25, False, "medium")
    assert schedule.steps[0] == Step(1.0, 2) and len(schedule) == 3


def test_decisions_without_effect_are_left_out() -> None:
    space, whole, _ = made({"steps": 3, "search": EVERYTHING})
    fields = {i: {d.name.split("/")[1].split(".")[0] for d in whole if d.block == i} for i in range(3)}
    assert fields[0] == set(EVERYTHING) - {"order", "relax"}
    assert fields[1] == set(EVERYTHING)
    assert fields[2] == {"time", "guidance", "model"}
    assert whole.by_name["schedules/order.1"].options == (1, 2)
    assert space.neutral(whole.decisions[0]) is None


def test_the_workloads_own_schedule_is_restored() -> None:
    space, whole, baselines = made(CONFIGS["default"])
    own = uniform_schedule(uniform_times(20))
    built = SimpleNamespace(state={"default_schedule": own}, changed=set())
    space.apply(built, baselines[0].values, serving=True)  # type: ignore[arg-type]
    assert len(built.state["schedule"]) == SITE.steps and built.changed == {"schedule"}
    neutral = {d.name: space.neutral(d) for d in whole}
    space.apply(built, neutral, serving=False)  # type: ignore[arg-type]
    assert built.state["schedule"] is own and not built.changed


def test_baselines_are_the_known_samplers() -> None:
    space, _, baselines = made({"steps": 4, "search": ["time", "order", "prediction", "corrector"]})
    found = [space.schedule(b.values) for b in baselines]
    assert len(found) == 9
    uniform = uniform_times(4)
    assert _same(found[0], uniform_schedule(uniform, order=1))
    assert _same(found[1], uniform_schedule(uniform, order=2))
    assert _same(found[2], uniform_schedule(uniform, order=2, corrector=True))
    # A single thing searched varies alone; models are measured one by one.
    assert len(made({"steps": 4, "search": ["time"]})[2]) == 3
    alone = made({"steps": 4, "search": ["model"]})
    models = [[s.model for s in alone[0].schedule(b.values).steps] for b in alone[2]]  # type: ignore[union-attr]
    assert models == [[""] * 4, ["medium"] * 4]


def _same(found: Schedule | None, wanted: Schedule) -> bool:
    """Equal in all that has an effect (an order that a step can't have, a corrector of the last step)."""
    assert found is not None
    rows = []
    for schedule in (found, wanted):
        last = len(schedule) - 1
        rows.append(
            [(s.time, min(s.order, i + 1) if i < last else 1, s.prediction, s.corrector and i < last)
             for i, s in enumerate(schedule.steps)]
        )  # fmt: skip
    return rows[0] == rows[1]


def test_model_schedules_thin_a_grid() -> None:
    space, whole, baselines = made(CONFIGS["models"])
    lengths = sorted(len(space.schedule(b.values)) for b in baselines)  # type: ignore[arg-type]
    assert lengths == [3, 3, 5, 5, 10, 10]
    grid = spaced_times("logsnr", 10, LINEAR)
    values: dict[str, Any] = dict(baselines[0].values)
    values |= {"schedules/model.3": None, "schedules/model.4": "medium"}
    schedule = space.schedule(whole.repair(values, np.random.default_rng(0)).values)
    assert schedule is not None and len(schedule) == 9
    assert [s.time for s in schedule.steps] == grid[:3] + grid[4:]
    assert schedule.steps[3].model == "medium"
    domain = whole.by_name["schedules/model.0"].domain
    assert isinstance(domain, Choice) and None not in domain.options  # so that some step is left


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(SPACINGS),
    st.integers(1, 100),
    st.sampled_from([0.0, 1e-3, 0.1]),
)
def test_spacings_fall_from_noise(spacing: Any, count: int, end: float) -> None:
    times = [*spaced_times(spacing, count, LINEAR, end), end]
    assert len(times) == count + 1 and times[0] == 1.0
    assert all(a - b >= GAP * (1 - 1e-6) for a, b in pairwise(times))


def test_log_snr_spacing_is_even_in_log_snr() -> None:
    noise = NoiseSchedule.of(LINEAR)
    levels = [noise.half_log_snr(t) for t in spaced_times("logsnr", 6, LINEAR)]
    assert np.allclose(np.diff(levels[1:]), levels[2] - levels[1], rtol=1e-6)
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert spaced_times("uniform", 4, flow) == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert spaced_times("logsnr", 3, flow)[0] == 1.0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"steps": 4, "slots": 8}, "not both"),
        ({"slots": 8, "search": ["order"]}, "write steps"),
        ({"slots": 8, "min_steps": 8}, "below slots"),
        ({"skip": True, "slots": 4, "search": ["time", "model"]}, "skip needs"),
        ({"times": [0.5, 0.9], "search": ["order"]}, "must fall"),
        ({"times": [1.0, 0.5]}, "take 'time' out"),
        ({"times": [1.0, 0.5], "steps": 3, "search": ["order"]}, "2 times for 3 steps"),
        ({"search": ["time", "time"]}, "named twice"),
        ({"orders": [4]}, "orders are 1 to 3"),
        ({"search": []}, "at least one"),
        ({"steps": 4, "solver": 1}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_explained(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SchedulesConfig(**config)


def test_what_the_model_lacks_is_explained() -> None:
    plain = ModelSite("dit", (), 0, "hash")
    with pytest.raises(SpaceError, match="give steps or slots"):
        made({}, plain)
    with pytest.raises(SpaceError, match="one model to choose from"):
        made({"steps": 4, "search": ["model"]}, plain)
    with pytest.raises(SpaceError, match=r"'large' is not in the workload's zoo; known: \['', 'medium'\]"):
        made({"steps": 4, "search": ["model"], "models": ["", "large"]})
    with pytest.raises(SpaceError, match="do not fit"):
        made({"steps": 2000})
    with pytest.raises(SpaceError, match=r"must be 0\.001 above end"):
        made({"times": [1.0, 0.01], "search": ["order"], "end": 0.02})
