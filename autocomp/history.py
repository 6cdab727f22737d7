"""What a study remembers: trials by (candidate, fidelity), best values, hypervolume over time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autocomp.objective import Constraint, Objective
from autocomp.pareto import hypervolume, is_feasible, loss_row, non_dominated, reference_point
from autocomp.space import Candidate
from autocomp.trial import Fidelity, Trial

PROXY = Fidelity("proxy", "proxy")
SELECTION = Fidelity("selection", "selection")
REPORT = Fidelity("report", "report")


def timing_only(number: int) -> Fidelity:
    """Of one candidate, the timing of that number: latency alone, no quality is scored."""
    return Fidelity(f"timing-{number}", "")


class History:
    """Trials in order, with look-up by (candidate, fidelity)."""

    def __init__(self, trials: Iterable[Trial] = ()) -> None:
        self.trials: list[Trial] = []
        self._by_key: dict[tuple[str, str], Trial] = {}
        self._by_level: dict[str, list[Trial]] = {}
        self._best: dict[Objective, tuple[float | None, int]] = {}
        for trial in trials:
            self.add(trial)

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._by_key[trial.key] = trial
        self._by_level.setdefault(trial.fidelity.name, []).append(trial)

    def find(self, candidate: Candidate, level: Fidelity) -> Trial | None:
        return self._by_key.get((candidate.fingerprint, level.name))

    def at(self, level: Fidelity) -> list[Trial]:
        return self._by_level.get(level.name, [])

    def deepest(self) -> Fidelity:
        """The most thorough fidelity that has trials."""
        return next((f for f in (REPORT, SELECTION) if self.at(f)), PROXY)

    def best(self, objective: Objective) -> float | None:
        """The best value of an objective at the search fidelity; brought up to date as trials come."""
        trials = self.at(PROXY)
        best, seen = self._best.get(objective, (None, 0))
        for trial in trials[seen:]:
            value = trial.value(objective.metric)
            if value == value and (best is None or objective.loss(value) < objective.loss(best)):
                best = value
        self._best[objective] = (best, len(trials))
        return best

    def __len__(self) -> int:
        return len(self.trials)


class RunningVolume:
    """Hypervolume of the feasible trials so far, against a reference that stays."""

    def __init__(
        self, corner: Sequence[float], objectives: Sequence[Objective], constraints: Sequence[Constraint]
    ) -> None:
        self.corner = corner
        self.value = 0.0
        self._objectives, self._constraints = objectives, constraints
        self._rows: list[tuple[float, ...]] = []

    @classmethod
    def start(
        cls, trials: Sequence[Trial], objectives: Sequence[Objective], constraints: Sequence[Constraint]
    ) -> RunningVolume | None:
        """With the reference of these trials; ``None`` when none of them is feasible."""
        feasible = [t for t in trials if is_feasible(t, objectives, constraints)]
        if not feasible:
            return None
        running = cls(tuple(reference_point(feasible, objectives)), objectives, constraints)
        for trial in feasible:
            running.add(trial)
        return running

    def add(self, trial: Trial) -> float:
        """The hypervolume with this trial in it."""
        if is_feasible(trial, self._objectives, self._constraints):
            row = loss_row(trial, self._objectives)
            if not any(all(a <= b for a, b in zip(other, row)) for other in self._rows):
                rows = [*self._rows, row]
                self._rows = [r for r, keep in zip(rows, non_dominated(rows)) if keep]
                self.value = hypervolume(self._rows, self.corner)
        return self.value


def hypervolume_curve(
    trials: Sequence[Trial], objectives: Sequence[Objective], constraints: Sequence[Constraint] = ()
) -> list[float]:
    """Hypervolume of the feasible trials after each one, against the reference of all of them."""
    final = RunningVolume.start(trials, objectives, constraints)
    if final is None:
        return [0.0] * len(trials)
    running = RunningVolume(final.corner, objectives, constraints)
    return [running.add(t) for t in trials]
