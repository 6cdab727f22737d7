"""What a kind of compression must say about itself, and the model site that it is asked about.

To add a kind, write one file beside this one with one ``Space`` and register its name. Modules here
import torch inside functions only: the driver reads them and never loads weights.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from autocomp.errors import SpaceError
from autocomp.space import AdditiveTable, Candidate, Choice, Decision, SearchSpace, SpaceConstraint, Value

if TYPE_CHECKING:
    from autocomp.workloads.base import Built


MATRICES = ("linear", "conv")
"""Kinds of parts whose weight is a matrix that multiplies activations."""


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
        kind: ``linear``, ``conv``, ``embedding`` or another word that workload and space agree on.
        shape: ``(output features, input features)``; for an embedding ``(rows, width)``, for a convolution
            ``(output channels, input channels * kernel height * kernel width)``.
        block: index of the repeated block, ``None`` outside of one.
        tie: parts with the same tie read the same input (q/k/v, gate/up) or share a weight, so serving
            engines fuse them and want one format.
        role: ``body``, ``head`` (output projection) or ``embedding``.
        shared_with: path of the part that owns the weight, when this one only borrows it (tied head).
        window: of a ``kv_group``: the last tokens its layer looks at by itself, 0 for all.
        rows: of a ``linear`` in an image model: rows of its input for each row of the model's (the image's
            tokens, or 1 where it reads one vector an image); 1 in language models, whose rows are tokens. Of
            a ``conv``: its output positions.
        conv: of a ``conv``: kernel, stride, padding and the size of the image that it reads,
            ``k3x3s1x1p1x1@16x16``.

    A part of kind ``image_attention`` is an attention module over the tokens of an image: ``shape`` is
    ``(heads, features a head, image tokens)``, with the text's tokens behind where the two are one sequence
    (SD3, Flux); ``role`` is the name of its form (``diffusion/attention_forms.py``).

    A part of kind ``kv_group`` is one key/value head of an attention module with the query heads that share
    it: ``path`` is that of the module (which is in ``tie``) with ``.kv0``, ``.kv1`` ... behind it, ``shape``
    is ``(query heads, features a head)``.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    block: int | None = None
    tie: str = ""
    role: str = "body"
    shared_with: str = ""
    window: int = 0
    rows: int = 1
    conv: str = ""

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
        kv_groups: key/value heads (parts of kind ``kv_group``) in execution order; none where attention can't
            be planned.
        other_bytes: bytes of all other weights and buffers (norms, biases), stored as loaded.
        fingerprint: hash of the weights' content: same weights, same hash, wherever they lie.
        itemsize: bytes of one weight (or cached key or value) that is left as it is.
        context, batch: tokens and sequences in the caches of the deployment scenario; 0 where there are none.
        lengths: sequence lengths that profiles look at.
        lacking: kind of part that a space might ask for -> why this model has none.
        image_attention: attention modules of an image model (parts of that kind) in execution order.
        models: names of the models that a schedule may call, the own (empty) first; none without sampling.
        snapshots: saved checkpoints of the model that the job names.
        steps: steps of the uncompressed model's schedule; 0 without sampling.
        guided: whether they are guided: the model's batch is then two halves.
        scheduler: of a diffusion model: its scheduler's configuration, from which its noise levels follow.
    """

    family: str
    parts: tuple[Part, ...]
    other_bytes: int
    fingerprint: str
    itemsize: int = 2
    context: int = 0
    batch: int = 1
    lengths: tuple[int, ...] = ()
    lacking: Mapping[str, str] = field(default_factory=dict)
    kv_groups: tuple[Part, ...] = ()
    image_attention: tuple[Part, ...] = ()
    models: tuple[str, ...] = ()
    snapshots: int = 0
    steps: int = 0
    guided: bool = False
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    def part(self, path: str) -> Part:
        """The part at ``path``. Raises ``SpaceError`` when there is none."""
        found = self._by_path.get(path)
        if found is None:
            raise SpaceError(f"this {self.family} model has no part {path!r} ({len(self.parts)} parts)")
        return found

    @cached_property
    def _by_path(self) -> Mapping[str, Part]:
        return {p.path: p for p in (*self.parts, *self.kv_groups, *self.image_attention)}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSite:
        def parts(name: str) -> tuple[Part, ...]:
            return tuple(Part(**{**p, "shape": tuple(p["shape"])}) for p in data.get(name, ()))

        lists = {k: parts(k) for k in ("parts", "kv_groups", "image_attention")}
        plain = {k: tuple(data.get(k, ())) for k in ("lengths", "models")}
        return cls(**{**data, **lists, **plain})


