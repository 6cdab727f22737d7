"""What a job says under ``schedules``. See ``autocomp.search_spaces.schedules`` for the space itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from autocomp.diffusion.schedule import MAX_ORDER, Prediction

FieldName = Literal["time", "order", "prediction", "corrector", "relax", "guidance", "model"]
Spacing = Literal["uniform", "quadratic", "logsnr"]

GAP = 1e-3
"""Least distance of two times, and of the last one from the end: a training timestep of a thousand."""


class FixedStep(BaseModel):
    """What every step uses of the fields that are not searched; see ``Step``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    order: int = Field(2, ge=1, le=MAX_ORDER)
    prediction: Prediction = "data"
    corrector: bool = False
    relax: float = 0.0
    guidance: bool = True
    model: str = ""


class SchedulesConfig(BaseModel):
    """Options of the ``schedules`` space.

    Attributes:
        steps: number of steps, the same for all candidates. With neither ``steps`` nor ``slots``: as many as
            the workload's own sampler takes.
        slots: largest number of steps where it may vary (``time`` is searched, or ``skip`` is set).
        min_steps: smallest number of steps where times are searched.
        search: fields of a step that vary from step to step.
        times: of steps whose time is not searched: a spacing, or the falling times themselves.
        end: time after the last step; 0 is the model's own guess of the clean image.
        skip: a slot may call no model and is then left out (OMS-DPM); times are those of all ``slots``.
        orders, predictions: options of these fields.
        relax: lowest and highest relaxation.
        models: names in the workload's zoo, ``""`` for the job's own model; empty for all of them.
        fixed: the fields that are not searched.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(0, ge=0)
    slots: int = Field(0, ge=0)
    min_steps: int = Field(1, ge=1)
    search: list[FieldName] = ["time", "order", "prediction", "corrector"]
    times: Spacing | list[float] = "uniform"
    end: float = Field(0.0, ge=0.0, lt=0.5)
    skip: bool = False
    orders: list[int] = [1, 2, 3]
    predictions: list[Prediction] = ["data", "noise"]
    relax: tuple[float, float] = (-0.5, 0.5)
    models: list[str] = Field(default_factory=list)
    fixed: FixedStep = FixedStep()

    @field_validator("search", "orders", "predictions", "models")
    @classmethod
    def _unique(cls, value: list[Any]) -> list[Any]:
        twice = sorted({v for v in value if value.count(v) > 1})
        if twice:
            raise ValueError(f"{twice} are named twice; name each once")
        return value

    @field_validator("orders")
    @classmethod
    def _orders(cls, value: list[int]) -> list[int]:
        if not value or min(value) < 1 or max(value) > MAX_ORDER:
            raise ValueError(f"orders are 1 to {MAX_ORDER}, at least one of them; got {value}")
        return sorted(value)

    @field_validator("times")
    @classmethod
    def _times(cls, value: Spacing | list[float]) -> Spacing | list[float]:
        if isinstance(value, list):
            inside = value and all(0 < t <= 1 for t in value)
            if not inside or any(a - b < GAP * (1 - 1e-9) for a, b in pairwise(value)):
                raise ValueError(f"times must fall from at most 1 by at least {GAP} each; got {value}")
        return value

    @model_validator(mode="after")
    def _together(self) -> SchedulesConfig:
        if not self.search or not (self.predictions and self.relax[0] <= self.relax[1]):
            raise ValueError("search and predictions need at least one entry, relax a low and a high end")
        if self.steps and self.slots:
            raise ValueError("give steps (a fixed number) or slots (a largest one), not both")
        timed = "time" in self.search
        if timed and isinstance(self.times, list):
            raise ValueError("times are searched, so none can be given; take 'time' out of search")
        if isinstance(self.times, list) and (self.steps or self.slots) not in (0, len(self.times)):
            raise ValueError(f"{len(self.times)} times for {self.steps or self.slots} steps; leave steps out")
        if self.skip and (timed or "model" not in self.search or self.steps):
            raise ValueError("skip needs 'model' in search, times that are not searched, and slots")
        if self.slots and not (timed or self.skip):
            raise ValueError("slots needs 'time' in search, or skip: true; for a fixed number write steps")
        if self.slots and timed and not self.min_steps < self.slots:
            raise ValueError(f"min_steps = {self.min_steps} must be below slots = {self.slots}")
        return self
