"""A knapsack with limits as a plain one: a block of groups becomes one group of joint choices ("columns").

Only columns that are worth it are written down. Those on the way to the relaxed optimum give a first
solution; the dual bound then says how much more than the best of its block a column of a better solution
may cost, and all of those can usually be listed. What solves the second knapsack solves the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autocomp.searchers.blocks import Mask
from autocomp.searchers.mckp import Dual, Floats, Groups, Ints, Knapsack, dual_at

MOST_COLUMNS = 50_000
"""Columns of one block that are listed at most."""
MOST_BESTS = 100
"""Patterns of one block whose best column is taken at one set of multipliers."""
FACTORS = (0.0, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
"""Multiples of the optimal multipliers at which first columns are taken."""


@dataclass(frozen=True)
class Master:
    """A plain knapsack over columns.

    Attributes:
        knapsack: one group a block, one for each group of no block.
        members: group numbers of each master group.
        columns: positions that each choice of a master group takes, ``[n, len(members)]``.
    """

    knapsack: Knapsack
    members: tuple[Ints, ...]
    columns: tuple[Ints, ...]

    @classmethod
    def of(cls, problem: Knapsack, members: Sequence[Ints], columns: Sequence[Ints]) -> Master:
        names = tuple((str(i),) for i in range(len(columns)))
        groups = Groups(names, tuple(tuple(range(len(c))) for c in columns))

        def summed(flat: Floats) -> Floats:
            return np.concatenate([flat[c].sum(axis=1) for c in columns])

        rows = tuple(replace(row, weight=summed(row.weight)) for row in problem.rows)
        exclude = []
        for x in problem.exclude:
            at = [np.flatnonzero((c == x[m]).all(axis=1)) for m, c in zip(members, columns, strict=True)]
            if all(len(found) for found in at):
                exclude.append(groups.start + np.array([found[0] for found in at], dtype=np.intp))
        knapsack = Knapsack(groups, summed(problem.cost), rows, exclude=tuple(exclude))
        return cls(knapsack, tuple(members), tuple(columns))

    def dual(self, of: Dual) -> Dual:
        """The problem's multipliers for the master: over fewer columns they prove as much or more."""
        return dual_at(self.knapsack, of.multipliers)

    def expand(self, x: Ints) -> Ints:
        """An assignment of the master ``[master groups]`` as one of the problem ``[groups]``."""
        full = np.empty(sum(len(m) for m in self.members), dtype=np.intp)
        for member, columns, at in zip(self.members, self.columns, x - self.knapsack.groups.start):
            full[member] = columns[at]
        return full


def first_master(problem: Knapsack, dual: Dual) -> Master:
    """Free groups whole; of each block the best column of every pattern at several multipliers and for each
    row by itself."""
    weights = np.array([r.weight for r in problem.rows]).reshape(len(problem.rows), len(problem.cost))
    prices = [problem.cost + factor * dual.multipliers @ weights for factor in FACTORS]
    prices += [w + 1e-9 * problem.cost for w in weights]
    masked = [np.where(problem.mask, p, np.inf) for p in prices]
    members, columns = _free(problem, problem.mask)
    for block in problem.structure.blocks:
        found = []
        for flat in masked:
            best, totals = block.best_by_pattern(flat)
            order = np.argsort(totals, kind="stable")[:MOST_BESTS]
            found.append(best[order[np.isfinite(totals[order])]])
        members.append(block.groups)
        columns.append(np.unique(np.vstack(found), axis=0))
    return Master.of(problem, members, columns)


def whole_master(problem: Knapsack, dual: Dual, ceiling: float) -> Master | None:
    """Every column that may be in a solution of at most ``ceiling``; ``None`` when they are too many."""
    weights = np.array([r.weight for r in problem.rows]).reshape(len(problem.rows), len(problem.cost))
    priced = problem.cost + dual.multipliers @ weights
    masked = np.where(problem.mask, priced, np.inf)
    # The last term is for rounding: sums of priced options may be off by that much.
    slack = ceiling - dual.bound + 1e-12 * float(np.abs(priced).sum())
    members, columns = _free(problem, problem.mask & (dual.reduced <= slack))
    for block in problem.structure.blocks:
        least = block.cheapest(masked)[1]
        found = block.columns(masked, least + slack, MOST_COLUMNS) if block.exact else None
        if found is None:
            return None
        members.append(block.groups)
        columns.append(found)
    return Master.of(problem, members, columns)


def _free(problem: Knapsack, keep: Mask) -> tuple[list[Ints], list[Ints]]:
    """Groups of no block, and the kept positions of each as columns."""
    groups = problem.groups
    bound = {int(g) for block in problem.structure.blocks for g in block.groups}
    ends = np.append(groups.start[1:], len(groups.owner))
    free = [g for g in range(len(groups)) if g not in bound]
    members = [np.array([g], dtype=np.intp) for g in free]
    columns = [(groups.start[g] + np.flatnonzero(keep[groups.start[g] : ends[g]]))[:, None] for g in free]
    return members, columns
