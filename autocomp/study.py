"""The one loop: describe, profile, measure baselines, audit, search, promote, validate.

Everything that was measured is in the journal before anything else happens with it, so a study that is
stopped or killed continues with the same history and measures nothing twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from autocomp.description import Description
from autocomp.errors import JobError, RunError
from autocomp.executors.base import Executor, Outcome, WorkItem
from autocomp.history import PROXY, REPORT, SELECTION, History, RunningVolume, hypervolume_curve
from autocomp.job import Job
from autocomp.journal import Journal
from autocomp.objective import Objective
from autocomp.pareto import ParetoFront
from autocomp.plan import Plan, make_plan, make_problem
from autocomp.predictors.audit import audit
from autocomp.predictors.latency import latency_table, operation_keys, rebase
from autocomp.profile import ProfileRequest, ProfileResult
from autocomp.search_spaces.base import Space
from autocomp.searchers.base import LocalModel, Problem, ProfilingSearcher, Searcher, unsupported
from autocomp.space import AdditiveTable, Candidate
from autocomp.spread import spread
from autocomp.tracking.base import Tracker
from autocomp.trial import Failure, Fidelity, Trial

logger = logging.getLogger("autocomp")


@dataclass(frozen=True)
class Event:
    """Something that a user may want to see. ``kind``: ``phase``, ``trial`` or ``message``."""

    kind: str
    text: str
    trial: Trial | None = None
    done: int = 0
    total: int = 0
    busy: int = 0
    best: Mapping[str, float] = field(default_factory=dict)
    eta_s: float | None = None


@dataclass(frozen=True)
class StudyResult:
    """What a study returns.

    Attributes:
        front: the validated front; before validation (``stopped``) the front of the proxy measurements.
        status: ``finished`` or ``stopped``.
        audit: rank correlation of predicted against measured, as JSON; empty when there was none.
        hypervolume: after each proxy trial, against one fixed reference.
    """

    run_dir: Path
    front: ParetoFront
    status: str
    audit: Mapping[str, Any]
    hypervolume: Sequence[float]
    seconds: float


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
    ) -> None:
        self.job = job
        self.run_dir = run_dir
        self.executor = executor
        self.objectives = tuple(objectives or job.parsed_objectives())
        self.constraints = job.parsed_constraints()
        self.history = History()
        self._make_searcher = searcher
        self._trackers = [_Guarded(t) for t in trackers]
        self._on_event = on_event or (lambda event: None)
        self._audit: dict[str, Any] = {}
        self._volume: RunningVolume | None = None
        self._under_way: dict[str, tuple[Candidate, Fidelity, str]] = {}
        self._elapsed = 0.0  # seconds of search in earlier sessions of this run
        self._measured_before = 0
        self._clock = time.perf_counter()

    # -- the whole ---------------------------------------------------------------------------------

    def run(self) -> StudyResult:
        """Run to the end of the budget, or until Ctrl-C; both return a result.

        Raises:
            JobError, ObjectiveError, InfeasibleError: the job can't work on this model and machine.
            RunError: the run directory is taken or damaged, the disk is full, or profiling failed.
        """
        started = time.perf_counter()
        try:
            with Journal(self.run_dir) as journal:
                self._open(journal)
                try:
                    self._search_phases()
                    status = "finished"
                except KeyboardInterrupt:
                    status = "stopped"
                    self._say("phase", "stopped; `autocomp resume` goes on from here")
                return self._finish(status, time.perf_counter() - started)
        finally:
            self.executor.close()

    def _open(self, journal: Journal) -> None:
        self.journal = journal
        resolved = self.job.resolved()
        for record in journal.of("job"):
            if _essence(record["job"]) != _essence(resolved):
                raise RunError(
                    f"run {self.run_dir.name!r} belongs to another job; choose a new run directory"
                )
        if not journal.of("job"):
            journal.append("job", job=resolved, time=time.time())
            (self.run_dir / "job.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
        self.history = History(Trial.from_json(r["trial"]) for r in journal.of("trial"))
        self._elapsed = max((r["elapsed"] for r in journal.of("trial")), default=0.0)
        self._measured_before = len(self.history.at(PROXY))
        self._clock = time.perf_counter()

    def _search_phases(self) -> None:
        self._say("phase", "loading the model on the workers")
        self.description = self._describe()
        self.plan: Plan = make_plan(self.description, self.objectives, self.constraints)
        for note in self.plan.notes:
            self._say("message", note)
        for name, reasons in self.description.export_limits.items():
            self._say("message", f"format {name} can't hold every candidate: {reasons[0]}")
        for tracker in self._trackers:
            tracker.start(self.job.resolved(), self.run_dir)
        for trial in self.history.trials:
            self._track(trial)
        self._say("phase", "measuring uniform baselines")
        self._measure(self.plan.baselines, PROXY, "baseline")
        problem = self._problem()
        searcher = self._searcher(problem)
        self._run_audit(problem)
        self._say("phase", f"searching {len(problem.space)} decisions")
        self._volume = RunningVolume.start(self.history.at(PROXY), self.objectives, self.constraints)
        self._search(searcher, problem)
        self._say("phase", "promoting the best to more data")
        self._promote()
        self._say("phase", "validating the front on the report split")
        self._validate()

    # -- phases ------------------------------------------------------------------------------------

    def _describe(self) -> Description:
        (data,) = self._call([WorkItem("describe", "describe")])
        description = Description.from_json(data)
        for record in self.journal.of("description"):
            known = Description.from_json(record["description"])
            if (known.site.fingerprint, known.space) != (description.site.fingerprint, description.space):
                raise RunError("the model or its search space has changed since this run began; search anew")
            if (known.device, known.versions) != (description.device, description.versions):
                raise RunError(
                    f"this run was measured on {known.device}, {dict(known.versions)}, and this is"
                    f" {description.device}, {dict(description.versions)}: their latencies can't share a"
                    " front. Resume on the same machine and software, or search in a new directory."
                )
        if not self.journal.of("description"):
            self.journal.append("description", description=data)
            (self.run_dir / "description.json").write_text(json.dumps(data))
        return description

    def _problem(self) -> Problem:
        profiles: dict[str, AdditiveTable] = {}
        method = self.job.sensitivity.method
        if method != "none" and self.plan.quality:
            kind = f"sensitivity:{method}"
            if kind not in self.description.profiles:
                known = [
                    p.partition(":")[2] for p in self.description.profiles if p.startswith("sensitivity:")
                ]
                raise JobError(
                    f"sensitivity.method = {method!r}: this workload offers {', '.join(known)}, none"
                )
            self._say("phase", f"profiling sensitivities ({method})")
            profiles["sensitivity"] = self._profile(kind).table("sensitivity")
        keys = operation_keys(self.description)
        latency = [m for m in self.plan.timing if m in self.description.rows and keys]
        if latency:
            self._say("phase", "timing the kernels of every option")
            rows = {m: self.description.rows[m][0] for m in latency}
            times = self._profile("operations", keys=keys, metrics=rows)
            profiles |= {m: self._latency(times, m) for m in latency}
        problem = make_problem(
            self.plan, self.description, self.objectives, self.constraints, profiles, self.job.searcher.seed
        )
        return replace(problem, local=self._local_models(problem), traits=self._traits())

    def _traits(self) -> Callable[[Candidate], Sequence[float]] | None:
        """What the spaces know of a candidate beyond its choices; ``None`` when that is nothing."""
        site = self.description.site
        spaces = [s for s in self.job.spaces() if type(s).traits is not Space.traits]
        for space in spaces:
            space.decisions(site)
        known: dict[str, list[float]] = {}

        def traits(candidate: Candidate) -> list[float]:
            if candidate.fingerprint not in known:
                values = candidate.values
                known[candidate.fingerprint] = [x for s in spaces for x in s.traits(site, values)]
            return known[candidate.fingerprint]

        return traits if spaces else None

    def _latency(self, times: ProfileResult, metric: str) -> AdditiveTable:
        table = latency_table(self.description, times, metric)
        first = self.history.find(self.description.baselines[0], PROXY)
        known = first is not None and first.value(metric) == first.value(metric)
        return rebase(table, self.description, first.value(metric)) if first is not None and known else table

    def _profile(self, kind: str, at: Candidate | None = None, **extra: Any) -> ProfileResult:
        """The merged result of a profile's shards, from the journal when it is there."""
        where = "" if at is None else at.fingerprint
        for record in self.journal.of("profile"):
            if (record["result"]["kind"], record["at"]) == (kind, where):
                return ProfileResult.from_json(record["result"])
        shards = 1 if kind == "operations" else self.executor.slots
        requests = [ProfileRequest(kind, i, shards, where) for i in range(shards)]
        if at is not None:
            extra["candidate"] = at.to_json()
        items = [WorkItem(r.id, "profile", {"request": {**asdict(r), **extra}}) for r in requests]
        result = ProfileResult.merge(ProfileResult.from_json(data) for data in self._call(items))
        self.journal.append("profile", result=result.to_json(), at=where, candidate=extra.get("candidate"))
        return result

    def _local_models(self, problem: Problem) -> tuple[LocalModel, ...]:
        """Neighbourhood profiles of earlier sessions, oldest first."""
        return tuple(
            _local_model(Candidate.of(r["candidate"]), ProfileResult.from_json(r["result"]), problem)
            for r in self.journal.of("profile")
            if r["at"]
        )

    def _profile_around(self, searcher: Searcher, problem: Problem) -> tuple[Searcher, Problem]:
        """Grant a searcher's wish for a local profile; it is then built anew with the result."""
        if not (problem.can_profile and isinstance(searcher, ProfilingSearcher)):
            return searcher, problem
        wish = searcher.wants_profile(self.history.at(PROXY))
        if wish is None:
            return searcher, problem
        self._say("message", f"profiling around candidate {wish.fingerprint}")
        local = _local_model(wish, self._profile("neighbourhood", wish), problem)
        problem = replace(problem, local=(*problem.local, local))
        return self._searcher(problem), problem

    def _searcher(self, problem: Problem) -> Searcher:
        searcher = self._make_searcher
        reasons = unsupported(searcher, problem)
        if reasons:
            raise JobError(f"searcher {self.job.searcher.name!r} can't take this job: " + "; ".join(reasons))
        return searcher(problem) if callable(searcher) else searcher

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
        trials = self._measure(picked, PROXY, "audit")
        for table in tables:
            report = audit(table, trials)
            self._audit[table.metric] = {
                **asdict(report),
                "predicted": [table.total(t.candidate) for t in trials if t.ok],
                "measured": [t.value(table.metric) for t in trials if t.ok],
            }
            self._say("message", f"audit of {table.metric}: {report}")

    def _search(self, searcher: Searcher, problem: Problem) -> None:
        budget = self.job.budget
        exhausted = False
        while True:
            spent = self._budget_spent()
            busy = self.executor.busy()
            if (spent or exhausted) and not busy:
                return
            if not spent and not exhausted and not busy:
                searcher, problem = self._profile_around(searcher, problem)
            if not spent and not exhausted and busy < self.executor.slots:
                room = budget.trials - len(self.history.at(PROXY)) - busy
                wanted = min(room, 2 * self.executor.slots - busy)
                pending = self._pending()
                asked = searcher.ask(wanted, self.history.at(PROXY), pending) if wanted > 0 else []
                fresh = self._fresh(asked, PROXY, problem)
                exhausted = wanted > 0 and not fresh
                if exhausted and not busy:
                    self._say("message", "the searcher has nothing more to propose")
                for candidate in fresh:
                    self._submit(candidate, PROXY, self.job.searcher.name)
            for trial in self._drain():
                exhausted = False
                self._report(trial)

    def _budget_spent(self) -> bool:
        budget, trials = self.job.budget, self.history.at(PROXY)
        minutes = (self._elapsed + time.perf_counter() - self._clock) / 60
        tokens = sum(t.measurement.tokens for t in trials if t.measurement) if budget.tokens else 0
        return (
            len(trials) + self.executor.busy() >= budget.trials
            or (budget.minutes > 0 and minutes >= budget.minutes)
            or (budget.tokens > 0 and tokens >= budget.tokens)
        )

    def _fresh(self, asked: Iterable[Candidate], level: Fidelity, problem: Problem) -> list[Candidate]:
        """Candidates that are in the space and not yet measured or under way."""
        waiting = set(self._pending())
        fresh = []
        for candidate in dict.fromkeys(asked):
            reasons = problem.space.violations(candidate)
            if reasons:
                logger.warning("the searcher proposed an invalid candidate: %s", "; ".join(reasons))
            elif candidate not in waiting and self.history.find(candidate, level) is None:
                fresh.append(candidate)
        return fresh

    def _promote(self) -> None:
        front = ParetoFront.of(self.history.at(PROXY), self.objectives, self.constraints)
        chosen = spread([p.trial for p in front.front], self.objectives, self.job.validation.promote)
        self._measure([t.candidate for t in chosen], SELECTION, "promote")

    def _validate(self) -> None:
        front = ParetoFront.of(self.history.at(SELECTION), self.objectives, self.constraints)
        chosen = spread([p.trial for p in front.front], self.objectives, self.job.validation.report)
        self._measure([t.candidate for t in chosen], REPORT, "validate", self.plan.baselines)

    # -- measuring ---------------------------------------------------------------------------------

    def _measure(
        self,
        candidates: Sequence[Candidate],
        level: Fidelity,
        origin: str,
        baselines: Sequence[Candidate] = (),
    ) -> list[Trial]:
        """Measure what is not in the history yet; all of the candidates' trials, in order.

        ``baselines`` are measured in the same go and keep that name as their origin.
        """
        wanted = dict.fromkeys(baselines, "baseline") | {c: origin for c in candidates if c not in baselines}
        for candidate, asked_by in wanted.items():
            if self.history.find(candidate, level) is None:
                self._submit(candidate, level, asked_by)
        while self.executor.busy():
            for trial in self._drain():
                self._report(trial)
        found = [self.history.find(c, level) for c in wanted]
        return [t for t in found if t is not None]

    def _submit(self, candidate: Candidate, level: Fidelity, origin: str) -> None:
        item = WorkItem(
            id=f"{level.name}/{candidate.fingerprint}",
            method="measure",
            kwargs={"candidate": candidate.to_json(), "fidelity": asdict(self._timed(level))},
            timeout_s=self.job.executor.timeout_s,
        )
        self._under_way[item.id] = (candidate, level, origin)
        self.executor.submit(item)

    def _timed(self, level: Fidelity) -> Fidelity:
        """Latency is measured only where an objective or a constraint asks for it."""
        return replace(level, timing=bool(self.plan.timing))

    def _pending(self) -> list[Candidate]:
        return [candidate for candidate, _, _ in self._under_way.values()]

    def _drain(self) -> Iterator[Trial]:
        for outcome in self.executor.completed(timeout=1.0):
            candidate, level, origin = self._under_way.pop(outcome.item.id)
            trial = _trial(len(self.history), candidate, level, origin, outcome)
            elapsed = self._elapsed + time.perf_counter() - self._clock
            self.journal.append("trial", trial=trial.to_json(), elapsed=elapsed)
            self.history.add(trial)
            yield trial

    def _call(self, items: Sequence[WorkItem]) -> list[Any]:
        """Run items that must succeed; their values in order."""
        for item in items:
            self.executor.submit(item)
        values: dict[str, Any] = {}
        while len(values) < len(items):
            for outcome in self.executor.completed(timeout=1.0):
                if outcome.failure is not None:
                    raise RunError(f"{outcome.item.id} failed: {outcome.failure.reason}")
                values[outcome.item.id] = outcome.value
        return [values[item.id] for item in items]

    # -- telling -----------------------------------------------------------------------------------

    def _report(self, trial: Trial) -> None:
        self._track(trial)
        text = f"trial {trial.number} ({trial.origin}, {trial.fidelity.name}): "
        if trial.failure is not None:
            text += f"{trial.failure.kind}: {trial.failure.reason}"
        else:
            text += ", ".join(f"{o.metric} {trial.value(o.metric):.4g}" for o in self.objectives)
        self._say("trial", text, trial)

    def _track(self, trial: Trial) -> None:
        for tracker in self._trackers:
            tracker.trial(trial)
        if trial.fidelity.name == PROXY.name and self._volume is not None:
            volume = self._volume.add(trial)
            for tracker in self._trackers:
                tracker.progress(trial.number, {"hypervolume": volume})

    def _say(self, kind: str, text: str, trial: Trial | None = None) -> None:
        done, total = len(self.history.at(PROXY)), self.job.budget.trials
        elapsed, here = time.perf_counter() - self._clock, done - self._measured_before
        eta = elapsed / here * (total - done) if here > 0 and total > done else None
        best = {o.metric: value for o in self.objectives if (value := self.history.best(o)) is not None}
        self._on_event(Event(kind, text, trial, done, total, self.executor.busy(), best, eta))

    # -- the end -----------------------------------------------------------------------------------

    def _finish(self, status: str, seconds: float) -> StudyResult:
        level = REPORT if status == "finished" else self.history.deepest()
        front = ParetoFront.of(self.history.at(level), self.objectives, self.constraints)
        curve = hypervolume_curve(self.history.at(PROXY), self.objectives, self.constraints)
        result = StudyResult(self.run_dir, front, status, self._audit, curve, seconds)
        summary = {
            "status": status,
            "fidelity": level.name,
            "front": front.to_json(),
            "audit": self._audit,
            "hypervolume": curve,
            "seconds": seconds,
        }
        (self.run_dir / "front.json").write_text(json.dumps(summary))
        artifacts = _artifacts(result)
        for tracker in self._trackers:
            tracker.finish(summary, artifacts, status)
        if status == "finished" and not self.journal.of("finished"):
            self.journal.append("finished", time=time.time())
        return result


