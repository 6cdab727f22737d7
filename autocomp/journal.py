"""The append-only history of a run: one JSON object a line, nothing ever rewritten.

A line is written whole or not at all: a torn last line (killed process, full disk) is cut off when the
journal is opened again, so at most the record in flight is lost.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from autocomp.errors import RunError

logger = logging.getLogger("autocomp")
SYNC_SECONDS = 1.0


class Journal:
    """Records of one run directory. Only one process may hold it open for writing.

    Args:
        folder: the run directory; made when it is not there.

    Raises:
        RunError: another process has the run open, or a line before the last one can't be read.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "journal.jsonl"
        self._lock = open(folder / "lock", "a")  # noqa: SIM115  (held as long as the journal)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RunError(
                f"run {folder.name!r} is open in another process; wait for it, or search in a new directory"
            ) from None
        self.records = _recover(self.path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._synced = 0.0

    def append(self, kind: str, **data: Any) -> None:
        """Write one record; it survives a kill of this process when the call returns.

        Raises:
            RunError: the disk is full or the file can't be written; what was there before is whole.
        """
        record = {"kind": kind, **data}
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"wrote {written} of {len(line)} bytes")
        except OSError as error:
            os.truncate(self.path, start)
            raise RunError(
                f"can't write to {self.path.name}: {error}. Nothing measured before is lost; make room,"
                " then `autocomp resume` the run."
            ) from error
        self.records.append(record)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())  # against a power cut; a killed process needs no sync
            self._synced = time.monotonic()

    def of(self, kind: str) -> list[dict[str, Any]]:
        """All records of one kind, in order."""
        return [r for r in self.records if r["kind"] == kind]

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run without locking it (for looking at a running study).

    Raises:
        RunError: ``folder`` is no run directory.
    """
    path = folder / "journal.jsonl"
    if not path.is_file():
        raise RunError(f"{str(folder)!r} is not a run directory: it has no journal.jsonl")
    return _parse(path.read_bytes(), path)[0]


def _recover(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    data = path.read_bytes()
    records, good = _parse(data, path)
    if good < len(data):
        logger.warning("%s: cut off an unfinished last record (%d bytes)", path.name, len(data) - good)
        os.truncate(path, good)
    return records


def _parse(data: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """Records, and the number of bytes that they take."""
    records = []
    position = 0
    while position < len(data):
        end = data.find(b"\n", position)
        if end < 0:
            break
        try:
            record = json.loads(data[position:end])
            if not isinstance(record, dict) or "kind" not in record:
                raise ValueError("not a record")
        except ValueError as error:
            if data.find(b"\n", end + 1) >= 0:
                raise RunError(f"{path.name} is damaged at byte {position}: {error}") from None
            break
        records.append(record)
        position = end + 1
    return records, position
