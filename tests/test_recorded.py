"""Recordings: from run directories to a file and back, replayed by the same study on a fake clock."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autocomp import api
from autocomp.cli import app
from autocomp.errors import JobError, RunError
from autocomp.executors.base import ItemFailed
from autocomp.executors.simulated import SimulatedClock, SimulatedExecutor
from autocomp.job import Job
from autocomp.journal import read_records
from autocomp.nearest import Nearest
from autocomp.profile import ProfileResult
from autocomp.recorded import STAND_IN, RecordedWorker, Recording, replay_executor
from autocomp.recorded_file import pack, unpack
from autocomp.space import Candidate, Choice, Decision, Interval, SearchSpace
from autocomp.study import Study, StudyResult
from autocomp.testing.fakes import FakeWorker
from autocomp.trial import Estimate, Fidelity, Measurement, Trial

JOB: dict[str, Any] = {
    "workload": {"kind": "causal_lm", "model": "none"},
    "space": [{"bitwidths": {}}],
    "objectives": ["min kl", "min decode_ms", "min memory_mb"],
    "budget": {"trials": 40},
    "validation": {"audit": 3, "promote": 6, "report": 4},
    "tracking": {"uri": "", "optuna": False},
}
PROXY = {"name": "proxy", "split": "proxy", "sequences": 0, "timing": True}


class SlowWorker(FakeWorker):
    """A fake whose measurements take minutes, the longer the larger the candidate."""

    def measure(self, candidate: Mapping[str, Any], fidelity: Mapping[str, Any]) -> dict[str, Any]:
        measured = super().measure(candidate, fidelity)
        bits = measured["metrics"].get("avg_bits", {"value": 0.3})  # where only latency is measured
        return {**measured, "seconds": 10.0 * bits["value"]}


def make_job(searcher: str = "random", **changes: Any) -> Job:
    options = {"points": 3, "first": 3, "pool": 40} if searcher == "hybrid" else {}
    return Job.of({**JOB, "searcher": {"name": searcher, "options": options}, **changes})


def run(job: Job, folder: Path, worker: Any = None, table: Path | None = None, **options: Any) -> StudyResult:
    """A study on a worker, or on the recording in ``table``, with the searcher that the job names."""
    executor = SimulatedExecutor(worker) if table is None else replay_executor(table, **options)
    return api.search(job, run_dir=folder, executor=executor)


def records(folder: Path) -> list[dict[str, Any]]:
    """Trials and their times as the journal has them, without what only the real run knows."""
    return [r for r in read_records(folder) if r["kind"] == "trial"]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are another file's matter and would be most of the time here."""
    monkeypatch.setattr("autocomp.report.write_artifacts", lambda result: [])


@pytest.fixture(scope="module")
def exhausted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on every candidate of four decisions; 3 bits fail wherever they are mixed with others."""
    job = make_job("exhaustive", budget={"trials": 1000}, validation={"audit": 0, "promote": 6, "report": 4})
    folder = tmp_path_factory.mktemp("exhausted") / "run"
    run(job, folder, SlowWorker(4, broken="w3g64"))
    return folder


@pytest.fixture
def whole(exhausted: Path, tmp_path: Path) -> Path:
    """The recording of that run, in a file of one's own."""
    table = tmp_path / "whole.json.gz"
    Recording.of_runs([exhausted]).save(table)
    return table


def test_a_file_holds_what_was_measured(whole: Path, exhausted: Path) -> None:
    recording, loaded = Recording.of_runs([exhausted]), Recording.load(whole)
    assert loaded == recording
    assert loaded.levels == ("proxy", "selection", "report") and loaded.workers == 2
    assert [t.number for t in loaded.trials.values()] == list(range(len(loaded.trials)))
    proxy = loaded.at("proxy")
    assert len(proxy) == 4**4 and sum(not t.ok for t in proxy) == 4**4 - 3**4 - 1
    truth = FakeWorker(4)
    for trial in proxy:
        if trial.measurement is not None:
            expected = truth.measure(trial.candidate.values, PROXY)
            assert {m: vars(e) for m, e in trial.measurement.metrics.items()} == expected["metrics"]
            assert trial.measurement.seconds == 10.0 * trial.value("avg_bits")
        else:
            assert trial.failure is not None and trial.failure.kind == "nan"
    assert {t.origin for t in proxy} == {"baseline", "exhaustive"}
    (sensitivity,) = loaded.profiles
    assert sensitivity.kind == "sensitivity:fisher" and len(sensitivity.rows) == 4


