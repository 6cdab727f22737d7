"""What a job says under ``workload`` for ``kind: diffusion``. No torch here: the driver reads it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from autocomp.quantize.scheme import Scheme


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ZooModel(_Config):
    """A further model that a schedule may call.

    Attributes:
        model: its folder; empty for the job's own.
        weights: scheme label (``w8g64``) that all of its linears and convolutions are stored in; empty for
            as they are.
    """

    model: str = ""
    weights: str = ""

    @field_validator("weights")
    @classmethod
    def _label(cls, value: str) -> str:
        return Scheme.parse(value).label if value else ""


class SamplerConfig(_Config):
    """How the uncompressed model samples: evenly spaced times from pure noise to the clean image.

    Attributes:
        name: ``ddim`` (order 1), ``dpmsolver++`` (2M), ``unipc`` (the same with its corrector) or ``euler``
            (of flow models, where it is what ``ddim`` is elsewhere).
        steps: calls of the model.
    """

    name: Literal["ddim", "dpmsolver++", "unipc", "euler"] = "ddim"
    steps: int = Field(default=20, ge=1)


class ImagesConfig(_Config):
    """Images and how many of them each split gets.

    Attributes:
        real: ``.npz`` file with ``images`` (uint8 ``[n, H, W]`` or ``[n, H, W, C]``) that generated ones are
            compared with; without it ``fd`` is the distance to the uncompressed model's own images.
        subset: ``.json`` file with the indices of the samples that the ``proxy`` split consists of (a list,
            or a mapping with ``indices``); without it they are the first ``proxy``.
        calibration, proxy, selection, report: images of each split. No two share noise.
        batch: images sampled at once (a guided step evaluates twice as many).
        seed: of the noise; sample i of a split starts from the same noise in every job with this seed.
        teacher_mb: memory (10**6 bytes) for the uncompressed model's images and model outputs. Drift
            (``mse``, ``psnr``, ``ssim``) is taken on as many images as fit.
    """

    real: str = ""
    subset: str = ""
    calibration: int = Field(default=16, ge=1)
    proxy: int = Field(default=500, ge=2)
    selection: int = Field(default=2000, ge=2)
    report: int = Field(default=5000, ge=2)
    batch: int = Field(default=64, ge=1)
    seed: int = 0
    teacher_mb: float = Field(default=1024.0, gt=0)


class ImageScenario(_Config):
    """The deployment that latency is measured for.

    Attributes:
        batch: images sampled at once.
        threads: CPU threads; 0 for all that the worker has.
        repeats: timed samplings; the median is reported.
    """

    batch: int = Field(default=1, ge=1)
    threads: int = Field(default=0, ge=0)
    repeats: int = Field(default=3, ge=1)


class DiffusionConfig(_Config):
    """A diffusion model, what it is judged by, and where it will run.

    Attributes:
        model: diffusers pipeline folder, or one with ``transformer/`` or ``unet/``, and ``scheduler/``; with
            ``vae/`` the samples are decoded to images.
        zoo: name -> further models that a schedule may call.
        snapshots: folders or ``.safetensors`` files with saved checkpoints of the model.
        size: height and width of a sample (of the latent, where there is a VAE), for models whose
            configuration names none (Flux: 128 x 128) or to search for another size; by default the model's.
        dtype: type that the weights are held in.
        guidance: scale of classifier-free guidance; 1 for none.
        sampler: of the uncompressed model.
        features: transformers folder of an image classifier; what enters its last linear layer are the
            features of ``fd``, its class is that of ``content``. Without it neither metric exists.
        conditions: ``.safetensors`` file with the tensors that the model takes beside the sample, rows
            first; sample i takes row i, from the start again when they end. For models without class labels.
    """

    model: str
    zoo: dict[str, ZooModel] = Field(default_factory=dict)
    snapshots: list[str] = Field(default_factory=list)
    size: tuple[int, int] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    guidance: float = Field(default=1.0, ge=0)
    sampler: SamplerConfig = SamplerConfig()
    features: str = ""
    conditions: str = ""
    data: ImagesConfig = ImagesConfig()
    scenario: ImageScenario = ImageScenario()

    @field_validator("size")
    @classmethod
    def _positive(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and min(value) < 1:
            raise ValueError(f"size must be a height and a width of 1 or more; got {list(value)}")
        return value

    @field_validator("zoo", mode="before")
    @classmethod
    def _folders(cls, value: object) -> object:
        """``medium: FOLDER`` is short for ``medium: {model: FOLDER}``."""
        if not isinstance(value, dict):
            return value
        return {k: {"model": v} if isinstance(v, str) else v for k, v in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> DiffusionConfig:
        if "" in self.zoo:
            raise ValueError("zoo: the empty name is the job's own model; give this one a name")
        if self.data.real and not self.features:
            raise ValueError(
                "data.real needs features: the classifier's folder, by which images are compared"
            )
        return self
