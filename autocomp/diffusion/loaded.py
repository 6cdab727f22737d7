"""A diffusion model from an export in the ``diffusers`` format: what was searched, ready to sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from autocomp import __version__
from autocomp.diffusion import activations, attention
from autocomp.diffusion.activations import ActivationPlan
from autocomp.diffusion.attention_plan import ImageAttentionPlan
from autocomp.diffusion.decode import decode
from autocomp.diffusion.denoiser import Denoiser
from autocomp.diffusion.sampler import Sampler
from autocomp.diffusion.schedule import Schedule
from autocomp.errors import AutocompError, ExportError
from autocomp.exporters.base import ENVELOPE
from autocomp.exporters.diffusers import CONDITIONS, FORMAT, SCHEDULER, VERSION, ZOO
from autocomp.kernels.convolution import ConvForm, PackedConv2d
from autocomp.kernels.modules import PackedLinear
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor
from autocomp.workloads import diffusion_discovery
from autocomp.workloads.diffusion_images import LABELS, Conditions, sample_noise

FIELDS = {"version", "dtype", "guidance", "schedule", "own", "zoo"}
SPLIT = "report"
"""Images start from the noise of this split of the job that the model comes from."""


class DiffusionModel:
    """An exported model with its schedule and plans, on the kernels that the search measured.

    Attributes:
        models: the models that the schedule calls, by name; the exported one is "".
        schedule: of the candidate.
        sampler: noise ``[B, C, H, W]`` and conditions to samples (latents where there is a VAE).
        vae: turns samples to images; ``None`` where samples are images.
        conditions: of samples by index.
        device: where the models are.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], scheduler: Mapping[str, Any], schedule: Schedule,
        guidance: float, conditions: str = "", vae: nn.Module | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            scheduler: configuration of a diffusers scheduler, for the noise.
            guidance: scale of classifier-free guidance; 1 for none.
            conditions: file with condition tensors, for models without class labels.
            size: height and width of a sample; the model's own by default.
        """
        self.models, self.schedule, self.vae = dict(models), schedule, vae
        denoisers = {name: Denoiser(model, size) for name, model in models.items()}
        self.sampler = Sampler(denoisers, scheduler, schedule, guidance)
        self._own = own = denoisers[""]
        classes = own.null_label if LABELS in own.conditions else 0
        self.conditions = Conditions(own.conditions, conditions, classes)
        self.device = str(next(own.model.parameters()).device)

    @torch.inference_mode()
    def sample(
        self, n: int, labels: Sequence[int] | Tensor | None = None, seed: int = 0, *, batch: int = 64
    ) -> Tensor:
        """``n`` images, float32 ``[n, C, H, W]`` in [-1, 1] on the CPU.

        Image i depends on (seed, i) and its label; it starts from the noise of image i of the ``report``
        split of a job whose ``data.seed`` is ``seed``.

        Args:
            labels: classes, one an image; by default 0, 1, 2, ... in turn. Models that take other conditions
                use the rows of their file in turn.
            batch: images sampled at once.

        Raises:
            ValueError: no image asked for, another number of labels, a label that the model does not know, or
                labels for a model without classes.
            FloatingPointError: an image is not finite.
        """
        if n < 1 or batch < 1:
            raise ValueError(f"n and batch must be 1 or more; got {n} and {batch}")
        chosen = self._labels(labels, n)
        images = []
        for first in range(0, n, batch):
            some = range(first, min(n, first + batch))
            noise = sample_noise(seed, SPLIT, some, (self._own.channels, *self._own.size)).to(self.device)
            conditions = self.conditions.of(some, self.device)
            if chosen is not None:
                conditions[LABELS] = chosen[first : some.stop].to(self.device)
            images.append(decode(self.vae, self.sampler(noise, conditions)).cpu())
        return torch.cat(images)

    def _labels(self, labels: Sequence[int] | Tensor | None, n: int) -> Tensor | None:
        if labels is None:
            return None
        chosen, classes = torch.as_tensor(labels, dtype=torch.int64), self.conditions.classes
        if not classes:
            raise ValueError("this model has no class labels; leave them out")
        if chosen.shape != (n,) or not 0 <= int(chosen.min()) <= int(chosen.max()) < classes:
            raise ValueError(f"{n} labels from 0 to {classes - 1} are needed; got {chosen.tolist()[:10]}")
        return chosen

    def save_grid(self, path: str | Path, n: int = 64, *, seed: int = 0, columns: int = 0) -> Path:
        """Write a picture of ``n`` images side by side (PNG, or what the file's name says).

        Args:
            columns: images in a row; by default one of each class, or a square.

        Raises:
            ExportError: the picture can't be written.
        """
        columns = min(n, columns or self.conditions.classes or int(np.ceil(n**0.5)))
        try:
            grid_image(self.sample(n, seed=seed), columns).save(path)
        except (OSError, ValueError) as error:
            raise ExportError(f"can't write the picture {str(path)!r}: {error}") from None
        return Path(path)


def grid_image(images: Tensor, columns: int) -> Any:
    """A PIL image of float images ``[n, C, H, W]`` in [-1, 1] in rows of ``columns``, the rest black."""
    from PIL import Image

    rows = -(-len(images) // columns)
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    blank = pixels.new_zeros(rows * columns - len(pixels), *pixels.shape[1:])
    cells = torch.cat([pixels, blank]).unflatten(0, (rows, columns))
    picture = cells.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()  # rows H, columns W, channels
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


# -- reading a folder ----------------------------------------------------------------------------------


def load_diffusion(folder: Path, device: str = "auto") -> DiffusionModel:
    """The model of an export in the ``diffusers`` format, on ``device``.

    Raises:
        ExportError: a file is missing or damaged, or the folder was written by a newer version.
    """
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    envelope = read_envelope(folder)
    file = folder / CONDITIONS
    try:
        models = {"": _model(folder, envelope["own"], envelope["dtype"], where)}
        models |= {
            name: _model(folder / ZOO / name, entry, envelope["dtype"], where)
            for name, entry in envelope["zoo"].items()
        }
        _install_plans(models[""], envelope["own"])
        scheduler = diffusion_discovery.read_json(folder / SCHEDULER / "scheduler_config.json", "scheduler")
        schedule = Schedule.from_json(envelope["schedule"])
        vae = _vae(folder / diffusion_discovery.VAE, envelope["dtype"], where)
        return DiffusionModel(
            models, scheduler, schedule, float(envelope["guidance"]),
            str(file) if file.is_file() else "", vae, _size(envelope.get("size")),
        )  # fmt: skip
    except ExportError:
        raise
    except (AutocompError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{str(folder)!r} is damaged ({type(error).__name__}: {error}); export it again"
        ) from error


def read_envelope(folder: Path) -> dict[str, Any]:
    """``autocomp.json`` of an export in the ``diffusers`` format.

    Raises:
        ExportError: it is missing, damaged, of another format, or of a newer version.
    """
    file = folder / ENVELOPE
    try:
        envelope = json.loads(file.read_text())
    except FileNotFoundError:
        raise ExportError(f"{str(folder)!r} is no export: it has no {ENVELOPE}") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"can't read {str(file)!r}: {error}") from None
    if not isinstance(envelope, dict) or envelope.get("format") != FORMAT:
        raise ExportError(f"{str(file)!r} is not an autocomp export of a diffusion model")
    lacking = sorted(FIELDS - set(envelope))
    if lacking or not isinstance(envelope["version"], int):
        raise ExportError(f"{str(file)!r} is damaged (lacks {lacking}); export it again")
    if envelope["version"] > VERSION:
        raise ExportError(
            f"{str(folder)!r} has format version {envelope['version']}; this autocomp ({__version__}) reads"
            f" up to {VERSION}: upgrade it"
        )
    return envelope


def _model(folder: Path, entry: Mapping[str, Any], dtype: str, device: str) -> nn.Module:
    """One model: dense from its folder, then with packed layers where the entry names some."""
    model = diffusion_discovery.load_model(folder / str(entry["part"]), dtype, "export")
    tensors = _tensors(folder, entry["files"])
    for path, label in entry["modules"].items():
        prefix = f"{path}/"
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        quantized = QuantizedTensor.from_state(state, Scheme.parse(label))
        parent, _, name = path.rpartition(".")
        packed = _packed(model.get_submodule(path), quantized, device, getattr(torch, dtype))
        setattr(model.get_submodule(parent), name, packed)
    with diffusion_discovery.quiet():
        return model.to(device).eval().requires_grad_(False)


def _packed(module: Any, weight: QuantizedTensor, device: str, dtype: torch.dtype) -> PackedLinear:
    """What stands for a linear or a convolution with this weight."""
    if isinstance(module, nn.Conv2d):
        return PackedConv2d(weight, ConvForm.of(module), module.bias, device=device, dtype=dtype)
    return PackedLinear(weight, module.bias, device=device, dtype=dtype)


def _tensors(folder: Path, files: Mapping[str, str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    try:
        for file in sorted(set(files.values())):
            with safe_open(folder / file, framework="pt") as handle:
                found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ExportError(f"can't read the packed weights in {str(folder)!r}: {error}") from None
    lost = sorted(set(files) - set(found))
    if lost:
        raise ExportError(f"{str(folder)!r} lacks the tensors {lost[:3]}; export it again")
    return found


def _install_plans(model: nn.Module, entry: Mapping[str, Any]) -> None:
    if entry["attention"] is not None:
        attention.install(model, ImageAttentionPlan.from_json(entry["attention"]))
    if entry["activations"] is not None:
        activations.install(model, ActivationPlan.from_json(entry["activations"]))


def _size(found: Sequence[int] | None) -> tuple[int, int] | None:
    if found is None:
        return None
    height, width = found
    return int(height), int(width)


def _vae(folder: Path, dtype: str, device: str) -> nn.Module | None:
    if not (folder / "config.json").is_file():
        return None
    with diffusion_discovery.quiet():
        return diffusion_discovery.load_model(folder, dtype, "export").to(device)
