"""Run a sampling schedule: which model is called when, with or without guidance, and the solver between."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autocomp.diffusion.denoiser import Denoiser
from autocomp.diffusion.noise import NoiseSchedule
from autocomp.diffusion.schedule import Schedule
from autocomp.diffusion.solver import History, plan
from autocomp.diffusion.state import SamplingState
from autocomp.errors import SpaceError

#: called with (state, samples, timestep, conditions, output), doubled where the step is guided
Observer = Callable[[SamplingState, Tensor, float, Mapping[str, Tensor], Tensor], None]


class Sampler:
    """Noise to images by one schedule.

    A guided step calls its model once, on the doubled batch [conditional; unconditional]. Nothing is
    doubled where the step or the guidance scale (1.0) says so, or where the model has no conditions.
    """

    def __init__(
        self,
        models: Mapping[str, Denoiser],
        scheduler_config: Mapping[str, object],
        schedule: Schedule,
        guidance: float = 1.0,
    ) -> None:
        """
        Args:
            models: under the names that the schedule's steps use; "" is the workload's own.
            scheduler_config: of a diffusers scheduler, for the noise and the kind of output.
            schedule: times, solver, models and guidance of the steps.
            guidance: scale of classifier-free guidance; 1.0 is none.

        Raises:
            SpaceError: for a schedule that names a model that is not there.
            CapabilityError: for a scheduler whose noise is unknown.
        """
        unknown = [name for name in schedule.models if name not in models]
        if unknown:
            raise SpaceError(f"the schedule calls the models {unknown}; there are {sorted(models)}")
        self.models, self.schedule, self.guidance = dict(models), schedule, guidance
        self.noise = NoiseSchedule.of(scheduler_config)
        self._moves = plan(self.noise, schedule)
        self._times = [self.noise.model_time(s.time) for s in schedule.steps]

    @torch.inference_mode()
    def __call__(
        self, noise: Tensor, conditions: Mapping[str, Tensor], observe: Observer | None = None
    ) -> Tensor:
        """Samples of the shape and dtype of ``noise`` [B, C, H, W]; the same noise gives the same samples.

        Args:
            conditions: one row for each sample; ``null_{name}`` entries are explained at ``Denoiser.null``.
            observe: sees every model call.

        Raises:
            FloatingPointError: when the samples are not finite, naming the step that began it.
        """
        calls = self._start(conditions)
        history, sums, x = History(), [], noise
        for i, step in enumerate(self.schedule.steps):
            denoiser, guided = self.models[step.model], self._guided(i)
            given = calls[step.model, guided]
            self._enter(denoiser.state, i, guided)
            inputs = torch.cat([x, x]) if guided else x
            output = denoiser(inputs, self._times[i], given)
            if observe is not None:
                observe(denoiser.state, inputs, self._times[i], given, output)
            output = denoiser.state.combined(output)
            sums.append(output.sum(dtype=torch.float32))
            x = history.move(self._moves[i], x, output)
        if not x.isfinite().all():
            raise FloatingPointError(self._blame(sums))
        return x

    def _guided(self, index: int) -> bool:
        step = self.schedule.steps[index]
        return step.guidance and self.guidance != 1.0 and bool(self.models[step.model].conditions)

    def _start(self, conditions: Mapping[str, Tensor]) -> dict[tuple[str, bool], dict[str, Tensor]]:
        """Every model's state begins anew; the conditions of its calls, by (name, guided)."""
        for name in self.schedule.models:
            self.models[name].state.started += 1
        plain = {n: c for n, c in conditions.items() if not n.startswith("null_")}
        calls: dict[tuple[str, bool], dict[str, Tensor]] = {}
        for i, step in enumerate(self.schedule.steps):
            key = step.model, self._guided(i)
            if key not in calls:
                null = self.models[step.model].null(conditions) if key[1] else {}
                calls[key] = {n: torch.cat([c, null[n]]) for n, c in plain.items()} if null else plain
        return calls

    def _enter(self, state: SamplingState, index: int, guided: bool) -> None:
        step = self.schedule.steps[index]
        state.index, state.time, state.total = index, step.time, len(self.schedule)
        state.guided, state.scale, state.model = guided, self.guidance, step.model

    def _blame(self, sums: list[Tensor]) -> str:
        bad = next((i for i, s in enumerate(sums) if not math.isfinite(s.item())), None)
        if bad is None:
            return f"the samples overflowed, though every model output was finite; schedule {self.schedule}"
        step = self.schedule.steps[bad]
        model = f" of model {step.model!r}" if step.model else ""
        place = f"step {bad + 1} of {len(self.schedule)} (time {step.time:.4f})"
        return f"the output{model} at {place} is not finite"
