"""The Triton linears without a GPU: their numbers from the interpreter, how they refuse, their tiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autocomp.kernels.ops import random_weight
from autocomp.quantize.scheme import Scheme
from autocomp.testing.guards import guarded, guarded_allocations, untouched
from autocomp.testing.triton_aot import run_interpreted

pytest.importorskip("triton")


@pytest.mark.parametrize("name", ["triton_linear", "triton_experts"])
def test_numbers_in_the_interpreter(name: str) -> None:
    run_interpreted(Path(__file__).parent / "interpreted" / f"{name}.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs to be without a device")
def test_without_a_gpu_the_reasons_are_told_and_others_run() -> None:
    from autocomp.kernels import ops
    from autocomp.kernels.activations import linear_w8a8
    from autocomp.kernels.library import load_cuda
    from autocomp.kernels.triton.linear import TRITON, tune

    load_cuda()
    assert TRITON in ops.backends() and ops.choose(Scheme(4, 64), (64, 64), "cpu") is not TRITON
    assert "no CUDA device" in TRITON.supports(Scheme(4, 64), (64, 64), "cuda", 1)
    assert "run on cuda, not on cpu" in TRITON.supports(Scheme(4, 64), (64, 64), "cpu", 1)
    x, codes = torch.ones(3, 64), torch.ones(8, 64, dtype=torch.int8)
    assert linear_w8a8.choose(x, codes, torch.ones(8)) != "triton"
    state = TRITON.prepack(random_weight(Scheme(4, 32), (8, 64)), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="the weight is on cpu"):
        tune(state, 1)


def test_default_tiles_suit_the_shape() -> None:
    from autocomp.kernels.triton.linear_tiles import default_tiles, split_tiles

    for rows, columns in ((64, 64), (1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (49152, 576)):
        for tokens in (1, 7, 16, 64, 256):
            for block, group in ((64, 128), (64, 64), (32, 32), (32, 96)):
                tiles = default_tiles(tokens, (rows, columns), 4, block, group, 132)
                programs = -(-rows // tiles.features) * -(-tokens // tiles.tokens)
                assert group % tiles.depth == 0 and tiles.depth % block == 0 and tiles.split >= 1
                assert tiles.split == 1 or programs <= split_tiles(rows)
                assert tiles.split == 1 or 8 * tiles.split * tokens <= columns / 8
        assert default_tiles(257, (rows, columns), 4, 64, 128, 132).dense
    assert (
        default_tiles(1, (1024, 4096), 4, 64, 128, 132).split >= 8
    )  # 16 tiles alone would starve the device


def test_measured_tiles_are_kept_and_a_broken_file_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from autocomp.kernels.triton.launch import Table, Tiles

    first, second = Table(tmp_path / "a" / "t.json"), Table(tmp_path / "a" / "t.json")
    tiles = Tiles(8, 64, 128, split=4)
    first.set("one", tiles)
    second.set("two", Tiles(0, 0, 0, dense=True))
    assert Table(first.file).get("one") == tiles and second.get("one") == tiles and first.get("three") is None
    first.file.write_text("{broken")
    assert Table(first.file).get("one") is None and "delete the file" in caplog.text


def test_measured_tiles_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autocomp.kernels.triton import linear_tiles
    from autocomp.kernels.triton.launch import Table, Tiles
    from autocomp.kernels.triton.linear import TRITON

    state = TRITON.prepack(random_weight(Scheme(4, 64), (64, 256)), torch.device("cpu"))
    before = linear_tiles.choose_tiles(3, state)
    monkeypatch.setattr(linear_tiles, "TABLE", Table(tmp_path / "t.json"))
    measured = Tiles(8, 32, 64, split=2)
    linear_tiles.store_tiles(3, state, measured)
    assert linear_tiles.choose_tiles(4, state) == measured != before  # 3 and 4 share a bucket
    assert linear_tiles.choose_tiles(5, state) != measured
    linear_tiles._choose.cache_clear()
    found = linear_tiles.candidates(3, state)
    assert found and all(64 % t.depth == 0 and (t.split == 1 or 2 * t.depth * t.split <= 256) for t in found)


@pytest.mark.parametrize("label", ["w2g64", "w3g64a", "w4g32", "w6g64", "w8"])
def test_a_packed_weight_holds_what_the_scheme_says(label: str) -> None:
    from autocomp.kernels.triton.linear import TRITON

    scheme = Scheme.parse(label)
    state = TRITON.prepack(random_weight(scheme, (320, 512)), torch.device("cpu"))
    held = sum(t.untyped_storage().nbytes() for t in state.tensors.values())
    assert held == state.nbytes <= 1.05 * scheme.weight_bytes(320, 512)


def test_supports_answers_in_words() -> None:
    from autocomp.kernels.triton.linear import TRITON
    from autocomp.testing.kernels import CHECKS

    CHECKS["refusal"](TRITON, "cuda")


@pytest.mark.parametrize("make", [torch.empty, torch.zeros])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.uint8])
def test_guards_see_what_is_written_beside_a_buffer(
    make: Callable[..., torch.Tensor], dtype: torch.dtype
) -> None:
    name = make.__name__
    with guarded_allocations():
        getattr(torch, name)(3, 4, dtype=dtype).fill_(1)
    for place in (-1, 12):
        with pytest.raises(AssertionError, match=r"written beside buffers: \[3, 4\]"), guarded_allocations():
            inside = getattr(torch, name)(3, 4, dtype=dtype)
            inside.as_strided((1,), (1,), inside.storage_offset() + place).fill_(1)
    kept = guarded(torch.ones(5, dtype=dtype))
    assert untouched(kept)
    kept.as_strided((1,), (1,), kept.storage_offset() + 5).fill_(1)
    assert not untouched(kept)
