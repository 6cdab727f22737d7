"""Numbers of ``linear_wna16`` in Triton's interpreter. Run by ``test_triton_linear``, in its own process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from autocomp.kernels.backend import WeightState
from autocomp.kernels.ops import random_weight
from autocomp.kernels.triton.launch import INTERPRETED
from autocomp.quantize.scheme import Scheme
from autocomp.testing.guards import guarded, guarded_allocations, untouched

assert INTERPRETED, "these need TRITON_INTERPRET=1: run test_triton_linear.py"
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def guards() -> Iterator[None]:
    """Results and workspaces lie between guard zones too."""
    with guarded_allocations():
        yield


def packed(scheme: str, shape: tuple[int, int]) -> tuple[WeightState, torch.Tensor]:
    """A random weight's state, every tensor of it guarded, and its dequantized float64 matrix."""
    from autocomp.kernels.triton.linear import TritonBackend

    weight = random_weight(Scheme.parse(scheme), shape)
    state = TritonBackend().prepack(weight, torch.device("cpu"))
    tensors = {name: guarded(tensor) for name, tensor in state.tensors.items()}
    guarded_state = WeightState(state.backend, state.scheme, state.shape, tensors, state.meta)
    return guarded_state, weight.dequantize(torch.float64)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


CASES = [
    ("w2g64", (70, 128)), ("w3g64", (65, 192)), ("w3g32a", (17, 72)), ("w4g32", (33, 200)),
    ("w4g64a", (64, 576)), ("w4g128", (130, 256)), ("w4g128a", (40, 320)), ("w4", (17, 100)),
    ("w5g64", (33, 130)), ("w6g64a", (20, 128)), ("w6g96a", (20, 200)), ("w8", (50, 96)),
    ("w8g64a", (50, 130)), ("w4g64o0.5", (66, 200)), ("w3g64ao2", (40, 136)),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "shape"), CASES, ids=[f"{s}-{n}x{k}" for s, (n, k) in CASES])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_linear_is_the_exact_product(scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    state, dense = packed(scheme, shape)
    for tokens in (1, 9, 70) if shape[0] < 40 else (1, 9):
        x = guarded(random(tokens, shape[1], dtype=dtype, seed=tokens))
        bias = guarded(random(shape[0], dtype=dtype, seed=2))
        y = state.backend.linear(x, state, bias)
        assert y.shape == (tokens, shape[0]) and y.dtype == dtype
        assert error(y, x.double() @ dense.T + bias.double()) <= BOUND[dtype], tokens
    assert untouched(x, bias, *state.tensors.values())


def tiles(**changes: int) -> object:
    from autocomp.kernels.triton.launch import Tiles

    return Tiles(**{"tokens": 16, "features": 32, "depth": 32, "split": 1} | changes)


@pytest.mark.parametrize(
    "shape", [{}, {"split": 3}, {"split": 7}, {"tokens": 8, "depth": 64, "split": 2}], ids=str
)
@pytest.mark.parametrize("tokens", [3, 17])
def test_every_cut_gives_the_same_product(shape: dict[str, int], tokens: int) -> None:
    state, dense = packed("w4g64a", (48, 232))
    x = guarded(random(tokens, 232))
    found = [state.backend.linear(x, state, tiles=tiles(**shape)) for _ in range(2)]
    assert error(found[0], x.double() @ dense.T) <= BOUND[torch.float32]
    assert torch.equal(*found)  # repeats bit for bit, and so the counters are back at zero
    assert not state.tensors["counters"].any() and untouched(state.tensors["counters"])


@pytest.mark.parametrize("rank", [16, 5, 40])
@pytest.mark.parametrize("split", [1, 3])
def test_the_low_rank_part_is_added_once(rank: int, split: int) -> None:
    state, dense = packed("w3g32", (40, 96))
    x, a, b = (guarded(random(*s, seed=s[0])) for s in [(9, 96), (rank, 96), (40, rank)])
    bias = guarded(random(40, seed=3))
    y = state.backend.linear(x, state, bias, (a, b), tiles(split=split))
    wanted = x.double() @ (dense + b.double() @ a.double()).T + bias.double()
    assert error(y, wanted) <= BOUND[torch.float32]


@pytest.mark.parametrize("scheme", ["w4g64a", "w3g32ao2", "w8"])
@pytest.mark.parametrize("height", [1000, 24])
def test_many_rows_go_through_the_dense_product(
    scheme: str, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autocomp.kernels.triton import linear, linear_tiles

    monkeypatch.setattr(linear, "DENSE_WEIGHTS", height * 136)
    monkeypatch.setattr(linear, "choose_tiles", lambda tokens, state: linear_tiles.DENSE)
    state, dense = packed(scheme, (56, 136))
    x, bias = guarded(random(20, 136)), guarded(random(56, seed=3))
    a, b = random(4, 136, seed=4), random(56, 4, seed=5)
    y = state.backend.linear(x, state, bias, (a, b))
    wanted = x.double() @ (dense + b.double() @ a.double()).T + bias.double()
    assert error(y, wanted) <= BOUND[torch.float32]


@pytest.mark.parametrize("scheme", ["w2g32", "w3g64a", "w4g64o1", "w5g32", "w8"])
def test_rows_are_the_dequantized_ones(scheme: str) -> None:
    state, dense = packed(scheme, (75, 130))
    index = guarded(torch.tensor([74, 0, 3, 3, 64]))
    rows = state.backend.rows(index, state)
    assert rows.dtype == torch.float32 and error(rows, dense[index]) <= 1e-6
    assert state.backend.rows(index[:0], state).shape == (0, 130)


def test_bfloat16_is_computed_in_float32_here() -> None:
    state, dense = packed("w4g64", (32, 128))
    x = random(5, 128).bfloat16()
    y = state.backend.linear(x, state)
    assert y.dtype == torch.bfloat16 and error(y, x.double() @ dense.T) <= 4e-3


def test_extreme_codes_and_scales() -> None:
    """All zeros, all ones, a scale of zero and a large one."""
    from dataclasses import replace

    from autocomp.kernels.triton.linear import TritonBackend

    for label in ("w2g32a", "w3g32a", "w5g32a", "w8g32a"):
        weight = random_weight(Scheme.parse(label), (8, 64))
        codes, scale = weight.codes.clone(), weight.scale.clone()
        codes[0], codes[1], scale[2], scale[3] = 0, 2**weight.scheme.bits - 1, 0, 4.0
        weight = replace(weight, codes=codes, scale=scale)
        state = TritonBackend().prepack(weight, torch.device("cpu"))
        for dtype, bound in BOUND.items():
            x = random(2, 64, dtype=dtype)
            exact = x.double() @ weight.dequantize(torch.float64).T
            y = state.backend.linear(x, state).double()
            assert ((y - exact).norm(dim=0) <= bound * exact.norm(dim=0)).all(), (label, dtype)


def test_too_many_tiles_to_split_is_an_error() -> None:
    state, _ = packed("w4g32", (40, 64))
    with pytest.raises(ValueError, match="use split=1"):
        state.backend.linear(random(130, 64), state, tiles=tiles(split=2, tokens=8, features=64))
    with pytest.raises(ValueError, match="rank <= 128"):
        state.backend.linear(random(1, 64), state, low_rank=(random(129, 64), random(40, 129)))
