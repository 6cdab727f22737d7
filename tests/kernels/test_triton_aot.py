"""The Triton linears, cross-compiled for three GPU generations: they fit, and use the matrix units."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch

from autocomp.testing.triton_aot import ARCHITECTURES, Build, check_build, compile_all, compile_kernel

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from autocomp.kernels.triton import activations_kernels, linear_kernels, moe_kernels
from autocomp.kernels.triton.linear import PLANES

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
I8, U8, I32, I64 = torch.int8, torch.uint8, torch.int32, torch.int64
N, K = 4096, 4096


def linear(
    bits: int, tokens: int, depth: int, dtype: torch.dtype = BF16, *, group: int = 128, split: int = 4,
    rank: int = 0, zero: bool = True, stages: int = 4, width: int = 64,
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """A launch of ``linear_kernel`` as ``linear._launch`` makes it."""
    low, high = PLANES[bits]
    low_rank = (dtype, dtype) if rank else (None, None)
    pointers = (dtype, I32, I32 if high else None, BF16, U8 if zero else None, BF16, *low_rank)
    partial_sums = (F32 if split > 1 else None, I32, dtype)
    options = {"LOW": low, "HIGH": high, "KB": 64 if group % 64 == 0 else 32, "RANK": rank, "ASM": True}
    options |= {"BM": tokens, "BN": width, "BK": depth, "SPLIT": split, "num_stages": stages}
    return linear_kernels.linear_kernel, (*pointers, *partial_sums, tokens, N, K, group), options


def experts(bits: int, ordered: bool, tokens: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    low, high = PLANES.get(bits, (16, 0))
    blocks = (I32,) * 4 if ordered else (None,) * 4
    numbers = (60, 8, N, K, 128, 32, N * K // 8, N * K // 32, 2)
    options = {"LOW": low, "HIGH": high, "KB": 64, "ASM": True, "BM": tokens, "BN": 64}
    options |= {"BK": 128 if bits < 16 else 64, "num_stages": 3}
    arguments = (BF16, I32 if bits < 16 else BF16, BF16, U8, F32, I64, I32, *blocks, *numbers)
    return moe_kernels.experts_kernel, arguments, options


PRODUCTS = {
    "w4-decode": linear(4, 8, 128),
    "w4-decode-f16": linear(4, 8, 64, F16, group=64, split=8, zero=False),
    "w4-batch": linear(4, 64, 128, stages=3, split=1),
    "w4-g32": linear(4, 16, 32, group=32),
    "w2-decode": linear(2, 8, 128),
    "w3-decode": linear(3, 8, 64, group=64),
    "w3-batch": linear(3, 64, 128, stages=3, split=2),
    "w6-decode": linear(6, 8, 128),
    "w8-decode": linear(8, 16, 128),
    "w4-low-rank": linear(4, 16, 128, rank=64),
    "experts-w4-few": experts(4, False, 8),
    "experts-w3-sorted": experts(3, True, 64),
    "experts-dense": experts(16, True, 32),
    "w8a8-decode": (
        activations_kernels.w8a8_kernel, (I8, I8, F32, F32, BF16, BF16, 8, N, K),
        {"BM": 8, "BN": 64, "BK": 128, "num_stages": 4},
    ),
    "w8a8-prefill": (
        activations_kernels.w8a8_kernel, (I8, I8, F32, F32, None, BF16, 512, N, K),
        {"BM": 128, "BN": 128, "BK": 128, "num_stages": 3, "num_warps": 8},
    ),
    "w8a8-narrow": (
        activations_kernels.w8a8_kernel, (I8, I8, F32, F32, None, BF16, 512, N, K),
        {"BM": 128, "BN": 32, "BK": 128, "num_stages": 3},
    ),
    "w4a8": (
        activations_kernels.w4a8_kernel, (I8, I32, BF16, U8, F32, BF16, BF16, 64, N, K, K // 8, 32, 128),
        {"BM": 64, "BN": 64, "BK": 128, "num_stages": 3},
    ),
}  # fmt: skip
OTHERS = {
    "float32": linear(4, 8, 64, F32, group=64),
    "dequantize": (
        linear_kernels.dequantize_kernel, (I32, I32, BF16, U8, None, BF16, 0, N, N, K, 128),
        {"LOW": 2, "HIGH": 1, "KB": 64, "BN": 64, "BK": 64},
    ),
    "rows": (
        linear_kernels.dequantize_kernel, (I32, None, BF16, None, I64, F32, 0, 7, N, K, 128),
        {"LOW": 4, "HIGH": 0, "KB": 64, "BN": 8, "BK": 64},
    ),
    "outliers": (
        linear_kernels.outlier_kernel, (BF16, I32, I32, F32, BF16, N, K),
        {"BR": 16, "BLOCK": 16, "num_warps": 2},
    ),
    "outlier-rows": (
        linear_kernels.outlier_rows_kernel, (I64, 0, I32, I32, F32, F32, K), {"BLOCK": 64, "num_warps": 1},
    ),
    "quantize": (
        activations_kernels.quantize_rows_kernel, (BF16, I8, F32, None, K),
        {"TOP": 127.0, "SMALLEST": 1e-30, "BLOCK": 2048, "enable_fp_fusion": False},
    ),
}  # fmt: skip


def build_all(cases: dict[str, Any], architectures: tuple[int, ...]) -> dict[tuple[str, int], Build]:
    keys = [(name, architecture) for name in cases for architecture in architectures]
    work = [partial(compile_kernel, cases[n][0], a, *cases[n][1], **cases[n][2]) for n, a in keys]
    return dict(zip(keys, compile_all(work)))


@pytest.fixture(scope="module")
def products() -> dict[tuple[str, int], Build]:
    return build_all(PRODUCTS, ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_fit_and_use_the_matrix_units(
    products: dict[tuple[str, int], Build], name: str, architecture: int
) -> None:
    # Older Tritons (3.6) give tiles 8 wide, and int8 on Blackwell, to the units' former instructions.
    older = PRODUCTS[name][2]["BM"] == 8 or ("a8" in name and architecture == 100) or "narrow" in name
    check_build(products[name, architecture], mma="any" if older else "best")


@pytest.mark.parametrize("name", PRODUCTS)
def test_weights_do_not_pass_through_shared_memory_again(
    products: dict[tuple[str, int], Build], name: str
) -> None:
    """On Hopper the dequantized weights are the left operand, in registers: nothing is stored in the loop."""
    if name.startswith(("w2", "w3", "w4", "w6", "w8-")) and "a8" not in name and "rank" not in name:
        ptx = products[name, 90].ptx
        product = "wgmma.mma_async" if "wgmma.mma_async" in ptx else "mma.sync"
        stores = ptx[: ptx.rindex(product)].count("st.shared")
        assert stores <= 4, f"{name}: {stores} stores to shared memory before the last product"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_kernels_fit(architecture: int) -> None:
    for build in build_all(OTHERS, (architecture,)).values():
        check_build(build, mma="none")


def test_the_harness_finds_what_does_not_fit() -> None:
    kernel, arguments, options = linear(4, 64, 64, F16)
    build = compile_kernel(kernel, 80, *arguments, **options, maxnreg=40)
    with pytest.raises(AssertionError, match="smaller tiles or more warps"):
        check_build(build)
    with pytest.raises(AssertionError, match="does not use wgmma"):
        check_build(build, mma="wgmma", spill=1 << 20)
    with pytest.raises(AssertionError, match="where none are wanted"):
        check_build(build, mma="none", spill=1 << 20)
    with pytest.raises(AssertionError, match="shared memory; make the tiles smaller"):
        check_build(build, shared=0)
    with pytest.raises(TypeError, match=r"missing or unknown: .*BK"):
        compile_kernel(kernel, 80, *arguments, **{k: v for k, v in options.items() if k != "BK"})
