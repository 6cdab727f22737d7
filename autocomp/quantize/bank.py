"""The layer bank: each (weight, recipe) quantized once, kept in memory up to a bound, spilled to disk.

Keys are content hashes of weight and recipe, so that workers, studies and renamed models share entries
and two models with the same name never do.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

logger = logging.getLogger("autocomp")
STALE_SECONDS = 3600.0
"""Age from which an unfinished file is no longer being written."""


def default_folder() -> Path:
    """``$AUTOCOMP_CACHE/bank``, or ``bank`` in the user's cache folder."""
    root = os.environ.get("AUTOCOMP_CACHE") or Path.home() / ".cache" / "autocomp"
    return Path(root) / "bank"


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 (32 hexadecimal digits) of shape, dtype and bytes."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(data.shape)}{data.dtype}".encode())
    digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


class LayerBank:
    """Quantized tensors by key: memory first (least recently used leaves), then disk, then ``build``.

    Args:
        max_bytes: bound on the unpacked tensors kept in memory.
        folder: where evicted and expensive entries are written; ``None`` keeps nothing on disk.
        max_disk_bytes: oldest files go when the folder grows beyond this.

    A full or unwritable disk costs time, never a result: what is there is still read, and the rest is built
    again when it is needed. Several processes may share a folder.
    """

    def __init__(
        self, max_bytes: int = 2 << 30, folder: Path | None = None, max_disk_bytes: int = 20 << 30
    ) -> None:
        self.max_bytes = max_bytes
        self.folder = folder
        self.max_disk_bytes = max_disk_bytes
        self.built = 0
        self._writing = folder is not None
        self._memory: OrderedDict[str, QuantizedTensor] = OrderedDict()
        self._bytes = 0

    @staticmethod
    def key(weight_hash: str, scheme: Scheme, method: str, dtype: torch.dtype, extra: str = "") -> str:
        """``extra`` stands for everything else the result depends on (the calibration data of GPTQ)."""
        text = f"v1|{weight_hash}|{scheme.label}|{method}|{dtype}|{extra}"
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    def get(
        self, key: str, scheme: Scheme, build: Callable[[], QuantizedTensor], *, keep_on_disk: bool = False
    ) -> QuantizedTensor:
        """The entry; built when it is nowhere. ``keep_on_disk`` writes it at once (expensive builds)."""
        found = self._memory.get(key)
        if found is not None:
            self._memory.move_to_end(key)
            return found
        found = self._read(key, scheme)
        if found is None:
            found = build()
            self.built += 1
            if keep_on_disk:
                self._write(key, found)
        self._remember(key, found)
        return found

    def __len__(self) -> int:
        return len(self._memory)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tensors in memory; at most ``max_bytes``, or one entry when that one is larger."""
        return self._bytes

    def _remember(self, key: str, tensor: QuantizedTensor) -> None:
        self._memory[key] = tensor
        self._bytes += _memory_bytes(tensor)
        while self._bytes > self.max_bytes and len(self._memory) > 1:
            old, evicted = self._memory.popitem(last=False)
            self._bytes -= _memory_bytes(evicted)
            self._write(old, evicted)

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str, scheme: Scheme) -> QuantizedTensor | None:
        path = self._path(key)
        if path is None:
            return None
        try:
            return QuantizedTensor.from_state(load_file(path), scheme)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            logger.warning("layer bank: %s can't be used (%s); it is built again", path.name, error)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None

    def _write(self, key: str, tensor: QuantizedTensor) -> None:
        path = self._path(key)
        if path is None or not self._writing:
            return
        try:
            if path.exists():
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
            os.close(handle)
            try:
                save_file({k: v.cpu().contiguous() for k, v in tensor.to_state().items()}, temporary)
                os.replace(temporary, path)  # readers see a whole file or none
            finally:
                Path(temporary).unlink(missing_ok=True)
            self._trim_disk()
        except (OSError, SafetensorError) as error:
            logger.warning("layer bank: can't write to %s (%s); going on without it", self.folder, error)
            self._writing = False

    def _trim_disk(self) -> None:
        """Remove the oldest entries beyond the bound, and what killed processes left half-written."""
        assert self.folder is not None
        files = []
        for file in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):  # another process may trim at the same time
                status = file.stat()
                if file.suffix == ".safetensors":
                    files.append((status.st_mtime, status.st_size, file))
                elif file.suffix == ".part" and time.time() - status.st_mtime > STALE_SECONDS:
                    file.unlink()
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= self.max_disk_bytes:
                return
            file.unlink(missing_ok=True)
            total -= size


def _memory_bytes(tensor: QuantizedTensor) -> int:
    parts = (tensor.codes, tensor.scale, tensor.zero, tensor.outlier_index, tensor.outlier_value)
    return sum(p.numel() * p.element_size() for p in parts if p is not None)
