"""Workload ``diffusion``: an image model from a diffusers folder, sampled by a schedule that may be searched.

Quality is how far images are from real ones and from those of the uncompressed model on the same noise;
latency is that of a whole sampling. Module level is import-light: the driver reads ``Config``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from autocomp.diffusion.schedule import Schedule, Step
from autocomp.errors import JobError
from autocomp.trial import Estimate, Fidelity
from autocomp.workloads.base import Built, Workload
from autocomp.workloads.diffusion_config import DiffusionConfig

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from autocomp.diffusion.sampler import Sampler
    from autocomp.measure.images import Gaussian
    from autocomp.workloads.diffusion_images import Extractor
    from autocomp.workloads.diffusion_teacher import Teacher, Trajectories

SPLITS = ("calibration", "proxy", "selection", "report")
#: spaces whose effect on the time is that of the kernel calls they name, or none
ADDITIVE = {"bitwidths", "diffusion_attention", "checkpoints"}
_NO_FEATURES = "it needs workload.features: the folder of an image classifier"


class Diffusion(Workload):
    """Diffusion models of diffusers that Denoiser can call, in pixel space or with a VAE.

    Sample i of a split has its own noise and label, whatever is compressed and however many are asked for:
    candidates are compared on common random numbers.

    ``built.state`` holds ``denoisers`` (name -> Denoiser, the own empty), ``schedule`` (in force now),
    ``default_schedule``, ``scheduler_config``, ``snapshots``, ``extractor``, ``vae``, ``conditions``,
    ``folder`` (of the model itself), ``zoo`` (name -> the Built of a zoo member), ``teachers`` (split ->
    Teacher) and ``trajectories``.
    """

    kind: ClassVar[str] = "diffusion"
    Config: ClassVar[type[BaseModel]] = DiffusionConfig
    timing_metrics: ClassVar[Mapping[str, str]] = {
        "image_ms": "ms for one image: a whole sampling of the scenario's batch, divided by it",
        "step_ms": "ms for one step of the whole batch, on average",
        "resident_mb": "10**6 bytes of all models that are called, as the kernels hold them, and of caches",
        "peak_mb": "10**6 bytes while sampling: weights, caches, activations",
    }
    counts: Mapping[str, bool] = {"nfe": True, "evaluations": True}
    config: DiffusionConfig

    def __init__(self, config: BaseModel, seed: int = 0) -> None:
        super().__init__(config, seed)
        judged = {"fd": True, "content": False} if self.config.features else {}
        self.quality_metrics = {"mse": True, "psnr": False, "ssim": False, "noise": True, **judged}
        self.sensitivity_metrics = ("noise", "content_loss") if self.config.features else ("noise",)
        self.unavailable = {} if self.config.features else {"fd": _NO_FEATURES, "content": _NO_FEATURES}

    # -- load -------------------------------------------------------------------------------------

    def load(self, device: str) -> Built:
        """Load the model and what goes with it, and find its parts.

        Raises:
            JobError: a folder, file or class that can't be read, or things that do not fit together.
        """
        from autocomp.workloads import diffusion_load

        built = diffusion_load.load(self.config, device)
        self.prepare(built)
        return built

    def prepare(self, built: Built) -> None:
        """Declare ``built`` uncompressed and forget outputs of an earlier model; ``load`` ends with it."""
        from autocomp.workloads.diffusion_teacher import Trajectories

        built.changed.clear()
        built.state["schedule"] = built.state["default_schedule"]
        built.state |= {"teachers": {}, "trajectories": Trajectories()}

    # -- samples ----------------------------------------------------------------------------------

    def indices(self, split: str, n: int = 0) -> list[int]:
        """Indices of the first ``n`` samples of a split (0: all).

        Raises:
            JobError: no such split, or it has fewer samples.
        """
        if split not in SPLITS:
            raise JobError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        found = list(range(getattr(self.config.data, split)))
        if split == "proxy" and self.config.data.subset:
            found = self._subset
        if not 0 <= n <= len(found):
            raise JobError(f"{n} images asked of split {split!r}, which has {len(found)}: raise data.{split}")
        return found[: n or len(found)]

    @cached_property
    def _subset(self) -> list[int]:
        from autocomp.workloads.diffusion_images import read_subset

        return read_subset(self.config.data.subset)

    def noise(self, built: Built, split: str, indices: Sequence[int]) -> Tensor:
        """What the sampling of these samples begins with: float32 ``[n, C, H, W]`` on the device."""
        from autocomp.workloads.diffusion_images import sample_noise

        own = built.state["denoisers"][""]
        shape = (own.channels, *own.size)
        return sample_noise(self.config.data.seed, split, indices, shape).to(built.device)

    def sampler(self, built: Built, schedule: Schedule | None = None) -> Sampler:
        """A sampler of the models as they are; by the schedule in force unless another is given."""
        from autocomp.diffusion.sampler import Sampler

        state = built.state
        chosen = state["schedule"] if schedule is None else schedule
        return Sampler(state["denoisers"], state["scheduler_config"], chosen, self.config.guidance)

    def pictures(
        self, built: Built, split: str, indices: Sequence[int], *, schedule: Schedule | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Images of these samples in batches: position of the first one, and float32 ``[b, C, H, W]`` in
        [-1, 1] on the device.

        Raises:
            FloatingPointError: the model gives NaN or infinity.
        """
        from autocomp.diffusion.decode import decode

        sample, size = self.sampler(built, schedule), self.config.data.batch
        for first in range(0, len(indices), size):
            some = indices[first : first + size]
            conditions = built.state["conditions"].of(some, built.device)
            yield (
                first,
                decode(built.state["vae"], sample(self.noise(built, split, some), conditions)),
            )

    # -- the uncompressed model -------------------------------------------------------------------

    def ensure_teacher(self, built: Built, split: str, sequences: int = 0) -> None:
        """Record the uncompressed model's images of the first ``sequences`` samples of ``split`` (0: all),
        and its calls on the calibration images, unless they are recorded already.

        Raises:
            RuntimeError: something is missing and the model is not in its original state.
            JobError: the calls don't fit ``data.teacher_mb``, or the uncompressed model gives NaN.
        """
        indices = self.indices(split, sequences)
        teacher: Teacher | None = built.state["teachers"].get(split)
        trajectories: Trajectories = built.state["trajectories"]
        done = 0 if teacher is None else teacher.count
        if done >= len(indices) and trajectories.batches:
            return
        if not built.pristine:
            raise RuntimeError(
                f"the uncompressed model's images of {split!r} are not recorded and the model is compressed: "
                "restore the originals, then call ensure_teacher"
            )
        try:
            if not trajectories.batches:
                self._record_calls(built)
            self._record_images(built, split, indices, done)
        except FloatingPointError as error:
            raise JobError(
                f"the uncompressed model gives NaN or infinity on {split!r} in {self.config.dtype} ({error});"
                " set workload.dtype: float32, or another sampler"
            ) from error

    def _record_calls(self, built: Built) -> None:
        """Trajectories of the calibration images along the default schedule."""
        indices, default = self.indices("calibration"), built.state["default_schedule"]
        own = built.state["denoisers"][""]
        needed = 16 * len(indices) * len(default) * own.channels * own.size[0] * own.size[1]
        if needed > self.config.data.teacher_mb * 1e6 / 2:
            raise JobError(
                f"the model's outputs on {len(indices)} calibration images take {needed / 1e6:.0f} MB, more "
                "than half of data.teacher_mb: lower data.calibration, or raise data.teacher_mb"
            )
        found: Trajectories = built.state["trajectories"]
        for first in range(0, len(indices), self.config.data.batch):
            found.begin()
            some = indices[first : first + self.config.data.batch]
            conditions = built.state["conditions"].of(some, built.device)
            self.sampler(built, default)(self.noise(built, "calibration", some), conditions, found.observe)

    def _record_images(self, built: Built, split: str, indices: Sequence[int], done: int) -> None:
        from autocomp.workloads.diffusion_teacher import Teacher

        teacher: Teacher = built.state["teachers"].setdefault(split, Teacher())
        rest, extractor = indices[done:], built.state["extractor"]
        for _, images in self.pictures(built, split, rest, schedule=built.state["default_schedule"]):
            seen = None if extractor is None else extractor(images)
            teacher.add(images, seen, self._room(images))

    def _room(self, images: Tensor) -> int:
        """Images of one split that are kept for drift: half of the memory, shared by the splits."""
        each = 4 * images[0].numel()
        return max(1, int(self.config.data.teacher_mb * 1e6 / 2 / len(SPLITS) / each))

    # -- score ------------------------------------------------------------------------------------

    def score(self, built: Built, fidelity: Fidelity) -> tuple[dict[str, Estimate], int]:
        """The quality metrics of the model as it is, on the first ``fidelity.sequences`` images of
        ``fidelity.split`` (0: all), with ``nfe`` (steps of the schedule in force) and ``evaluations`` of a
        model for one image (both halves of guided steps); also the number of images.

        A fidelity named ``sensitivity`` gives ``sensitivity_metrics`` only: ``noise`` of that many
        calibration images, and ``content_loss``, how far the classifier's probabilities move (total variation
        distance, 0 to 1): smoother than the share of images that change class.

        Raises:
            RuntimeError: see ``ensure_teacher``.
            FloatingPointError: the model gives NaN or infinity.
        """
        self.ensure_teacher(built, fidelity.split, fidelity.sequences)
        if fidelity.name == "sensitivity":
            return self._sensitivity(built, fidelity)
        indices = self.indices(fidelity.split, fidelity.sequences)
        metrics = self._compared(built, fidelity.split, indices)
        metrics["noise"] = self._output_noise(built)
        schedule: Schedule = built.state["schedule"]
        evaluations = sum(1 + self._guided(built, step) for step in schedule.steps)
        metrics |= {"nfe": Estimate(float(len(schedule))), "evaluations": Estimate(float(evaluations))}
        return metrics, len(indices)

    def _output_noise(self, built: Built, images: int = 0) -> Estimate:
        if built.changed <= {"schedule"}:  # the model itself is as it was: nothing to replay
            return Estimate(0.0, 0.0, images or self.config.data.calibration)
        found: Estimate = built.state["trajectories"].noise(built.state["denoisers"][""], images)
        return found

    def _guided(self, built: Built, step: Step) -> bool:
        has_conditions = bool(built.state["denoisers"][step.model].conditions)
        return step.guidance and self.config.guidance != 1.0 and has_conditions

    def _sensitivity(self, built: Built, fidelity: Fidelity) -> tuple[dict[str, Estimate], int]:
        from autocomp.workloads.diffusion_scores import content_loss

        indices = self.indices(fidelity.split, fidelity.sequences)
        metrics = {"noise": self._output_noise(built, len(indices))}
        extractor: Extractor | None = built.state["extractor"]
        if extractor is not None:
            teacher: Teacher = built.state["teachers"][fidelity.split]
            pictures = self.pictures(built, fidelity.split, indices)
            metrics["content_loss"] = content_loss(pictures, teacher, extractor)
        return metrics, len(indices)

    def _compared(self, built: Built, split: str, indices: Sequence[int]) -> dict[str, Estimate]:
        """Metrics of images sampled by the schedule in force."""
        from autocomp.measure.images import fd_estimate
        from autocomp.workloads.diffusion_scores import compare

        extractor: Extractor | None = built.state["extractor"]
        labels = None if extractor is None else built.state["conditions"].labels(indices, extractor.classes)
        pictures, teacher = self.pictures(built, split, indices), built.state["teachers"][split]
        metrics, features = compare(pictures, teacher, extractor, labels)
        if features is not None:
            metrics["fd"] = fd_estimate(features, self.reference(built, split, len(features)))
        return metrics

    def reference(self, built: Built, split: str, n: int) -> Gaussian:
        """What ``fd`` is the distance to: the real images (computed once), or the uncompressed model's own
        first ``n`` images of the split. The latter start from the same noise, so that the distance of an
        unchanged model is 0. Standard errors of ``fd`` take it as known: they are of the generated images.

        Raises:
            JobError: the real images are of another size, or fewer than two were asked for.
        """
        from autocomp.measure.images import gaussian

        if n < 2:
            raise JobError(f"fd needs two or more images; {n} asked of split {split!r}")
        if not self.config.data.real:
            teacher: Teacher = built.state["teachers"][split]
            return gaussian(teacher.feature_rows(n))
        if "reference" not in built.state:
            features = built.state["extractor"].features(built.state["real"], self.config.data.batch)
            built.state["reference"] = gaussian(features)
        found: Gaussian = built.state["reference"]
        return found

    def features_of(self, built: Built, fidelity: Fidelity) -> np.ndarray:
        """Features float32 ``[n, d]`` of the images that ``score`` would look at, of the model as it is.

        Raises:
            JobError: the job names no extractor.
        """
        import torch

        extractor: Extractor | None = built.state["extractor"]
        if extractor is None:
            raise JobError(f"there are no features: {_NO_FEATURES}")
        indices = self.indices(fidelity.split, fidelity.sequences)
        rows = [extractor(x)[0].cpu() for _, x in self.pictures(built, fidelity.split, indices)]
        found: np.ndarray = torch.cat(rows).numpy()
        return found

    # -- time -------------------------------------------------------------------------------------

    def time(self, built: Built, *, thorough: bool = True) -> tuple[dict[str, Estimate], dict[str, Any]]:
        """The timing metrics of the schedule in force: the median of whole samplings of the scenario's batch.
        ``thorough`` changes nothing."""
        from autocomp.diffusion.decode import decode
        from autocomp.workloads.diffusion_serving import measure, zoo_serving

        del thorough
        s, schedule = self.config.scenario, built.state["schedule"]
        indices = [i % self.config.data.calibration for i in range(s.batch)]
        noise = self.noise(built, "calibration", indices)
        conditions = built.state["conditions"].of(indices, built.device)
        sample = self.sampler(built)
        with zoo_serving(built, schedule.models):
            return measure(
                built, schedule, lambda: decode(built.state["vae"], sample(noise, conditions)),
                batch=s.batch, threads=s.threads, repeats=s.repeats,
            )  # fmt: skip

    def kernel_rows(self, built: Built) -> Mapping[str, tuple[int, float]]:
        """A pass takes the scenario's batch, twice where steps are guided; an image takes one in each step of
        the default schedule, shared by the batch. None where a space is searched that changes the time but
        names no kernel calls (schedules, activations)."""
        if not set(built.state.get("decisions", ())) <= ADDITIVE:
            return {}
        batch, site = self.config.scenario.batch, built.site
        rows = batch * (2 if site.guided else 1)
        return {"image_ms": (rows, site.steps / batch), "step_ms": (rows, 1.0)}

    def exact(self, built: Built, additive: Mapping[str, Estimate]) -> Mapping[str, Estimate]:
        """``memory_mb`` is that of the models that the schedule in force calls, with what an attention plan
        holds: zoo members come on top of what the tables say, and the own model's weights are not held where
        no step calls it."""
        from autocomp.workloads.diffusion_serving import attention_bytes, stored_bytes

        called: Schedule = built.state["schedule"]
        if "memory_mb" not in additive:
            return additive
        caches = attention_bytes(built, called, self.config.scenario.batch) / 1e6
        if called.models == ("",):
            return {**additive, "memory_mb": Estimate(additive["memory_mb"].value + caches)}
        held = caches if "" in called.models else 0.0
        held += sum(stored_bytes(built.state["zoo"][name]) for name in called.models if name) / 1e6
        held += additive["memory_mb"].value if "" in called.models else built.state["vae_bytes"] / 1e6
        return {**additive, "memory_mb": Estimate(held)}

    def save(self, built: Built, folder: Path) -> None:
        """Write configurations of model and scheduler, and a VAE with its weights, to ``folder``; the model's
        own weights are the exporter's."""
        from autocomp.workloads.diffusion_load import save_assets

        save_assets(built, folder)
