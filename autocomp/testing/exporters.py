"""Conformance checks of exporters, for the built-in ones and for yours.

    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
    def test_mine(check, tmp_path):
        check(MyExporter, load_mine, tmp_path)

A check takes the exporter's class, a function that loads an exported folder as a transformers model, and an
empty folder to work in; it raises ``AssertionError`` with what went wrong. It builds a tiny Llama.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from autocomp.exporters.base import Exporter
from autocomp.space import Candidate
from autocomp.testing.models import tiny_model
from autocomp.worker import ModelWorker

Load = Callable[[Path], Any]
Check = Callable[[Callable[[], Exporter], Load, Path], None]

OPTIONS = ["w3g32", "w4g32", "w8", "w16"]
ATTENTION = {"spans": ["dense", "a8b0s2"], "key_bits": [8, 16], "value_bits": [4, 16]}


def tiny_worker(folder: Path) -> ModelWorker:
    """A worker on a two-layer float32 Llama whose tied groups choose from ``OPTIONS`` and whose key/value
    heads choose from ``ATTENTION``."""
    model = tiny_model("llama", folder / "model")
    data = {"sequence_length": 32, "calibration": 2, "proxy": 2, "selection": 2, "report": 2}
    scenario = {"prompt_tokens": 8, "context_tokens": 8, "decode_tokens": 2}
    job = {
        "workload": {"model": str(model), "dtype": "float32", "data": data, "scenario": scenario},
        "space": [{"bitwidths": {"options": OPTIONS}}, {"attention": ATTENTION}],
        "device": "cpu",
    }
    return ModelWorker(job)


def candidates(worker: ModelWorker) -> list[Candidate]:
    """Uniform bits of the weights, a mix of them, and two of these with spans and bits of the cache."""
    names = [d.name for d in worker.decisions["bitwidths"]]
    groups = [d.name for d in worker.decisions["attention"]]
    dense = dict.fromkeys(groups, "dense/k16v16")
    mixed = {n: OPTIONS[i % len(OPTIONS)] for i, n in enumerate(names)}
    spans = {n: f"{'dense' if i % 2 else 'a8b0s2'}/k8v4" for i, n in enumerate(groups)}
    rows = [dict.fromkeys(names, o) for o in OPTIONS] + [mixed]
    return [Candidate.of(row | dense) for row in rows] + [Candidate.of(row | spans) for row in rows[-2:]]


def check_round_trip(make: Callable[[], Exporter], load: Load, folder: Path) -> None:
    """Whatever ``supports`` allows loads, and gives the logits of the candidate as it was scored."""
    worker = tiny_worker(folder)
    ids = worker.workload.inputs(worker.built, "report", 2)  # type: ignore[attr-defined]
    exported = 0
    for i, candidate in enumerate(candidates(worker)):
        reasons = make().supports(worker, candidate)
        assert all(isinstance(r, str) and r for r in reasons), "supports() must return reasons in words"
        if reasons:
            continue
        out = folder / f"out{i}"
        out.mkdir()
        worker.restore()
        make().export(worker, candidate, out)
        worker.apply(candidate, serving=False)
        with torch.inference_mode():
            wanted = worker.built.model(input_ids=ids).logits
            found = load(out)(input_ids=ids).logits
        error = float((found - wanted).norm() / wanted.norm())
        # 8 bits of mantissa: kernels may compute in bfloat16 what was scored in float32.
        assert error < 2e-2, f"loaded logits differ by {error:.2g} (relative) from the scored candidate's"
        exported += 1
    assert exported, "supports() refuses every candidate, even the uncompressed one"


def check_state_is_left_alone(make: Callable[[], Exporter], load: Load, folder: Path) -> None:
    """Exporting leaves the worker's model as it was."""
    del load
    worker = tiny_worker(folder)
    before = {n: t.clone() for n, t in worker.built.model.state_dict().items()}
    for i, candidate in enumerate(candidates(worker)):
        if not make().supports(worker, candidate):
            (folder / f"state{i}").mkdir()
            make().export(worker, candidate, folder / f"state{i}")
    worker.restore()
    after = worker.built.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def check_readable_record(make: Callable[[], Exporter], load: Load, folder: Path) -> None:
    """The folder says in plain JSON which format every compressed module has."""
    del load
    worker = tiny_worker(folder)
    candidate = next(c for c in reversed(candidates(worker)) if not make().supports(worker, c))
    out = folder / "record"
    out.mkdir()
    make().export(worker, candidate, out)
    text = "".join(p.read_text() for p in out.glob("*.json"))
    chosen = {str(v) for v in candidate.values.values()} - {"w16", "dense/k16v16"}
    assert all(label in text for label in chosen), f"no JSON file names the formats {sorted(chosen)}"


CHECKS: dict[str, Check] = {
    "round trip": check_round_trip,
    "state is left alone": check_state_is_left_alone,
    "readable record": check_readable_record,
}


def check_exporter(make: Callable[[], Exporter], load: Load, folder: Path) -> None:
    """All checks, each in a folder of its own below ``folder``."""
    for name, check in CHECKS.items():
        (folder / name).mkdir(parents=True)
        check(make, load, folder / name)