def test_equal_recordings_are_equal_bytes_and_small(whole: Path, tmp_path: Path) -> None:
    Recording.load(whole).save(tmp_path / "again.json.gz")
    assert (tmp_path / "again.json.gz").read_bytes() == whole.read_bytes()
    assert whole.stat().st_size < 10_000  # 256 trials; the journal has over 200 kB
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("searcher", ["random", "evolution", "hybrid"])
def test_the_same_search_replays_to_the_same_journal(tmp_path: Path, searcher: str) -> None:
    job = make_job(searcher, budget={"trials": 24})
    first = run(job, tmp_path / "real", SlowWorker(broken="w3g64"))
    table = tmp_path / "t.json.gz"
    Recording.of_runs([tmp_path / "real"]).save(table)
    again = run(job, tmp_path / "replay", table=table)
    assert records(tmp_path / "replay") == records(tmp_path / "real")
    assert len(records(tmp_path / "real")) > 28
    assert again.seconds == first.seconds > 500.0
    assert again.front.to_json() == first.front.to_json()


@pytest.mark.parametrize("searcher", ["random", "evolution"])
def test_another_search_finds_the_values_that_it_would_have_measured(
    whole: Path, tmp_path: Path, searcher: str
) -> None:
    result = run(make_job(searcher), tmp_path / "replay", table=whole, nearest=True)
    truth = FakeWorker(4)
    trials = [Trial.from_json(r["trial"]) for r in records(tmp_path / "replay")]
    assert searcher in {t.origin for t in trials}
    for trial in trials:
        if not trial.fidelity.split:
            continue  # the reference may be timed more often than it was when this was recorded
        if trial.ok:
            metrics = truth.measure(trial.candidate.values, PROXY)["metrics"]
            assert trial.values() == {m: e["value"] for m, e in metrics.items()}
        else:
            assert trial.failure is not None and "kl is nan" in trial.failure.reason
    assert result.status == "finished" and result.front.front
    # only other splits of measured candidates were made up, and say so
    made_up = [t for t in trials if t.measurement is not None and STAND_IN in t.measurement.details]
    assert {t.fidelity.name for t in made_up} <= {"selection", "report"}
    assert all(t.measurement.details[STAND_IN]["distance"] == 0 for t in made_up if t.measurement)


def test_what_was_not_measured_fails_with_the_remedy(whole: Path, tmp_path: Path) -> None:
    run(make_job("random", seed=5), tmp_path / "replay", table=whole)
    failed = [Trial.from_json(r["trial"]) for r in records(tmp_path / "replay")]
    unmeasured = [t for t in failed if t.failure is not None and t.failure.kind == "unmeasured"]
    assert unmeasured and {t.fidelity.name for t in unmeasured} <= {"selection", "report"}
    for trial in unmeasured:
        assert trial.failure is not None
        assert trial.candidate.fingerprint in trial.failure.reason
        assert "exhaustive" in trial.failure.reason and "executor.nearest" in trial.failure.reason


def test_minutes_are_simulated_minutes(whole: Path, tmp_path: Path) -> None:
    job = make_job(budget={"trials": 200, "minutes": 15}, validation={"audit": 0, "promote": 1, "report": 1})
    run(job, tmp_path / "two", table=whole, workers=2, nearest=True)
    run(job, tmp_path / "four", table=whole, workers=4, nearest=True)
    two, four = (
        [r for r in records(tmp_path / n) if r["trial"]["fidelity"]["name"] == "proxy"]
        for n in ("two", "four")
    )
    assert 15 * 60 <= two[-1]["elapsed"] < 17 * 60  # what is under way when time is up comes to its end
    assert 1.6 < len(four) / len(two) < 2.4, "four workers measure about twice as much in the time"
    ends = [r["elapsed"] for r in four]
    assert ends == sorted(ends) and len({r["trial"]["worker"] for r in four}) == 4


