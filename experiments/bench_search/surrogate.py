"""A recording that is not exhaustive as a problem: a regression of the measurements is the truth.

    surrogate_problem("smollm2/table.json.gz", name="smollm2", objectives=("min kl", "min memory_mb"))

As in NAS-Bench-301 (arXiv 2008.09777): searches are judged on a model of what was measured. It is a Gaussian
process on the logarithm of each metric, with a linear and a smooth part, and none of the predictors that the
searchers use; ``held_out`` tells how well it knows what it has not seen. A metric with an exact table
(``memory_mb``) needs none.

    python surrogate.py smollm2      # tau and error of left-out fifths: results/smollm2_surrogate.json
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from bench_problem import BenchProblem, Floats, noisy, stored_reference
from numpy.typing import NDArray
from recorded_table import loaded, logarithmic, problem_of, usable
from scipy.stats import kendalltau

from autocomp.history import PROXY
from autocomp.objective import Objective
from autocomp.searchers.base import Problem
from autocomp.space import AdditiveTable, Candidate, Choice, SearchSpace
from autocomp.trial import Estimate, Trial

HERE = Path(__file__).parent
Codes = NDArray[np.intp]
TUNED_ON = 500
"""Trials from which the scales are learned; all of them answer."""
FOLDS = 5
AT_ONCE = 4096
"""Candidates that are predicted together; the rest is memory."""


@dataclass(frozen=True)
class Surrogate:
    """One positive metric of the candidates of a space of categorical decisions.

    Attributes:
        space: whose decisions are coded.
        model: a fitted Gaussian process of scikit-learn, on the metric's natural logarithm.
        noise: standard deviation of what the process leaves unexplained, relative.
    """

    space: SearchSpace
    model: Any
    noise: float

    @classmethod
    def of(cls, space: SearchSpace, trials: Sequence[Trial], metric: str) -> Surrogate:
        """Learn ``metric`` of measured ``trials``. Raises ``ValueError`` for values that are not positive."""
        values = np.array([t.value(metric) for t in trials])
        if not np.all(values > 0):
            raise ValueError(f"{metric} has values that are not positive; a logarithm can't be learned")
        return cls.fitted(space, codes_of(space, [t.candidate for t in trials]), np.log(values))

    @classmethod
    def fitted(cls, space: SearchSpace, codes: Codes, target: Floats) -> Surrogate:
        """A process for ``target [n]`` at places of options ``[n, decisions]``; scales by likelihood."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

        smooth = ConstantKernel(1.0, (1e-3, 1e3)) * RBF(5.0, (2.0, 100.0))
        linear = ConstantKernel(0.1, (1e-4, 1e3)) * DotProduct(1.0, (1e-2, 1e2))
        kernel = linear + smooth + WhiteKernel(1e-3, (1e-7, 1.0))
        rows = coded(space, codes)
        some = np.linspace(0, len(rows) - 1, min(TUNED_ON, len(rows))).astype(int)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a metric without noise ends at a bound
            tuned = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
            tuned.fit(rows[some], target[some])
        model = GaussianProcessRegressor(tuned.kernel_, optimizer=None, normalize_y=True).fit(rows, target)
        white = float(tuned.kernel_.k2.noise_level)
        return cls(space, model, math.sqrt(white) * float(target.std()))

    def at(self, codes: Codes) -> Floats:
        """In the metric's unit, ``[n]``."""
        rows = coded(self.space, codes)
        parts = [self.model.predict(rows[i : i + AT_ONCE]) for i in range(0, len(rows), AT_ONCE)]
        return np.exp(np.concatenate([np.zeros(0), *parts]))


def choices(space: SearchSpace) -> list[Choice]:
    """The domains of a space of categorical decisions. Raises ``ValueError`` for any other one."""
    found = [d.domain for d in space.decisions if isinstance(d.domain, Choice)]
    if len(found) < len(space.decisions):
        raise ValueError("only categorical decisions can be modelled; the space has others")
    return found


def codes_of(space: SearchSpace, candidates: Sequence[Candidate]) -> Codes:
    """Places of the chosen options, ``[n, decisions]``."""
    names, domains = [d.name for d in space.decisions], choices(space)
    rows = [[d.index(c[n]) for n, d in zip(names, domains, strict=True)] for c in candidates]
    return np.array(rows, dtype=np.intp).reshape(len(rows), len(domains))


def coded(space: SearchSpace, codes: Codes) -> Floats:
    """A column for each option of each decision but the first of ordered ones, ``[n, columns]``: one where it
    is chosen, of ordered ones also where a later one is."""
    columns: list[Floats] = []
    for domain, at in zip(choices(space), codes.T[:, :, None], strict=True):
        every = np.arange(len(domain.options))[None]
        columns.append((at >= every[:, 1:] if domain.ordered else at == every).astype(np.float64))
    return np.hstack(columns)


