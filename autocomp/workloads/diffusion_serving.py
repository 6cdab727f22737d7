"""Latency and memory of a whole sampling in the deployment scenario."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from autocomp.diffusion.attention import installed
from autocomp.diffusion.schedule import Schedule
from autocomp.measure.device import conditions
from autocomp.measure.memory import peak_memory, weights_bytes
from autocomp.measure.timing import time_calls
from autocomp.quantize.scheme import Scheme
from autocomp.trial import Estimate
from autocomp.workloads.base import Built
from autocomp.workloads.serving import cpu_threads

WARMUP = 1
DENSE = "w16"


@contextmanager
def zoo_serving(built: Built, names: Sequence[str]) -> Iterator[None]:
    """The named zoo members run on the kernels that will serve them; before and after, they compute the
    dequantized weights."""
    from autocomp.search_spaces.weights import WeightSwapper

    members = [built.state["zoo"][n] for n in names if n]
    packed = [m for m in members if "labels" in m.state]
    try:
        for member in packed:
            WeightSwapper.of(member).apply(member.state["labels"], method="rtn", serving=True)
        yield
    finally:
        for member in packed:
            WeightSwapper.of(member).apply(member.state["labels"], method="rtn", serving=False)


def stored_bytes(member: Built) -> int:
    """Bytes of a zoo member's weights as its scheme packs them, and of everything else in it."""
    site, labels = member.site, member.state.get("labels", {})
    packed = 0
    for part in site.parts:
        if not part.shared_with:
            scheme = Scheme.parse(labels.get(part.path, DENSE))
            dense = site.itemsize * part.numel
            packed += dense if scheme.is_dense else scheme.weight_bytes(*part.shape)
    return packed + site.other_bytes


def attention_bytes(built: Built, schedule: Schedule, batch: int) -> int:
    """The most that the own model's attention plan holds between two steps of ``schedule``."""
    plan, site = installed(built.model), built.site
    if plan is None:
        return 0
    shapes = {p.path: (p.shape[0], p.shape[1], sum(p.shape[2:])) for p in site.image_attention}
    rows = batch * (2 if site.guided and any(s.guidance for s in schedule.steps) else 1)
    return plan.held_bytes(shapes, len(schedule), rows, site.itemsize)


def measure(
    built: Built, schedule: Schedule, sample: Callable[[], Any], *, batch: int, threads: int, repeats: int
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Time ``sample`` (one whole sampling of ``batch`` images by ``schedule``): the timing metrics of the
    workload ``diffusion``, with details for the record."""
    with cpu_threads(threads) as in_force, torch.inference_mode():
        record = conditions(built.device, in_force)
        with peak_memory(built.device) as peak:
            found = time_calls(sample, warmup=WARMUP, repeats=repeats, device=built.device)
    models = [built.state["denoisers"][name].model for name in schedule.models]
    parts = models if built.state["vae"] is None else [*models, built.state["vae"]]
    weights = sum(map(weights_bytes, parts))
    caches = attention_bytes(built, schedule, batch)
    image, step = found.median_ms / batch, found.median_ms / len(schedule)
    metrics = {
        "image_ms": Estimate(image, found.stderr_ms / batch, found.n),
        "step_ms": Estimate(step, found.stderr_ms / len(schedule), found.n),
        "resident_mb": Estimate((weights + caches) / 1e6),
        "peak_mb": Estimate((weights + peak.increase_bytes) / 1e6),
    }
    details = {
        "sampling": {"iqr_ms": found.iqr_ms, "n": found.n, "dropped": found.dropped, "batch": batch},
        "schedule": schedule.to_json(), "conditions": record, "threads": in_force, "load": record["load"],
        "peak_memory": peak.method,
    }  # fmt: skip
    return metrics, details
