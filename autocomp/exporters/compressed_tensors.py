"""Export in the compressed-tensors format (``pack-quantized``), which transformers, vLLM and SGLang load.

Mixed bits become one config group per scheme with the modules' names as targets. Servers that fuse q/k/v
and gate/up need one scheme within each (``granularity: tied``); ``supports`` says when that is not so.
What a reader makes of a scheme is its own affair: 4 and 8 bits run everywhere, other widths in recent
versions of vLLM and in transformers. The loader of transformers 5.23 with compressed-tensors 0.20 expects
zero points in their unpacked shape and refuses asymmetric schemes, which the package's own decompression
and the servers read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.errors import CapabilityError
from autocomp.exporters.base import (
    attention_plan,
    dense_tensors,
    foreign_spaces,
    other_family,
    quantized_parts,
    quantized_tensors,
    save_sharded,
)
from autocomp.quantize.scheme import Scheme
from autocomp.space import Candidate

if TYPE_CHECKING:
    import torch

    from autocomp.worker import ModelWorker


class CompressedTensorsExporter:
    """Candidates whose linears are grouped or per-row integers without outliers."""

    def supports(self, worker: ModelWorker, candidate: Candidate) -> list[str]:
        if reasons := other_family(worker):
            return reasons
        site = worker.built.site
        schemes = quantized_parts(worker, candidate)
        reasons = [
            reason for path, scheme in schemes.items() if (reason := _unsupported_part(worker, path, scheme))
        ]
        reasons += foreign_spaces(worker, ("bitwidths", "attention"))
        if attention_plan(worker, candidate) is not None:
            reasons.append(
                "this format holds weights only, no attention spans or bits of the key/value cache; use the"
                " native format, or choose a candidate with dense attention in 16 bits"
            )
        ties: dict[str, set[str]] = {}
        for part in site.parts:
            if part.kind == "linear" and part.role == "body" and part.tie:
                label = schemes[part.path].label if part.path in schemes else "w16"
                ties.setdefault(part.tie, set()).add(label)
        mixed = sorted(tie for tie, labels in ties.items() if len(labels) > 1)
        if mixed:
            reasons.append(
                f"{len(mixed)} fused groups mix formats ({mixed[0]}: {sorted(ties[mixed[0]])}), which servers"
                " that fuse q/k/v and gate/up can't load; search with granularity: tied"
            )
        return reasons[:5]

    def export(self, worker: ModelWorker, candidate: Candidate, folder: Path) -> None:
        schemes = quantized_parts(worker, candidate)
        tensors: dict[str, torch.Tensor] = dense_tensors(worker, schemes)
        for path, quantized in quantized_tensors(worker, schemes):
            tensors |= {f"{path}.{n}": t.cpu() for n, t in quantized.to_state().items()}
        worker.workload.save(worker.built, folder)
        files = save_sharded(tensors, folder, "model")
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": files,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        config_file = folder / "config.json"
        config = json.loads(config_file.read_text())
        linears = [p.path for p in worker.built.site.parts if p.kind == "linear"]
        config["quantization_config"] = quantization_config(schemes, linears)
        config_file.write_text(json.dumps(config, indent=1))
        record = {"candidate": candidate.to_json(), "modules": {p: s.label for p, s in schemes.items()}}
        (folder / "autocomp_candidate.json").write_text(json.dumps(record, indent=1))


def _unsupported_part(worker: ModelWorker, path: str, scheme: Scheme) -> str:
    part = worker.built.site.part(path)
    module = worker.built.model.get_submodule(path)
    if part.kind != "linear" or part.shared_with:
        return f"{path}: compressed-tensors stores no packed embeddings; leave `embeddings` empty"
    if type(module).__name__ != "Linear":
        return f"{path}: a {type(module).__name__} can't be loaded from compressed-tensors, only Linear"
    if scheme.outliers:
        return f"{path}: compressed-tensors has no 16-bit outliers ({scheme}); search without them"
    if scheme.group and part.shape[1] % scheme.group:
        return f"{path}: group {scheme.group} does not divide {part.shape[1]} inputs; choose a divisor"
    return ""


def quantization_config(schemes: Mapping[str, Scheme], linears: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` entry of config.json: one group a scheme, unquantized linears ignored.

    Raises:
        CapabilityError: the compressed-tensors package, whose schema checks it, is not installed.
    """
    try:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    except ImportError:
        raise CapabilityError(
            "format 'compressed-tensors' needs the package of that name: pip install 'autocomp[export]'"
        ) from None
    labels = sorted({s.label for s in schemes.values()})
    groups = {}
    for i, label in enumerate(labels):
        scheme = Scheme.parse(label)
        weights = QuantizationArgs(
            num_bits=scheme.bits,
            type="int",
            symmetric=scheme.symmetric,
            strategy="group" if scheme.group else "channel",
            group_size=scheme.group or None,
        )
        targets = [path for path, s in schemes.items() if s.label == label]
        groups[f"group_{i}"] = QuantizationScheme(targets=targets, weights=weights, format="pack-quantized")
    config = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status="compressed",
        ignore=sorted(set(linears) - set(schemes)),
    )
    dumped: dict[str, Any] = json.loads(config.model_dump_json(exclude_none=True))
    return dumped
