"""A map of one candidate: which option each part of each block was given.

Rows are the kinds of decision inside a block, columns are blocks, colours are options. Decisions outside
any block (embedding, head, a whole-model setting, the slots of a schedule) stand in a strip below. What
key/value groups keep is drawn by ``autocomp.span_map``, and here only when nothing else is searched.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp import report, run_files, span_map
from autocomp.space import Candidate, Choice, Decision, SearchSpace, Value
from autocomp.span_layout import is_attention, without_attention
from autocomp.trial import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL = 0.3  # inches
_WORDS = 14  # longest option that is written into a cell of the strip
_LEGEND = 12  # with more options, those that are not taken are left out of the legend


@dataclass(frozen=True)
class ChoiceMap:
    """Where each decision is drawn.

    Attributes:
        rows: kinds of decision, in the space's order.
        blocks: block indices, rising.
        cells: (row, block) -> decision.
        strip: decisions outside any block.
    """

    rows: tuple[str, ...]
    blocks: tuple[int, ...]
    cells: Mapping[tuple[str, int], Decision]
    strip: tuple[Decision, ...]


def layout(space: SearchSpace) -> ChoiceMap:
    """Sort the decisions of a space into rows and columns."""
    many_spaces = len({d.space for d in space}) > 1
    cells: dict[tuple[str, int], Decision] = {}
    for decision in space:
        if decision.block is not None:
            row = kind(decision, many_spaces)
            while (row, decision.block) in cells:  # two decisions that differ in nothing that a row shows
                row += "'"
            cells[row, decision.block] = decision
    rows = tuple(dict.fromkeys(row for row, _ in cells))
    blocks = tuple(sorted({block for _, block in cells}))
    return ChoiceMap(rows, blocks, cells, tuple(d for d in space if d.block is None))


def kind(decision: Decision, with_space: bool = False) -> str:
    """What a decision is about inside its block: its name from behind the block's index on.

    ``bitwidths/model.layers.3.mlp.up_proj`` in block 3 is ``mlp.up_proj``; a name that does not hold the
    index is taken whole.
    """
    space, _, path = decision.name.partition("/") if "/" in decision.name else ("", "", decision.name)
    match = re.search(rf"(?<![A-Za-z0-9]){decision.block}(?![A-Za-z0-9])", path)
    if match is not None:
        path = path[match.end() :].lstrip("./_- ") or path[: match.start()].rstrip("./_- ").split(".")[-1]
    return f"{space}: {path}" if with_space and space else path


def option_order(space: SearchSpace) -> list[Value]:
    """All options of all choices; numbers inside labels count as numbers (w2, w4, w16)."""
    options = {repr(o): o for d in space for o in d.options}
    return sorted(options.values(), key=_natural)


def _natural(option: Value) -> tuple[int, list[tuple[int, float, str]]]:
    """Numbers before labels; inside a label, digits compare as numbers."""
    pieces = re.findall(r"\d+(?:\.\d+)?|\D+", str(option))
    parts = [(0, float(p), "") if p[0].isdigit() else (1, 0.0, p) for p in pieces]
    return (0 if isinstance(option, int | float) else 1, parts)


def choice_map_figure(space: SearchSpace, candidate: Candidate, title: str = "") -> Figure:
    """The map as a matplotlib figure.

    Raises:
        SpaceError: the candidate does not belong to the space.
    """
    from matplotlib.figure import Figure

    space.check(candidate)
    space = without_attention(space)
    chart = layout(space)
    paint = _Paint(space)
    lines = -(-len(chart.strip) // _per_line(chart))
    parts = [(_CELL * len(chart.rows) + 0.5, _draw_blocks), ((_CELL + 0.4) * lines, _draw_strip)]
    drawn = [(height, draw) for height, draw in parts if height > 0.5]
    heights = [height for height, _ in drawn]
    width = max(6.4, 2.4 + _CELL * len(chart.blocks))
    figure = Figure(figsize=(width, sum(heights) + 1.3), layout="constrained")
    if drawn:
        axes = figure.subplots(len(drawn), 1, height_ratios=heights, squeeze=False)[:, 0]
        for ax, (_, draw) in zip(axes, drawn, strict=True):
            draw(ax, chart, candidate, paint)
    handles = paint.legend(candidate)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    figure.suptitle(textwrap.fill(title or report.describe(candidate), int(10 * width)), fontsize=11)
    return figure


def choice_map_png(space: SearchSpace, candidate: Candidate, path: str | Path, title: str = "") -> Path:
    """Write the map as an image; the suffix picks the format. Returns the path."""
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    choice_map_figure(space, candidate, title).savefig(out)
    return out


def maps_of(run_dir: Path, trial: Trial) -> dict[str, Callable[[Path], object]]:
    """Maps of what a trial chose: file name -> what writes it.

    ``choices_NUMBER.png`` unless attention is all that was searched, ``spans_NUMBER.png`` if it was searched.

    Raises:
        RunError: the run's ``description.json`` is missing or can't be read.
    """
    description = run_files.read_description(run_dir)
    space, candidate = description.space, trial.candidate
    title = f"#{trial.number}: {report.describe(candidate)}"
    attention = [is_attention(d) for d in space]
    maps: dict[str, Callable[[Path], object]] = {}
    if not all(attention):
        maps[f"choices_{trial.number}.png"] = lambda path: choice_map_png(space, candidate, path, title)
    if any(attention):
        tokens = run_files.read_context(run_dir, description)
        windows = {p.path: p.window for p in description.site.kv_groups}
        megabytes = description.exact["kv_mb"].total(candidate) if "kv_mb" in description.exact else None
        maps[f"spans_{trial.number}.png"] = lambda path: span_map.span_map_png(
            space, candidate, tokens, path, title, kv_mb=megabytes, windows=windows
        )
    return maps


class _Paint:
    """Colours: one an option, from dark (first) to light (last); a float by its place in its interval."""

    def __init__(self, space: SearchSpace) -> None:
        from matplotlib import colormaps

        self._names = [d.name for d in space]
        self._options = option_order(space)
        self._map = colormaps["viridis"]

    def color(self, decision: Decision, value: Value) -> Any:
        if value is None and not decision.options:
            return "white"
        if isinstance(decision.domain, Choice):
            position = [repr(o) for o in self._options].index(repr(value))
            return self._map(0.05 + 0.9 * position / max(1, len(self._options) - 1))
        low, high = decision.domain.low, decision.domain.high
        return self._map((float(value or 0.0) - low) / (high - low) if high > low else 0.5)

    def legend(self, candidate: Candidate) -> list[Any]:
        """One patch an option, with how often the candidate takes it."""
        from matplotlib.patches import Patch

        taken = [repr(candidate[name]) for name in self._names]
        every = len(self._options) <= _LEGEND
        return [
            Patch(
                facecolor=self._map(0.05 + 0.9 * i / max(1, len(self._options) - 1)),
                edgecolor="#666",
                label=f"{option} ({taken.count(repr(option))})",
            )
            for i, option in enumerate(self._options)
            if every or repr(option) in taken
        ]


def _draw_blocks(ax: Axes, chart: ChoiceMap, candidate: Candidate, paint: _Paint) -> None:
    from matplotlib.patches import Rectangle

    column = {block: i for i, block in enumerate(chart.blocks)}
    for (row, block), decision in chart.cells.items():
        corner = (column[block] - 0.5, chart.rows.index(row) - 0.5)
        color = paint.color(decision, candidate[decision.name])
        ax.add_patch(Rectangle(corner, 1, 1, facecolor=color, edgecolor="white", linewidth=1))
    ax.set_xlim(-0.5, len(chart.blocks) - 0.5)
    ax.set_ylim(len(chart.rows) - 0.5, -0.5)
    ax.set_yticks(range(len(chart.rows)), chart.rows, fontsize=9)
    every = max(1, math.ceil(len(chart.blocks) / 32))
    ax.set_xticks(range(0, len(chart.blocks), every), [str(b) for b in chart.blocks[::every]], fontsize=8)
    ax.set_xlabel("block")
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)


def _per_line(chart: ChoiceMap) -> int:
    """Cells of the strip on a line: wide ones for a few named settings, narrow ones for many slots."""
    return 4 if len(chart.strip) <= 12 else 10


def _draw_strip(ax: Axes, chart: ChoiceMap, candidate: Candidate, paint: _Paint) -> None:
    from matplotlib.patches import Rectangle

    ax.axis("off")
    per_line = _per_line(chart)
    lines = -(-len(chart.strip) // per_line)
    names = _short_names(chart.strip)
    for i, decision in enumerate(chart.strip):
        x, y = i % per_line, i // per_line
        color = paint.color(decision, candidate[decision.name])
        ax.add_patch(Rectangle((x + 0.03, y + 0.42), 0.94, 0.5, facecolor=color, edgecolor="#666"))
        ax.text(x + 0.03, y + 0.36, names[i], fontsize=7, va="bottom", ha="left")
        value = _value_text(candidate[decision.name])
        ax.text(x + 0.5, y + 0.67, value, fontsize=8, ha="center", va="center", color=_ink(color))
    ax.set_xlim(0, per_line)
    ax.set_ylim(lines, 0)


def _short_names(decisions: Sequence[Decision]) -> list[str]:
    """Names without the space, cut at the front where they would run into the next one."""
    longest = 30 if len(decisions) <= 12 else 12
    names = [d.name.split("/", 1)[-1] for d in decisions]
    return [n if len(n) <= longest else "…" + n[1 - longest :] for n in names]


def _value_text(value: Value) -> str:
    text = "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _WORDS else text[: _WORDS - 1] + "…"


def _ink(color: Any) -> str:
    """Black or white, whichever reads on ``color`` (relative luminance, ITU-R BT.709)."""
    from matplotlib.colors import to_rgb

    r, g, b = to_rgb(color)
    return "black" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.45 else "white"
