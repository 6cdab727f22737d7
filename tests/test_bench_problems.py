"""The benchmark's problems: what is called the truth and the reference front is just that."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from autocomp.description import Description
from autocomp.pareto import hypervolume
from autocomp.profile import ProfileResult
from autocomp.recorded import Recording
from autocomp.space import Candidate
from autocomp.testing.fakes import LOSS, OPTIONS, FakeWorker
from autocomp.testing.searchers import CHECKS
from autocomp.trial import Estimate, Fidelity, Measurement, Trial

BENCH = Path(__file__).parents[1] / "experiments" / "bench_search"

pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="the experiments are not here")


@pytest.fixture(scope="module", autouse=True)
def _bench_on_path() -> Iterator[None]:
    """The experiment's modules import each other by name, as scripts do."""
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def every_code(blocks: int) -> np.ndarray:
    return np.array(list(product(range(4), repeat=4 * blocks)), dtype=np.intp).reshape(-1, blocks, 4)


def test_additive_front_is_what_enumeration_finds():
    from allocation import additive_front, draw_allocation
    from reference import front_rows, losses_of

    instance = draw_allocation(np.random.default_rng(1), 2, interacting=False)
    every = losses_of(instance, every_code(2), timed=False)
    corner = every.max(axis=0) + 1.0
    exact = hypervolume(every[front_rows(every)], corner)
    assert hypervolume(additive_front(instance), corner) == pytest.approx(exact, rel=1e-12)


def test_interacting_reference_is_proven_and_nothing_enumerated_beats_it(monkeypatch):
    import reference
    from allocation import draw_allocation
    from bench_problem import judged

    instance = draw_allocation(np.random.default_rng(2), 2, interacting=True)
    monkeypatch.setattr(reference, "instance_of", lambda name, seed: instance)
    found = reference.allocation_reference("interaction", 0, prices=60)
    log, codes = (True, False), every_code(2)
    every = reference.losses_of(instance, codes, timed=False)
    exact = hypervolume(judged(every[reference.front_rows(every)], log), found["corner"])
    assert found["volume"] <= exact * (1 + 1e-9) <= found["upper"] * (1 + 1e-6)
    assert found["volume"] > 0.998 * exact
    for i in (0, 77, 30000, 65535):
        memory = instance.memory_mb(instance.unit_bits(codes[i]))
        assert every[i] == pytest.approx([instance.kl(codes[i]), memory])


def test_interaction_and_cliff_only_add():
    from allocation import draw_allocation

    rng = np.random.default_rng(3)
    bent = draw_allocation(rng, 4, interacting=True)
    for codes in rng.integers(4, size=(20, 4, 4)):
        sums = np.take_along_axis(bent.group_error, codes[:, :, None], axis=2).sum()
        assert bent.kl(codes) > sums
    all_low = np.zeros((4, 4), dtype=np.intp)
    assert bent.cliff_factor(0.25) == 1.0 < bent.cliff_factor(0.3) < bent.cliff_factor(1.0) == 9.0
    low = bent.group_error[:, :, 0].sum()
    assert bent.kl(all_low) > 9.0 * low


def test_tables_are_exact_for_memory_and_off_by_thirty_per_cent_for_divergence():
    from allocation import instance_of
    from problems import PROBLEMS

    bench = PROBLEMS["additive"](3)
    rng, errors = np.random.default_rng(0), []
    for _ in range(10):
        candidate = bench.problem.space.sample(rng)
        _, memory = bench.truth(candidate)
        assert bench.problem.tables["memory_mb"].total(candidate) == pytest.approx(memory)
    truth = instance_of("additive", 3).error
    table = bench.problem.tables["kl"].costs
    names = [f"bits/{b}.{n}" for b in range(16) for n in ("q", "k", "v", "o", "up", "down")]
    for i, name in enumerate(names):
        errors += [np.log(table[name][o] / truth.reshape(96, 4)[i, j]) for j, o in enumerate((2, 3, 4, 8))]
    assert np.std(errors) == pytest.approx(0.3, rel=0.15)


def test_noise_is_what_it_says():
    from problems import PROBLEMS

    bench = PROBLEMS["additive"](0)
    candidate = bench.problem.baselines[1]
    rng = np.random.default_rng(0)
    found = [bench.measure(candidate, rng)["kl"] for _ in range(300)]
    values = np.array([e.value for e in found])
    assert values.mean() == pytest.approx(bench.truth(candidate)[0], rel=0.005)
    assert values.std() == pytest.approx(np.mean([e.stderr for e in found]), rel=0.15)


