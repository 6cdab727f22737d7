"""Load diffusion models from diffusers folders and find what can be compressed in them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from autocomp.diffusion.attention import refusal
from autocomp.diffusion.denoiser import Denoiser
from autocomp.errors import CapabilityError, JobError
from autocomp.search_spaces.base import ModelSite, Part
from autocomp.workloads import checkpoint
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


def denoiser(model: nn.Module, key: str = "workload.model") -> Denoiser:
    """The model behind our interface. Raises ``JobError`` for one that can't be called."""
    try:
        return Denoiser(model)
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

    Linears are parts of kind ``linear`` and role ``body``; everything else (convolutions, norms, embeddings)
    counts in ``other_bytes``. Self-attention modules of diffusers' class ``Attention`` are in
    ``image_attention``; ``lacking`` says why there are none.

    Args:
        called: the model.
        fingerprint: of its weights.
        call: runs it once, for one image.
        extra_bytes: of what is deployed with it (VAE).

    Raises:
        JobError: the model has no linear layer.
    """
    model = called.model
    modules = dict(model.named_modules())
    linears = [p for p, m in modules.items() if is_linear(m)]
    if not linears:
        raise JobError(f"{type(model).__name__} has no linear layer that could be compressed")
    seen: dict[str, _Seen] = {}
    rows: dict[str, int] = {}
    with _watched_attention(modules, seen), _watched_rows({p: modules[p] for p in linears}, rows):
        probe = run_probe({p: modules[p] for p in linears}, call)
    parts = matrix_parts(modules, dict.fromkeys(linears, "body"), ties(probe, linears))
    parts = [replace(p, rows=rows.get(p.path, 1)) for p in parts]
    last = len(probe.order)  # what the pass did not reach comes at the end
    parts.sort(key=lambda p: probe.order.get(p.path, last))
    block = block_finder(modules)
    attention = [_attention_part(p, modules[p], s, block(p)) for p, s in seen.items() if not s.refusal]
    weights: list[Any] = [modules[p.path].weight for p in parts]
    other = unique_bytes([*model.parameters(), *model.buffers()]) - unique_bytes(weights)
    reason = "" if attention else _no_attention(called.family, seen)
    return ModelSite(
        called.family, tuple(parts), other + extra_bytes, fingerprint, weights[0].element_size(),
        image_attention=tuple(attention), lacking={"image_attention": reason} if reason else {},
    )  # fmt: skip


@contextmanager
def _watched_rows(linears: Mapping[str, nn.Module], rows: dict[str, int]) -> Iterator[None]:
    """Note how many rows each linear's input has; the model is called for one image."""

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            del module
            if args:
                rows.setdefault(path, args[0].numel() // args[0].shape[-1])

        return hook

    handles = [m.register_forward_pre_hook(watch(p)) for p, m in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Seen:
    """What one call showed of an attention module: the positions it read, and what speaks against it."""

    def __init__(self, module: nn.Module, hidden: torch.Tensor, given: Mapping[str, Any]) -> None:
        self.tokens = hidden.shape[1] if hidden.ndim == 3 else hidden.shape[-2:].numel()
        context = given.get("encoder_hidden_states")
        self.refusal = refusal(module)
        if context is not None and context is not hidden:
            self.refusal = "it reads text or other tokens beside the image"
        elif given.get("image_rotary_emb") is not None:
            self.refusal = "it uses rotary position embeddings"


@contextmanager
def _watched_attention(modules: Mapping[str, nn.Module], seen: dict[str, _Seen]) -> Iterator[None]:
    from diffusers.models.attention_processor import Attention

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {"encoder_hidden_states": args[1] if len(args) > 1 else None, **kwargs}
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.setdefault(path, _Seen(module, hidden, given))

        return hook

    found = {p: m for p, m in modules.items() if isinstance(m, Attention)}
    handles = [m.register_forward_pre_hook(watch(p), with_kwargs=True) for p, m in found.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention_part(path: str, module: Any, seen: _Seen, block: int | None) -> Part:
    shape = (module.heads, module.to_q.weight.shape[0] // module.heads, seen.tokens)
    return Part(path, "image_attention", shape, block, path, "attention")


def _no_attention(family: str, seen: Mapping[str, _Seen]) -> str:
    if not seen:
        return f"this {family} model has no attention module of diffusers' class Attention"
    path, first = next(iter(seen.items()))
    return f"none of its attention modules is plain self-attention: {path}: {first.refusal}"