def test_a_stopped_replay_goes_on_where_it_stopped(whole: Path, tmp_path: Path) -> None:
    job, options = make_job(), {"table": whole, "workers": 1, "nearest": True}
    whole_run = run(job, tmp_path / "through", **options)
    few = Job.of({**job.resolved(), "budget": {"trials": 15}})
    run(few, tmp_path / "parts", **options)
    searched = [r for r in records(tmp_path / "parts") if r["trial"]["fidelity"]["name"] == "proxy"]
    assert len(searched) == 15
    run(job, tmp_path / "parts", **options)
    assert len(whole_run.hypervolume) == 40
    names = [
        (r["trial"]["fidelity"]["name"], json.dumps(r["trial"]["candidate"]))
        for r in records(tmp_path / "parts")
    ]
    assert len(names) == len(set(names)), "something was measured twice"
    elapsed = [r["elapsed"] for r in records(tmp_path / "parts")]
    assert elapsed == sorted(elapsed)


# -- which runs ------------------------------------------------------------------------------------


def shortened(folder: Path, lines: int) -> Path:
    """The run as it was when its driver was killed while it wrote another line."""
    journal = folder / "journal.jsonl"
    kept = journal.read_bytes().split(b"\n")[:lines]
    journal.write_bytes(b"\n".join(kept) + b'\n{"kind":"trial","tri')
    return folder


def test_an_unfinished_run_is_recorded_as_far_as_it_came(tmp_path: Path) -> None:
    run(make_job(), tmp_path / "run", FakeWorker())
    before = records(tmp_path / "run")
    recording = Recording.of_runs([shortened(tmp_path / "run", 12)])
    after = records(tmp_path / "run")
    assert 0 < len(after) < len(before)
    assert [t.candidate.to_json() for t in recording.trials.values()] == [
        r["trial"]["candidate"] for r in after
    ]


def test_runs_of_one_space_add_up_and_a_success_replaces_a_failure(tmp_path: Path) -> None:
    run(make_job("random"), tmp_path / "a", FakeWorker(broken="w8"))
    run(make_job("evolution", budget={"trials": 30}), tmp_path / "b", FakeWorker())
    both = Recording.of_runs([tmp_path / "a", tmp_path / "b"])
    a, b = Recording.of_runs([tmp_path / "a"]), Recording.of_runs([tmp_path / "b"])
    assert set(both.trials) == set(a.trials) | set(b.trials) > set(a.trials)
    mended = [k for k in set(a.trials) & set(b.trials) if not a.trials[k].ok and b.trials[k].ok]
    assert all(both.trials[k].ok for k in mended)
    assert [t.number for t in both.trials.values()] == list(range(len(both.trials)))


@pytest.mark.parametrize(
    ("job", "worker", "text"),
    [
        (make_job(), FakeWorker(7), "search space"),
        (make_job(seed=3), FakeWorker(), "job's seed"),
        (make_job(workload={**JOB["workload"], "data": {"proxy": 3}}), FakeWorker(), "job's workload"),
    ],
)
def test_runs_that_measured_other_things_are_not_mixed(
    tmp_path: Path, job: Job, worker: FakeWorker, text: str
) -> None:
    run(make_job(), tmp_path / "a", FakeWorker())
    run(job, tmp_path / "b", worker)
    with pytest.raises(RunError, match=f"differ in the {text}; record them apart"):
        Recording.of_runs([tmp_path / "a", tmp_path / "b"])


def test_drift_can_be_left_out_of_a_recording(tmp_path: Path) -> None:
    clock = SimulatedClock()

    class Tiring(SlowWorker):
        def measure(self, candidate: Mapping[str, Any], fidelity: Mapping[str, Any]) -> dict[str, Any]:
            measured = super().measure(candidate, fidelity)
            measured["metrics"]["decode_ms"]["value"] *= 1.0 + clock() / 10_000
            return measured

    job = make_job("exhaustive", budget={"trials": 200}, validation={"audit": 0})
    api.search(job, run_dir=tmp_path / "run", executor=SimulatedExecutor(Tiring(4), clock=clock))
    assert clock() > 5000.0

    def off(recording: Recording) -> list[float]:
        expected = {t.key: SlowWorker(4).measure(t.candidate.values, PROXY) for t in recording.at("proxy")}
        return [
            t.value("decode_ms") / expected[t.key]["metrics"]["decode_ms"]["value"] - 1.0
            for t in recording.at("proxy")
        ]

    measured = Recording.of_runs([tmp_path / "run"])
    corrected = Recording.of_runs([tmp_path / "run"], corrected=True)
    assert max(off(measured)) > 0.4 and max(map(abs, off(corrected))) < 0.03
    assert {t.fidelity.name for t in corrected.trials.values()} == {"proxy", "selection", "report"}
    assert [t.candidate for t in corrected.at("proxy")] == [t.candidate for t in measured.at("proxy")]
    corrected.save(tmp_path / "c.json.gz")
    assert Recording.load(tmp_path / "c.json.gz") == corrected


