"""Pareto fronts that know about noise, exact hypervolume, and picking one point of a front.

Everything works on losses: an objective's value with its sign turned so that smaller is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autocomp.errors import InfeasibleError, ObjectiveError
from autocomp.objective import Constraint, Objective, Selection
from autocomp.trial import Trial

Label = Literal["front", "tie", "dominated"]
Floats = NDArray[np.float64]


def dominates(a: ArrayLike, b: ArrayLike) -> bool:
    """True when losses ``a [m]`` are nowhere worse than ``b [m]`` and somewhere better. NaN never is."""
    left, right = np.asarray(a, float), np.asarray(b, float)
    return bool(np.all(left <= right) and np.any(left < right))


def non_dominated(losses: ArrayLike) -> NDArray[np.bool_]:
    """Mask ``[n]`` of the rows of ``losses [n, m]`` that no other row dominates.

    Equal rows do not dominate each other; a row with a NaN is never in the mask and dominates nobody.
    """
    table = _as_table(losses)
    mask: NDArray[np.bool_] = np.asarray(~np.isnan(table).any(axis=1))
    for i in range(len(table)):
        if mask[i]:  # what a dominated row dominates, its dominator dominates too
            mask[_dominated_rows(table, i)] = False
    return mask


def _dominated_rows(table: Floats, i: int) -> NDArray[np.bool_]:
    """Mask of the rows that row ``i`` dominates."""
    with np.errstate(invalid="ignore"):
        return np.all(table[i] <= table, axis=1) & np.any(table[i] < table, axis=1)


def _as_table(losses: ArrayLike) -> Floats:
    table = np.asarray(losses, dtype=np.float64)
    if table.size == 0 and table.ndim < 2:
        return table.reshape(0, 1)
    if table.ndim != 2:
        raise ObjectiveError(f"losses must have shape [points, objectives]; got {list(table.shape)}")
    return table


def noisy_labels(losses: ArrayLike, stderr: ArrayLike, z: float = 1.96) -> list[tuple[Label, int | None]]:
    """Label every row of ``losses [n, m]`` with standard errors ``stderr [n, m]``; none may be NaN.

    A row is ``front`` when no row dominates it by value. It is ``dominated`` when some row ``q`` is, by
    value, nowhere worse and is better beyond the noise in at least one objective,
    ``loss_p - loss_q > z * sqrt(se_p^2 + se_q^2)``. What is left loses only within the noise, in every
    objective and to everyone that beats it: a ``tie``.

    Returns:
        For each row its label and, unless it is ``front``, the row that beats it (one of the front
        where such a row does, and the one that wins by the most standard errors).
    """
    table = _as_table(losses)
    noise = np.nan_to_num(_as_table(stderr)) ** 2
    front = non_dominated(table)
    labels: list[tuple[Label, int | None]] = []
    for p in range(len(table)):
        if front[p]:
            labels.append(("front", None))
            continue
        beats = np.all(table <= table[p], axis=1) & np.any(table < table[p], axis=1)
        wins, spread = table[p] - table, np.sqrt(noise + noise[p])
        clear = beats & np.any(wins > z * spread, axis=1)
        among = clear if clear.any() else beats
        among = among & front if (among & front).any() else among
        with np.errstate(divide="ignore", invalid="ignore"):
            margin = np.nan_to_num(np.where(wins > 0, wins / spread, 0.0), posinf=1e300).max(axis=1)
        winner = int(np.flatnonzero(among)[np.argmax(margin[among])])
        labels.append(("dominated" if clear.any() else "tie", winner))
    return labels


def hypervolume(losses: ArrayLike, reference: ArrayLike) -> float:
    """Exact volume between the rows of ``losses [n, m]`` and the point ``reference [m]``.

    One and two objectives by sorting, three by a sweep over slices, more by the WFG recursion over
    exclusive contributions (While, Bradstreet and Barone, IEEE TEVC 16(1), 2012). Rows that are not
    better than the reference in every objective add nothing; rows with NaN are ignored.

    Raises:
        ObjectiveError: shapes differ, or the reference is not finite.
    """
    table, corner = _as_table(losses), np.asarray(reference, dtype=np.float64)
    if corner.ndim != 1 or not np.isfinite(corner).all():
        raise ObjectiveError(f"a hypervolume reference is a list of finite numbers; got {reference!r}")
    if len(table) == 0:
        return 0.0
    if table.shape[1] != len(corner):
        raise ObjectiveError(f"{table.shape[1]} objectives, but the reference has {len(corner)} numbers")
    with np.errstate(invalid="ignore"):
        table = np.unique(table[np.all(table < corner, axis=1)], axis=0)
    return _volume(table[non_dominated(table)], corner) if len(table) else 0.0


def _volume(front: Floats, corner: Floats) -> float:
    """Hypervolume of mutually non-dominated, distinct rows, all better than the corner."""
    if len(front) == 0:
        return 0.0
    if len(front) == 1 or len(corner) == 1:
        return float(np.prod(corner - front.min(axis=0)))
    if len(corner) == 2:
        return _area(front[np.argsort(front[:, 0])], corner)
    front = front[np.argsort(front[:, -1])]
    if len(corner) == 3:
        return _volume_by_slices(front, corner)
    # WFG: what row i adds to the rows after it is its box less the part that they cover of it.
    total = 0.0
    for i, row in enumerate(front):
        limited = np.unique(np.maximum(front[i + 1 :], row), axis=0)
        total += float(np.prod(corner - row)) - _volume(limited[non_dominated(limited)], corner)
    return total


def _area(front: Floats, corner: Floats) -> float:
    """Two objectives: a staircase sorted by the first, so that the second falls."""
    tops = np.concatenate([[corner[1]], front[:-1, 1]])
    return float(np.sum((corner[0] - front[:, 0]) * (tops - front[:, 1])))


def _volume_by_slices(front: Floats, corner: Floats) -> float:
    """Three objectives, rows sorted by the last: between two values of it the section is constant."""
    total = 0.0
    ends = np.append(front[1:, 2], corner[2])
    stairs = np.empty((0, 2))
    for row, end in zip(front, ends, strict=True):
        stairs = np.vstack([stairs, row[:2]])
        stairs = np.unique(stairs[non_dominated(stairs)], axis=0)
        if end > row[2]:
            total += _area(stairs, corner[:2]) * float(end - row[2])
    return total


@dataclass(frozen=True)
class FrontPoint:
    """A feasible trial and where it stands.

    Attributes:
        trial: the trial, with its measurement.
        label: see ``noisy_labels``.
        dominated_by: number of the trial that beats it; ``None`` on the front.
    """

    trial: Trial
    label: Label
    dominated_by: int | None = None


@dataclass(frozen=True)
class ParetoFront:
    """Every feasible measured trial, labelled against the others, in the order of the first objective.

    Attributes:
        points: front, tied and dominated points.
        objectives: what the labels are about.
        constraints: what every point meets.
    """

    points: tuple[FrontPoint, ...]
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...] = ()

    @classmethod
    def of(
        cls,
        trials: Iterable[Trial],
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        z: float = 1.96,
    ) -> ParetoFront:
        """Label the trials; of trials with the same candidate the last one counts.

        Failed trials, trials with a missing, NaN or infinite objective, and trials that break a
        constraint never enter. ``z`` standard errors of a difference count as beyond the noise.

        Raises:
            ObjectiveError: no objective.
        """
        if not objectives:
            raise ObjectiveError("a front needs at least one objective, such as 'min kl'")
        latest = {t.candidate.fingerprint: t for t in trials if is_feasible(t, objectives, constraints)}
        kept = sorted(latest.values(), key=lambda t: (*loss_row(t, objectives), t.number))
        if not kept:
            return cls((), tuple(objectives), tuple(constraints))
        losses = np.array([loss_row(t, objectives) for t in kept])
        stderr = np.array([[t.stderr(o.metric) for o in objectives] for t in kept])
        points = [
            FrontPoint(t, label, None if by is None else kept[by].number)
            for t, (label, by) in zip(kept, noisy_labels(losses, stderr, z), strict=True)
        ]
        return cls(tuple(points), tuple(objectives), tuple(constraints))

    @property
    def front(self) -> tuple[FrontPoint, ...]:
        """Points that nobody beats beyond the noise."""
        return tuple(p for p in self.points if p.label != "dominated")

    def __len__(self) -> int:
        return len(self.front)

    def select(self, selection: str | Selection) -> Trial:
        """The trial of the front that a selection such as ``"kl <= 0.1, min decode_ms"`` asks for.

        Raises:
            InfeasibleError: no point of the front meets the bounds; names the nearest values.
            ObjectiveError: the selection can't be read, or its metric was measured nowhere on the front.
        """
        wanted = Selection.parse(selection) if isinstance(selection, str) else selection
        trials = [p.trial for p in self.front]
        self._check_measured(wanted, trials)
        fitting = [t for t in trials if wanted.admits(t.values()) and _finite(t, wanted.objective)]
        if not fitting:
            raise InfeasibleError(f"no point of the front meets '{wanted}': {_nearest(wanted, trials)}")
        # Equal values: the one that is better in the front's own objectives, then the older one.
        return min(fitting, key=lambda t: (*loss_row(t, (wanted.objective, *self.objectives)), t.number))

    def _check_measured(self, wanted: Selection, trials: Sequence[Trial]) -> None:
        known = sorted({m for t in trials for m in t.values()})
        items: list[Constraint | Objective] = [*wanted.constraints, wanted.objective]
        for item in items:
            if trials and item.metric not in known:
                raise ObjectiveError(f"'{item}': no point of the front has that metric; measured: {known}")

    def hypervolume(self, reference: ArrayLike) -> float:
        """Volume that the front dominates below ``reference`` (losses, one an objective)."""
        return hypervolume([loss_row(p.trial, self.objectives) for p in self.front], reference)

    def rows(self) -> list[dict[str, Any]]:
        """A flat table, one row a point: number, fingerprint, origin, label, metrics and their errors."""
        return [_row(p) for p in self.points]

    def to_json(self) -> dict[str, Any]:
        return {
            "objectives": [asdict(o) for o in self.objectives],
            "constraints": [asdict(c) for c in self.constraints],
            "points": [
                {"trial": p.trial.to_json(), "label": p.label, "dominated_by": p.dominated_by}
                for p in self.points
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ParetoFront:
        points = [
            FrontPoint(Trial.from_json(p["trial"]), p["label"], p["dominated_by"]) for p in data["points"]
        ]
        objectives = tuple(Objective(**o) for o in data["objectives"])
        return cls(tuple(points), objectives, tuple(Constraint(**c) for c in data["constraints"]))


def loss_row(trial: Trial, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """The trial's losses, one an objective; NaN where it was not measured."""
    return tuple(o.loss(trial.value(o.metric)) for o in objectives)


