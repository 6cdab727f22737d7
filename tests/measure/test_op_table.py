"""Keys of operations and their times."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autocomp.errors import CapabilityError
from autocomp.kernels.modules import PackedEmbedding, PackedLinear
from autocomp.measure import op_table
from autocomp.measure.op_table import Operation, op_key, parse_op_key, time_op
from autocomp.quantize.scheme import Scheme


@given(
    kind=st.sampled_from(["linear", "embedding"]),
    rows=st.integers(1, 300_000),
    columns=st.integers(1, 300_000),
    label=st.sampled_from(["w16", "w8", "w4g64", "w4g64a", "w3g128o0.5", "w2ao10"]),
)
def test_keys_round_trip(kind: str, rows: int, columns: int, label: str) -> None:
    scheme = Scheme.parse(label)
    key = op_key((rows, columns), scheme, kind)
    assert parse_op_key(key) == Operation(kind, (rows, columns), scheme)
    assert key == f"{kind}/{rows}x{columns}/{label}"


@pytest.mark.parametrize("bad", ["", "linear/5/w8", "conv/5x5/w8", "linear/5x5/w9", "linear/5x5/w8/2"])
def test_malformed_keys_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=r"operation key|bits must be"):
        parse_op_key(bad)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_table, "COLD_BYTES", 200_000)


@pytest.mark.parametrize("label", ["w16", "w8", "w4g64"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_operations_are_timed(kind: str, label: str, tokens: int, small: None) -> None:
    found = time_op(f"{kind}/128x256/{label}", tokens, repeats=5)
    assert 0.0 < found.median_ms < 1000.0 and found.n + found.dropped == 5


def test_more_work_takes_longer(small: None) -> None:
    few, many = (time_op("linear/256x512/w4g64", m, repeats=7).median_ms for m in (1, 512))
    assert many > 3 * few


@pytest.mark.parametrize(
    ("label", "module"), [("w4g64", PackedLinear), ("w16", None), ("w4g64", PackedEmbedding)]
)
def test_copies_rotate_and_are_cold(label: str, module: type | None, small: None) -> None:
    kind = "embedding" if module is PackedEmbedding else "linear"
    op = parse_op_key(f"{kind}/64x256/{label}")
    calls = op_table._rotating(op, 1, torch.bfloat16, torch.device("cpu"))
    wanted = 200_000 / op.scheme.weight_bytes(64, 256)
    assert wanted <= len(calls) < wanted + 1
    if module is not None:
        modules = [call.func for call in calls]  # type: ignore[attr-defined]
        assert all(isinstance(m, module) for m in modules)
        addresses = {next(m.resident_tensors()).data_ptr() for m in modules}
    else:
        addresses = {call.args[1].data_ptr() for call in calls}  # type: ignore[attr-defined]
    assert len(addresses) == len(calls)


def test_tiny_weights_do_not_make_endless_rounds() -> None:
    op = parse_op_key("linear/16x32/w8")
    cpu = torch.device("cpu")
    assert len(op_table._rotating(op, 1, torch.bfloat16, cpu)) == op_table.MAX_COPIES
    assert len(op_table._rotating(op, 9, torch.bfloat16, cpu)) == op_table.MAX_COPIES_PREFILL


def test_what_is_only_simulated_has_no_time() -> None:
    with pytest.raises(CapabilityError, match=r"linear/64x64/w3g8 has no latency here.*w4g64"):
        time_op("linear/64x64/w3g8")
    with pytest.raises(ValueError, match="at least 1; got 0"):
        time_op("linear/64x64/w8", tokens=0)
