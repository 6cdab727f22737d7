"""Conformance checks of predictors, for the built-in ones and for yours.

    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
    def test_mine(check):
        check(lambda metric, table, space: MyPredictor(metric, table, space))

A check takes a factory and raises ``AssertionError`` with what went wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from autocomp.predictors.base import Prediction, Predictor
from autocomp.space import AdditiveTable, Choice, SearchSpace
from autocomp.testing.searchers import toy_problem
from autocomp.trial import Estimate, Failure, Fidelity, Measurement, Trial

Factory = Callable[[str, AdditiveTable, SearchSpace], Predictor]
Check = Callable[[Factory], None]

SIGMA = 0.02
"""Relative noise of the toy measurements."""


def toy_trials(
    n: int, seed: int = 0, factor: float = 3.0, decisions: int = 10
) -> tuple[AdditiveTable, SearchSpace, list[Trial]]:
    """A table, its space and ``n`` trials whose ``kl`` is ``factor`` times the total, plus noise."""
    problem = toy_problem(decisions, budget=None, seed=seed)
    rng = np.random.default_rng(seed + 1)
    table = problem.tables["kl"]
    trials = []
    for i in range(n):
        candidate = problem.space.sample(rng)
        value = factor * table.total(candidate) * float(np.exp(SIGMA * rng.standard_normal()))
        found = {"kl": Estimate(value, SIGMA * value)}
        trials.append(Trial(i, candidate, Fidelity(), "search", Measurement(found, "toy")))
    return table, problem.space, trials


def _predict(predictor: Predictor, trials: Sequence[Trial]) -> Prediction:
    return predictor.predict([t.candidate for t in trials])


def _check_sound(prediction: Prediction, n: int) -> None:
    assert prediction.mean.shape == prediction.std.shape == (n,), "mean and std must have shape [candidates]"
    assert np.isfinite(prediction.mean).all(), "a mean is not finite"
    assert np.isfinite(prediction.std).all() and (prediction.std > 0).all(), "std must be finite and positive"


def _error(predictor: Predictor, trials: Sequence[Trial]) -> float:
    """Root mean square relative error."""
    measured = np.array([t.value("kl") for t in trials])
    return float(np.sqrt(np.mean((_predict(predictor, trials).mean / measured - 1.0) ** 2)))


def check_before_fit(factory: Factory) -> None:
    """Usable before it saw anything, after an empty history, and for no candidates."""
    table, space, trials = toy_trials(5)
    predictor = factory("kl", table, space)
    _check_sound(_predict(predictor, trials), 5)
    _check_sound(_predict(predictor.fit([]), trials), 5)
    _check_sound(predictor.predict([]), 0)


def check_few_trials(factory: Factory) -> None:
    """One, two or equal trials are enough for finite, positive uncertainty."""
    table, space, trials = toy_trials(6)
    for few in (trials[:1], trials[:2], [trials[0]] * 3, [trials[0]] * 12):
        _check_sound(_predict(factory("kl", table, space).fit(few), trials), 6)


def check_any_value(factory: Factory) -> None:
    """Values that are equal, negative or zero, and trials of one candidate that disagree, are learned."""
    table, space, trials = toy_trials(24)
    for values in (np.full(24, 5.0), np.linspace(-1.0, 1.0, 24), np.zeros(24)):
        changed = [
            replace(t, measurement=Measurement({"kl": Estimate(float(v))}, "toy"))
            for t, v in zip(trials, values, strict=True)
        ]
        _check_sound(_predict(factory("kl", table, space).fit(changed), trials), 24)
    again = [replace(t, candidate=trials[0].candidate) for t in trials]
    _check_sound(_predict(factory("kl", table, space).fit(again), trials), 24)


def check_nothing_to_decide(factory: Factory) -> None:
    """Decisions with a single option can be predicted like others."""
    table, space, trials = toy_trials(20)
    fixed = SearchSpace(tuple(replace(d, domain=Choice((d.options[0],), True)) for d in space.decisions))
    only = [replace(t, candidate=fixed.sample(np.random.default_rng(0))) for t in trials]
    _check_sound(_predict(factory("kl", table, fixed).fit(only), only), 20)


def check_large(factory: Factory, decisions: int = 10_000) -> None:
    """Ten thousand decisions and few trials: a sound answer, and no array of decisions by decisions."""
    table, space, trials = toy_trials(24, decisions=decisions)
    _check_sound(_predict(factory("kl", table, space).fit(trials[:16]), trials), 24)


def check_determinism(factory: Factory) -> None:
    """Equal predictors that see equal trials predict the same."""
    table, space, trials = toy_trials(25)
    one, other = (_predict(factory("kl", table, space).fit(trials), trials) for _ in range(2))
    assert np.array_equal(one.mean, other.mean), "means differ from one fit to the next"
    assert np.array_equal(one.std, other.std), "deviations differ from one fit to the next"


def check_learns(factory: Factory) -> None:
    """More data, less error: what is measured is thrice the table."""
    table, space, trials = toy_trials(90)
    test = trials[60:]
    before = _error(factory("kl", table, space), test)
    after = _error(factory("kl", table, space).fit(trials[:60]), test)
    assert after < 0.5 * before, f"the error went from {before:.3f} to {after:.3f} with 60 trials"


def check_calibration(factory: Factory) -> None:
    """Errors on held-out trials are of the size of the standard deviations: neither much more nor much less.

    Their root mean square is between a quarter and two of them, and three quarters of the measured values
    are within two.
    """
    table, space, trials = toy_trials(160)
    predicted = _predict(factory("kl", table, space).fit(trials[:60]), trials[60:])
    measured = np.array([t.value("kl") for t in trials[60:]])
    errors = np.abs(predicted.mean - measured) / predicted.std
    size = float(np.sqrt(np.mean(errors**2)))
    assert size < 2.0, f"std is too narrow: errors are {size:.2f} of it"
    assert size > 0.25, f"std is too wide: errors are {size:.2f} of it"
    inside = float(np.mean(errors < 2.0))
    assert inside > 0.75, f"only {inside:.0%} of the measured values are within two std"


def check_surprise(factory: Factory) -> None:
    """Where values have nothing to do with the candidate, deviations are of the size of the values' own."""
    table, space, trials = toy_trials(160)
    rng = np.random.default_rng(0)
    values = np.exp(0.5 * rng.standard_normal(len(trials)))
    random = [
        replace(t, measurement=Measurement({"kl": Estimate(float(v))}, "toy"))
        for t, v in zip(trials, values, strict=True)
    ]
    predicted = _predict(factory("kl", table, space).fit(random[:80]), random[80:])
    _check_sound(predicted, 80)
    inside = float(np.mean(np.abs(predicted.mean - values[80:]) < 2.0 * predicted.std))
    assert inside > 0.75, f"only {inside:.0%} of values that can't be predicted are within two std"


