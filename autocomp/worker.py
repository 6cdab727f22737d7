"""What runs on a device: holds the model and the layer bank; describes, profiles, measures, exports.

Every method takes and returns JSON-able data, so that any executor can carry it.
"""

from __future__ import annotations

import gc
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from autocomp.description import Description
from autocomp.errors import CapabilityError, ExportError
from autocomp.exporters.base import Exporter
from autocomp.job import Job
from autocomp.measure import device as devices
from autocomp.measure.quiet import computing, default_path, timing
from autocomp.objective import Constraint, Objective
from autocomp.predictors import influence, sensitivity
from autocomp.predictors.grams import GramStore
from autocomp.profile import ProfileRequest, ProfileResult
from autocomp.quantize.bank import LayerBank, default_folder
from autocomp.registry import EXPORTERS, SPACES, WORKLOADS
from autocomp.search_spaces.base import Part, Space, exact_tables
from autocomp.space import AdditiveTable, Candidate, Decision, SearchSpace, Value
from autocomp.trial import Estimate, Fidelity, Measurement
from autocomp.workloads.base import Built, Workload
from autocomp.workloads.serving import cpu_threads


class ModelWorker:
    """A loaded model with its spaces. Long-lived: one a device.

    Args:
        job: resolved job.
        threads: CPU threads for everything but timings (those follow the scenario).
    """

    def __init__(self, job: Mapping[str, Any], threads: int = 1) -> None:
        self.job = Job.of(job)
        self.threads = threads
        devices.set_threads(threads)
        self.device = _device(self.job.device)
        self.lock = _lock_path(self.device)
        options = dict(self.job.workload)
        workload = WORKLOADS.get(options.pop("kind"))
        self.workload: Workload = workload(workload.Config.model_validate(options), seed=self.job.seed)
        with computing(self.lock):
            self.built: Built = self.workload.load(self.device)
        self.spaces = _spaces(self.job)
        self._prepare()
        gc.collect()
        gc.freeze()  # the model never dies: collections between timings need not walk through it

    def _prepare(self) -> None:
        site, state = self.built.site, self.built.state
        self.decisions: dict[str, list[Decision]] = {s.name: s.decisions(site) for s in self.spaces}
        state["decisions"] = self.decisions
        self._teachers: set[tuple[str, int]] = set()
        self._profile_teacher = False
        state["bank"] = LayerBank(folder=default_folder())
        if hasattr(self.workload, "inputs"):
            ids = self.workload.inputs(self.built, "calibration", self._calibration_size())
            state["hessian"] = GramStore(self.built, ids)
            state["calibration"] = f"{site.fingerprint}:{_ids_hash(ids)}"

    def _calibration_size(self) -> int:
        """Sequences that profiles and error-compensated rounding use: at most what the split holds."""
        available = int(self.job.workload.get("data", {}).get("calibration", 0))
        return min(self.job.sensitivity.sequences, available) if available else self.job.sensitivity.sequences

    # -- describe ---------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The driver's picture of this job, as ``Description.to_json``."""
        kind = self.device.split(":")[0]
        resources = {
            d.name: {o: s.resources(self.built.site, d, o, kind) for o in d.options}
            for s in self.spaces
            for d in self.decisions[s.name]
        }
        space, exact = self._search_space, exact_tables(self.built.site, resources)
        metrics = {**self.workload.quality_metrics, **dict.fromkeys(self.workload.timing_metrics, True)}
        metrics |= dict.fromkeys(exact, True)
        return Description(
            site=self.built.site,
            space=space,
            baselines=tuple(self._baselines(space)),
            exact=exact,
            resources=resources,
            metrics=metrics,
            timing=tuple(self.workload.timing_metrics),
            profiles=(*(f"sensitivity:{m}" for m in sensitivity.METHODS), *self._local_profiles()),
            device=devices.device_name(self.device, self._timing_threads()),
            versions=devices.software_versions(),
            export_limits=self._export_limits(space),
            notes=self._notes(),
        ).to_json()

    def _notes(self) -> tuple[str, ...]:
        if not self._latency_matters():
            return ()
        with computing(self.lock), cpu_threads(self._timing_threads()):
            self._restore()
            runtime, reason = self.workload.runtime(self.built)
        return (f"latency is that of the {runtime} runtime: {reason}",) if reason else ()

    def _latency_matters(self) -> bool:
        named = {
            *(Objective.parse(o).metric for o in self.job.objectives),
            *(Constraint.parse(c).metric for c in self.job.constraints),
        }
        return not named.isdisjoint(self.workload.timing_metrics)

    def _export_limits(self, space: SearchSpace) -> dict[str, tuple[str, ...]]:
        """Exporter -> why it can't hold the most compressed candidate; without those that can."""
        smallest = Candidate.of({d.name: d.options[0] for d in space if d.options})
        limits = {name: tuple(EXPORTERS.get(name)().supports(self, smallest)) for name in EXPORTERS.names()}
        return {name: reasons for name, reasons in limits.items() if reasons}

    def _local_profiles(self) -> tuple[str, ...]:
        able = hasattr(self.workload, "divergence") and all(s.profiled_by for s in self.spaces)
        return ("neighbourhood",) if able else ()

    @cached_property
    def _search_space(self) -> SearchSpace:
        decisions = [d for s in self.spaces for d in self.decisions[s.name]]
        constraints = [c for s in self.spaces for c in s.constraints(self.built.site, self.decisions[s.name])]
        return SearchSpace(tuple(decisions), tuple(constraints))

    def _baselines(self, space: SearchSpace) -> Iterator[Candidate]:
        """The uncompressed model where it is in the space, then every uniform assignment."""
        neutral = self._neutral()
        yield neutral
        for s in self.spaces:
            for part in s.baselines(self.built.site, self.decisions[s.name]):
                candidate = neutral.replace(part.values)
                if candidate != neutral and not space.violations(candidate):
                    yield candidate

    def _neutral(self) -> Candidate:
        """Every decision at its neutral option, or at its largest where the neutral one is not offered."""
        by_name, whole = self._search_space.by_name, self._uncompressed.values
        offered = {
            n: v if by_name[n].domain.contains(v) else by_name[n].options[-1] for n, v in whole.items()
        }
        return Candidate.of(offered)

    @cached_property
    def _uncompressed(self) -> Candidate:
        """Every decision at its neutral option, be it offered or not: what costs are counted from."""
        return Candidate.of({d.name: s.neutral(d) for s in self.spaces for d in self.decisions[s.name]})

    def _timing_threads(self) -> int:
        scenario = self.job.workload.get("scenario", {})
        return int(scenario.get("threads") or 0) or (os.cpu_count() or 1)

    # -- profile ----------------------------------------------------------------------------------

    def profile(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run one shard of a profile; a ``ProfileResult``.

        ``request`` holds the fields of a ``ProfileRequest``; for ``operations`` also ``keys`` (kernel calls)
        and ``metrics`` (name -> tokens), for ``neighbourhood`` also ``candidate``.
        """
        wanted = ProfileRequest(request["kind"], request["shard"], request["shards"])
        if wanted.kind == "neighbourhood":
            with computing(self.lock):
                return self._neighbourhood(wanted, Candidate.of(request["candidate"])).to_json()
        if wanted.kind == "operations":
            return self._operations(wanted, request["keys"], request["metrics"]).to_json()
        method = wanted.kind.partition(":")[2]
        if method not in sensitivity.METHODS:
            raise CapabilityError(f"unknown profile {wanted.kind!r}; known: {sensitivity.METHODS}")
        with computing(self.lock):
            self._restore()
            return self._sensitivity(method, wanted).to_json()

    def _sensitivity(self, method: str, request: ProfileRequest) -> ProfileResult:
        """Each space's own way to profile where the method has one; otherwise single changes are measured."""
        weights, attention = self._profiled_by("weights"), self._profiled_by("attention")
        rest = self._profiled_by("")
        folds = max(1, 4 // request.shards)
        results = [ProfileResult(request.kind, {})]
        if method in sensitivity.GRADIENT_METHODS and weights:
            ids = self.workload.inputs(self.built, "calibration", self._calibration_size())  # type: ignore[attr-defined]
            mine = ids[request.shard :: request.shards]
            results.append(
                sensitivity.gradient_sensitivity(
                    self.built, mine, weights, self._delta, method=method, folds=folds
                )
            )
        elif method == "activation":
            some, gram = weights[request.shard :: request.shards], self.built.state["hessian"]
            results.append(sensitivity.activation_sensitivity(self.built, some, self._delta, gram))
        else:
            rest = [*weights, *rest]
        if method in influence.METHODS and attention:
            results.append(self._influence(method, request, attention, folds))
        else:
            rest = [*rest, *attention]
        mine_decisions = rest[request.shard :: request.shards]
        if mine_decisions:
            results.append(sensitivity.measured_sensitivity(mine_decisions, self._single_change))
        return ProfileResult.merge([replace(r, kind=request.kind) for r in results])

    def _profiled_by(self, way: str) -> list[Decision]:
        return [d for s in self.spaces if s.profiled_by == way for d in self.decisions[s.name]]

    def _delta(self, part: Part, option: Value) -> torch.Tensor | None:
        return self._move(part, self._uncompressed[self._decision_of[part.path].name], option)

    def _move(self, part: Part, here: Value, there: Value) -> torch.Tensor | None:
        owner = self._decision_of[part.path].space
        for s in self.spaces:
            if hasattr(s, "move") and s.name == owner:
                found: torch.Tensor | None = s.move(self.built, part, here, there)
                return found
        raise CapabilityError(
            f"no space gives weight changes for {part.path}; use sensitivity.method: measured"
        )

    @cached_property
    def _decision_of(self) -> Mapping[str, Decision]:
        """Path of a part -> the decision that changes it."""
        return {path: d for row in self.decisions.values() for d in row for path in d.sites}

    def _influence(
        self, method: str, request: ProfileRequest, decisions: Sequence[Decision], folds: int
    ) -> ProfileResult:
        """Sensitivities of the key/value heads, from this shard's sequences of every profiled length."""
        started = time.perf_counter()
        rows = influence.attention_sensitivity(
            self.built,
            self._batches(request),
            decisions,
            self._uncompressed.values,
            method=method,
            folds=folds,
        )
        return ProfileResult(request.kind, rows, time.perf_counter() - started)

    def _batches(self, request: ProfileRequest) -> dict[int, tuple[torch.Tensor, torch.Tensor | None]]:
        """This shard's part of the workload's sequences for profiles of attention."""
        workload: Any = self.workload
        mine = slice(request.shard, None, request.shards)
        return {
            length: (ids[mine], None if mask is None else mask[mine])
            for length, (ids, mask) in workload.profile_batches(self.built).items()
        }

    def _neighbourhood(self, request: ProfileRequest, candidate: Candidate) -> ProfileResult:
        """Costs of leaving ``candidate``, from this shard's calibration sequences."""
        weights, attention = self._profiled_by("weights"), self._profiled_by("attention")
        results = [ProfileResult(request.kind, {})]
        if weights:
            results.append(self._weights_around(request, candidate, weights))
        if attention:
            results.append(self._attention_around(request, candidate, attention, base=not weights))
        return ProfileResult.merge(results)

    def _weights_around(
        self, request: ProfileRequest, candidate: Candidate, decisions: Sequence[Decision]
    ) -> ProfileResult:
        size = self._calibration_size()
        level = Fidelity("sensitivity", "calibration", size, timing=False)
        self._ensure_teacher(level)
        self._apply(candidate, serving=False)
        positions = list(range(size))[request.shard :: request.shards]
        workload: Any = self.workload
        return sensitivity.neighbourhood_sensitivity(
            self.built,
            workload.inputs(self.built, "calibration", size)[positions],
            decisions,
            candidate.values,
            self._move,
            lambda logits, index: workload.divergence(self.built, "calibration", logits, index),
            positions=positions,
            folds=max(1, 2 // request.shards),
        )

    def _attention_around(
        self, request: ProfileRequest, candidate: Candidate, decisions: Sequence[Decision], *, base: bool
    ) -> ProfileResult:
        """``base``: keep the rows with the KL itself; otherwise the weights' profile has them."""
        started = time.perf_counter()
        workload: Any = self.workload
        if not self._profile_teacher:
            self._restore()
            workload.ensure_profile_teacher(self.built)
            self._profile_teacher = True
        self._apply(candidate, serving=False)

        def divergence(logits: torch.Tensor, length: int, row: int) -> torch.Tensor:
            index = request.shard + row * request.shards
            found: torch.Tensor = workload.profile_divergence(self.built, logits, length, index)
            return found

        folds = max(1, 2 // request.shards)
        rows = influence.attention_neighbourhood(
            self.built, self._batches(request), decisions, candidate.values, divergence, folds=folds
        )
        kept = {n: row for n, row in rows.items() if base or n.partition("@")[0] != sensitivity.BASE}
        return ProfileResult(request.kind, kept, time.perf_counter() - started)

    def _single_change(self, name: str, option: Value) -> tuple[float, int]:
        fidelity = Fidelity("sensitivity", "calibration", self._calibration_size(), timing=False)
        self._ensure_teacher(fidelity)
        self._apply(self._uncompressed.replace({name: option}), serving=False)
        metrics, _ = self.workload.score(self.built, fidelity)
        return metrics["kl"].value, metrics["kl"].n

    def _operations(
        self, request: ProfileRequest, keys: Sequence[str], metrics: Mapping[str, int]
    ) -> ProfileResult:
        """Time kernel calls: one row a key; the option is the metric whose token count was used."""
        from autocomp.measure.op_table import time_op

        started = time.perf_counter()
        rows: dict[str, dict[Value, tuple[int, float, float]]] = {}
        dtype = self.built.model.dtype
        assert isinstance(dtype, torch.dtype)
        with timing(self.lock), cpu_threads(self._timing_threads()):
            lean = self.workload.runtime(self.built)[0] == "lean"
            for key in keys[request.shard :: request.shards]:
                for metric, tokens in metrics.items():
                    found = time_op(key, tokens, dtype, self.device, lean=lean)
                    n, m, s = found.n, found.median_ms, found.stderr_ms
                    rows.setdefault(key, {})[metric] = (n, n * m, n * (m * m + (n - 1) * s * s))
        return ProfileResult(request.kind, rows, time.perf_counter() - started)

    # -- measure ----------------------------------------------------------------------------------

    def measure(self, candidate: Mapping[str, Value], fidelity: Mapping[str, Any]) -> dict[str, Any]:
        """Build, score and time one candidate; ``asdict`` of a ``Measurement``.

        Raises:
            SpaceError: the candidate is not in the space.
            FloatingPointError: a metric is not finite.
        """
        started = time.perf_counter()
        wanted, level = Candidate.of(candidate), Fidelity(**fidelity)
        self._search_space.check(wanted)
        with computing(self.lock):
            self._ensure_teacher(level)
            self._apply(wanted, serving=False)
            metrics, tokens = self.workload.score(self.built, level)
        metrics |= self._exact(wanted)
        details: dict[str, Any] = {}
        if level.timing and not self._unexecutable(wanted):
            timed, details = self._time(wanted, thorough=level.name == "report")
            metrics |= timed
        _check_finite(metrics)
        return asdict(
            Measurement(
                metrics=metrics,
                device=devices.device_name(self.device, self._timing_threads()),
                seconds=time.perf_counter() - started,
                tokens=tokens,
                versions=devices.software_versions(),
                details=details,
            )
        )

    def _exact(self, candidate: Candidate) -> dict[str, Estimate]:
        return {m: Estimate(t.total(candidate)) for m, t in self._tables.items()}

    @cached_property
    def _tables(self) -> Mapping[str, AdditiveTable]:
        return Description.from_json(self.describe()).exact

    def _unexecutable(self, candidate: Candidate) -> list[str]:
        kind = self.device.split(":")[0]
        return [
            found.reason
            for s in self.spaces
            for d in self.decisions[s.name]
            for found in [s.resources(self.built.site, d, candidate[d.name], kind)]
            if not found.executes
        ]

    def _time(self, candidate: Candidate, *, thorough: bool) -> tuple[dict[str, Estimate], dict[str, Any]]:
        with computing(self.lock):
            self._apply(candidate, serving=True)
        try:
            with timing(self.lock), cpu_threads(self._timing_threads()):
                return self.workload.time(self.built, thorough=thorough)
        finally:
            self._restore()

    def _apply(self, candidate: Candidate, *, serving: bool) -> None:
        for space in sorted(self.spaces, key=lambda s: s.stage):
            choices = {d.name: candidate[d.name] for d in self.decisions[space.name]}
            space.apply(self.built, choices, serving=serving)

    def _restore(self) -> None:
        self._apply(self._uncompressed, serving=False)

    def _ensure_teacher(self, fidelity: Fidelity) -> None:
        """The uncompressed model's outputs must exist before a compressed one is scored."""
        ensure = getattr(self.workload, "ensure_teacher", None)
        key = (fidelity.split, fidelity.sequences)
        if ensure is not None and key not in self._teachers:
            self._restore()
            ensure(self.built, *key)
            self._teachers.add(key)

    # -- export -----------------------------------------------------------------------------------

    def export(self, candidate: Mapping[str, Value], format: str, out: str) -> dict[str, Any]:
        """Write a candidate to a folder.

        Raises:
            SpaceError: the candidate is not in the space.
            ExportError: the format can't hold it (with every reason), ``out`` is not an empty or new folder,
                or it can't be written to.
        """
        wanted = self._search_space.check(Candidate.of(candidate))
        exporter = EXPORTERS.get(format)()
        reasons = exporter.supports(self, wanted)
        if reasons:
            raise ExportError(f"format {format!r} can't hold this candidate: " + "; ".join(reasons))
        target = Path(out).expanduser()
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise ExportError(f"{out!r} is not an empty folder; choose a new one")
        try:
            with computing(self.lock):
                self._write(exporter, wanted, target)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"can't write the export to {out!r}: {error}") from error
        return {"folder": str(target), "format": format}

    def _write(self, exporter: Exporter, candidate: Candidate, target: Path) -> None:
        # Written beside the target and renamed, so that a crash never leaves half an export behind.
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".autocomp-") as temporary:
            folder = Path(temporary) / "export"
            folder.mkdir()
            self._restore()
            exporter.export(self, candidate, folder)
            folder.rename(target)  # an empty folder there is replaced


def _check_finite(metrics: Mapping[str, Estimate]) -> None:
    for name, estimate in metrics.items():
        if not math.isfinite(estimate.value):
            raise FloatingPointError(f"{name} is {estimate.value}")


def _spaces(job: Job) -> list[Space]:
    found = []
    for entry in job.space:
        ((name, options),) = entry.items()
        space = SPACES.get(name)
        found.append(space(space.Config.model_validate(options)))
    return found


def _device(wanted: str) -> str:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise CapabilityError(
            "device: cuda was asked for, but torch sees no CUDA device (see `autocomp doctor`)"
        )
    return "cuda:0" if available and wanted != "cpu" else "cpu"


def _lock_path(device: str) -> Path:
    """One lock a device of this machine: workers of different runs must not disturb each other's timings."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if device.startswith("cuda") else ""
    path = default_path()
    return path.with_name("-".join(filter(None, [path.name, device.replace(":", ""), visible])))


def _ids_hash(ids: torch.Tensor) -> str:
    from autocomp.quantize.bank import tensor_hash

    return tensor_hash(ids)


@contextmanager
def open_worker(job: Job, threads: int = 0) -> Iterator[ModelWorker]:
    """A worker in this process, for one-off measuring and export."""
    try:
        yield ModelWorker(job.resolved(), threads or (os.cpu_count() or 1))
    finally:
        gc.unfreeze()  # this process lives on
