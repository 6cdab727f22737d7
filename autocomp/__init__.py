"""autocomp: search for the best way to compress one model for one machine.

``import autocomp`` is light: torch, ray and mlflow load only when something that needs them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Candidate": "autocomp.space",
    "Choice": "autocomp.space",
    "Constraint": "autocomp.objective",
    "Decision": "autocomp.space",
    "Interval": "autocomp.space",
    "Job": "autocomp.job",
    "Objective": "autocomp.objective",
    "ParetoFront": "autocomp.pareto",
    "SearchSpace": "autocomp.space",
    "Study": "autocomp.study",
    "export": "autocomp.api",
    "load": "autocomp.api",
    "resume": "autocomp.api",
    "search": "autocomp.api",
}
__all__ = sorted([*_EXPORTS, "__version__"])

if TYPE_CHECKING:  # the same names for type checkers and editors
    from autocomp.api import export, load, resume, search
    from autocomp.job import Job
    from autocomp.objective import Constraint, Objective
    from autocomp.pareto import ParetoFront
    from autocomp.space import Candidate, Choice, Decision, Interval, SearchSpace
    from autocomp.study import Study


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'autocomp' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
