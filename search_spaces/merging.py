"""Writing linear combinations of saved checkpoints into a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from autocomp.errors import SpaceError
from autocomp.search_spaces.weights import WeightSwapper
from autocomp.workloads.base import Built

FOLDERS = ("", "transformer", "unet")
"""Where a pipeline folder keeps the weights of the model that samples."""


class Merger:
    """Saved checkpoints of a built model, and which combination of them it holds now.

    Checkpoints stay in their files, mapped into memory; the weights as loaded are kept as a copy.

    Args:
        built: ``state["snapshots"]`` lists the checkpoints: files, or folders of ``save_pretrained``.

    Raises:
        SpaceError: one can't be read, or is of another architecture than the model.
    """

    def __init__(self, built: Built) -> None:
        self.built = built
        self.current: list[float] | None = None
        WeightSwapper.of(built).restore()
        weights = built.model.state_dict()
        self._loaded = {n: w.clone() for n, w in weights.items() if w.is_floating_point()}
        self._snapshots = [_checkpoint(str(path), weights) for path in built.state["snapshots"]]

    @classmethod
    def of(cls, built: Built) -> Merger:
        """The merger of a built model, made on first use, before anything has changed the weights."""
        found = built.state.get("merger")
        if found is None:
            found = built.state["merger"] = cls(built)
        assert isinstance(found, cls)
        return found

    def apply(self, coefficients: Sequence[float] | None) -> None:
        """Bring the model to these coefficients, one a checkpoint, or back to what was loaded."""
        wanted = None if coefficients is None else list(coefficients)
        if wanted == self.current:
            return
        # Originals back in their modules: what is written there in place is then the originals' new content.
        swapper = WeightSwapper.of(self.built)
        swapper.restore()
        self.current = []  # neither, should this fail half-way
        self.built.changed.add("checkpoints")
        weights = self.built.model.state_dict()
        for name, loaded in self._loaded.items():
            weights[name].copy_(loaded if wanted is None else self._merged(name, wanted))
        swapper.forget()
        self.current = wanted
        if wanted is None:
            self.built.changed.discard("checkpoints")

    def _merged(self, name: str, coefficients: Sequence[float]) -> torch.Tensor:
        """The sum over checkpoints, in float32."""
        total = torch.zeros(self._loaded[name].shape, dtype=torch.float32)
        for factor, snapshot in zip(coefficients, self._snapshots, strict=True):
            total.add_(snapshot[name].to(torch.float32), alpha=factor)
        return total


def _checkpoint(path: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint after comparing names and shapes with the model's."""
    found: dict[str, torch.Tensor] = {}
    try:
        for file in _files(Path(path).expanduser()):
            found |= load_file(file)
    except (OSError, SafetensorError) as error:
        raise SpaceError(f"checkpoint {path!r} can't be read: {error}") from None
    if not found:
        raise SpaceError(f"checkpoint {path!r} holds no .safetensors file; save it with save_pretrained")
    floats = {n: w.shape for n, w in weights.items() if w.is_floating_point()}
    wrong = [n for n, shape in floats.items() if n not in found or found[n].shape != shape]
    wrong += [n for n in found if n not in weights]
    if wrong:
        raise SpaceError(
            f"checkpoint {path!r} is of another architecture than the model: {wrong[0]} differs or is only in"
            f" one of them ({len(wrong)} such tensors); name checkpoints of the same training run"
        )
    return found


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inside = [sorted((path / folder).glob("*.safetensors")) for folder in FOLDERS]
    return next((files for files in inside if files), [])
