"""From a described worker to the searcher's problem: profiles, latency tables, traits, local models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from autocomp.description import Description
from autocomp.errors import JobError, RunError
from autocomp.executors.base import WorkItem
from autocomp.history import PROXY
from autocomp.job import Job
from autocomp.journal import Journal
from autocomp.objective import Constraint, Objective
from autocomp.plan import Plan, make_problem
from autocomp.predictors.latency import latency_table, operation_keys, rebase
from autocomp.profile import ProfileRequest, ProfileResult
from autocomp.search_spaces.base import Space
from autocomp.searchers.base import LocalModel, Problem, ProfilingSearcher, Searcher, unsupported
from autocomp.space import AdditiveTable, Candidate
from autocomp.study_measure import Measurer
from autocomp.trial import Trial

MakeSearcher = Searcher | Callable[[Problem], Searcher]


def describe(journal: Journal, measurer: Measurer, run_dir: Path) -> Description:
    """What a worker says of itself, checked against what earlier sessions of the run were told.

    Raises:
        RunError: model, space, device or software are not those that the run began with.
    """
    (data,) = measurer.call([WorkItem("describe", "describe")])
    description = Description.from_json(data)
    for record in journal.of("description"):
        known = Description.from_json(record["description"])
        if (known.site.fingerprint, known.space) != (description.site.fingerprint, description.space):
            raise RunError("the model or its search space has changed since this run began; search anew")
        if (known.device, known.versions) != (description.device, description.versions):
            raise RunError(
                f"this run was measured on {known.device}, {dict(known.versions)}, and this is"
                f" {description.device}, {dict(description.versions)}: their latencies can't share a"
                " front. Resume on the same machine and software, or search in a new directory."
            )
    if not journal.of("description"):
        journal.append("description", description=data)
        (run_dir / "description.json").write_text(json.dumps(data))
    return description


class ProblemMaker:
    """Makes the problem and the searcher, with profiles from the journal where they are there.

    Args:
        job: the checked job.
        journal: gets every new profile.
        measurer: runs profiles.
        description, plan: what is searched.
        objectives, constraints: of the search.
        say: told what takes a while.
    """

    def __init__(
        self,
        job: Job,
        journal: Journal,
        measurer: Measurer,
        description: Description,
        plan: Plan,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint],
        say: Callable[[str, str], None],
    ) -> None:
        self.job, self.journal, self.measurer = job, journal, measurer
        self.description, self.plan = description, plan
        self.objectives, self.constraints = objectives, constraints
        self._say = say

    def problem(self) -> Problem:
        """Everything that is known before the first proposal.

        Raises:
            JobError: the workload does not offer the job's sensitivity.
        """
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

    def searcher(self, make: MakeSearcher, problem: Problem) -> Searcher:
        """The searcher for a problem. Raises ``JobError`` when it can't take it, with every reason."""
        reasons = unsupported(make, problem)
        if reasons:
            raise JobError(f"searcher {self.job.searcher.name!r} can't take this job: " + "; ".join(reasons))
        return make(problem) if callable(make) else make

    def around(
        self, make: MakeSearcher, searcher: Searcher, problem: Problem, history: Sequence[Trial]
    ) -> tuple[Searcher, Problem]:
        """Grant a searcher's wish for a local profile; it is then built anew with the result."""
        if not (problem.can_profile and isinstance(searcher, ProfilingSearcher)):
            return searcher, problem
        wish = searcher.wants_profile(history)
        if wish is None:
            return searcher, problem
        self._say("message", f"profiling around candidate {wish.fingerprint}")
        local = _local_model(wish, self._profile("neighbourhood", wish), problem)
        problem = replace(problem, local=(*problem.local, local))
        return self.searcher(make, problem), problem

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
        first = self.measurer.history.find(self.description.baselines[0], PROXY)
        known = first is not None and first.value(metric) == first.value(metric)
        return rebase(table, self.description, first.value(metric)) if first is not None and known else table

    def _profile(self, kind: str, at: Candidate | None = None, **extra: Any) -> ProfileResult:
        """The merged result of a profile's shards, from the journal when it is there."""
        where = "" if at is None else at.fingerprint
        for record in self.journal.of("profile"):
            if (record["result"]["kind"], record["at"]) == (kind, where):
                return ProfileResult.from_json(record["result"])
        shards = 1 if kind == "operations" else self.measurer.executor.slots
        requests = [ProfileRequest(kind, i, shards, where) for i in range(shards)]
        if at is not None:
            extra["candidate"] = at.to_json()
        items = [WorkItem(r.id, "profile", {"request": {**asdict(r), **extra}}) for r in requests]
        result = ProfileResult.merge(ProfileResult.from_json(data) for data in self.measurer.call(items))
        self.journal.append("profile", result=result.to_json(), at=where, candidate=extra.get("candidate"))
        return result

    def _local_models(self, problem: Problem) -> tuple[LocalModel, ...]:
        """Neighbourhood profiles of earlier sessions, oldest first."""
        return tuple(
            _local_model(Candidate.of(r["candidate"]), ProfileResult.from_json(r["result"]), problem)
            for r in self.journal.of("profile")
            if r["at"]
        )


def _local_model(candidate: Candidate, result: ProfileResult, problem: Problem) -> LocalModel:
    table = result.table("kl")
    names = {d.name for d in problem.space}
    costs = {n: row for n, row in table.costs.items() if n in names}
    errors = {n: row for n, row in table.stderr.items() if n in names}
    base = table.costs.get("base", {}).get("kl", 0.0)
    return LocalModel(candidate, AdditiveTable("kl", base, costs, errors))
