"""What the searchers are for: they find better fronts, from the history alone."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from autocomp.errors import JobError
from autocomp.pareto import (
    ParetoFront,
    dominates,
    hypervolume,
    loss_row,
    non_dominated,
    reference_point,
)
from autocomp.registry import SEARCHERS
from autocomp.searchers.acquisition import Scene, pick_batch
from autocomp.searchers.base import LocalModel, Problem
from autocomp.searchers.common import spread_order
from autocomp.searchers.evolution import EvolutionSearcher, crowding, nsga_order, select
from autocomp.searchers.hybrid import HybridSearcher
from autocomp.searchers.local import blended
from autocomp.searchers.optuna import OptunaSearcher
from autocomp.searchers.random import RandomSearcher
from autocomp.space import AdditiveTable, Candidate, Value
from autocomp.testing.searchers import float_problem, toy_problem, toy_trial
from autocomp.trial import Estimate, Fidelity, Measurement, Trial


def wrong_tables(seed: int, decisions: int = 24) -> tuple[Problem, AdditiveTable]:
    """A problem whose sensitivities are off by large factors, and the table that is measured."""
    problem = toy_problem(decisions, budget=None, seed=seed)
    rng = np.random.default_rng(seed + 100)
    factors = dict(zip((2, 3, 4, 8), (1.8, 1.0, 0.7, 0.6)))
    truth: dict[str, dict[Value, float]] = {}
    for name, row in problem.tables["kl"].costs.items():
        own = float(np.exp(rng.normal(0, 0.8)))
        truth[name] = {o: c * own * factors[o] for o, c in row.items()}  # type: ignore[index]
    return problem, AdditiveTable("kl", 0.0, truth)


def run(name: str, problem: Problem, truth: AdditiveTable, trials: int, **options: object) -> list[Trial]:
    def measured(number: int, candidate: Candidate, origin: str) -> Trial:
        size = problem.tables["memory_mb"].total(candidate)
        found = {"kl": Estimate(truth.total(candidate)), "memory_mb": Estimate(size)}
        return Trial(number, candidate, Fidelity(), origin, Measurement(found, "toy"))

    history = [measured(i, c, "baseline") for i, c in enumerate(problem.baselines)]
    searcher = SEARCHERS.get(name)(problem, **options)
    while len(history) < trials:
        history += [measured(len(history) + i, c, name) for i, c in enumerate(searcher.ask(4, history, []))]
    return history


def log_volume(history: list[Trial], problem: Problem) -> float:
    """Hypervolume in (log KL, MB): a tenth of a small KL counts like a tenth of a large one."""
    corner = reference_point(history[: len(problem.baselines)], problem.objectives)
    front = [loss_row(p.trial, problem.objectives) for p in ParetoFront.of(history, problem.objectives).front]
    return hypervolume([[math.log(kl), mb] for kl, mb in front], [math.log(corner[0]), corner[1]])


def test_order_of_the_searchers() -> None:
    """Evolution beats random, tables beat evolution, and learning beats the tables as they stand."""
    volumes: dict[str, list[float]] = {"random": [], "evolution": [], "ilp": [], "hybrid": []}
    for seed in range(2):
        problem, truth = wrong_tables(seed)
        for name, found in volumes.items():
            options = {"gap": 0.05, "points": 10} if name in ("ilp", "hybrid") else {}
            found.append(log_volume(run(name, problem, truth, 44, **options), problem))
    mean = [float(np.mean(v)) for v in volumes.values()]
    assert mean == sorted(mean) and mean[3] > 1.02 * mean[2], dict(zip(volumes, mean))


def test_random_covers_the_range_of_sizes() -> None:
    problem = toy_problem(60, budget=None)
    table = problem.tables["memory_mb"]
    drawn = [table.total(c) for c in RandomSearcher(problem).ask(60, [], [])]
    plain = np.random.default_rng(0)
    uniform = [table.total(problem.space.sample(plain)) for _ in range(60)]
    assert np.ptp(drawn) > 2.0 * np.ptp(uniform)


def test_random_and_hybrid_never_break_an_exact_budget_that_only_the_constraints_state() -> None:
    base = toy_problem(8, budget=0.2)
    loose = replace(base.space, constraints=())
    problem = replace(base, space=loose)
    for name in ("random", "evolution", "ilp", "hybrid", "optuna"):
        for c in SEARCHERS.get(name)(problem).ask(4, [], []):
            assert base.tables["memory_mb"].total(c) <= base.constraints[0].bound * (1 + 1e-9)


def test_nsga_order() -> None:
    losses = np.array([[0.0, 4.0], [4.0, 0.0], [1.0, 1.0], [2.0, 2.0], [0.9, 1.2], [5.0, 5.0]])
    order = nsga_order(losses)
    assert set(order[:4]) == {0, 1, 2, 4} and order[4:] == [3, 5]
    assert set(order[:2]) == {0, 1}  # the ends have infinite crowding distance
    assert nsga_order(np.zeros((0, 2))) == []


def test_crowding_distance_by_hand() -> None:
    assert crowding(np.array([[0.0, 3.0], [1.0, 1.0], [3.0, 0.0]])).tolist() == [math.inf, 2.0, math.inf]
    assert np.isinf(crowding(np.zeros((2, 2)))).all()


def test_selection_puts_feasible_before_small_violation_before_large() -> None:
    problem = toy_problem(4)
    bound = problem.constraints[0].bound

    def made(number: int, kl: float, size: float) -> Trial:
        found = {"kl": Estimate(kl), "memory_mb": Estimate(size)}
        return Trial(number, Candidate.of({"a": number}), Fidelity(), "s", Measurement(found, "toy"))

    history = [made(0, 0.0, 3 * bound), made(1, 9.0, bound), made(2, 0.0, 2 * bound), made(3, math.nan, 1.0)]
    assert [t.number for t in select(history, problem.objectives, problem.constraints, 9)] == [1, 2, 0]


def test_evolution_proposes_its_seeds_first() -> None:
    problem = toy_problem(6, budget=None)
    seed = problem.space.sample(np.random.default_rng(5))
    assert EvolutionSearcher(problem, seeds=[seed, seed]).ask(3, [], [])[0] == seed


def test_evolution_improves_a_float_problem() -> None:
    problem = float_problem()
    history: list[Trial] = []
    searcher = EvolutionSearcher(problem, population=10)
    for _ in range(20):
        asked = searcher.ask(4, history, [])
        history += [toy_trial(problem, len(history) + i, c) for i, c in enumerate(asked)]
    best = [min(t.value("kl") for t in part) for part in (history[:16], history)]
    assert best[1] < 0.5 * (best[0] - 0.1) + 0.1


def test_hybrid_without_tables_beats_random_on_floats() -> None:
    problem = float_problem()
    best: dict[str, float] = {}
    for name in ("random", "hybrid"):
        history: list[Trial] = []
        searcher = SEARCHERS.get(name)(problem)
        for _ in range(10):
            asked = searcher.ask(4, history, [])
            history += [toy_trial(problem, len(history) + i, c) for i, c in enumerate(asked)]
        best[name] = min(t.value("kl") for t in history)
    assert best["hybrid"] < best["random"]


def test_spread_order_covers_with_every_prefix() -> None:
    losses = np.column_stack([np.linspace(0, 1, 11), np.linspace(1, 0, 11)])
    order = spread_order(losses)
    assert set(order[:2]) == {0, 10} and order[2] == 5 and sorted(order) == list(range(11))
    assert spread_order(losses, losses[[0, 10]])[0] == 5
    assert spread_order(np.zeros((0, 2))) == []
    assert sorted(spread_order(np.ones((3, 2)))) == [0, 1, 2]


def test_batch_goes_where_the_volume_is() -> None:
    measured = np.array([[0.0, 1.0], [1.0, 0.0]])
    mean = np.array([[0.5, 0.5], [0.49, 0.51], [0.9, 0.9], [0.1, 0.8], [0.2, 0.2]])
    sure, all_feasible = np.full(mean.shape, 1e-9), np.ones(5)
    rng = np.random.default_rng(0)
    scene = Scene(measured, mean, sure, all_feasible, np.zeros((0, 2)))
    assert pick_batch(scene, 2, rng) == [4, 3]  # once 4 is taken the middle is covered
    assert pick_batch(replace(scene, pending=mean[[4]]), 1, rng) == [3]
    assert pick_batch(replace(scene, chance=np.array([1, 1, 1, 1, 0.0])), 1, rng)[0] != 4
    assert sorted(pick_batch(scene, 9, rng)) == [0, 1, 2, 3, 4]


def test_a_doubtful_bad_candidate_is_not_taken_for_a_great_one() -> None:
    """Losses over decades: 0.3 ± 0.3 says that it is bad, and by how much is open; 0.02 ± 0.002 is a gain."""
    measured = np.array([[2.0, 10.0], [0.03, 30.0], [0.001, 60.0]])
    mean, std = np.array([[0.3, 30.5], [0.02, 31.0]]), np.array([[0.3, 0.0], [0.002, 0.0]])
    scene = Scene(measured, mean, std, np.ones(2), np.zeros((0, 2)))
    assert pick_batch(scene, 1, np.random.default_rng(0)) == [1]


def test_profiles_are_asked_for_where_none_was_made() -> None:
    problem, truth = wrong_tables(0)
    history = run("hybrid", problem, truth, 24, first=6, points=6, gap=0.05)
    assert HybridSearcher(problem).wants_profile(history) is None  # the study can't
    problem = replace(problem, can_profile=True)
    wishes: list[Candidate] = []
    for _ in range(5):
        wish = HybridSearcher(problem, first=6, profiles=2).wants_profile(history)
        if wish is None:
            break
        wishes.append(wish)
        problem = replace(problem, local=(*problem.local, LocalModel(wish, truth)))
    front = [p.trial.candidate for p in ParetoFront.of(history, problem.objectives).front]
    assert len(wishes) == 2 and wishes[0] != wishes[1] and set(wishes) <= set(front)
    assert HybridSearcher(problem, first=6).wants_profile(history[:8]) is None


def test_a_good_profile_is_used() -> None:
    """With the truth as local model the proposals dominate more of what the wrong table proposes."""
    problem, truth = wrong_tables(1)
    history = run("ilp", problem, truth, 20, points=6, gap=0.05)
    center = history[10].candidate
    informed = replace(problem, local=(LocalModel(center, truth),), can_profile=True)
    totals = {}
    for name, p in (("plain", problem), ("informed", informed)):
        asked = HybridSearcher(p, first=4, gap=0.02).ask(8, history, [])
        totals[name] = [(truth.total(c), p.tables["memory_mb"].total(c)) for c in asked]
    won = sum(any(dominates(a, b) for a in totals["informed"]) for b in totals["plain"])
    lost = sum(any(dominates(b, a) for b in totals["plain"]) for a in totals["informed"])
    assert won > lost


def test_blended_tables() -> None:
    table = AdditiveTable("kl", 0.5, {"a": {2: 4.0, 8: 0.0}, "b": {2: 2.0, 8: 0.0}})
    local = AdditiveTable("kl", 9.0, {"a": {2: 0.0, 8: -1.0}, "b": {2: 5.0, 8: 0.0}})
    center = Candidate.of({"a": 2, "b": 8})
    assert blended(table, ()) is table
    assert blended(table, [LocalModel(center, AdditiveTable("ppl", 0.0, {}))]) is table
    mixed = blended(table, [LocalModel(center, local)])
    assert mixed.costs == {"a": {2: 1.0, 8: 0.0}, "b": {2: 5.0, 8: 0.0}}  # shifted; the spans agree
    partial = AdditiveTable("kl", 0.0, {"b": {2: 3.0, 8: 0.0}})
    assert blended(table, [LocalModel(center, partial)]).costs["a"][2] > 0


def test_optuna_names_its_samplers() -> None:
    problem = toy_problem(4)
    with pytest.raises(JobError, match=r"known: .*NSGAIISampler.*TPESampler"):
        OptunaSearcher(problem, sampler="Nope")
    with pytest.raises(JobError, match="keeps state"):
        OptunaSearcher(problem, sampler="GridSampler")
    with pytest.raises(JobError, match="do not fit"):
        OptunaSearcher(problem, sampler_options={"populace": 3})


def test_optuna_breeds_from_the_history() -> None:
    """Children of NSGA-II take their options from the parents, not from the whole space."""
    problem = toy_problem(20, budget=None)
    parents = [problem.space.uniform()[2].replace({f"d{i:04d}": 2}) for i in range(12)]
    history = [toy_trial(problem, i, c) for i, c in enumerate(parents)]
    options = {"population_size": 6, "mutation_prob": 0.0, "crossover_prob": 0.9}
    asked = OptunaSearcher(problem, sampler="NSGAIISampler", sampler_options=options).ask(4, history, [])
    assert asked and {v for c in asked for v in c.values.values()} <= {2, 4}


def test_optuna_is_quick_with_two_thousand_trials() -> None:
    problem = toy_problem(8, budget=None)
    rng = np.random.default_rng(0)
    history = [toy_trial(problem, i, problem.space.sample(rng)) for i in range(2000)]
    searcher = OptunaSearcher(problem, sampler="NSGAIISampler")
    searcher.ask(1, history, [])
    began = time.process_time()
    searcher.ask(1, history, [])
    assert time.process_time() - began < 0.5


def test_ilp_batch_is_on_the_predicted_front() -> None:
    problem = toy_problem(16, budget=None)
    asked = SEARCHERS.get("ilp")(problem, points=6, gap=0.0).ask(5, [], [])
    assert non_dominated([[t.total(c) for t in problem.tables.values()] for c in asked]).all()
