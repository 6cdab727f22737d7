"""Bit allocation of a language model with known costs: additive, interacting, and with noisy latency.

The model has ``blocks`` blocks of six linears (q, k, v, o, up, down) with the shapes of a small Llama; q, k
and v are tied, as servers fuse them. Every linear takes 2, 3, 4 or 8 bits.

*additive*: the divergence is a sum over linears; linear ``d`` costs ``s_d * r_d ** -(bits - 2)`` with
log-normal sensitivities ``s_d`` and rates ``r_d`` around 4 (an error power falls fourfold a bit).

*interaction*: with ``E_i`` the sum over block ``i``, divergence is
``(sum E_i + 2 sum c_i sqrt(E_i E_{i+1})) * (1 + cliff)``: errors of neighbouring blocks have a correlation
``c_i`` in [0, 1] and add up in amplitude, and models with many 2-bit groups break: the cliff rises from 0 to
``CLIFF`` while the share of 2-bit groups goes from a quarter to a half.

*noisy*: the same with the time of a decoding step as third objective; 3-bit kernels are slower than 4-bit
ones, and every timing has its own noise, 5 % in the middle.

The searchers get the exact table of memory and a profile: the additive part of the divergence, each entry
off by a log-normal factor of 30 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from bench_problem import BenchProblem, Floats, instance_rng, judge, noisy, stored_reference
from numpy.typing import NDArray

from autocomp.objective import Objective
from autocomp.pareto import non_dominated
from autocomp.searchers.base import Problem
from autocomp.space import AdditiveTable, Candidate, Choice, Decision, SearchSpace, Tied, Value
from autocomp.trial import Estimate

BITS = (2, 3, 4, 8)
GROUPS = (("q", "k", "v"), ("o",), ("up",), ("down",))
UNITS = {"q": 3, "k": 1, "v": 1, "o": 3, "up": 16, "down": 8}
"""Size of each linear in units of 576 x 192 weights; ``up`` is gate and up together."""
UNIT = 576 * 192
OVERHEAD_BITS = 0.25
"""Of scales: 16 bits for each 64 weights."""

KL_AT_4_BITS = 0.03
"""Nats, of the additive part with 4 bits everywhere."""
PROFILE_ERROR = 0.3
LATENCY_TABLE_ERROR = 0.1
KL_NOISE, TIME_NOISE = 0.01, 0.05
CLIFF, CLIFF_FROM, CLIFF_TO = 8.0, 0.25, 0.5
SPEED = {2: 0.62, 3: 0.95, 4: 0.80, 8: 1.35}
"""Microseconds a unit of weights takes in a decoding step."""
FIXED_MS = 0.2

Codes = NDArray[np.intp]


@dataclass(frozen=True)
class Allocation:
    """One instance.

    Attributes:
        error: additive divergence of every linear, ``[blocks, linears, options]``, nats.
        coherence: ``c`` between neighbouring blocks, ``[blocks - 1]``; zeros for the additive problem.
        cliff: how much models with half of their groups at 2 bits are worse; 0 for none.
        time: of every linear in a decoding step, ``[blocks, linears, options]``, ms.
    """

    error: Floats
    coherence: Floats
    cliff: float
    time: Floats

    @property
    def blocks(self) -> int:
        return len(self.error)

    @cached_property
    def group_error(self) -> Floats:
        """``[blocks, groups, options]``: tied linears added up."""
        return summed_groups(self.error)

    def codes(self, candidate: Candidate) -> Codes:
        """Option of every group, ``[blocks, groups]``."""
        found = [BITS.index(candidate[f"bits/{b}.{g[0]}"]) for b in range(self.blocks) for g in GROUPS]  # type: ignore[arg-type]
        return np.array(found, dtype=np.intp).reshape(self.blocks, len(GROUPS))

    def kl(self, codes: Codes) -> float:
        """Nats."""
        at_block = np.take_along_axis(self.group_error, codes[:, :, None], axis=2)[:, :, 0].sum(axis=1)
        together = 2.0 * self.coherence * np.sqrt(at_block[:-1] * at_block[1:])
        return float((at_block.sum() + together.sum()) * self.cliff_factor(float((codes == 0).mean())))

    def cliff_factor(self, share: float | Floats) -> Floats:
        """By how much the divergence grows with this share of groups at 2 bits; any shape."""
        rise = (np.asarray(share) - CLIFF_FROM) / (CLIFF_TO - CLIFF_FROM)
        return np.asarray(1.0 + self.cliff * np.clip(rise, 0.0, 1.0))

    def unit_bits(self, codes: Codes) -> int:
        """Bits of the weights, in units."""
        return int((np.array(BITS)[codes] * group_units()).sum())

    def memory_mb(self, unit_bits: float | Floats) -> float | Floats:
        units = float(self.blocks * group_units().sum())
        return (unit_bits + OVERHEAD_BITS * units) * UNIT / 8e6

    def decode_ms(self, codes: Codes) -> float:
        grouped = summed_groups(self.time)
        return FIXED_MS + float(np.take_along_axis(grouped, codes[:, :, None], axis=2).sum())


def group_units() -> NDArray[np.intp]:
    """Units of each group of a block, ``[groups]``."""
    return np.array([sum(UNITS[n] for n in g) for g in GROUPS])


def summed_groups(rows: Floats) -> Floats:
    """``[blocks, linears, options]`` added up over tied linears: ``[blocks, groups, options]``."""
    starts = np.cumsum([0, *(len(g) for g in GROUPS[:-1])])
    return np.add.reduceat(rows, starts, axis=1)


def draw_allocation(rng: np.random.Generator, blocks: int, *, interacting: bool) -> Allocation:
    """A random instance, scaled so that 4 bits everywhere have the same additive divergence."""
    linears = [n for g in GROUPS for n in g]
    shape = (blocks, len(linears), 1)
    steps = np.array(BITS) - BITS[0]
    error = np.exp(rng.normal(size=shape)) * (4.0 * np.exp(0.15 * rng.normal(size=shape))) ** -steps
    error *= KL_AT_4_BITS / error[:, :, BITS.index(4)].sum()
    units = np.array([UNITS[n] for n in linears])[None, :, None]
    speed = np.array([SPEED[b] for b in BITS]) * np.exp(0.1 * rng.normal(size=(1, len(linears), len(BITS))))
    coherence = rng.uniform(size=blocks - 1) if interacting else np.zeros(blocks - 1)
    time = np.broadcast_to(1e-3 * units * speed, error.shape)
    return Allocation(error, coherence, CLIFF if interacting else 0.0, time)


def make_space(blocks: int) -> SearchSpace:
    """A decision for every linear; q, k and v of a block are tied."""
    decisions = [
        Decision(f"bits/{b}.{n}", Choice(BITS, ordered=True), (f"{b}.{n}",), "bits", b)
        for b in range(blocks)
        for g in GROUPS
        for n in g
    ]
    tied = [Tied(tuple(f"bits/{b}.{n}" for n in g)) for b in range(blocks) for g in GROUPS if len(g) > 1]
    return SearchSpace(tuple(decisions), tuple(tied))


def tables(instance: Allocation, rng: np.random.Generator, *, timed: bool) -> dict[str, AdditiveTable]:
    """What a searcher is given: a profile that is off by 30 %, exact bytes, and kernel times off by 10 %."""
    factor = _error_factors(PROFILE_ERROR, instance.error.shape, rng)
    found = {"kl": AdditiveTable("kl", 0.0, _rows(instance.error * factor))}
    sizes = np.array([UNITS[n] for g in GROUPS for n in g])[None, :, None] * np.array(BITS) * UNIT / 8e6
    memory = _rows(np.broadcast_to(sizes, instance.error.shape))
    found["memory_mb"] = AdditiveTable("memory_mb", float(instance.memory_mb(0.0)), memory, exact=True)
    if timed:
        factor = _error_factors(LATENCY_TABLE_ERROR, instance.time.shape, rng)
        found["decode_ms"] = AdditiveTable("decode_ms", FIXED_MS, _rows(instance.time * factor))
    return found


def _error_factors(relative: float, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Log-normal factors of mean 1."""
    return np.exp(relative * rng.normal(size=shape) - 0.5 * relative**2)


