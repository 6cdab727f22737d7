"""Pictures of a study: its front (page and image), hypervolume over trials, and the audit.

The map of what each layer was given is in ``autocomp.choice_map``. Figures are matplotlib ``Figure``
objects, never ``pyplot`` state, so that they can be drawn on any thread and without a display.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from autocomp import report
from autocomp.objective import Objective
from autocomp.pareto import FrontPoint, ParetoFront
from autocomp.trial import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from plotly.graph_objects import Figure as Page

Z = 1.96  # error bars are 95 % intervals
_LOG_RATIO = 30.0  # an axis that spans more than this is drawn in logarithms


@dataclass(frozen=True)
class Layer:
    """Points drawn alike. ``plotly`` and ``matplotlib`` are the two libraries' marker names."""

    name: str
    color: str
    plotly: str
    matplotlib: str
    filled: bool
    size: int
    member: Callable[[FrontPoint], bool]


LAYERS = (
    Layer("dominated", "#9aa0a6", "circle", "o", True, 5, lambda p: p.label == "dominated"),
    Layer("tie, within the noise", "#1a73e8", "circle-open", "o", False, 8, lambda p: p.label == "tie"),
    Layer("front", "#1a73e8", "circle", "o", True, 8, lambda p: p.label == "front"),
    Layer(
        "uniform baseline", "#e8710a", "diamond-open", "D", False, 12, lambda p: report.is_baseline(p.trial)
    ),
)


@dataclass(frozen=True)
class Axis:
    """One axis: a metric (or ``trial``, the number) and how it is scaled."""

    title: str
    value: Callable[[Trial], float]
    stderr: Callable[[Trial], float]
    log: bool = False


def _axis(objective: Objective, points: Sequence[FrontPoint]) -> Axis:
    """Logarithmic when the positive values span far and none is negative.

    The uncompressed model's divergence is exactly 0, which would cost every such plot its logarithms: zeros
    are drawn a little below the smallest positive value, and the axis says so.
    """
    metric = objective.metric
    values = [p.trial.value(metric) for p in points]
    positive = [v for v in values if v > 0]
    log = bool(positive) and min(values) >= 0 and max(positive) / min(positive) > _LOG_RATIO
    floor = min(positive) / 3 if log and 0.0 in values else 0.0
    note = "lower is better" if objective.minimize else "higher is better"
    note += f"; 0 is drawn at {floor:.1g}" * (floor > 0)
    return Axis(f"{metric} ({note})", lambda t: t.value(metric) or floor, lambda t: t.stderr(metric), log)


def panels(front: ParetoFront) -> list[tuple[Axis, Axis]]:
    """Pairs ``(x, y)`` of axes to draw: the first objective against each of the others.

    A single objective is drawn against the trial's number.
    """
    first, *rest = (_axis(o, front.points) for o in front.objectives)
    if not rest:
        return [(Axis("trial", lambda t: float(t.number), lambda t: 0.0), first)]
    return [(other, first) for other in rest]


def _staircase(front: ParetoFront, x: Axis, y: Axis) -> tuple[list[float], list[float]]:
    """Corners of the line through the points that are on the front by value; two objectives only."""
    if len(front.objectives) != 2:
        return [], []
    trials = [p.trial for p in front.points if p.label == "front"]
    trials.sort(key=lambda t: front.objectives[1].loss(t.value(front.objectives[1].metric)))
    return [x.value(t) for t in trials], [y.value(t) for t in trials]


def _hover(point: FrontPoint) -> str:
    trial = point.trial
    head = [f"<b>trial {trial.number}</b> {report.standing(point)}", report.describe(trial.candidate)]
    metrics = [f"{m}: {report.number_text(v, trial.stderr(m))}" for m, v in sorted(trial.values().items())]
    tail = [f"asked for by {trial.origin}", trial.candidate.fingerprint]
    lines = [head[0], *(html.escape(line) for line in [head[1], *metrics, *tail])]
    return "<br>".join(lines)


# The interactive page