def test_folders_without_measurements_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="at least one run directory"):
        Recording.of_runs([])
    with pytest.raises(RunError, match="'nowhere' is not a run directory"):
        Recording.of_runs(["nowhere"])
    run(make_job(), tmp_path / "run", FakeWorker())
    with pytest.raises(RunError, match=r"nothing was measured in .*run"):
        Recording.of_runs([shortened(tmp_path / "run", 2)])


def test_a_replay_is_no_source_of_measurements(whole: Path, tmp_path: Path) -> None:
    run(make_job("random", seed=5), tmp_path / "strict", table=whole)
    run(make_job("random", seed=5), tmp_path / "nearest", table=whole, nearest=True)
    original = Recording.load(whole)
    for name in ("strict", "nearest"):
        again = Recording.of_runs([tmp_path / name])
        assert 0 < len(again.trials) < len(original.trials)
        for key, trial in again.trials.items():
            assert trial.measurement == original.trials[key].measurement


# -- files -----------------------------------------------------------------------------------------


def rewritten(table: Path, change: Callable[[dict[str, Any]], object]) -> bytes:
    data = json.loads(gzip.decompress(table.read_bytes()))
    change(data)
    return gzip.compress(json.dumps(data).encode())


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda t: t.read_bytes()[:-100], "is cut off or damaged"),
        (lambda t: t.read_bytes()[:500] + bytes(20) + t.read_bytes()[520:], "is cut off or damaged"),
        (lambda t: b"kl,decode_ms\n1,2\n", "is no recording; `autocomp record"),
        (lambda t: b"", "is no recording"),
        (lambda t: gzip.compress(b"[1, 2]"), "is no recording"),
        (lambda t: gzip.compress(b"not json"), "is cut off or damaged"),
        (lambda t: rewritten(t, lambda d: d.update(format="other")), "is no recording"),
        (
            lambda t: rewritten(t, lambda d: d.update(version=2)),
            "has format version 2 and this autocomp reads 1",
        ),
        (lambda t: rewritten(t, lambda d: d.pop("levels")), r"damaged \(KeyError\('levels'\)\)"),
        (lambda t: rewritten(t, lambda d: d["levels"][0].update(count=3)), "a column has 256 values, not 3"),
    ],
)
def test_foreign_broken_and_newer_files_are_refused_in_words(
    whole: Path, spoil: Callable[[Path], bytes], text: str
) -> None:
    whole.write_bytes(spoil(whole))
    with pytest.raises(RunError, match=text):
        Recording.load(whole)


