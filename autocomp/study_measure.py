"""Measuring for a study: what goes to the executor, what comes back, and the reference in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from autocomp.errors import RunError
from autocomp.executors.base import Executor, Outcome, WorkItem
from autocomp.history import PROXY, History, timing_only
from autocomp.job import Job
from autocomp.journal import Journal
from autocomp.plan import Plan
from autocomp.readings import REFERENCE, Readings
from autocomp.space import Candidate
from autocomp.trial import Failure, Fidelity, Trial

#: Timings of the reference may take this share of the time that all other trials took.
REFERENCE_SHARE = 0.05

Wanted = tuple[Candidate, Fidelity, str]  # the last one is the origin


class Measurer:
    """Measures candidates and remembers them. Each trial is in the journal before anyone hears of it.

    Args:
        executor: runs the workers.
        job: for time-outs and how often the reference is timed.
        clock: seconds since any fixed moment.
        told: called with every new trial of the search and after.
    """

    def __init__(
        self,
        executor: Executor,
        job: Job,
        clock: Callable[[], float],
        told: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        self.executor, self.job = executor, job
        self.history, self.readings = History(), Readings()
        self._told, self._now = told, clock
        self._began = clock()
        self._before = 0.0  # seconds of search in earlier sessions of this run
        self._under_way: dict[str, Wanted] = {}
        self._timing = False
        self._since_reference = 0
        self._resumed = False
        self._last_reference: Trial | None = None
        self._spent = {True: 0.0, False: 0.0}  # seconds of workers on the reference, and on all the rest

    # -- the beginning -----------------------------------------------------------------------------

    def open(self, journal: Journal) -> None:
        """Take in what earlier sessions measured."""
        self._journal = journal
        records = journal.of("trial")
        self.history = History(Trial.from_json(r["trial"]) for r in records)
        self._before = max((r["elapsed"] for r in records), default=0.0)
        self._began = self._now()
        self._read(Readings())

    def plan(self, plan: Plan) -> None:
        """From now on time what a plan wants timed, and read trials accordingly."""
        self._timing, self._resumed = bool(plan.timing), bool(self.history.trials)
        self._read(Readings.of(plan, shared=self.job.executor.gpus == 0))

    def _read(self, readings: Readings) -> None:
        self.readings, self._spent, self._last_reference = readings, {True: 0.0, False: 0.0}, None
        for trial, record in zip(self.history.trials, self._journal.of("trial"), strict=True):
            self._take_in(trial, record["elapsed"])

    def _take_in(self, trial: Trial, elapsed: float) -> None:
        self.readings.add(trial, elapsed)
        found = trial.measurement or trial.failure
        self._spent[trial.origin == REFERENCE] += 0.0 if found is None else found.seconds
        self._last_reference = trial if trial.origin == REFERENCE else self._last_reference

    @property
    def elapsed(self) -> float:
        """Seconds of search in all sessions of this run."""
        return self._before + self.here

    @property
    def here(self) -> float:
        """Seconds of search in this session."""
        return self._now() - self._began

    # -- measuring ---------------------------------------------------------------------------------

    def submit(self, candidate: Candidate, level: Fidelity, origin: str) -> None:
        """Queue one measurement; before it one of the reference, when that is due."""
        reference = self.readings.reference
        if reference is not None and candidate != reference and self._reference_due():
            self._resumed = False
            self.submit(reference, self._next_timing(reference), REFERENCE)
        item = WorkItem(
            id=f"{level.name}/{candidate.fingerprint}",
            method="measure",
            kwargs={
                "candidate": candidate.to_json(),
                "fidelity": asdict(replace(level, timing=self._timing)),
            },
            timeout_s=self.job.executor.timeout_s,
        )
        self._since_reference = 0 if candidate == self.readings.reference else self._since_reference + 1
        self._under_way[item.id] = (candidate, level, origin)
        self.executor.submit(item)

    def run(self, wanted: Iterable[Wanted]) -> None:
        """Measure all of it; returns when it is done. Few items are queued at a time, in their order."""
        for candidate, level, origin in wanted:
            while self.executor.busy() >= 2 * self.executor.slots:
                self.collect()
            self.submit(candidate, level, origin)
        while self.executor.busy():
            self.collect()

    def again(self, candidates: Iterable[Candidate], origin: str) -> None:
        """Time candidates once more, one after the other; no quality is scored."""
        self.run((c, self._next_timing(c), origin) for c in candidates)

    def measure(
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
        self.run((c, level, o) for c, o in wanted.items() if self.history.find(c, level) is None)
        found = [self.history.find(c, level) for c in wanted]
        return [t for t in found if t is not None]

    def collect(self) -> list[Trial]:
        """Wait for trials and pass them on; none when none came for a while."""
        found = []
        for trial in self._drain():
            self._told(trial)
            found.append(trial)
        return found

    def pending(self, levels: Sequence[Fidelity] = (PROXY,)) -> list[Candidate]:
        """Candidates under way at some fidelities."""
        names = {level.name for level in levels}
        return [candidate for candidate, own, _ in self._under_way.values() if own.name in names]

    def call(self, items: Sequence[WorkItem]) -> list[Any]:
        """Run items that must succeed; their values in order.

        Raises:
            RunError: one of them failed.
        """
        for item in items:
            self.executor.submit(item)
        values: dict[str, Any] = {}
        while len(values) < len(items):
            for outcome in self.executor.completed(timeout=1.0):
                if outcome.failure is not None:
                    raise RunError(f"{outcome.item.id} failed: {outcome.failure.reason}")
                values[outcome.item.id] = outcome.value
        return [values[item.id] for item in items]

    def _drain(self) -> Iterator[Trial]:
        for outcome in self.executor.completed(timeout=1.0):
            candidate, level, origin = self._under_way.pop(outcome.item.id)
            trial = _trial(len(self.history), candidate, level, origin, outcome)
            elapsed = self.elapsed
            self._journal.append("trial", trial=trial.to_json(), elapsed=elapsed)
            self.history.add(trial)
            self._take_in(trial, elapsed)
            yield trial

    # -- the reference -----------------------------------------------------------------------------

    def _next_timing(self, candidate: Candidate) -> Fidelity:
        """A fidelity that this candidate was not measured at yet."""
        waiting = sum(c == candidate and not own.split for c, own, _ in self._under_way.values())
        return timing_only(self.readings.timings(candidate) + waiting)

    def _reference_due(self) -> bool:
        """Whether to time the reference now: at the start of a later session, then at intervals.

        Never two at once, never after one failed, and only while all of them take little of the time.
        """
        every = self.job.validation.reference_every
        if not every or any(origin == REFERENCE for _, _, origin in self._under_way.values()):
            return False
        last = self._last_reference
        if last is not None and last.measurement is None:
            return False
        if self._resumed:
            return True
        next_one = 0.0 if last is None or last.measurement is None else last.measurement.seconds
        cheap = self._spent[True] + next_one <= REFERENCE_SHARE * self._spent[False]
        return cheap and self._since_reference >= every


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
