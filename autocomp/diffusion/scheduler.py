"""A sampling schedule as a diffusers scheduler: saved with a pipeline, loaded and stepped by it.

Pipelines own the loop and the guidance, so a step's ``model`` and ``guidance`` take effect only in
``Sampler``; times and solver are the same here and there, to the bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from autocomp.diffusion.noise import NoiseSchedule
from autocomp.diffusion.schedule import Schedule, uniform_schedule
from autocomp.diffusion.solver import History, plan

#: steps of a scheduler that was made without a schedule: order 2 on data, evenly spaced
DEFAULT_STEPS = 20


class UnifiedScheduler(SchedulerMixin, ConfigMixin):
    """DDIM, DPM-Solver(++), UniPC and their mixtures, step by step as ``steps`` says.

    The number of steps is part of the schedule: ``set_timesteps`` takes any number, as pipelines pass their
    own default, and uses the schedule's.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        use_flow_sigmas: bool = False,
        shift: float = 1.0,
        steps: Sequence[Mapping[str, Any]] | None = None,
        end: float = 0.0,
    ) -> None:
        """
        Args:
            num_train_timesteps: K; time t is timestep ``t K - 1``, and ``t K`` for flows.
            beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: see ``DDIMScheduler``.
            prediction_type: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``.
            use_flow_sigmas: the model is a flow; betas are not read.
            shift: of a flow's default times.
            steps: fields of ``Step``, one mapping a step; evenly spaced steps of order 2 unless given.
            end: ``Schedule.end``.

        Raises:
            SpaceError: for steps that are no schedule.
            CapabilityError: for an unknown beta schedule or prediction type.
        """
        self.noise = NoiseSchedule.of(dict(self.config))
        if steps is None:
            self.schedule = uniform_schedule(self.noise.default_times(DEFAULT_STEPS), order=2, end=end)
        else:
            self.schedule = Schedule.from_json({"steps": [dict(s) for s in steps], "end": end})
        self.timesteps = self._all_timesteps()
        self._begin: int | None = None
        self._index: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], schedule: Schedule) -> UnifiedScheduler:
        """For the noise of another scheduler's configuration.

        Raises:
            CapabilityError: if that defines its noise neither by betas nor as a flow.
        """
        noise = NoiseSchedule.of(config)
        names = (
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
            "shift",
        )
        kept = {n: config[n] for n in names if config.get(n) is not None}
        if "trained_betas" in kept:
            kept["trained_betas"] = [float(b) for b in kept["trained_betas"]]
        return cls(
            num_train_timesteps=noise.steps,
            prediction_type=noise.prediction,
            use_flow_sigmas=noise.kind == "flow",
            **kept,
            **schedule.to_json(),
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a sampling. All but ``device`` is what pipelines pass and the schedule already says."""
        self.num_inference_steps = len(self.schedule)
        self.timesteps = self._all_timesteps().to(device)
        self._begin = self._index = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The step that the next sampling starts from, as image-to-image pipelines ask; the solver begins
        anew."""
        self._begin, self._index = begin_index, None

    @property
    def begin_index(self) -> int | None:
        return self._begin

    @property
    def step_index(self) -> int | None:
        """Of the next step; None before the first one."""
        return self._index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """From one step's sample to the next one's; shape [B, ...] and dtype are the sample's.

        Steps are counted: ``timestep`` only tells where a sampling begins that ``set_begin_index`` did not
        place.

        Raises:
            ValueError: past the last step, or for a first timestep that is not in the schedule.
        """
        if self._index is None:
            self._start(self._find(timestep) if self._begin is None else self._begin)
        if not self._moves:
            raise ValueError(f"all {len(self.schedule)} steps are done; call set_timesteps to begin again")
        sample = self._history.move(self._moves.popleft(), sample, model_output)
        self._index = len(self.schedule) - len(self._moves)
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples [B, ...] as they are at these timesteps [B]."""
        times = [self.noise.time(t) for t in timesteps.tolist()]
        shape = -1, *([1] * (original_samples.ndim - 1))
        alphas = original_samples.new_tensor([self.noise.alpha(t) for t in times]).view(shape)
        sigmas = original_samples.new_tensor([self.noise.sigma(t) for t in times]).view(shape)
        return alphas * original_samples + sigmas * noise

    def __len__(self) -> int:
        return self.noise.steps

    def _all_timesteps(self) -> Tensor:
        return torch.tensor([self.noise.model_time(s.time) for s in self.schedule.steps], dtype=torch.float32)

    def _start(self, index: int) -> None:
        rest = Schedule(self.schedule.steps[index:], self.schedule.end)
        self._moves, self._history = deque(plan(self.noise, rest)), History()

    def _find(self, timestep: float | Tensor) -> int:
        distance = (self.timesteps - timestep).abs()
        index = int(distance.argmin())
        if distance[index] > 1e-2:
            raise ValueError(f"timestep {float(timestep)} is none of {self.timesteps.tolist()}")
        return index