def test_files_that_can_not_be_opened_are_named(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no recording .*no\.gz.*autocomp record"):
        Recording.load(tmp_path / "no.gz")
    with pytest.raises(RunError, match="can't read the recording"):
        Recording.load(tmp_path)
    with pytest.raises(RunError, match="can't write the recording"):
        Recording.load(whole).save(whole / "below" / "a.file")


@pytest.mark.parametrize(
    "values",
    [
        [],
        [None] * 4,
        ["w4", "w8", "w4", "w4"],
        [0.1 + 0.2, 1e-300, -0.0, 1e22],
        [1, 1.0, True, "1", 1, 1.0, True, "1"],
        [None, 0.5, None, 0.5],
        [{"a": 1}, {"a": 1}, None, None],
        [float("inf"), float("-inf"), 1.0],
    ],
)
def test_columns_keep_every_bit_and_type(values: list[Any]) -> None:
    read = unpack(json.loads(json.dumps(pack(values))), len(values))
    assert list(map(repr, read)) == list(map(repr, values))


def test_floats_nulls_and_options_of_any_type_survive(tmp_path: Path, whole: Path) -> None:
    base = Recording.load(whole)
    rows: list[dict[str, Any]] = [
        {"t": 0.1 + 0.2, "s": None, "b": True, "n": 1},
        {"t": 0, "s": 1e-17, "b": False, "n": "1"},
        {"t": 1.0, "s": None, "b": True, "n": 1.5},
    ]
    found = {m: Estimate(1 / 3, 1e-9, 5) for m in ("fd", "nfe")}
    trials = {}
    for i, row in enumerate(rows):
        own = dict(list(found.items())[: 1 + i % 2])  # not every metric of every trial
        made = Trial(i, Candidate.of(row), Fidelity(), "x", Measurement(own, "gpu", 1.5, 7, {"torch": "2"}))
        trials[("proxy", made.candidate.fingerprint)] = made
    recording = replace(base, trials=trials)
    recording.save(tmp_path / "f.json.gz")
    loaded = Recording.load(tmp_path / "f.json.gz")
    assert loaded == recording
    assert [repr(t.candidate.to_json()) for t in loaded.trials.values()] == [
        repr(t.candidate.to_json()) for t in trials.values()
    ]


# -- the worker ------------------------------------------------------------------------------------


def test_profiles_come_back_from_any_number_of_shards(whole: Path) -> None:
    recording = Recording.load(whole)
    worker = RecordedWorker(recording)
    (kept,) = recording.profiles
    for shards in (1, 3):
        parts = [
            worker.profile({"kind": kept.kind, "shard": i, "shards": shards, "at": ""}) for i in range(shards)
        ]
        merged = ProfileResult.merge(map(ProfileResult.from_json, parts))
        assert merged.rows == kept.rows and merged.seconds == pytest.approx(kept.seconds)


def test_what_was_not_profiled_is_not_offered_and_fails(whole: Path) -> None:
    recording = Recording.load(whole)
    offering = replace(
        recording.description,
        profiles=("sensitivity:fisher", "sensitivity:measured", "neighbourhood"),
        rows={"decode_ms": (1, 1.0)},
    )
    worker = RecordedWorker(replace(recording, description=offering))
    told = worker.describe()
    assert told["profiles"] == ["sensitivity:fisher"] and told["rows"] == {}
    requests = [("neighbourhood", "abc"), ("sensitivity:measured", ""), ("sensitivity:fisher", "abc")]
    for kind, at in requests:
        with pytest.raises(ItemFailed) as caught:
            worker.profile({"kind": kind, "shard": 0, "shards": 1, "at": at})
        assert caught.value.failure.kind == "unmeasured" and kind in caught.value.failure.reason


def test_latency_is_not_answered_from_a_run_without_timings(tmp_path: Path) -> None:
    class Untimed(FakeWorker):
        def measure(self, candidate: Mapping[str, Any], fidelity: Mapping[str, Any]) -> dict[str, Any]:
            measured = super().measure(candidate, fidelity)
            if not fidelity["timing"]:
                del measured["metrics"]["decode_ms"]
            return measured

    run(make_job(objectives=["min kl", "min memory_mb"]), tmp_path / "run", Untimed())
    recording = Recording.of_runs([tmp_path / "run"])
    worker, trial = RecordedWorker(recording), recording.at("proxy")[0]
    with pytest.raises(ItemFailed, match="no timings at 'proxy'"):
        worker.measure(trial.candidate.values, PROXY)
    measured = worker.measure(trial.candidate.values, {**PROXY, "timing": False})
    assert measured["metrics"]["kl"]["value"] == trial.value("kl")
    with pytest.raises(ItemFailed, match="was not measured at 'proxy'"):
        worker.measure(trial.candidate.values, {**PROXY, "timing": False, "sequences": 4})


def test_the_nearest_lends_its_quality_but_not_its_bytes(tmp_path: Path) -> None:
    run(make_job(), tmp_path / "run", FakeWorker())
    recording = Recording.of_runs([tmp_path / "run"])
    names = [d.name for d in recording.description.space]
    baseline = Candidate.of(dict.fromkeys(names, "w16"))
    near = baseline.replace({names[0]: "w8"})
    kept = {k: t for k, t in recording.trials.items() if t.origin == "baseline"}
    worker = RecordedWorker(replace(recording, trials=kept), nearest=True)
    measured = worker.measure(near.values, PROXY)
    note = measured["details"][STAND_IN]
    assert note == {
        "candidate": baseline.fingerprint, "fidelity": "proxy", "distance": pytest.approx(1 / 3),
    }  # fmt: skip
    truth = FakeWorker()
    assert measured["metrics"]["kl"]["value"] == truth.measure(baseline.values, PROXY)["metrics"]["kl"].get(
        "value"
    )
    assert (
        measured["metrics"]["memory_mb"]["value"]
        == truth.measure(near.values, PROXY)["metrics"]["memory_mb"]["value"]
    )
    with pytest.raises(ItemFailed, match=r"not timed that often .* validation\.reference_every to 0"):
        worker.measure(baseline.values, {**PROXY, "name": "timing-99", "split": ""})
    with pytest.raises(ItemFailed, match="nothing was measured at 'elsewhere'"):
        worker.measure(near.values, {**PROXY, "name": "elsewhere"})


def test_distances_follow_order_ranges_and_unused_slots() -> None:
    space = SearchSpace(
        (
            Decision("bits", Choice((2, 4, 8), ordered=True)),
            Decision("solver", Choice(("euler", "heun", "dpm"))),
            Decision("t", Interval(0.0, 10.0, nullable=True)),
        )
    )

    def trial(bits: int, solver: str, t: float | None) -> Trial:
        return Trial(0, Candidate.of({"bits": bits, "solver": solver, "t": t}), Fidelity(), "x")

    def distance(a: Trial, b: Trial) -> float:
        return Nearest(space, [a]).find(b.candidate)[1]

    origin = trial(2, "euler", 0.0)
    assert distance(origin, origin) == 0.0
    assert distance(origin, trial(4, "euler", 0.0)) == 0.5
    assert distance(origin, trial(8, "dpm", 5.0)) == 2.5
    assert distance(origin, trial(2, "dpm", None)) == 2.0
    assert distance(trial(2, "euler", None), trial(2, "euler", None)) == 0.0
    assert distance(origin, trial(3, "euler", 0.0)) == 1.0  # an option that is not offered
    assert Nearest(space, []).find(origin.candidate) == (None, float("inf"))
    far, close = trial(8, "euler", 0.0), trial(4, "euler", 0.0)
    assert Nearest(space, [far, close, close]).find(origin.candidate) == (close, 0.5)


# -- jobs and the command line -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("executor", "text"),
    [
        ({"name": "simulated"}, "needs executor.table"),
        ({"name": "local", "table": "t.json.gz"}, "are for executor.name: simulated"),
        ({"nearest": True}, "are for executor.name: simulated"),
    ],
)
def test_jobs_that_mix_real_and_simulated_are_refused(executor: dict[str, Any], text: str) -> None:
    with pytest.raises(JobError, match=text):
        make_job(executor=executor)


