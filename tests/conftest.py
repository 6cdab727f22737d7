"""Tiny models and workers on them, built once a session."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before torch loads: OpenMP threads that spin while they wait slow small operators many times on busy cores.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

if TYPE_CHECKING:
    from autocomp.worker import ModelWorker

MakeJob = Callable[..., dict[str, Any]]
MakeWorker = Callable[..., "ModelWorker"]


@pytest.fixture(scope="session")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that holds layer bank and timing lock, so that tests neither find nor leave anything."""
    root = tmp_path_factory.mktemp("apart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOCOMP_CACHE", str(root / "cache"))
        patch.setenv("AUTOCOMP_QUIET_LOCK", str(root / "quiet.lock"))
        yield root


@pytest.fixture(scope="session")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of a few kilobytes: enough for some dozen sequences of 24 bytes."""
    root = tmp_path_factory.mktemp("text")
    sentence = "the cat saw seven green ships under a cold moon while nobody spoke of rain or of bread"
    words = sentence.split()
    for d in range(10):
        lines = [
            " ".join(words[(d * 7 + i * i + j * (d + 3)) % len(words)] for j in range(11)) + f" {d}.{i}"
            for i in range(9)
        ]
        (root / f"{d}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return [str(p) for p in sorted(root.glob("*.txt"))]


@pytest.fixture(scope="session")
def make_job(tmp_path_factory: pytest.TempPathFactory, short_text: list[str]) -> MakeJob:
    """``make_job(kind, dtype="float32", **bitwidths)``: a job on a tiny model, as a mapping."""
    from autocomp.testing.models import tiny_model

    root = tmp_path_factory.mktemp("models")
    folders: dict[tuple[str, str], Path] = {}

    def make(kind: str = "llama", dtype: str = "float32", **bitwidths: Any) -> dict[str, Any]:
        if (kind, dtype) not in folders:
            folders[kind, dtype] = tiny_model(kind, root / f"{kind}-{dtype}", dtype=dtype)
        data = {"calibration": 8, "proxy": 6, "selection": 4, "report": 4}
        data |= {"text": short_text, "sequence_length": 24}
        scenario = {
            "prompt_tokens": 8,
            "context_tokens": 8,
            "decode_tokens": 2,
            "repeats": 2,
            "threads": 1,
            "seconds": 0,
        }
        return {
            "workload": {"model": str(folders[kind, dtype]), "data": data, "scenario": scenario},
            "space": [{"bitwidths": bitwidths or {"options": ["w3g32", "w4g32", "w8", "w16"]}}],
            "sensitivity": {"sequences": 8},
            "device": "cpu",
            "executor": {"name": "local", "workers": 1, "threads": 1},
            "tracking": {"uri": "", "optuna": False},
        }

    return make


@pytest.fixture(scope="session")
def make_worker(make_job: MakeJob, apart: Path) -> Iterator[MakeWorker]:
    """``make_worker(kind, dtype="float32", **bitwidths)``: a worker, the same one for the same arguments."""
    from autocomp.worker import ModelWorker

    workers: dict[str, ModelWorker] = {}

    def make(kind: str = "llama", dtype: str = "float32", **bitwidths: Any) -> ModelWorker:
        key = json.dumps([kind, dtype, bitwidths], sort_keys=True)
        if key not in workers:
            workers[key] = ModelWorker(make_job(kind, dtype, **bitwidths))
        return workers[key]

    yield make
    gc.unfreeze()  # workers freeze the collector, for steadier timings
