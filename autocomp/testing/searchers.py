"""Conformance checks of searchers, for the built-in ones and for yours.

    from autocomp.testing.searchers import CHECKS

    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
    def test_mine(check):
        check(MySearcher)

A check takes a factory (a class, or a function of a ``Problem``) and raises ``AssertionError`` with what
went wrong. Problems that a searcher names as unsupported are skipped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from autocomp.errors import InfeasibleError
from autocomp.objective import Constraint, Objective
from autocomp.searchers.base import Problem, Searcher, unsupported
from autocomp.searchers.common import admissible
from autocomp.space import (
    AdditiveTable,
    AtMostDistinct,
    Candidate,
    Choice,
    Decision,
    Interval,
    LinearBudget,
    Ordered,
    SearchSpace,
    SpaceConstraint,
    SumTo,
    Tied,
    Value,
)
from autocomp.trial import Estimate, Failure, Fidelity, Measurement, Trial

Factory = Callable[[Problem], Searcher]
Check = Callable[[Factory], None]

BITS = (2, 3, 4, 8)


def toy_problem(
    decisions: int = 12,
    *,
    options: Sequence[int] = BITS,
    budget: float | None = 0.6,
    constraints: Sequence[SpaceConstraint] = (),
    flat: bool = False,
    seed: int = 0,
) -> Problem:
    """A bit-allocation problem: minimise ``kl`` (a modelled table) and ``memory_mb`` (an exact one).

    Args:
        decisions: named ``d0000`` and on, in blocks of four.
        options: bits of every decision.
        budget: share of the way from the smallest to the largest size; ``None`` for no budget.
        constraints: further constraints of the space.
        flat: all options of a decision cost the same.
        seed: of the tables and the problem.
    """
    rng = np.random.default_rng(seed)
    names = [f"d{i:04d}" for i in range(decisions)]
    weight, size = np.exp(rng.normal(size=decisions)), rng.integers(1, 5, size=decisions)
    kl: dict[str, dict[Value, float]] = {
        n: {o: float(w) * (1.0 if flat else 4.0**-o) for o in options} for n, w in zip(names, weight)
    }
    mb: dict[str, dict[Value, float]] = {
        n: {o: float(s) * (1 if flat else o) / 8 for o in options} for n, s in zip(names, size)
    }
    tables = {
        "kl": AdditiveTable("kl", 0.0, kl),
        "memory_mb": AdditiveTable("memory_mb", 1.0, mb, exact=True),
    }
    bounds: list[Constraint] = []
    extra: list[SpaceConstraint] = list(constraints)
    if budget is not None:
        least, most = (1.0 + sum(f(row.values()) for row in mb.values()) for f in (min, max))
        bounds.append(Constraint("memory_mb", True, least + budget * (most - least)))
        extra.append(LinearBudget(tables["memory_mb"], bounds[0].bound))
    space = SearchSpace(
        tuple(Decision(n, Choice(tuple(options), True), block=i // 4) for i, n in enumerate(names)),
        tuple(extra),
    )
    objectives = (Objective("kl"), Objective("memory_mb"))
    baselines = tuple(c for c in space.uniform() if not space.violations(c))
    return Problem(space, objectives, tuple(bounds), tables, baselines, seed)


def span_problem(
    layers: int = 3, groups: int = 2, *, rules: int = 3, widths: int = 2, weights: int = 2, seed: int = 0
) -> Problem:
    """Spans and bits of key/value groups, unordered, with at most two rules and one bit width a layer.

    Minimises two modelled tables (``kl_1024``, ``kl_2048``) under exact ones (``kv_mb``, ``density``).

    Args:
        layers, groups: layers, and key/value groups of a layer.
        rules, widths: span rules and bit widths on offer; an option is ``a128b0s4/k8v8``.
        weights: further decisions, bits of a weight each.
        seed: of the tables and the problem.
    """
    rng = np.random.default_rng(seed)
    kept, bits = np.linspace(0.1, 1.0, rules), (16, 8, 4, 3, 2)[:widths]
    kinds = [(i, j) for i in range(rules) for j in range(widths)]
    labels = [f"a{128 * (i + 1)}b0s4/k{bits[j]}v{bits[j]}" for i, j in kinds]
    rows: dict[str, dict[str, dict[Value, float]]] = {
        m: {} for m in ("kl_1024", "kl_2048", "kv_mb", "density")
    }
    names = [[f"attention/{i}.kv{g}" for g in range(groups)] for i in range(layers)]
    for name in (n for layer in names for n in layer):
        size, short, long = np.exp(rng.normal(size=3))
        lost = [(size * (1 - kept[i]) ** 1.5, 0.1 * 4.0 ** (4 - bits[j])) for i, j in kinds]
        rows["kl_1024"][name] = {o: float(a * short + b) for o, (a, b) in zip(labels, lost)}
        rows["kl_2048"][name] = {o: float(a * long + b) for o, (a, b) in zip(labels, lost)}
        rows["kv_mb"][name] = {o: float(kept[i] * bits[j]) for o, (i, j) in zip(labels, kinds)}
        rows["density"][name] = {o: float(kept[i]) / (layers * groups) for o, (i, j) in zip(labels, kinds)}
    decisions = [Decision(n, Choice(tuple(labels)), block=i) for i, layer in enumerate(names) for n in layer]
    for name in (f"bits/w{i}" for i in range(weights)):
        decisions.append(Decision(name, Choice(BITS, True)))
        loss: dict[Value, float] = {o: float(np.exp(rng.normal())) * 4.0**-o for o in BITS}
        rows["kl_1024"][name] = rows["kl_2048"][name] = loss
    tables = {m: AdditiveTable(m, 0.0, r, exact=m in ("kv_mb", "density")) for m, r in rows.items()}
    most = sum(max(row.values()) for row in rows["kv_mb"].values())
    bounds = (Constraint("kv_mb", True, 0.4 * most), Constraint("density", True, 0.6))
    limits = [AtMostDistinct(tuple(layer), k, f) for layer in names for k, f in ((2, 0), (1, 1))]
    budgets = [LinearBudget(tables[c.metric], c.bound) for c in bounds]
    space = SearchSpace(tuple(decisions), (*limits, *budgets))
    return Problem(space, (Objective("kl_1024"), Objective("kl_2048")), bounds, tables, (), seed)


def float_problem(constraints: Sequence[SpaceConstraint] = (), nullable: bool = False) -> Problem:
    """Four floats in [0, 1] and a solver's name; no tables."""
    floats = tuple(Decision(f"x{i}", Interval(0.0, 1.0, nullable)) for i in range(4))
    space = SearchSpace((*floats, Decision("solver", Choice(("euler", "heun")))), tuple(constraints))
    return Problem(space, (Objective("kl"), Objective("steps")))


