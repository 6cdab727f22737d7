"""A worker and an executor without a model: quality is a known function of the candidate."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from autocomp.description import Description
from autocomp.executors.base import Outcome, WorkItem
from autocomp.profile import Moments, ProfileResult
from autocomp.search_spaces.base import ModelSite, Part, Resources
from autocomp.space import AdditiveTable, Candidate, Choice, Decision, SearchSpace, Value
from autocomp.trial import Estimate, Failure, Measurement

OPTIONS = ("w3g64", "w4g64", "w8", "w16")
BITS = {"w3g64": 3.0, "w4g64": 4.0, "w8": 8.0, "w16": 16.0}
LOSS = {"w3g64": 8.0, "w4g64": 2.0, "w8": 0.1, "w16": 0.0}


class FakeWorker:
    """``kl`` adds up over decisions with growing weights, ``decode_ms`` and ``memory_mb`` with the bits."""

    def __init__(self, decisions: int = 8, unexecutable: str = "", broken: str = "") -> None:
        self.names = [f"bitwidths/layer.{i}" for i in range(decisions)]
        self.unexecutable, self.broken = unexecutable, broken
        self.measured: list[tuple[str, str]] = []

    def describe(self) -> dict[str, Any]:
        decisions = tuple(
            Decision(n, Choice(OPTIONS, ordered=True), (n.partition("/")[2],), "bitwidths", i)
            for i, n in enumerate(self.names)
        )
        resources: dict[str, dict[Value, Resources]] = {
            d.name: {
                o: Resources({"memory_mb": BITS[o]}, {f"op/{o}": 1}, *self._execution(o)) for o in OPTIONS
            }
            for d in decisions
        }
        memory: dict[str, dict[Value, float]] = {d.name: {o: BITS[o] for o in OPTIONS} for d in decisions}
        bits: dict[str, dict[Value, float]] = {
            d.name: {o: BITS[o] / len(decisions) for o in OPTIONS} for d in decisions
        }
        parts = tuple(Part(d.sites[0], "linear", (8, 8), i) for i, d in enumerate(decisions))
        return Description(
            site=ModelSite("fake", parts, 0, "f" * 8),
            space=SearchSpace(decisions),
            baselines=tuple(Candidate.of(dict.fromkeys(self.names, o)) for o in reversed(OPTIONS)),
            exact={
                "memory_mb": AdditiveTable("memory_mb", 1.0, memory, exact=True),
                "avg_bits": AdditiveTable("avg_bits", 0.0, bits, exact=True),
            },
            resources=resources,
            metrics={"kl": True, "top1": False, "decode_ms": True, "memory_mb": True, "avg_bits": True},
            timing=("decode_ms",),
            profiles=("sensitivity:fisher",),
            device="fake device",
            versions={"fake": "1"},
        ).to_json()

    def _execution(self, option: str) -> tuple[str, str]:
        return ("", f"no kernel for {option}") if option == self.unexecutable else ("fake", "")

    def weight(self, index: int) -> float:
        return (index + 1) / len(self.names)

    def profile(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request["kind"] == "operations":
            rows = {
                key: dict.fromkeys(request["metrics"], (1, BITS[key[3:]], 0.0)) for key in request["keys"]
            }
            return ProfileResult("operations", rows).to_json()
        mine = list(enumerate(self.names))[request["shard"] :: request["shards"]]
        found: dict[str, dict[Value, Moments]] = {
            n: {o: (1, self.weight(i) * LOSS[o], 0.0) for o in OPTIONS} for i, n in mine
        }
        return ProfileResult(request["kind"], found).to_json()

    def measure(self, candidate: Mapping[str, Any], fidelity: Mapping[str, Any]) -> dict[str, Any]:
        if self.broken and self.broken in candidate.values() and len(set(candidate.values())) > 1:
            raise FloatingPointError("kl is nan")
        self.measured.append((Candidate.of(candidate).fingerprint, fidelity["name"]))
        kl = sum(self.weight(i) * LOSS[str(candidate[n])] for i, n in enumerate(self.names))
        size = sum(BITS[str(v)] for v in candidate.values())
        metrics = {
            "kl": Estimate(kl, 1e-6, 8),
            "top1": Estimate(1.0 - kl / 100),
            "memory_mb": Estimate(1.0 + size),
            "avg_bits": Estimate(size / len(self.names)),
        }
        if not fidelity["split"]:
            metrics = {}
        if self.unexecutable not in candidate.values():
            metrics["decode_ms"] = Estimate(5.0 + size, 1e-6, 5)
        return asdict(Measurement(metrics, "fake device", 0.01, 100))


class InlineExecutor:
    """Runs items in this process, when ``completed`` is called; ``before`` may raise (Ctrl-C)."""

    def __init__(self, worker: Any, slots: int = 2, before: Callable[[WorkItem], None] | None = None) -> None:
        self.worker, self.slots, self.before = worker, slots, before
        self.queue: deque[WorkItem] = deque()
        self.closed = False

    def submit(self, item: WorkItem) -> None:
        self.queue.append(item)

    def busy(self) -> int:
        return len(self.queue)

    def completed(self, timeout: float) -> Iterator[Outcome]:
        if not self.queue:
            return
        if self.before is not None:
            self.before(self.queue[0])
        item = self.queue.popleft()
        try:
            value = getattr(self.worker, item.method)(**item.kwargs)
            yield Outcome(item, value=value, worker="inline")
        except FloatingPointError as error:
            yield Outcome(item, failure=Failure("nan", str(error)), worker="inline")

    def close(self) -> None:
        self.closed = True
