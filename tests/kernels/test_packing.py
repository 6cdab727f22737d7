"""Dense packing: round trips, the exact bit layout, and equality with compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.kernels.packing import pack, pack_rows, packed_words, unpack, unpack_rows

WIDTHS = (1, 2, 5, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100, 257)


def random_codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def as_bit_string(words: torch.Tensor, bits: int, columns: int) -> list[int]:
    """The codes of one row, read from an integer of arbitrary size: the definition of the layout."""
    row = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    assert row >> (bits * columns) == 0, "padding bits must be zero"
    return [(row >> (bits * k)) & ((1 << bits) - 1) for k in range(columns)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_is_one_little_endian_bit_string_a_row(bits: int) -> None:
    for columns in WIDTHS:
        codes = random_codes(bits, 3, columns, seed=columns)
        words = pack(codes, bits)
        assert words.dtype is torch.int32 and words.shape == (3, packed_words(columns, bits))
        for row in range(3):
            assert as_bit_string(words[row], bits, columns) == codes[row].tolist()


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8), rows=st.integers(0, 9), columns=st.integers(0, 140), seed=st.integers(0, 2**31)
)
def test_round_trip_along_both_dimensions(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(bits, rows, columns, seed=seed)
    assert torch.equal(unpack(pack(codes, bits), bits, columns), codes)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, rows), codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_views_and_stacks_of_matrices(bits: int) -> None:
    flat = random_codes(bits, 3 * 64 + 5)
    misaligned = flat[5:].view(3, 64)
    assert torch.equal(unpack(pack(misaligned, bits), bits, 64), misaligned)
    transposed = random_codes(bits, 40, 6).t()
    assert torch.equal(unpack(pack(transposed, bits), bits, 40), transposed)
    experts = random_codes(bits, 4, 3, 40)
    words = pack(experts, bits)
    assert torch.equal(words[2], pack(experts[2], bits))
    assert torch.equal(unpack(words, bits, 40), experts)
    assert torch.equal(unpack_rows(pack_rows(experts, bits), bits, 3), experts)
    row = torch.cat([torch.zeros(2, 3, dtype=torch.int32), pack(misaligned, bits)[:2]], dim=1)[:, 3:]
    assert torch.equal(unpack(row, bits, 64), misaligned[:2])


@pytest.mark.parametrize("bits", range(1, 9))
def test_equal_to_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="compressed-tensors with dense packing is not installed (pip install autocomp[export])",
    )
    for rows, columns in ((5, 7), (33, 32), (31, 65), (64, 100)):
        codes = random_codes(bits, rows, columns, seed=columns)
        # That package packs signed values, codes and zero points alike, and adds this offset itself.
        signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
        assert torch.equal(pack(codes, bits), helpers.pack_to_int32(signed, bits))
        zeros = helpers.pack_to_int32(signed, bits, packed_dim=0)
        assert torch.equal(pack_rows(codes, bits), zeros)
        assert torch.equal(unpack_rows(zeros, bits, rows), codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 32), (32, 1), (1, 1), (64, 1), (1, 64), (5, 1), (1, 5)])
def test_sizes_of_one_with_odd_strides(bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(bits, *reversed(shape)).t()  # counts as contiguous, but has other strides
    words, along_rows = pack(codes, bits), pack_rows(codes, bits)
    assert torch.equal(unpack(words, bits, shape[1]), codes)
    assert torch.equal(unpack_rows(along_rows, bits, shape[0]), codes)
    assert torch.equal(unpack(words.t().clone().t(), bits, shape[1]), codes)
    for result in (words, along_rows, unpack_rows(along_rows, bits, shape[0])):
        assert result.stride() == torch.empty(result.shape).stride()


def test_bad_input_names_the_value() -> None:
    codes = torch.tensor([[0, 8]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="code 8 does not fit in 3 bits"):
        pack(codes, 3)
    with pytest.raises(ValueError, match="got 9"):
        pack(codes, 9)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        pack(codes.to(torch.int8), 4)
    with pytest.raises(ValueError, match="33 codes of 4 bits fill 5 words; got rows of 4"):
        unpack(torch.zeros(2, 4, dtype=torch.int32), 4, 33)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        unpack(torch.zeros(2, 4, dtype=torch.int64), 4, 32)
