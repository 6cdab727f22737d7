"""What the attention of a diffusion transformer computes at which step: windows, reuse, shared halves.

Options are ``Rule`` labels (see ``autocomp.diffusion.attention_plan``): ``full``, ``w24`` (24 tokens to each
side plus the residual of the last full step), ``w24x`` (without it), ``reuse`` (an earlier step's output),
``full/cfg`` and ``w24/cfg`` (one half of a guided batch for both). Where text and image are one sequence
(SD3, Flux), the windows are among the image's tokens; the text's see all and are seen by all. Costs add up
only to first order: what ``w24`` or ``reuse`` does depends on how long ago the last full step was. The search
measures what it proposes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from autocomp.diffusion.attention_plan import FULL, ImageAttentionPlan, LayerPlan, Rule, range_of
from autocomp.errors import SpaceError
from autocomp.search_spaces.base import ModelSite, Part, Resources, Space, Stage
from autocomp.space import Choice, Decision, Value

if TYPE_CHECKING:
    from autocomp.predictors.image_influence import Question
    from autocomp.workloads.base import Built

#: Windows of the default options, to each side, as shares of the image's tokens.
WINDOW_SHARES = (1 / 16, 1 / 8)


class DiffusionAttentionConfig(BaseModel):
    """Options of the ``diffusion_attention`` space.

    Attributes:
        ranges: into how many equal parts the steps are cut, each with choices of its own; ``step`` for one a
            step of the workload's own schedule (not together with a search of schedules).
        granularity: what decides by itself: each ``layer`` or each ``head``.
        options: rules on offer; by default ``full``, ``reuse``, windows of 1/16 and 1/8 of the image's tokens
            to each side, and in guided steps ``full`` and the windows with shared halves, too. ``full`` is
            always on offer.
        layers: attention modules that are searched, by parts of their paths; all by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ranges: int | Literal["step"] = 4
    granularity: Literal["layer", "head"] = "layer"
    options: list[str] = Field(default_factory=list)
    layers: list[str] = Field(default_factory=list)

    @field_validator("ranges")
    @classmethod
    def _ranges(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"ranges must be at least 1, or 'step'; got {value}")
        return value

    @field_validator("options")
    @classmethod
    def _options(cls, value: list[str]) -> list[str]:
        for label in value:
            Rule.parse(label)
        return value


