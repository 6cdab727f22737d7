"""Conformance checks of the attention operators' implementations, for the built-in ones and for yours.

    from autocomp.kernels.attention import OPERATORS
    @pytest.mark.parametrize("name", OPERATORS)
    def test_mine(name):
        check_operator(OPERATORS[name], "mine", "cuda")

Every case is compared with the reference in float64. Inputs lie between guard zones of NaN (255 for codes),
so that a read outside shows in the result and a write outside is found; most are not contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from autocomp.kernels import attention_reference as reference
from autocomp.kernels.library import Operator
from autocomp.testing.attention_inputs import (
    DECODE_SHAPES,
    PREFILL_SHAPES,
    Case,
    guarded,
    guards_hold,
    moved_to,
    random_heads,
    spread,
)
from autocomp.testing.attention_rings import check_append, decode_cache_cases

Tensor = torch.Tensor

BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Largest relative error (Frobenius norm), by the dtype of the queries."""
CODED_BOUND = 1e-4
"""Floor of the bound over a quantized cache: queries may be rounded to 16-bit integers there."""
PEAK = 16
"""The largest single error may be this many times the bound, relative to the largest output."""
WIDENED = {
    "decode_attention_kv": (0,),
    "attention_spans": (0, 1, 2),
    "decode_attention_cache": (0,),
    "attention_window_residual": (0, 1, 2, 5),
    "attention_block_sparse": (0, 1, 2),
}
"""Positions of the arguments that the reference gets in float64."""


