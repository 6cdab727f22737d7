"""Linears and convolutions of a diffusion model: what each reads in a call, and which stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autocomp.kernels.convolution import ConvForm, refusal
from autocomp.search_spaces.base import Part


def is_convolution(module: nn.Module) -> bool:
    """True for convolutions of any number of dimensions, transposed ones too."""
    return isinstance(module, nn.modules.conv._ConvNd)


def left_alone(modules: Mapping[str, nn.Module], path: str, shapes: Mapping[str, torch.Size]) -> str:
    """Why a convolution is no part; empty when it is one.

    Args:
        modules: of the model, by path.
        shapes: see ``watched_inputs``.
    """
    from diffusers.models.embeddings import PatchEmbed

    if isinstance(modules[path.rpartition(".")[0]], PatchEmbed):
        return "it cuts the image into patches, a small layer that everything after it reads"
    reason = refusal(modules[path])
    return reason or ("" if len(shapes.get(path, ())) == 4 else "a call of the model does not reach it")


def read_by(part: Part, module: nn.Module, shape: torch.Size | None) -> Part:
    """The part of a linear or convolution with what the shape of its input for one image tells; ``None``
    where a call does not reach it."""
    if shape is None:
        return part
    if not isinstance(module, nn.Conv2d):
        return replace(part, rows=shape[:-1].numel())
    form, (height, width) = ConvForm.of(module), shape[-2:]
    rows, columns = form.output(height, width)
    return replace(part, kind="conv", rows=rows * columns, conv=f"{form.label}@{height}x{width}")


@contextmanager
def watched_inputs(watched: Mapping[str, nn.Module], shapes: dict[str, torch.Size]) -> Iterator[None]:
    """Note the shape of each module's first input (path -> shape) while the model is called for one image."""

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            del module
            if args:
                shapes.setdefault(path, args[0].shape)

        return hook

    handles = [m.register_forward_pre_hook(watch(p)) for p, m in watched.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
