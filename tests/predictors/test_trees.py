"""Trees on whole candidates, and what theory adds to them."""

from __future__ import annotations

import numpy as np
import pytest

from autocomp.errors import SpaceError
from autocomp.predictors.audit import rank_correlations
from autocomp.predictors.choose import make_predictor
from autocomp.predictors.trees import TreesPredictor
from autocomp.search_spaces.base import ModelSite
from autocomp.search_spaces.schedules import Schedules, SchedulesConfig
from autocomp.space import Candidate, Choice, Decision, SearchSpace
from autocomp.trial import Estimate, Fidelity, Measurement, Trial

SCHEDULER = {"beta_schedule": "linear", "prediction_type": "v_prediction"}
SITE = ModelSite("dit", (), 0, "", models=("",), steps=20, scheduler=SCHEDULER, guided=True)


def schedules() -> tuple[Schedules, SearchSpace]:
    space = Schedules(SchedulesConfig(steps=5, search=["time", "order", "guidance"]))
    decisions = space.decisions(SITE)
    return space, SearchSpace(tuple(decisions), tuple(space.constraints(SITE, decisions)))


def trial(number: int, candidate: Candidate, value: float) -> Trial:
    return Trial(number, candidate, Fidelity(), "random", Measurement({"fd": Estimate(value)}, "cpu"))


def test_theory_is_worth_many_trials() -> None:
    kind, space = schedules()
    rng = np.random.default_rng(0)
    drawn = [space.sample(rng) for _ in range(120)]
    # The truth is how far off the schedule's Gaussians are, plus noise: a function of all times together.
    rows = np.array([kind.traits(SITE, c.values) for c in drawn])
    truth = np.exp(rows[:, 4] - rows[:, 70] + rng.normal(0, 0.05, len(rows)))
    trials = [trial(i, c, float(v)) for i, (c, v) in enumerate(zip(drawn, truth, strict=True))]

    def tau(traits: bool) -> float:
        known = (lambda c: kind.traits(SITE, c.values)) if traits else None
        model = make_predictor("trees", "fd", None, space, known).fit(trials[:60])
        return rank_correlations(model.predict(drawn[60:]).mean, truth[60:])[1]

    assert tau(True) > 0.6
    assert tau(True) > tau(False) + 0.15


def test_other_spaces_beside_a_schedule_are_seen() -> None:
    kind, space = schedules()
    bits = Decision("bits/model", Choice(("w4", "w8", "w16"), ordered=True), (), "bits")
    joint = SearchSpace((*space.decisions, bits), space.constraints)
    rng = np.random.default_rng(1)
    drawn = [joint.sample(rng) for _ in range(40)]
    trials = [
        trial(i, c, {"w4": 9.0, "w8": 3.0, "w16": 2.9}[str(c["bits/model"])]) for i, c in enumerate(drawn)
    ]
    model = TreesPredictor("fd", None, joint, traits=lambda c: kind.traits(SITE, c.values)).fit(trials)
    base = drawn[0]
    found = model.predict([base.replace({"bits/model": b}) for b in ("w4", "w16")]).mean
    assert found[0] > 1.5 * found[1]


def test_a_candidate_of_another_space_is_refused() -> None:
    _, space = schedules()
    with pytest.raises(SpaceError):
        TreesPredictor("fd", None, space).predict([Candidate.of({"bits": "w4"})])


def test_the_uncompressed_models_own_schedule_has_no_traits() -> None:
    kind, space = schedules()
    own = {d.name: kind.neutral(d) for d in space}
    with pytest.raises(SpaceError, match="own schedule"):
        kind.traits(SITE, own)