def is_feasible(
    trial: Trial, objectives: Sequence[Objective], constraints: Sequence[Constraint] = ()
) -> bool:
    """True when the trial was measured, its objectives are finite and its constraints hold."""
    return (
        trial.ok
        and all(_finite(trial, o) for o in objectives)
        and all(c.violation(trial.value(c.metric)) == 0 for c in constraints)
    )


def reference_point(trials: Iterable[Trial], objectives: Sequence[Objective], margin: float = 0.1) -> Floats:
    """A hypervolume reference ``[m]`` (losses): the worst measured value of each objective, plus a margin.

    The margin is a share of the objective's range (of its magnitude when the range is zero), so that
    the extreme points of the front still span a volume. Use one reference for all fronts to compare.

    Raises:
        ObjectiveError: no trial has finite values for all objectives.
    """
    rows = [loss_row(t, objectives) for t in trials if is_feasible(t, objectives)]
    if not rows:
        raise ObjectiveError(f"no measured trial has finite {', '.join(o.metric for o in objectives)}")
    losses = np.array(rows)
    worst, span = losses.max(axis=0), np.ptp(losses, axis=0)
    scale = np.where(span > 0, span, np.maximum(np.abs(worst), 1e-12))
    return worst + margin * scale


def _finite(trial: Trial, objective: Objective) -> bool:
    return math.isfinite(trial.value(objective.metric))


