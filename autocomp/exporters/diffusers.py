"""The ``diffusers`` format: a folder that diffusers loads, with packed weights and ``autocomp.json`` beside.

``transformer/`` or ``unet/`` holds every weight in the model's own dtype (the values that the packed ones
stand for), ``scheduler/`` the schedule as a ``UnifiedScheduler``; other components are copied. diffusers by
itself gives the compressed model, at the dense model's speed and without its plans for attention and
activations. ``autocomp.load`` (``diffusion/loaded.py``) puts packed weights, plans and further models in
place and runs the kernels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp import __version__
from autocomp.exporters.base import ENVELOPE, foreign_spaces, save_sharded
from autocomp.measure.device import software_versions
from autocomp.space import Candidate
from autocomp.workloads.base import Built

if TYPE_CHECKING:
    from autocomp.worker import ModelWorker

FORMAT = "autocomp-diffusers"
VERSION = 1
SPACES = ("bitwidths", "activations", "schedules", "checkpoints", "diffusion_attention")
INDEX, CONDITIONS, SCHEDULER, ZOO = "model_index.json", "conditions.safetensors", "scheduler", "zoo"
WRITTEN = ("transformer", "unet", SCHEDULER)
"""Components that are written, not copied."""


class DiffusersExporter:
    """Candidates of a diffusion job: bits of weights and activations, schedule, attention plan, merged
    checkpoints."""

    def supports(self, worker: ModelWorker, candidate: Candidate) -> list[str]:
        del candidate
        if getattr(worker.workload, "kind", "") != "diffusion":
            return ["this format holds diffusion models; use native"]
        reasons = foreign_spaces(worker, SPACES)
        odd = [name for name in worker.built.state["zoo"] if Path(name).name != name]
        if odd:
            reasons.append(f"models of the zoo become folders, and {odd[0]!r} is no folder name; rename it")
        return reasons

    def export(self, worker: ModelWorker, candidate: Candidate, folder: Path) -> None:
        from autocomp.diffusion.scheduler import UnifiedScheduler

        built, config = worker.built, worker.workload.config
        state = built.state
        try:
            worker.apply(candidate, serving=False)
            schedule = state["schedule"]
            record = _write_model(built, folder) | _plans(built)
        finally:
            worker.restore()
        UnifiedScheduler.of(state["scheduler_config"], schedule).save_pretrained(folder / SCHEDULER)
        _copy_components(state["folder"].parent, folder)
        if config.conditions:  # type: ignore[attr-defined]
            shutil.copyfile(Path(config.conditions).expanduser(), folder / CONDITIONS)  # type: ignore[attr-defined]
        zoo = {n: _write_model(state["zoo"][n], folder / ZOO / n) for n in schedule.models if n}
        envelope = {
            "format": FORMAT,
            "version": VERSION,
            "autocomp": __version__,
            "software": software_versions(),
            "model": {"family": built.site.family, "fingerprint": built.site.fingerprint},
            "dtype": config.dtype,  # type: ignore[attr-defined]
            "guidance": config.guidance,  # type: ignore[attr-defined]
            "size": config.size,  # type: ignore[attr-defined]
            "candidate": candidate.to_json(),
            "schedule": schedule.to_json(),
            "own": record,
            "zoo": zoo,
        }
        (folder / ENVELOPE).write_text(json.dumps(envelope, indent=1))


def _plans(built: Built) -> dict[str, Any]:
    """The plans that the model follows now; ``None`` for those that there are not."""
    from autocomp.diffusion import activations, attention

    plans = {
        "activations": activations.installed(built.model),
        "attention": attention.installed(built.model),
    }
    return {name: None if plan is None else plan.to_json() for name, plan in plans.items()}


def _write_model(built: Built, folder: Path) -> dict[str, Any]:
    """The weights of a model in its scoring state: dense ones as diffusers reads them, packed ones beside.

    Returns:
        The folder's name, path -> scheme label of packed linears, tensor -> file.
    """
    from autocomp.search_spaces.weights import WeightSwapper
    from autocomp.workloads.diffusion_discovery import quiet

    part = "unet" if type(built.model).__name__.startswith("UNet") else "transformer"
    with quiet():
        built.model.save_pretrained(folder / part)  # type: ignore[operator]
    swapper = WeightSwapper.of(built)
    tensors = {
        f"{path}/{name}": tensor.cpu()
        for path, label in swapper.labels.items()
        for name, tensor in swapper.quantized(path, label, swapper.method).to_state().items()
    }
    files = save_sharded(tensors, folder, "autocomp") if tensors else {}
    return {"part": part, "modules": dict(swapper.labels), "files": files}


def _copy_components(source: Path, folder: Path) -> None:
    """The other components of a pipeline, and its index with our scheduler in place of its own."""
    names = {"vae"}
    if (source / INDEX).is_file():
        index = json.loads((source / INDEX).read_text())
        names |= {n for n, entry in index.items() if isinstance(entry, list)}
        if SCHEDULER in index:
            index[SCHEDULER] = ["autocomp.diffusion.scheduler", "UnifiedScheduler"]
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    for name in sorted(names.difference(WRITTEN)):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
