"""What a worker does for a profile: sensitivities of weights and attention, and times of kernel calls."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from autocomp.errors import CapabilityError
from autocomp.measure.quiet import computing, timing
from autocomp.predictors import influence, sensitivity
from autocomp.profile import ProfileRequest, ProfileResult
from autocomp.search_spaces.base import Part
from autocomp.space import Candidate, Decision, Value
from autocomp.trial import Estimate, Fidelity
from autocomp.workloads.serving import cpu_threads

if TYPE_CHECKING:
    from autocomp.worker import ModelWorker

METHODS = tuple(dict.fromkeys((*sensitivity.METHODS, *influence.METHODS)))
"""Of sensitivities. A space that has no way of its own for a method gets single changes measured."""


class Profiler:
    """Profiles one worker's model. Nothing is kept between requests."""

    def __init__(self, worker: ModelWorker) -> None:
        self.worker, self.built, self.decisions = worker, worker.built, worker.decisions
        self.workload: Any = worker.workload

    def run(self, request: Mapping[str, Any]) -> ProfileResult:
        """One shard of a profile; see ``ModelWorker.profile``.

        Raises:
            CapabilityError: a kind of profile that is unknown or that the workload does not have.
        """
        wanted = ProfileRequest(request["kind"], request["shard"], request["shards"])
        if wanted.kind == "neighbourhood":
            with computing(self.worker.lock):
                return self._neighbourhood(wanted, Candidate.of(request["candidate"]))
        if wanted.kind == "sequences":
            with computing(self.worker.lock):
                return self._sequences(wanted, self.worker.checked(request["candidate"]))
        if wanted.kind == "operations":
            return self._operations(wanted, request["keys"], request["metrics"])
        method = wanted.kind.partition(":")[2]
        if method not in METHODS:
            raise CapabilityError(f"unknown profile {wanted.kind!r}; known: {METHODS}")
        with computing(self.worker.lock):
            self.worker.restore()
            return self._sensitivity(method, wanted)

    def _sensitivity(self, method: str, request: ProfileRequest) -> ProfileResult:
        """Each space's own way to profile where the method has one; otherwise single changes are measured."""
        weights, attention = self._profiled_by("weights"), self._profiled_by("attention")
        rest = self._profiled_by("")
        image = self._profiled_by("image_attention")
        folds = max(1, 4 // request.shards)
        results = [ProfileResult(request.kind, {})]
        if method == "first_order" and image:
            results.append(self._image_attention(request))
        else:
            rest = [*rest, *image]
        if method in sensitivity.GRADIENT_METHODS and weights and hasattr(self.workload, "inputs"):
            ids = self.workload.inputs(self.built, "calibration", self.worker.calibration_size())
            mine = ids[request.shard :: request.shards]
            results.append(
                sensitivity.gradient_sensitivity(
                    self.built, mine, weights, self.delta, method=method, folds=folds
                )
            )
        elif method == "activation":
            some, gram = weights[request.shard :: request.shards], self.built.state["hessian"]
            results.append(sensitivity.activation_sensitivity(self.built, some, self.delta, gram))
        else:
            rest = [*weights, *rest]
        if method in influence.METHODS and attention:
            results.append(self._influence(method, request, attention, folds))
        else:
            rest = [*rest, *attention]
        mine_decisions = rest[request.shard :: request.shards]
        if mine_decisions:
            results += self._measured(mine_decisions)
        return ProfileResult.merge([replace(r, kind=request.kind) for r in results])

    def _image_attention(self, request: ProfileRequest) -> ProfileResult:
        """What attention rules add to a diffusion model's output, from this shard's decisions."""
        from autocomp.predictors.image_influence import attention_influence

        started = time.perf_counter()
        size = self.worker.calibration_size()
        self.worker.ensure_teacher(Fidelity("sensitivity", "calibration", size, timing=False))
        self.worker.restore()
        questions = [
            s.question(self.built.site, d)  # type: ignore[attr-defined]
            for s in self.worker.spaces
            if s.profiled_by == "image_attention"
            for d in self.decisions[s.name][request.shard :: request.shards]
        ]
        calls = self.built.state["trajectories"].batches
        rows = attention_influence(self.built.state["denoisers"][""], calls, questions) if questions else {}
        return ProfileResult(request.kind, rows, time.perf_counter() - started)

    def _sequences(self, request: ProfileRequest, candidate: Candidate) -> ProfileResult:
        """What every sequence of the proxy split gives for a candidate: rows by metric, options are positions
        in the split. ``details`` holds what identifies the sequences, as ``data``.

        Raises:
            CapabilityError: see ``Workload.sequence_values``.
        """
        started = time.perf_counter()
        self.worker.ensure_teacher(Fidelity("sequences", "proxy", timing=False))
        self.worker.apply(candidate, serving=False)
        values, facts = self.workload.sequence_values(self.built)
        rows: dict[str, dict[Value, tuple[int, float, float]]] = {
            metric: {i: (1, v, v * v) for i, v in enumerate(row)} for metric, row in values.items()
        }
        return ProfileResult(request.kind, rows, time.perf_counter() - started, {"data": facts})

    def _profiled_by(self, way: str) -> list[Decision]:
        return [d for s in self.worker.spaces if s.profiled_by == way for d in self.decisions[s.name]]

    def delta(self, part: Part, option: Value) -> torch.Tensor | None:
        """Change of a part's weight from the uncompressed one; see ``move``."""
        return self.move(part, self.worker.uncompressed[self._decision_of[part.path].name], option)

    def move(self, part: Part, here: Value, there: Value) -> torch.Tensor | None:
        """Change of a part's weight from one option to another, float32 ``[out, in]``; ``None`` for none.

        Raises:
            CapabilityError: the part's space doesn't change weights.
        """
        owner = self._decision_of[part.path].space
        for s in self.worker.spaces:
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
            self.worker.uncompressed.values,
            method=method,
            folds=folds,
        )
        return ProfileResult(request.kind, rows, time.perf_counter() - started)

    def _batches(self, request: ProfileRequest) -> dict[int, tuple[torch.Tensor, torch.Tensor | None]]:
        """This shard's part of the workload's sequences for profiles of attention."""
        mine = slice(request.shard, None, request.shards)
        return {
            length: (ids[mine], None if mask is None else mask[mine])
            for length, (ids, mask) in self.workload.profile_batches(self.built).items()
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
        size = self.worker.calibration_size()
        level = Fidelity("sensitivity", "calibration", size, timing=False)
        self.worker.ensure_teacher(level)
        self.worker.apply(candidate, serving=False)
        positions = list(range(size))[request.shard :: request.shards]
        return sensitivity.neighbourhood_sensitivity(
            self.built,
            self.workload.inputs(self.built, "calibration", size)[positions],
            decisions,
            candidate.values,
            self.move,
            lambda logits, index: self.workload.divergence(self.built, "calibration", logits, index),
            positions=positions,
            folds=max(1, 2 // request.shards),
        )

    def _attention_around(
        self, request: ProfileRequest, candidate: Candidate, decisions: Sequence[Decision], *, base: bool
    ) -> ProfileResult:
        """``base``: keep the rows with the KL itself; otherwise the weights' profile has them."""
        started = time.perf_counter()
        self.worker.restore()  # the first time, the uncompressed model's outputs are recorded
        self.workload.ensure_profile_teacher(self.built)
        self.worker.apply(candidate, serving=False)

        def divergence(logits: torch.Tensor, length: int, row: int) -> torch.Tensor:
            index = request.shard + row * request.shards
            found: torch.Tensor = self.workload.profile_divergence(self.built, logits, length, index)
            return found

        folds = max(1, 2 // request.shards)
        rows = influence.attention_neighbourhood(
            self.built, self._batches(request), decisions, candidate.values, divergence, folds=folds
        )
        kept = {n: row for n, row in rows.items() if base or n.partition("@")[0] != sensitivity.BASE}
        return ProfileResult(request.kind, kept, time.perf_counter() - started)

    def _measured(self, decisions: Sequence[Decision]) -> list[ProfileResult]:
        """Losses of single changes: rows ``{decision}`` for the workload's first sensitivity metric, and
        ``{decision}@{metric}`` for the metrics that the others stand for."""
        scores = {(d.name, o): self._single_change(d.name, o) for d in decisions for o in d.options}
        results = []
        for i, metric in enumerate(self.workload.sensitivity_metrics):

            def loss(name: str, option: Value, metric: str = metric) -> tuple[float, int]:
                found = scores[name, option][metric]
                return found.value, found.n

            result = sensitivity.measured_sensitivity(decisions, loss)
            end = f"@{metric.removesuffix('_loss')}" if i else ""
            results.append(replace(result, rows={name + end: row for name, row in result.rows.items()}))
        return results

    def _single_change(self, name: str, option: Value) -> Mapping[str, Estimate]:
        fidelity = Fidelity("sensitivity", "calibration", self.worker.calibration_size(), timing=False)
        self.worker.ensure_teacher(fidelity)
        self.worker.apply(self.worker.uncompressed.replace({name: option}), serving=False)
        metrics, _ = self.workload.score(self.built, fidelity)
        return metrics

    def _operations(
        self, request: ProfileRequest, keys: Sequence[str], metrics: Mapping[str, int]
    ) -> ProfileResult:
        """Time kernel calls: one row a key; the option is the metric whose token count was used."""
        from autocomp.measure.op_table import time_op

        started = time.perf_counter()
        rows: dict[str, dict[Value, tuple[int, float, float]]] = {}
        dtype = self.built.model.dtype
        assert isinstance(dtype, torch.dtype)
        with timing(self.worker.lock), cpu_threads(self.worker.timing_threads()):
            lean = self.workload.runtime(self.built)[0] == "lean"
            for key in keys[request.shard :: request.shards]:
                for metric, tokens in metrics.items():
                    found = time_op(key, tokens, dtype, self.worker.device, lean=lean)
                    n, m, s = found.n, found.median_ms, found.stderr_ms
                    rows.setdefault(key, {})[metric] = (n, n * m, n * (m * m + (n - 1) * s * s))
        return ProfileResult(request.kind, rows, time.perf_counter() - started)
