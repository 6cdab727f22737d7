"""A map of a candidate's attention: what every key/value group keeps of the context, and in how many bits.

Columns are layers and rows are groups; the colour is the share of the context that is kept. Where bits are
searched too, a strip below shows those of each layer's keys and values.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp import report
from autocomp.attention.plan import Keep
from autocomp.space import Candidate, SearchSpace
from autocomp.span_layout import Bits, SpanMap, is_attention, layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_DENSE = "#dedede"


def span_map_figure(
    space: SearchSpace,
    candidate: Candidate,
    tokens: int,
    title: str = "",
    *,
    kv_mb: float | None = None,
    windows: Mapping[str, int] | None = None,
) -> Figure:
    """The map as a matplotlib figure.

    Args:
        space, candidate, tokens, windows: as for ``layout``.
        title: stands above; by default what the candidate chose.
        kv_mb: megabytes of the cache, for the line below the title; ``None`` when they are not known.

    Raises:
        SpaceError: there is no attention in the space, or the candidate does not belong to it.
    """
    from matplotlib.figure import Figure

    chart = layout(space, candidate, tokens, windows)
    pairs = _offered_bits(space)
    groups, layers = _rows(chart).shape
    cell = (float(np.clip(10 / layers, 0.13, 0.45)), float(np.clip(6 / groups, 0.1, 0.3)))
    width = max(7.2, 1.4 + cell[0] * layers)
    heights = [max(0.35, cell[1] * groups)] + [0.22] * (len(pairs) > 1) + [0.12]
    lines = [title or report.describe(candidate), _facts(chart, pairs, kv_mb)]
    text = "\n".join(textwrap.fill(line, int(11 * width)) for line in lines)
    handles = _legend(chart, pairs)
    columns = min(int(width / 1.8), len(handles))
    around = 2.0 + 0.17 * text.count("\n") + 0.2 * (len(pairs) > 1) + 0.2 * -(-len(handles) // columns)
    figure = Figure(figsize=(width, sum(heights) + around), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_shares(axes[0], chart, _scale(space, chart))
    strip = axes[1] if len(pairs) > 1 else None
    inches = (width - 1.4) / layers  # of a drawn column
    if strip is not None:
        _draw_bits(strip, chart, pairs, inches)
        axes[0].tick_params(labelbottom=False)
    lowest = axes[0] if strip is None else strip
    _name_columns(lowest, chart.labels, inches)
    _draw_scale(axes[-1], _scale(space, chart), chart, space)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(text, fontsize=10)
    return figure


def span_map_png(
    space: SearchSpace,
    candidate: Candidate,
    tokens: int,
    path: str | Path,
    title: str = "",
    *,
    kv_mb: float | None = None,
    windows: Mapping[str, int] | None = None,
) -> Path:
    """Write ``span_map_figure`` as an image; the suffix picks the format. Returns the path."""
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    span_map_figure(space, candidate, tokens, title, kv_mb=kv_mb, windows=windows).savefig(out)
    return out


def _rows(chart: SpanMap) -> np.ndarray[Any, Any]:
    """Shares ``[rows, layers]``: one row where all groups of a layer are alike by decision."""
    return chart.shares[:1] if chart.whole else chart.shares


def _offered(space: SearchSpace) -> list[Keep]:
    options = dict.fromkeys(str(o) for d in space if is_attention(d) for o in d.options)
    return [Keep.parse(option) for option in options]


def _offered_bits(space: SearchSpace) -> list[Bits]:
    """Pairs that the space offers, the widest first."""
    pairs = {(k.key_bits, k.value_bits) for k in _offered(space)}
    return sorted(pairs, key=lambda pair: (sum(pair), pair), reverse=True)


def _facts(chart: SpanMap, pairs: Sequence[Bits], kv_mb: float | None) -> str:
    text = f"{chart.density:.1%} of {chart.tokens:,} tokens kept on average"
    if any(0 < w < chart.tokens for w in chart.windows):
        text += " (or of a layer's own window)"
    if len(pairs) == 1:
        text += f", keys in {pairs[0][0]} and values in {pairs[0][1]} bits"
    return text if kv_mb is None else f"{text}, {kv_mb:,.4g} MB of keys and values"


def _offered_shares(space: SearchSpace, chart: SpanMap) -> list[float]:
    """Rising shares below 1 that a group may keep."""
    spans = {k.rule.span(chart.tokens) for k in _offered(space)} | {w for w in chart.windows if w}
    return sorted(s / chart.tokens for s in spans if s < chart.tokens)


def _scale(space: SearchSpace, chart: SpanMap) -> Normalize:
    """Of what the space offers, so that the maps of a run can be compared; spread out at the low end."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0.0, vmax=max(_offered_shares(space, chart), default=1.0))


