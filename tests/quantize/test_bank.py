"""The layer bank: content keys, bounds, and a disk that may be full, damaged or shared."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

from autocomp.quantize import bank as bank_module
from autocomp.quantize.bank import LayerBank, default_folder, tensor_hash
from autocomp.quantize.rounding import quantize
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

SCHEME = Scheme.parse("w3g32ao0.5")
ROWS, COLUMNS = 16, 64


def entry(seed: int = 0, scheme: Scheme = SCHEME) -> QuantizedTensor:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return quantize(weight, scheme)


def never() -> QuantizedTensor:
    raise AssertionError("it was built again")


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    one, other = a.to_state(), b.to_state()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def entry_bytes() -> int:
    found = LayerBank()
    found.get("k", SCHEME, entry)
    return found.memory_bytes


def test_keys_depend_on_content_and_recipe_alone() -> None:
    weight = torch.randn(8, 32)
    elsewhere = torch.cat([weight, weight])[8:]  # the same numbers in other memory, as a view
    assert tensor_hash(weight) == tensor_hash(elsewhere) == tensor_hash(weight.T.contiguous().T)
    others = [weight.T, weight.reshape(16, 16), weight.bfloat16(), weight + 1e-3]
    assert len({tensor_hash(t) for t in [weight, *others]}) == 5
    key = LayerBank.key(tensor_hash(weight), SCHEME, "rtn", torch.bfloat16)
    assert key == LayerBank.key(tensor_hash(elsewhere), SCHEME, "rtn", torch.bfloat16)
    hashed = tensor_hash(weight)
    different = {
        LayerBank.key(tensor_hash(weight + 1), SCHEME, "rtn", torch.bfloat16),
        LayerBank.key(hashed, Scheme.parse("w3g32a"), "rtn", torch.bfloat16),
        LayerBank.key(hashed, SCHEME, "mse", torch.bfloat16),
        LayerBank.key(hashed, SCHEME, "rtn", torch.float16),
        LayerBank.key(hashed, SCHEME, "rtn", torch.bfloat16, "other calibration data"),
    }
    assert len(different) == 5 and key not in different


def test_memory_is_bounded_and_the_least_recently_used_leaves(tmp_path: Path) -> None:
    bank = LayerBank(max_bytes=int(2.5 * entry_bytes()), folder=tmp_path)
    for seed in (0, 1):
        bank.get(str(seed), SCHEME, lambda seed=seed: entry(seed))  # type: ignore[misc]
    bank.get("0", SCHEME, never)
    assert not list(tmp_path.rglob("*.safetensors")), "nothing is written before it has to leave"
    bank.get("2", SCHEME, lambda: entry(2))
    assert len(bank) == 2 and bank.memory_bytes <= bank.max_bytes
    assert [f.stem for f in tmp_path.rglob("*.safetensors")] == ["1"]
    assert bank.built == 3


def test_an_entry_larger_than_the_bound_is_still_served() -> None:
    bank = LayerBank(max_bytes=1)
    assert same(bank.get("a", SCHEME, entry), entry())
    bank.get("b", SCHEME, lambda: entry(1))
    assert len(bank) == 1 and bank.memory_bytes == entry_bytes()


@pytest.mark.parametrize("label", ["w2g16", "w3g32ao0.5", "w4g32a", "w8"])
def test_what_was_spilled_comes_back_bit_for_bit(tmp_path: Path, label: str) -> None:
    scheme = Scheme.parse(label)
    bank = LayerBank(max_bytes=1, folder=tmp_path)
    bank.get("first", scheme, lambda: entry(3, scheme))
    bank.get("second", scheme, lambda: entry(4, scheme))
    again = bank.get("first", scheme, never)
    assert same(again, entry(3, scheme)) and again.scheme == scheme
    assert torch.equal(again.dequantize(), entry(3, scheme).dequantize())


def test_expensive_entries_are_written_at_once(tmp_path: Path) -> None:
    LayerBank(folder=tmp_path).get("k", SCHEME, entry, keep_on_disk=True)
    assert same(LayerBank(folder=tmp_path).get("k", SCHEME, never), entry())


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda f: os.truncate(f, f.stat().st_size // 2),
    "empty": lambda f: f.write_bytes(b""),
    "zeros": lambda f: f.write_bytes(bytes(f.stat().st_size)),
    "other": lambda f: f.write_text("no tensors here"),
    "folder": lambda f: (f.unlink(), f.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_built_again(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    LayerBank(folder=tmp_path).get("k", SCHEME, entry, keep_on_disk=True)
    (file,) = tmp_path.rglob("*.safetensors")
    DAMAGE[how](file)
    bank = LayerBank(folder=tmp_path)
    assert same(bank.get("k", SCHEME, entry, keep_on_disk=True), entry()) and bank.built == 1
    assert "it is built again" in caplog.text
    if how != "folder":
        assert same(LayerBank(folder=tmp_path).get("k", SCHEME, never), entry()), "it was mended"


def test_a_file_of_another_scheme_is_not_believed(tmp_path: Path) -> None:
    LayerBank(folder=tmp_path).get("k", Scheme.parse("w4g32"), lambda: entry(0, Scheme.parse("w4g32")),
                                   keep_on_disk=True)  # fmt: skip
    assert same(LayerBank(folder=tmp_path).get("k", SCHEME, entry), entry())


def test_an_unwritable_folder_costs_time_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    bank = LayerBank(max_bytes=1, folder=blocked / "bank")
    for _ in range(2):
        for seed in range(3):
            found = bank.get(str(seed), SCHEME, lambda seed=seed: entry(seed))  # type: ignore[misc]
            assert same(found, entry(seed))
    assert bank.built == 6
    assert caplog.text.count("going on without it") == 1, "said once, not for every layer"


def test_a_full_disk_stops_writing_but_not_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    LayerBank(folder=tmp_path).get("old", SCHEME, entry, keep_on_disk=True)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bank_module, "save_file", full)
    bank = LayerBank(folder=tmp_path)
    bank.get("new", SCHEME, lambda: entry(1), keep_on_disk=True)
    assert "No space left" in caplog.text
    assert same(bank.get("old", SCHEME, never), entry())
    assert not list(tmp_path.rglob("*.part")), "half a file was left"


def test_the_disk_is_bounded_oldest_first_and_leftovers_go(tmp_path: Path) -> None:
    bank = LayerBank(folder=tmp_path)
    bank.get("aa0", SCHEME, entry, keep_on_disk=True)
    (file,) = tmp_path.rglob("*.safetensors")
    size = file.stat().st_size
    stale, fresh = tmp_path / "aa" / "killed.part", tmp_path / "aa" / "busy.part"
    stale.touch()
    fresh.touch()
    long_ago = time.time() - 2 * bank_module.STALE_SECONDS
    os.utime(stale, (long_ago, long_ago))
    os.utime(file, (long_ago, long_ago))
    small = LayerBank(folder=tmp_path, max_disk_bytes=2 * size)
    for i in (1, 2):
        small.get(f"bb{i}", SCHEME, lambda i=i: entry(i), keep_on_disk=True)  # type: ignore[misc]
    assert sorted(f.stem for f in tmp_path.rglob("*.safetensors")) == ["bb1", "bb2"]
    assert not stale.exists() and fresh.exists()


def _write_many(folder: str, together: Barrier, results: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    torch.set_num_threads(1)
    # So tight a bound that both processes also delete what the other one wrote.
    bank = LayerBank(max_bytes=1, folder=Path(folder), max_disk_bytes=3000)
    together.wait(timeout=60)
    wrong = 0
    for i in range(60):
        seed = i % 4
        found = bank.get(f"k{seed}", SCHEME, lambda seed=seed: entry(seed), keep_on_disk=True)  # type: ignore[misc]
        wrong += not same(found, entry(seed))
    results.put((wrong, bank._writing))


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    together = context.Barrier(2)
    workers = [
        context.Process(target=_write_many, args=(str(tmp_path), together, results), daemon=True)
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [(0, True)] * 2, "a wrong tensor, or a race taken for a broken disk"
    assert not list(tmp_path.rglob("*.part"))


def test_the_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "bank"
    monkeypatch.delenv("AUTOCOMP_CACHE")
    assert default_folder() == Path.home() / ".cache" / "autocomp" / "bank"
