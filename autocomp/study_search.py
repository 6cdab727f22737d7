"""The search phase of a study: ask, submit, collect, until the budget is spent or nothing is proposed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from autocomp.job import Job
from autocomp.searchers.base import Problem, Searcher
from autocomp.space import Candidate
from autocomp.staging import Stages
from autocomp.study_measure import Measurer
from autocomp.study_problem import MakeSearcher, ProblemMaker

logger = logging.getLogger("autocomp")


class SearchPhase:
    """Proposals of a searcher, measured in stages, within the budget.

    Args:
        job: its budget, and the searcher's name for the trials.
        measurer: measures, and remembers.
        stages: which candidates go on to more sequences.
        maker: grants searchers their profiles and builds them anew.
        make: the searcher, or what makes one.
        say: told what the user should know.
    """

    def __init__(
        self,
        job: Job,
        measurer: Measurer,
        stages: Stages,
        maker: ProblemMaker,
        make: MakeSearcher,
        say: Callable[[str, str], None],
    ) -> None:
        self._job, self._measurer, self._stages = job, measurer, stages
        self._maker, self._make, self._say = maker, make, say

    def run(self, searcher: Searcher, problem: Problem) -> None:
        """Search to the end."""
        readings, executor, origin = self._measurer.readings, self._measurer.executor, self._job.searcher.name
        for candidate, level in self._stages.resume(readings):
            self._measurer.submit(candidate, level, origin)
        exhausted = False
        while True:
            spent, busy = self._spent(), executor.busy()
            if (spent or exhausted) and not busy:
                break
            if not spent and not exhausted and not busy:
                seen = self._stages.seen(readings)
                searcher, problem = self._maker.around(self._make, searcher, problem, seen)
            if not spent and not exhausted and busy < executor.slots:
                wanted, fresh = self._ask(searcher, problem)
                exhausted = wanted > 0 and not fresh
                if exhausted and not busy:
                    self._say("message", "the searcher has nothing more to propose")
                for candidate in fresh:
                    self._measurer.submit(candidate, self._stages.levels[0], origin)
            for trial in self._measurer.collect():
                exhausted = False
                following = self._stages.after(trial, readings)
                if following is not None:
                    self._measurer.submit(trial.candidate, following, origin)
        if self._stages.dropped:
            self._say("message", f"{self._stages.dropped} candidates ended on a part of the proxy split")

    def _ask(self, searcher: Searcher, problem: Problem) -> tuple[int, list[Candidate]]:
        """How many candidates were asked for, and the new ones among those that the searcher gave."""
        executor, pending = self._measurer.executor, self._pending()
        room = self._job.budget.trials - self._done() - len(pending)
        wanted = min(room, 2 * executor.slots - executor.busy())
        seen = self._stages.seen(self._measurer.readings) if wanted > 0 else []
        asked = searcher.ask(wanted, seen, pending) if wanted > 0 else []
        return wanted, self._fresh(asked, problem)

    def _pending(self) -> list[Candidate]:
        return self._measurer.pending(self._stages.levels)

    def _done(self) -> int:
        return len(self._measurer.history.at(self._stages.levels[-1])) + self._stages.dropped

    def _spent(self) -> bool:
        budget, history = self._job.budget, self._measurer.history
        trials = [t for level in self._stages.levels for t in history.at(level)] if budget.tokens else []
        tokens = sum(t.measurement.tokens for t in trials if t.measurement)
        return (
            self._done() + len(self._pending()) >= budget.trials
            or (budget.minutes > 0 and self._measurer.elapsed / 60 >= budget.minutes)
            or (budget.tokens > 0 and tokens >= budget.tokens)
        )

    def _fresh(self, asked: Iterable[Candidate], problem: Problem) -> list[Candidate]:
        """Candidates that are in the space and not yet measured or under way."""
        waiting, history, levels = set(self._pending()), self._measurer.history, self._stages.levels
        fresh = []
        for candidate in dict.fromkeys(asked):
            reasons = problem.space.violations(candidate)
            if reasons:
                logger.warning("the searcher proposed an invalid candidate: %s", "; ".join(reasons))
            elif candidate not in waiting and all(history.find(candidate, x) is None for x in levels):
                fresh.append(candidate)
        return fresh
