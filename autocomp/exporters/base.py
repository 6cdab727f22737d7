"""The interface of an exporter, and what every format needs from a worker."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import save_file

from autocomp.attention.plan import AttentionPlan
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor
from autocomp.space import Candidate

if TYPE_CHECKING:
    from autocomp.worker import ModelWorker

SHARD_BYTES = 4 << 30
ENVELOPE = "autocomp.json"


def export_format(folder: Path) -> str:
    """What an export says that it is; empty for folders without a readable ``autocomp.json``."""
    try:
        envelope = json.loads((folder / ENVELOPE).read_text())
    except (OSError, ValueError):
        return ""
    return str(envelope.get("format", "")) if isinstance(envelope, dict) else ""


def foreign_spaces(worker: ModelWorker, handled: Collection[str] = ("bitwidths",)) -> list[str]:
    """A reason when the job has spaces whose choices a format can't hold, beside those ``handled``."""
    others = sorted({s.name for s in worker.spaces} - set(handled))
    return [f"this format can't hold choices of {others}; search without them"] if others else []


def other_family(worker: ModelWorker) -> list[str]:
    """A reason when a format of language models is asked for a diffusion model."""
    image = getattr(worker.workload, "kind", "") == "diffusion"
    return ["this format holds language models; use --format diffusers"] if image else []


def attention_plan(worker: ModelWorker, candidate: Candidate) -> AttentionPlan | None:
    """What the candidate does to attention; ``None`` when it leaves it alone."""
    from autocomp.search_spaces.attention import Attention

    for space in worker.spaces:
        if isinstance(space, Attention):
            plan = space.plan(worker.built, candidate.values)
            return None if plan.plain else plan
    return None


class Exporter(Protocol):
    """Writes candidates in one format. Stateless."""

    def supports(self, worker: ModelWorker, candidate: Candidate) -> list[str]:
        """Reasons why the format can't hold the candidate, each with its remedy; empty when it can."""
        ...

    def export(self, worker: ModelWorker, candidate: Candidate, folder: Path) -> None:
        """Write the candidate to an empty folder. The worker's model is in its original state."""
        ...


def quantized_parts(worker: ModelWorker, candidate: Candidate) -> dict[str, Scheme]:
    """Path -> scheme of every part that the candidate quantizes (a tied head under its own path too)."""
    return {
        path: scheme
        for space in worker.spaces
        if space.name == "bitwidths"
        for decision in worker.decisions[space.name]
        for scheme in [Scheme.parse(str(candidate[decision.name]))]
        if not scheme.is_dense
        for path in decision.sites
    }


def quantized_tensors(
    worker: ModelWorker, schemes: Mapping[str, Scheme]
) -> Iterator[tuple[str, QuantizedTensor]]:
    """The bank's tensors for those parts, one at a time; a part that borrows its weight has none."""
    from autocomp.search_spaces.weights import WeightSwapper

    if not schemes:
        return
    space = next(s for s in worker.spaces if s.name == "bitwidths")
    method = space.config.method  # type: ignore[attr-defined]
    swapper = WeightSwapper.of(worker.built)
    for path, scheme in schemes.items():
        if not worker.built.site.part(path).shared_with:
            yield path, swapper.quantized(path, scheme.label, method)


def dense_tensors(worker: ModelWorker, schemes: Mapping[str, Scheme]) -> dict[str, torch.Tensor]:
    """Every other weight and persistent buffer of the model by its name; tied names appear once."""
    model = worker.built.model
    replaced = {f"{path}.weight" for path in schemes}
    seen: set[int] = set()
    kept = {}
    for name, tensor in model.state_dict().items():
        if name in replaced or (tensor.data_ptr() in seen and tensor.numel()):
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.detach().cpu().contiguous()
    return kept


def save_sharded(tensors: Mapping[str, torch.Tensor], folder: Path, stem: str) -> dict[str, str]:
    """Write tensors to ``{stem}-0001.safetensors``, ...; returns tensor name -> file name."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}-{i:04d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    return files
