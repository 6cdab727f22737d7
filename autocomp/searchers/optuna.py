"""Any Optuna sampler, used through ask and tell on a study that is rebuilt from the history.

The study lives in memory; the history is the only state. A sampler is built anew for each ask with a seed
that depends on the problem's seed and on how far the search is, so that an ask can be repeated.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna

from autocomp.errors import InfeasibleError, JobError
from autocomp.pareto import loss_row
from autocomp.repair import moving_groups
from autocomp.searchers.base import Problem
from autocomp.searchers.common import admissible, seen_fingerprints
from autocomp.searchers.random import RandomSearcher
from autocomp.space import Candidate, Choice, Value
from autocomp.trial import Trial

_STATEFUL = ("BruteForceSampler", "GridSampler", "QMCSampler", "CmaEsSampler", "PartialFixedSampler")
"""Samplers whose proposals depend on more than finished trials, so that a resume would repeat itself."""


class OptunaSearcher:
    """Proposals of an Optuna sampler, repaired to the space's constraints.

    Tied decisions are one parameter; an ordinal choice is an integer, so that neighbours are alike. With
    hundreds of decisions use ``NSGAIISampler``: TPE takes seconds a proposal there.

    Args:
        sampler: name of a class in ``optuna.samplers``.
        sampler_options: its keyword options; ``seed`` is set here.
        patience: asks for each wanted candidate before giving up.

    Raises:
        JobError: no such sampler, options it does not take, or a sampler with hidden state.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        sampler: str = "TPESampler",
        sampler_options: Mapping[str, Any] | None = None,
        patience: int = 10,
    ) -> None:
        self.problem, self.sampler, self.patience = problem, sampler, patience
        self.options = dict(sampler_options or {})
        self.codec = _Codec(problem)
        self._sampler(0)  # a wrong name or option shows before anything runs
        self._study: optuna.Study | None = None
        self._told: list[tuple[str, int]] = []
        self._completed = 0

    @staticmethod
    def unsupported(problem: Problem) -> list[str]:
        return RandomSearcher.unsupported(problem)

    def ask(self, n: int, history: Sequence[Trial], pending: Sequence[Candidate]) -> list[Candidate]:
        """See ``Searcher.ask``.

        Raises:
            InfeasibleError: no feasible candidate is found at the start.
        """
        step = len(history) + len(pending)
        rng = self.problem.rng(step)
        with _quiet():
            study = self._synchronised(history)
            study.sampler = self._sampler(int(rng.integers(2**31)))
            self._settle_parents(study)
            asked = [self._mirror(study, c) for c in pending if self.codec.knows(c)]
            try:
                found = self._propose(study, n, seen_fingerprints(history, pending), rng, asked)
            finally:
                for trial in asked:  # never left running: the next ask starts from the history alone
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
        if not found and not step and n > 0:
            raise InfeasibleError("no proposal meets the constraints; loosen a bound")
        return found

    def _propose(
        self, study: optuna.Study, n: int, seen: set[str], rng: np.random.Generator, asked: list[optuna.Trial]
    ) -> list[Candidate]:
        found: list[Candidate] = []
        for _ in range(self.patience * max(n, 1)):
            if len(found) >= n:
                break
            trial = study.ask()
            asked.append(trial)
            candidate = self.problem.space.repair(self.codec.suggest(trial), rng)
            if candidate.fingerprint in seen or not admissible(self.problem, candidate):
                continue
            seen.add(candidate.fingerprint)
            found.append(candidate)
        return found

    def _mirror(self, study: optuna.Study, candidate: Candidate) -> optuna.Trial:
        """A running trial for a candidate that is being measured (TPE keeps away from it)."""
        study.enqueue_trial(self.codec.params(candidate))
        trial = study.ask()
        self.codec.suggest(trial)
        return trial

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        kind = getattr(optuna.samplers, self.sampler, None)
        if self.sampler in _STATEFUL:
            raise JobError(f"sampler {self.sampler} keeps state that a resumed study lacks; use TPESampler")
        if not isinstance(kind, type) or not issubclass(kind, optuna.samplers.BaseSampler):
            known = sorted(n for n in optuna.samplers.__all__ if n.endswith("Sampler") and n not in _STATEFUL)
            raise JobError(f"optuna has no sampler {self.sampler!r}; known: {', '.join(known)}")
        try:
            with _quiet():
                sampler: optuna.samplers.BaseSampler = kind(seed=seed, **self.options)
                return sampler
        except TypeError as error:
            raise JobError(f"sampler_options {self.options} do not fit {self.sampler}: {error}") from None

    def _synchronised(self, history: Sequence[Trial]) -> optuna.Study:
        """The study of ``history``: the kept one with the new trials added, or a new one."""
        keys = [(t.candidate.fingerprint, t.number) for t in history]
        if self._study is None or keys[: len(self._told)] != self._told:
            directions = ["minimize"] * len(self.problem.objectives)
            self._study = optuna.create_study(directions=directions, sampler=self._sampler(0))
            self._told, self._completed = [], 0
        for trial in history[len(self._told) :]:
            frozen = self._frozen(trial, self._completed)
            if frozen is not None:
                self._study.add_trial(frozen)
                self._completed += 1
        self._told = keys
        return self._study

    def _frozen(self, trial: Trial, completed: int) -> optuna.trial.FrozenTrial | None:
        losses = loss_row(trial, self.problem.objectives)
        if not trial.ok or not all(map(math.isfinite, losses)) or not self.codec.knows(trial.candidate):
            return None
        bounds = {}
        for c in self.problem.constraints:
            amount = c.violation(trial.value(c.metric))
            bounds[str(c)] = amount if math.isfinite(amount) else 1e30
        return optuna.trial.create_trial(
            params=self.codec.params(trial.candidate),
            distributions=self.codec.distributions,
            values=list(losses),
            constraints=bounds or None,
            system_attrs=self._generation(completed),
        )

    def _settle_parents(self, study: optuna.Study) -> None:
        """Have a genetic sampler choose each generation's parents in order, before it is asked.

        It keeps them in the study and returns them in another order the first time; settled up front,
        a study that grew and one that was rebuilt breed alike.
        """
        sampler = study.sampler
        if isinstance(sampler, optuna.samplers.BaseGASampler):
            for generation in range(1, self._completed // (sampler.population_size or 1) + 1):
                sampler.get_parent_population(study, generation)

    def _generation(self, completed: int) -> dict[str, int]:
        """Genetic samplers breed from the trials of a generation, which they note on trials they asked
        for; a trial that is added needs the note too, and can't get it once it is finished."""
        sampler = self._sampler(0)
        if not isinstance(sampler, optuna.samplers.BaseGASampler):
            return {}
        return {f"{type(sampler).__name__}:generation": completed // (sampler.population_size or 1)}


class _Codec:
    """Between a space and Optuna's parameters: one parameter a group, two for a nullable interval."""

    def __init__(self, problem: Problem) -> None:
        self.space = problem.space
        self.groups = moving_groups(problem.space)
        self.distributions: dict[str, optuna.distributions.BaseDistribution] = {}
        for names in self.groups:
            domain = self.space.by_name[names[0]].domain
            if not isinstance(domain, Choice):
                self.distributions[names[0]] = optuna.distributions.FloatDistribution(domain.low, domain.high)
                if domain.nullable:
                    switch = optuna.distributions.CategoricalDistribution((False, True))
                    self.distributions[f"{names[0]}/used"] = switch
            elif domain.ordered:
                top = len(domain.options) - 1
                self.distributions[names[0]] = optuna.distributions.IntDistribution(0, top)
            else:
                every = tuple(range(len(domain.options)))
                self.distributions[names[0]] = optuna.distributions.CategoricalDistribution(every)

    def suggest(self, trial: optuna.Trial) -> dict[str, Value]:
        """Values of a trial, asking the sampler for each parameter."""
        found: dict[str, Any] = {}
        for name, kind in self.distributions.items():
            if isinstance(kind, optuna.distributions.FloatDistribution):
                found[name] = trial.suggest_float(name, kind.low, kind.high)
            elif isinstance(kind, optuna.distributions.IntDistribution):
                found[name] = trial.suggest_int(name, kind.low, kind.high)
            elif isinstance(kind, optuna.distributions.CategoricalDistribution):
                found[name] = trial.suggest_categorical(name, kind.choices)
        values: dict[str, Value] = {}
        for names in self.groups:
            domain = self.space.by_name[names[0]].domain
            raw = found[names[0]]
            if isinstance(domain, Choice):
                raw = domain.options[raw]
            elif not found.get(f"{names[0]}/used", True):
                raw = None
            values.update(dict.fromkeys(names, raw))
        return values

    def knows(self, candidate: Candidate) -> bool:
        """False for a candidate with values that the space lacks (a baseline measured for comparison)."""
        values = candidate.values
        return all(d.name in values and d.domain.contains(values[d.name]) for d in self.space.decisions)

    def params(self, candidate: Candidate) -> dict[str, Any]:
        """Optuna's parameters of a candidate. A group that is not tied in it counts by its first member."""
        found: dict[str, Any] = {}
        for names in self.groups:
            domain, value = self.space.by_name[names[0]].domain, candidate[names[0]]
            if isinstance(domain, Choice):
                found[names[0]] = domain.index(value)
                continue
            if domain.nullable:
                found[f"{names[0]}/used"] = value is not None
            found[names[0]] = 0.5 * (domain.low + domain.high) if value is None else float(value)
        return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna says a line for every trial and warns about experimental options; neither is news here."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
