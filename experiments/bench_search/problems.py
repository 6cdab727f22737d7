"""All problems of the benchmark by name: ``PROBLEMS[name](seed)``.

A seed is an instance: costs, errors of the tables and noise are drawn anew (``schedule``, ``zdt1``, ``zdt3``
and ``dtlz2`` have a single instance; there the seed is the searcher's alone).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from allocation import allocation_problem
from bench_problem import BenchProblem
from merging import mixed_problem
from recorded_table import recorded_problem
from standard import standard_problem
from steps import schedule_problem
from surrogate import surrogate_problem

__all__ = ["BenchProblem", "PROBLEMS"]

HERE = Path(__file__).parent

RECORDED: Mapping[str, tuple[str, ...]] = {"lm": ("min kl", "min decode_ms", "min memory_mb")}
"""Recorded tables (``NAME/table.json.gz``) and what is searched in them, where the file is there."""

MODELLED: Mapping[str, tuple[str, ...]] = {"smollm2": ("min kl", "min memory_mb")}
"""The same for recordings that are not exhaustive: a regression answers (``surrogate.py``)."""

PROBLEMS: Mapping[str, Callable[[int], BenchProblem]] = {
    "additive": partial(allocation_problem, "additive"),
    "interaction": partial(allocation_problem, "interaction"),
    "noisy": partial(allocation_problem, "noisy"),
    "mixed": mixed_problem,
    "schedule": schedule_problem,
    "zdt1": partial(standard_problem, "zdt1"),
    "zdt3": partial(standard_problem, "zdt3"),
    "dtlz2": partial(standard_problem, "dtlz2"),
    **{
        name: partial(made, HERE / name / "table.json.gz", name=name, objectives=objectives)
        for known, made in ((RECORDED, recorded_problem), (MODELLED, surrogate_problem))
        for name, objectives in known.items()
        if (HERE / name / "table.json.gz").exists()
    },
}
