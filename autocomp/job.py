"""A job: one YAML file, checked whole before anything runs.

Wrong keys, values, paths and strings are reported together, each with its field, its value and what
would be valid. ``Job.from_yaml(path, ["budget.trials=20"])`` applies dotted overrides first.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from autocomp.errors import AutocompError, JobError
from autocomp.objective import Constraint, Objective
from autocomp.registry import EXECUTORS, SEARCHERS, SPACES, WORKLOADS

if TYPE_CHECKING:
    from autocomp.search_spaces.base import Space


class Config(BaseModel):
    """Base of all configuration: unknown keys are errors, values are fixed after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SearcherConfig(Config):
    """Which searcher, and its own options (keyword arguments of its class)."""

    name: str = "hybrid"
    seed: int = 0
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return str(_readable(SEARCHERS.check, value))


class SensitivityConfig(Config):
    """How the additive quality costs are found before the search.

    Attributes:
        method: ``fisher`` (default), ``first_order`` (LLM-MQ), ``activation``, ``measured`` or ``none``.
        sequences: calibration sequences used.
    """

    method: Literal["fisher", "first_order", "activation", "measured", "none"] = "fisher"
    sequences: int = Field(16, ge=1)


class BudgetConfig(Config):
    """When to stop searching: whichever comes first. 0 means no limit (trials must be limited).

    Attributes:
        trials: candidates measured at the proxy fidelity, baselines and audit included.
        minutes: wall time of the search phase.
        tokens: tokens scored at the proxy fidelity.
        stages: candidates are first measured on so many sequences of the proxy split, ``[4]`` or ``[4, 16]``,
            and go on to more only while they may reach the front. Worth it where scoring takes most of a
            trial, since latency is measured at each stage. Baselines and audit take the whole split.
    """

    trials: int = Field(60, ge=1)
    minutes: float = Field(0.0, ge=0)
    tokens: int = Field(0, ge=0)
    stages: tuple[Annotated[int, Field(ge=1)], ...] = ()

    @field_validator("stages")
    @classmethod
    def _stages_grow(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("stages must grow, such as [4, 16]")
        return value


class ExecutorConfig(Config):
    """Where workers run.

    Attributes:
        name: ``ray``, ``local``, or ``simulated``, which replays the recording ``table``.
        workers: 0 picks one per GPU, or one per four CPU cores (at least one; two on two cores);
            ``simulated`` takes as many as the recorded run had.
        threads: CPU threads a worker; 0 divides the cores evenly.
        address: Ray address (``auto`` for a running cluster); empty starts a local Ray.
        gpus: whole GPUs a worker; ``accelerator`` (``H100``) makes Ray place it on that type only.
        timeout_s: limit for one measurement, in seconds.
        memory_mb: cap on a worker's memory (10**6 bytes), 0 for none.
        retries: how often a trial whose worker crashed is tried again.
        table: file of a recording (``autocomp record``), for ``simulated`` alone.
        nearest: a simulated worker answers for what was not measured with the nearest that was.
    """

    name: str = "ray"
    workers: int = Field(0, ge=0)
    threads: int = Field(0, ge=0)
    address: str = ""
    gpus: int = Field(0, ge=0)
    accelerator: str = ""
    timeout_s: float = Field(1800.0, gt=0)
    memory_mb: int = Field(0, ge=0)
    retries: int = Field(1, ge=0)
    table: str = ""
    nearest: bool = False

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return str(_readable(EXECUTORS.check, value))

    @model_validator(mode="after")
    def _table_is_for_simulations(self) -> ExecutorConfig:
        if self.name == "simulated" and not self.table:
            raise ValueError("simulated needs executor.table, a file that `autocomp record` wrote")
        if self.name != "simulated" and (self.table or self.nearest):
            raise ValueError("table and nearest are for executor.name: simulated; drop them or set that name")
        return self


class TrackingConfig(Config):
    """MLflow and Optuna mirrors of the study. ``uri`` empty turns MLflow off."""

    uri: str = "sqlite:///mlflow.db"
    experiment: str = "autocomp"
    optuna: bool = True


class ValidationConfig(Config):
    """The end of a study.

    Attributes:
        audit: random feasible candidates measured to check the additive model before it is trusted.
        promote: most candidates re-measured on the selection split.
        report: most front candidates re-measured on the report split (baselines come on top).
        repeats: how often a point whose latency decides what is on the front, but lies within the noise of
            another's, is timed again at most. 0 for never.
        reference_every: after so many trials the uncompressed model is timed again, to see whether the
            device became slower or faster; never more than some 5 % of the time. 0 for never.
    """

    audit: int = Field(6, ge=0)
    promote: int = Field(24, ge=1)
    report: int = Field(16, ge=1)
    repeats: int = Field(3, ge=0)
    reference_every: int = Field(10, ge=0)


class Job(Config):
    """Everything a study needs; ``workload`` and each space are checked by their own ``Config``."""

    workload: dict[str, Any]
    space: Annotated[list[dict[str, dict[str, Any]]], Field(min_length=1)]
    objectives: Annotated[list[str], Field(min_length=1)] = ["min kl", "min decode_ms", "min memory_mb"]
    constraints: list[str] = Field(default_factory=list)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    searcher: SearcherConfig = SearcherConfig()
    sensitivity: SensitivityConfig = SensitivityConfig()
    budget: BudgetConfig = BudgetConfig()
    validation: ValidationConfig = ValidationConfig()
    executor: ExecutorConfig = ExecutorConfig()
    tracking: TrackingConfig = TrackingConfig()
    output: str = "runs"
    seed: int = 0

    @field_validator("objectives")
    @classmethod
    def _objectives_parse(cls, value: list[str]) -> list[str]:
        return [str(_readable(Objective.parse, text)) for text in value]

    @field_validator("constraints")
    @classmethod
    def _constraints_parse(cls, value: list[str]) -> list[str]:
        return [str(_readable(Constraint.parse, text)) for text in value]

    @field_validator("workload")
    @classmethod
    def _workload_config(cls, value: dict[str, Any]) -> dict[str, Any]:
        kind = value.get("kind", "causal_lm")
        try:
            config = WORKLOADS.get(kind).Config
        except JobError as error:
            raise _NestedError(f"kind = {kind!r}: {error}") from None
        rest = {k: v for k, v in value.items() if k != "kind"}
        return {"kind": kind, **_nested(config, rest, ()).model_dump(mode="json")}

    @field_validator("space")
    @classmethod
    def _space_config(cls, value: list[dict[str, dict[str, Any]]]) -> list[dict[str, dict[str, Any]]]:
        resolved = []
        for index, entry in enumerate(value):
            if len(entry) != 1:
                raise ValueError(f"entry {index} must have one key, the space's name; got {sorted(entry)}")
            ((name, options),) = entry.items()
            config = _nested(_readable(SPACES.get, name).Config, options or {}, (index, name))
            resolved.append({name: config.model_dump(mode="json")})
        return resolved

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Job:
        """Read a job file. Raises ``JobError`` for a missing file, bad YAML, or anything in it."""
        source = Path(path).expanduser()
        try:
            data = yaml.safe_load(source.read_text())
        except FileNotFoundError:
            raise JobError(f"there is no job file {str(source)!r}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise JobError(f"can't read the job file {str(source)!r}: {error}") from None
        if not isinstance(data, dict):
            raise JobError(f"{str(source)!r} must hold a mapping (workload: ..., space: ...)")
        return cls.of(data, overrides)

    @classmethod
    def of(cls, data: Mapping[str, Any] | Job, overrides: Sequence[str] = ()) -> Job:
        """Check a mapping as a job. Raises ``JobError`` that lists everything that is wrong."""
        if isinstance(data, Job):
            data = data.resolved()
        tree = apply_overrides(dict(data), overrides)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise JobError(_explain(error)) from None

    def resolved(self) -> dict[str, Any]:
        """The job with every default filled in, as plain JSON data."""
        return self.model_dump(mode="json")

    def spaces(self) -> list[Space]:
        """The kinds of compression that are searched, with their options. They load no weights."""
        found = []
        for entry in self.space:
            ((name, options),) = entry.items()
            space = SPACES.get(name)
            found.append(space(space.Config.model_validate(options)))
        return found

    def parsed_objectives(self) -> tuple[Objective, ...]:
        return tuple(Objective.parse(o) for o in self.objectives)

    def parsed_constraints(self) -> tuple[Constraint, ...]:
        return tuple(Constraint.parse(c) for c in self.constraints)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set dotted keys (``space.0.bitwidths.bits=[3,4]``); values are YAML. Returns a new tree.

    Raises:
        JobError: no ``=``, an index outside a list, or a path through a plain value.
    """
    tree = yaml.safe_load(yaml.safe_dump(tree))
    for text in overrides:
        key, separator, raw = text.partition("=")
        if not separator or not key:
            raise JobError(f"can't read the override {text!r}; write dotted.key=value")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise JobError(f"override {text!r}: the value is not YAML: {error}") from None
        node: Any = tree
        *parents, last = key.split(".")
        for part in parents:
            node = _child(node, part, text)
        if isinstance(node, list):
            node[_position(node, last, text)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise JobError(f"override {text!r}: {parents[-1]!r} holds a plain value, not a mapping")
    return tree


def _child(node: Any, part: str, text: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, text)]
    if not isinstance(node, dict):
        raise JobError(f"override {text!r}: there is nothing below {part!r}")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _position(node: list[Any], part: str, text: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise JobError(f"override {text!r}: {part!r} is no position in a list of {len(node)}")
    return int(part)


class _NestedError(ValueError):
    """Problems inside a plug-in's configuration, already in words."""


def _nested(config: type[BaseModel], data: Mapping[str, Any], where: tuple[str | int, ...]) -> BaseModel:
    try:
        return config.model_validate(dict(data))
    except ValidationError as error:
        raise _NestedError("\n".join(_lines(error, config, where))) from None


def _readable(parse: Any, text: str) -> Any:
    """Our own errors as ``ValueError``, which pydantic collects with the field's name."""
    try:
        return parse(text)
    except AutocompError as error:
        raise ValueError(str(error)) from None


def _explain(error: ValidationError) -> str:
    lines = _lines(error, Job, ())
    count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "\n  ".join([f"the job has {count}:", *lines])


def _lines(error: ValidationError, model: type[BaseModel], where: tuple[str | int, ...]) -> list[str]:
    lines = []
    for item in error.errors():
        path = (*where, *item["loc"])
        name = ".".join(map(str, path)) or "job"
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, _NestedError):
            lines += [f"{name}.{line}" for line in str(cause).split("\n")]
        elif item["type"] == "extra_forbidden":
            lines.append(f"{name}: unknown key; {_known_keys(model, item['loc'])}")
        elif item["type"] == "missing":
            lines.append(f"{name}: missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{name} = {item['input']!r}: {message}")
    return lines


def _known_keys(model: type[BaseModel], loc: tuple[str | int, ...]) -> str:
    owner: Any = model
    for part in loc[:-1]:
        field = getattr(owner, "model_fields", {}).get(part)
        owner = field.annotation if field is not None else None
    known = sorted(getattr(owner, "model_fields", {}))
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"known keys: {', '.join(known)}{hint}"
