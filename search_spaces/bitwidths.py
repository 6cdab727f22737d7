"""Bits of every linear layer: how each weight is stored, one choice a linear, tied group, block or model.

In diffusion models 2-D convolutions are layers too: their weights are matrices of output channels by input
channels and taps of the kernel, and the same kernels multiply them with the patches of the image.

Options are scheme labels (``w4g64``; see ``autocomp.quantize.scheme``). The space covers LLM-MQ (bits and
16-bit outliers per layer), and the per-layer formats of mixed-precision servers (``granularity: tied``
keeps q/k/v and gate/up alike, which engines that fuse them require).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from autocomp.errors import SpaceError
from autocomp.quantize.scheme import Scheme
from autocomp.search_spaces.base import (
    MATRICES,
    ModelSite,
    Part,
    Resources,
    Space,
    Stage,
    regular_expressions,
)
from autocomp.space import Candidate, Choice, Decision, Value

if TYPE_CHECKING:
    import torch

    from autocomp.workloads.base import Built


class BitwidthsConfig(BaseModel):
    """Options of the ``bitwidths`` space.

    Attributes:
        bits: weight bits to choose from; each becomes an option with ``group``, ``symmetric``, ``outliers``.
        group: weights along the input dimension that share a scale; 0 is the whole row.
        symmetric: without (true) or with (false) a zero point.
        outliers: percent of the largest weights kept in 16 bits (LLM-MQ: 0.5).
        options: scheme labels; when given, they replace the five fields above.
        embeddings: labels for the input embedding (and a head tied to it); empty leaves it alone.
        head: labels for an output head with a weight of its own; empty leaves it alone.
        granularity: what shares a choice: each ``linear`` (or convolution), ``tied`` group, ``block`` or the
            whole ``model``.
        exclude: regular expressions; linears and convolutions whose path matches one (anywhere) stay as they
            are.
        method: rounding: ``rtn``, ``mse`` (clipping), ``gptq`` (error-compensated, on calibration data) or
            ``gptq-mse`` (both: the best where time allows).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: list[int] = [3, 4, 8, 16]
    group: int = 64
    symmetric: bool = True
    outliers: float = 0.0
    options: list[str] = Field(default_factory=list)
    embeddings: list[str] = Field(default_factory=list)
    head: list[str] = Field(default_factory=list)
    granularity: Literal["linear", "tied", "block", "model"] = "tied"
    exclude: list[str] = Field(default_factory=list)
    method: Literal["rtn", "mse", "gptq", "gptq-mse"] = "rtn"

    @field_validator("options", "embeddings", "head")
    @classmethod
    def _labels(cls, value: list[str]) -> list[str]:
        return [Scheme.parse(label).label for label in value]

    @field_validator("exclude")
    @classmethod
    def _patterns(cls, value: list[str]) -> list[str]:
        return regular_expressions(value)

    def labels(self) -> list[str]:
        """Options of a decoder linear, smallest first."""
        if self.options:
            schemes = [Scheme.parse(label) for label in self.options]
        else:
            schemes = [
                Scheme(b) if b == 16 else Scheme(b, self.group, self.symmetric, self.outliers)
                for b in self.bits
            ]
        return _by_size(schemes)

    def model_post_init(self, context: Any) -> None:
        self.labels()  # a bad bit count or group is a configuration error, not a surprise later


def _ends_at(label: str, ends: Sequence[Decision]) -> dict[str, Value]:
    return {d.name: label if d.domain.contains(label) else d.options[-1] for d in ends}


def _by_size(schemes: Sequence[Scheme]) -> list[str]:
    """Unique labels, smallest storage first, so that neighbours in the list are neighbours in size."""
    size = {s.label: s.weight_bytes(1024, 4096) for s in schemes}
    return sorted(size, key=lambda label: (size[label], label))


