"""The command line: what each command calls, prints and returns, and how errors look."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from autocomp import api, cli, doctor
from autocomp.errors import CapabilityError, InfeasibleError
from autocomp.objective import Objective
from autocomp.pareto import ParetoFront
from autocomp.progress import LiveDisplay, PlainDisplay, SilentDisplay, duration_text, make_display
from autocomp.space import Candidate
from autocomp.study import Event, StudyResult
from autocomp.trial import Estimate, Failure, Fidelity, Measurement, Trial

JOB = """
workload: {kind: causal_lm, model: some/model}
space: [{bitwidths: {bits: [4, 8]}}]
objectives: [min kl, min memory_mb]
"""


def make_trial(number: int, kl: float, size: float) -> Trial:
    metrics = {"kl": Estimate(kl, 0.001), "memory_mb": Estimate(size)}
    candidate = Candidate.of({"bitwidths/a": "w4", "bitwidths/b": f"w{number}"})
    return Trial(number, candidate, Fidelity("report"), "validate", Measurement(metrics, "cpu, 1 thread"))


FRONT = ParetoFront.of(
    [make_trial(3, 0.5, 10.0), make_trial(8, 0.01, 20.0)], [Objective("kl"), Objective("memory_mb")]
)
EMPTY = ParetoFront((), (Objective("kl"),))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    monkeypatch.delenv("AUTOCOMP_DEBUG", raising=False)
    monkeypatch.delenv("AUTOCOMP_LOG_LEVEL", raising=False)
    logger = logging.getLogger("autocomp")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield lambda *args: CliRunner().invoke(cli.app, [str(a) for a in args])
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB + f"output: {tmp_path / 'runs'}\n")
    return path


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """``api.search`` and ``api.resume`` that report one trial and finish; what they were called with."""
    calls: list[dict[str, Any]] = []

    def fake(subject: Any, *, on_event: Callable[[Event], None], **options: Any) -> StudyResult:
        calls.append({"subject": subject, **options})
        on_event(Event("phase", "searching 2 decisions", None, 0, 2))
        on_event(Event("trial", "trial 3: kl 0.5", FRONT.points[1].trial, 1, 2, 1, {"kl": 0.5}, 65.0))
        folder = Path(options.get("run_dir") or subject)
        return StudyResult(folder, FRONT, "finished", {}, [0.1], 65.0)

    monkeypatch.setattr(api, "search", fake)
    monkeypatch.setattr(api, "resume", fake)
    return calls


def test_help_and_version_load_nothing_heavy() -> None:
    program = (
        "import sys\nfrom autocomp import cli\n"
        "sys.argv = ['autocomp', sys.argv[1]]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'optuna', 'plotly', 'matplotlib', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    for flag, expected in (("--help", "search"), ("--version", "autocomp 0")):
        done = subprocess.run([sys.executable, "-c", program, flag], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_search_runs_the_job_with_its_overrides_and_prints_the_front(
    run: Callable[..., Result], job: Path, finished: list[dict[str, Any]], tmp_path: Path
) -> None:
    result = run("search", job, "-o", "budget.trials=7", "-o", "seed=3", "--run-dir", tmp_path / "r")
    assert result.exit_code == 0, result.output
    (call,) = finished
    assert call["subject"].budget.trials == 7 and call["subject"].seed == 3
    assert call["run_dir"] == tmp_path / "r"
    assert "w4×1 w3×1" in result.stdout and "0.01 ± 0.001" in result.stdout
    assert "autocomp export" in result.stderr and "searching 2 decisions" in result.stderr
    assert "finished in 1:05" in result.stderr


def test_search_picks_a_run_directory_below_the_output(
    run: Callable[..., Result], job: Path, finished: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert run("search", job).exit_code == 0
    assert finished[0]["run_dir"].parent == tmp_path / "runs"


def test_quiet_shows_the_result_only(
    run: Callable[..., Result], job: Path, finished: list[dict[str, Any]]
) -> None:
    result = run("search", job, "--quiet")
    assert "w4×1" in result.stdout and "searching" not in result.stderr


def test_resume_passes_overrides_on(
    run: Callable[..., Result], tmp_path: Path, finished: list[dict[str, Any]]
) -> None:
    assert run("resume", tmp_path, "-o", "budget.trials=9").exit_code == 0
    assert finished == [{"subject": tmp_path, "overrides": ["budget.trials=9"]}]


def test_a_stopped_study_tells_how_to_resume(
    run: Callable[..., Result], job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "journal.jsonl").touch()
    stopped = StudyResult(folder, EMPTY, "stopped", {}, [], 1.0)
    monkeypatch.setattr(api, "search", lambda *a, **k: stopped)
    result = run("search", job, "--run-dir", folder)
    assert result.exit_code == 130 and f"autocomp resume {folder}" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (InfeasibleError("smallest memory_mb is 12"), 2, "error: smallest memory_mb is 12"),
        (CapabilityError("no CUDA; use device cpu"), 2, "error: no CUDA; use device cpu"),
    ],
)
def test_errors_are_one_message_without_a_trace(
    run: Callable[..., Result],
    job: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    text: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "journal.jsonl").touch()
    monkeypatch.setattr(api, "search", fail)
    result = run("search", job, "--run-dir", tmp_path)
    assert result.exit_code == code and text in result.stderr and "Traceback" not in result.output
    assert f"autocomp resume {tmp_path}" in result.stderr
    monkeypatch.setenv("AUTOCOMP_DEBUG", "1")
    shown = run("search", job, "--run-dir", tmp_path).output
    assert ("Traceback" in shown) == (code == 2)


def test_a_search_that_finds_nothing_feasible_says_so(
    run: Callable[..., Result], job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = StudyResult(tmp_path, EMPTY, "finished", {}, [], 1.0)
    monkeypatch.setattr(api, "search", lambda *a, **k: nothing)
    result = run("search", job, "--run-dir", tmp_path)
    assert result.exit_code == 1 and "no trial was measured" in result.stdout


def test_real_mistakes_name_the_value_and_the_remedy(run: Callable[..., Result], job: Path) -> None:
    missing = run("search", job.with_name("nope.yaml"))
    assert missing.exit_code == 2 and "nope.yaml" in missing.stderr
    typo = run("search", job, "-o", "budget.trails=3")
    assert typo.exit_code == 2 and "did you mean 'trials'" in typo.stderr
    malformed = run("search", job, "-o", "budget.trials")
    assert malformed.exit_code == 2 and "dotted.key=value" in malformed.stderr
    foreign = run("front", job.parent / "no-run")
    assert foreign.exit_code == 2 and "no-run" in foreign.stderr
    candidate = job.with_name("c.json")
    assert run("measure", job, "--candidate", candidate).exit_code == 2
    candidate.write_text("[1, 2]")
    assert "mapping of decision names" in run("measure", job, "--candidate", candidate).stderr


def test_front_prints_selects_draws_and_speaks_json(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "front_of", lambda folder: FRONT)
    plain = run("front", tmp_path, "--select", "kl <= 0.1, min memory_mb")
    assert plain.exit_code == 0 and "selected: trial 8" in plain.stdout
    html, png = tmp_path / "f.html", tmp_path / "f.png"
    drawn = run("front", tmp_path, "--html", html, "--png", png, "--json")
    data = json.loads(drawn.stdout)
    assert [p["number"] for p in data["points"]] == [8, 3] and data["selected"] is None
    assert html.stat().st_size > 1e6 and png.stat().st_size > 5000
    selected = run("front", tmp_path, "--json", "--select", "min kl")
    assert json.loads(selected.stdout)["selected"]["number"] == 8

    nothing = run("front", tmp_path, "--select", "kl <= 0.0001, min memory_mb")
    assert nothing.exit_code == 2 and "smallest kl is 0.01" in nothing.stderr
    unreadable = run("front", tmp_path, "--select", "kl below 1")
    assert unreadable.exit_code == 2 and "kl below 1" in unreadable.stderr
    assert "--select" in run("front", tmp_path, "--map", tmp_path / "m.png").stderr
    no_space = run("front", tmp_path, "--select", "min kl", "--map", tmp_path / "m.png")
    assert no_space.exit_code == 2 and "description.json" in no_space.stderr
    suffix = run("front", tmp_path, "--png", tmp_path / "f.xyz")
    assert suffix.exit_code == 2 and "xyz" in suffix.stderr


def test_measure_reads_the_candidate_and_prints_metrics(
    run: Callable[..., Result], job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def fake(job: Any, values: dict[str, Any]) -> Trial:
        seen.append(values)
        return FRONT.points[0].trial

    monkeypatch.setattr(api, "measure", fake)
    file = tmp_path / "c.yaml"
    file.write_text("{'*': w4g64}")
    shown = run("measure", job, "--candidate", file)
    assert shown.exit_code == 0 and seen == [{"*": "w4g64"}]
    assert "kl         0.01 ± 0.001" in shown.stdout and "cpu, 1 thread" in shown.stdout
    assert json.loads(run("measure", job, "--candidate", file, "--json").stdout)["number"] == 8
    failed = Trial(0, Candidate.of({"a": 1}), Fidelity(), "measure", failure=Failure("oom", "needs 3 GB"))
    monkeypatch.setattr(api, "measure", lambda job, values: failed)
    result = run("measure", job, "--candidate", file)
    assert result.exit_code == 1 and "needs 3 GB" in result.stdout


def test_export_hands_its_options_on(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def fake(folder: Path, select: str, *, format: str, out: Path) -> Path:
        seen.append((folder, select, format, out))
        return out

    monkeypatch.setattr(api, "export", fake)
    out = tmp_path / "out"
    result = run("export", tmp_path, "--select", "min kl", "--format", "compressed-tensors", "--out", out)
    assert result.exit_code == 0 and seen == [(tmp_path, "min kl", "compressed-tensors", out)]
    assert "autocomp.load" in run("export", tmp_path, "--select", "min kl", "--out", out).stdout
    assert run("export", tmp_path).exit_code == 2


def test_a_bad_log_level_is_an_error(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMP_LOG_LEVEL", "loud")
    result = run("front", "nowhere")
    assert result.exit_code == 2 and "LOUD" in result.stderr and "WARNING" in result.stderr


def test_leaving_with_triton_loaded_keeps_the_code_the_output_and_the_exit_handlers() -> None:
    program = (
        "import atexit, sys\nfrom autocomp import cli\n"
        "sys.modules['triton'] = sys\n"
        "atexit.register(lambda: print('handler'))\n"
        "sys.argv = ['autocomp', 'front', 'nowhere']\ncli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere" in done.stderr and done.stdout == "handler\n"


# Progress


def event(done: int, *, kind: str = "trial", ok: bool = True) -> Event:
    failure = None if ok else Failure("oom", "needs 3 GB")
    measured = Measurement({}, "cpu") if ok else None
    trial = (
        Trial(done, Candidate.of({"a": 1}), Fidelity(), "x", measured, failure) if kind == "trial" else None
    )
    return Event(kind, f"{kind} {done}", trial, done, 100, 2, {"kl": 0.123456}, 3700.0)


def test_plain_progress_is_few_lines_but_every_failure(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    with caplog.at_level(logging.INFO, "autocomp"), PlainDisplay(10.0, lambda: now[0]) as display:
        display(event(0, kind="phase"))
        for done in range(1, 101):
            now[0] += 1.0
            display(event(done, ok=done != 50))
        for _ in range(5):  # validation: the budget stays spent
            display(event(100))
    lines = [r.getMessage() for r in caplog.records]
    assert lines[0] == "phase 0" and lines[-1].startswith("100/100 trials")
    assert 10 <= len(lines) <= 14 and "trial 50" in lines
    assert "best kl 0.1235; 2 busy; 1:01:40 left" in lines[1]


def test_live_progress_shows_counts_and_lets_failures_scroll_by() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140)
    with LiveDisplay(console) as display:
        display(event(0, kind="phase"))
        display(event(7))
        display(event(8, ok=False))
    shown = out.getvalue()
    assert "phase 0" in shown and "8/100" in shown and "best kl 0.1235" in shown and "trial 8" in shown
    assert "trial 7" not in shown


def test_the_display_fits_the_console() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True)
    pipe = Console(file=io.StringIO(), force_terminal=False)
    assert isinstance(make_display(terminal), LiveDisplay) and isinstance(make_display(pipe), PlainDisplay)
    assert type(make_display(terminal, quiet=True)) is SilentDisplay


def test_durations_read_like_a_clock() -> None:
    assert [duration_text(s) for s in (0.0, 65.4, 3725.0, None, float("nan"), float("inf"))] == [
        "0:00", "1:05", "1:02:05", "?", "?", "?",
    ]  # fmt: skip


# Doctor


def test_doctor_names_what_executes_and_what_is_missing(run: Callable[..., Result]) -> None:
    result = run("doctor", "--device", "cpu", "--no-speed")
    assert result.exit_code == 0, result.output
    assert "weight formats on cpu" in result.stdout and "CPU cores" in result.stdout
    data = json.loads(run("doctor", "--json", "--device", "cpu", "--no-speed").stdout)
    formats = {f["name"]: f for f in data["weight formats on cpu: one 2048x2048 linear, 1 token"]}
    assert formats["w16"]["status"] == "ok"
    assert all(f["remedy"] for f in formats.values() if f["status"] != "ok")
    assert {f["name"] for f in data["packages"]} >= {"torch", "mlflow", "ray", "compressed-tensors"}


def test_doctor_survives_what_is_broken(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    from autocomp.measure import device

    def crash(*_: object) -> str:
        raise RuntimeError("driver is gone\nsecond line")

    monkeypatch.setattr(device, "device_name", crash)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setitem(sys.modules, "autocomp.kernels.ops", None)
    result = run("doctor", "--device", "cpu", "--no-speed")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "RuntimeError: driver is gone" in result.stdout and "build-essential" in result.stdout
    assert "can't import autocomp.kernels.ops" in result.stdout
    assert run("doctor", "--device", "tpu").exit_code == 2


def test_doctor_compares_versions_with_the_projects_requirements() -> None:
    assert doctor._package("numpy", ">=1", "").status == "ok"
    old = doctor._package("numpy", ">=99", "")
    assert old.status == "note" and "pip install 'numpy>=99'" in old.remedy
    assert doctor._package("no-such-package", ">=1", "").status == "broken"
    extra = doctor._package("no-such-package", ">=1", "export")
    assert extra.status == "missing" and "autocomp[export]" in extra.remedy


def test_doctor_times_what_executes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONS", ("w16", "w8", "w4g64"))
    found = {f.name: f for f in doctor._kernels("cpu", (64, 64), True)}
    assert set(found) == {"w16", "w8", "w4g64"} and all(f.value.endswith("x") for f in found.values())
    assert float(found["w16"].value.split()[-1][:-1]) == 1.0
    operators = {f.name: f for f in doctor._operators("cpu")}
    assert {"decode_attention_kv", "linear_w8a8", "moe_grouped_linear"} <= set(operators)


# Generate


def test_generate_writes_text_and_says_how_fast(run: Callable[..., Result], tmp_path: Path) -> None:
    from autocomp.testing.models import tiny_model

    folder = tiny_model("llama", tmp_path / "model")
    found = json.loads(run("generate", str(folder), "hello", "--tokens", "5", "--json").stdout)
    assert found["new_tokens"] <= 5 and found["prompt_tokens"] == 5
    assert found["runtime"] == "lean" or found["reason"]
    again = run("generate", str(folder), "hello", "--tokens", "5")
    assert again.exit_code == 0 and found["text"] in again.stdout and "tokens at" in again.stderr
    missing = run("generate", str(tmp_path / "nothing"), "hello")
    assert missing.exit_code == 2 and "there is no folder" in missing.stderr


def test_generate_draws_the_images_of_a_diffusers_export(run: Callable[..., Result], tmp_path: Path) -> None:
    from PIL import Image

    from autocomp.testing.diffusion import tiny_dit_folder
    from autocomp.worker import ModelWorker

    data = {"calibration": 1, "proxy": 2, "selection": 2, "report": 2}
    workload = {"kind": "diffusion", "model": str(tiny_dit_folder(tmp_path / "dit")), "data": data}
    job = {"workload": workload | {"sampler": {"steps": 2}}, "space": [{"bitwidths": {"bits": [4, 16]}}]}
    worker = ModelWorker(job | {"objectives": ["min noise"], "device": "cpu"})
    worker.export(
        {d.name: "w4g64" for d in worker.decisions["bitwidths"]}, "diffusers", str(tmp_path / "out")
    )
    picture = tmp_path / "grid.png"
    found = run("generate", str(tmp_path / "out"), "--images", "20", "--out", str(picture))
    assert found.exit_code == 0 and "20 images of 2 steps" in found.stderr
    assert Image.open(picture).size == (80, 16)
    data = json.loads(run("generate", str(tmp_path / "out"), "--out", str(picture), "--json").stdout)
    assert data["images"] == 64 and data["image_ms"] > 0
    refused = run("generate", str(tmp_path / "dit"))
    assert refused.exit_code == 2 and "needs a prompt" in refused.stderr
