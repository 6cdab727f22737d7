"""ZDT1, ZDT3 (Zitzler, Deb and Thiele, 2000) and DTLZ2 (Deb et al., 2002) from pymoo, as floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from bench_problem import BenchProblem, Floats, corner_of

from autocomp.objective import Objective
from autocomp.searchers.base import Problem
from autocomp.space import Candidate, Decision, Interval, SearchSpace
from autocomp.trial import Estimate

DECISIONS = 10
START = 0.25
"""The baseline: every decision there. (In the middle DTLZ2 would be solved.)"""


def standard_problem(name: str, seed: int) -> BenchProblem:
    """Ten floats in [0, 1]; two objectives, three for ``dtlz2``. There is one baseline."""
    from pymoo.problems import get_problem

    count = 3 if name == "dtlz2" else 2
    options: dict[str, Any] = {"n_var": DECISIONS, **({"n_obj": 3} if count == 3 else {})}
    function = get_problem(name, **options)
    names = [f"x{i:02d}" for i in range(DECISIONS)]
    metrics = [f"f{i + 1}" for i in range(count)]
    problem = Problem(
        space=SearchSpace(tuple(Decision(n, Interval(0.0, 1.0)) for n in names)),
        objectives=tuple(Objective(m) for m in metrics),
        baselines=(Candidate.of(dict.fromkeys(names, START)),),
        seed=seed,
    )

    def truth(candidate: Candidate) -> Floats:
        x = np.array([[candidate[n] for n in names]], dtype=np.float64)
        return np.asarray(function.evaluate(x, return_values_of=["F"])[0], dtype=np.float64)

    def measure(candidate: Candidate, rng: np.random.Generator) -> dict[str, Estimate]:
        del rng
        return {m: Estimate(float(v)) for m, v in zip(metrics, truth(candidate), strict=True)}

    log = (False,) * count
    corner = corner_of(np.vstack([np.zeros(count), np.ones(count)]), truth(problem.baselines[0])[None], log)
    return BenchProblem(name, problem, measure, truth, corner, reference_volume(name, corner), 300, log)


def reference_volume(name: str, corner: Sequence[float]) -> float:
    """Volume below ``corner``, which lies beyond 1 in every objective. Exact for ZDT1 (``f2 = 1 - sqrt(f1)``)
    and DTLZ2 (the unit sphere), by quadrature for ZDT3.
    """
    if name == "zdt1":
        return float(np.prod(corner)) - 1.0 / 3.0
    if name == "dtlz2":
        return float(np.prod(corner)) - np.pi / 6.0
    if name != "zdt3":
        raise KeyError(f"no reference volume of {name!r}; known: zdt1, zdt3, dtlz2")
    # Left of each f1 the least f2 counts: the area is an integral over f1, flat beyond 1.
    f1 = np.linspace(0.0, 1.0, 1_000_001)
    least = np.minimum.accumulate(1.0 - np.sqrt(f1) - f1 * np.sin(10.0 * np.pi * f1))
    return float(np.mean(corner[1] - least) + (corner[0] - 1.0) * (corner[1] - least[-1]))
