"""Keys and times of convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from autocomp.errors import CapabilityError
from autocomp.kernels.convolution import ConvForm, PackedConv2d
from autocomp.measure import conv_table, op_table
from autocomp.measure.conv_table import ConvOperation
from autocomp.measure.op_table import parse_op_key, time_op
from autocomp.quantize.scheme import Scheme

KEY = "conv/64x288/{}/k3x3s1x1p1x1@16x16"


@pytest.mark.parametrize("label", ["w16", "w8", "w4g64a", "w3g128o0.5"])
def test_keys_round_trip(label: str) -> None:
    op = ConvOperation((64, 96), Scheme.parse(label), ConvForm((3, 1), (2, 1), (1, 0)), (16, 9))
    assert op.key == f"conv/64x96/{label}/k3x1s2x1p1x0@16x9" and op.channels == 32
    assert parse_op_key(op.key) == op


@pytest.mark.parametrize(
    "bad",
    [
        "conv/64x288/w4g64", KEY.format("w9"), "conv/64x280/w8/k3x3s1x1p1x1@16x16",
        "conv/64x288/w8/k3x3s1x1p0x0@2x16", "conv/0x288/w8/k3x3s1x1p1x1@16x16",
    ],
)  # fmt: skip
def test_malformed_keys_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=r"operation key|bits must be"):
        parse_op_key(bad)


@pytest.mark.parametrize("label", ["w16", "w4g64"])
def test_convolutions_are_timed(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_table, "COLD_BYTES", 30_000)
    few, many = (time_op(KEY.format(label), n, torch.float32, repeats=7).median_ms for n in (1, 40))
    assert 0.0 < 3 * few < many < 1000.0


def test_what_is_timed_is_what_serves() -> None:
    calls = {}
    for label in ("w16", "w4g64"):
        op = parse_op_key(KEY.format(label))
        assert isinstance(op, ConvOperation)
        calls[label] = conv_table._calls(op, 3, torch.bfloat16, "cpu", 30_000)
        outputs = [call() for call in calls[label]]
        assert all(y.shape == (3, 64, 16, 16) and y.dtype == torch.bfloat16 for y in outputs)
    dense, module = calls["w16"][0], calls["w4g64"][0].func  # type: ignore[attr-defined]
    assert dense.func is F.conv2d and isinstance(module, PackedConv2d)  # type: ignore[attr-defined]
    addresses = {next(c.func.resident_tensors()).data_ptr() for c in calls["w4g64"]}  # type: ignore[attr-defined]
    assert len(addresses) == len(calls["w4g64"]) == 4  # of 9,856 bytes each


def test_what_is_only_simulated_has_no_time() -> None:
    with pytest.raises(CapabilityError, match=r"w3g8/k3x3s1x1p1x1@16x16 has no latency here.*w4g64"):
        time_op(KEY.format("w3g8"))
