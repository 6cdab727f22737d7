"""Rings against a list of all tokens: what is kept, where it lies, what attention sees, what it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autocomp.attention.plan import DENSE, LayerPlan, Rule
from autocomp.attention.ring import GROWTH, Ring
from autocomp.errors import CapabilityError
from autocomp.kernels.attention import OPERATORS
from autocomp.kernels.attention_reference import kv_dequantize

DIM = 16
RULES = (Rule(6, 0.0, 2), DENSE, Rule(5, 0.0, 0), Rule(0, 0.5, 1))
BITS = (16, 8, 4)


def numbers(batch: int, groups: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, groups, tokens, DIM)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def make(
    plan: LayerPlan, tokens: int, capacity: int, batch: int = 2, dtype: torch.dtype = torch.float32
) -> Ring:
    return Ring(
        plan, heads=3 * len(plan.rules), dim=DIM, batch=batch, tokens=tokens, capacity=capacity, dtype=dtype
    )


def stored(x: Tensor, bits: int) -> Tensor:
    """``x [n, dim]`` as a cache of ``bits`` gives it back."""
    if bits == 16:
        return x
    return kv_dequantize(*OPERATORS["kv_quantize"](x[None, None], bits), bits)[0, 0]


def kept_positions(plan: LayerPlan, group: int, tokens: int, length: int) -> list[int]:
    window, sink = plan.limits(tokens)[group]
    return [t for t in range(length) if not window or t < sink or t >= length - window]


def check(ring: Ring, k: Tensor, v: Tensor, starts: list[int]) -> None:
    """Every group of every sequence holds what its rule says of ``k, v`` (left padding ``starts``)."""
    for b, start in enumerate(starts):
        length = k.shape[2] - start
        assert ring.lengths[b] == length
        for g in range(len(ring.plan.rules)):
            positions, keys, values = ring.kept(b, g)
            assert positions.tolist() == kept_positions(ring.plan, g, ring.tokens, length)
            rows = positions + start
            assert torch.equal(keys, stored(k[b, g, rows], ring.plan.key_bits))
            assert torch.equal(values, stored(v[b, g, rows], ring.plan.value_bits))


@given(
    prompt=st.integers(1, 24),
    padding=st.integers(0, 20),
    chunks=st.lists(st.integers(1, 9), max_size=4),
    room=st.integers(0, 30),
    bits=st.tuples(st.sampled_from(BITS), st.sampled_from(BITS)),
)
@settings(max_examples=60, deadline=None)
def test_what_the_rule_says_is_kept(
    prompt: int, padding: int, chunks: list[int], room: int, bits: tuple[int, int]
) -> None:
    """Prompts shorter and longer than spans, left padding, single tokens and several at once, growth."""
    plan = LayerPlan(RULES, *bits)
    starts = [0, min(padding, prompt - 1)]
    k, v = numbers(2, len(RULES), prompt + sum(chunks))
    ring = make(plan, prompt, max(1, prompt + room - 15))
    ring.fill(k[:, :, :prompt], v[:, :, :prompt], starts)
    check(ring, k[:, :, :prompt], v[:, :, :prompt], starts)
    end = prompt
    for n in chunks:
        ring.append(k[:, :, end : end + n], v[:, :, end : end + n])
        end += n
    check(ring, k[:, :, :end], v[:, :, :end], starts)


@pytest.mark.parametrize("bits", [(16, 16), (8, 4), (4, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_sees_what_is_kept(bits: tuple[int, int], dtype: torch.dtype) -> None:
    plan = LayerPlan(RULES, *bits)
    k, v = (x.to(dtype) for x in numbers(2, len(RULES), 31))
    ring = make(plan, 20, 25, dtype=dtype)
    ring.fill(k[:, :, :20], v[:, :, :20], [0, 7])
    q = torch.randn(2, ring.heads, 1, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    for t in range(20, 31):
        ring.append(k[:, :, t], v[:, :, t])
        found = ring.attend(q, 0.3, softcap=5.0)
        for b in range(2):
            for h in range(ring.heads):
                _, keys, values = ring.kept(b, h // 3)
                scores = 5.0 * torch.tanh(keys @ q[b, h, 0].float() * 0.3 / 5.0)
                wanted = torch.softmax(scores, 0) @ values
                tolerance = 1e-4 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(found[b, h, 0].float(), wanted, rtol=tolerance, atol=tolerance)


def test_filling_again_replaces_everything() -> None:
    ring = make(LayerPlan(RULES, 8, 16), 12, 16)
    for seed, length in enumerate((12, 16, 3)):
        k, v = numbers(2, len(RULES), length, seed)
        ring.fill(k, v)
        check(ring, k, v, [0, 0])


def test_a_prompt_whose_first_tokens_are_gone_already() -> None:
    """What transformers' sliding layers hand over."""
    ring = make(LayerPlan((DENSE,) * 4, window=6), 20, 24)
    k, v = numbers(2, 4, 25)
    ring.fill(k[:, :, 15:20], v[:, :, 15:20], first=15)
    for t in range(20, 25):
        ring.append(k[:, :, t], v[:, :, t])
    check(ring, k, v, [0, 0])
    assert ring.k.shape[1] == 4 * 6


