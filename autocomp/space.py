"""Search spaces as plain values: decisions, constraints, candidates, additive tables.

Nothing here knows what a decision means. A decision may be the bits of a linear layer, the span rule of a
key/value group, one row of an expert-merge matrix (floats that sum to one) or one slot of a timestep
schedule (a float, or ``None`` when the slot is unused); searchers see domains and constraints only.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from autocomp.errors import SpaceError

Value = str | int | float | bool | None


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN and infinity are refused."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(data: Any, length: int = 16) -> str:
    """Hexadecimal SHA-256 of ``canonical_json(data)``, cut to ``length`` characters."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()[:length]


@dataclass(frozen=True)
class Choice:
    """A finite set of options; ``ordered`` says that neighbours in the list are alike (an ordinal scale)."""

    options: tuple[Value, ...]
    ordered: bool = False

    def __post_init__(self) -> None:
        if not self.options:
            raise SpaceError("a Choice needs at least one option; got an empty list")
        if len(set(map(repr, self.options))) != len(self.options):
            raise SpaceError(f"options must differ from each other; got {list(self.options)}")

    @cached_property
    def _places(self) -> dict[tuple[type, Value], int]:
        return {(type(o), o): i for i, o in enumerate(self.options)}  # True is not 1

    def contains(self, value: Value) -> bool:
        try:
            return (type(value), value) in self._places
        except TypeError:  # a list from someone's JSON can't be hashed
            return False

    def index(self, value: Value) -> int:
        if not self.contains(value):
            raise SpaceError(f"{value!r} is not one of {list(self.options)}")
        return self._places[type(value), value]

    def sample(self, rng: np.random.Generator) -> Value:
        return self.options[int(rng.integers(len(self.options)))]


@dataclass(frozen=True)
class Interval:
    """All floats in ``[low, high]``; with ``nullable`` also ``None`` (an unused slot)."""

    low: float
    high: float
    nullable: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise SpaceError(f"an Interval needs finite low <= high; got [{self.low}, {self.high}]")

    def contains(self, value: Value) -> bool:
        if value is None:
            return self.nullable
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low <= float(value) <= self.high

    def sample(self, rng: np.random.Generator) -> Value:
        if self.nullable and rng.random() < 0.5:
            return None
        return float(rng.uniform(self.low, self.high))


Domain = Choice | Interval


@dataclass(frozen=True)
class Decision:
    """One thing that may vary.

    Attributes:
        name: unique in its space, stable between runs, readable (``bits/model.layers.3.mlp.up_proj``).
        domain: what it may be.
        sites: paths of the model parts that it changes (module names; may be empty).
        space: name of the space that applies it.
        block: index of the repeated block it sits in, for pictures and block-wise grouping; ``None`` if none.
    """

    name: str
    domain: Domain
    sites: tuple[str, ...] = ()
    space: str = ""
    block: int | None = None

    @property
    def options(self) -> tuple[Value, ...]:
        """The options of a categorical decision; empty for an interval."""
        return self.domain.options if isinstance(self.domain, Choice) else ()


