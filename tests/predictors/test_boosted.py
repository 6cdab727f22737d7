"""What boosting adds to a table: thresholds and interactions."""

from __future__ import annotations

import numpy as np
import pytest

from autocomp.errors import SpaceError
from autocomp.predictors import boosted
from autocomp.predictors.additive import AdditivePredictor
from autocomp.predictors.audit import rank_correlations
from autocomp.predictors.boosted import BoostedPredictor
from autocomp.predictors.choose import make_predictor
from autocomp.predictors.residual import ResidualPredictor
from autocomp.space import AdditiveTable, Candidate, Choice, Decision, SearchSpace
from autocomp.trial import Estimate, Fidelity, Measurement, Trial

BITS = (2, 3, 4, 8)


def cliff(n: int, decisions: int = 24) -> tuple[SearchSpace, AdditiveTable, list[Trial]]:
    """A table that is right until a third of the decisions have 2 bits; then values are fivefold."""
    rng = np.random.default_rng(0)
    names = [f"d{i:02d}" for i in range(decisions)]
    space = SearchSpace(tuple(Decision(x, Choice(BITS, True), block=i // 4) for i, x in enumerate(names)))
    table = AdditiveTable(
        "kl",
        0.0,
        {
            x: {b: float(w) * 4.0**-b for b in BITS}
            for x, w in zip(names, np.exp(rng.normal(size=decisions)), strict=True)
        },
    )
    trials = []
    for i in range(n):
        share = rng.uniform(0.1, 0.6)
        c = Candidate.of({x: 2 if rng.random() < share else BITS[int(rng.integers(1, 4))] for x in names})
        value = table.total(c) * (5.0 if sum(v == 2 for v in c.values.values()) > decisions / 3 else 1.0)
        trials.append(Trial(i, c, Fidelity(), "random", Measurement({"kl": Estimate(value)}, "toy")))
    return space, table, trials


def test_a_cliff_is_found() -> None:
    space, table, trials = cliff(320)
    test = [t.candidate for t in trials[120:]]
    truth = np.log([t.value("kl") for t in trials[120:]])

    def error(model: AdditivePredictor | BoostedPredictor | ResidualPredictor) -> float:
        return float(np.sqrt(np.mean((np.log(model.fit(trials[:120]).predict(test).mean) - truth) ** 2)))

    own = error(BoostedPredictor("kl", table, space))
    assert own < 0.7 * error(AdditivePredictor(table))
    assert own < error(ResidualPredictor("kl", table, space))


def test_left_out_trials_are_ranked() -> None:
    space, table, trials = cliff(320)
    model = BoostedPredictor("kl", table, space).fit(trials[:120])
    found = model.predict([t.candidate for t in trials[120:]]).mean
    tau = rank_correlations(found, np.array([t.value("kl") for t in trials[120:]]))[1]
    assert model.cross_validated == pytest.approx(tau, abs=0.1)
    assert np.isnan(BoostedPredictor("kl", table, space).cross_validated)


def test_many_trials_take_binned_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    space, table, trials = cliff(200)
    test = [t.candidate for t in trials[150:]]
    exact = BoostedPredictor("kl", table, space).fit(trials[:150]).predict(test).mean
    monkeypatch.setattr(boosted, "_EXACT", 100)
    binned = BoostedPredictor("kl", table, space).fit(trials[:150]).predict(test).mean
    assert rank_correlations(exact, binned)[1] > 0.8


def test_unordered_options_are_told_apart() -> None:
    space = SearchSpace((Decision("a", Choice(("x", "y", "z"))), Decision("b", Choice(("p", "q")))))
    rng = np.random.default_rng(0)
    drawn = [space.sample(rng) for _ in range(60)]
    values = [{"x": 1.0, "y": 5.0, "z": 2.0}[str(c["a"])] + (c["b"] == "q") for c in drawn]
    trials = [
        Trial(i, c, Fidelity(), "random", Measurement({"m": Estimate(v)}, "toy"))
        for i, (c, v) in enumerate(zip(drawn, values, strict=True))
    ]
    model = make_predictor("boosted", "m", None, space).fit(trials)
    cells = [Candidate.of({"a": a, "b": b}) for a in "xyz" for b in "pq"]
    assert model.predict(cells).mean == pytest.approx([1, 2, 5, 6, 2, 3], rel=0.1)


def test_a_candidate_of_another_space_is_refused() -> None:
    space, table, trials = cliff(20)
    with pytest.raises(SpaceError):
        BoostedPredictor("kl", table, space).fit(trials).predict([Candidate.of({"bits": 4})])
