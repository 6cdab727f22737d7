"""Random arguments of the attention operators: for the self-checks, the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from autocomp.kernels.attention_reference import cache_entries, kv_quantize

Arguments = tuple[Any, ...]


class Cases:
    """Draws arguments on ``device`` in ``dtype``; the same seed gives the same ones.

    Sizes are named as in the operators: ``batch, heads, kv_heads, tokens, dim``.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def integers(self, values: Sequence[int], count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """``count`` of the values, over and over."""
        repeated = [values[i % len(values)] for i in range(count)]
        return torch.tensor(repeated, dtype=dtype, device=self.device)

    def qkv(self, batch: int, heads: int, kv_heads: int, tokens: int, dim: int) -> Arguments:
        return tuple(self.normal(batch, h, tokens, dim) for h in (heads, kv_heads, kv_heads))

    def decode_attention_kv(
        self,
        sizes: tuple[int, int, int, int, int],
        bits: tuple[int, int],
        lengths: Sequence[int],
        softcap: float = 0.0,
        window: int = 0,
    ) -> Arguments:
        """``sizes``: batch, heads, key heads, capacity, dim. Values off zero, so that minima matter."""
        batch, heads, kv_heads, tokens, dim = sizes
        q, k, v = self.normal(batch, heads, 1, dim), *self.qkv(batch, kv_heads, kv_heads, tokens, dim)[1:]
        cache = (*kv_quantize(k + 0.5, bits[0]), *kv_quantize(v - 0.25, bits[1]))
        return (q, *cache, self.integers(lengths, batch), *bits, dim**-0.5, softcap, window)

    def rings(
        self, sizes: tuple[int, int, int], bits: tuple[int, int], window: Sequence[int], sink: Sequence[int]
    ) -> tuple[Arguments, Arguments, tuple[int, int]]:
        """A full cache, where its heads lie, and its bits. ``sizes``: batch, key heads, dim; ``bits``: 16
        stands for plain numbers of the dtype."""
        batch, kv_heads, dim = sizes
        windows, sinks = self.integers(window, kv_heads), self.integers(sink, kv_heads)
        head_start = torch.zeros(kv_heads + 1, dtype=torch.int64, device=self.device)
        head_start[1:] = (windows + sinks).cumsum(0)
        key_bits, value_bits = (n if n < 16 else 8 * self.dtype.itemsize for n in bits)
        k, v = (self.normal(batch, int(head_start[-1]), dim) for _ in range(2))
        k, *k_factors = cache_entries(k + 0.5, key_bits, self.dtype)
        v, *v_factors = cache_entries(v - 0.25, value_bits, self.dtype)
        return (k, v, *k_factors, *v_factors), (head_start, windows, sinks), (key_bits, value_bits)

    def decode_attention_cache(
        self,
        sizes: tuple[int, int, int, int],
        bits: tuple[int, int],
        window: Sequence[int],
        sink: Sequence[int],
        lengths: Sequence[int],
        softcap: float = 0.0,
    ) -> Arguments:
        """``sizes``: batch, heads, key heads, dim; see ``rings``."""
        batch, heads, kv_heads, dim = sizes
        cache, where, widths = self.rings((batch, kv_heads, dim), bits, window, sink)
        q = self.normal(batch, heads, 1, dim)
        return (q, *cache, *where, self.integers(lengths, batch), *widths, dim**-0.5, softcap)

    def cache_append(
        self,
        sizes: tuple[int, int, int],
        bits: tuple[int, int],
        window: Sequence[int],
        sink: Sequence[int],
        positions: Sequence[int],
    ) -> Arguments:
        """``sizes``: batch, key heads, dim; see ``rings``."""
        cache, where, widths = self.rings(sizes, bits, window, sink)
        new = self.normal(*sizes), self.normal(*sizes)
        return (*cache, *new, *where, self.integers(positions, sizes[0]), *widths)

    def attention_spans(
        self, sizes: tuple[int, int, int, int, int], window: Sequence[int], sink: Sequence[int]
    ) -> Arguments:
        heads, dim = sizes[1], sizes[4]
        spans = (self.integers(window, heads), self.integers(sink, heads))
        return (*self.qkv(*sizes), *spans, dim**-0.5)

    def attention_window_residual(
        self,
        sizes: tuple[int, int, int, int, int],
        half_window: Sequence[int],
        mode: Sequence[int],
        prefix: int = 0,
        residual: bool = True,
    ) -> Arguments:
        batch, heads, _, tokens, dim = sizes
        held = self.normal(batch, heads, tokens, dim) if residual else None
        modes = self.integers(mode, heads)
        return (*self.qkv(*sizes), self.integers(half_window, heads), prefix, held, modes, None)

    def attention_block_sparse(
        self, sizes: tuple[int, int, int, int, int], block: int, density: float, ordered: bool = True
    ) -> Arguments:
        """Each row keeps about ``density`` of its blocks, the diagonal one always, except that the first row
        of the first head has none."""
        _, heads, _, tokens, _ = sizes
        blocks = -(-tokens // block)
        shape = (heads, blocks, blocks)
        kept = torch.rand(shape, generator=self.generator, device=self.device) < density
        kept |= torch.eye(blocks, dtype=torch.bool, device=self.device)
        kept[0, 0] = False
        ends = kept.sum(-1).flatten().cumsum(0).view(heads, blocks).int()
        first = torch.cat([ends.new_zeros(1, 1), ends[:-1, -1:]])
        col = kept.nonzero()[:, 2].int()
        order = None
        if ordered:
            drawn = torch.rand(heads, tokens, generator=self.generator, device=self.device)
            order = drawn.argsort(dim=-1).int()
        return (*self.qkv(*sizes), torch.cat([first, ends], dim=1), col, block, order, None)


SMALL: dict[str, tuple[Callable[[Cases], Arguments], ...]] = {
    "kv_quantize": (lambda c: (c.normal(2, 2, 33, 64), 4),),
    "decode_attention_kv": (lambda c: c.decode_attention_kv((2, 8, 2, 600, 64), (4, 8), [77, 600], 20.0),),
    "attention_spans": (lambda c: c.attention_spans((1, 4, 2, 300, 64), [300, 16, 100, 1], [0, 4]),),
    "decode_attention_cache": (
        lambda c: c.decode_attention_cache((2, 8, 4, 64), (16, 16), [40, 700], [4, 0, 9], [800, 33]),
        lambda c: c.decode_attention_cache((2, 8, 4, 64), (8, 4), [40, 700], [4, 0, 9], [800, 33], 20.0),
    ),
    "cache_append": (
        lambda c: c.cache_append((2, 3, 64), (16, 16), [7, 30, 0], [2, 40], [45, 3]),
        lambda c: c.cache_append((2, 3, 64), (8, 4), [7, 30, 0], [2, 40], [45, 3]),
    ),
    "attention_window_residual": (
        lambda c: c.attention_window_residual((1, 4, 4, 200, 64), [10, 50, 20, 0], [0, 1, 2, 3], prefix=17),
    ),
    "attention_block_sparse": (lambda c: c.attention_block_sparse((1, 4, 4, 250, 64), 64, 0.4),),
}
"""Small cases of each operator."""
