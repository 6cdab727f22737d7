"""Every built-in exporter passes the suite that third parties run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autocomp
from autocomp.exporters.compressed_tensors import CompressedTensorsExporter
from autocomp.exporters.native import NativeExporter
from autocomp.testing.exporters import CHECKS, Check


def load_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_native(check: Check, tmp_path: Path) -> None:
    check(NativeExporter, lambda folder: autocomp.load(folder, "cpu"), tmp_path)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.filterwarnings("ignore")
def test_compressed_tensors(check: Check, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install 'autocomp[export]'")
    check(CompressedTensorsExporter, load_transformers, tmp_path)


def test_an_exporter_that_changes_weights_is_found_out(tmp_path: Path) -> None:
    class Rounder(NativeExporter):
        def export(self, worker: Any, candidate: Any, folder: Path) -> None:
            name = worker.decisions["bitwidths"][0].name
            super().export(worker, candidate.replace({name: "w3g32"}), folder)

    with pytest.raises(AssertionError, match="loaded logits differ"):
        CHECKS["round trip"](Rounder, lambda folder: autocomp.load(folder, "cpu"), tmp_path)
