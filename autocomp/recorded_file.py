"""The file of a recording: gzipped JSON in columns, equal bytes for equal recordings.

``{"format", "version", "workers", "description", "candidates", "levels", "profiles"}``. ``candidates`` has a
column of options for each decision. ``levels`` has an entry for each set of fidelities that differ in their
name alone, with columns of what was measured: names, positions in ``candidates``, origins, seconds, tokens,
devices, versions, failures, and for each metric its values, standard errors and counts (``null`` where it was
not measured). A column is a list, or ``{"all": value}``, or ``{"of": [distinct values], "at": [positions in
"of"]}``.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from autocomp.errors import RunError
from autocomp.space import Candidate
from autocomp.trial import Estimate, Failure, Fidelity, Measurement, Trial

FORMAT = "autocomp-recording"
VERSION = 1
_FIELDS = ("value", "stderr", "n")
_GZIP = b"\x1f\x8b"


def write_file(path: Path, data: Mapping[str, Any]) -> None:
    """Write a recording's data, whole or not at all.

    Raises:
        RunError: the file can't be written.
    """
    text = json.dumps({"format": FORMAT, "version": VERSION, **data}, separators=(",", ":"))
    packed = io.BytesIO()
    # Neither a time nor a file name, so that the bytes depend on the content alone.
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=9, mtime=0) as stream:
        stream.write(text.encode())
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(packed.getvalue())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise RunError(f"can't write the recording {str(path)!r}: {error}") from None


def read_file(path: Path) -> dict[str, Any]:
    """A recording's data.

    Raises:
        RunError: there is no such file, it is cut off or no recording, or a newer autocomp wrote it.
    """
    remedy = "`autocomp record RUN_DIR --out FILE` writes one"
    try:
        packed = path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"there is no recording {str(path)!r}; {remedy}") from None
    except OSError as error:
        raise RunError(f"can't read the recording {str(path)!r}: {error}") from None
    if not packed.startswith(_GZIP):
        raise RunError(f"{str(path)!r} is no recording; {remedy}")
    try:
        data = json.loads(gzip.decompress(packed))
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise RunError(f"{str(path)!r} is cut off or damaged ({error}); copy or record it again") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RunError(f"{str(path)!r} is no recording; {remedy}")
    if data.get("version") != VERSION:
        raise RunError(
            f"the recording {str(path)!r} has format version {data.get('version')!r} and this autocomp reads"
            f" {VERSION}; use the autocomp that wrote it, or a newer one"
        )
    return data


def pack(values: Sequence[Any]) -> Any:
    """A column in the shortest of its three forms."""
    codes: dict[str, int] = {}
    at = [codes.setdefault(json.dumps(v, sort_keys=True), len(codes)) for v in values]
    distinct = [json.loads(text) for text in codes]
    if len(distinct) == 1:
        return {"all": distinct[0]}
    return {"of": distinct, "at": at} if 2 * len(distinct) <= len(at) else list(values)


def unpack(column: Any, count: int) -> list[Any]:
    """The ``count`` values of a column. Raises ``ValueError`` when it has another number of them."""
    if isinstance(column, list):
        found = column
    elif "all" in column:
        found = [column["all"]] * count
    else:
        found = [column["of"][i] for i in column["at"]]
    if len(found) != count:
        raise ValueError(f"a column has {len(found)} values, not {count}")
    return found


def pack_candidates(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Candidates of one space as a column for each decision.

    Raises:
        RunError: they do not name the same decisions.
    """
    names = sorted(candidates[0].values) if candidates else []
    for candidate in candidates:
        if sorted(candidate.values) != names:
            raise RunError(f"candidate {candidate.fingerprint} has other decisions than the first one")
    columns = {name: pack([c[name] for c in candidates]) for name in names}
    return {"count": len(candidates), "decisions": columns}


def unpack_candidates(data: Mapping[str, Any]) -> list[Candidate]:
    columns = {name: unpack(column, data["count"]) for name, column in data["decisions"].items()}
    return [Candidate.of({name: column[i] for name, column in columns.items()}) for i in range(data["count"])]


def pack_level(trials: Sequence[Trial], positions: Mapping[Candidate, int]) -> dict[str, Any]:
    """Trials (at least one) whose fidelities differ in name alone, as columns."""
    measured = [t.measurement for t in trials]
    failed = [t.failure for t in trials]
    names = sorted({name for m in measured if m is not None for name in m.metrics})
    estimates = {name: [m and m.metrics.get(name) for m in measured] for name in names}
    seconds = [m.seconds if m else f.seconds if f else 0.0 for m, f in zip(measured, failed, strict=True)]
    return {
        "fidelity": {k: v for k, v in vars(trials[0].fidelity).items() if k != "name"},
        "count": len(trials),
        "name": pack([t.fidelity.name for t in trials]),
        "candidate": pack([positions[t.candidate] for t in trials]),
        "origin": pack([t.origin for t in trials]),
        "seconds": pack([round(s, 6) for s in seconds]),
        "tokens": pack([m and m.tokens for m in measured]),
        "device": pack([m and m.device for m in measured]),
        "versions": pack([m and dict(m.versions) for m in measured]),
        "failure": pack([f and [f.kind, f.reason] for f in failed]),
        "metrics": {
            name: {field: pack([e and getattr(e, field) for e in column]) for field in _FIELDS}
            for name, column in estimates.items()
        },
    }


def unpack_level(data: Mapping[str, Any], candidates: Sequence[Candidate], first: int) -> list[Trial]:
    """What ``pack_level`` packed, numbered from ``first``."""
    count = data["count"]
    keys = ("name", "candidate", "origin", "seconds", "tokens", "device", "versions", "failure")
    columns = {key: unpack(data[key], count) for key in keys}
    metrics = {
        name: list(zip(*(unpack(column[field], count) for field in _FIELDS), strict=True))
        for name, column in data["metrics"].items()
    }
    trials = []
    for i in range(count):
        row = {key: column[i] for key, column in columns.items()}
        measurement, failure = None, None
        if row["failure"] is not None:
            kind, reason = row["failure"]
            failure = Failure(kind, reason, row["seconds"])
        else:
            found = {n: Estimate(*column[i]) for n, column in metrics.items() if column[i][0] is not None}
            measurement = Measurement(found, row["device"], row["seconds"], row["tokens"], row["versions"])
        candidate = candidates[row["candidate"]]
        fidelity = Fidelity(row["name"], **data["fidelity"])
        trials.append(Trial(first + i, candidate, fidelity, row["origin"], measurement, failure))
    return trials