def test_merging_front_is_attained_and_not_beaten():
    from merging import BITS, EXPERTS, MERGED, draw_experts, exact_front, partitions

    experts = draw_experts(np.random.default_rng(4))
    front = exact_front(experts)
    assert sum(1 for _ in partitions(EXPERTS, MERGED)) == 2795
    rng, attained = np.random.default_rng(5), []
    for _ in range(200):  # anything a searcher may try
        route = [int(r) for r in rng.integers(MERGED, size=EXPERTS)]
        losses = experts.losses(
            route, rng.dirichlet(np.ones(EXPERTS), size=MERGED), [int(b) for b in rng.choice(BITS, MERGED)]
        )
        assert hypervolume([*front, losses], (9.0, 9.0)) == pytest.approx(hypervolume(front, (9.0, 9.0)))
    for parts in list(partitions(EXPERTS, MERGED))[::40]:
        route = [next(r for r, part in enumerate(parts) if j in part) for j in range(EXPERTS)]
        weights = np.zeros((MERGED, EXPERTS))
        for r, part in enumerate(parts):
            weights[r, list(part)] = experts.frequency[list(part)] / experts.frequency[list(part)].sum()
        attained += [experts.losses(route, weights, [b] * MERGED) for b in BITS]
    hull = np.array(attained)
    assert hypervolume(hull, (9.0, 9.0)) > 0.9 * hypervolume(front, (9.0, 9.0))


def test_solvers_have_their_orders():
    from steps import solve_errors

    def error(solver: str, steps: int) -> float:
        return float(solve_errors(np.linspace(1.0, 0.0, steps, endpoint=False)[None], [solver] * steps)[0])

    for solver, order in (("euler", 1), ("heun", 2), ("ab2", 2)):
        found = np.log2(error(solver, 2000) / error(solver, 4000))
        assert found == pytest.approx(order, abs=0.15), solver


def test_schedules_are_read_as_they_are_written():
    from problems import PROBLEMS
    from steps import steps_candidate, steps_of

    times, solvers = [0.9, 0.5, 0.1], ["heun", "euler", "ab2"]
    candidate = steps_candidate(times, solvers)
    assert steps_of(candidate) == (times, solvers)
    bench = PROBLEMS["schedule"](0)
    assert not bench.problem.space.violations(candidate)
    assert bench.truth(candidate)[1] == 4.0


@pytest.mark.parametrize("name", ["additive", "interaction", "noisy", "mixed", "schedule", "lm", "smollm2"])
def test_problems_are_sound(name):
    from problems import PROBLEMS

    bench = PROBLEMS[name](0)
    losses = np.array([bench.truth(c) for c in bench.problem.baselines])
    assert 0.2 < bench.volume(losses) < 0.9
    assert bench.front is not None
    # A regression's last digits are not the same on every machine.
    assert 0.9 < bench.volume(bench.front) < 1.0 + (1e-3 if name == "smollm2" else 1e-6)
    for candidate in bench.problem.baselines:
        assert not bench.problem.space.violations(candidate)
        found = bench.measure(candidate, np.random.default_rng(0))
        assert isinstance(found, dict)
        assert all(isinstance(found[o.metric], Estimate) for o in bench.problem.objectives)


def test_reference_volumes_of_zdt3_and_unknown_ones():
    from bench_problem import stored_reference
    from standard import reference_volume

    x = np.linspace(0.0, 1.0, 2001)
    rows = np.column_stack([x, 1.0 - np.sqrt(x) - x * np.sin(10.0 * np.pi * x)])
    corner = (1.1, 1.3)
    assert reference_volume("zdt3", corner) == pytest.approx(hypervolume(rows, corner), rel=2e-3)
    rows[:, 1] = 1.0 - np.sqrt(x)
    assert reference_volume("zdt1", corner) == pytest.approx(hypervolume(rows, corner), rel=2e-3)
    with pytest.raises(KeyError, match="known"):
        reference_volume("zdt7", corner)
    with pytest.raises(KeyError, match=r"reference\.py interaction --seeds 12345"):
        stored_reference("interaction", 12345)


@pytest.mark.parametrize("name", ["zdt1", "dtlz2"])
def test_standard_problems_measure_what_pymoo_says(name):
    pytest.importorskip("pymoo")
    from problems import PROBLEMS

    bench = PROBLEMS[name](0)
    names = [d.name for d in bench.problem.space]
    rest = 0.0 if name == "zdt1" else 0.5
    losses = bench.truth(Candidate.of({n: (0.25 if i == 0 else rest) for i, n in enumerate(names)}))
    if name == "zdt1":
        assert losses == pytest.approx([0.25, 0.5])
    else:
        assert np.linalg.norm(losses) == pytest.approx(1.0)
    assert 0.0 < bench.volume(losses[None]) < 1.0


@pytest.mark.parametrize(
    "check", ["determinism", "constraints", "pending", "resume", "failures", "exhaustion"]
)
def test_evopress_conforms(check):
    from evopress import EvoPressSearcher

    CHECKS[check](EvoPressSearcher)


@pytest.mark.parametrize("check", ["determinism", "constraints", "resume", "failures", "floats"])
def test_pymoo_conforms(check):
    pytest.importorskip("pymoo")
    from pymoo_nsga2 import PymooSearcher

    CHECKS[check](PymooSearcher)