def decode_kv_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Ragged lengths with a 0, 8 and 4 bits, softcap, a model's window; garbage behind the length."""
    generator = torch.Generator().manual_seed(0)
    for heads, kv_heads, dim, tokens in DECODE_SHAPES:
        q = random_heads(generator, dtype, 3, heads, 1, dim)
        k, v = (random_heads(generator, dtype, 3, kv_heads, tokens, dim, shift=s) for s in (0.0, 0.5))
        lengths = guarded(torch.tensor([tokens, tokens // 3, 0], dtype=torch.int32))
        for key_bits, value_bits, softcap, window in (
            (8, 8, 0.0, 0),
            (4, 4, 5.0, 0),
            (8, 4, 0.0, tokens // 2 + 1),
        ):
            cache = [
                guarded(t)
                for t in (*reference.kv_quantize(k, key_bits), *reference.kv_quantize(v, value_bits))
            ]
            for b, length in enumerate(lengths.tolist()):
                for tensor in cache:
                    tensor[b, :, length:] = torch.nan if tensor.is_floating_point() else 255
            rest = (key_bits, value_bits, dim**-0.5, softcap, window)
            label = f"H{heads}/{kv_heads} D{dim} S{tokens} k{key_bits} v{value_bits} cap{softcap} w{window}"
            yield Case(label, (q, *cache, lengths, *rest))


def spans_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Windows from 0 and 1 to more than S, with and without sinks."""
    generator = torch.Generator().manual_seed(1)
    for heads, kv_heads, dim, tokens in PREFILL_SHAPES:
        q = random_heads(generator, dtype, 2, heads, tokens, dim)
        k, v = (random_heads(generator, dtype, 2, kv_heads, tokens, dim, shift=s) for s in (0.0, 0.5))
        for windows, sinks in (((1, 17, tokens, 70), (0, 5, 0, 70)), ((0, 0, 2**30, 64), (0, 3, 2**30, 1))):
            spans = spread(heads, *windows), spread(heads, *sinks)
            yield Case(f"H{heads}/{kv_heads} D{dim} S{tokens} {windows}", (q, k, v, *spans, dim**-0.5))


def window_residual_cases(dtype: torch.dtype) -> Iterator[Case]:
    """All modes side by side, with and without text tokens and residual."""
    generator = torch.Generator().manual_seed(3)
    for heads, kv_heads, dim, tokens in PREFILL_SHAPES:
        q = random_heads(generator, dtype, 2, heads, tokens, dim)
        k, v = (random_heads(generator, dtype, 2, kv_heads, tokens, dim, shift=s) for s in (0.0, 0.5))
        held = random_heads(generator, dtype, 2, heads, tokens, dim)
        half_window = spread(heads, 9, 0, 70, 500)
        for first, (prefix, residual) in enumerate(((0, held), (13, held), (2, None), (tokens + 5, held))):
            mode = spread(heads, *((first + i) % 4 for i in range(4)))
            label = f"H{heads}/{kv_heads} D{dim} S{tokens} prefix {prefix} mode {mode.tolist()}"
            yield Case(label, (q, k, v, half_window, prefix, residual, mode))


def random_blocks(
    heads: int, blocks: int, density: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A random pattern as ``row_ptr`` and ``col`` of ``attention_block_sparse``; some rows may be empty."""
    mask = torch.rand(heads, blocks, blocks, generator=generator) < density
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(-1).flatten().cumsum(0)])
    index = torch.arange(heads).unsqueeze(1) * blocks + torch.arange(blocks + 1)
    return counts[index].to(torch.int32), mask.nonzero()[:, 2].to(torch.int32)


def block_sparse_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Blocks that divide S, that don't, that are longer; empty rows; with and without reordering."""
    generator = torch.Generator().manual_seed(4)
    for heads, kv_heads, dim, tokens in PREFILL_SHAPES:
        q = random_heads(generator, dtype, 2, heads, tokens, dim)
        k, v = (random_heads(generator, dtype, 2, kv_heads, tokens, dim, shift=s) for s in (0.0, 0.5))
        order = guarded(
            torch.stack([torch.randperm(tokens, generator=generator) for _ in range(heads)]).int()
        )
        for block, moved in ((16, None), (64, order), (128, order), (32, None)):
            row_ptr, col = random_blocks(heads, -(-tokens // block), 0.5, generator)
            label = (
                f"H{heads}/{kv_heads} D{dim} S{tokens} block {block} {'reordered' if moved is order else ''}"
            )
            yield Case(label, (q, k, v, guarded(row_ptr), guarded(col), block, moved))


CASES = {
    "decode_attention_kv": decode_kv_cases,
    "attention_spans": spans_cases,
    "decode_attention_cache": decode_cache_cases,
    "attention_window_residual": window_residual_cases,
    "attention_block_sparse": block_sparse_cases,
}


def _compare(where: str, found: Tensor, wanted: Tensor, bound: float, size: float, peak: float) -> None:
    found = found.double().cpu()
    assert found.isfinite().all(), f"{where}: not finite"
    error = float((found - wanted).norm()) / max(size, 1e-30)
    assert error <= bound, f"{where}: relative error {error:.2g} is over {bound:.2g}"
    largest = float((found - wanted).abs().max()) if found.numel() else 0.0
    assert largest <= PEAK * bound * peak + 1e-30, f"{where}: one element is off by {largest:.2g}"


def check_case(operator: Operator, implementation: str, device: str, case: Case, dtype: torch.dtype) -> None:
    """One call against the reference; inputs and guards must stay as they are."""
    where = f"{operator.name} ({implementation}, {dtype}) {case.label}"
    positions = WIDENED[operator.name]
    wide = [a.double() if i in positions and isinstance(a, Tensor) else a for i, a in enumerate(case.args)]
    wanted = operator.reference(*wide)
    args = [moved_to(a, device) for a in case.args]
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    with operator.forced(implementation), torch.inference_mode():
        found = operator(*args)
    coded = any(isinstance(a, Tensor) and a.dtype == torch.uint8 for a in case.args)
    bound = max(BOUND[dtype], CODED_BOUND if coded else 0.0)
    found, wanted = (x if isinstance(x, tuple) else (x,) for x in (found, wanted))
    size, peak = float(wanted[0].norm()), float(wanted[0].abs().max())
    for part, (y, exact) in enumerate(zip(found, wanted)):
        assert y.shape == exact.shape and y.dtype == dtype, f"{where}: result {part} is {y.shape} {y.dtype}"
        # A residual is a difference of two outputs: its error is theirs.
        _compare(where, y, exact, bound, max(size, float(exact.norm())), max(peak, float(exact.abs().max())))
    for argument, former in zip(args, before):
        if isinstance(argument, Tensor):
            same = torch.equal(argument.nan_to_num(), former.nan_to_num())
            assert same and guards_hold(argument), f"{where}: changes an input or writes beside one"


def check_quantize(operator: Operator, implementation: str, device: str, dtype: torch.dtype) -> None:
    """Codes within half a step of the input, and the reference's but for ties; constant rows are exact."""
    generator = torch.Generator().manual_seed(5)
    for bits, dim in ((8, 64), (4, 64), (8, 33), (4, 6), (8, 1)):
        x = random_heads(generator, dtype, 2, 3, 21, dim, shift=1.0)
        x[0, 0, 3] = 0.75
        with operator.forced(implementation):
            found = [t.cpu() for t in operator(moved_to(x, device), bits)]
        where = f"{operator.name} ({implementation}, {dtype}) {bits} bits, dim {dim}"
        exact = reference.kv_quantize(x, bits)
        assert [t.shape for t in found] == [t.shape for t in exact], where
        assert found[0].dtype == torch.uint8 and found[1].dtype == found[2].dtype == torch.float32, where
        for part in (1, 2):
            torch.testing.assert_close(found[part], exact[part], msg=lambda m: f"{where}: {m}")  # noqa: B023
        error = (reference.kv_dequantize(found[0], found[1], found[2], bits) - x.float()).abs()
        assert (error <= found[1].unsqueeze(-1) * 0.501 + 1e-6).all(), f"{where}: more than half a step off"
        assert (found[0] != exact[0]).float().mean() <= 0.01, f"{where}: codes differ from the reference's"


def check_operator(
    operator: Operator,
    implementation: str,
    device: str = "cpu",
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16),
) -> int:
    """All checks of one operator of ``autocomp.kernels.attention``.

    Args:
        operator: one of ``autocomp.kernels.attention.OPERATORS``.
        implementation: name it is registered under, or ``reference``.
        device: ``cpu`` or ``cuda``.
        dtypes: of the activations. Cases that the implementation refuses are left out.

    Returns:
        How many cases ran.

    Raises:
        AssertionError: with the case and what is wrong; also when every case is refused.
    """
    ran = 0
    for dtype in dtypes:
        try:
            if operator.name == "kv_quantize":
                check_quantize(operator, implementation, device, dtype)
                ran += 1
            elif operator.name == "cache_append":
                ran += check_append(operator, implementation, device, dtype)
            else:
                ran += _check_cases(operator, implementation, device, dtype)
        except NotImplementedError:
            continue
    assert ran, f"{operator.name}: {implementation} takes none of the cases on {device}"
    return ran


def _check_cases(operator: Operator, implementation: str, device: str, dtype: torch.dtype) -> int:
    ran = 0
    for case in CASES[operator.name](dtype):
        try:
            check_case(operator, implementation, device, case, dtype)
            ran += 1
        except NotImplementedError:
            continue
    return ran
