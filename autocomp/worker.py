"""What runs on a device: holds the model and the layer bank; describes, profiles, measures, exports.

Every method takes and returns JSON-able data, so that any executor can carry it.
"""

from __future__ import annotations

import gc
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from autocomp.description import Description
from autocomp.errors import CapabilityError, ExportError, JobError
from autocomp.exporters.base import Exporter
from autocomp.job import Job
from autocomp.measure import device as devices
from autocomp.measure.quiet import computing, default_path, timing
from autocomp.objective import Constraint, Objective
from autocomp.predictors.grams import GramStore
from autocomp.profiling import METHODS, Profiler
from autocomp.quantize.bank import LayerBank, default_folder
from autocomp.registry import EXPORTERS, WORKLOADS
from autocomp.search_spaces.base import exact_tables
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
        self.spaces = self.job.spaces()
        self._prepare()
        gc.collect()
        gc.freeze()  # the model never dies: collections between timings need not walk through it

    def _prepare(self) -> None:
        site, state = self.built.site, self.built.state
        self.decisions: dict[str, list[Decision]] = {s.name: s.decisions(site) for s in self.spaces}
        state["decisions"] = self.decisions
        self._teachers: set[tuple[str, int]] = set()
        state["bank"] = LayerBank(folder=default_folder())
        if hasattr(self.workload, "inputs"):
            ids = self.workload.inputs(self.built, "calibration", self.calibration_size())
            state["hessian"] = GramStore(self.built, ids)
            state["calibration"] = f"{site.fingerprint}:{_ids_hash(ids)}"

    def calibration_size(self) -> int:
        """Sequences that profiles and error-compensated rounding use: at most what the split holds."""
        available = int(self.job.workload.get("data", {}).get("calibration", 0))
        return min(self.job.sensitivity.sequences, available) if available else self.job.sensitivity.sequences

    # -- describe ---------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The driver's picture of this job, as ``Description.to_json``.

        Raises:
            JobError: an objective or constraint names a metric for which the workload lacks something.
        """
        for metric, reason in self.workload.unavailable.items():
            if metric in self._named():
                raise JobError(f"the job asks for {metric}: {reason}")
        kind = self.device.split(":")[0]
        resources = {
            d.name: {o: s.resources(self.built.site, d, o, kind) for o in d.options}
            for s in self.spaces
            for d in self.decisions[s.name]
        }
        space, exact = self._search_space, exact_tables(self.built.site, resources)
        metrics = {**self.workload.quality_metrics, **dict.fromkeys(self.workload.timing_metrics, True)}
        metrics |= {**self.workload.counts, **dict.fromkeys(exact, True)}
        return Description(
            site=self.built.site,
            space=space,
            baselines=tuple(self._baselines(space)),
            exact=exact,
            resources=resources,
            metrics=metrics,
            timing=tuple(self.workload.timing_metrics),
            counts=tuple(self.workload.counts),
            rows=self.workload.kernel_rows(self.built),
            profiles=self._profiles(),
            device=devices.device_name(self.device, self.timing_threads()),
            versions=devices.software_versions(),
            export_limits=self._export_limits(space),
            notes=(*self._notes(), *(n for s in self.spaces for n in s.notes(self.built.site))),
        ).to_json()

    def _notes(self) -> tuple[str, ...]:
        if not self._latency_matters():
            return ()
        with computing(self.lock), cpu_threads(self.timing_threads()):
            self.restore()
            runtime, reason = self.workload.runtime(self.built)
        return (f"latency is that of the {runtime} runtime: {reason}",) if reason else ()

    def _latency_matters(self) -> bool:
        return not self._named().isdisjoint(self.workload.timing_metrics)

    def _named(self) -> set[str]:
        """Metrics of the job's objectives and constraints."""
        return {
            *(Objective.parse(o).metric for o in self.job.objectives),
            *(Constraint.parse(c).metric for c in self.job.constraints),
        }

    def _methods(self) -> tuple[str, ...]:
        """Ways to profile sensitivities: all but single changes need calibration sequences of tokens, or the
        recorded calls of a diffusion model with attention to decide."""
        if hasattr(self.workload, "inputs"):
            return METHODS
        image = any(s.profiled_by == "image_attention" for s in self.spaces)
        return ("measured", "first_order") if image else ("measured",)

    def _export_limits(self, space: SearchSpace) -> dict[str, tuple[str, ...]]:
        """Exporter -> why it can't hold the most compressed candidate; without those that can."""
        smallest = self._neutral().replace({d.name: d.options[0] for d in space if d.options})
        limits = {name: tuple(EXPORTERS.get(name)().supports(self, smallest)) for name in EXPORTERS.names()}
        return {name: reasons for name, reasons in limits.items() if reasons}

    def _profiles(self) -> tuple[str, ...]:
        """Kinds of profile: sensitivities, what single sequences give, costs around a candidate."""
        around = hasattr(self.workload, "divergence") and all(s.profiled_by for s in self.spaces)
        sequences = bool(self.workload.sequence_metrics)
        kinds = [f"sensitivity:{m}" for m in self._methods()]
        return (*kinds, *["sequences"] * sequences, *["neighbourhood"] * around)

    def checked(self, candidate: Mapping[str, Value]) -> Candidate:
        """The candidate after checking that it is in the space.

        Raises:
            SpaceError: it is not.
        """
        return self._search_space.check(Candidate.of(candidate))

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
        """Every decision at its neutral option, or at what comes nearest where that is not offered."""
        return Candidate.of(
            {d.name: s.offered_neutral(d) for s in self.spaces for d in self.decisions[s.name]}
        )

    @cached_property
    def uncompressed(self) -> Candidate:
        """Every decision at its neutral option, be it offered or not: what costs are counted from."""
        return Candidate.of({d.name: s.neutral(d) for s in self.spaces for d in self.decisions[s.name]})

    def timing_threads(self) -> int:
        scenario = self.job.workload.get("scenario", {})
        return int(scenario.get("threads") or 0) or (os.cpu_count() or 1)

    # -- profile ----------------------------------------------------------------------------------

    def profile(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run one shard of a profile; a ``ProfileResult``.

        ``request`` holds the fields of a ``ProfileRequest``; for ``operations`` also ``keys`` (kernel calls)
        and ``metrics`` (name -> tokens), for ``neighbourhood`` and ``sequences`` also ``candidate``.
        """
        return Profiler(self).run(request).to_json()

    # -- measure ----------------------------------------------------------------------------------

    def measure(self, candidate: Mapping[str, Value], fidelity: Mapping[str, Any]) -> dict[str, Any]:
        """Build, score and time one candidate, or only time it; ``asdict`` of a ``Measurement``.

        Raises:
            SpaceError: the candidate is not in the space.
            FloatingPointError: a metric is not finite.
        """
        started = time.perf_counter()
        wanted, level = self.checked(candidate), Fidelity(**fidelity)
        metrics, tokens = self._score(wanted, level) if level.split else ({}, 0)
        details: dict[str, Any] = {}
        if level.timing and not self._unexecutable(wanted):
            timed, details = self._time(wanted, thorough=level.name == "report")
            metrics |= timed
        _check_finite(metrics)
        return asdict(
            Measurement(
                metrics=metrics,
                device=devices.device_name(self.device, self.timing_threads()),
                seconds=time.perf_counter() - started,
                tokens=tokens,
                versions=devices.software_versions(),
                details=details,
            )
        )

    def _score(self, candidate: Candidate, level: Fidelity) -> tuple[dict[str, Estimate], int]:
        """Quality and exact metrics of a candidate, and the tokens scored."""
        with computing(self.lock):
            self.ensure_teacher(level)
            self.apply(candidate, serving=False)
            metrics, tokens = self.workload.score(self.built, level)
        return {**metrics, **self.workload.exact(self.built, self.exact(candidate))}, tokens

    def exact(self, candidate: Candidate) -> dict[str, Estimate]:
        """What the additive tables of bytes and the like say, before the workload's own additions."""
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
            self.apply(candidate, serving=True)
        try:
            with timing(self.lock), cpu_threads(self.timing_threads()):
                return self.workload.time(self.built, thorough=thorough)
        finally:
            self.restore()

    def apply(self, candidate: Candidate, *, serving: bool) -> None:
        """Bring the model to a candidate; ``serving`` as in ``Space.apply``."""
        for space in sorted(self.spaces, key=lambda s: s.stage):
            choices = {d.name: candidate[d.name] for d in self.decisions[space.name]}
            space.apply(self.built, choices, serving=serving)

    def restore(self) -> None:
        """Bring the model back to what was loaded, also after a failure half-way."""
        self.apply(self.uncompressed, serving=False)

    def ensure_teacher(self, fidelity: Fidelity) -> None:
        """The uncompressed model's outputs must exist before a compressed one is scored."""
        ensure = getattr(self.workload, "ensure_teacher", None)
        key = (fidelity.split, fidelity.sequences)
        if ensure is not None and key not in self._teachers:
            self.restore()
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
        wanted = self.checked(candidate)
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
            self.restore()
            exporter.export(self, candidate, folder)
            folder.rename(target)  # an empty folder there is replaced


def _check_finite(metrics: Mapping[str, Estimate]) -> None:
    for name, estimate in metrics.items():
        if not math.isfinite(estimate.value):
            raise FloatingPointError(f"{name} is {estimate.value}")


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
