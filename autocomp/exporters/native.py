"""The native format: a Hugging Face folder without weights, packed weights, and ``autocomp.json``.

``autocomp.json`` is a versioned envelope: what was chosen for every module, in readable form, which file
holds which tensor, and what was measured. ``autocomp.load`` rebuilds the model on the kernels; the packed
tensors are the ones that were searched, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from autocomp import __version__
from autocomp.attention.plan import AttentionPlan
from autocomp.attention.runtime import install
from autocomp.errors import CapabilityError, ExportError, SpaceError
from autocomp.exporters.base import (
    ENVELOPE,
    attention_plan,
    dense_tensors,
    foreign_spaces,
    other_family,
    quantized_parts,
    quantized_tensors,
    save_sharded,
)
from autocomp.kernels.modules import PackedEmbedding, PackedLinear
from autocomp.measure.device import software_versions
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor
from autocomp.search_spaces.weights import embedding_scale
from autocomp.space import Candidate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from autocomp.worker import ModelWorker

VERSION = 2
"""2 has ``attention``. Files without it say 1: what reads those need not know."""


class NativeExporter:
    """Every candidate of ``bitwidths`` and ``attention``, outliers and packed embeddings included."""

    def supports(self, worker: ModelWorker, candidate: Candidate) -> list[str]:
        del candidate
        return other_family(worker) or foreign_spaces(worker, ("bitwidths", "attention"))

    def export(self, worker: ModelWorker, candidate: Candidate, folder: Path) -> None:
        schemes = quantized_parts(worker, candidate)
        plan = attention_plan(worker, candidate)
        tensors = {f"dense/{n}": t for n, t in dense_tensors(worker, schemes).items()}
        for path, quantized in quantized_tensors(worker, schemes):
            tensors |= {f"packed/{path}/{n}": t.cpu() for n, t in quantized.to_state().items()}
        # Buffers that a checkpoint leaves out (rotary frequencies) are kept, so that loading needs no
        # model code beyond its structure and gives the same numbers.
        tensors |= {f"buffer/{n}": b for n, b in _transient_buffers(worker.built.model)}
        worker.workload.save(worker.built, folder)
        site = worker.built.site
        envelope = {
            "format": "autocomp-native",
            "version": 1 if plan is None else VERSION,
            "autocomp": __version__,
            "software": software_versions(),
            "model": {"family": site.family, "fingerprint": site.fingerprint},
            "dtype": str(worker.built.model.dtype).removeprefix("torch."),
            "candidate": candidate.to_json(),
            "modules": {
                path: {
                    "scheme": scheme.label,
                    "kind": site.part(path).kind,
                    "shared_with": site.part(path).shared_with,
                    "scale": embedding_scale(worker.built.model.get_submodule(path)),
                }
                for path, scheme in schemes.items()
            },
            "files": save_sharded(tensors, folder, "autocomp"),
        }
        if plan is not None:
            envelope["attention"] = plan.to_json()
        (folder / ENVELOPE).write_text(json.dumps(envelope, indent=1))


def _transient_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    saved = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name not in saved:
            yield name, buffer.detach().cpu().contiguous().clone()


def read_envelope(folder: Path) -> dict[str, Any]:
    """``autocomp.json`` of an export.

    Raises:
        ExportError: the file is missing, damaged, no envelope, or of a newer version.
    """
    try:
        envelope = json.loads((folder / ENVELOPE).read_text())
    except FileNotFoundError:
        raise ExportError(f"{str(folder)!r} is no native export: it has no {ENVELOPE}") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"can't read {str(folder / ENVELOPE)!r}: {error}") from None
    if not isinstance(envelope, dict) or envelope.get("format") != "autocomp-native":
        raise ExportError(f"{str(folder / ENVELOPE)!r} is not an autocomp export")
    lacking = sorted({"version", "dtype", "modules", "files"} - set(envelope))
    if lacking or not isinstance(envelope["version"], int):
        raise ExportError(f"{str(folder / ENVELOPE)!r} is damaged (lacks {lacking}); export it again")
    if envelope["version"] > VERSION:
        raise ExportError(
            f"{str(folder)!r} has format version {envelope['version']}; this autocomp ({__version__}) reads"
            f" up to {VERSION}: upgrade it"
        )
    return envelope


def load_native(folder: Path, device: str = "auto") -> PreTrainedModel:
    """Rebuild the exported model: structure from config.json, weights packed as they were searched.

    Raises:
        ExportError: see ``read_envelope``; also for a missing or damaged weight file.
    """
    envelope = read_envelope(folder)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = getattr(torch, envelope["dtype"])
    model = _structure(folder, dtype)
    tensors = _read_tensors(folder, envelope["files"])
    try:
        _place_packed(model, envelope["modules"], tensors, where, dtype)
        _place_dense(model, tensors, where)
    except (KeyError, ValueError, AttributeError) as error:
        raise ExportError(
            f"{str(folder)!r} is damaged: {ENVELOPE}, config.json and weights don't fit together"
            f" ({type(error).__name__}: {error}); export it again"
        ) from error
    missing = sorted(n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta)
    if missing:
        raise ExportError(f"{str(folder)!r} lacks the tensors {missing[:3]}; export it again")
    model = model.eval().requires_grad_(False)
    if "attention" in envelope:
        try:
            install(model, AttentionPlan.from_json(envelope["attention"]))
        except (SpaceError, CapabilityError) as error:
            raise ExportError(f"the attention plan in {str(folder / ENVELOPE)!r}: {error}") from error
    return model


def _structure(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights: no memory, no random initialisation."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ExportError(f"can't read the configuration in {str(folder)!r}: {error}") from error
    return model


def _read_tensors(folder: Path, files: Mapping[str, str]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    try:
        for file in sorted(set(files.values())):
            with safe_open(folder / file, framework="pt") as handle:
                tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ExportError(f"can't read the weights in {str(folder)!r}: {error}") from None
    lost = sorted(set(files) - set(tensors))
    if lost:
        raise ExportError(f"{str(folder)!r} lacks the tensors {lost[:3]}; export it again")
    return tensors


def _place_packed(
    model: nn.Module,
    modules: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, torch.Tensor],
    device: str,
    dtype: torch.dtype,
) -> None:
    embeddings: dict[str, PackedEmbedding] = {}
    for path in sorted(modules, key=lambda p: bool(modules[p]["shared_with"])):  # owners before borrowers
        entry = modules[path]
        bias = tensors.get(f"dense/{path}.bias")
        packed: nn.Module
        if entry["shared_with"]:
            packed = PackedLinear.sharing(embeddings[entry["shared_with"]], bias=bias)
        else:
            prefix = f"packed/{path}/"
            state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            quantized = QuantizedTensor.from_state(state, Scheme.parse(entry["scheme"]))
            if entry["kind"] == "embedding":
                packed = embeddings[path] = PackedEmbedding(
                    quantized, device=device, dtype=dtype, scale=entry["scale"]
                )
            else:
                packed = PackedLinear(quantized, bias=bias, device=device, dtype=dtype)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, packed)


def _place_dense(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], device: str) -> None:
    state = {n.removeprefix("dense/"): t.to(device) for n, t in tensors.items() if n.startswith("dense/")}
    model.load_state_dict(state, strict=False, assign=True)
    for name, tensor in tensors.items():
        if name.startswith("buffer/"):
            owner, _, leaf = name.removeprefix("buffer/").rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, tensor.to(device), persistent=False)
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, PackedEmbedding):  # a packed embedding shares with its head already
        model.tie_weights()
