"""The one loop: describe, profile, measure baselines, audit, search, promote, validate.

Everything that was measured is in the journal before anything else happens with it, so a study that is
stopped or killed continues with the same history and measures nothing twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from autocomp.errors import RunError
from autocomp.executors.base import Executor
from autocomp.history import PROXY, REPORT, SELECTION, History, RunningVolume, hypervolume_curve
from autocomp.job import Job
from autocomp.journal import Journal
from autocomp.noise import NearTies, noise_summary, without_errors
from autocomp.objective import Objective
from autocomp.pareto import ParetoFront
from autocomp.plan import Plan, make_plan
from autocomp.predictors.audit import audit
from autocomp.readings import REPEAT, Readings
from autocomp.searchers.base import Problem, Searcher
from autocomp.space import Candidate
from autocomp.spread import spread
from autocomp.staging import Stages
from autocomp.study_events import Event, StudyResult, Trackers, artifacts, trial_words
from autocomp.study_measure import Measurer
from autocomp.study_problem import ProblemMaker, describe
from autocomp.study_search import SearchPhase
from autocomp.tracking.base import Tracker
from autocomp.trial import Fidelity, Trial

__all__ = ["Event", "Study", "StudyResult"]

logger = logging.getLogger("autocomp")


class Study:
    """One search. Build it with ``autocomp.search`` unless parts are your own.

    Args:
        job: the checked job.
        run_dir: new, or one of an earlier call with the same job (the study then continues).
        executor: runs the workers; the study closes it.
        searcher: a searcher object, or a callable that makes one from a ``Problem``.
        trackers: told about every trial; what they raise is logged once and ignored.
        objectives: replace the job's (objects instead of strings).
        on_event: called in this process with every ``Event``.
        clock: seconds since any fixed moment; budgets and elapsed times are read from it.
    """

    def __init__(
        self,
        job: Job,
        run_dir: Path,
        *,
        executor: Executor,
        searcher: Searcher | Callable[[Problem], Searcher],
        trackers: Sequence[Tracker] = (),
        objectives: Sequence[Objective] | None = None,
        on_event: Callable[[Event], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.job = job
        self.run_dir = run_dir
        self.executor = executor
        self.objectives = tuple(objectives or job.parsed_objectives())
        self.constraints = job.parsed_constraints()
        self.measurer = Measurer(executor, job, clock, self._report)
        self._make_searcher = searcher
        self._trackers = Trackers(trackers)
        self._on_event = on_event or (lambda event: None)
        self._audit: dict[str, Any] = {}
        self._stages = Stages((), self.objectives, self.constraints)
        self._exact: set[str] = set()
        self._measured_before = 0
        self._now = clock

    @property
    def history(self) -> History:
        """All trials as they were measured."""
        return self.measurer.history

    @property
    def readings(self) -> Readings:
        """All trials as they are read: see ``Readings``."""
        return self.measurer.readings

    # -- the whole ---------------------------------------------------------------------------------

    def run(self) -> StudyResult:
        """Run to the end of the budget, or until Ctrl-C; both return a result.

        Raises:
            JobError, ObjectiveError, InfeasibleError: the job can't work on this model and machine.
            RunError: the run directory is taken or damaged, the disk is full, or profiling failed.
        """
        started = self._now()
        try:
            with Journal(self.run_dir) as journal:
                self._open(journal)
                try:
                    self._search_phases()
                    status = "finished"
                except KeyboardInterrupt:
                    status = "stopped"
                    self._say("phase", "stopped; `autocomp resume` goes on from here")
                return self._finish(status, self._now() - started)
        finally:
            self.executor.close()

    def _open(self, journal: Journal) -> None:
        self.journal = journal
        resolved = self.job.resolved()
        for record in journal.of("job"):
            # Checked anew: a run of an earlier version gets the defaults of keys that it did not know.
            if _essence(Job.of(record["job"]).resolved()) != _essence(resolved):
                raise RunError(
                    f"run {self.run_dir.name!r} belongs to another job; choose a new run directory"
                )
        if not journal.of("job"):
            journal.append("job", job=resolved, time=time.time())
            (self.run_dir / "job.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
        self.measurer.open(journal)
        self._stages = Stages.of(self.job, self.objectives, self.constraints)
        self._measured_before = len(self.history.at(PROXY))

    def _search_phases(self) -> None:
        self._say("phase", "loading the model on the workers")
        self.description = describe(self.journal, self.measurer, self.run_dir)
        self.plan: Plan = make_plan(self.description, self.objectives, self.constraints)
        self.measurer.plan(self.plan)
        for note in self.plan.notes:
            self._say("message", note)
        for name, reasons in self.description.export_limits.items():
            self._say("message", f"format {name} can't hold every candidate: {reasons[0]}")
        self._exact = {*self.description.exact, *self.description.counts}
        self._trackers.start(self.job.resolved(), self.run_dir)
        for trial in self.history.trials:
            self._trackers.trial(trial)
        self._say("phase", "measuring uniform baselines")
        self.measurer.measure(self.plan.baselines, PROXY, "baseline")
        maker = ProblemMaker(
            self.job, self.journal, self.measurer, self.description, self.plan,
            self.objectives, self.constraints, self._say,
        )  # fmt: skip
        problem = maker.problem()
        searcher = maker.searcher(self._make_searcher, problem)
        self._run_audit(problem)
        self._say("phase", f"searching {len(problem.space)} decisions")
        measured = self.readings.at(PROXY)
        self._trackers.volume = RunningVolume.start(measured, self.objectives, self.constraints)
        stages, make = self._stages, self._make_searcher
        SearchPhase(self.job, self.measurer, stages, maker, make, self._say).run(searcher, problem)
        self._say("phase", "promoting the best to more data")
        self._promote()
        self._say("phase", "validating the front on the report split")
        self._validate()
        self._repeat()
        for text in self._noise()["words"]:
            self._say("message", text)

    # -- phases ------------------------------------------------------------------------------------

    def _run_audit(self, problem: Problem) -> None:
        """Random feasible candidates: does the additive model rank them as the measurements do?"""
        n = self.job.validation.audit
        tables = [problem.tables[m] for m in self.plan.quality if m in problem.tables]
        if not n or not tables:
            return
        rng = problem.rng(0)
        draws = (problem.space.sample(rng) for _ in range(20 * n))
        picked = list(dict.fromkeys(c for c in draws if not problem.space.violations(c)))[:n]
        self._say("phase", f"audit: measuring {len(picked)} random candidates")
        trials = self.measurer.measure(picked, PROXY, "audit")
        for table in tables:
            report = audit(table, trials)
            self._audit[table.metric] = {
                **asdict(report),
                "predicted": [table.total(t.candidate) for t in trials if t.ok],
                "measured": [t.value(table.metric) for t in trials if t.ok],
            }
            self._say("message", f"audit of {table.metric}: {report}")

    def _front(self, level: Fidelity) -> ParetoFront:
        return ParetoFront.of(self.readings.at(level), self.objectives, self.constraints)

    def _promote(self) -> None:
        self.measurer.measure(self._chosen(PROXY, self.job.validation.promote), SELECTION, "promote")

    def _validate(self) -> None:
        chosen = self._chosen(SELECTION, self.job.validation.report)
        self.measurer.measure(chosen, REPORT, "validate", self.plan.baselines)

    def _chosen(self, level: Fidelity, count: int) -> list[Candidate]:
        """At most ``count`` candidates of a fidelity's front; those of the journal when it has them.

        Later timings of the reference change how trials are read: a resumed study must not choose anew.
        """
        measured = len(self.history.at(level))
        for record in self.journal.of("chosen"):
            if (record["fidelity"], record["trials"]) == (level.name, measured):
                return [Candidate.of(c) for c in record["candidates"]]
        best = [p.trial for p in self._front(level).front]
        chosen = [t.candidate for t in spread(best, self.objectives, count)]
        rows = [c.to_json() for c in chosen]
        self.journal.append("chosen", fidelity=level.name, trials=measured, candidates=rows)
        return chosen

    def _repeat(self) -> None:
        """Time near-ties again, until it is decided who is faster or the repeats are used up.

        Every round times each of them once, and every other round goes backwards: a device that becomes
        slower meanwhile then treats all alike.
        """
        ties, turn = self._near_ties(), 0
        while again := ties.next_round():
            self._say("phase", f"timing {len(again)} near-ties again")
            self.measurer.again(reversed(again) if turn % 2 else again, REPEAT)
            turn += 1

    def _near_ties(self) -> NearTies:
        return NearTies(self.readings, self.objectives, self.constraints, self.job.validation.repeats)

    # -- telling -----------------------------------------------------------------------------------

    def _report(self, trial: Trial) -> None:
        self._trackers.trial(trial)
        self._say("trial", trial_words(trial, self.objectives), trial)

    def _say(self, kind: str, text: str, trial: Trial | None = None) -> None:
        done, total = len(self.history.at(PROXY)) + self._stages.dropped, self.job.budget.trials
        here = done - self._measured_before
        eta = self.measurer.here / here * (total - done) if here > 0 and total > done else None
        best = {o.metric: value for o in self.objectives if (value := self.history.best(o)) is not None}
        self._on_event(Event(kind, text, trial, done, total, self.executor.busy(), best, eta))

    # -- the end -----------------------------------------------------------------------------------

    def _finish(self, status: str, seconds: float) -> StudyResult:
        level = REPORT if status == "finished" else self.history.deepest()
        front = self._front(level)
        curve = hypervolume_curve(self.readings.at(PROXY), self.objectives, self.constraints)
        noise = self._noise()
        result = StudyResult(self.run_dir, front, status, self._audit, curve, seconds, noise)
        summary = {
            "status": status,
            "fidelity": level.name,
            "front": front.to_json(),
            "audit": self._audit,
            "hypervolume": curve,
            "seconds": seconds,
            "noise": noise,
        }
        (self.run_dir / "front.json").write_text(json.dumps(summary))
        self._trackers.finish(summary, artifacts(result), status)
        if status == "finished" and not self.journal.of("finished"):
            self.journal.append("finished", time=time.time())
        return result

    def _noise(self) -> dict[str, Any]:
        """Drift, near-ties and unknown errors; see ``StudyResult``."""
        return noise_summary(self.readings, self._near_ties().verdicts(), self._without_errors())

    def _without_errors(self) -> list[str]:
        return without_errors(self.readings.at(PROXY), self.objectives, self._exact)


def _essence(job: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a job that must not change between a run and its resume."""
    free = ("executor", "tracking", "output", "budget")
    return {k: v for k, v in job.items() if k not in free}
