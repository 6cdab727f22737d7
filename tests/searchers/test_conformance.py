"""Every built-in searcher passes the checks that third-party ones are offered."""

from __future__ import annotations

from functools import partial

import pytest

from autocomp.registry import SEARCHERS
from autocomp.searchers.base import Problem, Searcher
from autocomp.testing.searchers import CHECKS, Check

OPTIONS: dict[str, dict[str, object]] = {
    "random": {},
    "epsilon": {"intervals": 2, "gap": 0.05},
    "evolution": {"population": 8},
    "exhaustive": {"shuffle": True},
    "ilp": {"points": 3, "gap": 0.05},
    "optuna": {"sampler": "NSGAIISampler", "sampler_options": {"population_size": 8}},
    "hybrid": {"points": 3, "first": 3, "pool": 40, "gap": 0.05},
}


def factory(name: str) -> object:
    """The class with small settings; ``unsupported`` stays reachable."""

    class Small:
        unsupported = staticmethod(SEARCHERS.get(name).unsupported)

        def __new__(cls, problem: Problem) -> Searcher:  # type: ignore[misc]
            built: Searcher = SEARCHERS.get(name)(problem, **OPTIONS[name])
            return built

    return Small


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_builtin_searchers(name: str, check: Check) -> None:
    check(factory(name))  # type: ignore[arg-type]


def test_tpe_passes_too() -> None:
    tpe = partial(SEARCHERS.get("optuna"), sampler="TPESampler", sampler_options={"n_startup_trials": 4})
    for name in ("determinism", "constraints", "resume", "failures", "floats", "pending"):
        CHECKS[name](tpe)
