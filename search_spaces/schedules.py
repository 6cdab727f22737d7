"""Sampling schedules of a diffusion model: where the steps are, which formula and which model each one uses.

One slot a step. Searched timesteps and solvers are USF's space (arXiv 2312.07243, section 4): real times,
the order of the expansion, what is expanded, a corrector, a relaxation of the derivatives. A model for each
slot of a fixed grid, which may also be left out, is OMS-DPM's (arXiv 2306.08860, section 4.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import BaseModel

from autocomp.diffusion.noise import NoiseSchedule
from autocomp.diffusion.schedule import Schedule, Step, uniform_times
from autocomp.errors import SpaceError
from autocomp.repair import spaced
from autocomp.search_spaces.base import ModelSite, Resources, Space, Stage
from autocomp.search_spaces.schedules_config import GAP, FieldName, SchedulesConfig, Spacing
from autocomp.space import Candidate, Choice, Decision, Interval, Ordered, Slots, SpaceConstraint, Value

if TYPE_CHECKING:
    from autocomp.workloads.base import Built

SPACINGS: tuple[Spacing, ...] = get_args(Spacing)

EDGE = 1e-3
"""Log-SNR spacing stays this far from times 0 and 1, where half log-SNR may be infinite."""
SOLVERS: tuple[dict[str, Value], ...] = (
    {"order": 1, "prediction": "data", "corrector": False},
    {"order": 2, "prediction": "data", "corrector": False},
    {"order": 2, "prediction": "data", "corrector": True},
)
"""DDIM, DPM-Solver++(2M) and UniPC, as baselines name them."""


class Schedules(Space):
    """Times, solver, guidance and model of every step. See ``SchedulesConfig`` for the options.

    Every slot has a decision ``schedules/time.{i}``, one with a single value where times are not searched, so
    that a candidate tells its times by itself. Fields that make no difference are left out where the number
    of steps is fixed: the order of the first step, and the formula of a last step that ends at time 0.
    """

    name: ClassVar[str] = "schedules"
    stage: ClassVar[Stage] = Stage.SCHEDULE
    profiled_by: ClassVar[str] = "schedules"  # a single change of a schedule says nothing about others
    Config: ClassVar[type[BaseModel]] = SchedulesConfig
    config: SchedulesConfig
    _even: Mapping[str, Value]  # of the evenly spaced schedule, once the decisions are made

    def decisions(self, site: ModelSite) -> list[Decision]:
        count = self._count(site)
        models = self._models(site)
        grid = None if "time" in self.config.search else self._grid(site, count)
        if grid is not None and grid[-1] - self.config.end < GAP * (1 - 1e-9):
            raise SpaceError(f"schedules: the last time {grid[-1]} must be {GAP} above end {self.config.end}")
        found = []
        for slot in range(count):
            for field in self._fields(slot, count):
                domain = self._domain(field, slot, models, grid)
                found.append(Decision(f"{self.name}/{field}.{slot}", domain, (), self.name, slot))
        even = self._grid(site, count) if grid is None else grid
        self._even = self._candidate(found, even, {}).values
        return found

    def _count(self, site: ModelSite) -> int:
        config = self.config
        given = config.steps or config.slots or (len(config.times) if isinstance(config.times, list) else 0)
        count = given or int(getattr(site, "steps", 0))
        if not count:
            raise SpaceError("schedules: this model has no default sampler; give steps or slots")
        return count

    def _models(self, site: ModelSite) -> tuple[str, ...]:
        """Names of the models on offer."""
        zoo = tuple(getattr(site, "models", ())) or ("",)
        unknown = [m for m in (*self.config.models, self.config.fixed.model) if m not in zoo]
        if unknown:
            raise SpaceError(f"schedules: {unknown[0]!r} is not in the workload's zoo; known: {list(zoo)}")
        offered = tuple(self.config.models) or zoo
        if "model" in self.config.search and len(offered) + self.config.skip < 2:
            raise SpaceError(
                f"schedules: there is one model to choose from ({offered[0]!r}); add others to workload.zoo,"
                " set skip: true, or take 'model' out of search"
            )
        return offered

    @property
    def _varies(self) -> bool:
        """Whether candidates differ in their number of steps."""
        return bool(self.config.slots)

    def _fields(self, slot: int, count: int) -> list[FieldName]:
        """Fields with a decision at a slot, time first."""
        dropped: set[FieldName] = set()
        if not self._varies and slot == 0:
            dropped |= {"order", "relax"}
        if not self._varies and slot == count - 1:
            dropped |= {"corrector"}
            dropped |= {"order", "prediction", "relax"} if self.config.end == 0 else set()
        fields: tuple[FieldName, ...] = get_args(FieldName)
        return [f for f in fields if f == "time" or (f in self.config.search and f not in dropped)]

    def _domain(
        self, field: FieldName, slot: int, models: tuple[str, ...], grid: Sequence[float] | None
    ) -> Choice | Interval:
        config = self.config
        match field:
            case "time" if grid is not None:
                return Interval(grid[slot], grid[slot])
            case "time":
                return Interval(config.end + GAP, 1.0, self._varies and slot >= config.min_steps)
            case "order":
                # A step can't use more outputs than there have been.
                orders = [o for o in config.orders if o <= slot + 1] or config.orders[:1]
                return Choice(tuple(orders), ordered=True)
            case "prediction":
                return Choice(tuple(config.predictions))
            case "relax":
                return Interval(*config.relax)
            case "model":
                return Choice((None, *models) if config.skip and slot else models)  # the first step stays
        return Choice((False, True))

    def constraints(self, site: ModelSite, decisions: Sequence[Decision]) -> list[SpaceConstraint]:
        """Falling times; where steps may be left out, their other fields at rest and behind all others."""
        slots = _by_slot(decisions)
        found: list[SpaceConstraint] = []
        if self._varies:
            # Without searched times the model (the last field) is the switch, and the grid stays as it is.
            rows = [[row[-1], *row[1:-1]] if self.config.skip else row for row in slots]
            names = tuple(d.name for row in rows for d in row)
            rest = tuple(_rest(d) for d in rows[0][1:])
            found.append(Slots(names, rest, packed=not self.config.skip))
        if "time" in self.config.search:
            found.append(Ordered(tuple(row[0].name for row in slots), gap=GAP))
        return found

    # --- schedules and baselines --------------------------------------------------------------------------

    def schedule(self, choices: Mapping[str, Value]) -> Schedule | None:
        """The schedule that a candidate stands for; ``None`` when it leaves the workload's own in force.

        Args:
            choices: decision name -> value; decisions of other spaces may be among them.

        Raises:
            SpaceError: the times do not fall, or no slot is used.
        """
        rows: dict[int, dict[str, Any]] = {}
        for name, value in choices.items():
            space, _, rest = name.partition("/")
            if space == self.name:
                field, _, slot = rest.rpartition(".")
                rows.setdefault(int(slot), {})[field] = value
        if all(v is None for row in rows.values() for v in row.values()):
            return None
        used = [row for _, row in sorted(rows.items()) if None not in row.values()]
        fixed = self.config.fixed.model_dump()
        return Schedule(tuple(Step(**{**fixed, **row}) for row in used), self.config.end)

    def apply(self, built: Built, choices: Mapping[str, Value], *, serving: bool) -> None:
        del serving  # a schedule is run by the same sampler in both states
        schedule = self.schedule(choices)
        built.state["schedule"] = built.state["default_schedule"] if schedule is None else schedule
        (built.changed.discard if schedule is None else built.changed.add)("schedule")

    def resources(self, site: ModelSite, decision: Decision, option: Value, device: str) -> Resources:
        """Nothing that adds up: what a schedule takes is measured."""
        del site, decision, option, device
        return Resources({}, executes="sampler")

    def traits(self, site: ModelSite, choices: Mapping[str, Value]) -> list[float]:
        """What the schedule does to Gaussian classes; see ``autocomp.diffusion.surrogate``."""
        from autocomp.diffusion.surrogate import traits

        schedule = self.schedule(choices)
        if schedule is None:
            raise SpaceError("this is the workload's own schedule, no candidate of the space")
        return traits(NoiseSchedule.of(site.scheduler), schedule, guided=site.guided)

    def neutral(self, decision: Decision) -> Value:
        """``None`` everywhere: the schedule of the workload's own sampler."""
        del decision
        return None

    def offered_neutral(self, decision: Decision) -> Value:
        """Of the evenly spaced schedule with every slot in use and nothing searched."""
        return self._even[decision.name]

    def _grid(self, site: ModelSite, count: int) -> list[float]:
        """``count`` falling times as ``times`` says; evenly spaced ones where they are searched."""
        if isinstance(self.config.times, list):
            return self.config.times
        return spaced_times(self.config.times, count, site.scheduler, self.config.end)

    def baselines(self, site: ModelSite, decisions: Sequence[Decision]) -> list[Candidate]:
        """Every spacing with every solver where these are searched, each model by itself, no guidance.

        With a varying number of steps: few, some and all of them, with fewer solvers.
        """
        slots = len(_by_slot(decisions))
        found = [
            self._candidate(decisions, times, settings)
            for times, settings in (
                self._thinned(site, decisions, slots) if self.config.skip else self._usual(site, slots)
            )
        ]
        return list(dict.fromkeys(found))

    def _usual(self, site: ModelSite, slots: int) -> Iterator[tuple[list[float], dict[str, Value]]]:
        """Times and settings of all steps."""
        timed, low = "time" in self.config.search, self.config.min_steps
        counts = [slots, (slots + low) // 2, low] if self._varies else [slots]
        solvers = SOLVERS[:2] if self._varies else SOLVERS
        for count in dict.fromkeys(counts):
            kinds = SPACINGS if timed else (None,)
            grids = [
                self._grid(site, count)
                if k is None
                else spaced_times(k, count, site.scheduler, self.config.end)
                for k in kinds
            ]
            yield from product(grids, (dict(s) for s in solvers))
            for model in self._models(site):
                yield grids[0], {"model": model}
            yield grids[0], {"guidance": False}

    def _thinned(
        self, site: ModelSite, decisions: Sequence[Decision], slots: int
    ) -> Iterator[tuple[list[float], dict[str, Value]]]:
        """One model at every slot, at every second, at every fourth: its own trade-off."""
        times = [
            float(d.domain.low)
            for row in _by_slot(decisions)
            for d in row[:1]
            if isinstance(d.domain, Interval)
        ]
        for model in self._models(site):
            every = 1
            while every == 1 or slots // every >= 2:
                yield times[::every], {"model": model}
                every *= 2

    def _candidate(
        self, decisions: Sequence[Decision], times: Sequence[float], settings: Mapping[str, Value]
    ) -> Candidate:
        """Steps at these times with these settings and the fixed ones for the rest; other slots unused."""
        wanted = {**self.config.fixed.model_dump(), **settings}
        values: dict[str, Value] = {}
        for slot, (time, *rest) in enumerate(_by_slot(decisions)):
            assert isinstance(time.domain, Interval)
            at: float | None = times[slot] if slot < len(times) else None
            if time.domain.low == time.domain.high:  # a fixed grid, of which `times` may be a part
                at, used = time.domain.low, time.domain.low in times
            else:
                used = at is not None
            values[time.name] = at
            values |= {d.name: _nearest(d, wanted[_field(d)]) if used else _rest(d) for d in rest}
        return Candidate.of(values)


def spaced_times(spacing: Spacing, count: int, scheduler: Mapping[str, Any], end: float = 0.0) -> list[float]:
    """``count`` times that fall from 1 towards ``end``.

    Args:
        spacing: ``uniform`` (a flow's own shift applied), ``quadratic`` (denser towards the image) or
            ``logsnr`` (even in half log-SNR, as in DPM-Solver, arXiv 2206.00927, section 3.4).
        scheduler: a diffusers scheduler's configuration.

    Raises:
        SpaceError: there is no room for that many steps.
    """
    if (count + 1) * GAP > 1.0 - end:
        raise SpaceError(
            f"schedules: {count} steps do not fit between times {end} and 1, {GAP} apart at least"
        )
    if spacing == "logsnr":
        noise = NoiseSchedule.of(scheduler)
        first, last = noise.half_log_snr(1.0 - EDGE), noise.half_log_snr(max(end, EDGE))
        levels = [first + (last - first) * i / count for i in range(count)]
        falling = [1.0, *(noise.inverse(x) for x in levels[1:])]
    else:
        even = uniform_times(count, power=2.0) if spacing == "quadratic" else _default_times(count, scheduler)
        falling = [end + (1.0 - end) * t for t in even]
    return spaced(falling[::-1], GAP, end + GAP, 1.0)[::-1]


def _default_times(count: int, scheduler: Mapping[str, Any]) -> list[float]:
    return NoiseSchedule.of(scheduler).default_times(count) if scheduler else uniform_times(count)


def _field(decision: Decision) -> str:
    return decision.name.rpartition("/")[2].rpartition(".")[0]


def _by_slot(decisions: Sequence[Decision]) -> list[list[Decision]]:
    """The decisions of each slot, time first."""
    rows: dict[int | None, list[Decision]] = {}
    for d in decisions:
        rows.setdefault(d.block, []).append(d)
    return list(rows.values())


def _nearest(decision: Decision, value: Value) -> Value:
    """``value``, or the last option (the highest order, the largest model) where it is not on offer."""
    domain = decision.domain
    if isinstance(domain, Choice):
        return value if domain.contains(value) else domain.options[-1]
    return min(max(float(value or 0.0), domain.low), domain.high)


def _rest(decision: Decision) -> Value:
    """What a decision of an unused slot stands at; every slot has it."""
    domain = decision.domain
    return domain.options[0] if isinstance(domain, Choice) else _nearest(decision, 0.0)