def test_a_run_counts_trials_and_volume():
    import run
    from problems import PROBLEMS

    record = run.run("additive", "random", 0, 24)
    volumes = [record["volume"][str(n)] for n in (4, 8, 12, 16, 20, 24)]
    assert record["measured"] == 24
    assert volumes == sorted(volumes)
    bench = PROBLEMS["additive"](0)
    losses = np.array([bench.truth(c) for c in bench.problem.baselines])
    assert volumes[0] == pytest.approx(bench.volume(losses), abs=1e-5)
    assert record == {
        **run.run("additive", "random", 0, 24),
        **{k: record[k] for k in ("cpu_s", "slowest_ask_s")},
    }
    assert "refused" in run.run("mixed", "ilp", 0, 24)


def recording_of(worker: FakeWorker, every: list[dict[str, str]]) -> Recording:
    """What the worker measures of these candidates."""
    level = {"name": "proxy", "split": "proxy", "sequences": 0, "timing": True}
    trials = {}
    for i, values in enumerate(every):
        candidate = Candidate.of(values)
        found = dict(worker.measure(candidate.to_json(), level))
        metrics = {m: Estimate(**e) for m, e in found.pop("metrics").items()}
        trial = Trial(i, candidate, Fidelity(**level), "exhaustive", Measurement(metrics, **found))
        trials["proxy", candidate.fingerprint] = trial
    request = {"kind": "sensitivity:fisher", "shard": 0, "shards": 1}
    profile = ProfileResult.from_json(worker.profile(request))
    return Recording(Description.from_json(worker.describe()), trials, (profile,))


def test_a_recording_is_a_problem_with_an_exact_front(tmp_path):
    from recorded_table import recorded_problem

    worker = FakeWorker(3)
    recording = recording_of(worker, [dict(zip(worker.names, v)) for v in product(OPTIONS, repeat=3)])
    recording.save(tmp_path / "fake.json.gz")
    description, trials = recording.description, recording.trials
    bench = recorded_problem(tmp_path / "fake.json.gz", seed=1, objectives=("min kl", "min memory_mb"))
    every = [t.candidate for t in trials.values()]
    assert bench.volume(np.array([bench.truth(c) for c in every])) == pytest.approx(1.0)
    assert bench.problem.tables["kl"].total(every[7]) == pytest.approx(bench.truth(every[7])[0])
    assert bench.problem.tables["memory_mb"].exact
    assert bench.problem.baselines == description.baselines
    rng = np.random.default_rng(0)
    assert bench.measure(every[5], rng) == trials["proxy", every[5].fingerprint].measurement.metrics
    foreign = Candidate.of(dict.fromkeys(worker.names, "w5"))
    assert bench.measure(foreign, rng).kind == "unmeasured"
    with pytest.raises(ValueError, match="no measured trial at 'report'"):
        recorded_problem(tmp_path / "fake.json.gz", level="report")


def test_a_recording_with_gaps_is_continued_by_a_regression(tmp_path, monkeypatch):
    import reference
    import surrogate
    from recorded_table import loaded

    worker = FakeWorker(6)
    rng = np.random.default_rng(0)
    some = [dict(zip(worker.names, rng.choice(OPTIONS[:3], 6).tolist())) for _ in range(150)]
    (tmp_path / "fake").mkdir()
    path = tmp_path / "fake" / "table.json.gz"
    recording_of(worker, some).save(path)
    objectives = ("min kl", "min memory_mb")
    monkeypatch.setattr(reference, "MODELLED", {"fake": objectives})
    monkeypatch.setattr(reference, "REFERENCES", tmp_path / "references.json")
    monkeypatch.setattr(surrogate, "stored_reference", lambda name, seed: found)
    found = reference.modelled_reference("fake", quiet=2)
    bench = surrogate.surrogate_problem(path, 3, name="fake", objectives=objectives)

    # What was measured is known, what was not is close to it, and memory is exact.
    for values in (some[0], dict(zip(worker.names, ["w4g64", "w8"] * 3))):
        candidate = Candidate.of(values)
        kl = sum(worker.weight(i) * LOSS[o] for i, o in enumerate(values.values()))
        assert bench.truth(candidate)[0] == pytest.approx(kl, rel=0.1)
        assert bench.truth(candidate)[1] == bench.problem.tables["memory_mb"].total(candidate)
        measured = bench.measure(candidate, rng)
        assert measured["kl"].value == pytest.approx(bench.truth(candidate)[0], rel=0.2)
        assert measured["memory_mb"].stderr == 0.0
    every = [Candidate.of(dict(zip(worker.names, v))) for v in product(OPTIONS[:3], repeat=6)]
    truth, _ = surrogate.truth_of(path, bench.problem.objectives)
    assert np.allclose(truth.losses(every[:5]), [bench.truth(c) for c in every[:5]])
    assert bench.volume(truth.losses(every)) < 1.0 + 2e-3  # the local search found it all
    assert surrogate.held_out(bench.problem.space, loaded(path).at("proxy"), "kl")["tau"] > 0.9


def test_a_regression_refuses_what_it_can_not_code():
    import surrogate

    from autocomp.space import Decision, Interval, SearchSpace

    with pytest.raises(ValueError, match="only categorical"):
        surrogate.choices(SearchSpace((Decision("x", Interval(0.0, 1.0)),)))
