"""Every searcher of the benchmark behind one interface: ``SEARCHERS[name](problem)``.

All get the same problem: baselines in their history, the same batches, the same tables where they can use
them. Optuna's samplers see tied decisions as one parameter and ordinal ones as integers
(``autocomp.searchers.optuna``); pymoo's operators see the same; children of both are repaired to the space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from evopress import EvoPressSearcher
from pymoo_nsga2 import PymooSearcher

from autocomp.searchers.base import Problem, Searcher
from autocomp.searchers.evolution import EvolutionSearcher
from autocomp.searchers.hybrid import HybridSearcher
from autocomp.searchers.ilp import IlpSearcher
from autocomp.searchers.optuna import OptunaSearcher
from autocomp.searchers.random import RandomSearcher


def _optuna(sampler: str, **options: Any) -> Callable[[Problem], Searcher]:
    return partial(OptunaSearcher, sampler=sampler, sampler_options=options)


SEARCHERS: Mapping[str, Callable[[Problem], Searcher]] = {
    "hybrid": HybridSearcher,
    "evolution": EvolutionSearcher,
    "random": RandomSearcher,
    "ilp": IlpSearcher,
    "evopress": EvoPressSearcher,
    "nsga2": _optuna("NSGAIISampler"),
    "nsga2-20": _optuna("NSGAIISampler", population_size=20),
    "nsga3": _optuna("NSGAIIISampler"),
    "tpe": _optuna("TPESampler", multivariate=True),
    "gp": _optuna("GPSampler"),
    "pymoo": PymooSearcher,
}
"""``nsga2``, ``nsga3`` and ``gp`` as Optuna has them by default; ``nsga2-20`` breeds from fewer, which suits
a few hundred trials better."""

LABELS: Mapping[str, str] = {
    "hybrid": "hybrid (ours)",
    "evolution": "evolution (ours)",
    "random": "random",
    "ilp": "ILP on the tables",
    "evopress": "EvoPress-like (1+λ)",
    "nsga2": "Optuna NSGA-II",
    "nsga2-20": "Optuna NSGA-II, population 20",
    "nsga3": "Optuna NSGA-III",
    "tpe": "Optuna TPE, multivariate",
    "gp": "Optuna GP",
    "pymoo": "pymoo NSGA-II",
}


def refusal(name: str, problem: Problem) -> str:
    """Why a searcher can't take a problem; empty when it can."""
    made = SEARCHERS[name]
    kind = made.func if isinstance(made, partial) else made
    check = getattr(kind, "unsupported", None)
    return "; ".join(check(problem)) if check is not None else ""