def _local_model(candidate: Candidate, result: ProfileResult, problem: Problem) -> LocalModel:
    table = result.table("kl")
    names = {d.name for d in problem.space}
    costs = {n: row for n, row in table.costs.items() if n in names}
    errors = {n: row for n, row in table.stderr.items() if n in names}
    base = table.costs.get("base", {}).get("kl", 0.0)
    return LocalModel(candidate, AdditiveTable("kl", base, costs, errors))


class _Guarded:
    """A tracker whose errors are logged once and never stop a study."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._warned = tracker, False

    def __getattr__(self, name: str) -> Callable[..., None]:
        method = getattr(self._tracker, name)

        def call(*args: Any) -> None:
            try:
                method(*args)
            except Exception as error:  # a tracker's server, disk or schema must not cost a measurement
                if not self._warned:
                    logger.warning("%s failed, going on without it: %s", type(self._tracker).__name__, error)
                self._warned = True

        return call


def _trial(number: int, candidate: Candidate, level: Fidelity, origin: str, outcome: Outcome) -> Trial:
    measurement, failure = None, outcome.failure
    if failure is None:
        try:
            made = Trial.from_json(
                {
                    "number": number, "candidate": candidate.to_json(), "fidelity": asdict(level),
                    "origin": origin, "measurement": outcome.value,
                }
            )  # fmt: skip
            measurement = made.measurement
        except (TypeError, KeyError, ValueError) as error:
            failure = Failure("invalid", f"the worker returned no measurement: {error!r}")
    return Trial(number, candidate, level, origin, measurement, failure, outcome.worker, outcome.attempts)


def _essence(job: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a job that must not change between a run and its resume."""
    free = ("executor", "tracking", "output", "budget")
    return {k: v for k, v in job.items() if k not in free}


def _artifacts(result: StudyResult) -> list[Path]:
    """Figures and tables of the run; a drawing that fails is logged and left out."""
    from autocomp.report import write_artifacts

    try:
        return write_artifacts(result)
    except Exception as error:  # a picture must not cost a result
        logger.warning("could not draw the figures: %s", error)
        return [result.run_dir / "front.json"]
