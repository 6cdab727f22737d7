"""What the README says runs: its Python snippet, its job, its commands' options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from autocomp.cli import app
from autocomp.job import Job
from autocomp.testing.models import tiny_model

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_jobs_load() -> None:
    jobs = blocks("yaml")
    assert jobs
    for text in jobs:
        Job.of(yaml.safe_load(text))


def test_the_python_snippet_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = blocks("python")
    model = tiny_model("llama-tied", tmp_path / "model")
    # A tiny model reads little text: shorter sequences, so that the built-in prose is enough.
    snippet = snippet.replace(
        '"dtype": "bfloat16"}',
        '"dtype": "bfloat16", "data": {"sequence_length": 32, "calibration": 4, "proxy": 4,'
        ' "selection": 4, "report": 4}}',
    ).replace('"w4g64"', '"w4g32"')
    names = {"MODEL": str(model), "RUN": tmp_path / "run", "OUT": tmp_path / "out"}
    exec(compile(snippet, "README.md", "exec"), names)
    assert "front" in capsys.readouterr().out
    assert (tmp_path / "out" / "autocomp.json").is_file()


def test_the_commands_and_their_options_exist() -> None:
    lines = [line.partition("#")[0].split() for text in blocks("bash") for line in text.splitlines() if line]
    commands = [words for words in lines if words and words[0] == "autocomp"]
    assert len(commands) >= 6
    for words in commands:
        shown = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert shown.exit_code == 0, words
        for option in (w for w in words if w.startswith("-")):
            assert option in shown.output, f"autocomp {words[1]} has no {option}"


def test_the_make_targets_exist() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (root / target).exists(), target