def test_record_and_search_on_the_command_line(whole: Path, exhausted: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(JOB))
    table, call = tmp_path / "table.json.gz", CliRunner().invoke
    done = call(app, ["record", str(exhausted), "--out", str(table)])
    assert done.exit_code == 0 and table.read_bytes() == whole.read_bytes()
    assert (
        "(proxy 256, " in done.stdout
        and "selection 6" in done.stdout
        and "executor.name=simulated" in done.output
    )
    options = [
        "executor.name=simulated",
        f"executor.table={table}",
        "executor.nearest=true",
        "searcher.name=evolution",
    ]
    overrides = [word for option in options for word in ("-o", option)]
    done = call(app, ["search", str(job), *overrides, "--run-dir", str(tmp_path / "replay")])
    assert done.exit_code == 0, done.output
    assert len([r for r in records(tmp_path / "replay") if r["trial"]["fidelity"]["name"] == "proxy"]) == 40
    done = call(app, ["search", str(job), "-o", "executor.name=simulated", "-o", "executor.table=none.gz"])
    assert done.exit_code == 2 and "there is no recording 'none.gz'" in done.output


def test_a_study_of_ones_own_takes_the_clock(whole: Path, tmp_path: Path) -> None:
    from autocomp.searchers.random import RandomSearcher

    executor = replay_executor(whole, nearest=True)
    study = Study(
        make_job(), tmp_path / "own", executor=executor, searcher=RandomSearcher, clock=executor.clock
    )
    assert study.run().seconds == executor.clock() > 100.0
