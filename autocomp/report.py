"""A front as a table: for the terminal, for a log, for a README.

One row a point: number, what was chosen, who asked for it, the metrics with their standard errors, and
where it stands. Uniform baselines are always shown, marked with ``*``, so that a reader sees what the
search gained over the obvious choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocomp.pareto import FrontPoint, ParetoFront
from autocomp.space import Candidate, Value
from autocomp.trial import Trial

if TYPE_CHECKING:
    from rich.table import Table

MARK = "*"
_NOTE = f"{MARK} uniform baseline; ± one standard error"


def _by_space(candidate: Candidate) -> dict[str, list[Value]]:
    """Values grouped by the space in front of the decision's name (``bitwidths/...``)."""
    groups: dict[str, list[Value]] = {}
    for name, value in candidate.items:
        groups.setdefault(name.split("/", 1)[0] if "/" in name else "", []).append(value)
    return groups


def is_uniform(candidate: Candidate) -> bool:
    """True when each space takes one option everywhere (and has more than one place to take it)."""
    groups = _by_space(candidate)
    if not groups or all(len(values) == 1 for values in groups.values()):
        return False
    return all(len({repr(v) for v in values}) == 1 for values in groups.values())


def is_baseline(trial: Trial) -> bool:
    """True for the candidates that anyone would try without a search."""
    return trial.origin == "baseline" or is_uniform(trial.candidate)


def describe(candidate: Candidate, longest: int = 4) -> str:
    """What a candidate chose, in a few words: ``w4g64`` or ``w4g64×30 w3g64×8 w8×2``.

    Args:
        candidate: any assignment; spaces are joined with ``|``.
        longest: options named a space, the most frequent first; the rest is counted.
    """
    return " | ".join(_describe_values(values, longest) for values in _by_space(candidate).values())


def _describe_values(values: Sequence[Value], longest: int) -> str:
    floats = [v for v in values if isinstance(v, float)]
    if floats:
        unused = [v for v in values if v is None]
        labels = [v for v in values if v is not None and not isinstance(v, float)]
        numbers = f"{len(floats)} values in {min(floats):.3g}..{max(floats):.3g}"
        numbers += f" ({len(unused)} unused)" * bool(unused)
        return f"{numbers}, {_describe_values(labels, longest)}" if labels else numbers
    counts = Counter(map(str, values)).most_common()
    if len(counts) == 1:
        return counts[0][0]
    rest = f" +{len(counts) - longest} more" * (len(counts) > longest)
    return " ".join(f"{option}×{n}" for option, n in counts[:longest]) + rest


def number_text(value: float, stderr: float = 0.0) -> str:
    """``12.34 ± 0.05``: four significant digits, the error with two and only when there is one."""
    return f"{value:.4g} ± {stderr:.2g}" if stderr > 0 else f"{value:.4g}"


def standing(point: FrontPoint) -> str:
    """``front``, ``tie with #3`` or ``dominated by #3``."""
    if point.dominated_by is None:
        return point.label
    return f"{'tie with' if point.label == 'tie' else 'dominated by'} #{point.dominated_by}"


@dataclass(frozen=True)
class Grid:
    """A table as strings, before it is drawn.

    Attributes:
        header: column titles.
        rows: cells, as many a row as there are titles.
        numeric: which columns hold numbers and are aligned to the right.
        selected: index of the highlighted row, ``None`` for none.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    selected: int | None = None


def grid(front: ParetoFront, selected: Trial | None = None, metrics: Iterable[str] | None = None) -> Grid:
    """Rows of the front, its ties and every uniform baseline; columns of ``metrics``.

    Args:
        front: a labelled set of trials.
        selected: the trial to highlight.
        metrics: columns; by default the objectives, the constrained metrics and ``avg_bits``.
    """
    shown = [p for p in front.points if p.label != "dominated" or is_baseline(p.trial)]
    columns = list(metrics) if metrics is not None else _default_metrics(front)
    rows = [
        (
            f"{p.trial.number}{MARK if is_baseline(p.trial) else ''}",
            describe(p.trial.candidate),
            p.trial.origin,
            *(_cell(p.trial, m) for m in columns),
            standing(p),
        )
        for p in shown
    ]
    index = next((i for i, p in enumerate(shown) if selected and p.trial.number == selected.number), None)
    numeric = (True, False, False, *(True for _ in columns), False)
    return Grid(("#", "choices", "origin", *columns, "stands"), tuple(rows), numeric, index)


def _default_metrics(front: ParetoFront) -> list[str]:
    wanted = [o.metric for o in front.objectives] + [c.metric for c in front.constraints] + ["avg_bits"]
    known = {m for p in front.points for m in p.trial.values()}
    return [m for m in dict.fromkeys(wanted) if m in known]


def _cell(trial: Trial, metric: str) -> str:
    return number_text(trial.value(metric), trial.stderr(metric)) if metric in trial.values() else "-"


def text(front: ParetoFront, selected: Trial | None = None, metrics: Iterable[str] | None = None) -> str:
    """Aligned plain text, with ``>`` before the selected row."""
    table = grid(front, selected, metrics)
    if not table.rows:
        return empty_note(front)
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]

    def line(cells: Sequence[str], mark: str = " ") -> str:
        padded = [
            c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, table.numeric, strict=True)
        ]
        return f"{mark} {'  '.join(padded)}".rstrip()

    rule = "  " + "  ".join("-" * w for w in widths)
    body = [line(row, ">" if i == table.selected else " ") for i, row in enumerate(table.rows)]
    return "\n".join([line(table.header), rule, *body, f"  {_NOTE}"])


def markdown(front: ParetoFront, selected: Trial | None = None, metrics: Iterable[str] | None = None) -> str:
    """A Markdown table; the selected row is bold."""
    table = grid(front, selected, metrics)
    if not table.rows:
        return empty_note(front)

    def line(cells: Iterable[str], wrap: str = "") -> str:
        return "| " + " | ".join(f"{wrap}{_escape(c)}{wrap}" for c in cells) + " |"

    rule = "|" + "|".join("---:" if n else "---" for n in table.numeric) + "|"
    body = [line(row, "**" if i == table.selected else "") for i, row in enumerate(table.rows)]
    return "\n".join([line(table.header), rule, *body, "", _escape(_NOTE)])


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("*", "\\*")


def rich_table(
    front: ParetoFront, selected: Trial | None = None, metrics: Iterable[str] | None = None
) -> Table:
    """The same table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    data = grid(front, selected, metrics)
    table = Table(caption=_NOTE if data.rows else empty_note(front), caption_justify="left")
    for title, numeric in zip(data.header, data.numeric, strict=True):
        table.add_column(title, justify="right" if numeric else "left", overflow="fold")
    for i, row in enumerate(data.rows):
        style = "bold green" if i == data.selected else "dim" if row[-1].startswith("dominated") else ""
        table.add_row(*map(Text, row), style=style)
    return table


def empty_note(front: ParetoFront) -> str:
    """What to say, and to try, when no trial is feasible."""
    bounds = ", ".join(map(str, front.constraints))
    if bounds:
        return f"no measured trial meets {bounds}; loosen a bound or widen the search space"
    return "no trial was measured with every objective finite; see the failures in the run's journal"
