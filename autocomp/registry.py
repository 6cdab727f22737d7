"""Named plug-ins: built-in ones are imported on first use, third-party ones come from entry points.

A package adds a searcher with, in its pyproject.toml::

    [project.entry-points."autocomp.searchers"]
    mine = "my_package.module:MySearcher"
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from autocomp.errors import JobError


class Registry:
    """Name -> object, loaded lazily from ``"module:attribute"``.

    Args:
        kind: what it holds, for messages and the entry-point group (``autocomp.<kind>s``).
        builtin: name -> ``"module:attribute"``.
    """

    def __init__(self, kind: str, builtin: dict[str, str]) -> None:
        self.kind = kind
        self._targets = dict(builtin)

    def names(self) -> list[str]:
        found = {e.name for e in entry_points(group=f"autocomp.{self.kind}s")}
        return sorted(found | set(self._targets))

    def check(self, name: str) -> str:
        """``name`` when it is registered, without importing it; raises ``JobError`` as ``get`` does."""
        return name if name in self.names() else self.get(name)

    def get(self, name: str) -> Any:
        """The registered object.

        Raises:
            JobError: nobody registered ``name``; the message lists the names that exist.
        """
        if name in self._targets:
            module, _, attribute = self._targets[name].partition(":")
            return getattr(import_module(module), attribute)
        for entry in entry_points(group=f"autocomp.{self.kind}s"):
            if entry.name == name:
                return entry.load()
        close = difflib.get_close_matches(name, self.names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise JobError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}.{hint}")


SEARCHERS = Registry(
    "searcher",
    {
        "epsilon": "autocomp.searchers.epsilon:EpsilonSearcher",
        "evolution": "autocomp.searchers.evolution:EvolutionSearcher",
        "exhaustive": "autocomp.searchers.exhaustive:ExhaustiveSearcher",
        "hybrid": "autocomp.searchers.hybrid:HybridSearcher",
        "ilp": "autocomp.searchers.ilp:IlpSearcher",
        "optuna": "autocomp.searchers.optuna:OptunaSearcher",
        "random": "autocomp.searchers.random:RandomSearcher",
    },
)
EXECUTORS = Registry(
    "executor",
    {
        "local": "autocomp.executors.local:LocalExecutor",
        "ray": "autocomp.executors.ray:RayExecutor",
        "simulated": "autocomp.recorded:replay_executor",
    },
)
WORKLOADS = Registry(
    "workload",
    {
        "causal_lm": "autocomp.workloads.causal_lm:CausalLM",
        "diffusion": "autocomp.workloads.diffusion:Diffusion",
        "long_context": "autocomp.workloads.long_context:LongContext",
    },
)
SPACES = Registry(
    "space",
    {
        "activations": "autocomp.search_spaces.activations:Activations",
        "attention": "autocomp.search_spaces.attention:Attention",
        "bitwidths": "autocomp.search_spaces.bitwidths:Bitwidths",
        "checkpoints": "autocomp.search_spaces.checkpoints:Checkpoints",
        "diffusion_attention": "autocomp.search_spaces.diffusion_attention:DiffusionAttention",
        "schedules": "autocomp.search_spaces.schedules:Schedules",
    },
)
EXPORTERS = Registry(
    "exporter",
    {
        "compressed-tensors": "autocomp.exporters.compressed_tensors:CompressedTensorsExporter",
        "diffusers": "autocomp.exporters.diffusers:DiffusersExporter",
        "native": "autocomp.exporters.native:NativeExporter",
    },
)
TRACKERS = Registry(
    "tracker",
    {
        "mlflow": "autocomp.tracking.mlflow:MlflowTracker",
        "none": "autocomp.tracking.base:NullTracker",
        "optuna": "autocomp.tracking.optuna:OptunaTracker",
    },
)
