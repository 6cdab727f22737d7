"""Tables and pictures from ``results.json`` (kernels) and ``decode_results.json`` (a whole model).

python experiments/bench_kernels/report.py      # writes README.md's tables, TABLE.md and the pictures anew
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS, DECODE = HERE / "results.json", HERE / "decode_results.json"
PLOT_CASES = 8  # of a section in the picture; a longer one shows its cases with one row of activations
Record = Mapping[str, Any]
Row = Mapping[str, Any]


def read(path: Path) -> dict[str, Any]:
    """A results file; empty when it isn't there yet."""
    loaded: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return loaded


def write_all() -> None:
    """Everything that follows from the two files; what has no results yet is left as it is."""
    kernels, decode = read(RESULTS), read(DECODE)
    if kernels:
        (HERE / "TABLE.md").write_text(full_table(kernels))
        _replace("kernels", "\n\n".join(summary(name, s) for name, s in kernels["sections"].items()))
        plot(kernels, HERE / "speedup.png")
    if decode:
        _replace("decode", decode_table(decode))


def _replace(mark: str, text: str) -> None:
    """Put ``text`` between ``<!-- mark -->`` and ``<!-- /mark -->`` of the README."""
    readme = HERE / "README.md"
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, found, rest = readme.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"README.md needs the lines {begin} and {end}: the {mark} table goes between them")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def _names(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def conditions_line(section: Record) -> str:
    """Machine, load and the rates behind the floors."""
    told = section["conditions"]
    rates = "; ".join(
        f"{n} thread{'s' if n != '1' else ''}: copy {c['copy']:.1f}, read {c['read']:.1f} GB/s, "
        f"bf16 {c['bf16']:.0f}, int8 {c['int8']:.0f} GFLOP/s"
        for n, c in section["ceilings"].items()
    )
    return f"{told['device'].rpartition(',')[0]}; load {told['load']} at the start; {rates}."


def summary(name: str, section: Record) -> str:
    """One table for each number of threads: a line a case, a column a variant, speed-ups in the cells."""
    parts = [f"### {name}", f"{section['about']} {conditions_line(section)}"]
    for threads in _names(section["rows"], "threads"):
        rows = [row for row in section["rows"] if row["threads"] == threads]
        baseline = rows[0]["baseline"]
        columns = [v for v in _names(rows, "variant") if v != baseline]
        head = [f"{threads} thread{'s' * (threads > 1)}", f"{baseline}, ms", *columns]
        lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        for case in _names(rows, "case"):
            cells = {row["variant"]: row for row in rows if row["case"] == case}
            lines.append(_line([case, _ms(cells[baseline]), *(_cell(cells.get(c)) for c in columns)]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ms(row: Row) -> str:
    return f"{row['ms']:.3g}"


def _cell(row: Row | None) -> str:
    """Speed-up over the baseline; ours bold with that over the best alternative behind."""
    if row is None:
        return ""
    value = f"{row['speedup']['value']:.2f}"
    return f"**{value}** ({row['speedup_best']['value']:.2f})" if "speedup_best" in row else value


def full_table(results: Record) -> str:
    """Every row with its intervals."""
    head = [
        "case",
        "threads",
        "variant",
        "ms",
        "iqr",
        "x baseline",
        "best alternative",
        "x best",
        "% of floor",
    ]
    parts = [
        "# Every measurement",
        "Made by `bench.py`; the columns are explained in [README.md](README.md).",
    ]
    for name, section in results["sections"].items():
        lines = [_line(head), _line(["---", "---:", "---", *["---:"] * 3, "---", *["---:"] * 2])]
        for row in section["rows"]:
            share = f"{row['floor_percent']:.0f}" if "floor_percent" in row else ""
            best = _interval(row["speedup_best"]) if "speedup_best" in row else ""
            lines.append(
                _line([row["case"], str(row["threads"]), row["variant"], _ms(row), f"{row['iqr_ms']:.2g}",
                       _interval(row["speedup"]), row.get("best", ""), best, share])
            )  # fmt: skip
        command = f"`{section['command']}`, {section['date']}"
        parts += [f"## {name}", f"{section['about']} {conditions_line(section)} {command}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def decode_table(results: Record) -> str:
    """Milliseconds a token and of the prompt for every way to run the model."""
    told, lines = results["conditions"], []
    head = ["", "decode, ms a token", "tokens/s", "x llama.cpp", "prefill, ms", "tokens/s", "x llama.cpp"]
    lines += [_line(head), _line(["---", *["---:"] * 6])]
    for row in results["rows"]:
        cells = [row["name"]]
        for kind in ("decode", "prefill"):
            found = row.get(kind)
            if not found:
                cells += ["", "", ""]
                continue
            ratio = _interval(found["speedup"]) if "speedup" in found else ""
            cells += [f"{found['ms']:.2f} ± {found['stderr_ms']:.2f}", f"{found['tokens_per_s']:.0f}", ratio]
        lines.append(_line(cells))
    sizes = f"Context and prompt of {results['context']} tokens, {results['steps']} steps, batch 1"
    return (
        f"{sizes}, {results['rounds']} rounds; {told['device']}; load {told['load']} at the start.\n\n"
        + "\n".join(lines)
    )


def plot(results: Record, path: Path) -> None:
    """Speed-up of ours over the baseline with its interval; a line marks the best alternative."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sections = [(n, s) for n, s in results["sections"].items() if any(r["ours"] for r in s["rows"])]
    if not sections:
        return
    rows = -(-len(sections) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(13, 3.6 * rows), layout="constrained", squeeze=False)
    for ax, (name, section) in zip(axes.flat, sections):
        _panel(ax, name, section)
    for ax in axes.flat[len(sections) :]:
        ax.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(ax: Any, name: str, section: Record) -> None:
    threads = max(row["threads"] for row in section["rows"])
    rows = [row for row in section["rows"] if row["ours"] and row["threads"] == threads]
    cases = _names(rows, "case")
    if len(cases) > PLOT_CASES:
        cases = [case for case in cases if case.endswith("M=1")]
    variants = _names([row for row in rows if row["case"] in cases], "variant")
    width = 0.84 / max(3, len(variants))
    for i, variant in enumerate(variants):
        found = {row["case"]: row for row in rows if row["variant"] == variant}
        at = [c + (i - (len(variants) - 1) / 2) * width for c, case in enumerate(cases) if case in found]
        bars = [found[case] for case in cases if case in found]
        ratios = [row["speedup"] for row in bars]
        value = [r["value"] for r in ratios]
        error = [[r["value"] - r["low"] for r in ratios], [r["high"] - r["value"] for r in ratios]]
        ax.bar(at, value, width, yerr=error, label=variant, error_kw={"lw": 0.8})
        best = [r["speedup"]["value"] / r["speedup_best"]["value"] for r in bars]
        ax.hlines(best, [x - width / 2 for x in at], [x + width / 2 for x in at], colors="black", lw=1.5)
    ax.axhline(1.0, color="grey", lw=0.8, ls="--")
    ax.set_xticks(range(len(cases)), cases, rotation=20, ha="right", fontsize=7)
    ax.set_title(f"{name}: x {rows[0]['baseline']}, {threads} threads (black: best alternative)", fontsize=9)
    ax.legend(fontsize=7, ncols=3)


if __name__ == "__main__":
    write_all()