@dataclass(frozen=True)
class Candidate:
    """One full assignment: frozen, hashable, JSON, with a content fingerprint."""

    items: tuple[tuple[str, Value], ...]

    @classmethod
    def of(cls, values: Mapping[str, Value]) -> Candidate:
        return cls(tuple(sorted(values.items())))

    @cached_property
    def values(self) -> Mapping[str, Value]:
        return dict(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on the names and values alone."""
        return content_hash([list(item) for item in self.items])

    def __getitem__(self, name: str) -> Value:
        return self.values[name]

    def replace(self, changes: Mapping[str, Value]) -> Candidate:
        return Candidate.of({**self.values, **changes})

    def to_json(self) -> dict[str, Value]:
        return dict(self.items)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Candidate) and self.fingerprint == other.fingerprint


@dataclass(frozen=True)
class AdditiveTable:
    """A metric modelled as ``base + sum over decisions of cost(decision, option)``.

    Sensitivities (quality), byte counts (exact) and latency tables all have this form, and an ILP can
    use it directly. A (decision, option) pair without an entry is unknown: the total is NaN.

    Attributes:
        metric: name of the metric; its unit is the metric's.
        base: value with every decision at zero cost.
        costs: decision name -> {option -> cost}. Decisions that are absent cost nothing.
        stderr: standard errors in the same layout (missing means 0).
        exact: True when the sum is the truth (bytes), not a model of it.
    """

    metric: str
    base: float
    costs: Mapping[str, Mapping[Value, float]]
    stderr: Mapping[str, Mapping[Value, float]] = field(default_factory=dict)
    exact: bool = False

    def cost(self, name: str, option: Value) -> float:
        table = self.costs.get(name)
        return 0.0 if table is None else table.get(option, math.nan)

    def total(self, candidate: Candidate) -> float:
        total, costs = 0.0, self.costs
        for name, option in candidate.items:
            if (row := costs.get(name)) is not None:
                total += row.get(option, math.nan)
        return self.base + total

    def covers(self, space: SearchSpace) -> bool:
        """True when every option of every decision has a finite cost."""
        return all(
            isinstance(d.domain, Choice)
            and d.name in self.costs
            and all(math.isfinite(self.costs[d.name].get(o, math.nan)) for o in d.options)
            for d in space.decisions
        )

    def to_json(self) -> dict[str, Any]:
        def rows(table: Mapping[str, Mapping[Value, float]]) -> dict[str, list[list[Any]]]:
            return {n: [[o, c] for o, c in row.items()] for n, row in table.items()}

        return {
            "metric": self.metric, "base": self.base, "exact": self.exact,
            "costs": rows(self.costs), "stderr": rows(self.stderr),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdditiveTable:
        def table(rows: Mapping[str, list[list[Any]]]) -> dict[str, dict[Value, float]]:
            return {n: {o: float(c) for o, c in row} for n, row in rows.items()}

        return cls(data["metric"], data["base"], table(data["costs"]), table(data["stderr"]), data["exact"])


@dataclass(frozen=True)
class Tied:
    """All named decisions take the same value."""

    names: tuple[str, ...]

    def violation(self, values: Mapping[str, Value]) -> float:
        return float(len({repr(values[n]) for n in self.names}) - 1)


@lru_cache(maxsize=65536)
def _piece(option: str, index: int) -> str | None:
    pieces = option.split("/")
    return pieces[index] if 0 <= index < len(pieces) else None


@dataclass(frozen=True)
class AtMostDistinct:
    """The named decisions take at most ``k`` different values between them (MoA: two rules a layer).

    With ``field`` only one piece of each option counts: options are then texts with slashes, and of
    ``a512b0s16/k8v4`` field 0 is ``a512b0s16`` and field 1 ``k8v4``.
    """

    names: tuple[str, ...]
    k: int
    field: int | None = None

    def key(self, value: Value) -> str:
        """What is counted of ``value``."""
        if self.field is None or not isinstance(value, str):
            return repr(value)
        piece = _piece(value, self.field)
        return repr(value) if piece is None else piece

    def violation(self, values: Mapping[str, Value]) -> float:
        return float(max(0, len({self.key(values[n]) for n in self.names}) - self.k))


@dataclass(frozen=True)
class LinearBudget:
    """``table.total(candidate) <= upper``, known exactly before anything is measured (bytes, say)."""

    table: AdditiveTable
    upper: float

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.table.costs)

    def violation(self, values: Mapping[str, Value]) -> float:
        total = self.table.base + sum(self.table.cost(n, values[n]) for n in self.table.costs)
        # A relative tolerance: sums of many floats must not fail a budget that they meet exactly.
        slack = 1e-9 * max(1.0, abs(self.upper))
        return math.inf if math.isnan(total) else max(0.0, total - self.upper - slack)


@dataclass(frozen=True)
class SumTo:
    """The named float decisions add up to ``total`` (a row of merge weights: 1)."""

    names: tuple[str, ...]
    total: float = 1.0

    def violation(self, values: Mapping[str, Value]) -> float:
        gap = abs(sum(float(values[n] or 0.0) for n in self.names) - self.total)
        return gap if gap > 1e-6 else 0.0


@dataclass(frozen=True)
class Ordered:
    """The named floats, read in order and skipping ``None``, never rise (timesteps of a sampler).

    With ``gap`` they fall by at least that much from one to the next.
    """

    names: tuple[str, ...]
    descending: bool = True
    gap: float | None = None

    def violation(self, values: Mapping[str, Value]) -> float:
        used = [float(values[n]) for n in self.names if values[n] is not None]  # type: ignore[arg-type]
        sign, gap = (1.0 if self.descending else -1.0), (self.gap or 0.0) * (1 - 1e-9)
        return sum(max(0.0, sign * (b - a) + gap) for a, b in pairwise(used))


@dataclass(frozen=True)
class Slots:
    """Decisions in equal groups, a slot each, that a ``None`` of the slot's first decision switches off.

    What the other decisions of an unused slot say makes no difference, so they stand at ``rest``; with
    ``packed`` the unused slots come last. Equal things are then equal candidates.
    """

    names: tuple[str, ...]
    rest: tuple[Value, ...] = ()
    packed: bool = False

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Names of each slot, its switch first."""
        width = 1 + len(self.rest)
        return [self.names[i : i + width] for i in range(0, len(self.names), width)]

    def violation(self, values: Mapping[str, Value]) -> float:
        unused = [values[g[0]] is None for g in self.groups]
        moved = sum(
            repr(values[n]) != repr(r)
            for g, off in zip(self.groups, unused, strict=True)
            if off
            for n, r in zip(g[1:], self.rest, strict=True)
        )
        holes = sum(a and not b for a, b in pairwise(unused)) if self.packed else 0
        return float(moved + holes)


SpaceConstraint = Tied | AtMostDistinct | LinearBudget | SumTo | Ordered | Slots


@dataclass(frozen=True)
class SearchSpace:
    """Ordered decisions and the constraints between them.

    Raises:
        SpaceError: two decisions share a name, or a constraint names a decision that is not there.
    """

    decisions: tuple[Decision, ...]
    constraints: tuple[SpaceConstraint, ...] = ()

    def __post_init__(self) -> None:
        names = [d.name for d in self.decisions]
        if len(set(names)) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise SpaceError(f"decision names must be unique; twice: {twice[:3]}")
        for constraint in self.constraints:
            unknown = sorted(set(constraint.names) - set(names))
            if unknown:
                kind = type(constraint).__name__
                raise SpaceError(f"{kind} names decisions that are not in the space: {unknown[:3]}")
            if isinstance(constraint, AtMostDistinct) and constraint.field is not None:
                _check_field(constraint, self.by_name)

    @cached_property
    def by_name(self) -> Mapping[str, Decision]:
        return {d.name: d for d in self.decisions}

    @cached_property
    def fingerprint(self) -> str:
        return content_hash(space_to_json(self))

    def __len__(self) -> int:
        return len(self.decisions)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    @property
    def is_categorical(self) -> bool:
        return all(isinstance(d.domain, Choice) for d in self.decisions)

    def violations(self, candidate: Candidate) -> list[str]:
        """Why ``candidate`` is not in the space, in words; empty when it is."""
        values = candidate.values
        missing = sorted(self.by_name.keys() - values.keys())
        extra = sorted(values.keys() - self.by_name.keys())
        reasons = [f"no value for {missing[:3]}"] * bool(missing)
        reasons += [f"unknown decisions {extra[:3]}"] * bool(extra)
        for name, value in values.items():
            decision = self.by_name.get(name)
            if decision is not None and not decision.domain.contains(value):
                reasons.append(f"{name} = {value!r} is not in {_domain_text(decision.domain)}")
        if not reasons:
            broken = [c for c in self.constraints if c.violation(values) > 0]
            reasons += [_constraint_text(c, values) for c in broken]
        return reasons

    def check(self, candidate: Candidate) -> Candidate:
        """Return ``candidate``, or raise ``SpaceError`` with every reason why it does not belong."""
        reasons = self.violations(candidate)
        if reasons:
            raise SpaceError(f"candidate {candidate.fingerprint} is invalid: " + "; ".join(reasons))
        return candidate

    def sample(self, rng: np.random.Generator) -> Candidate:
        """A random candidate, repaired to meet the constraints where a greedy repair can."""
        return self.repair({d.name: d.domain.sample(rng) for d in self.decisions}, rng)

    def repair(self, values: Mapping[str, Value], rng: np.random.Generator) -> Candidate:
        """The nearest candidate that a greedy pass finds; callers check ``violations`` for the rest."""
        from autocomp.repair import repair_values

        return Candidate.of(repair_values(self, dict(values), rng))

    def uniform(self) -> list[Candidate]:
        """For each option shared by all categorical decisions: the candidate that takes it everywhere.

        Empty when a decision is an interval or when no option is shared.
        """
        if not self.decisions or not self.is_categorical:
            return []
        shared = [o for o in self.decisions[0].options if all(d.domain.contains(o) for d in self.decisions)]
        candidates = [Candidate.of({d.name: option for d in self.decisions}) for option in shared]
        structural = [c for c in self.constraints if not isinstance(c, LinearBudget)]
        return [c for c in candidates if all(k.violation(c.values) == 0 for k in structural)]

    def restrict(self, allowed: Mapping[str, Sequence[Value]]) -> SearchSpace:
        """The space with some decisions limited to the given options (order kept)."""
        decisions = []
        for d in self.decisions:
            if d.name in allowed:
                keep = tuple(o for o in d.options if o in set(allowed[d.name]))
                if not keep:
                    raise SpaceError(f"{d.name}: none of its options {list(d.options)} is allowed")
                d = Decision(d.name, Choice(keep, _ordered(d.domain)), d.sites, d.space, d.block)
            decisions.append(d)
        return SearchSpace(tuple(decisions), self.constraints)

    def with_constraints(self, extra: Iterable[SpaceConstraint]) -> SearchSpace:
        return SearchSpace(self.decisions, (*self.constraints, *extra))


def _check_field(constraint: AtMostDistinct, by_name: Mapping[str, Decision]) -> None:
    """Raise ``SpaceError`` when some option of the named decisions lacks the piece that is to be counted."""
    field = constraint.field or 0
    for name in constraint.names:
        options = by_name[name].options
        lacking = [o for o in options if not isinstance(o, str) or _piece(o, field) is None]
        if lacking or not options:
            raise SpaceError(
                f"AtMostDistinct counts field {field} of {name}, whose options must be texts with at least"
                f" {field + 1} pieces between slashes; got {lacking[:3] or by_name[name].domain}"
            )


def _ordered(domain: Domain) -> bool:
    return isinstance(domain, Choice) and domain.ordered


def _domain_text(domain: Domain) -> str:
    return str(list(domain.options)) if isinstance(domain, Choice) else f"[{domain.low}, {domain.high}]"


def _constraint_text(constraint: SpaceConstraint, values: Mapping[str, Value]) -> str:
    if isinstance(constraint, LinearBudget):
        total = constraint.violation(values) + constraint.upper
        return f"{constraint.table.metric} = {total:.6g} is over the budget {constraint.upper:.6g}"
    kind = type(constraint).__name__
    shown = ", ".join(constraint.names[:3])
    if isinstance(constraint, AtMostDistinct) and constraint.field is not None:
        keys = sorted({constraint.key(values[n]) for n in constraint.names})
        where = f"field {constraint.field} of {shown}..."
        return f"{kind}: {where} takes {len(keys)} different values {keys}, over {constraint.k}"
    return f"{kind}({shown}...) is off by {constraint.violation(values):.3g}"


_KINDS: dict[str, type] = {k.__name__: k for k in (Tied, AtMostDistinct, SumTo, Ordered, Slots)}


def space_to_json(space: SearchSpace) -> dict[str, Any]:
    """A JSON form of the space from which ``space_from_json`` rebuilds an equal one."""
    decisions = []
    for d in space.decisions:
        if isinstance(d.domain, Choice):
            domain: dict[str, Any] = {"options": list(d.domain.options), "ordered": d.domain.ordered}
        else:
            domain = {"low": d.domain.low, "high": d.domain.high, "nullable": d.domain.nullable}
        decisions.append(
            {"name": d.name, "domain": domain, "sites": list(d.sites), "space": d.space, "block": d.block}
        )
    constraints: list[dict[str, Any]] = []
    for c in space.constraints:
        if isinstance(c, LinearBudget):
            constraints.append({"kind": "LinearBudget", "table": c.table.to_json(), "upper": c.upper})
        else:
            # What is None is left out: a space without pieces keeps the fingerprint that it always had.
            given = {k: v for k, v in vars(c).items() if v is not None}
            fields = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
            constraints.append({"kind": type(c).__name__, **fields})
    return {"decisions": decisions, "constraints": constraints}


def space_from_json(data: Mapping[str, Any]) -> SearchSpace:
    """Inverse of ``space_to_json``."""
    decisions = []
    for d in data["decisions"]:
        domain = d["domain"]
        parsed: Domain
        if "options" in domain:
            parsed = Choice(tuple(domain["options"]), domain["ordered"])
        else:
            parsed = Interval(domain["low"], domain["high"], domain["nullable"])
        decisions.append(Decision(d["name"], parsed, tuple(d["sites"]), d["space"], d["block"]))
    constraints: list[SpaceConstraint] = []
    for c in data["constraints"]:
        if c["kind"] == "LinearBudget":
            constraints.append(LinearBudget(AdditiveTable.from_json(c["table"]), c["upper"]))
        else:
            rest = {k: tuple(v) if isinstance(v, list) else v for k, v in c.items() if k != "kind"}
            constraints.append(_KINDS[c["kind"]](**rest))
    return SearchSpace(tuple(decisions), tuple(constraints))
