"""Tile sizes and other choices at launch. Plain functions of shape, dtype and architecture: nothing is tuned,
measured or read back from the device on the way to a launch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

LOG2E = 1.4426950408889634
WIDEST_HEAD = 256
WIDEST_FLOAT32_HEAD = 128
MOST_PIECES = 128
ASSUMED = (90, 132)


@dataclass(frozen=True)
class Tiles:
    """Tile of a kernel: rows (queries), keys per step, and how it runs."""

    rows: int
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def power_of_2(n: int) -> int:
    """Smallest power of two that is at least ``n`` (and 1)."""
    return 1 << max(0, n - 1).bit_length()


def block_width(dim: int) -> int:
    """Width of a tile for heads of ``dim`` features: a power of two that dots accept."""
    return max(16, power_of_2(dim))


def row_major(x: torch.Tensor) -> torch.Tensor:
    """``x`` with neighbouring features side by side; copied only when they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@functools.cache
def _properties(index: int) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(index)
    return found.major * 10 + found.minor, found.multi_processor_count


def architecture(x: torch.Tensor) -> tuple[int, int]:
    """Compute capability times ten and number of multiprocessors of a tensor's device. Without
    one (in the interpreter) ``ASSUMED``, an H100's."""
    if x.device.type != "cuda":
        return ASSUMED
    return _properties(torch.cuda.current_device() if x.device.index is None else x.device.index)


def ranked_heads(heads: int) -> int:
    """``HP`` of the kernels that start with the costliest heads; 0 (no sorting) for one head or very many."""
    return power_of_2(heads) if 1 < heads <= 64 else 0


def prefill_tiles(q: torch.Tensor) -> Tiles:
    """Tiles of a prefill over many queries ``[..., S, D]``."""
    return tiles_for(q.shape[-1], q.dtype, q.shape[-2], architecture(q)[0])


def tiles_for(dim: int, dtype: torch.dtype, length: int, capability: int) -> Tiles:
    """As many rows as the accumulator's registers allow, and what fits into shared memory: little of it
    everywhere but on Hopper (9.x) and the large Blackwells (10.x)."""
    width = block_width(dim)
    if dtype == torch.float32:  # small tiles, or the three parts of each operand don't fit into registers
        return Tiles(32, 32, 4, 1) if width <= 64 else Tiles(16, 32, 4, 1)
    roomy = capability // 10 in (9, 10)
    if width > 128:
        return Tiles(64, 32, 8, 2)
    if length <= 64:
        return Tiles(64, 64, 4, 2)
    return Tiles(128, 32 if width == 128 and not roomy else 64, 8, 3)


def two_state_tiles(q: torch.Tensor) -> Tiles:
    """Tiles for two accumulators: half the rows."""
    width = block_width(q.shape[-1])
    if q.dtype == torch.float32:
        return Tiles(16, 32, 4, 1)
    if width > 128:
        return Tiles(32, 32, 8, 2)
    return Tiles(64, 64, 8 if width > 64 else 4, 2)


def block_sparse_tiles(q: torch.Tensor, block: int) -> Tiles:
    """As for prefill, but tiles must divide the block."""
    tiles = prefill_tiles(q)
    rows, keys = min(tiles.rows, block), min(tiles.keys, block)
    warps = 4 if rows <= 64 and block_width(q.shape[-1]) <= 128 else tiles.warps
    return Tiles(rows, keys, warps, tiles.stages)


@dataclass(frozen=True)
class DecodePlan:
    """How one token's attention is split.

    Attributes:
        tiles: of the kernel.
        pieces: of all key heads of a sequence; as many as key heads when none is split.
        split: pieces of a head; 0 for rings, whose heads have pieces by their length.
    """

    tiles: Tiles
    pieces: int
    split: int


def decode_plan(q: torch.Tensor, kv_heads: int, capacity: int, bits: int) -> DecodePlan:
    """Enough pieces to fill the device twice, of at least four tiles each, were the cache full. How full it
    is isn't known here, so each sequence shares its own length out among its pieces."""
    tiles = decode_tiles(q, kv_heads, bits)
    wanted = -(-2 * architecture(q)[1] // (q.shape[0] * kv_heads))
    split = max(1, min(wanted, -(-capacity // (4 * tiles.keys)), MOST_PIECES))
    return DecodePlan(tiles, split * kv_heads, split)


def ring_plan(q: torch.Tensor, kv_heads: int, slots: int, bits: int) -> DecodePlan:
    """Pieces over rings of unequal length, which only the device knows: enough to fill it twice, beside one
    for each head's remainder. They share the slots in use, at least four tiles each; surplus ones end at
    once."""
    tiles = decode_tiles(q, kv_heads, bits)
    wanted = -(-2 * architecture(q)[1] // q.shape[0])
    more = min(wanted, slots // (4 * tiles.keys))
    return DecodePlan(tiles, kv_heads + more if more > 1 else kv_heads, 0)


def decode_tiles(q: torch.Tensor, kv_heads: int, bits: int) -> Tiles:
    """The query heads of a group are the rows: dots take 16 at least."""
    rows = max(16, power_of_2(q.shape[1] // kv_heads))
    if q.dtype == torch.float32:
        return Tiles(rows, 32, 4, 1)
    width = block_width(q.shape[-1])
    if rows > 32 or width > 128:
        return Tiles(rows, 32, 4, 2)
    return Tiles(rows, 64, 4, 4 if bits == 4 else 3)
