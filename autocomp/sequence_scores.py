"""What candidates make of every sequence of the proxy split: which ones are scored, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.description import Description
from autocomp.errors import RunError
from autocomp.executors.base import Executor, Outcome, WorkItem
from autocomp.job import Job
from autocomp.journal import Journal
from autocomp.objective import Objective
from autocomp.plan import make_plan, make_problem
from autocomp.profile import ProfileRequest, ProfileResult
from autocomp.searchers.base import Problem
from autocomp.searchers.ilp import IlpSearcher
from autocomp.space import AdditiveTable, Candidate, SearchSpace

if TYPE_CHECKING:
    from autocomp.predictors.proxy_scores import Score

Say = Callable[[str], None]

SHARE_ALLOCATED = 0.4
"""Of the candidates, those on the front that the sensitivities predict: what a search has to tell apart."""

SMALLEST = 1e-6
"""A KL below so much of the largest is rounding: the candidate is the uncompressed model by another name."""


@dataclass(frozen=True)
class SequenceScores:
    """What candidates made of every sequence.

    Attributes:
        candidates: those that could be scored, in an order that does not depend on which was done first.
        origins: of each: ``uniform``, ``allocated`` (by sensitivities), ``mixed`` (two others at random).
        values: metric -> float64 ``[candidates, sequences]``; ``ppl`` is its logarithm.
        data: what identifies the sequences.
    """

    candidates: tuple[Candidate, ...]
    origins: tuple[str, ...]
    values: Mapping[str, np.ndarray]
    data: Mapping[str, int | str]

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> SequenceScores:
        """From records of kind ``sequences``; see ``Scoring``."""
        rows = {Candidate.of(r["candidate"]): r for r in records if r["kind"] == "sequences"}
        if not rows:
            raise RunError("no candidate could be scored; the messages say why")
        candidates = sorted(rows, key=lambda c: c.fingerprint)
        found = [rows[c] for c in candidates]
        return cls(
            tuple(candidates),
            tuple(r["origin"] for r in found),
            {m: np.array([r["values"][m] for r in found]) for m in found[0]["values"]},
            found[0]["data"],
        )

    def score(self, metric: str) -> Score:
        """The values of a metric as what a subset is searched for.

        Raises:
            SpaceError: a value is not finite.
        """
        from autocomp.predictors.proxy_scores import LogMeanScore, MeanScore

        matrix = self.values[metric]
        if metric != "kl":
            return MeanScore(matrix)
        means = matrix.mean(axis=1)
        return LogMeanScore(np.maximum(matrix[means > SMALLEST * means.max()], 0.0))


class Scoring:
    """Scores candidates on every sequence; what the journal has is not done again.

    Args:
        job: without a subset.
        metric: whose sensitivities say which candidates are worth telling apart.
    """

    def __init__(self, job: Job, journal: Journal, executor: Executor, metric: str, say: Say) -> None:
        self.job, self.journal, self.executor, self.metric, self.say = job, journal, executor, metric, say

    def run(self, count: int) -> SequenceScores:
        """Draw and score ``count`` candidates.

        Raises:
            JobError, ObjectiveError, InfeasibleError: the job can't work on this model and machine.
            RunError: a worker failed before any candidate was scored, or the journal is of something else.
        """
        self._open(count)
        self.say("loading the model on the workers")
        wanted = draw_candidates(self._problem(), count)
        known = {Candidate.of(r["candidate"]) for r in self.journal.of("sequences")}
        todo = {f"sequences/{c.fingerprint}": c for c in wanted if c not in known}
        self.say(f"scoring {len(todo)} candidates on every sequence")
        for name, candidate in todo.items():
            request = asdict(ProfileRequest("sequences", at=candidate.fingerprint))
            request["candidate"] = candidate.to_json()
            self.executor.submit(WorkItem(name, "profile", {"request": request}, self.job.executor.timeout_s))
        for outcome in self._outcomes(len(todo)):
            candidate = todo[outcome.item.id]
            self._keep(candidate, wanted[candidate], outcome)
        return SequenceScores.of(self.journal.records)

    def _open(self, count: int) -> None:
        # What decides on workers and trackers may differ between calls, and budgets play no part here.
        free = ("executor", "tracking", "output", "budget", "validation", "searcher")
        job = {k: v for k, v in self.job.resolved().items() if k not in free}
        asked = {"job": job, "metric": self.metric, "candidates": count}
        first = next(iter(self.journal.records), {"asked": asked})
        if first.get("asked") != asked:
            raise RunError(
                f"{self.journal.path.parent.name!r} holds a search, or the choice of a subset for another "
                "job, metric or number of candidates; choose a new directory"
            )
        if not self.journal.records:
            self.journal.append("proxy", asked=asked)

    def _keep(self, candidate: Candidate, origin: str, outcome: Outcome) -> None:
        if outcome.failure is not None:
            self.say(f"{origin} {candidate.fingerprint} is left out: {outcome.failure.reason}")
            return
        found = ProfileResult.from_json(outcome.value)
        values = {m: [row[i][1] for i in range(len(row))] for m, row in found.rows.items()}
        data = (found.details or {})["data"]
        self.journal.append(
            "sequences", candidate=candidate.to_json(), origin=origin, values=values, data=data
        )
        mean = float(np.mean(values[self.metric]))
        self.say(
            f"{len(self.journal.of('sequences'))}. {origin}: {self.metric} {mean:.4g}, {found.seconds:.0f} s"
        )

    def _outcomes(self, count: int) -> Iterator[Outcome]:
        while count:
            for outcome in self.executor.completed(timeout=1.0):
                count -= 1
                yield outcome

    def _call(self, items: Sequence[WorkItem]) -> list[Any]:
        """Run items that must succeed; their values in order."""
        for item in items:
            self.executor.submit(item)
        values: dict[str, Any] = {}
        for outcome in self._outcomes(len(items)):
            if outcome.failure is not None:
                raise RunError(f"{outcome.item.id} failed: {outcome.failure.reason}")
            values[outcome.item.id] = outcome.value
        return [values[item.id] for item in items]

    def _problem(self) -> Problem:
        """The search with the metric and what is exact as its objectives: that needs no timing."""
        (data,) = self._call([WorkItem("describe", "describe")])
        description = Description.from_json(data)
        objectives, constraints = self.job.parsed_objectives(), self.job.parsed_constraints()
        own = Objective(self.metric, description.metrics[self.metric])
        plan = make_plan(description, [own, *objectives], constraints)
        exact = [o for o in objectives if o.metric in description.exact]
        bounds = [c for c in constraints if c.metric in description.exact]
        profiles = self._sensitivity(description)
        return make_problem(plan, description, [own, *exact], bounds, profiles, self.job.seed)

    def _sensitivity(self, description: Description) -> dict[str, AdditiveTable]:
        kind = f"sensitivity:{self.job.sensitivity.method}"
        if kind not in description.profiles:
            return {}
        for record in self.journal.of("profile"):
            return {"sensitivity": ProfileResult.from_json(record["result"]).table("sensitivity")}
        self.say(f"profiling sensitivities ({self.job.sensitivity.method})")
        shards = [ProfileRequest(kind, i, self.executor.slots) for i in range(self.executor.slots)]
        items = [WorkItem(r.id, "profile", {"request": asdict(r)}) for r in shards]
        result = ProfileResult.merge(ProfileResult.from_json(d) for d in self._call(items))
        self.journal.append("profile", result=result.to_json())
        return {"sensitivity": result.table("sensitivity")}


# --- candidates ---------------------------------------------------------------------------------------------


def draw_candidates(problem: Problem, count: int) -> dict[Candidate, str]:
    """At most ``count`` candidates of the kinds that a search meets, and how each came about.

    ``uniform`` baselines but for the first (the uncompressed model, which ranks itself), then for
    ``SHARE_ALLOCATED`` of the number ``allocated`` ones, which the problem's tables put on the front. The
    rest are ``mixed``: every decision from either of two of those by the toss of a coin with a random bias,
    or, one in ten, at random. So they spread over the range between the anchors, as candidates drawn
    decision by decision do not.
    """
    found = dict.fromkeys(problem.baselines[1 : 1 + count // 3], "uniform")
    allocated = round(SHARE_ALLOCATED * count)
    if not IlpSearcher.unsupported(problem):
        found |= dict.fromkeys(IlpSearcher(problem).ask(allocated, [], problem.baselines), "allocated")
    anchors, rng = [*found, *problem.baselines[:1]], problem.rng(0)
    for _ in range(20 * count):
        if len(found) >= count:
            break
        made = _mixed(problem.space, anchors, rng)
        if not problem.space.violations(made):
            found.setdefault(made, "mixed")
    # Shuffled: a call that is stopped half-way leaves some of every kind.
    pairs = list(found.items())
    return dict(pairs[i] for i in rng.permutation(len(pairs)))


def _mixed(space: SearchSpace, anchors: Sequence[Candidate], rng: np.random.Generator) -> Candidate:
    if len(anchors) < 2:
        return space.sample(rng)
    first, second = (anchors[i] for i in rng.choice(len(anchors), 2, replace=False))
    bias, other = rng.random(), space.sample(rng)
    values = {
        d.name: other[d.name] if rng.random() < 0.1 else (first if rng.random() < bias else second)[d.name]
        for d in space
    }
    return space.repair(values, rng)
