"""Activation bits of a diffusion model's linears, by layer and range of time (ViDiT-Q, arXiv 2406.02540;
MixDQ, arXiv 2405.17873).

Inputs of linears are rounded per token, dynamically, in groups of 64 features; nothing is calibrated. Inputs
of convolutions stay as they are.

- ``a16``: left as they are.
- ``a8``: with a packed weight of any width the int8 numbers are multiplied by our kernel, from the same
  packed weight that the 16-bit kernel reads. So all ranges of a layer need one weight, and resident bytes do
  not depend on this space. A linear whose weight is not packed (``w16``) is rounded and then multiplied in
  its own dtype: the same numbers, and no faster.
- ``a6``, ``a4``: simulated, no kernel multiplies them; a search with latency leaves them out.

The ``a`` of a weight's label (``w4g64a``) is its zero point and has nothing to do with activations: the two
spaces are independent. Stage RUNTIME: hooks belong on the modules that ``bitwidths`` (NUMERICS) put in place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from autocomp.errors import SpaceError
from autocomp.search_spaces.base import ModelSite, Part, Resources, Space, Stage, regular_expressions
from autocomp.search_spaces.bitwidths import common_name
from autocomp.space import Choice, Decision, Value

if TYPE_CHECKING:
    from autocomp.diffusion.activations import ActivationPlan
    from autocomp.workloads.base import Built

BITS = (4, 6, 8, 16)


class ActivationsConfig(BaseModel):
    """Options of the ``activations`` space.

    Attributes:
        bits: activation bits to choose from: 16, 8, 6, 4.
        ranges: equal parts of the time from noise to image, each with a choice of its own; 1 for none.
        granularity: what shares a choice: each ``linear``, ``tied`` group (q/k/v), ``block`` or the whole
            ``model``.
        exclude: regular expressions; linears whose path matches one (anywhere) stay at 16 bits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: list[int] = [8, 16]
    ranges: int = Field(default=4, ge=1)
    granularity: Literal["linear", "tied", "block", "model"] = "tied"
    exclude: list[str] = Field(default_factory=list)

    @field_validator("bits")
    @classmethod
    def _bits(cls, value: list[int]) -> list[int]:
        wrong = [b for b in value if b not in BITS]
        if wrong or not value:
            raise ValueError(f"activations have {BITS} bits; got {value}")
        return sorted(set(value))

    @field_validator("exclude")
    @classmethod
    def _patterns(cls, value: list[str]) -> list[str]:
        return regular_expressions(value)


class Activations(Space):
    """Activation bits. See ``ActivationsConfig`` for the options."""

    name: ClassVar[str] = "activations"
    stage: ClassVar[Stage] = Stage.RUNTIME
    Config: ClassVar[type[BaseModel]] = ActivationsConfig
    config: ActivationsConfig

    def decisions(self, site: ModelSite) -> list[Decision]:
        """``activations/{layer}.{range}``, range 0 the noisiest."""
        if not getattr(site, "steps", 0):
            raise SpaceError(
                f"the activations space is for diffusion models, and this {site.family} model has no sampling"
                " steps; search bitwidths"
            )
        groups: dict[str, list[Part]] = {}
        for part in self._searched(site):
            groups.setdefault(self._group(part), []).append(part)
        options = Choice(tuple(f"a{b}" for b in self.config.bits), ordered=True)
        found = []
        for key, parts in groups.items():
            sites = tuple(p.path for p in parts)
            block = parts[0].block if len({p.block for p in parts}) == 1 else None
            name = f"{self.name}/{common_name(sites, key)}"
            found += [
                Decision(f"{name}.{r}", options, sites, self.name, block) for r in range(self.config.ranges)
            ]
        return found

    def _searched(self, site: ModelSite) -> list[Part]:
        patterns = [re.compile(p) for p in self.config.exclude]
        linears = [p for p in site.parts if p.kind == "linear" and p.role == "body"]
        for pattern in patterns:
            if not any(pattern.search(p.path) for p in linears):
                raise SpaceError(
                    f"activations.exclude: {pattern.pattern!r} matches no linear of this {site.family} model"
                    f" (its paths look like {[p.path for p in linears][:2]}); remove it"
                )
        found = [p for p in linears if not any(x.search(p.path) for x in patterns)]
        if not found:
            raise SpaceError(
                f"activations finds no linear in this {site.family} model: {len(linears)} there, all excluded"
                f" by {self.config.exclude}"
            )
        return found

    def _group(self, part: Part) -> str:
        match self.config.granularity:
            case "tied":
                return part.tie or part.path
            case "block":
                return f"block {part.block}" if part.block is not None else part.path
            case "model":
                return "model"
        return part.path

    def neutral(self, decision: Decision) -> Value:
        return "a16"

    def resources(self, site: ModelSite, decision: Decision, option: Value, device: str) -> Resources:
        """``act_bits``: mean activation bits of the searched linears over the ranges, weighted by their
        weights (multiplications a token)."""
        from autocomp.kernels.ops import a8_unavailable

        bits = _bits_of(option)
        searched = sum(p.numel for p in self._searched(site))
        share = sum(site.part(path).numel for path in decision.sites) / (searched * self.config.ranges)
        executes, reason = "torch", ""
        if bits == 8:
            reason = a8_unavailable(device)
            executes = "" if reason else "cpu"
        elif bits < 8:
            executes, reason = (
                "",
                f"{option} is simulated: no kernel multiplies {bits}-bit activations; use a8",
            )
        return Resources({"act_bits": bits * share}, {}, executes, reason)

    def plan(self, built: Built, choices: Mapping[str, Value]) -> ActivationPlan:
        """Bits of every linear under ``choices``; decisions that are not named have 16."""
        from autocomp.diffusion.activations import ActivationPlan

        rows: dict[str, list[int]] = {}
        for decision in built.state["decisions"][self.name]:
            index = int(decision.name.rpartition(".")[2])
            bits = _bits_of(choices.get(decision.name, "a16"))
            for path in decision.sites:
                rows.setdefault(path, [16] * self.config.ranges)[index] = bits
        return ActivationPlan({path: tuple(row) for path, row in rows.items()})

    def apply(self, built: Built, choices: Mapping[str, Value], *, serving: bool) -> None:
        """The same hooks in both states: which modules they find decides what runs a linear."""
        from autocomp.diffusion import activations

        del serving
        plan = self.plan(built, choices)
        if plan.plain:
            activations.remove(built.model)
            built.changed.discard(self.name)
        else:
            built.changed.add(self.name)
            activations.install(built.model, plan)


def _bits_of(option: Value) -> int:
    return int(str(option).removeprefix("a"))