def test_beams_are_reordered_and_copied() -> None:
    k, v = numbers(2, len(RULES), 14)
    ring = make(LayerPlan(RULES, 8, 4), 14, 14)
    ring.fill(k, v, [0, 5])
    ring.repeat(2)
    check(ring, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0), [0, 0, 5, 5])
    ring.select(torch.tensor([3, 0, 2]))
    order = torch.tensor([1, 0, 1])
    check(ring, k[order], v[order], [5, 0, 5])
    more, values = numbers(3, len(RULES), 1, seed=2)
    ring.append(more[:, :, 0], values[:, :, 0])
    check(ring, torch.cat([k[order], more], 2), torch.cat([v[order], values], 2), [5, 0, 5])


@pytest.mark.parametrize("capacities", [(20, 20), (20, 60), (60, 22)])
def test_a_ring_is_taken_over_whatever_its_capacity(capacities: tuple[int, int]) -> None:
    plan = LayerPlan(RULES, 4, 8)
    one, other = (make(plan, 20, capacity) for capacity in capacities)
    k, v = numbers(2, len(RULES), 23)
    one.fill(k[:, :, :20], v[:, :, :20])
    other.copy_from(one)
    for t in range(20, 23):
        other.append(k[:, :, t], v[:, :, t])
    check(other, k, v, [0, 0])
    with pytest.raises(ValueError, match="can't take over"):
        make(plan, 22, 20).copy_from(one)  # another N, other spans
    with pytest.raises(ValueError, match="can't take over"):
        make(LayerPlan(RULES, 8, 8), 20, 20).copy_from(one)


def test_memory_is_what_the_spans_need() -> None:
    """Bytes as summed from the tensors, against the arithmetic of the plan."""
    plan = LayerPlan((Rule(100, 0.0, 4), Rule(0, 0.25, 4), DENSE), 8, 4)
    ring = make(plan, 1000, 1024, batch=3, dtype=torch.bfloat16)
    slots = 100 + 250 + 1024
    per_slot = DIM + 8 + DIM // 2 + 8
    assert ring.nbytes == 3 * slots * per_slot + 8 * 4 + 4 * 3 * 2
    dense = make(LayerPlan((DENSE,) * 3), 1000, 1024, batch=3, dtype=torch.bfloat16)
    assert dense.nbytes == 3 * 3 * 1024 * 4 * DIM + 8 * 4 + 4 * 3 * 2


def test_growth_is_by_steps_and_spans_never_grow() -> None:
    plan = LayerPlan((DENSE, Rule(6, 0.0, 2)))
    ring = make(plan, 10, 10, batch=1)
    k, v = numbers(1, 2, 12)
    ring.fill(k[:, :, :10], v[:, :, :10])
    before = ring.k
    ring.append(k[:, :, 10], v[:, :, 10])
    grown = ring.k
    assert before.shape[1] == 16 and grown.shape[1] == 10 + GROWTH + 6
    ring.append(k[:, :, 11], v[:, :, 11])
    assert ring.k is grown
    check(ring, k, v, [0])


def test_a_rewind_is_exact_until_something_was_dropped() -> None:
    ring = make(LayerPlan((DENSE, Rule(6, 0.0, 2))), 7, 32)
    k, v = numbers(2, 2, 10)
    ring.fill(k[:, :, :4], v[:, :, :4])
    for t in range(4, 6):
        ring.append(k[:, :, t], v[:, :, t])
    assert not ring.drops(6) and ring.drops(7)
    ring.rewind(2)
    check(ring, k[:, :, :4], v[:, :, :4], [0, 0])


def test_gradients_and_inference_mode_leave_no_trace() -> None:
    k, v = numbers(2, len(RULES), 12)
    with torch.inference_mode():
        ring = make(LayerPlan(RULES, 8, 16), 10, 10)
        ring.fill(k[:, :, :10], v[:, :, :10])
        ring.select(torch.tensor([0, 1]))
    ring.append(k[:, :, 10].requires_grad_(), v[:, :, 10].requires_grad_())
    ring.append(k[:, :, 11:].requires_grad_(), v[:, :, 11:].requires_grad_())
    check(ring, k, v, [0, 0])
    assert not ring.v.requires_grad


def test_what_c_reads_is_what_is_here() -> None:
    ring = make(LayerPlan(RULES, 8, 16), 12, 16, dtype=torch.bfloat16)
    c = ring.struct
    assert (c.batch, c.heads, c.kv_heads, c.dim, c.key_bits, c.value_bits) == (2, 12, 4, DIM, 8, 16)
    assert (c.k, c.k_scale, c.v, c.v_scale) == (
        ring.k.data_ptr(),
        ring.k_scale.data_ptr(),
        ring.v.data_ptr(),
        None,
    )  # type: ignore[union-attr]
    with pytest.raises(CapabilityError, match=r"not torch\.float16 on cpu"):
        _ = make(LayerPlan(RULES), 12, 16, dtype=torch.float16).struct


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="4 query heads can't share 3"):
        Ring(LayerPlan((DENSE,) * 3), heads=4, dim=8, batch=1, tokens=4, capacity=4, dtype=torch.float32)
    with pytest.raises(ValueError, match="dim must be even, not 7; use 8 bits"):
        Ring(LayerPlan((DENSE,), 16, 4), heads=1, dim=7, batch=1, tokens=4, capacity=4, dtype=torch.float32)
