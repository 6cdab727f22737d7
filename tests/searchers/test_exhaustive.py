"""The exhaustive searcher: every candidate once, in order; conformance is in test_conformance.py."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest

from autocomp.api import _Named
from autocomp.errors import InfeasibleError, JobError
from autocomp.job import Job
from autocomp.searchers.base import Problem
from autocomp.searchers.exhaustive import ExhaustiveSearcher, assignments
from autocomp.space import AtMostDistinct, Candidate, Choice, Decision, SearchSpace, Tied
from autocomp.testing.searchers import CHECKS, float_problem, span_problem, toy_problem, toy_trial
from autocomp.trial import Trial


def everything(problem: Problem, batch: int = 7, **options: int) -> list[Candidate]:
    """What a search proposes until it runs dry, with a new searcher for each question."""
    history: list[Trial] = []
    while True:
        found = ExhaustiveSearcher(problem, **options).ask(batch, history, [])  # type: ignore[arg-type]
        if not found:
            return [t.candidate for t in history]
        history += [toy_trial(problem, len(history) + i, c) for i, c in enumerate(found)]


@pytest.mark.parametrize("name", sorted(set(CHECKS) - {"pieces"}))
def test_the_plain_order_conforms_too(name: str) -> None:
    # "pieces" wants to see variety among the first few: test_conformance.py looks at the shuffled order
    CHECKS[name](ExhaustiveSearcher)


def by_hand(problem: Problem) -> list[Candidate]:
    names = [d.name for d in problem.space]
    rows = itertools.product(*(d.options for d in problem.space))
    candidates = (Candidate.of(dict(zip(names, row, strict=True))) for row in rows)
    return [c for c in candidates if not problem.space.violations(c)]


@pytest.mark.parametrize(
    "problem",
    [
        toy_problem(3, budget=None),
        toy_problem(4, budget=0.5),
        toy_problem(
            4, budget=None, constraints=[Tied(("d0000", "d0002")), AtMostDistinct(("d0001", "d0003"), 1)]
        ),
        span_problem(layers=1, groups=2, weights=1),
    ],
    ids=["free", "budget", "tied", "pieces"],
)
def test_every_feasible_candidate_comes_once_with_the_last_decision_turning_fastest(problem: Problem) -> None:
    found = everything(problem)
    assert found == by_hand(problem) and len(found) > 10


def test_a_shuffle_is_another_order_of_the_same_and_the_seed_decides_which() -> None:
    problem, other = toy_problem(4, budget=0.5), toy_problem(4, budget=0.5)
    plain, shuffled = everything(problem), everything(problem, shuffle=True)
    assert set(plain) == set(shuffled) and plain != shuffled
    assert shuffled == everything(other, shuffle=True)
    reseeded = Problem(
        other.space, other.objectives, other.constraints, other.tables, other.baselines, seed=1
    )
    assert everything(reseeded, shuffle=True) not in (plain, shuffled)


def test_what_is_measured_or_under_way_is_left_out_wherever_it_stands() -> None:
    problem = toy_problem(3, budget=None)
    order = by_hand(problem)
    searcher = ExhaustiveSearcher(problem)
    history = [toy_trial(problem, 0, order[1])]
    assert searcher.ask(2, history, [order[3]]) == [order[0], order[2]]
    assert searcher.ask(2, [], []) == order[:2], "an earlier call changed a later one"


def distinct(names: int, k: int) -> SearchSpace:
    decisions = tuple(Decision(f"d{i}", Choice(("a", "b", "c"))) for i in range(names))
    return SearchSpace(decisions, (AtMostDistinct(tuple(d.name for d in decisions), k),))


def test_constraints_make_a_large_product_small_enough() -> None:
    space = distinct(20, 1)  # 3**20 rows, 3 of them feasible
    began = time.perf_counter()
    problem = Problem(space, toy_problem().objectives)
    assert ExhaustiveSearcher.unsupported(problem) == []
    assert [set(row) for row in assignments(space)] == [{"a"}, {"b"}, {"c"}]
    assert time.perf_counter() - began < 2.0


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (float_problem(), "x0 is an interval"),
        (toy_problem(12), "more than 100000 candidates"),
        (Problem(distinct(18, 2), toy_problem().objectives), "more than 100000 candidates"),
        (toy_problem(10_000), "more than 100000 candidates"),
        (Problem(SearchSpace(()), toy_problem().objectives), "nothing to decide"),
    ],
    ids=["floats", "product", "constrained", "huge", "empty"],
)
def test_what_can_not_be_enumerated_is_refused_in_words(problem: Problem, text: str) -> None:
    (reason,) = ExhaustiveSearcher.unsupported(problem)
    assert text in reason
    with pytest.raises(JobError, match=text):
        ExhaustiveSearcher(problem)


def test_the_limit_is_exact_and_a_job_may_set_it() -> None:
    problem = toy_problem(3, budget=None)
    assert ExhaustiveSearcher.unsupported(problem, limit=64) == []
    assert "more than 63 candidates" in ExhaustiveSearcher.unsupported(problem, limit=63)[0]
    constrained = Problem(distinct(4, 1), problem.objectives)
    assert ExhaustiveSearcher.unsupported(constrained, limit=3) == []
    assert ExhaustiveSearcher.unsupported(constrained, limit=2) != []
    base = {"workload": {"kind": "causal_lm", "model": "none"}, "space": [{"bitwidths": {}}]}
    options: Sequence[dict[str, int]] = ({"limit": 63}, {"limit": 64}, {"limit": 64, "shuffle": 1})
    jobs = [Job.of({**base, "searcher": {"name": "exhaustive", "options": o}}) for o in options]
    assert [len(_Named(job).unsupported(problem)) for job in jobs] == [1, 0, 0]


def test_nothing_feasible_is_an_error() -> None:
    problem = toy_problem(3, budget=-0.5)
    with pytest.raises(InfeasibleError, match="loosen a bound"):
        ExhaustiveSearcher(problem).ask(1, [], [])