def front_page(front: ParetoFront, selected: Trial | None = None) -> Page:
    """A plotly figure of the front: one panel a pair of objectives, hover with every metric."""
    from plotly.subplots import make_subplots

    pairs = panels(front)
    page = make_subplots(rows=1, cols=len(pairs), horizontal_spacing=0.1)
    for column, (x, y) in enumerate(pairs, start=1):
        for trace in _traces(front, x, y, selected, legend=column == 1):
            page.add_trace(trace, row=1, col=column)
        page.update_xaxes(title=x.title, type="log" if x.log else "linear", row=1, col=column)
        page.update_yaxes(title=y.title, type="log" if y.log else "linear", row=1, col=column)
    if not front.points:
        page.add_annotation(
            text=report.empty_note(front), showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper"
        )
    page.update_layout(
        title=_title(front),
        template="plotly_white",
        legend={"orientation": "h", "y": -0.18},
        hoverlabel={"align": "left", "font": {"family": "monospace"}},
    )
    return page


def _traces(front: ParetoFront, x: Axis, y: Axis, selected: Trial | None, legend: bool) -> list[Any]:
    from plotly.graph_objects import Scatter

    xs, ys = _staircase(front, x, y)
    line = {"shape": "hv", "color": "#1a73e8", "width": 1}
    traces = [Scatter(x=xs, y=ys, mode="lines", line=line, hoverinfo="skip", showlegend=False)] if xs else []
    for layer in LAYERS:
        points = [p for p in front.points if layer.member(p)]
        if points:
            traces.append(_markers(points, x, y, layer, legend))
    if selected is not None:
        traces.append(
            Scatter(
                x=[x.value(selected)],
                y=[y.value(selected)],
                mode="markers",
                name=f"selected: #{selected.number}",
                marker={"symbol": "circle-open", "size": 22, "color": "#d93025", "line": {"width": 3}},
                hoverinfo="skip",
                showlegend=legend,
                legendgroup="selected",
            )
        )
    return traces


def _markers(points: Sequence[FrontPoint], x: Axis, y: Axis, layer: Layer, legend: bool) -> Any:
    from plotly.graph_objects import Scatter

    def bars(axis: Axis) -> dict[str, Any]:
        array = [Z * axis.stderr(p.trial) for p in points]
        return {"type": "data", "array": array, "visible": any(array), "thickness": 1, "width": 2}

    return Scatter(
        x=[x.value(p.trial) for p in points],
        y=[y.value(p.trial) for p in points],
        error_x=bars(x),
        error_y=bars(y),
        mode="markers",
        name=f"{layer.name} ({len(points)})",
        legendgroup=layer.name,
        showlegend=legend,
        marker={"symbol": layer.plotly, "size": layer.size + 2, "color": layer.color},
        text=[_hover(p) for p in points],
        hovertemplate="%{text}<extra></extra>",
    )


def front_html(front: ParetoFront, path: str | Path, selected: Trial | None = None) -> Path:
    """Write the interactive front as one file that needs no network. Returns the path."""
    out = _prepared(path)
    front_page(front, selected).write_html(
        out, include_plotlyjs=True, full_html=True, div_id="autocomp-front"
    )
    return out


# Images


def front_figure(front: ParetoFront, selected: Trial | None = None) -> Figure:
    """The same picture for paper: baselines and the selected point are named beside their markers."""
    from matplotlib.figure import Figure

    pairs = panels(front)
    figure = Figure(figsize=(7.2 if len(pairs) == 1 else 5.4 * len(pairs), 5.2), layout="constrained")
    axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    for ax, (x, y) in zip(axes, pairs, strict=True):
        ax.set_xlabel(x.title)
        ax.set_ylabel(y.title)
        ax.set_xscale("log" if x.log else "linear")
        ax.set_yscale("log" if y.log else "linear")
        ax.grid(alpha=0.25)
        _draw(ax, front, x, y, selected)
    if front.points:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    else:
        axes[0].text(0.5, 0.5, report.empty_note(front), ha="center", wrap=True, transform=axes[0].transAxes)
    figure.suptitle(_title(front), fontsize=11)
    figure.draw_without_rendering()  # places the axes, so that names can avoid each other in pixels
    for ax, (x, y) in zip(axes, pairs, strict=True):
        _name_points(ax, front, x, y, selected)
    return figure