class Bitwidths(Space):
    """Per-layer weight formats. See ``BitwidthsConfig`` for the options."""

    name: ClassVar[str] = "bitwidths"
    stage: ClassVar[Stage] = Stage.NUMERICS
    profiled_by: ClassVar[str] = "weights"
    Config: ClassVar[type[BaseModel]] = BitwidthsConfig
    config: BitwidthsConfig

    def decisions(self, site: ModelSite) -> list[Decision]:
        self._check_names(site)
        groups: dict[str, list[Part]] = {}
        for part in self._searched(site):
            groups.setdefault(self._group(part), []).append(part)
        options = self.config.labels()
        found = [self._decision(key, parts, options) for key, parts in groups.items()]
        found += self._ends(site)
        if not found:
            linears = sum(p.kind in MATRICES for p in site.parts)
            raise SpaceError(
                f"bitwidths finds nothing to quantize in this {site.family} model: {linears} linears, all"
                f" excluded by {self.config.exclude}"
            )
        return found

    def _check_names(self, site: ModelSite) -> None:
        """Settings that name what this model lacks are mistakes, not wishes to be passed over."""
        for pattern in self.config.exclude:
            if not any(re.search(pattern, p.path) for p in site.parts):
                examples = [p.path for p in site.parts if p.role == "body"][:2]
                raise SpaceError(
                    f"bitwidths.exclude: {pattern!r} matches no part of this {site.family} model (its paths"
                    f" look like {examples}); remove it"
                )
        if self.config.embeddings and not any(p.role == "embedding" for p in site.parts):
            raise SpaceError(
                f"bitwidths.embeddings: this {site.family} model has no plain embedding; remove it"
            )
        if self.config.head and not any(p.role == "head" and not p.shared_with for p in site.parts):
            raise SpaceError(
                f"bitwidths.head: this {site.family} model has no output head with a weight of its own; a"
                " head tied to the embedding follows `embeddings`"
            )

    def _searched(self, site: ModelSite) -> list[Part]:
        patterns = [re.compile(p) for p in self.config.exclude]
        return [
            p
            for p in site.parts
            if p.kind in MATRICES and p.role == "body" and not any(x.search(p.path) for x in patterns)
        ]

    def _group(self, part: Part) -> str:
        match self.config.granularity:
            case "tied":
                return part.tie or part.path
            case "block":
                return f"block {part.block}" if part.block is not None else part.path
            case "model":
                return "model"
        return part.shared_with or part.path

    def _decision(self, key: str, parts: Sequence[Part], options: Sequence[str]) -> Decision:
        blocks = {p.block for p in parts}
        sites = tuple(p.path for p in parts)
        name = f"{self.name}/{common_name(sites, key)}"
        block = blocks.pop() if len(blocks) == 1 else None
        return Decision(name, Choice(tuple(options), ordered=True), sites, self.name, block)

    def _ends(self, site: ModelSite) -> list[Decision]:
        """Decisions for the embedding (with a head tied to it) and for a head of its own."""
        found = []
        for part in site.parts:
            if part.role == "embedding" and self.config.embeddings:
                borrowers = tuple(p.path for p in site.parts if p.shared_with == part.path)
                labels = _by_size([Scheme.parse(x) for x in self.config.embeddings])
                found.append(self._decision(part.path, [part, *(site.part(b) for b in borrowers)], labels))
            elif part.role == "head" and not part.shared_with and self.config.head:
                labels = _by_size([Scheme.parse(x) for x in self.config.head])
                found.append(self._decision(part.path, [part], labels))
        return found

    def neutral(self, decision: Decision) -> Value:
        return "w16"

    def baselines(self, site: ModelSite, decisions: Sequence[Decision]) -> list[Candidate]:
        """One label for all linears, with every label for embedding and head (``w4g64`` with ``w8`` ends).

        An end that lacks a label which the other end has takes its own largest one.
        """
        ends = [d for d in decisions if site.part(d.sites[0]).role != "body"]
        body = [d for d in decisions if d not in ends]
        if not ends or not body:
            return super().baselines(site, decisions)
        labels = _by_size([Scheme.parse(str(o)) for d in ends for o in d.options])
        found = [
            Candidate.of(dict.fromkeys([d.name for d in body], label) | _ends_at(end, ends))
            for label in reversed(self.config.labels())
            for end in reversed(labels)
        ]
        return list(dict.fromkeys(found))

    def resources(self, site: ModelSite, decision: Decision, option: Value, device: str) -> Resources:
        from autocomp.kernels.ops import capability

        scheme = Scheme.parse(str(option))
        bytes_, bits, numel = 0, 0, 0
        ops: dict[str, int] = {}
        backends, reasons = [], []
        for part in (site.part(path) for path in decision.sites):
            rows, columns = part.shape
            if not part.shared_with:
                bytes_ += (
                    site.itemsize * part.numel if scheme.is_dense else scheme.weight_bytes(rows, columns)
                )
                bits, numel = bits + scheme.bits * part.numel, numel + part.numel
            if part.kind in MATRICES:
                key = _op(part, scheme)
                ops[key] = ops.get(key, 0) + 1
                found = capability(scheme, (rows, columns), device)
                backends.append(found.backend)
                if not found.native:
                    reasons.append(found.reason)
        return Resources(
            metrics={"memory_mb": bytes_ / 1e6, "code_bits": float(bits), "weights": float(numel)},
            ops=ops,
            executes="" if reasons else "+".join(sorted(set(backends))) or "torch",
            reason=reasons[0] if reasons else "",
        )

    def notes(self, site: ModelSite) -> list[str]:
        return [site.lacking["conv"]] if "conv" in site.lacking else []

    def apply(self, built: Built, choices: Mapping[str, Value], *, serving: bool) -> None:
        from autocomp.search_spaces.weights import WeightSwapper

        labels = {}
        for decision in built.state["decisions"][self.name]:
            if decision.name in choices:
                labels.update({path: str(choices[decision.name]) for path in decision.sites})
        WeightSwapper.of(built).apply(labels, method=self.config.method, serving=serving)

    def move(self, built: Built, part: Part, here: Value, there: Value) -> torch.Tensor | None:
        """Change of a part's weight from one option to another, float32 ``[out, in]``; ``None`` for none."""
        from autocomp.search_spaces.weights import WeightSwapper

        if here == there:
            return None
        return WeightSwapper.of(built).move(part.path, str(here), str(there), self.config.method)


def _op(part: Part, scheme: Scheme) -> str:
    """The kernel call of a linear or convolution."""
    from autocomp.measure.op_table import op_key

    rows, columns = part.shape
    if part.kind == "conv":
        return f"conv/{rows}x{columns}/{scheme.label}/{part.conv}"
    return op_key((rows, columns), scheme, rows=part.rows)


def common_name(sites: Sequence[str], key: str) -> str:
    """A readable name: the path itself, or the shared prefix with the differing ends joined by ``+``."""
    if len(sites) == 1:
        return sites[0]
    split = [s.split(".") for s in sites]
    prefix = []
    for parts in zip(*split):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    ends = [".".join(s[len(prefix) :]) for s in split]
    if len(sites) <= 4:
        return ".".join([*prefix, "+".join(ends)])
    return ".".join(prefix) if prefix and key.startswith("block") else key
