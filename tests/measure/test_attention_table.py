"""Keys and times of attention operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autocomp.attention.plan import DENSE, Keep, Rule
from autocomp.errors import SpaceError
from autocomp.kernels import cpu_attention, native
from autocomp.measure import attention_table, op_table
from autocomp.measure.attention_table import AttentionOperation, attention_backend, attention_key
from autocomp.measure.op_table import parse_op_key, time_op
from autocomp.workloads.serving import cpu_threads

BITS = st.sampled_from([16, 8, 4])


@given(
    heads=st.integers(1, 64),
    dim=st.integers(1, 512),
    context=st.integers(1, 1_000_000),
    rule=st.builds(Rule, st.integers(-4096, 4096), st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 64)),
    bits=st.tuples(BITS, BITS),
)
def test_keys_round_trip(heads: int, dim: int, context: int, rule: Rule, bits: tuple[int, int]) -> None:
    keep = Keep(rule, *bits)
    key = attention_key(heads, dim, keep, context)
    assert parse_op_key(key) == AttentionOperation(heads, dim, keep, context)
    assert key == f"attention/{heads}x{dim}/{keep.label}@{context}"


@pytest.mark.parametrize("bad", ["attention/3x64/dense", "attention/3/dense@8", "attention/0x64/dense@8"])
def test_malformed_keys_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=r"is not an operation key; of attention they look like"):
        parse_op_key(bad)


def test_malformed_labels_are_refused() -> None:
    with pytest.raises(SpaceError, match="no span rule"):
        parse_op_key("attention/3x64/wide/k8v8@64")
    with pytest.raises(SpaceError, match="got 3"):
        parse_op_key("attention/3x64/dense/k8v3@64")


@pytest.mark.parametrize("label", ["dense/k16v16", "a32b0s4/k8v4"])
@pytest.mark.parametrize(("tokens", "lean"), [(1, True), (1, False), (3, True), (3, False), (100, True)])
def test_operations_are_timed(label: str, tokens: int, lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_table, "COLD_BYTES", 300_000)
    found = time_op(f"attention/3x64/{label}@128", tokens, repeats=5, lean=lean)
    assert 0.0 < found.median_ms < 1000.0 and found.n + found.dropped == 5


@pytest.mark.parametrize("lean", [True, False])
def test_half_precision_is_timed(lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_table, "COLD_BYTES", 100_000)
    assert time_op("attention/2x16/dense/k16v8@32", 1, torch.float16, repeats=5, lean=lean).median_ms > 0.0


@pytest.mark.skipif(bool(native.unavailable("step")), reason="no C kernels here")
def test_what_is_kept_decides_the_time() -> None:
    """A sixteenth of the tokens, and no fixed cost that hides it. Best of some, for busy machines."""
    times: dict[str, list[float]] = {"dense/k16v16": [], "a256b0s4/k16v16": []}
    with cpu_threads(1):
        for _ in range(3):
            for label, found in times.items():
                found.append(time_op(f"attention/3x64/{label}@4096", 1, repeats=7, lean=True).median_ms)
    assert min(times["dense/k16v16"]) > 4 * min(times["a256b0s4/k16v16"])


def test_rings_are_full_alike_and_cold() -> None:
    op = AttentionOperation(3, 64, Keep(Rule(100, 0.0, 4), 8, 16), 200)
    rings = attention_table._rings(op, 2, torch.bfloat16, "cpu", 300_000, 256)
    size = 2 * 100 * (64 + 8 + 128) + 2 * 8 + 2 * 4
    assert len(rings) == -(-300_000 // size) and all(r.nbytes == size for r in rings)
    assert len({r.k.data_ptr() for r in rings}) == len(rings)
    for ring in rings:
        assert ring.lengths == [200, 200] and torch.equal(ring.v, rings[0].v) and bool(ring.v.any(-1).all())


def test_a_step_leaves_the_ring_for_the_next() -> None:
    op = AttentionOperation(2, 16, Keep(DENSE, 8, 8), 50)
    ring = attention_table._ring(op, 1, torch.float32, "cpu")
    ring.fill(*torch.randn(2, 1, 1, 50, 16))
    call, slots = attention_table._step(ring, op, torch.float32), ring.k.shape[1]
    for _ in range(30):
        call()
    assert ring.lengths == [50] and ring.k.shape[1] == slots


def test_what_executes_is_said() -> None:
    native = not cpu_attention._available()
    for keep in (Keep(), Keep(DENSE, 8, 4)):
        backend, reason = attention_backend(keep, "cpu")
        assert (backend == "cpu") == native and bool(reason) == (not native and keep.key_bits < 16)
    wide = attention_backend(Keep(DENSE, 8, 8), "cpu", cpu_attention.LARGEST_DIM + 2)
    assert wide[0] == "reference" and "k8v8 with heads of 2050 features on cpu" in wide[1]
