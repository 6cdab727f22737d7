"""Which tiles ``linear_wna16`` uses: by arithmetic, or measured ones (``linear.tune``)."""

from __future__ import annotations

import functools
import itertools
import math

import torch

from autocomp.kernels.backend import WeightState
from autocomp.kernels.triton.launch import Table, Tiles, multiprocessors, power_of_two
from autocomp.quantize.scheme import Scheme

DENSE = Tiles(0, 0, 0, dense=True)
DENSE_TOKENS = 256
"""More rows than this go through the dense GEMM (a guess from bytes and FLOPs; ``tune`` measures)."""
TABLE = Table()


def split_tiles(rows: int) -> int:
    """Tiles of y that can be split along K: each has a counter, kept with the weight of N = ``rows``."""
    return 8 * math.ceil(rows / 64)


def choose_tiles(tokens: int, state: WeightState) -> Tiles:
    """Measured tiles for this case, else :func:`default_tiles`."""
    block, group = state.meta["block"], state.meta["group"]
    return _choose(tokens, state.shape, state.scheme, block, group, state.device)


def store_tiles(tokens: int, state: WeightState, tiles: Tiles) -> None:
    """Use and keep ``tiles`` for weights of this shape and scheme; a power of two of tokens shares them."""
    TABLE.set(_case(tokens, state.shape, state.scheme), tiles)
    _choose.cache_clear()


def _case(tokens: int, shape: tuple[int, int], scheme: Scheme) -> str:
    rows, columns = shape
    return f"wna16 {scheme.label.partition('o')[0]} {rows}x{columns} m{power_of_two(tokens, 1, 4096)}"


@functools.lru_cache(maxsize=8192)
def _choose(
    tokens: int, shape: tuple[int, int], scheme: Scheme, block: int, group: int, device: torch.device
) -> Tiles:
    measured = TABLE.get(_case(tokens, shape, scheme))
    return measured or default_tiles(tokens, shape, scheme.bits, block, group, multiprocessors(device))


def default_tiles(
    tokens: int, shape: tuple[int, int], bits: int, block: int, group: int, processors: int
) -> Tiles:
    """Tiles by arithmetic: enough programs to keep every multiprocessor loading, and parts of K only while
    the sums that they exchange stay small beside the weight."""
    rows, columns = shape
    if tokens > DENSE_TOKENS:
        return DENSE
    depth = 128 if block == 64 and group % 128 == 0 else block
    height, width = power_of_two(tokens, 8, 64), 64
    programs = math.ceil(rows / width) * math.ceil(tokens / height)
    steps = math.ceil(columns / depth)
    affordable = int(0.25 * columns * bits / 8 / (8 * tokens))  # parts are written and read, 4 bytes each
    split = max(1, min(4 * processors // programs, affordable, steps // 4))
    if programs > split_tiles(rows):
        split = 1
    return Tiles(height, width, depth, split, warps=4, stages=4 if height <= 32 else 3)


def candidates(tokens: int, state: WeightState) -> list[Tiles]:
    """Tiles worth timing for a case."""
    (rows, columns), block, group = state.shape, state.meta["block"], state.meta["group"]
    depths = [d for d in (32, 64, 128) if d >= block and group % d == 0]
    height = power_of_two(tokens, 8, 64)
    found = [DENSE] if tokens >= 32 else []
    for width, depth, split, stages in itertools.product((32, 64, 128), depths, (1, 2, 4, 8), (3, 5)):
        programs = math.ceil(rows / width) * math.ceil(tokens / height)
        if (split == 1 or programs <= split_tiles(rows)) and split * depth * 2 <= columns:
            found.append(Tiles(height, width, depth, split, warps=4, stages=stages))
    return found