def check_ignores_failures(factory: Factory) -> None:
    """Failed trials, NaN and other metrics change nothing."""
    table, space, trials = toy_trials(20)
    nan = Measurement({"kl": Estimate(math.nan)}, "toy")
    other = Measurement({"decode_ms": Estimate(1.0)}, "toy")
    broken = [
        replace(trials[0], measurement=None, failure=Failure("crash", "toy")),
        replace(trials[1], measurement=nan),
        replace(trials[2], measurement=other),
    ]
    clean = _predict(factory("kl", table, space).fit(trials[3:]), trials)
    dirty = _predict(factory("kl", table, space).fit([*broken, *trials[3:]]), trials)
    assert np.allclose(clean.mean, dirty.mean) and np.allclose(clean.std, dirty.std), "failures were learned"
    _check_sound(_predict(factory("kl", table, space).fit(broken), trials), 20)


def check_order_invariance(factory: Factory) -> None:
    """Neither the order of decisions nor that of the trials matters, nor an earlier fit."""
    table, space, trials = toy_trials(25)
    turned = SearchSpace(tuple(reversed(space.decisions)), space.constraints)
    plain = _predict(factory("kl", table, space).fit(trials), trials)
    for predictor in (
        factory("kl", table, turned).fit(trials),
        factory("kl", table, space).fit(trials[::-1]),
        factory("kl", table, space).fit(trials[:7]).fit(trials),
    ):
        other = _predict(predictor, trials)
        assert np.allclose(plain.mean, other.mean, rtol=1e-6), "means depend on an order"
        assert np.allclose(plain.std, other.std, rtol=1e-4), "deviations depend on an order"


def check_single_candidates(factory: Factory) -> None:
    """A candidate's prediction does not depend on the company it is asked in."""
    table, space, trials = toy_trials(15)
    predictor = factory("kl", table, space).fit(trials)
    together = _predict(predictor, trials)
    alone = [_predict(predictor, [t]) for t in trials]
    assert np.allclose(together.mean, [float(p.mean[0]) for p in alone]), "means depend on other candidates"
    assert np.allclose(together.std, [float(p.std[0]) for p in alone]), "std depends on other candidates"


CHECKS: Mapping[str, Check] = {
    name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")
}
"""All checks by name."""


def check_predictor(factory: Factory) -> None:
    """Run every check; the first that fails raises ``AssertionError``."""
    for check in CHECKS.values():
        check(factory)