@dataclass(frozen=True)
class Truth:
    """The metrics of all objectives, each by a process or an exact table."""

    space: SearchSpace
    objectives: tuple[Objective, ...]
    surrogates: Mapping[str, Surrogate]
    exact: Mapping[str, AdditiveTable]

    def losses(self, candidates: Sequence[Candidate]) -> Floats:
        """``[n, objectives]``, in the objectives' units."""
        return self.at(codes_of(self.space, candidates))

    def at(self, codes: Codes) -> Floats:
        """The same for places of options ``[n, decisions]``."""
        columns = [self._metric(o.metric, codes) * (1.0 if o.minimize else -1.0) for o in self.objectives]
        return np.column_stack(columns)

    def _metric(self, name: str, codes: Codes) -> Floats:
        if name in self.surrogates:
            return self.surrogates[name].at(codes)
        table, total = self.exact[name], np.full(len(codes), self.exact[name].base)
        for d, domain, at in zip(self.space.decisions, choices(self.space), codes.T, strict=True):
            if d.name in table.costs:
                total += np.array([table.costs[d.name][o] for o in domain.options])[at]
        return total


def surrogate_problem(
    path: str | Path,
    seed: int = 0,
    *,
    name: str,
    objectives: Sequence[str],
    level: str = PROXY.name,
    budget: int = 300,
) -> BenchProblem:
    """The problem that a recording was made of, with the tables that a study would give a searcher.

    Timings carry the noise that the process found in them. Quality is taken on the same sequences each time:
    it carries the standard error that was recorded, and no noise. The corner and the volume are those that
    ``reference.py`` stored.

    Args:
        path: what ``autocomp record`` wrote.
        seed: the searcher's; there is one instance.
        name: of the stored reference.
        objectives: as in a job.
        level: fidelity whose trials are learned from.

    Raises:
        RunError: the file is no recording.
        KeyError: no reference is stored.
    """
    wanted = tuple(Objective.parse(o) for o in objectives)
    recording = loaded(Path(path))
    trials = usable(recording, wanted, level)
    truth, problem = truth_of(Path(path), wanted, level)
    known, log = stored_reference(name, 0), logarithmic(truth.losses(problem.baselines))
    claimed = {m: float(np.median([t.stderr(m) / t.value(m) for t in trials])) for m in truth.surrogates}

    def measure(candidate: Candidate, rng: np.random.Generator) -> dict[str, Estimate]:
        found = {}
        for o, loss in zip(wanted, truth.losses([candidate])[0], strict=True):
            value = float(loss) if o.minimize else -float(loss)
            if o.metric in recording.description.timing:
                found[o.metric] = noisy(value, truth.surrogates[o.metric].noise, rng)
            else:
                found[o.metric] = Estimate(value, value * claimed.get(o.metric, 0.0))
        return found

    def exact(candidate: Candidate) -> Floats:
        return truth.losses([candidate])[0]

    told, corner, front = replace(problem, seed=seed), tuple(known["corner"]), np.array(known["front"])
    return BenchProblem(name, told, measure, exact, corner, known["volume"], budget, log, False, front)


@lru_cache(maxsize=4)
def truth_of(path: Path, objectives: tuple[Objective, ...], level: str = PROXY.name) -> tuple[Truth, Problem]:
    """What is true in a recording, and the problem for seed 0."""
    trials = usable(loaded(path), objectives, level)
    problem = problem_of(loaded(path), objectives, trials, 0)
    exact = {o.metric: t for o in objectives if (t := problem.tables.get(o.metric)) and t.exact}
    learned = [o.metric for o in objectives if o.metric not in exact]
    models = {m: Surrogate.of(problem.space, trials, m) for m in learned}
    return Truth(problem.space, objectives, models, exact), problem


def held_out(space: SearchSpace, trials: Sequence[Trial], metric: str) -> dict[str, float]:
    """Kendall's tau and the root mean square of the relative errors of left-out fifths."""
    codes = codes_of(space, [t.candidate for t in trials])
    target = np.log([t.value(metric) for t in trials])
    found, fold = np.zeros(len(target)), np.random.default_rng(0).permutation(len(target)) % FOLDS
    for k in range(FOLDS):
        model = Surrogate.fitted(space, codes[fold != k], target[fold != k])
        found[fold == k] = np.log(model.at(codes[fold == k]))
    error = float(np.sqrt(np.mean((found - target) ** 2)))
    return {"tau": float(kendalltau(found, target).statistic), "relative_error": error}


def main() -> None:
    from problems import MODELLED

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=list(MODELLED))
    given = parser.parse_args()
    objectives = tuple(Objective.parse(o) for o in MODELLED[given.name])
    path = HERE / given.name / "table.json.gz"
    trials = usable(loaded(path), objectives)
    truth, problem = truth_of(path, objectives)
    found: dict[str, Any] = {"trials": len(trials)}
    for metric, model in truth.surrogates.items():
        found[metric] = {**held_out(problem.space, trials, metric), "noise": model.noise}
        found[metric]["kernel"] = str(model.model.kernel_)
        print(metric, found[metric], flush=True)
    (HERE / "results" / f"{given.name}_surrogate.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
