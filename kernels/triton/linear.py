"""``linear_wna16`` in Triton: 16-bit activations, weights of 2, 3, 4, 5, 6 or 8 bits, on CUDA.

Few rows of activations are multiplied straight from the packed weight, with the bias and a low-rank
correction added on the way out. Many rows (prefill) go through a piece of the weight, dequantized to the
activations' dtype, and the dense GEMM. Everything is deterministic: no floating-point atomics.
"""

from __future__ import annotations

import functools
import logging
import math
from types import ModuleType

import torch
import torch.nn.functional as F

from autocomp.kernels.backend import WeightState
from autocomp.kernels.triton.launch import FP_FUSION, INTERPRETED, Tiles, power_of_two, unavailable
from autocomp.kernels.triton.linear_tiles import candidates, choose_tiles, split_tiles, store_tiles
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

logger = logging.getLogger("autocomp")
PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}
"""Bits of a code -> its low and high part in memory."""
DENSE_WEIGHTS = 1 << 24
"""Weights dequantized at a time for the dense GEMM (32 MiB in 16 bits: stays in the L2 of a large GPU)."""
RANKS = (16, 32, 64, 128)


@functools.cache
def _kernels() -> ModuleType:
    from autocomp.kernels.triton import linear_kernels

    return linear_kernels


def block_features(group: int) -> int:
    """Features in a block of the layout: a tile never reaches over two groups (0: the row is one)."""
    return 64 if group % 64 == 0 else 32


class TritonBackend:
    """Packed weights on CUDA in our own layout; see ``linear_kernels`` for it.

    Tensors of a state: ``low``, ``high`` int32, ``scale``, ``zero`` ``[G, N]``, ``counters`` int32 (zero
    between launches), and the outliers as rows of (column, value minus what the codes say). One state must
    not be used on two CUDA streams at the same time, because of the counters.
    """

    name = "triton"
    native = True
    probe = (Scheme(3, 64, symmetric=False, outliers=0.5), (80, 200))

    def supports(self, scheme: Scheme, shape: tuple[int, int], device_type: str, tokens: int) -> str:
        del tokens
        rows, columns = shape
        if device_type != ("cpu" if INTERPRETED else "cuda"):
            return f"the Triton kernels run on cuda, not on {device_type}"
        if unavailable():
            return unavailable()
        if scheme.is_dense:
            return "w16 is not a packed weight; use a plain linear"
        if scheme.group % 32:
            return f"it needs groups in multiples of 32 (or of a row); got {scheme.label}"
        if min(shape) < 1 or rows * columns >= 2**32:
            return f"it needs 1 to 2**32 - 1 weights (offsets are 32 bits); got N={rows}, K={columns}"
        return ""

    def prepack(self, weight: QuantizedTensor, device: torch.device) -> WeightState:
        low, high = PLANES[weight.scheme.bits]
        codes = weight.codes.to(device)
        block = block_features(weight.scheme.group)
        tensors = {
            "low": pack_plane(codes & (2**low - 1), low, block),
            "scale": weight.scale.to(device).T.contiguous(),
            "counters": torch.zeros(split_tiles(weight.shape[0]), dtype=torch.int32, device=device),
        }
        if high:
            tensors["high"] = pack_plane(codes >> low, high, block)
        if weight.zero is not None:
            tensors["zero"] = weight.zero.to(device).T.contiguous()
        tensors |= _outlier_rows(weight, device)
        meta = {
            "low": low,
            "high": high,
            "block": block,
            "group": weight.scheme.group or padded_row(weight.shape[1]),
        }
        return WeightState(self, weight.scheme, weight.shape, tensors, meta)

    def linear(
        self,
        x: torch.Tensor,
        state: WeightState,
        bias: torch.Tensor | None = None,
        low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
        tiles: Tiles | None = None,
    ) -> torch.Tensor:
        """``x W^T (+ (x a^T) b^T) (+ bias)``.

        Args:
            x: ``[M, K]`` contiguous, bfloat16, float16 or float32.
            bias: ``[N]``, any float dtype.
            low_rank: ``a [r, K]`` and ``b [N, r]`` in the dtype of ``x``.
            tiles: instead of the ones chosen for this shape.

        Returns:
            ``[M, N]`` in the dtype of ``x``.
        """
        if INTERPRETED and x.dtype is torch.bfloat16:  # the interpreter computes nonsense in bfloat16
            wide = None if low_rank is None else (low_rank[0].float(), low_rank[1].float())
            return self.linear(x.float(), state, bias, wide, tiles).bfloat16()
        tiles = tiles or choose_tiles(len(x), state)
        if tiles.dense:
            return _dense(x, state, bias, low_rank)
        y = x.new_empty(len(x), state.shape[0])
        _launch(x, state, bias, low_rank, tiles, y)
        if "outlier_start" in state.tensors:
            _add_outliers(x, state, y)
        return y

    def rows(self, index: torch.Tensor, state: WeightState) -> torch.Tensor:
        out = torch.empty(len(index), state.shape[1], dtype=torch.float32, device=state.device)
        if len(index):
            _dequantize(state, out, index=index)
            if "outlier_start" in state.tensors:
                _write_outliers(out, state, index)
        return out


