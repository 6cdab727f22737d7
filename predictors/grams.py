"""Second moments of what linears read, on calibration data: error-compensated rounding and sensitivities."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from autocomp.errors import SpaceError
from autocomp.search_spaces.base import Part
from autocomp.workloads.base import Built


class GramStore:
    """X'X of the inputs of linears on calibration data, a bounded number of them at a time.

    Parts that read the same input (a tie) share one matrix. When a wanted matrix is not there, one pass
    over the calibration data collects as many following parts as fit into ``max_bytes``.
    """

    def __init__(self, built: Built, sequences: torch.Tensor, max_bytes: int = 2 << 30) -> None:
        self.built, self.sequences, self.max_bytes = built, sequences, max_bytes
        self._grams: dict[str, torch.Tensor] = {}

    def __call__(self, path: str) -> torch.Tensor:
        """``[in, in]`` float32, summed over all tokens; zeros where no token came by (an idle expert).
        Of an embedding the diagonal: how often each of its rows is looked up, float32 ``[rows]``.

        Raises:
            SpaceError: it would have to be collected now, and the model is not in its original state.
        """
        part = self.built.site.part(path)
        if part.kind == "embedding":
            return torch.bincount(self.sequences.flatten(), minlength=part.shape[0]).float()
        key = _input_name(part)
        if key not in self._grams:
            if not self.built.pristine:
                raise SpaceError(
                    "calibration activations must come from the original model; restore it first"
                )
            self._grams = {}
            self._collect(list(self._following(path)))
        return self._grams[key]

    def _following(self, path: str) -> Iterator[Part]:
        """The part and those after it, one an input, while their matrices fit. The head comes alone: it
        needs the logits of every position."""
        parts = [p for p in self.built.site.parts if p.kind == "linear" and p.role != "head"]
        start = next((i for i, p in enumerate(parts) if p.path == path), None)
        if start is None:
            yield self.built.site.part(path)
            return
        seen: set[str] = set()
        size = 0
        for part in parts[start:]:
            if _input_name(part) in seen:
                continue
            size += 4 * part.shape[1] ** 2
            if seen and size > self.max_bytes:
                return
            seen.add(_input_name(part))
            yield part

    def _collect(self, parts: Sequence[Part]) -> None:
        model, device = self.built.model, self.built.device
        narrow = "logits_to_keep" in inspect.signature(model.forward).parameters
        narrow = narrow and all(p.role != "head" for p in parts)
        last_only = {"logits_to_keep": 1} if narrow else {}
        handles = []
        for part in parts:
            width = part.shape[1]
            self._grams[_input_name(part)] = torch.zeros(width, width, device=device)
            hook = self._hook(_input_name(part))
            module = model.get_submodule(part.path)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            with torch.inference_mode():
                for batch in self.sequences.split(4):
                    model(input_ids=batch.to(device), use_cache=False, **last_only)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, key: str) -> Callable[..., None]:
        def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            x = first.detach().flatten(0, -2).float()
            self._grams[key].addmm_(x.T, x)

        return record


def _input_name(part: Part) -> str:
    """Parts with the same name here read the same input. A head tied to the embedding reads its own."""
    return part.path if part.role == "head" else part.tie or part.path
