"""Load diffusion models from diffusers folders and find what can be compressed in them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from autocomp.diffusion.denoiser import Denoiser
from autocomp.errors import CapabilityError, JobError
from autocomp.search_spaces.base import ModelSite
from autocomp.workloads import checkpoint
from autocomp.workloads.diffusion_attention import Seen, attention_parts, watched_attention
from autocomp.workloads.diffusion_layers import is_convolution, left_alone, read_by, watched_inputs
from autocomp.workloads.discovery import (
    block_finder,
    is_linear,
    matrix_parts,
    run_probe,
    ties,
    unique_bytes,
)

PARTS = ("transformer", "unet")
SCHEDULER = "scheduler"
VAE = "vae"
#: What diffusers and safetensors raise for files that they can't read.
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError, ImportError,
    SafetensorError, struct.error,
)  # fmt: skip


def locate(folder: str, key: str = "workload.model") -> Path:
    """The folder that holds the model itself: ``folder``'s ``transformer/`` or ``unet/``, or ``folder``.

    Args:
        folder: as the job names it.
        key: the key of the job, for messages.

    Raises:
        JobError: no such folder, or no diffusion model in it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        hub = folder.count("/") == 1 and not folder.startswith(("/", "~", "."))
        remedy = (
            f"models are not downloaded during a run; get it with `hf download {folder} --local-dir DIR`"
            if hub
            else "check the path (a relative one starts where the worker runs)"
        )
        raise JobError(f"{key}: there is no folder {folder!r} on this machine; {remedy}")
    for place in (*(path / part for part in PARTS), path):
        if "_class_name" in read_json(place / "config.json", key, missing_ok=True):
            return place.resolve()
    raise JobError(
        f"{key}: {folder} holds no diffusion model: it needs transformer/ or unet/ with a config.json that "
        "save_pretrained wrote"
    )


def read_json(path: Path, key: str, *, missing_ok: bool = False) -> dict[str, Any]:
    """The mapping in a JSON file. Raises ``JobError`` when it can't be read; ``missing_ok``: empty then."""
    if missing_ok and not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise JobError(f"{key}: {path} can't be read: {error}") from None
    if not isinstance(found, dict):
        raise JobError(f"{key}: {path} must hold a mapping")
    return found


def read_scheduler(model: Path) -> dict[str, Any]:
    """Configuration of the scheduler beside the model's folder.

    Raises:
        JobError: there is none.
    """
    for folder in (model.parent / SCHEDULER, model / SCHEDULER):
        path = folder / "scheduler_config.json"
        if path.is_file():
            return read_json(path, "workload.model")
    raise JobError(
        f"workload.model: {model.parent} has no scheduler/scheduler_config.json, which says what noise the "
        "model was trained with; save the scheduler there (save_pretrained)"
    )


def load_model(folder: Path, dtype: str, key: str = "workload.model") -> nn.Module:
    """The model in ``folder`` (see ``locate``) on the CPU, in evaluation mode, without gradients.

    Raises:
        JobError: a class that diffusers lacks, files that can't be read, or missing weights.
    """
    import diffusers

    name = str(read_json(folder / "config.json", key)["_class_name"])
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise JobError(
            f"{key}: {folder} holds a {name!r}, no model class of diffusers {diffusers.__version__}"
        )
    try:
        with quiet():
            model, info = found.from_pretrained(  # type: ignore[attr-defined]
                folder, torch_dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
            )
    except UNREADABLE as error:
        raise JobError(f"{key}: {folder} can't be loaded: {type(error).__name__}: {error}") from error
    absent = sorted(map(str, info["missing_keys"]))
    if absent:
        raise JobError(
            f"{key}: {folder} lacks {len(absent)} weights of {name} ({', '.join(absent[:3])}); the download "
            "may be incomplete"
        )
    loaded: nn.Module = model.eval().requires_grad_(False)
    return loaded


def denoiser(model: nn.Module, key: str = "workload.model", size: tuple[int, int] | None = None) -> Denoiser:
    """The model behind our interface. Raises ``JobError`` for one that can't be called."""
    try:
        return Denoiser(model, size)
    except CapabilityError as error:
        raise JobError(f"{key}: {error}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence diffusers and transformers below errors; what matters is checked and raised by the callers."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with checkpoint.quiet():
            yield
    finally:
        logging.set_verbosity(level)


def discover(called: Denoiser, fingerprint: str, call: Callable[[], Any], extra_bytes: int = 0) -> ModelSite:
    """Parts of a diffusion model in execution order, as far as the model alone tells.

    Linears are parts of kind ``linear`` and role ``body``, convolutions that can run from a packed weight of
    kind ``conv``; everything else (other convolutions, norms, embeddings) counts in ``other_bytes``.
    Attention modules that plans can be for (see ``diffusion_attention``) are in ``image_attention``;
    ``lacking`` says why there are none, and under ``conv`` which convolutions are left as they are.

    Args:
        called: the model.
        fingerprint: of its weights.
        call: runs it once, for one image.
        extra_bytes: of what is deployed with it (VAE).

    Raises:
        JobError: the model has no linear layer and no such convolution.
    """
    model = called.model
    modules = dict(model.named_modules())
    linears = [p for p, m in modules.items() if is_linear(m)]
    convs = [p for p, m in modules.items() if is_convolution(m)]
    watched = {p: modules[p] for p in modules if p in {*linears, *convs}}
    seen: dict[str, Seen] = {}
    shapes: dict[str, torch.Size] = {}
    with watched_attention(modules, seen, called.state), watched_inputs(watched, shapes):
        probe = run_probe(watched, call)
    odd = {p: reason for p in convs if (reason := left_alone(modules, p, shapes))}
    roles = {p: "body" for p in watched if p not in odd}
    if not roles:
        raise JobError(f"{type(model).__name__} has no linear layer that could be compressed")
    parts = [
        read_by(p, modules[p.path], shapes.get(p.path))
        for p in matrix_parts(modules, roles, ties(probe, linears))
    ]
    last = len(probe.order)  # what the pass did not reach comes at the end
    parts.sort(key=lambda p: probe.order.get(p.path, last))
    block = block_finder(modules)
    attention, lacking = attention_parts(seen, called.family, block)
    weights: list[Any] = [modules[p.path].weight for p in parts]
    other = unique_bytes([*model.parameters(), *model.buffers()]) - unique_bytes(weights)
    if odd:
        listed = "; ".join(f"{path}: {reason}" for path, reason in [*odd.items()][:3])
        lacking["conv"] = f"{len(odd)} of {len(convs)} convolutions stay as they are ({listed})"
    return ModelSite(
        called.family, tuple(parts), other + extra_bytes, fingerprint, weights[0].element_size(),
        image_attention=attention, lacking=lacking,
    )  # fmt: skip
