"""A front as a table: for the terminal, for a log, for a README.

One row a point: number, what was chosen, who asked for it, the metrics with their standard errors, and
where it stands. Uniform baselines are always shown, marked with ``*``, so that a reader sees what the
search gained over the obvious choice.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from autocomp.attention.plan import DENSE, Keep, Rule
from autocomp.errors import RunError, SpaceError
from autocomp.pareto import FrontPoint, ParetoFront
from autocomp.space import Candidate, Value
from autocomp.spread import spread
from autocomp.trial import Trial

if TYPE_CHECKING:
    from rich.table import Table

    from autocomp.study import StudyResult

logger = logging.getLogger("autocomp.report")

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

    Of attention, spans and bits are counted apart and sinks are left out: ``spans 25%×60 dense×30, k8v4``.

    Args:
        candidate: any assignment; spaces are joined with ``|``.
        longest: options named a space, the most frequent first; the rest is counted.
    """
    return " | ".join(_describe_space(*item, longest) for item in _by_space(candidate).items())


def _describe_space(space: str, values: Sequence[Value], longest: int) -> str:
    if space != "attention":
        return _describe_values(values, longest)
    try:
        keeps = [Keep.parse(str(value)) for value in values]
    except SpaceError:  # a space of someone else with this name
        return _describe_values(values, longest)
    spans = _describe_values([_span_words(k.rule) for k in keeps], longest)
    bits = _describe_values([f"k{k.key_bits}v{k.value_bits}" for k in keeps], longest)
    words = spans if spans == "dense" else f"spans {spans}"
    return words if bits == "k16v16" else f"{words}, {bits}"


def _span_words(rule: Rule) -> str:
    """``512``, ``25%``, ``25%+512``: tokens, a share of the prompt, or both. Sinks are left out."""
    if rule == DENSE:
        return "dense"
    if rule.beta == 0:
        return str(rule.alpha)
    return f"{100 * rule.beta:g}%" + (f"{rule.alpha:+d}" if rule.alpha else "")


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
        metrics: columns; by default the objectives, the constrained metrics and, where they were measured,
            ``avg_bits`` (of weights), ``kv_mb`` and ``density`` (of attention).
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
    wanted = [o.metric for o in front.objectives] + [c.metric for c in front.constraints]
    wanted += ["avg_bits", "kv_mb", "density"]
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


def front_page(result: StudyResult) -> str:
    """The table of a study's front, and below it what is known of the noise (``StudyResult.noise``)."""
    words = result.noise.get("words", ())
    notes = "".join(f"- {_escape(text)}\n" for text in words)
    return markdown(result.front) + "\n" + (f"\nNoise:\n\n{notes}" if notes else "")


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


def write_artifacts(result: StudyResult, maps: int = 4) -> list[Path]:
    """Draw a study's pictures and tables into its run directory.

    ``front.html``, ``front.png``, ``front.md``, ``hypervolume.png``, ``audit_METRIC.png`` for each audit,
    ``drift_METRIC.png`` for each latency that the uncompressed model was timed in again and,
    for up to ``maps`` points of the front, ``choices_NUMBER.png`` and ``spans_NUMBER.png`` (attention is
    in the latter; neither is written empty). What can't be drawn is logged and left out.

    Returns:
        What is there now, the study's own ``front.json`` and ``job.yaml`` included.
    """
    jobs = _drawings(result, maps)
    written = [p for p in (result.run_dir / "front.json", result.run_dir / "job.yaml") if p.is_file()]
    for name, draw in jobs.items():
        try:
            draw(result.run_dir / name)
            written.append(result.run_dir / name)
        except Exception as error:  # a picture must not cost a result
            logger.warning("could not draw %s: %s", name, error)
    return written


def _drawings(result: StudyResult, maps: int) -> dict[str, Callable[[Path], object]]:
    """File name -> what writes it."""
    from autocomp import choice_map, plots
    from autocomp.drift_plot import drift_png

    front = result.front
    jobs: dict[str, Callable[[Path], object]] = {
        "front.md": lambda path: path.write_text(front_page(result)),
        "front.html": partial(plots.front_html, front),
        "front.png": partial(plots.front_png, front),
        "hypervolume.png": partial(plots.hypervolume_png, list(result.hypervolume)),
    }
    for metric, places in result.noise.get("drift", {}).items():
        if any(found["references"] > 1 for found in places.values()):
            jobs[f"drift_{_file_name(metric)}.png"] = partial(drift_png, metric, places)
    for metric, found in result.audit.items():
        draw = partial(plots.audit_png, metric, found["predicted"], found["measured"])
        jobs[f"audit_{_file_name(metric)}.png"] = draw
    found_by_search = [p.trial for p in front.front if not is_baseline(p.trial)]
    try:
        for trial in spread(found_by_search, front.objectives, maps):
            jobs |= choice_map.maps_of(result.run_dir, trial)
    except RunError as error:
        logger.warning("could not draw the maps of choices: %s", error)
    return jobs


def _file_name(metric: str) -> str:
    return re.sub("[^A-Za-z0-9_.-]", "_", metric)


def empty_note(front: ParetoFront) -> str:
    """What to say, and to try, when no trial is feasible."""
    bounds = ", ".join(map(str, front.constraints))
    if bounds:
        return f"no measured trial meets {bounds}; loosen a bound or widen the search space"
    return "no trial was measured with every objective finite; see the failures in the run's journal"