def _rows(costs: Floats) -> dict[str, dict[Value, float]]:
    linears = [n for g in GROUPS for n in g]
    return {
        f"bits/{b}.{n}": dict(zip(BITS, map(float, costs[b, i])))
        for b in range(len(costs))
        for i, n in enumerate(linears)
    }


# --- fronts -----------------------------------------------------------------------------------------------


def additive_front(instance: Allocation) -> Floats:
    """All points (kl, memory_mb) of the exact front ``[points, 2]`` when costs add up.

    Dynamic programming over the unit bits spent, group by group: ``best[m]`` is the least divergence of
    what was decided so far in exactly ``m`` unit bits (the multiple-choice knapsack; Dudzinski and
    Walukiewicz, EJOR 28, 1987).
    """
    most = int(BITS[-1] * group_units().sum() * instance.blocks)
    best = np.full(most + 1, np.inf)
    best[0] = 0.0
    for row in instance.group_error:
        for costs, units in zip(row, group_units()):
            grown = np.full(most + 1, np.inf)
            for cost, bits in zip(costs, BITS):
                spent = int(bits * units)
                grown[spent:] = np.minimum(grown[spent:], best[: most + 1 - spent] + cost)
            best = grown
    points = np.column_stack([best, np.asarray(instance.memory_mb(np.arange(most + 1.0)))])
    points = points[np.isfinite(best)]
    return points[non_dominated(points)]


