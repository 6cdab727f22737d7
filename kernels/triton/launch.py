"""What launches need to know: whether Triton runs here, the device, and which tiles to use.

Tiles come from a plain function of the shape and the device. Where :func:`Table.set` has stored measured ones
(``linear.tune``), those are used; they are kept per GPU and Triton version in ``$AUTOCOMP_CACHE/triton``.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("autocomp")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton interprets kernels (slowly, on the CPU) that are decorated under this setting. For tests."""
FP_FUSION = {"enable_fp_fusion": True}
"""Launch option that every launch here sets, since its default is about to change in Triton."""

CHECK_ERROR = 1.2e-2


@functools.cache
def unavailable() -> str:
    """Why Triton kernels can't run in this process; empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'triton>=3.6'"
    if INTERPRETED:
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch here"
    if torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the Triton kernels need compute capability 8.0 or newer; this GPU has {major}.{minor}"
    return ""


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; a token number for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def disagreement(found: torch.Tensor, wanted: torch.Tensor) -> str:
    """For self-checks: what is wrong with ``found``; empty when it is within a few bfloat16 roundings."""
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return "" if error <= CHECK_ERROR else f"self-check is off by {error:.2g} (limit {CHECK_ERROR:g})"


@dataclass(frozen=True)
class Tiles:
    """How one launch is cut up.

    Attributes:
        tokens, features, depth: sizes of a program's tile along M, N and K.
        split: programs that share K.
        warps, stages: Triton's launch options.
        dense: dequantize and use the dense GEMM instead; the rest is unused.
    """

    tokens: int
    features: int
    depth: int
    split: int = 1
    warps: int = 4
    stages: int = 4
    dense: bool = False


class Table:
    """Measured tiles by case, in memory and in one JSON file."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._tiles: dict[str, Tiles] | None = None

    @property
    def file(self) -> Path:
        return self._file or _file()

    def get(self, key: str) -> Tiles | None:
        if self._tiles is None:
            self._tiles = self._read()
        return self._tiles.get(key)

    def set(self, key: str, tiles: Tiles) -> None:
        """Store and write, keeping what other processes have written meanwhile."""
        self._tiles = self._read() | {key: tiles}
        self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = json.dumps({k: asdict(t) for k, t in sorted(self._tiles.items())}, indent=1)
        handle, temporary = tempfile.mkstemp(dir=self.file.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        os.replace(temporary, self.file)

    def _read(self) -> dict[str, Tiles]:
        if not self.file.is_file():
            return {}
        try:
            found: dict[str, dict[str, Any]] = json.loads(self.file.read_text(encoding="utf-8"))
            return {key: Tiles(**tiles) for key, tiles in found.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("tuned tiles in %s are not readable (%s); delete the file", self.file, error)
            return {}


def _file() -> Path:
    import triton

    root = Path(os.environ.get("AUTOCOMP_CACHE") or Path.home() / ".cache" / "autocomp")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    return root / "triton" / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}-{triton.__version__}.json"


def power_of_two(value: int, least: int, most: int) -> int:
    """The smallest power of two that is >= value, kept within [least, most] (powers of two too)."""
    return min(max(1 << max(value - 1, 0).bit_length(), least), most)
