"""The journal survives torn lines, full disks and a second process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autocomp.errors import RunError
from autocomp.journal import Journal, read_records


def test_records_come_back_in_order(tmp_path: Path) -> None:
    with Journal(tmp_path / "run") as journal:
        for i in range(5):
            journal.append("trial", i=i)
        assert [r["i"] for r in read_records(tmp_path / "run")] == list(range(5))
    with Journal(tmp_path / "run") as journal:
        assert [r["i"] for r in journal.of("trial")] == list(range(5))


@pytest.mark.parametrize("tail", [b'{"kind": "trial", "i"', b"garbage\n", b'{"no": "kind"}\n', b"\x00" * 50])
def test_a_torn_last_line_costs_that_line_only(tmp_path: Path, tail: bytes) -> None:
    with Journal(tmp_path) as journal:
        journal.append("trial", i=0)
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(tail)
    with Journal(tmp_path) as journal:
        assert [r["i"] for r in journal.of("trial")] == [0]
        journal.append("trial", i=1)
    assert [r["i"] for r in read_records(tmp_path)] == [0, 1]


def test_damage_in_the_middle_is_an_error_not_a_silent_loss(tmp_path: Path) -> None:
    lines = [json.dumps({"kind": "trial", "i": i}) for i in range(3)]
    (tmp_path / "journal.jsonl").write_text("\n".join([lines[0], "garbage", lines[2]]) + "\n")
    with pytest.raises(RunError, match="damaged at byte"):
        Journal(tmp_path)


def test_a_full_disk_leaves_what_was_written(tmp_path: Path) -> None:
    # RLIMIT_FSIZE makes writes beyond the limit fail, as a full disk does.
    code = """
import resource, signal, sys
from pathlib import Path
from autocomp.errors import RunError
from autocomp.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
for i in range(100):
    try:
        journal.append("trial", i=i, pad="x" * 50)
    except RunError as error:
        print(i, error)
        break
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    failed_at = int(done.stdout.split()[0])
    assert "resume" in done.stdout
    assert [r["i"] for r in read_records(tmp_path)] == list(range(failed_at)) and failed_at > 2
    assert os.path.getsize(tmp_path / "journal.jsonl") <= 500


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(RunError, match="open in another process"):
        Journal(tmp_path)
    Journal(tmp_path).close()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        read_records(tmp_path)
