"""The few sequences of the proxy split that a search scores, chosen beforehand by ``autocomp proxy``.

A subset is a list of rows of one particular split, and rows of another text mean something else. So its file
says what it was chosen from, and a job with other data is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autocomp.errors import JobError
from autocomp.workloads.text import SPLITS

Facts = dict[str, int | str]


def pool_facts(pool: np.ndarray, data: Any, seed: int) -> Facts:
    """What identifies the sequences that a subset is chosen from.

    Args:
        pool: the whole proxy split, int64 ``[n, sequence_length]``.
        data: the ``DataConfig`` it was cut by. The sizes of all splits are in: they decide which part of the
            text a split is cut from.
        seed: of the job; it picks the sequences.
    """
    digest = hashlib.sha256(np.ascontiguousarray(pool, dtype="<i8").tobytes()).hexdigest()[:16]
    sizes: Facts = {f"data.{name}": getattr(data, name) for name in SPLITS}
    return {
        "split": "proxy",
        "data.sequence_length": data.sequence_length,
        **sizes,
        "seed": seed,
        "tokens": digest,
    }


def read_subset(file: str, facts: Mapping[str, int | str]) -> list[int]:
    """Rows of the proxy split from a file of ``ProxySet.save``, rising.

    Args:
        facts: ``pool_facts`` of the split that this job has.

    Raises:
        JobError: the file can't be read, holds no such rows, does not say what they were chosen from, or was
            chosen from something else.
    """
    try:
        found = json.loads(Path(file).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise JobError(f"workload.data.subset: {file!r} can't be read: {error}") from None
    known = found.get("data") if isinstance(found, dict) else None
    if not known or not isinstance(known, dict):
        raise JobError(
            f"workload.data.subset: {file} does not say which sequences it was chosen from; write one with "
            "`autocomp proxy`"
        )
    _check_same(file, known, facts)
    rows, total = found.get("indices"), int(facts["data.proxy"])
    known_rows = isinstance(rows, list) and all(type(i) is int and 0 <= i < total for i in rows)
    if not known_rows or len(rows) < 2 or len(set(rows)) != len(rows):
        raise JobError(
            f"workload.data.subset: {file} must hold two or more different `indices` below {total}, the "
            "number of proxy sequences"
        )
    return sorted(rows)


def _check_same(file: str, known: Mapping[str, Any], facts: Mapping[str, int | str]) -> None:
    other = [
        f"{name} {known.get(name, 'unknown')} there and {value} here"
        for name, value in facts.items()
        if known.get(name) != value and name != "tokens"
    ]
    if not other and known.get("tokens") != facts["tokens"]:
        other = ["another text or tokenizer"]
    if other:
        raise JobError(
            f"workload.data.subset: {file} was chosen from other sequences ({', '.join(other)}): give the "
            "job the data that it was chosen from, or choose anew with `autocomp proxy`"
        )