def toy_trial(problem: Problem, number: int, candidate: Candidate, origin: str = "search") -> Trial:
    """A measured trial: table totals bent by an interaction; for floats a smooth bowl and a count."""
    metrics = {m: t.total(candidate) for m, t in problem.tables.items()}
    if "kl" in metrics:
        metrics["kl"] = float(
            metrics["kl"] ** 1.1 * (1.0 + 0.1 * math.sin(int(candidate.fingerprint[:4], 16)))
        )
    else:
        used = [float(v) for v in candidate.values.values() if isinstance(v, int | float)]
        metrics = {"kl": sum((v - 0.3) ** 2 for v in used) + 0.1, "steps": float(len(used))}
    found = {m: Estimate(v, 0.01 * abs(v)) for m, v in metrics.items()}
    return Trial(number, candidate, Fidelity(), origin, Measurement(found, "toy"))


def _build(factory: Factory, problem: Problem) -> Searcher | None:
    """The searcher, or ``None`` when it says that it can't take the problem."""
    if unsupported(factory, problem):
        return None
    searcher = factory(problem)
    return None if unsupported(searcher, problem) else searcher


def _check_batch(problem: Problem, batch: Sequence[Candidate], n: int, seen: set[str]) -> None:
    assert len(batch) <= n, f"asked for {n} candidates, got {len(batch)}"
    for c in batch:
        assert not (reasons := problem.space.violations(c)), f"a proposal is outside the space: {reasons}"
        assert admissible(problem, c), "a proposal breaks a bound that is known exactly"
        assert c.fingerprint not in seen, f"candidate {c.fingerprint} was proposed twice"
        seen.add(c.fingerprint)


