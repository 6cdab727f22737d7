"""Attention operators: what they mean, checked against torch and naive loops, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.kernels import attention_probe
from autocomp.kernels import attention_reference as reference
from autocomp.kernels.attention import (
    OPERATORS,
    attention_block_sparse,
    attention_spans,
    attention_window_residual,
    cache_append,
    decode_attention_cache,
    decode_attention_kv,
    kv_quantize,
)
from autocomp.kernels.library import Implementation
from autocomp.testing.attention import check_operator, random_blocks

Tensor = torch.Tensor
PREFILL = ("attention_spans", "attention_window_residual", "attention_block_sparse")


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def heads(batch: int, count: int, tokens: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, tokens, dim, generator=torch.Generator().manual_seed(seed))


def implementations() -> list[tuple[str, str]]:
    built_in = [
        (n, i.name) for n, op in OPERATORS.items() for i in op.implementations if i.device_type == "cpu"
    ]
    return [*built_in, *((name, "reference") for name in OPERATORS)]


@pytest.mark.parametrize(("name", "implementation"), implementations())
def test_implementations_conform(name: str, implementation: str) -> None:
    usable = [i for i in OPERATORS[name].implementations if i.name == implementation and not i.unusable()]
    if implementation != "reference" and not usable:
        pytest.skip("not usable on this machine")
    dtypes = (
        (torch.float16,) if implementation == "reference" else (torch.float32, torch.float16, torch.bfloat16)
    )
    assert check_operator(OPERATORS[name], implementation, "cpu", dtypes) >= 1


@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_implementation_is_found_out(name: str) -> None:
    operator = OPERATORS[name]

    def wrong(*args: Any) -> Any:
        if name == "cache_append":
            return operator.reference(*args[:11], args[11] + 1, *args[12:])
        result = operator.reference(*args)
        return (result[0], *(1.05 * r for r in result[1:])) if isinstance(result, tuple) else 1.05 * result

    assert "off by" in attention_probe.check(name, wrong)
    operator.register(Implementation("wrong", "cpu", wrong))
    try:
        with pytest.raises(AssertionError):
            check_operator(operator, "wrong", dtypes=(torch.float32,))
    finally:
        operator.implementations = [i for i in operator.implementations if i.name != "wrong"]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_well_behaved_for_torch_compile(name: str) -> None:
    args = attention_probe.arguments(name)
    target = getattr(torch.ops.autocomp, name).default
    torch.library.opcheck(target, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_over_everything_is_dense_causal_attention(dtype: torch.dtype) -> None:
    q, k, v = (heads(2, n, 75, 32, n).to(dtype) for n in (8, 2, 2))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).float()
    for window, sink in ((75, 0), (2**31 - 1, 0), (0, 75)):
        found = attention_spans(q, k, v, i32(*[window] * 8), i32(*[sink] * 8), 32**-0.5).float()
        torch.testing.assert_close(found, wanted, atol=2e-2 if dtype == torch.bfloat16 else 2e-5, rtol=0)


def test_a_window_of_one_gives_the_own_value_and_none_gives_zeros() -> None:
    q, k, v = (heads(1, 2, 70, 16, n) for n in range(3))
    found = attention_spans(q, k, v, i32(1, 0), i32(0, 0), 0.25)
    torch.testing.assert_close(found[:, 0], v[:, 0])
    assert not found[:, 1].any()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_spans_agree_with_a_loop_over_visible_keys(data: st.DataObject) -> None:
    tokens, dim = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 40))
    kv_heads, groups = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    q, k, v = (heads(1, n, tokens, dim, n) for n in (kv_heads * groups, kv_heads, kv_heads))
    v = v + 1
    window, sink = (i32(*(data.draw(st.integers(0, 100)) for _ in range(q.shape[1]))) for _ in range(2))
    found = attention_spans(q, k, v, window, sink, dim**-0.5)
    for h in range(q.shape[1]):
        i = data.draw(st.integers(0, tokens - 1))
        seen = [j for j in range(i + 1) if i - j < window[h] or j < sink[h]]
        wanted = torch.zeros(dim)
        if seen:
            weights = torch.softmax(k[0, h // groups, seen] @ q[0, h, i] * dim**-0.5, 0)
            wanted = weights @ v[0, h // groups, seen]
        torch.testing.assert_close(found[0, h, i], wanted, atol=1e-4, rtol=1e-4)


def empty_rings(batch: int, dim: int, window: Tensor, sink: Tensor, bits: tuple[int, int]) -> list[Any]:
    """``k, v, k_scale, k_min, v_scale, v_min, head_start, window, sink``; plain numbers are bfloat16."""
    starts = torch.tensor([0, *(window + sink).cumsum(0).tolist()])
    types = {16: torch.bfloat16, 32: torch.float32}
    cache: list[Any] = []
    factors: list[Any] = []
    for n in bits:
        width = dim if n >= 16 else dim * n // 8
        cache.append(torch.zeros(batch, int(starts[-1]), width, dtype=types.get(n, torch.uint8)))
        factors += [None if n >= 16 else torch.zeros(batch, int(starts[-1])) for _ in range(2)]
    return [*cache, *factors, starts, window, sink]


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_rings_hold_what_the_span_needs(data: st.DataObject) -> None:
    """Decoding over rings, two sequences of their own lengths, gives rows of attention with spans."""
    tokens, kv_heads, dim = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3)), 8
    groups = data.draw(st.sampled_from([1, 2, 5]))
    q, k, v = (heads(2, n, tokens, dim, n) for n in (kv_heads * groups, kv_heads, kv_heads))
    window, sink = (i32(*(data.draw(st.integers(0, 20)) for _ in range(kv_heads))) for _ in range(2))
    lengths = [tokens, data.draw(st.integers(1, tokens))]
    every = [x.repeat_interleave(groups) for x in (window, sink)]
    wanted = reference.attention_spans(q.double(), k.double(), v.double(), *every, 0.3).float()
    cache = empty_rings(2, dim, window, sink, (32, 32))
    for tensor in cache[:2]:
        tensor.fill_(torch.nan)
    for t in range(tokens):
        now = [min(t, n - 1) for n in lengths]  # the second sequence stays where it ends
        row = torch.arange(2), slice(None), torch.tensor(now)
        cache_append(*cache[:6], k[row], v[row], *cache[6:], i32(*now), 32, 32)
    ends = torch.tensor(lengths) - 1
    last = q[torch.arange(2), :, ends].unsqueeze(2)
    found = decode_attention_cache(last, *cache, i32(*lengths), 32, 32, 0.3)
    torch.testing.assert_close(found.squeeze(2), wanted[torch.arange(2), :, ends], atol=1e-4, rtol=1e-4)


def test_rings_are_as_small_as_the_spans() -> None:
    q = torch.ones(1, 4, 1, 64)
    cache = empty_rings(1, 64, i32(448, 100), i32(64, 28), (32, 32))
    assert cache[0].shape == (1, 512 + 128, 64)
    for tensor in cache[:2]:
        tensor.fill_(2.0)
    assert torch.equal(decode_attention_cache(q, *cache, i32(4096), 32, 32, 0.1), 2 * q)


def test_a_ring_with_room_for_all_tokens_is_a_dense_cache() -> None:
    """A window that is never reached drops nothing, and its ring needs only room for the tokens that come."""
    q, k, v = heads(1, 4, 1, 16), heads(1, 2, 30, 16, 1), heads(1, 2, 30, 16, 2)
    starts, window, sink = torch.tensor([0, 30, 60]), i32(2**31 - 1, 2**31 - 1), i32(0, 4)
    flat = [x.reshape(1, 60, 16) for x in (k, v)]
    found = decode_attention_cache(
        q, *flat, None, None, None, None, starts, window, sink, i32(30), 32, 32, 0.25
    )
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@pytest.mark.parametrize(("key_bits", "value_bits"), [(8, 8), (4, 4), (8, 4), (4, 16), (16, 8)])
def test_a_prompt_is_written_at_once_or_token_by_token(key_bits: int, value_bits: int) -> None:
    """Quantizing what a span keeps of a prompt and copying it into its slots is what appending leaves."""
    k, v = (heads(2, 2, 50, 16, seed).bfloat16() for seed in (1, 2))
    window, sink = i32(11, 40), i32(4, 0)
    bits = (key_bits, value_bits)
    wanted, found = (empty_rings(2, 16, window, sink, bits) for _ in range(2))
    for t in range(50):
        cache_append(*wanted[:6], k[:, :, t], v[:, :, t], *wanted[6:], i32(t, t), *bits)
    sides = ((k, key_bits, (found[0], *found[2:4])), (v, value_bits, (found[1], *found[4:6])))
    for h, (w, s, first) in enumerate(zip(window.tolist(), sink.tolist(), found[6].tolist())):
        kept = torch.cat([torch.arange(s), torch.arange(max(s, 50 - w), 50)])
        slots = first + torch.where(kept < s, kept, s + (kept - s) % w)
        for x, n, targets in sides:
            for target, entries in zip(targets, reference.cache_entries(x[:, h, kept], n, torch.bfloat16)):
                if target is not None:
                    target[:, slots] = entries
    for mine, theirs in zip(found, wanted):
        assert mine is theirs is None or torch.equal(mine, theirs)


def test_quantized_rings_give_what_a_quantized_cache_gives() -> None:
    q, k, v = (heads(2, n, t, 64, n) for n, t in ((8, 1), (2, 200), (2, 200)))
    starts, window, sink = torch.tensor([0, 200, 400]), i32(200, 200), i32(0, 0)
    coded = *kv_quantize(k, 8), *kv_quantize(v, 4)
    wanted = decode_attention_kv(q, *coded, i32(200, 150), 8, 4, 0.125, 20.0)
    k_codes, k_scale, k_min, v_codes, v_scale, v_min = (t.flatten(1, 2) for t in coded)
    cache = k_codes, v_codes, k_scale, k_min, v_scale, v_min, starts, window, sink
    found = decode_attention_cache(q, *cache, i32(200, 150), 8, 4, 0.125, 20.0)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.02), (4, 0.25)])
def test_a_quantized_cache_is_near_the_exact_one(bits: int, limit: float) -> None:
    q, k, v = (heads(2, n, t, 64, n) for n, t in ((8, 1), (2, 200), (2, 200)))
    coded = *kv_quantize(k, bits), *kv_quantize(v, bits)
    found = decode_attention_kv(q, *coded, i32(200, 150), bits, bits, 0.125)
    for b, length in enumerate((200, 150)):
        wanted = F.scaled_dot_product_attention(q[b], k[b, :, :length], v[b, :, :length], enable_gqa=True)
        assert float((found[b] - wanted).norm() / wanted.norm()) < limit


def test_quantized_rows_keep_their_range_and_constants() -> None:
    x = torch.stack([torch.linspace(-3, 5, 64), torch.full((64,), -2.5)]).view(1, 1, 2, 64)
    for bits in (8, 4):
        codes, scale, minimum = kv_quantize(x, bits)
        back = reference.kv_dequantize(codes, scale, minimum, bits)
        assert back[0, 0, 0].min() == -3 and back[0, 0, 0].max() == pytest.approx(5)
        assert torch.equal(back[0, 0, 1], x[0, 0, 1]) and scale[0, 0, 1] == 0


def test_residual_makes_the_window_exact_on_the_same_input() -> None:
    """DiTFastAttn: window attention plus the residual that full attention saved is full attention."""
    q, k, v = (heads(2, n, 100, 24, n) for n in (4, 2, 2))
    half = i32(0, 8, 31, 200)
    full, residual = attention_window_residual(q, k, v, half, 5, None, i32(1, 1, 1, 1))
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(full, dense, atol=2e-5, rtol=0)
    again, kept = attention_window_residual(q, k, v, half, 5, residual, i32(2, 2, 2, 2))
    torch.testing.assert_close(again, dense, atol=2e-5, rtol=0)
    assert torch.equal(kept, residual)
    assert float(residual[:, 3].abs().max()) < 1e-5  # its window is everything
    without, _ = attention_window_residual(q, k, v, half, 5, None, i32(2, 2, 2, 2))
    assert float((without - dense)[:, :3].norm()) > 0.1
    torch.testing.assert_close(without[:, :, :5], dense[:, :, :5], atol=2e-5, rtol=0)  # text rows are dense
    reused, _ = attention_window_residual(q, k, v, half, 5, full, i32(3, 3, 0, 3))
    assert torch.equal(reused[:, [0, 1, 3]], full[:, [0, 1, 3]])


def test_all_blocks_in_any_order_are_dense_attention() -> None:
    q, k, v = (heads(1, n, 90, 16, n) for n in (4, 2, 2))
    row_ptr, col = random_blocks(4, 6, 2.0, torch.Generator())
    order = torch.stack([torch.randperm(90) for _ in range(4)]).int()
    for moved in (None, order):
        found = attention_block_sparse(q, k, v, row_ptr, col, 16, moved)
        torch.testing.assert_close(
            found, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), atol=2e-5, rtol=0
        )


def test_a_local_pattern_in_another_order_is_a_few_blocks_after_reordering() -> None:
    """PAROAttention: tokens that attend along columns of a 8x8 grid are diagonal blocks when columns lead."""
    q, k, v = (heads(1, 1, 64, 16, n) for n in range(3))
    columns = torch.arange(64).view(8, 8).T.reshape(1, 64).int()
    diagonal = torch.arange(9, dtype=torch.int32).view(1, 9), torch.arange(8, dtype=torch.int32)
    found = attention_block_sparse(q, k, v, *diagonal, 8, columns)
    same_column = torch.arange(64) % 8 == torch.arange(64).view(-1, 1) % 8
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=same_column)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_heads_can_be_permuted() -> None:
    q, k, v = (heads(1, 4, 70, 16, n) for n in range(3))
    window, sink, half, mode = i32(3, 9, 70, 1), i32(0, 2, 5, 9), i32(0, 4, 9, 70), i32(1, 2, 3, 0)
    swapped = torch.tensor([2, 0, 3, 1])
    moved = [x[:, swapped] for x in (q, k, v)]
    spans = attention_spans(q, k, v, window, sink, 0.25)
    assert torch.equal(attention_spans(*moved, window[swapped], sink[swapped], 0.25), spans[:, swapped])
    for x, y in zip(
        attention_window_residual(*moved, half[swapped], 3, moved[0], mode[swapped]),
        attention_window_residual(q, k, v, half, 3, q, mode),
    ):
        assert torch.equal(x, y[:, swapped])


@pytest.mark.parametrize("name", PREFILL)
def test_no_tokens_and_no_sequences_are_fine(name: str) -> None:
    _, _, _, *rest = attention_probe.arguments(name)
    q, k, v = (torch.zeros(0, n, 70, 40) for n in (4, 2, 2))
    if name == "attention_window_residual":
        rest[2] = torch.zeros(0, 4, 70, 40)
    result = OPERATORS[name](q, k, v, *rest)
    assert (result[0] if isinstance(result, tuple) else result).shape == (0, 4, 70, 40)


@pytest.mark.parametrize("forced", ["", "reference"])
def test_rings_without_sequences_are_fine(forced: str) -> None:
    *cache, starts, window, sink = empty_rings(0, 16, i32(4, 9), i32(2, 0), (8, 16))
    new = torch.zeros(0, 2, 16)
    with OPERATORS["cache_append"].forced(forced), OPERATORS["decode_attention_cache"].forced(forced):
        cache_append(*cache, new, new, starts, window, sink, i32(), 8, 16)
        q = torch.zeros(0, 4, 1, 16)
        found = decode_attention_cache(q, *cache, starts, window, sink, i32(), 8, 16, 0.25)
    assert found.shape == q.shape


def bad_calls() -> list[tuple[str, int, Any, str]]:
    """Operator, position of the argument, a bad value, what the message must say."""
    return [
        ("kv_quantize", 1, 3, "8 or 4"),
        ("kv_quantize", 0, torch.zeros(1, 1, 2, 5), "even"),
        ("decode_attention_kv", 1, torch.zeros(1, 2, 70, 20, dtype=torch.uint8), "k_codes"),
        ("decode_attention_kv", 7, i32(71), "capacity 70"),
        ("decode_attention_kv", 7, i32(-1), "capacity 70"),
        ("decode_attention_kv", 8, 5, "bits must be"),
        ("decode_attention_kv", 2, torch.zeros(1, 2, 70, dtype=torch.float16), "float32"),
        ("attention_spans", 1, torch.zeros(1, 3, 70, 40), "multiple"),
        ("attention_spans", 2, torch.zeros(1, 2, 69, 40), "like k"),
        ("attention_spans", 3, i32(1, 2, 3), "window"),
        ("attention_spans", 3, i32(1, 2, -3, 4), "negative"),
        ("attention_spans", 4, torch.zeros(4), "int32"),
        ("decode_attention_cache", 0, torch.zeros(2, 4, 2, 40), "q must be"),
        ("decode_attention_cache", 0, torch.zeros(2, 3, 1, 40), "multiple"),
        ("decode_attention_cache", 1, torch.zeros(2, 70, 40), "uint8"),
        ("decode_attention_cache", 1, torch.zeros(2, 70, 20, dtype=torch.uint8), "at 8 bits"),
        ("decode_attention_cache", 3, None, "kv_quantize gives them"),
        ("decode_attention_cache", 5, torch.zeros(2, 69), "v_scale"),
        ("decode_attention_cache", 7, torch.tensor([0, 10, 70]), "give it 30"),
        ("decode_attention_cache", 7, torch.tensor([0, 30, 71]), "70 slots"),
        ("decode_attention_cache", 8, i32(20, -1), "negative"),
        ("decode_attention_cache", 10, i32(5, -1), "negative"),
        ("decode_attention_cache", 10, i32(5), "lengths"),
        ("decode_attention_cache", 11, 5, "bits must be"),
        ("decode_attention_cache", 12, 16, "of 16 bits"),
        ("cache_append", 6, torch.zeros(2, 2, 41), "like new_k"),
        ("cache_append", 6, torch.zeros(2, 3, 40), "new_k"),
        ("cache_append", 11, i32(3, -1), "negative"),
        ("cache_append", 11, torch.tensor([3, 4]), "int32"),
        ("cache_append", 8, torch.tensor([0, 10, 70]), "give it 30"),
        ("attention_window_residual", 6, i32(0, 1, 2, 4), "reuse"),
        ("attention_window_residual", 4, -1, "prefix"),
        ("attention_window_residual", 5, torch.zeros(1, 4, 70, 41), "residual"),
        ("attention_block_sparse", 3, torch.zeros(4, 3, dtype=torch.int32), "row_ptr"),
        ("attention_block_sparse", 4, i32(*[3] * 12), "block numbers"),
        ("attention_block_sparse", 4, i32(0), "ascend"),
        ("attention_block_sparse", 5, 0, "positive"),
        ("attention_block_sparse", 6, torch.zeros(4, 70, dtype=torch.int32), "once per head"),
    ]


@pytest.mark.parametrize("forced", ["", "reference"])
@pytest.mark.parametrize(("name", "position", "value", "told"), bad_calls())
def test_bad_input_is_refused_in_words(name: str, position: int, value: Any, told: str, forced: str) -> None:
    args = list(attention_probe.arguments(name))
    args[position] = value
    with OPERATORS[name].forced(forced), pytest.raises((ValueError, TypeError), match=told):
        OPERATORS[name](*args)
