"""Dense bit packing of codes into 32-bit words, the layout of compressed-tensors' ``pack-quantized``.

Element ``k`` of a row occupies the bits ``[bits * k, bits * (k + 1))`` of that row, low bits first, and may
straddle two words, so 32 elements fill exactly ``bits`` words. Rows are padded with zero bits to whole words.

Eight elements fill exactly ``bits`` bytes. They are therefore handled as one 64-bit integer whose eight byte
lanes are squeezed together (or spread apart) in three steps of doubling lane width, on whole tensors.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

# The widest integer that divides ``bits`` bytes, by the lowest set bit of ``bits``: fewer, larger copies.
_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def packed_words(columns: int, bits: int) -> int:
    """32-bit words that a row of ``columns`` codes fills."""
    return -(-columns * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension.

    Args:
        codes: uint8 ``[..., K]``, each below ``2**bits``.
        bits: 1 to 8.

    Returns:
        int32 ``[..., ceil(K * bits / 32)]``, contiguous, on the device of ``codes``.

    Raises:
        ValueError: wrong dtype, ``bits`` out of range, or a code that does not fit in ``bits``.
    """
    _check_bits(bits)
    if codes.dtype is not torch.uint8 or codes.ndim == 0:
        raise ValueError(f"codes must be uint8 [..., K]; got {codes.dtype} {list(codes.shape)}")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits (at most {2**bits - 1})")
    *lead, columns = codes.shape
    words = packed_words(columns, bits)
    if codes.numel() == 0:
        return codes.new_zeros((*lead, words), dtype=torch.int32)
    # A fresh tensor, since views as words need plain strides, which contiguous() may not give (sizes of 1).
    padded = codes.new_zeros((*lead, columns + -columns % 32))
    padded[..., :columns] = codes
    if bits < 8:
        unit = _UNITS[bits & -bits]
        lanes = _squeeze(padded.view(torch.int64), bits).unsqueeze(-1).view(unit)
        padded = lanes[..., : bits // unit.itemsize].contiguous().flatten(len(lead))
    return _plain(padded.view(torch.int32)[..., :words])


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`pack`.

    Args:
        words: int32 ``[..., ceil(columns * bits / 32)]``.
        bits: 1 to 8.
        columns: K, the codes in a row.

    Returns:
        uint8 ``[..., columns]``, contiguous.

    Raises:
        ValueError: wrong dtype, ``bits`` out of range, or a row length that ``columns`` does not explain.
    """
    _check_bits(bits)
    if words.dtype is not torch.int32 or words.ndim == 0:
        raise ValueError(f"packed words must be int32 [..., W]; got {words.dtype} {list(words.shape)}")
    *lead, width = words.shape
    if width != packed_words(columns, bits):
        wanted = packed_words(columns, bits)
        raise ValueError(f"{columns} codes of {bits} bits fill {wanted} words; got rows of {width}")
    if words.numel() == 0:
        return words.new_zeros((*lead, columns), dtype=torch.uint8)
    eights = -(-columns // 8)
    stream = _plain(words).view(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, eights * bits - 4 * width))  # a negative pad crops
    if bits < 8:
        bytes8 = torch.nn.functional.pad(stream.reshape(*lead, eights, bits), (0, 8 - bits))
        stream = _spread(bytes8.view(torch.int64).squeeze(-1), bits).view(torch.uint8)
    return _plain(stream[..., :columns])


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``[N, G]`` along N, as zero points are stored: int32 ``[ceil(N * bits / 32), G]``."""
    return _plain(pack(codes.transpose(-2, -1), bits).transpose(-2, -1))


def unpack_rows(words: Tensor, bits: int, rows: int) -> Tensor:
    """Inverse of :func:`pack_rows`: int32 ``[ceil(N * bits / 32), G]`` to uint8 ``[N, G]``."""
    return _plain(unpack(words.transpose(-2, -1), bits, rows).transpose(-2, -1))


def _plain(tensor: Tensor) -> Tensor:
    """A copy with the strides of a new tensor, also where sizes of 1 let odd strides pass as contiguous."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8; got {bits}")
    if sys.byteorder != "little":
        raise ValueError("packing views bytes as words and needs a little-endian host; convert elsewhere")


def _lane_mask(used: int, lane: int) -> int:
    """The low ``used`` bits of every other ``lane``-bit lane of a 64-bit word, starting with the first."""
    return sum(((1 << used) - 1) << start for start in range(0, 64, 2 * lane))


def _squeeze(lanes: Tensor, bits: int) -> Tensor:
    """Eight ``bits``-wide codes in byte lanes of an int64 to ``8 * bits`` contiguous bits (``bits`` < 8)."""
    for doubling in (1, 2, 4):
        used, lane = doubling * bits, doubling * 8
        even = _lane_mask(used, lane)
        lanes = (lanes & even) | ((lanes >> (lane - used)) & (even << used))
    return lanes


def _spread(lanes: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`_squeeze`."""
    for doubling in (4, 2, 1):
        used, lane = doubling * bits, doubling * 8
        even = _lane_mask(used, lane)
        lanes = (lanes & even) | ((lanes & (even << used)) << (lane - used))
    return lanes