def _draw_shares(ax: Axes, chart: SpanMap, norm: Normalize) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    shares = _rows(chart)
    groups, layers = shares.shape
    grid: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.8}
    edges = (np.arange(layers + 1) - 0.5, np.arange(groups + 1) - 0.5)
    dense = shares >= 1.0
    ax.pcolormesh(*edges, np.ma.masked_invalid(np.where(dense, np.nan, shares)), norm=norm, **grid)
    ax.pcolormesh(*edges, np.ma.masked_where(~dense, shares), cmap=ListedColormap([_DENSE]), **grid)
    for x, window in enumerate(chart.windows):
        if 0 < window < chart.tokens:
            hatched = Rectangle((x - 0.5, -0.5), 1, groups, fill=False, hatch="///", edgecolor="#999")
            hatched.set_linewidth(0.0)
            ax.add_patch(hatched)
    ax.set_ylim(groups - 0.5, -0.5)
    every = max(1, -(-groups // 32))
    rows = ["all groups"] if chart.whole else [str(g) for g in range(0, groups, every)]
    ax.set_yticks(range(0, groups, every), rows, fontsize=8)
    if not chart.whole:
        ax.set_ylabel("key/value group" if groups > 4 else "KV group", fontsize=9)
    _plain(ax, layers)


def _draw_bits(ax: Axes, chart: SpanMap, pairs: Sequence[Bits], inches: float) -> None:
    from matplotlib.patches import Rectangle

    for x, pair in enumerate(chart.bits):
        color = _bits_color(pairs, pair)
        ax.add_patch(Rectangle((x - 0.5, 0), 1, 1, facecolor=color, edgecolor="white", linewidth=0.8))
        text = f"{pair[0]}/{pair[1]}"
        if 0.064 * len(text) <= inches:
            ink = "white" if pairs.index(pair) < len(pairs) / 2 else "black"
            ax.text(x, 0.5, text, fontsize=7, ha="center", va="center_baseline", color=ink)
    ax.set_ylim(0, 1)
    ax.set_yticks([0.5], ["bits k/v"], fontsize=8)
    _plain(ax, len(chart.layers))


def _name_columns(ax: Axes, labels: Sequence[str], inches: float) -> None:
    every = max(1, int(np.ceil(0.09 * max(map(len, labels)) / inches)))
    ax.set_xticks(range(0, len(labels), every), labels[::every], fontsize=8)
    ax.set_xlabel("layer", fontsize=9)


def _draw_scale(ax: Axes, norm: Normalize, chart: SpanMap, space: SearchSpace) -> None:
    """A colour bar with the shares on offer as its ticks, without those that would touch the next one."""
    from matplotlib.cm import ScalarMappable

    offered = _offered_shares(space, chart)
    if not offered:
        ax.axis("off")  # nothing but dense attention is on offer
        return
    bar = ax.figure.colorbar(ScalarMappable(norm), cax=ax, orientation="horizontal")
    ticks: list[float] = []
    gap = 0.42 / (ax.figure.get_figure(root=True).get_figwidth() - 0.6)  # of the bar: 0.42 inches
    for share in reversed(offered):
        if not ticks or float(norm(ticks[-1]) - norm(share)) >= gap:
            ticks.append(share)
    bar.set_ticks(ticks, labels=[f"{t:.3g}" for t in (100 * np.array(ticks))])
    bar.ax.tick_params(labelsize=8)
    bar.ax.minorticks_off()
    bar.set_label(f"kept of {chart.tokens:,} tokens, %", fontsize=9)


def _legend(chart: SpanMap, pairs: Sequence[Bits]) -> list[Any]:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=_DENSE, edgecolor="#999", label="dense (all tokens)")]
    if any(0 < w < chart.tokens for w in chart.windows):
        handles.append(
            Patch(facecolor="white", edgecolor="#999", hatch="///", label="the layer's own window")
        )
    if len(pairs) > 1:
        counts = [chart.bits.count(pair) for pair in pairs]
        handles += [
            Patch(facecolor=_bits_color(pairs, (k, v)), edgecolor="#999", label=f"k{k}v{v} ({n})")
            for (k, v), n in zip(pairs, counts, strict=True)
        ]
    return handles


def _bits_color(pairs: Sequence[Bits], pair: Bits) -> Any:
    """Dark for many bits, pale for few."""
    from matplotlib import colormaps

    return colormaps["Oranges"](0.85 - 0.65 * pairs.index(pair) / max(1, len(pairs) - 1))


def _plain(ax: Axes, columns: int) -> None:
    ax.tick_params(length=0)
    ax.set_xlim(-0.5, columns - 0.5)
    for side in ax.spines.values():
        side.set_visible(False)