def _nearest(wanted: Selection, trials: Sequence[Trial]) -> str:
    """What the front can reach for each bound by itself, and the point that misses them by the least."""
    if not trials:
        return "the front is empty; no trial was measured, or none met the constraints"
    reach, misses = [], np.zeros(len(trials))
    for c in wanted.constraints:
        values = np.array([t.value(c.metric) for t in trials])
        if np.isfinite(values).any():
            best = np.nanmin(values) if c.upper else np.nanmax(values)
            reach.append(f"{'smallest' if c.upper else 'largest'} {c.metric} is {best:.6g}")
        scale = max(abs(c.bound), 1e-12)
        misses += np.array([c.violation(v) for v in values]) / scale
    nearest = trials[int(np.argmin(misses))]
    shown = ", ".join(f"{c.metric} = {nearest.value(c.metric):.6g}" for c in wanted.constraints)
    return f"{', '.join(reach)}; trial {nearest.number} is nearest with {shown}; loosen a bound"


def _row(point: FrontPoint) -> dict[str, Any]:
    trial = point.trial
    row: dict[str, Any] = {
        "number": trial.number,
        "fingerprint": trial.candidate.fingerprint,
        "origin": trial.origin,
        "label": point.label,
        "dominated_by": point.dominated_by,
    }
    for metric, value in trial.values().items():
        row[metric] = value
        row[f"{metric}_stderr"] = trial.stderr(metric)
    return row