def _run(factory: Factory, problem: Problem, rounds: int = 5, n: int = 4) -> list[Trial]:
    """A search with fresh searchers throughout, so that nothing but the history carries over."""
    history = [toy_trial(problem, i, c, "baseline") for i, c in enumerate(problem.baselines)]
    seen = {t.candidate.fingerprint for t in history}
    for _ in range(rounds):
        searcher = _build(factory, problem)
        if searcher is None:
            break
        batch = searcher.ask(n, history, [])
        _check_batch(problem, batch, n, seen)
        history += [toy_trial(problem, len(history) + i, c) for i, c in enumerate(batch)]
    return history


def check_determinism(factory: Factory) -> None:
    """Two searchers with the same seed give the same answers; a call changes nothing for the next."""
    problem = toy_problem()
    history = _run(factory, problem, rounds=3)
    for past in ([], history):
        first, second = _build(factory, problem), _build(factory, problem)
        if first is None or second is None:
            return
        answer = first.ask(3, past, [])
        assert answer == second.ask(3, past, []), "the same seed and history gave different proposals"
        assert answer == first.ask(3, past, []), "a second, equal call gave different proposals"


def check_constraints(factory: Factory) -> None:
    """Ties, distinctness and budgets hold in every proposal of a search."""
    names = [f"d{i:04d}" for i in range(12)]
    structure = (Tied(tuple(names[:3])), AtMostDistinct(tuple(names[4:10]), 2))
    _run(factory, toy_problem(constraints=structure, budget=0.4))


def check_pieces(factory: Factory) -> None:
    """Limits on pieces of unordered options hold in every proposal, and the search finds some."""
    problem = span_problem()
    history = _run(factory, problem, rounds=4)
    assert len(history) >= 6 or _build(factory, problem) is None, "too few proposals"
    pieces = {
        str(v).split("/")[1] for t in history for n, v in t.candidate.items if n.startswith("attention")
    }
    assert len(pieces) == 2 or _build(factory, problem) is None, f"bits are never anything but {pieces}"


def check_pending(factory: Factory) -> None:
    """What is being measured is not proposed again."""
    problem = toy_problem(6)
    searcher = _build(factory, problem)
    if searcher is None:
        return
    pending: list[Candidate] = []
    seen: set[str] = set()
    for _ in range(4):
        batch = searcher.ask(3, [], pending)
        _check_batch(problem, batch, 3, seen)
        pending += batch
    assert pending, "nothing was proposed"


def check_resume(factory: Factory) -> None:
    """A long-lived searcher and one that sees the history for the first time propose the same."""
    problem = toy_problem()
    veteran = _build(factory, problem)
    history: list[Trial] = []
    for _ in range(5):
        newcomer = _build(factory, problem)
        if veteran is None or newcomer is None:
            return
        batch = veteran.ask(3, history, [])
        assert batch == newcomer.ask(3, history, []), "the answer depends on more than the history"
        history += [toy_trial(problem, len(history) + i, c) for i, c in enumerate(batch)]


def check_failures(factory: Factory) -> None:
    """Failed trials, NaN values and foreign candidates in the history neither break nor repeat."""
    problem = toy_problem()
    searcher = _build(factory, problem)
    if searcher is None:
        return
    foreign = Candidate.of({d.name: 16 for d in problem.space})
    history = [toy_trial(problem, 0, problem.baselines[0], "baseline")]
    history.append(Trial(1, foreign, Fidelity(), "baseline", Measurement({"kl": Estimate(0.0)}, "toy")))
    seen = {t.candidate.fingerprint for t in history}
    for _ in range(6):
        batch = searcher.ask(4, history, [])
        _check_batch(problem, batch, 4, seen)
        for i, c in enumerate(batch):
            history.append(_spoiled(toy_trial(problem, len(history), c), i))
    assert len(history) > 8, "the searcher gave up after failures"


