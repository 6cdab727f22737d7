"""What every key/value head keeps of the past: a span rule (MoA) and the bits of its keys and values.

Options are ``Keep`` labels, ``a512b0s16/k8v4`` (see ``autocomp.attention.plan``): rule and bits are one
choice, because the bytes of a cache are their product and an exact search needs them to add up over choices.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from autocomp.attention.plan import DENSE, KV_BITS, AttentionPlan, Keep, LayerPlan, Rule
from autocomp.errors import SpaceError
from autocomp.search_spaces.base import ModelSite, Part, Resources, Space, Stage
from autocomp.space import AtMostDistinct, Candidate, Choice, Decision, SpaceConstraint, Value

if TYPE_CHECKING:
    from autocomp.workloads.base import Built

#: Of ``spans: auto``: shares of the prompt, and tokens as shares of the shortest profiled length.
BETAS = (0.0, 0.0625, 0.125, 0.25, 0.5)
ALPHAS = (-0.125, 0.0, 0.125, 0.25, 0.5)


class AttentionConfig(BaseModel):
    """Options of the ``attention`` space.

    Attributes:
        spans: what a group may keep: ``dense``, a number of tokens (512), a share of the prompt (0.25), a
            rule (``a-256b0.5s16``: 0.5 N - 256 tokens, the first 16 of them for ever), or the word ``auto``
            for rules with both, made from the profiled lengths and without those that are alike there.
        sink: the first tokens that every span keeps (numbers and shares; rules name their own).
        kv_bits: bits that keys and values may be kept in, both alike: 16, 8, 4.
        key_bits, value_bits: the same apart; every pair is an option. They replace ``kv_bits``.
        granularity: what shares a choice: each key/value head (``group``), each ``layer`` (servers that know
            windows per layer only) or the ``model``. ``head`` is ``group`` where every head has its own keys.
        rules_per_layer: different rules in one layer, at most (MoA: 2); 0 for any number.
        lengths: lengths at which ``density_N`` is told; by default those of the workload's profiles.
        context, batch: tokens and sequences that ``kv_mb``, ``memory_mb`` and ``density`` are told for; 0 for
            those of the workload's scenario.
        moa_plan: JSON file with ``alphas`` and ``betas`` ``[layer][head]``, as MoA publishes its plans: its
            rules become options and the plan is measured beside the uniform baselines.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    spans: list[str | int | float] = ["dense", 0.5, 0.25, 0.125]
    sink: int = Field(default=16, ge=0)
    kv_bits: list[int] = [16]
    key_bits: list[int] = Field(default_factory=list)
    value_bits: list[int] = Field(default_factory=list)
    granularity: Literal["head", "group", "layer", "model"] = "group"
    rules_per_layer: int = Field(default=2, ge=0)
    lengths: list[int] = Field(default_factory=list)
    context: int = Field(default=0, ge=0)
    batch: int = Field(default=0, ge=0)
    moa_plan: str = ""

    @field_validator("spans")
    @classmethod
    def _spans(cls, value: list[str | int | float]) -> list[str | int | float]:
        if not value:
            raise ValueError("spans is empty; offer 'dense' at least")
        for span in value:
            if span != "auto":
                _rule(span, 0)
        return value

    @field_validator("kv_bits", "key_bits", "value_bits")
    @classmethod
    def _bits(cls, value: list[int]) -> list[int]:
        wrong = [b for b in value if b not in KV_BITS]
        if wrong:
            raise ValueError(f"keys and values are kept in {KV_BITS} bits; got {wrong}")
        return value

    def bit_pairs(self) -> list[tuple[int, int]]:
        """``(key bits, value bits)`` on offer."""
        if self.key_bits or self.value_bits:
            return list(product(self.key_bits or self.kv_bits, self.value_bits or self.kv_bits))
        return [(b, b) for b in self.kv_bits]

    def rules(self, lengths: Sequence[int]) -> list[Rule]:
        """Rules on offer, without those that keep the same at all of ``lengths``."""
        found: dict[tuple[int, ...], Rule] = {}
        for span in self.spans:
            for rule in _auto(lengths, self.sink) if span == "auto" else [_rule(span, self.sink)]:
                spans = tuple(rule.span(n) for n in lengths)
                found.setdefault(spans, DENSE if lengths and spans == tuple(lengths) else rule)
        return list(found.values())


def _rule(span: str | int | float, sink: int) -> Rule:
    if isinstance(span, str):
        return Rule.parse(span)
    if isinstance(span, bool) or span <= 0:
        raise ValueError(f"a span is a number of tokens, a share of the prompt below 1 or a rule; got {span}")
    if span < 1:
        return Rule(0, float(span), sink)
    if span != int(span):
        raise ValueError(f"{span} is neither a number of tokens nor a share below 1")
    return Rule(int(span), 0.0, sink) if span > 1 else DENSE


