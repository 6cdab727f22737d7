"""A sampling schedule as a plain value: where each step is, which model it calls and which formula moves on.

No torch here: spaces, searchers and exporters read schedules on the driver.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from autocomp.errors import SpaceError

Prediction = Literal["data", "noise"]
MAX_ORDER = 3


@dataclass(frozen=True)
class Step:
    """One call of a model, and the update to the next step's time.

    Attributes:
        time: in (0, 1]: 1 is pure noise. Training timestep k of K is time (k + 1) / K.
        order: terms of the Taylor expansion of the exponential integrator, 1 to 3; a step can't use more
            model outputs than there have been, and falls back to a lower order.
        prediction: what is expanded: the clean image (``data``) or the noise.
        corrector: once the next step's model output is known, its start is computed again with it, one order
            higher (UniC, arXiv 2302.04867); costs no model call.
        relax: the derivative terms are multiplied by ``1 + relax * h``, h the step in half log-SNR (USF,
            arXiv 2312.07243, section 4.2).
        guidance: whether classifier-free guidance is applied (two evaluations instead of one).
        model: name of a zoo member; empty for the workload's own model.
    """

    time: float
    order: int = 1
    prediction: Prediction = "data"
    corrector: bool = False
    relax: float = 0.0
    guidance: bool = True
    model: str = ""

    def __post_init__(self) -> None:
        if not 0.0 < self.time <= 1.0:
            raise SpaceError(f"a step's time must be in (0, 1]; got {self.time}")
        if self.order not in range(1, MAX_ORDER + 1):
            raise SpaceError(f"a step's order must be 1 to {MAX_ORDER}; got {self.order}")
        if self.prediction not in ("data", "noise"):
            raise SpaceError(f"a step's prediction is 'data' or 'noise'; got {self.prediction!r}")
        if not math.isfinite(self.relax):
            raise SpaceError(f"a step's relax must be finite; got {self.relax}")


@dataclass(frozen=True)
class Schedule:
    """Steps from noise to image, times falling; after the last one comes ``end``.

    With ``end`` 0 the last update goes to the clean image itself: half log-SNR is infinite there, so it is
    the model's own guess of it, whatever order the step names.
    """

    steps: tuple[Step, ...]
    end: float = 0.0

    def __post_init__(self) -> None:
        times = [s.time for s in self.steps]
        if not times:
            raise SpaceError("a schedule needs at least one step")
        if any(b >= a for a, b in pairwise([*times, self.end])) or self.end < 0:
            raise SpaceError(f"times must fall, down to end >= 0; got {times} and end {self.end}")

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def evaluations(self) -> int:
        """Evaluations of a model for one image, the unguided half of guided steps included."""
        return sum(2 if s.guidance else 1 for s in self.steps)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that are called, each once, in order of first use."""
        return tuple(dict.fromkeys(s.model for s in self.steps))

    def to_json(self) -> dict[str, Any]:
        return {"steps": [asdict(s) for s in self.steps], "end": self.end}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        """Raises ``SpaceError`` for missing or unknown fields, and for values out of range."""
        try:
            return cls(tuple(Step(**s) for s in data["steps"]), float(data.get("end", 0.0)))
        except (KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SpaceError(f"this is no schedule ({reason}): {data!r:.200}") from None


def uniform_times(count: int, *, first: float = 1.0, power: float = 1.0) -> list[float]:
    """``count`` falling times from ``first`` on whose ``power``-th roots are evenly spaced down to 0."""
    root = first ** (1.0 / power)
    return [(root * (count - i) / count) ** power for i in range(count)]


def uniform_schedule(
    times: Sequence[float], *, order: int = 1, prediction: Prediction = "data", corrector: bool = False,
    end: float = 0.0,
) -> Schedule:  # fmt: skip
    """The same formula at every step. Order 1 is DDIM (either prediction gives the same), order 2 on data is
    DPM-Solver++(2M), with the corrector UniPC."""
    return Schedule(tuple(Step(t, order, prediction, corrector) for t in times), end)
