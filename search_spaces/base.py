"""What a kind of compression must say about itself, and the model site that it is asked about.

To add a kind, write one file beside this one with one ``Space`` and register its name. Modules here
import torch inside functions only: the driver reads them and never loads weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from autocomp.errors import SpaceError
from autocomp.space import AdditiveTable, Candidate, Decision, SearchSpace, SpaceConstraint, Value

if TYPE_CHECKING:
    from autocomp.workloads.base import Built


class Stage(IntEnum):
    """The order in which the spaces of a joint search are applied to a model."""

    STRUCTURE = 0
    NUMERICS = 1
    RUNTIME = 2
    SCHEDULE = 3


@dataclass(frozen=True)
class Part:
    """One piece of a model that a space may change.

    Attributes:
        path: module path in the model, ``model.layers.0.self_attn.q_proj``.
        kind: ``linear``, ``embedding`` or another word that workload and space agree on.
        shape: ``(output features, input features)``; for an embedding ``(rows, width)``.
        block: index of the repeated block, ``None`` outside of one.
        tie: parts with the same tie read the same input (q/k/v, gate/up) or share a weight, so serving
            engines fuse them and want one format.
        role: ``body``, ``head`` (output projection) or ``embedding``.
        shared_with: path of the part that owns the weight, when this one only borrows it (tied head).
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    block: int | None = None
    tie: str = ""
    role: str = "body"
    shared_with: str = ""

    @property
    def numel(self) -> int:
        product = 1
        for n in self.shape:
            product *= n
        return product


@dataclass(frozen=True)
class ModelSite:
    """What a workload found in a model: parts, and the bytes of everything that is no part.

    Attributes:
        family: the model's type name (``llama``).
        parts: compressible pieces in execution order.
        other_bytes: bytes of all other weights and buffers (norms, biases), stored as loaded.
        fingerprint: hash of the weights' content: same weights, same hash, wherever they lie.
        itemsize: bytes of one weight that is left as it is.
    """

    family: str
    parts: tuple[Part, ...]
    other_bytes: int
    fingerprint: str
    itemsize: int = 2

    def part(self, path: str) -> Part:
        """The part at ``path``. Raises ``SpaceError`` when there is none."""
        found = self._by_path.get(path)
        if found is None:
            raise SpaceError(f"this {self.family} model has no part {path!r} ({len(self.parts)} parts)")
        return found

    @cached_property
    def _by_path(self) -> Mapping[str, Part]:
        return {p.path: p for p in self.parts}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSite:
        parts = tuple(Part(**{**p, "shape": tuple(p["shape"])}) for p in data["parts"])
        return cls(data["family"], parts, data["other_bytes"], data["fingerprint"], data["itemsize"])


@dataclass(frozen=True)
class Resources:
    """What one option of one decision takes.

    Attributes:
        metrics: exact additive costs by metric (``memory_mb``: 10**6 bytes; ``code_bits``: bits).
        ops: kernel calls of one forward step: operation key -> number of calls. A key names everything
            the time depends on except the batch (``linear/576x1536/w4g64``).
        executes: backend that runs it on the asked device; empty when it can only be simulated there.
        reason: why not, when ``executes`` is empty, with the remedy.
    """

    metrics: Mapping[str, float]
    ops: Mapping[str, int] = field(default_factory=dict)
    executes: str = ""
    reason: str = ""


class Space(ABC):
    """One kind of compression: its decisions, what a choice does to the model, what an option costs."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    Config: ClassVar[type[BaseModel]]

    def __init__(self, config: BaseModel) -> None:
        self.config = config

    @abstractmethod
    def decisions(self, site: ModelSite) -> list[Decision]:
        """Decisions for this model; names start with ``{self.name}/``.

        Raises:
            SpaceError: the configuration leaves nothing to decide, or names what the model lacks.
        """

    @abstractmethod
    def resources(self, site: ModelSite, decision: Decision, option: Value, device: str) -> Resources:
        """Exact costs of an option and what executes it on ``device`` (``cpu``, ``cuda``)."""

    @abstractmethod
    def apply(self, built: Built, choices: Mapping[str, Value], *, serving: bool) -> None:
        """Bring the built model to ``choices`` (decision name -> option), from whatever state it is in.

        With ``serving`` false the model computes the compressed weights' exact values in its own dtype
        (fast to score in batches); with ``serving`` true the kernels that will serve it are in place.
        """

    def constraints(self, site: ModelSite, decisions: Sequence[Decision]) -> list[SpaceConstraint]:
        """Constraints between this space's decisions; none by default."""
        del site, decisions
        return []

    def baselines(self, site: ModelSite, decisions: Sequence[Decision]) -> list[Candidate]:
        """Uniform assignments of this space: each option that every decision has."""
        del site
        return SearchSpace(tuple(decisions)).uniform()

    @abstractmethod
    def neutral(self, decision: Decision) -> Value:
        """The option that leaves the model as it was."""


def exact_tables(
    site: ModelSite, resources: Mapping[str, Mapping[Value, Resources]]
) -> dict[str, AdditiveTable]:
    """What needs no measuring, from the options' resources (decision -> option -> resources).

    ``memory_mb``: 10**6 bytes of all weights and buffers, searched or not. ``avg_bits``: mean code bits of
    the searched weights (scales and the like are in ``memory_mb``); not there when no weight is searched.
    """
    memory = {d: {o: r.metrics["memory_mb"] for o, r in row.items()} for d, row in resources.items()}
    bits = {d: {o: r.metrics.get("code_bits", 0.0) for o, r in row.items()} for d, row in resources.items()}
    weights = sum(next(iter(row.values())).metrics.get("weights", 0.0) for row in resources.values() if row)
    parts = [p for p in site.parts if p.kind in ("linear", "embedding") and not p.shared_with]
    rest = site.other_bytes + site.itemsize * (sum(p.numel for p in parts) - weights)
    tables = {"memory_mb": AdditiveTable("memory_mb", rest / 1e6, memory, exact=True)}
    if weights:
        per_weight = {d: {o: b / weights for o, b in row.items()} for d, row in bits.items()}
        tables["avg_bits"] = AdditiveTable("avg_bits", 0.0, per_weight, exact=True)
    return tables