class DiffusionAttention(Space):
    """Attention rules by layer (or head) and range of steps. See ``DiffusionAttentionConfig``."""

    name: ClassVar[str] = "diffusion_attention"
    stage: ClassVar[Stage] = Stage.RUNTIME
    profiled_by: ClassVar[str] = "image_attention"
    Config: ClassVar[type[BaseModel]] = DiffusionAttentionConfig
    config: DiffusionAttentionConfig

    def decisions(self, site: ModelSite) -> list[Decision]:
        """``diffusion_attention/{module path}.{range}``, with ``.h{head}`` behind it for heads.

        A range that is the first step alone has no decision: that step is always full.
        """
        parts, ranges = self._parts(site), self._ranges(site)
        found = []
        for part in parts:
            domain = Choice(tuple(self._labels(site, part)))
            heads = [""] if self.config.granularity == "layer" else [f".h{h}" for h in range(part.shape[0])]
            found += [
                Decision(f"{self.name}/{part.path}.{r}{head}", domain, (part.path,), self.name, part.block)
                for r in range(ranges)
                if _steps(r, ranges, site.steps) != (0,)
                for head in heads
            ]
        return found

    def _parts(self, site: ModelSite) -> list[Part]:
        parts = list(site.image_attention)
        if not parts or not site.steps:
            reason = site.lacking.get("image_attention", "it has no attention over an image's tokens")
            raise SpaceError(f"the diffusion_attention space can't take this {site.family} model: {reason}")
        wanted = self.config.layers
        unknown = [text for text in wanted if not any(text in p.path for p in parts)]
        if unknown:
            raise SpaceError(
                f"diffusion_attention.layers: {unknown} are in no path of this model's attention modules,"
                f" which look like {parts[0].path!r}"
            )
        return [p for p in parts if not wanted or any(text in p.path for text in wanted)]

    def _ranges(self, site: ModelSite) -> int:
        ranges = site.steps if self.config.ranges == "step" else self.config.ranges
        if site.steps < max(2, ranges):
            raise SpaceError(
                f"diffusion_attention.ranges: {ranges} ranges of {site.steps} steps; use at most one a step,"
                " and two steps or more: the first one is always full"
            )
        return ranges

    def _labels(self, site: ModelSite, part: Part) -> list[str]:
        """Rules on offer, the one that computes least first."""
        tokens = part.shape[2]
        labels = self.config.options
        if not labels:
            windows = [f"w{n}" for n in sorted({max(1, round(share * tokens)) for share in WINDOW_SHARES})]
            labels = ["reuse", *windows, *([f"{r}/cfg" for r in (*windows, "full")] if site.guided else [])]
        if not site.guided and any(Rule.parse(label).shared for label in labels):
            raise SpaceError(
                "diffusion_attention.options: rules with /cfg share the halves of guided steps, and this"
                " workload's steps are not guided; leave them out"
            )
        rules = {label: Rule.parse(label) for label in (*labels, FULL.label)}
        return sorted(rules, key=lambda label: (_work(rules[label], part), label))

    def neutral(self, decision: Decision) -> Value:
        return FULL.label

    def resources(self, site: ModelSite, decision: Decision, option: Value, device: str) -> Resources:
        """``attention_share``: pairs of queries and keys that are looked at, as a share of what the model's
        modules of this kind look at in all steps."""
        from autocomp.measure.image_attention_table import ImageAttentionOperation, window_backend

        rule, part = Rule.parse(str(option)), site.part(decision.sites[0])
        heads, dim = part.shape[:2]
        steps = _steps(_range(decision), self._ranges(site), site.steps)
        own = [FULL if step == 0 else rule for step in steps]  # the first step is full, whatever is chosen
        share = 1.0 if self.config.granularity == "layer" else 1 / heads
        module = _pairs(part) / sum(map(_pairs, site.image_attention))
        metrics = {"attention_share": share * module * sum(_work(r, part) for r in own) / site.steps}
        ops: dict[str, float] = {}
        for r in own:
            key = ImageAttentionOperation.of(part, r).key
            ops[key] = ops.get(key, 0.0) + share / site.steps
        executes, reason = "torch", ""
        if rule.kind == "window":
            executes, reason = window_backend(device, dim)
        return Resources(metrics, ops, executes, reason)

    def question(self, site: ModelSite, decision: Decision) -> Question:
        """What a profile by influence asks about a decision."""
        from autocomp.predictors.image_influence import Question

        head = _head(decision) if self.config.granularity == "head" else None
        options = tuple(map(str, decision.options))
        return Question(decision.name, decision.sites[0], _range(decision), self._ranges(site), head, options)

    def plan(self, built: Built, choices: Mapping[str, Value]) -> ImageAttentionPlan:
        """The model's attention under ``choices`` (decision name -> label); what is not named is full."""
        site = built.site
        ranges = self._ranges(site)
        rows: dict[str, list[list[Rule]]] = {}
        for decision in built.state["decisions"][self.name]:
            path = decision.sites[0]
            heads = site.part(path).shape[0] if self.config.granularity == "head" else 1
            layer = rows.setdefault(path, [[FULL] * heads for _ in range(ranges)])
            rule = Rule.parse(str(choices.get(decision.name, FULL.label)))
            layer[_range(decision)][_head(decision)] = rule
        return ImageAttentionPlan({p: LayerPlan(tuple(map(tuple, layer))) for p, layer in rows.items()})

    def apply(self, built: Built, choices: Mapping[str, Value], *, serving: bool) -> None:
        """The same processors in both states.

        Raises:
            SpaceError: ``ranges: step`` and a schedule with another number of steps.
        """
        from autocomp.diffusion import attention

        del serving
        plan = self.plan(built, choices)
        if plan.plain:
            attention.remove(built.model)
            built.changed.discard(self.name)
            return
        steps = len(built.state["schedule"])
        if self.config.ranges == "step" and steps != built.site.steps:
            raise SpaceError(
                f"diffusion_attention.ranges: step needs the schedule of {built.site.steps} steps, and the"
                f" one in force has {steps}; search ranges by a number"
            )
        if attention.installed(built.model) != plan:
            built.changed.add(self.name)
            attention.install(built.model, plan)


def _steps(index: int, ranges: int, total: int) -> tuple[int, ...]:
    return tuple(step for step in range(total) if range_of(step, total, ranges) == index)


def _range(decision: Decision) -> int:
    return int(decision.name[len(decision.space) + 1 + len(decision.sites[0]) + 1 :].partition(".")[0])


def _head(decision: Decision) -> int:
    text = decision.name[len(decision.space) + 1 + len(decision.sites[0]) + 1 :].partition(".h")[2]
    return int(text) if text else 0


def _pairs(part: Part) -> int:
    """Pairs of queries and keys of a module's heads in full attention."""
    return part.shape[0] * sum(part.shape[2:]) ** 2


def _work(rule: Rule, part: Part) -> float:
    """Share of the full attention's pairs of tokens that a rule looks at; those with a text's tokens stay."""
    if rule.kind == "reuse":
        return 0.0
    share = 1.0
    if rule.kind == "window":
        image, every = part.shape[2], sum(part.shape[2:])
        w = min(rule.window, image - 1)
        share = 1 - (image**2 - image * (2 * w + 1) + w * (w + 1)) / every**2
    return share / 2 if rule.shared else share