@dataclass(frozen=True)
class Resources:
    """What one option of one decision takes.

    Attributes:
        metrics: exact additive costs by metric (``memory_mb``: 10**6 bytes; ``code_bits``: bits).
        ops: kernel calls of one forward step: operation key -> number of calls, on average where steps
            differ. A key names everything the time depends on except the batch (``linear/576x1536/w4g64``).
        executes: backend that runs it on the asked device; empty when it can only be simulated there.
        reason: why not, when ``executes`` is empty, with the remedy.
    """

    metrics: Mapping[str, float]
    ops: Mapping[str, float] = field(default_factory=dict)
    executes: str = ""
    reason: str = ""


class Space(ABC):
    """One kind of compression: its decisions, what a choice does to the model, what an option costs."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    Config: ClassVar[type[BaseModel]]
    #: What gives its sensitivities: ``weights`` (the space has ``move``), ``attention`` (its decisions are of
    #: ``kv_group`` parts), ``image_attention`` (it has ``question``), or nothing: then single changes are
    #: measured.
    profiled_by: ClassVar[str] = ""

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
        """Bring the built model to ``choices`` (decision name -> option), from whatever state it is in, be it
        one that a failure (out of memory) left half-way.

        With ``serving`` false the model computes the compressed values exactly in its own dtype (fast to
        score in batches); with ``serving`` true the kernels that will serve it are in place.
        """

    def traits(self, site: ModelSite, choices: Mapping[str, Value]) -> list[float]:
        """What theory says about ``choices`` before anything is measured, for predictors; always as many
        numbers. ``decisions`` has been called before."""
        del site, choices
        return []

    def notes(self, site: ModelSite) -> list[str]:
        """What a user would expect this space to search in the model and it does not, with the reason."""
        del site
        return []

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

    def offered_neutral(self, decision: Decision) -> Value:
        """The neutral option, or what comes nearest to it where that is not on offer: the last (largest)
        option, the middle of an interval."""
        domain, value = decision.domain, self.neutral(decision)
        if domain.contains(value):
            return value
        return domain.options[-1] if isinstance(domain, Choice) else 0.5 * (domain.low + domain.high)


def regular_expressions(value: list[str]) -> list[str]:
    """``value`` when all of it compiles; raises ``ValueError`` (for pydantic) that names what does not."""
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return value


def exact_tables(
    site: ModelSite, resources: Mapping[str, Mapping[Value, Resources]]
) -> dict[str, AdditiveTable]:
    """What needs no measuring, from the options' resources (decision -> option -> resources).

    ``memory_mb``: 10**6 bytes of all weights and buffers, searched or not, and of the key/value caches when
    these are searched. ``avg_bits``: mean code bits of the searched weights (scales and the like are in
    ``memory_mb``); not there when no weight is searched. Every other metric that options name is the sum of
    what they say (``kv_mb``, ``density``).
    """
    weights = sum(next(iter(row.values())).metrics.get("weights", 0.0) for row in resources.values() if row)
    parts = [p for p in site.parts if p.kind in (*MATRICES, "embedding") and not p.shared_with]
    rest = site.other_bytes + site.itemsize * (sum(p.numel for p in parts) - weights)
    named = dict.fromkeys(
        ["memory_mb", *(m for x in resources.values() for r in x.values() for m in r.metrics)]
    )
    tables = {}
    for metric in named:
        if metric not in ("weights", "code_bits"):
            base = rest / 1e6 if metric == "memory_mb" else 0.0
            tables[metric] = AdditiveTable(metric, base, _costs(resources, metric), exact=True)
    if weights:
        bits = _costs(resources, "code_bits")
        per_weight = {d: {o: b / weights for o, b in row.items()} for d, row in bits.items()}
        tables["avg_bits"] = AdditiveTable("avg_bits", 0.0, per_weight, exact=True)
    return tables


def _costs(resources: Mapping[str, Mapping[Value, Resources]], metric: str) -> dict[str, dict[Value, float]]:
    """Decision -> option -> cost, for the decisions that the metric depends on."""
    costs = {d: {o: r.metrics.get(metric, 0.0) for o, r in row.items()} for d, row in resources.items()}
    return {d: row for d, row in costs.items() if any(metric in r.metrics for r in resources[d].values())}