def front_png(front: ParetoFront, path: str | Path, selected: Trial | None = None) -> Path:
    """Write the front as an image; the suffix picks the format (``.png``, ``.svg``, ``.pdf``)."""
    return _saved(front_figure(front, selected), path)


def _draw(ax: Axes, front: ParetoFront, x: Axis, y: Axis, selected: Trial | None) -> None:
    xs, ys = _staircase(front, x, y)
    if xs:
        ax.step(xs, ys, where="post", color="#1a73e8", linewidth=1, alpha=0.6)
    for depth, layer in enumerate(LAYERS, start=2):
        points = [p.trial for p in front.points if layer.member(p)]
        if not points:
            continue
        ax.errorbar(
            [x.value(t) for t in points],
            [y.value(t) for t in points],
            xerr=_bars(points, x),
            yerr=_bars(points, y),
            linestyle="none",
            marker=layer.matplotlib,
            markersize=0.75 * layer.size,
            markerfacecolor=layer.color if layer.filled else "none",
            markeredgecolor=layer.color,
            ecolor=layer.color,
            elinewidth=0.8,
            label=f"{layer.name} ({len(points)})",
            zorder=depth,
        )
    if selected is not None:
        style: dict[str, Any] = {"markersize": 15, "markerfacecolor": "none", "markeredgewidth": 2}
        at = ([x.value(selected)], [y.value(selected)])
        ax.plot(*at, "o", markeredgecolor="#d93025", label="selected", zorder=9, **style)


def _bars(trials: Sequence[Trial], axis: Axis) -> list[float] | None:
    bars = [Z * axis.stderr(t) for t in trials]
    return bars if any(bars) else None


def _name_points(ax: Axes, front: ParetoFront, x: Axis, y: Axis, selected: Trial | None) -> None:
    """Names beside the selected point, the baselines and the front, as long as they find free room."""
    named = [(selected, f"#{selected.number}", "#d93025")] if selected is not None else []
    named += [
        (p.trial, report.describe(p.trial.candidate), "#b45309")
        for p in front.points
        if report.is_baseline(p.trial)
    ]
    others = [p.trial for p in front.points if p.label == "front" and not report.is_baseline(p.trial)]
    named += [
        (t, f"#{t.number}", "#174ea6") for t in others if selected is None or t.number != selected.number
    ]
    pixels = ax.transData.transform([(x.value(p.trial), y.value(p.trial)) for p in front.points] or [(0, 0)])
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in pixels]
    if selected is not None:  # the ring
        px, py = ax.transData.transform((x.value(selected), y.value(selected)))
        taken.append((px - 10, py - 10, px + 10, py + 10))
    frame = ax.get_window_extent()
    for trial, text, color in named:
        at = ax.transData.transform((x.value(trial), y.value(trial)))
        spot = _free_spot(at, (6.0 * len(text) + 6, 12.0), taken, (frame.x0, frame.y0, frame.x1, frame.y1))
        if spot is not None:
            taken.append(spot)
            offset = (np.array(spot[:2]) - at) * 72 / ax.figure.dpi
            ax.annotate(
                text, (x.value(trial), y.value(trial)), xytext=tuple(offset), textcoords="offset points",
                fontsize=8, color=color, zorder=10,
            )  # fmt: skip


Box = tuple[float, float, float, float]