# --- the problems -----------------------------------------------------------------------------------------


def instance_of(name: str, seed: int) -> Allocation:
    """The instance of ``additive``, ``interaction`` or ``noisy`` for a seed."""
    blocks = 8 if name == "noisy" else 16
    return draw_allocation(instance_rng(name, seed), blocks, interacting=name != "additive")


def allocation_problem(name: str, seed: int) -> BenchProblem:
    """The problem of that name: 96 decisions in 64 groups, or 48 in 32 for ``noisy``."""
    instance, timed = instance_of(name, seed), name == "noisy"
    rng = instance_rng(f"{name}/tables", seed)
    space = make_space(instance.blocks)
    metrics = ("kl", "memory_mb", "decode_ms") if timed else ("kl", "memory_mb")
    problem = Problem(
        space=space,
        objectives=tuple(Objective(m) for m in metrics),
        tables=tables(instance, rng, timed=timed),
        baselines=tuple(reversed(space.uniform())),
        seed=seed,
    )

    def truth(candidate: Candidate) -> Floats:
        codes = instance.codes(candidate)
        found = [instance.kl(codes), float(instance.memory_mb(instance.unit_bits(codes)))]
        return np.array([*found, instance.decode_ms(codes)] if timed else found)

    def measure(candidate: Candidate, rng: np.random.Generator) -> dict[str, Estimate]:
        losses = truth(candidate)
        found = {"kl": noisy(losses[0], KL_NOISE, rng), "memory_mb": Estimate(float(losses[1]))}
        if timed:  # some timings are disturbed more than others, and say so
            spread = TIME_NOISE * math.exp(0.5 * float(rng.standard_normal()))
            found["decode_ms"] = noisy(losses[2], spread, rng)
        return found

    log = (True, False, False)[: len(metrics)]
    if name == "additive":
        front = additive_front(instance)
        corner, volume = judge(front, np.array([truth(c) for c in problem.baselines]), log)
        return BenchProblem(name, problem, measure, truth, corner, volume, 300, log, True, front)
    known = stored_reference(name, seed)
    corner, front = tuple(known["corner"]), np.array(known["front"])
    return BenchProblem(name, problem, measure, truth, corner, known["volume"], 300, log, False, front)
