"""Linear combinations of saved checkpoints of one training run (LCSC, arXiv 2404.02241).

The merged weights are ``sum_k a_k theta_k`` with coefficients that add up to one, and may be negative. An
exponential moving average is one point of this space. Different coefficients give equally good models
(neighbouring checkpoints are nearly alike), so ``ridge`` can hold them near an average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from autocomp.errors import SpaceError
from autocomp.search_spaces.base import ModelSite, Resources, Space, Stage
from autocomp.space import Candidate, Decision, Interval, SpaceConstraint, SumTo, Value

if TYPE_CHECKING:
    from autocomp.workloads.base import Built


class CheckpointsConfig(BaseModel):
    """Options of the ``checkpoints`` space.

    Attributes:
        low, high: bounds of a coefficient.
        ridge: what is merged is ``(a + ridge * b) / (1 + ridge)``, with ``b`` the exponential average of the
            middle one of ``decays``: 0 searches freely, 1 halves every distance from that average.
        decays: of the exponential averages among the baselines, from one checkpoint to the next.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float = -1.0
    high: float = 1.5
    ridge: float = Field(0.0, ge=0.0)
    decays: tuple[float, ...] = Field((0.5, 0.7, 0.85), min_length=1)

    @model_validator(mode="after")
    def _bounds(self) -> CheckpointsConfig:
        if not self.low <= 0.0 or not self.high >= 1.0:
            raise ValueError(f"[low, high] must hold 0 and 1; got [{self.low}, {self.high}]")
        if not all(0.0 < d < 1.0 for d in self.decays):
            raise ValueError(f"decays lie between 0 and 1; got {self.decays}")
        return self


class Checkpoints(Space):
    """One coefficient a checkpoint. See ``CheckpointsConfig`` for the options."""

    name: ClassVar[str] = "checkpoints"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    profiled_by: ClassVar[str] = "checkpoints"  # there is no single change: coefficients add up to one
    Config: ClassVar[type[BaseModel]] = CheckpointsConfig
    config: CheckpointsConfig
    _count: int  # of checkpoints, once the decisions are made

    def decisions(self, site: ModelSite) -> list[Decision]:
        if site.snapshots < 2:
            raise SpaceError(
                f"checkpoints needs at least two saved checkpoints, and the workload names {site.snapshots};"
                " list their folders, oldest first, in workload.snapshots"
            )
        self._count = site.snapshots
        domain = Interval(self.config.low, self.config.high)
        return [Decision(f"{self.name}/weight.{i}", domain, (), self.name) for i in range(site.snapshots)]

    def constraints(self, site: ModelSite, decisions: Sequence[Decision]) -> list[SpaceConstraint]:
        del site
        return [SumTo(tuple(d.name for d in decisions))]

    def coefficients(self, choices: Mapping[str, Value]) -> list[float] | None:
        """What the checkpoints are multiplied with, oldest first; ``None`` for the model as it was loaded."""
        given = {n: v for n, v in choices.items() if n.startswith(f"{self.name}/")}
        row = [given[f"{self.name}/weight.{i}"] for i in range(len(given))]
        if all(v is None for v in row):
            return None
        decays, ridge = sorted(self.config.decays), self.config.ridge
        center = exponential(len(row), decays[len(decays) // 2])
        return [(float(v or 0.0) + ridge * b) / (1.0 + ridge) for v, b in zip(row, center, strict=True)]

    def baselines(self, site: ModelSite, decisions: Sequence[Decision]) -> list[Candidate]:
        """The last checkpoint, the plain mean of all, exponential averages.

        With ``ridge`` these are the coefficients before it is applied.
        """
        del site
        count = len(decisions)
        last = [0.0] * (count - 1) + [1.0]
        rows = [last, [1.0 / count] * count, *(exponential(count, d) for d in self.config.decays)]
        names = [d.name for d in decisions]
        return [Candidate.of(dict(zip(names, row, strict=True))) for row in rows]

    def neutral(self, decision: Decision) -> Value:
        """``None`` everywhere: the weights as they were loaded, which may be no combination at all."""
        del decision
        return None

    def offered_neutral(self, decision: Decision) -> Value:
        """The last checkpoint by itself."""
        return float(decision.name == f"{self.name}/weight.{self._count - 1}")

    def resources(self, site: ModelSite, decision: Decision, option: Value, device: str) -> Resources:
        """Nothing: a merged model is as large and as fast as the loaded one."""
        del site, decision, option, device
        return Resources({}, executes="torch")

    def apply(self, built: Built, choices: Mapping[str, Value], *, serving: bool) -> None:
        """Write the merged weights into the model in place.

        Raises:
            SpaceError: a checkpoint can't be read or is of another architecture.
        """
        from autocomp.search_spaces.merging import Merger

        del serving
        Merger.of(built).apply(self.coefficients(choices))


def exponential(count: int, decay: float) -> list[float]:
    """Coefficients of an exponential average over ``count`` checkpoints, the newest last; their sum is 1."""
    row = [decay ** (count - 1 - i) for i in range(count)]
    return [x / sum(row) for x in row]
