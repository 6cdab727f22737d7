"""The speed of a device over a search, drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autocomp.plots import Z, _saved


def drift_png(metric: str, places: Mapping[str, Mapping[str, Any]], path: str | Path) -> Path:
    """Timings of the reference with 95 % intervals, and the smoothed line that latencies are corrected by.

    Args:
        metric: name of the latency, for the axes.
        places: device -> what ``Readings.summary`` says of it.
        path: the PNG; its folder is made.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    ax = figure.subplots()
    for i, (place, found) in enumerate(places.items()):
        times, values, errors = zip(*found["measured"], strict=True)
        minutes, color = [t / 60 for t in times], f"C{i}"
        bars = [Z * e if e == e else 0.0 for e in errors]
        ax.errorbar(minutes, values, yerr=bars, fmt="o", markersize=4, color=color, label=place or None)
        style = "-" if found["drifts"] else ":"
        ax.plot([t / 60 for t in found["times"]], found["level"], style, color=color)
    drifts = any(found["drifts"] for found in places.values())
    title = f"{metric} of the uncompressed model: " + ("drift, corrected" if drifts else "no drift")
    ax.set(xlabel="minutes of search", ylabel=metric, title=title)
    if len(places) > 1:
        ax.legend()
    ax.grid(alpha=0.25)
    return _saved(figure, path)
