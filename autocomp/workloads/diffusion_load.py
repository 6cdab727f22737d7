"""Put together what a diffusion job names: models, scheduler, VAE, conditions, classifier, real images."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autocomp.diffusion.denoiser import Denoiser
from autocomp.diffusion.noise import NoiseSchedule
from autocomp.diffusion.schedule import Schedule, uniform_schedule
from autocomp.errors import AutocompError, CapabilityError, JobError
from autocomp.quantize.bank import LayerBank
from autocomp.workloads import checkpoint, diffusion_discovery
from autocomp.workloads.base import Built
from autocomp.workloads.diffusion_config import DiffusionConfig, ZooModel
from autocomp.workloads.diffusion_discovery import UNREADABLE, VAE, locate, quiet, read_json, read_scheduler
from autocomp.workloads.diffusion_images import LABELS, Conditions, Extractor, read_real, read_subset

#: name of a sampler -> order and corrector of its steps
SAMPLERS = {"ddim": (1, False), "euler": (1, False), "dpmsolver++": (2, False), "unipc": (2, True)}


def load(config: DiffusionConfig, device: str) -> Built:
    """All that ``Diffusion`` keeps of a model, but what it records of it.

    Raises:
        JobError: see there.
    """
    folder = locate(config.model)
    scheduler = read_scheduler(folder)
    noise = _noise(scheduler, "workload.model")
    vae = _load_vae(folder.parent / VAE, config.dtype, device)
    built = _load_built(folder, config, scheduler, device, _bytes(vae))
    own = Denoiser(built.model, config.size)
    conditions = _conditions(own, config)
    zoo = {name: _zoo_member(name, member, config, built, noise) for name, member in config.zoo.items()}
    built.state |= {
        "denoisers": {"": own, **{name: Denoiser(b.model, config.size) for name, b in zoo.items()}},
        "zoo": zoo, "scheduler_config": scheduler, "folder": folder, "conditions": conditions, "vae": vae,
        "vae_bytes": _bytes(vae), "default_schedule": _default_schedule(config, noise, own.size),
        "snapshots": [_existing(path) for path in config.snapshots],
        "extractor": Extractor(config.features, device) if config.features else None,
    }  # fmt: skip
    if config.data.real:
        built.state["real"] = read_real(config.data.real)
        _check_sizes(built)
    if config.data.subset:
        read_subset(config.data.subset)
    built.site = replace(
        built.site, models=("", *zoo), snapshots=len(config.snapshots), batch=config.scenario.batch,
        scheduler=scheduler, steps=config.sampler.steps,
        guided=config.guidance != 1.0 and bool(own.conditions),
    )  # fmt: skip
    return built


def _default_schedule(config: DiffusionConfig, noise: NoiseSchedule, size: tuple[int, int]) -> Schedule:
    order, corrector = SAMPLERS[config.sampler.name]
    if config.sampler.name == "euler" and noise.kind != "flow":
        raise JobError(
            "workload.sampler.name: euler is for flow models, and this model's scheduler is of another "
            "kind; use ddim"
        )
    tokens = size[0] * size[1] // 4  # of a latent in patches of two by two, as shifts that depend on it count
    times = noise.default_times(config.sampler.steps, tokens)
    return uniform_schedule(times, order=order, corrector=corrector)


def _load_built(
    folder: Path, config: DiffusionConfig, scheduler: dict[str, Any], device: str, extra: int = 0,
    key: str = "workload.model",
) -> Built:  # fmt: skip
    model = diffusion_discovery.load_model(folder, config.dtype, key)
    fingerprint = checkpoint.fingerprint(model)  # before the move: hashing reads host memory
    model.to(device)
    called = diffusion_discovery.denoiser(model, key, config.size)
    noise, conditions = _noise(scheduler, key), _conditions(called, config)
    site = diffusion_discovery.discover(
        called, fingerprint, lambda: _call(called, noise, conditions, device, key), extra
    )
    built = Built(model, site, device)
    for part in site.parts:
        weight = model.get_submodule(part.path).weight
        assert isinstance(weight, torch.Tensor)
        built.originals[part.path] = weight.detach()
    return built


def _call(called: Denoiser, noise: NoiseSchedule, conditions: Conditions, device: str, key: str) -> None:
    x = torch.zeros(1, called.channels, *called.size, device=device)
    try:
        called(x, noise.model_time(0.5), conditions.of([0], device))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, CapabilityError) as error:
        raise JobError(
            f"{key}: this {type(called.model).__name__} can't be called with a sample of {tuple(x.shape)} "
            f"and the conditions {list(called.conditions)}: {type(error).__name__}: {error}"
        ) from error


def _conditions(called: Denoiser, config: DiffusionConfig) -> Conditions:
    classes = called.null_label if LABELS in called.conditions else 0
    return Conditions(called.conditions, config.conditions, classes)


def _noise(scheduler: dict[str, Any], key: str) -> NoiseSchedule:
    try:
        return NoiseSchedule.of(scheduler)
    except AutocompError as error:
        raise JobError(f"{key}: {error}") from None


def _load_vae(folder: Path, dtype: str, device: str) -> nn.Module | None:
    if not (folder / "config.json").is_file():
        return None
    return diffusion_discovery.load_model(folder, dtype, "workload.model (its VAE)").to(device)


def _bytes(module: nn.Module | None) -> int:
    return 0 if module is None else sum(t.numel() * t.element_size() for t in module.state_dict().values())


def _zoo_member(
    name: str, member: ZooModel, config: DiffusionConfig, own: Built, noise: NoiseSchedule
) -> Built:  # fmt: skip
    """A model that takes the own one's place in some steps, with its weights in the wanted scheme."""
    key = f"workload.zoo.{name}"
    folder = locate(member.model or config.model, key)
    scheduler_file = folder.parent / diffusion_discovery.SCHEDULER / "scheduler_config.json"
    scheduler = read_json(scheduler_file, key, missing_ok=True) or dict(own.site.scheduler)
    if scheduler and not _same_noise(_noise(scheduler, key), noise):
        raise JobError(
            f"{key}: {folder} was trained with other noise than the job's own model (betas or kind of "
            "prediction), so that one schedule can't call both"
        )
    found = _load_built(folder, config, scheduler or read_scheduler(folder), own.device, key=key)
    ours, theirs = Denoiser(own.model, config.size), Denoiser(found.model, config.size)
    for what in ("channels", "size", "conditions"):
        if getattr(ours, what) != getattr(theirs, what):
            raise JobError(
                f"{key}: its {what} are {getattr(theirs, what)}, the job's own model's are "
                f"{getattr(ours, what)}: one schedule can't call both"
            )
    if member.weights:
        from autocomp.search_spaces.weights import WeightSwapper

        found.state |= {"bank": LayerBank(), "labels": {p.path: member.weights for p in found.site.parts}}
        WeightSwapper.of(found).apply(found.state["labels"], method="rtn", serving=False)
    return found