def _auto(lengths: Sequence[int], sink: int) -> Iterator[Rule]:
    """The grid of MoA (appendix E), on shares of the shortest length; what keeps little more than the sink
    or all of a length is left out, and dense attention comes first."""
    yield DENSE
    shortest = min(lengths)
    for beta, alpha in product(BETAS, ALPHAS):
        rule = Rule(round(alpha * shortest), beta, sink)
        if all(2 * sink <= rule.alpha + rule.beta * n < n for n in lengths):
            yield rule


class Attention(Space):
    """Spans and bits of the key/value cache. See ``AttentionConfig`` for the options."""

    name: ClassVar[str] = "attention"
    stage: ClassVar[Stage] = Stage.RUNTIME
    profiled_by: ClassVar[str] = "attention"
    Config: ClassVar[type[BaseModel]] = AttentionConfig
    config: AttentionConfig

    def decisions(self, site: ModelSite) -> list[Decision]:
        groups: dict[str, list[Part]] = {}
        for part in self._parts(site):
            groups.setdefault(self._key(part), []).append(part)
        return [
            Decision(
                f"{self.name}/{key}",
                Choice(tuple(self._options(site, parts))),
                tuple(p.path for p in parts),
                self.name,
                parts[0].block if len({p.block for p in parts}) == 1 else None,
            )
            for key, parts in groups.items()
        ]

    def _parts(self, site: ModelSite) -> list[Part]:
        parts = list(site.kv_groups)
        if not parts:
            reason = site.lacking.get("kv_group", "it has no attention that could be planned")
            raise SpaceError(f"the attention space can't take this {site.family} model: {reason}")
        shared = [p for p in parts if p.shape[0] > 1]
        if self.config.granularity == "head" and shared:
            raise SpaceError(
                f"granularity: head needs keys of its own for every head, but {shared[0].shape[0]} query"
                " heads share one here: a cache can't keep less than its widest head needs; use group"
            )
        if not self._context(site):
            raise SpaceError("the attention space needs a context length: set attention.context")
        return parts

    def _key(self, part: Part) -> str:
        match self.config.granularity:
            case "layer":
                return part.tie
            case "model":
                # Layers with a window of their own have other options than those without.
                return f"model.window{part.window}" if part.window else "model"
        return part.path

    def _context(self, site: ModelSite) -> int:
        return self.config.context or site.context

    def _lengths(self, site: ModelSite) -> list[int]:
        return list(self.config.lengths or site.lengths)

    def _shortest(self, site: ModelSite) -> int:
        return min(self._lengths(site), default=0)

    def _options(self, site: ModelSite, parts: Sequence[Part]) -> list[str]:
        """``Keep`` labels, smallest first. Layers with a sliding window of their own keep that."""
        lengths = sorted({*self._lengths(site), self._context(site)})
        rules = [DENSE] if parts[0].window else self.config.rules(lengths)
        if self.config.moa_plan and not parts[0].window:
            rules = list(dict.fromkeys([*rules, *(r for row in self._moa(site).values() for r in row)]))
        keeps = [Keep(rule, *bits) for rule in rules for bits in self.config.bit_pairs()]
        size = {k.label: self._bytes(site, parts, k) for k in keeps}
        return sorted(size, key=lambda label: (size[label], label))

    def _moa(self, site: ModelSite) -> Mapping[str, tuple[Rule, ...]]:
        """Attention module -> rules of its groups, from ``moa_plan``."""
        from autocomp.attention.moa import read_plan

        try:
            data = json.loads(Path(self.config.moa_plan).expanduser().read_text())
        except (OSError, ValueError) as error:
            raise SpaceError(f"attention.moa_plan: can't read {self.config.moa_plan!r}: {error}") from None
        modules: dict[str, list[Part]] = {}
        for part in site.kv_groups:
            modules.setdefault(part.tie, []).append(part)
        shapes = [(len(parts), parts[0].shape[0]) for parts in modules.values()]
        return dict(zip(modules, read_plan(data, shapes), strict=True))

    def constraints(self, site: ModelSite, decisions: Sequence[Decision]) -> list[SpaceConstraint]:
        """A layer's bits are alike (one cache, one layout) and it has few different rules."""
        layers: dict[str, list[str]] = {}
        for decision in decisions:
            layers.setdefault(site.part(decision.sites[0]).tie, []).append(decision.name)
        found: list[SpaceConstraint] = []
        most = self.config.rules_per_layer
        for names in layers.values():
            if len(names) > 1:
                if len(self.config.bit_pairs()) > 1:
                    found.append(AtMostDistinct(tuple(names), 1, field=1))
                if 0 < most < len(names):
                    found.append(AtMostDistinct(tuple(names), most, field=0))
        return found

    def neutral(self, decision: Decision) -> Value:
        return Keep().label

    def baselines(self, site: ModelSite, decisions: Sequence[Decision]) -> list[Candidate]:
        """Dense attention and every number or share that ``spans`` names, with 16 bits everywhere (one window
        and sink: StreamingLLM), every pair of bits with dense attention, and the published plan. Rules that
        are spelled out, or made by ``auto``, are for the search."""
        pairs = self.config.bit_pairs()
        widest = max(pairs)
        shares = [s for s in self.config.spans if not isinstance(s, str)]
        rules = [DENSE, *(_rule(span, self.config.sink) for span in shares)]
        wanted = [Keep(rule, *widest) for rule in rules] + [Keep(DENSE, *bits) for bits in pairs]
        found = [self._nearest(decisions, keep) for keep in dict.fromkeys(wanted)]
        if self.config.moa_plan:
            found.append(self._published(site, decisions, widest))
        return [c for c in dict.fromkeys(found) if c is not None]

    def _nearest(self, decisions: Sequence[Decision], keep: Keep) -> Candidate | None:
        """``keep`` everywhere; layers with a window of their own keep it and take the bits."""
        values: dict[str, Value] = {}
        for decision in decisions:
            own = Keep(DENSE, keep.key_bits, keep.value_bits)
            fits = next((k.label for k in (keep, own) if decision.domain.contains(k.label)), None)
            if fits is None:
                return None
            values[decision.name] = fits
        return Candidate.of(values)

    def _published(
        self, site: ModelSite, decisions: Sequence[Decision], bits: tuple[int, int]
    ) -> Candidate | None:
        rules = self._moa(site)
        values: dict[str, Value] = {}
        for decision in decisions:
            parts = [site.part(path) for path in decision.sites]
            wanted = {rules[p.tie][int(p.path.rpartition(".kv")[2])] for p in parts}
            label = Keep(wanted.pop(), *bits).label
            if wanted or not decision.domain.contains(label):
                return None  # coarser than the plan
            values[decision.name] = label
        return Candidate.of(values)

    def _bytes(self, site: ModelSite, parts: Sequence[Part], keep: Keep) -> float:
        tokens = sum(
            _kept(p, keep, self._context(site), self._shortest(site))
            * keep.token_bytes(p.shape[1], site.itemsize)
            for p in parts
        )
        return tokens * (self.config.batch or site.batch)

    def resources(self, site: ModelSite, decision: Decision, option: Value, device: str) -> Resources:
        from autocomp.measure.op_table import attention_backend, attention_key

        keep, context = Keep.parse(str(option)), self._context(site)
        parts = [site.part(path) for path in decision.sites]
        count = len(site.kv_groups)
        megabytes = self._bytes(site, parts, keep) / 1e6
        metrics = {"memory_mb": megabytes, "kv_mb": megabytes}
        for name, n in [("density", context), *((f"density_{n}", n) for n in self._lengths(site))]:
            metrics[name] = (
                sum(_kept(p, keep, n, self._shortest(site)) / min(n, p.window or n) for p in parts) / count
            )
        ops: dict[str, int] = {}
        for part in parts:
            key = attention_key(part.shape[0], part.shape[1], keep, min(context, part.window or context))
            ops[key] = ops.get(key, 0) + 1
        backend, reason = attention_backend(keep, device, parts[0].shape[1])
        return Resources(metrics, ops, backend, reason)

    def plan(self, built: Built, choices: Mapping[str, Value]) -> AttentionPlan:
        """The model's attention under ``choices`` (decision name -> ``Keep`` label)."""
        chosen: dict[str, Keep] = {}
        for decision in built.state["decisions"][self.name]:
            keep = Keep.parse(str(choices.get(decision.name, Keep().label)))
            chosen |= dict.fromkeys(decision.sites, keep)
        layers: dict[int, LayerPlan] = {}
        modules: dict[str, list[Part]] = {}
        for part in built.site.kv_groups:
            modules.setdefault(part.tie, []).append(part)
        for path, parts in modules.items():
            keeps = [chosen[p.path] for p in parts]
            layer: Any = built.model.get_submodule(path).layer_idx
            layers[int(layer)] = LayerPlan(
                tuple(k.rule for k in keeps),
                keeps[0].key_bits,
                keeps[0].value_bits,
                parts[0].window,
                shortest=self._shortest(built.site),
            )
        return AttentionPlan(layers)

    def apply(self, built: Built, choices: Mapping[str, Value], *, serving: bool) -> None:
        from autocomp.attention import runtime

        plan = self.plan(built, choices)
        if plan.plain:
            built.changed.discard("attention")
        else:
            built.changed.add("attention")
        # On the CPU even dense attention is scored by our kernels: they are faster there than torch's, and
        # what spans do is then not mixed up with how two kernels round. It is served as the model has it.
        if plan.plain and (serving or built.device != "cpu"):
            runtime.remove(built.model)
        elif runtime.installed(built.model) != plan:
            runtime.install(built.model, plan)


def _kept(part: Part, keep: Keep, tokens: int, shortest: int) -> int:
    """Tokens that a group keeps of ``tokens``; inputs below ``shortest`` have its spans."""
    return min(tokens, part.window or keep.rule.span(max(tokens, shortest)))
