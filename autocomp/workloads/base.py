"""The interface of a workload: model, data, quality and deployment scenario of one family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from autocomp.errors import CapabilityError
from autocomp.search_spaces.base import ModelSite
from autocomp.trial import Estimate, Fidelity

if TYPE_CHECKING:
    import torch


@dataclass
class Built:
    """A loaded model and everything a worker keeps beside it. Lives in the worker's process only.

    Attributes:
        model: the module, in its scoring state or its serving state (see ``Space.apply``).
        site: what was found in it.
        device: ``cpu`` or ``cuda:0``.
        originals: path -> uncompressed weight, kept so that every change can be undone.
        state: scratch of spaces and of the workload, by name (layer bank, caches, teacher outputs).
        changed: what is compressed at this moment (``weights``, ``attention``): whoever changes the model
            adds its word, and takes it away after restoring the originals.
    """

    model: torch.nn.Module
    site: ModelSite
    device: str
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    @property
    def pristine(self) -> bool:
        """Whether the model is uncompressed."""
        return not self.changed


class Workload(ABC):
    """One model family. Metric names and units are declared, so that jobs can be checked early."""

    kind: ClassVar[str]
    Config: ClassVar[type[BaseModel]]
    #: quality metric -> True when smaller is better
    quality_metrics: Mapping[str, bool]
    #: timing metric -> unit, in words
    timing_metrics: ClassVar[Mapping[str, str]]
    #: what ``score`` counts beside quality -> True when smaller is better: no sensitivity stands for these
    counts: Mapping[str, bool] = {}
    #: Losses (0 for the uncompressed model) that ``score`` gives at a fidelity named ``sensitivity``. The
    #: first stands for every quality metric in a search; ``x_loss`` after it for the metric ``x`` alone.
    sensitivity_metrics: tuple[str, ...] = ("kl",)
    #: Quality metrics in whose order the means of ``sequence_values`` put candidates. Empty where quality is
    #: not a mean over the proxy split: no subset of it can then be chosen by ``autocomp proxy``.
    sequence_metrics: ClassVar[tuple[str, ...]] = ()
    #: metric -> what the job lacks for it, for metrics that another configuration would have
    unavailable: Mapping[str, str] = {}

    def __init__(self, config: BaseModel, seed: int = 0) -> None:
        self.config = config
        self.seed = seed

    @abstractmethod
    def load(self, device: str) -> Built:
        """Load the model, find its parts. Raises ``JobError`` for a path or format that can't be read."""

    @abstractmethod
    def score(self, built: Built, fidelity: Fidelity) -> tuple[dict[str, Estimate], int]:
        """Quality of the model as it is now on ``fidelity.split``; also the number of tokens scored."""

    def sequence_values(self, built: Built) -> tuple[dict[str, list[float]], dict[str, int | str]]:
        """What each sequence of the whole proxy split gives for the model as it is, by ``sequence_metrics``,
        and what identifies these sequences.

        Raises:
            CapabilityError: this workload has no such values.
        """
        del built
        raise CapabilityError(
            f"workload {self.kind} is not scored by single sequences; no subset can be chosen"
        )

    @abstractmethod
    def time(self, built: Built, *, thorough: bool = True) -> tuple[dict[str, Estimate], dict[str, Any]]:
        """Latency and memory of the serving model in the scenario, and details for the record.

        ``thorough`` asks for what is only worth its time on a final candidate.
        """

    def kernel_rows(self, built: Built) -> Mapping[str, tuple[int, float]]:
        """Timing metrics that kernel times add up to -> rows of the model's input in one forward pass, and
        how many passes the metric stands for. None by default: such a metric is only measured."""
        del built
        return {}

    def exact(self, built: Built, additive: Mapping[str, Estimate]) -> Mapping[str, Estimate]:
        """Exact metrics of the model as it is, from what the additive tables say: a workload corrects what
        does not add up (models that are loaded only when something calls them)."""
        del built
        return additive

    def runtime(self, built: Built) -> tuple[str, str]:
        """How ``time`` runs this model, and why not in the fastest way that we have (empty when it does).
        Asked while the model is uncompressed, before anything is timed."""
        del built
        return "eager", ""

    @abstractmethod
    def save(self, built: Built, folder: Path) -> None:
        """Write configuration and tokenizer (not weights) so that ``folder`` can be loaded."""