def _same_noise(a: NoiseSchedule, b: NoiseSchedule) -> bool:
    same = (a.kind, a.prediction, a.steps) == (b.kind, b.prediction, b.steps)
    return same and np.array_equal(a.log_alphas, b.log_alphas)


def _existing(path: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise JobError(f"workload.snapshots: there is no {path!r}")
    return found


def _check_sizes(built: Built) -> None:
    """Real images must be what the model makes; after a VAE, its size is that of the decoder's output."""
    own, real = built.state["denoisers"][""], tuple(built.state["real"].shape[1:])
    vae = built.state["vae"]
    made = (own.channels, *own.size)
    if vae is not None:
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        made = (vae.config.out_channels, own.size[0] * factor, own.size[1] * factor)
    if real != made:
        raise JobError(
            f"workload.data.real: its images are {real} (channels, height, width), the model's {made}: write "
            "them in the model's size"
        )


def save_assets(built: Built, folder: Path) -> None:
    """Configurations of model and scheduler, the pipeline's index and the VAE, in the layout of diffusers."""
    source: Path = built.state["folder"]
    part = source.name if source.name in diffusion_discovery.PARTS else diffusion_discovery.PARTS[0]
    try:
        with quiet():
            built.model.save_config(folder / part)  # type: ignore[operator]
        for name in (diffusion_discovery.SCHEDULER, VAE):
            if (source.parent / name).is_dir():
                shutil.copytree(source.parent / name, folder / name, dirs_exist_ok=True)
        if (source.parent / "model_index.json").is_file():
            shutil.copy2(source.parent / "model_index.json", folder / "model_index.json")
    except UNREADABLE as error:
        raise JobError(f"the assets of {source} can't be copied: {error}") from error