def padded_row(columns: int) -> int:
    """A group that holds any row, as a multiple of every tile depth."""
    return -(-columns // 128) * 128


def pack_plane(codes: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """uint8 codes ``[N, K]`` of ``bits`` bits -> int32 ``[ceil(K / block), N, block * bits / 32]``.

    Per word, even codes fill the low half and odd ones the high half, each from its lowest bit.
    """
    rows, columns = codes.shape
    per = 32 // bits
    packed = []
    for first in range(0, columns, block):  # piecewise: the wide intermediate is 8 bytes a code
        piece = F.pad(codes[:, first : first + block], (0, max(0, first + block - columns)))
        words = piece.view(rows, block // per, per // 2, 2).to(torch.int64)
        shift = torch.arange(per, device=codes.device).view(per // 2, 2)
        shift = bits * (shift // 2) + 16 * (shift % 2)
        packed.append((words << shift).sum(dim=(2, 3)).to(torch.int32))
    return torch.stack(packed)


def _outlier_rows(weight: QuantizedTensor, device: torch.device) -> dict[str, torch.Tensor]:
    """Outliers by row: start int32 ``[N + 1]``, column int32, change float32 (value minus what codes say)."""
    if weight.outlier_index is None or weight.outlier_value is None or not len(weight.outlier_index):
        return {}
    rows, columns = weight.shape
    position = weight.outlier_index.long()
    row, column = position // columns, position % columns
    group = column // (weight.scheme.group or columns)
    zero = 2.0 ** (weight.scheme.bits - 1) if weight.zero is None else weight.zero[row, group].float()
    told = (weight.codes[row, column].float() - zero) * weight.scale[row, group].float()
    start = torch.searchsorted(row, torch.arange(rows + 1, device=row.device))
    return {
        "outlier_start": start.to(device, torch.int32),
        "outlier_column": column.to(device, torch.int32),
        "outlier_change": (weight.outlier_value.float() - told).to(device),
    }


def tune(state: WeightState, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Tiles:
    """Time the tiles that could suit this weight and so many rows of activations, with a cold cache, and
    store the fastest for all weights of this shape and scheme on this GPU. It compiles: up to a minute.

    Raises:
        RuntimeError: there is no GPU to time on.
    """
    if state.device.type != "cuda":
        raise RuntimeError(f"tuning times kernels on a CUDA device; the weight is on {state.device}")
    from triton.testing import do_bench

    x = torch.randn(tokens, state.shape[1], device=state.device, dtype=dtype)
    wanted = _dense(x, state, None, None).float()
    best, least = choose_tiles(tokens, state), math.inf
    for tiles in candidates(tokens, state):
        try:
            call = functools.partial(TRITON.linear, x, state, tiles=tiles)
            y, milliseconds = call(), do_bench(call, return_mode="median")
        except Exception as error:  # out of shared memory or registers
            logger.debug("tiles %s can't run: %s", tiles, error)
            continue
        if milliseconds < least and (y.float() - wanted).norm() <= 2e-2 * wanted.norm():
            best, least = tiles, milliseconds
    store_tiles(tokens, state, best)
    return best


def _launch(
    x: torch.Tensor,
    state: WeightState,
    bias: torch.Tensor | None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None,
    tiles: Tiles,
    y: torch.Tensor,
) -> None:
    (rows, columns), tokens, parts = state.shape, len(x), state.tensors
    grid = (math.ceil(rows / tiles.features), tiles.split, math.ceil(tokens / tiles.tokens))
    if tiles.split > 1 and grid[0] * grid[2] > len(parts["counters"]):
        many, most = grid[0] * grid[2], len(parts["counters"])
        raise ValueError(f"{many} tiles can't be split (limit {most}); use split=1 or larger tiles")
    hidden = up = partial = None
    rank = 0
    if low_rank is not None:
        hidden, up, rank = _hidden(x, *low_rank)
    if tiles.split > 1:
        partial = torch.empty(tiles.split, tokens, rows, dtype=torch.float32, device=x.device)
    _kernels().linear_kernel[grid](
        x, parts["low"], parts.get("high"), parts["scale"], parts.get("zero"), bias, hidden, up, partial,
        parts["counters"], y, tokens, rows, columns, state.meta["group"],
        LOW=state.meta["low"], HIGH=state.meta["high"], KB=state.meta["block"], RANK=rank,
        ASM=not INTERPRETED, BM=tiles.tokens, BN=tiles.features, BK=tiles.depth, SPLIT=tiles.split,
        num_warps=tiles.warps, num_stages=tiles.stages, **FP_FUSION,
    )  # fmt: skip


def _hidden(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """``x a^T`` and ``b``, their rank padded with zeros to one that the kernel takes."""
    rank = next((r for r in RANKS if r >= len(a)), 0)
    if not rank:
        raise ValueError(f"a low-rank part of rank {len(a)} is not fused; use rank <= {RANKS[-1]}")
    hidden, up = F.linear(x, a), b
    if rank != len(a):
        hidden, up = F.pad(hidden, (0, rank - len(a))), F.pad(b, (0, rank - len(a)))
    return hidden, up.contiguous(), rank


def _dequantize(
    state: WeightState, out: torch.Tensor, index: torch.Tensor | None = None, first: int = 0
) -> None:
    """Rows ``index`` (or ``first``, ``first + 1``, ...) of the weight, less outliers, into ``out [T, K]``."""
    parts, meta = state.tensors, state.meta
    depth = 64 if meta["block"] == 64 else 32
    tall = min(64, power_of_two(len(out), 1, 64))
    grid = (math.ceil(len(out) / tall), math.ceil(state.shape[1] / depth))
    _kernels().dequantize_kernel[grid](
        parts["low"], parts.get("high"), parts["scale"], parts.get("zero"), index, out, first, len(out),
        *state.shape, meta["group"], LOW=meta["low"], HIGH=meta["high"], KB=meta["block"], BN=tall, BK=depth,
        num_warps=4, **FP_FUSION,
    )  # fmt: skip


def _add_outliers(x: torch.Tensor, state: WeightState, y: torch.Tensor) -> None:
    rows, columns = state.shape
    start, column = state.tensors["outlier_start"], state.tensors["outlier_column"]
    change = state.tensors["outlier_change"]
    grid = (math.ceil(rows / 16), len(x))
    _kernels().outlier_kernel[grid](
        x, start, column, change, y, rows, columns, BR=16, BLOCK=16, num_warps=2, **FP_FUSION
    )


def _write_outliers(
    out: torch.Tensor, state: WeightState, index: torch.Tensor | None = None, first: int = 0
) -> None:
    """Add the outliers' changes to dequantized rows, which :func:`_dequantize` has put into ``out``."""
    start, column = state.tensors["outlier_start"], state.tensors["outlier_column"]
    _kernels().outlier_rows_kernel[(len(out),)](
        index, first, start, column, state.tensors["outlier_change"], out, state.shape[1],
        BLOCK=64, num_warps=1, **FP_FUSION,
    )  # fmt: skip


def _dense(
    x: torch.Tensor,
    state: WeightState,
    bias: torch.Tensor | None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """The product through the dense GEMM, some rows of the weight at a time."""
    rows, columns = state.shape
    height = max(1, DENSE_WEIGHTS // columns)
    y = x.new_empty(len(x), rows)
    piece = x.new_empty(min(height, rows), columns)
    for first in range(0, rows, height):
        part = piece[: min(height, rows - first)]
        _dequantize(state, part, first=first)
        if "outlier_start" in state.tensors:
            _write_outliers(part, state, first=first)
        torch.mm(x, part.T, out=y[:, first : first + len(part)])
    if low_rank is not None:
        y.addmm_(F.linear(x, low_rank[0]), low_rank[1].T)
    if bias is not None:
        y.add_(bias)
    return y


TRITON = TritonBackend()
