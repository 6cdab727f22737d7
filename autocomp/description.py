"""What a worker tells the driver about model, space and device, as JSON: the driver never loads weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autocomp.search_spaces.base import ModelSite, Resources
from autocomp.space import (
    AdditiveTable,
    Candidate,
    SearchSpace,
    Value,
    space_from_json,
    space_to_json,
)


@dataclass(frozen=True)
class Description:
    """The driver's picture of a job.

    Attributes:
        site: the model's parts.
        space: decisions and structural constraints; options that nothing executes are still in it.
        baselines: candidates to measure in any case, the uncompressed one first.
        exact: metric -> exact additive table (``memory_mb``, ``avg_bits``).
        resources: decision -> option -> costs, kernel calls and executing backend.
        metrics: metric -> True when smaller is better: everything that a measurement will hold.
        timing: the metrics among them that need kernels (latency), hence an executing backend.
        rows: timing metrics that kernel times add up to -> rows of a kernel's input, and passes of the model
            that the metric stands for (see ``Workload.kernel_rows``).
        counts: the metrics among them that no sensitivity stands for (calls of a model, for one image).
        profiles: kinds of profile that the worker offers.
        export_limits: exporter -> reasons why it can't hold the most compressed candidate.
        device: name of the device, threads included.
        versions: software versions that a measurement depends on.
        notes: what the user should know before the search begins.
    """

    site: ModelSite
    space: SearchSpace
    baselines: tuple[Candidate, ...]
    exact: Mapping[str, AdditiveTable]
    resources: Mapping[str, Mapping[Value, Resources]]
    metrics: Mapping[str, bool]
    timing: tuple[str, ...]
    profiles: tuple[str, ...] = ()
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    export_limits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    rows: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        resources = {
            name: [[o, dict(r.metrics), dict(r.ops), r.executes, r.reason] for o, r in row.items()]
            for name, row in self.resources.items()
        }
        return {
            "site": self.site.to_json(),
            "space": space_to_json(self.space),
            "baselines": [c.to_json() for c in self.baselines],
            "exact": {m: t.to_json() for m, t in self.exact.items()},
            "resources": resources,
            "metrics": dict(self.metrics),
            "timing": list(self.timing),
            "profiles": list(self.profiles),
            "device": self.device,
            "versions": dict(self.versions),
            "export_limits": {k: list(v) for k, v in self.export_limits.items()},
            "notes": list(self.notes),
            "counts": list(self.counts),
            "rows": {metric: list(row) for metric, row in self.rows.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Description:
        resources = {
            name: {o: Resources(m, ops, executes, reason) for o, m, ops, executes, reason in row}
            for name, row in data["resources"].items()
        }
        return cls(
            site=ModelSite.from_json(data["site"]),
            space=space_from_json(data["space"]),
            baselines=tuple(Candidate.of(c) for c in data["baselines"]),
            exact={m: AdditiveTable.from_json(t) for m, t in data["exact"].items()},
            resources=resources,
            metrics=data["metrics"],
            timing=tuple(data["timing"]),
            profiles=tuple(data["profiles"]),
            device=data["device"],
            versions=data["versions"],
            export_limits={k: tuple(v) for k, v in data["export_limits"].items()},
            notes=tuple(data.get("notes", ())),
            counts=tuple(data.get("counts", ())),
            rows={metric: (rows, passes) for metric, (rows, passes) in data.get("rows", {}).items()},
        )