def _free_spot(at: Any, size: tuple[float, float], taken: Sequence[Box], frame: Box) -> Box | None:
    """The first place around ``at`` (pixels) where a box of ``size`` fits in the frame and hits no other."""
    width, height = size
    for distance in (8.0, 15.0):  # farther away a name would seem to be another point's
        for dx, dy in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)):
            left = at[0] + dx * distance - (width if dx < 0 else width / 2 if dx == 0 else 0)
            low = at[1] + dy * distance - (height if dy < 0 else height / 2 if dy == 0 else 0)
            box = (left, low, left + width, low + height)
            inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
            hits = any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            if inside and not hits:
                return box
    return None


def hypervolume_png(values: Sequence[float], path: str | Path, steps: Sequence[int] | None = None) -> Path:
    """Hypervolume (one value a step, by default one a trial from 1) against trials measured."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    ax = figure.subplots()
    at = list(steps) if steps is not None else list(range(1, len(values) + 1))
    if values:
        ax.step(at, values, where="post", color="#1a73e8")
        ax.plot(at[-1:], values[-1:], "o", color="#1a73e8", markersize=5)
        ax.annotate(
            f"{values[-1]:.4g}",
            (at[-1], values[-1]),
            xytext=(-4, -14),
            textcoords="offset points",
            ha="right",
        )
    else:
        ax.text(0.5, 0.5, "no feasible trial", ha="center", transform=ax.transAxes)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="trials measured", ylabel="hypervolume (higher is better)", title="Hypervolume over trials")
    ax.grid(alpha=0.25)
    return _saved(figure, path)


def audit_png(metric: str, predicted: Sequence[float], measured: Sequence[float], path: str | Path) -> Path:
    """Predicted against measured values of a metric, with their rank correlation (Spearman, Kendall).

    Args:
        metric: name, for the axes.
        predicted: one value a candidate; pairs with a NaN or infinity are left out.
        measured: the same length.
        path: where to write.
    """
    from matplotlib.figure import Figure

    pairs = np.array([(p, m) for p, m in zip(predicted, measured, strict=True) if math.isfinite(p + m)])
    pairs = pairs.reshape(-1, 2)
    figure = Figure(figsize=(5.2, 4.8), layout="constrained")
    ax = figure.subplots()
    scale: Literal["log", "linear"] = "log" if _wants_log(pairs) else "linear"
    ax.set_xscale(scale)
    ax.set_yscale(scale)
    if len(pairs):
        ends = [pairs.min(), pairs.max()]
        ax.plot(ends, ends, color="#9aa0a6", linewidth=1, linestyle="--", label="measured = predicted")
        ax.plot(pairs[:, 0], pairs[:, 1], "o", color="#1a73e8", markersize=5, label="candidate")
        ax.legend(frameon=False, fontsize=9)
    ax.set(xlabel=f"predicted {metric}", ylabel=f"measured {metric}", title=_audit_title(metric, pairs))
    ax.grid(alpha=0.25)
    return _saved(figure, path)


def _wants_log(pairs: np.ndarray) -> bool:
    return bool(len(pairs)) and pairs.min() > 0 and pairs.max() / pairs.min() > _LOG_RATIO


def _audit_title(metric: str, pairs: np.ndarray) -> str:
    """Rank correlations need three pairs and some spread on both sides."""
    from scipy.stats import kendalltau, spearmanr

    if len(pairs) < 3 or np.ptp(pairs, axis=0).min() == 0:
        return f"Audit of {metric}: {len(pairs)} candidates, no rank correlation"
    spearman = float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)
    kendall = float(kendalltau(pairs[:, 0], pairs[:, 1]).statistic)
    return f"Audit of {metric}: Spearman {spearman:.2f}, Kendall {kendall:.2f} (n = {len(pairs)})"


def _title(front: ParetoFront) -> str:
    bounds = f" with {', '.join(map(str, front.constraints))}" if front.constraints else ""
    goals = ", ".join(map(str, front.objectives))
    return f"{goals}{bounds}: {len(front)} of {len(front.points)} candidates on the front"


def _prepared(path: str | Path) -> Path:
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _saved(figure: Figure, path: str | Path) -> Path:
    out = _prepared(path)
    figure.savefig(out, dpi=figure.dpi if out.suffix == ".png" else None)
    return out