def _spoiled(trial: Trial, i: int) -> Trial:
    if i % 3 == 0:
        return Trial(trial.number, trial.candidate, trial.fidelity, "search", failure=Failure("oom", "toy"))
    if i % 3 == 1:
        nan = {m: Estimate(math.nan, math.nan) for m in trial.values()}
        return Trial(trial.number, trial.candidate, trial.fidelity, "search", Measurement(nan, "toy"))
    return trial


def check_all_failed(factory: Factory) -> None:
    """A history of failures alone leaves something to propose."""
    problem = toy_problem(8)
    searcher = _build(factory, problem)
    if searcher is None:
        return
    history = [_spoiled(toy_trial(problem, i, c), 0) for i, c in enumerate(searcher.ask(4, [], []))]
    batch = searcher.ask(2, history, [])
    _check_batch(problem, batch, 2, {t.candidate.fingerprint for t in history})
    assert batch, "nothing is proposed after failures"


def check_none_asked(factory: Factory) -> None:
    """``ask(0)`` is an empty list."""
    searcher = _build(factory, toy_problem())
    assert searcher is None or searcher.ask(0, [], []) == []


def check_exhaustion(factory: Factory) -> None:
    """Tiny spaces (one option, one decision, four points) run dry without repeats and without hanging."""
    shapes: list[tuple[int, tuple[int, ...]]] = [(1, (4,)), (3, (4,)), (1, (2, 3, 4)), (2, (2, 4))]
    for decisions, options in shapes:
        problem = toy_problem(decisions, options=options, budget=None)
        searcher = _build(factory, problem)
        if searcher is None:
            continue
        history: list[Trial] = []
        seen: set[str] = set()
        for _ in range(len(options) ** decisions + 3):
            batch = searcher.ask(2, history, [])
            _check_batch(problem, batch, 2, seen)
            history += [toy_trial(problem, len(history) + i, c) for i, c in enumerate(batch)]
        assert history, f"nothing was proposed for {decisions} decisions with options {options}"


def check_infeasible(factory: Factory) -> None:
    """When no candidate can meet a budget: ``InfeasibleError`` or nothing, never an invalid proposal."""
    searcher = _build(factory, toy_problem(budget=-0.5))
    if searcher is None:
        return
    try:
        assert searcher.ask(3, [], []) == [], "a proposal can't meet the budget"
    except InfeasibleError as error:
        assert str(error), "the error says nothing"


def check_flat_costs(factory: Factory) -> None:
    """Options that cost the same are no reason to stop or to repeat."""
    history = _run(factory, toy_problem(6, budget=None, flat=True), rounds=3)
    assert not _build(factory, toy_problem()) or len(history) > 0


def check_one_objective(factory: Factory) -> None:
    """A single objective is a front of one point, and still a search."""
    base = toy_problem(8)
    problem = Problem(base.space, base.objectives[:1], base.constraints, base.tables, base.baselines, 3)
    _run(factory, problem, rounds=4)


def check_floats(factory: Factory) -> None:
    """Intervals, nullable slots in order, and weights that sum to one; or a word that they can't be taken."""
    names = tuple(f"x{i}" for i in range(4))
    for constraints, nullable in (((), False), ((Ordered(names),), True), ((SumTo(names),), False)):
        problem = float_problem(constraints, nullable)
        history = _run(factory, problem, rounds=5, n=3)
        assert len(history) >= 10 or _build(factory, problem) is None, "too few proposals for floats"


def check_large(factory: Factory, decisions: int = 10_000, seconds: float = 120.0) -> None:
    """Ten thousand decisions are asked for, first and after some trials, before anyone loses patience."""
    problem = toy_problem(decisions)
    began = time.perf_counter()
    history = _run(factory, problem, rounds=3, n=2)
    took = time.perf_counter() - began
    assert took < seconds, f"three asks for {decisions} decisions took {took:.1f} s"
    assert len(history) > len(problem.baselines) or _build(factory, problem) is None, "nothing was proposed"


CHECKS: Mapping[str, Check] = {
    name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")
}
"""All checks by name."""


def check_searcher(factory: Factory) -> None:
    """Run every check; the first that fails raises ``AssertionError``."""
    for check in CHECKS.values():
        check(factory)
