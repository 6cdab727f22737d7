"""Where a sampling is: read by attention processors and activation hooks, written by the sampler."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

_ATTRIBUTE = "_autocomp_sampling"


@dataclass
class SamplingState:
    """The step that a model is called for.

    Attributes:
        index: number of the step in the whole schedule, from 0.
        time: of the step, in (0, 1].
        total: steps of the schedule.
        guided: whether the batch is the halves [conditional; unconditional], in this order.
        scale: of classifier-free guidance, in guided steps.
        model: the name under which the schedule calls this model; empty for the workload's own.
        started: grows at the start of every sampling; what was cached under another number is void.
        text: tokens of the text in the sequences that text and image share (SD3, Flux), written by the
            ``Denoiser``; 0 elsewhere.
    """

    index: int = 0
    time: float = 1.0
    total: int = 1
    guided: bool = False
    scale: float = 1.0
    model: str = ""
    started: int = 0
    text: int = 0

    def combined(self, output: Tensor) -> Tensor:
        """What the solver gets of a model's output ``[b, ...]``: ``free + scale * (aimed - free)`` of the
        halves of a guided step, ``[b / 2, ...]``, else the output as it is."""
        if not self.guided:
            return output
        aimed, free = output.chunk(2)
        return free + self.scale * (aimed - free)


def state_of(model: nn.Module) -> SamplingState:
    """The state that this model's sampler writes; created on first use and kept on the module."""
    state = getattr(model, _ATTRIBUTE, None)
    if state is None:
        state = SamplingState()
        setattr(model, _ATTRIBUTE, state)
    return state
