"""Allocation under one budget by repeated re-linearisation.

With one objective there is one plan to find, not a front to cover. Costs at the uncompressed model give a
first plan. A profile around that plan gives the costs that hold there; the mean over the plans visited so
far gives the next plan. Averaging matters: solving with the newest profile alone swings between plans. The
first step is kept short, because one profile is all there is. When the rounds are spent, the mean model is
solved within small distances of the best plan measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autocomp.errors import InfeasibleError
from autocomp.pareto import is_feasible
from autocomp.searchers.base import LocalModel, Problem
from autocomp.searchers.common import seen_fingerprints
from autocomp.searchers.ilp import Allocator, hard_budgets
from autocomp.space import AdditiveTable, Candidate, Value
from autocomp.trial import Trial


@dataclass(frozen=True)
class Descent:
    """Plans for a problem with one objective, which local profiles are about.

    Attributes:
        rounds: profiles to ask for.
        first_step: share of the decisions that may change after the first profile.
        polish: shares of the decisions that may differ from the best plan, tried at the end.
    """

    problem: Problem
    rounds: int = 5
    first_step: float = 0.2
    polish: tuple[float, ...] = (0.03, 0.07, 0.2)
    gap: float = 1e-4
    time_limit: float = 10.0

    @staticmethod
    def suits(problem: Problem) -> bool:
        """One objective, with a cost for every option, and profiles to be had."""
        if not problem.can_profile or len(problem.objectives) != 1:
            return False
        table = problem.tables.get(problem.objectives[0].metric)
        return table is not None and not table.exact and table.covers(problem.space)

    @property
    def metric(self) -> str:
        return self.problem.objectives[0].metric

    def ask(self, history: Sequence[Trial], pending: Sequence[Candidate]) -> list[Candidate]:
        """The next plan; then, when the rounds are over, plans near the best. Empty when all are known."""
        seen = seen_fingerprints(history, pending)
        local = self.local()
        table = mean_model(self.problem.tables[self.metric], local)
        center = (local[0].candidate, self.first_step) if len(local) == 1 else None
        plans = [self._solve(table, center)]
        best = self._best(history)
        if len(local) >= self.rounds and best is not None:
            plans += [self._solve(table, (best.candidate, share)) for share in self.polish]
        return [p for p in dict.fromkeys(plans) if p is not None and p.fingerprint not in seen]

    def wants_profile(self, history: Sequence[Trial]) -> Candidate | None:
        """The newest plan of the search that was measured and not profiled yet, while rounds are left."""
        known = {m.candidate for m in self.problem.local}
        mine = [t for t in history if t.ok and t.origin not in ("baseline", "audit")]
        if not mine or len(self.local()) >= self.rounds or mine[-1].candidate in known:
            return None
        return mine[-1].candidate

    def local(self) -> list[LocalModel]:
        return [m for m in self.problem.local if m.table.metric == self.metric]

    def _best(self, history: Sequence[Trial]) -> Trial | None:
        feasible = [t for t in history if is_feasible(t, self.problem.objectives, self.problem.constraints)]
        objective = self.problem.objectives[0]
        return min(feasible, key=lambda t: objective.loss(t.value(objective.metric)), default=None)

    def _solve(self, table: AdditiveTable, near: tuple[Candidate, float] | None) -> Candidate | None:
        allocator = Allocator(self.problem.space, table)
        rows = [allocator.row(b) for b in hard_budgets(self.problem, self.problem.tables)]
        try:
            if near is not None:
                rows.append(allocator.near(near[0], max(1, round(near[1] * len(allocator.groups)))))
            return allocator.solve(rows, (), self.gap, self.time_limit).candidate
        except InfeasibleError:
            if near is None:
                raise
            return None


def mean_model(prior: AdditiveTable, local: Sequence[LocalModel]) -> AdditiveTable:
    """Mean of the local models' costs, each counted from the decision's last (largest) option so that
    profiles around different plans compare; ``prior`` when there is none."""
    if not local:
        return prior
    costs: dict[str, dict[Value, float]] = {}
    for name, row in prior.costs.items():
        last = list(row)[-1]
        costs[name] = {
            option: sum(m.table.cost(name, option) - m.table.cost(name, last) for m in local) / len(local)
            for option in row
        }
        if any(math.isnan(c) for c in costs[name].values()):  # a decision that the profiles know nothing of
            costs[name] = dict(row)
    return AdditiveTable(prior.metric, 0.0, costs)
