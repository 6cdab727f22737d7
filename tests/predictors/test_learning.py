"""What predictors learn, and whether the audit says so."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from autocomp.predictors.additive import AdditivePredictor
from autocomp.predictors.audit import audit, rank_correlations
from autocomp.predictors.residual import ResidualPredictor
from autocomp.space import AdditiveTable, Candidate, Choice, Decision, Interval, SearchSpace, Value
from autocomp.testing.predictors import toy_trials
from autocomp.trial import Estimate, Fidelity, Measurement, Trial

BITS = (3, 4, 6, 8)


def measured(number: int, candidate: Candidate, value: float, metric: str = "kl") -> Trial:
    return Trial(number, candidate, Fidelity(), "audit", Measurement({metric: Estimate(value)}, "toy"))


def biased(
    decisions: int, n: int, seed: int = 0
) -> tuple[SearchSpace, AdditiveTable, AdditiveTable, list[Trial]]:
    """A space, a table that is wrong by option, block and decision, the true one, and trials of it."""
    rng = np.random.default_rng(seed)
    names = [f"d{i:03d}" for i in range(decisions)]
    space = SearchSpace(tuple(Decision(x, Choice(BITS, True), block=i // 6) for i, x in enumerate(names)))
    prior: dict[str, dict[Value, float]] = {}
    truth: dict[str, dict[Value, float]] = {}
    by_block = np.exp(rng.normal(0, 0.4, decisions))
    for i, name in enumerate(names):
        weight = float(np.exp(rng.normal()))
        prior[name] = {b: weight * 4.0**-b for b in BITS}
        wrong = float(by_block[i // 6] * np.exp(rng.normal(0, 0.3)))
        truth[name] = {b: c * wrong * {3: 1.6, 4: 1.0, 6: 0.8, 8: 0.7}[b] for b, c in prior[name].items()}  # type: ignore[index]
    real = AdditiveTable("kl", 0.0, truth)
    trials = []
    for i in range(n):
        p = rng.dirichlet(np.ones(len(BITS)) * 2)
        c = Candidate.of({x: BITS[int(rng.choice(len(BITS), p=p))] for x in names})
        trials.append(measured(i, c, 2.0 * real.total(c) ** 1.1))
    return space, AdditiveTable("kl", 0.0, prior), real, trials


def test_corrected_table_comes_closer_to_the_truth() -> None:
    space, table, truth, trials = biased(60, 160)
    model = ResidualPredictor("kl", table, space).fit(trials)

    def mismatch(candidate_table: AdditiveTable) -> float:
        """Spread of the log ratio to the truth over entries that matter, weighted by their cost."""
        pairs = [(candidate_table.cost(n, o), c) for n, row in truth.costs.items() for o, c in row.items()]
        logs, weights = np.log([a / b for a, b in pairs]), np.array([b for _, b in pairs])
        middle = np.average(logs, weights=weights)
        return float(np.sqrt(np.average((logs - middle) ** 2, weights=weights)))

    assert mismatch(model.corrected()) < 0.75 * mismatch(table)


def test_samples_of_the_table_scatter_around_the_mean() -> None:
    space, table, _, trials = biased(12, 40)
    model = ResidualPredictor("kl", table, space).fit(trials)
    draws = [model.corrected(np.random.default_rng(s)) for s in range(40)]
    cells = [(n, o) for n, row in table.costs.items() for o in row]
    logs = np.log([[d.cost(*cell) for cell in cells] for d in draws])
    mean = np.log([model.corrected().cost(*cell) for cell in cells])
    assert (logs.std(axis=0) > 0).all()
    assert abs(float(np.mean(logs.mean(axis=0) - mean))) < 0.15
    assert model.corrected(np.random.default_rng(1)) == model.corrected(np.random.default_rng(1))


def test_corrected_needs_a_table() -> None:
    space, _, _, _ = biased(3, 0)
    with pytest.raises(ValueError, match="no table"):
        ResidualPredictor("kl", None, space).corrected()


def test_more_trials_less_uncertainty() -> None:
    space, table, _, trials = biased(20, 100)
    test = [t.candidate for t in trials[80:]]
    spread = [
        float(
            np.mean((p := ResidualPredictor("kl", table, space).fit(trials[:n]).predict(test)).std / p.mean)
        )
        for n in (0, 5, 80)
    ]
    assert spread[0] > spread[1] > spread[2]


def test_five_hundred_trials_fit_in_seconds() -> None:
    space, table, _, trials = biased(210, 500)
    began = time.process_time()
    ResidualPredictor("kl", table, space).fit(trials)
    assert time.process_time() - began < 10  # a fit that grows with the cube takes minutes


def test_values_that_are_not_positive_use_the_linear_link() -> None:
    space, table, _, trials = biased(10, 60)
    shifted = [measured(t.number, t.candidate, 100 * (t.value("kl") - 0.02)) for t in trials]
    assert min(t.value("kl") for t in shifted) < 0
    model = ResidualPredictor("kl", table, space).fit(shifted[:45])
    got = model.predict([t.candidate for t in shifted[45:]])
    want = np.array([t.value("kl") for t in shifted[45:]])
    assert np.corrcoef(got.mean, want)[0, 1] > 0.95
    assert (np.abs(got.mean - want) < 5 * got.std).all()


def test_intervals_are_learned_without_a_table() -> None:
    space = SearchSpace((Decision("x", Interval(0.0, 1.0, True)), Decision("s", Choice(("a", "b")))))
    rng = np.random.default_rng(0)

    def value(c: Candidate) -> float:
        x = c["x"]
        return (0.5 if x is None else (float(x) - 0.3) ** 2) + (1.0 if c["s"] == "a" else 0.0)

    trials = [measured(i, c, value(c)) for i, c in enumerate(space.sample(rng) for _ in range(60))]
    for kind in ("ridge", "gp"):
        model = ResidualPredictor("kl", None, space, kind).fit(trials[:40])
        got = model.predict([t.candidate for t in trials[40:]]).mean
        assert np.corrcoef(got, [t.value("kl") for t in trials[40:]])[0, 1] > 0.9, kind


def test_foreign_candidates_are_left_out_of_the_fit() -> None:
    space, table, _, trials = biased(5, 10)
    stranger = measured(99, Candidate.of(dict.fromkeys(space.by_name, 16)), 1e9)
    plain = ResidualPredictor("kl", table, space).fit(trials).predict([trials[0].candidate])
    mixed = ResidualPredictor("kl", table, space).fit([*trials, stranger]).predict([trials[0].candidate])
    assert plain.mean == pytest.approx(mixed.mean)


def test_exact_tables_are_not_bent() -> None:
    space, _, _, trials = biased(5, 10)
    table = AdditiveTable("kl", 1.0, {n: {b: float(b) for b in BITS} for n in space.by_name}, exact=True)
    predicted = AdditivePredictor(table).fit(trials).predict([t.candidate for t in trials])
    assert predicted.mean.tolist() == [table.total(t.candidate) for t in trials]
    assert (predicted.std < 1e-3).all() and (predicted.std > 0).all()


def test_audit_trusts_what_ranks_and_distrusts_what_does_not() -> None:
    _, table, _, trials = biased(20, 30)
    good = audit(table, trials)
    assert good.verdict == "trust" and good.spearman > 0.8 and good.cross_validated > 0.8
    rng = np.random.default_rng(3)
    noise = [measured(t.number, t.candidate, float(rng.random())) for t in trials]
    assert audit(table, noise).verdict == "distrust"
    upside_down = [measured(t.number, t.candidate, -t.value("kl")) for t in trials]
    assert audit(table, upside_down).spearman < -0.8 and audit(table, upside_down).verdict == "distrust"
    assert "Spearman" in str(good) and "trust" in str(good)


def test_audit_is_not_fooled_by_a_predictor_that_recalls() -> None:
    """A model fitted to noise ranks what it saw; only held-out folds tell."""
    space, _, _, trials = biased(40, 30)
    rng = np.random.default_rng(3)
    noise = [measured(t.number, t.candidate, float(np.exp(rng.normal()))) for t in trials]
    model = ResidualPredictor("kl", None, space, "gp").fit(noise)
    report = audit(model, noise)
    assert report.cross_validated < 0.5 and report.verdict != "trust"


def test_audit_of_few_or_failed_trials() -> None:
    table, _, trials = toy_trials(5)
    few = audit(table, trials[:2])
    assert few.n == 2 and math.isnan(few.spearman) and few.verdict == "distrust"
    assert audit(table, trials).verdict == "weak"  # five agree perfectly; five are few
    assert audit(table, []).n == 0
    nan = [measured(t.number, t.candidate, math.nan) for t in trials]
    assert audit(table, nan).n == 0
    with pytest.raises(ValueError, match="pass metric="):
        audit(_Nameless(), trials)  # type: ignore[arg-type]


class _Nameless:
    """A predictor without a ``metric``."""


def test_rank_correlations_by_hand() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlations(a, np.array([10.0, 20.0, 40.0, 30.0])) == pytest.approx((0.8, 2 / 3))
    assert all(math.isnan(r) for r in rank_correlations(a, np.ones(4)))


def cliff(n: int, decisions: int = 24) -> tuple[SearchSpace, AdditiveTable, list[Trial]]:
    """A table that is right until a quarter of the decisions have 3 bits; from there values rise steeply."""
    rng = np.random.default_rng(0)
    names = [f"d{i:03d}" for i in range(decisions)]
    space = SearchSpace(tuple(Decision(x, Choice(BITS, True), block=i // 4) for i, x in enumerate(names)))
    weights = np.exp(0.5 * rng.normal(size=decisions))
    costs: dict[str, dict[Value, float]] = {
        x: {b: float(w) * 4.0**-b for b in BITS} for x, w in zip(names, weights, strict=True)
    }
    table, trials = AdditiveTable("kl", 0.0, costs), []
    for i in range(n):
        share = rng.uniform(0.0, 0.7)
        c = Candidate.of({x: 3 if rng.random() < share else BITS[int(rng.integers(1, 4))] for x in names})
        low = sum(v == 3 for v in c.values.values()) / decisions
        trials.append(measured(i, c, table.total(c) * float(np.exp(4.0 * max(low - 0.25, 0.0)))))
    return space, table, trials


def test_a_threshold_in_how_many_have_an_option_is_learned() -> None:
    """No sum over decisions says it; the curves do, and they are left out where there is nothing to say."""
    space, table, trials = cliff(260)
    test = [t.candidate for t in trials[160:]]
    for kind in ("ridge", "gp"):
        model = ResidualPredictor("kl", table, space, kind).fit(trials[:160])
        errors = np.log(model.predict(test).mean) - np.log([t.value("kl") for t in trials[160:]])
        assert model.scales.curve > 0 and errors.std() < 0.1, kind
    plain = [measured(t.number, t.candidate, table.total(t.candidate)) for t in trials]
    assert ResidualPredictor("kl", table, space).fit(plain[:160]).scales.curve == 0


def test_a_table_around_a_candidate_follows_predictions_near_it() -> None:
    space, table, trials = cliff(160)
    model = ResidualPredictor("kl", table, space).fit(trials)
    names = [d.name for d in space]
    half = Candidate.of({x: 3 if i % 2 else 6 for i, x in enumerate(names)})
    local, everywhere = model.corrected(around=half), model.corrected()
    predicted = float(model.predict([half]).mean[0])
    assert local.total(half) == pytest.approx(predicted)
    moves = [half.replace({x: 6 if half[x] == 3 else 3}) for x in names]
    changes = model.predict(moves).mean / predicted - 1.0
    found = np.array([local.total(c) for c in moves]) / predicted - 1.0
    other = np.array([everywhere.total(c) for c in moves]) / everywhere.total(half) - 1.0
    assert np.abs(found - changes).max() < 0.05  # of changes by a fifth; the rest is of second order
    assert np.abs(found - changes).mean() < 0.3 * np.abs(other - changes).mean()


def test_a_fit_uses_the_newest_of_too_many_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """New trials count, older ones keep the range, and the order they come in makes no difference."""
    monkeypatch.setattr("autocomp.predictors.residual._MOST", 60)
    monkeypatch.setattr("autocomp.predictors.residual._WORK", 0.0)
    space, table, _, trials = biased(10, 100)
    late = [measured(100 + t.number, t.candidate, 2.0 * t.value("kl")) for t in trials[:40]]
    every = [*trials, *late]
    model = ResidualPredictor("kl", table, space).fit(every)
    assert len(model._values) == 60
    assert set(model._values) >= {t.value("kl") for t in late}
    old = set(model._values) - {t.value("kl") for t in late}
    assert {min(t.value("kl") for t in trials), max(t.value("kl") for t in trials)} <= old
    turned = ResidualPredictor("kl", table, space).fit(every[::-1])
    test = [t.candidate for t in trials]
    assert np.array_equal(model.predict(test).mean, turned.predict(test).mean)


def test_thousands_of_trials_are_fitted_in_tenths_of_a_second() -> None:
    space, table, _, trials = biased(210, 300)
    many = [measured(300 * i + t.number, t.candidate, t.value("kl")) for i in range(20) for t in trials]
    ResidualPredictor("kl", table, space).fit(many)  # codes of candidates are remembered
    began = time.process_time()
    ResidualPredictor("kl", table, space).fit(many).predict([t.candidate for t in trials])
    assert time.process_time() - began < 2.0  # the kernel of all of them would take a minute
