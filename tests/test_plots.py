"""Pictures and tables of fronts: what is drawn, and that odd fronts draw at all."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from autocomp import choice_map, plots, report
from autocomp.errors import SpaceError
from autocomp.objective import Constraint, Objective
from autocomp.pareto import ParetoFront
from autocomp.space import Candidate, Choice, Decision, Interval, SearchSpace
from autocomp.trial import Estimate, Fidelity, Measurement, Trial

OPTIONS = ("w2g64", "w4g64", "w8", "w16")
SPACE = SearchSpace(
    (
        Decision("bitwidths/model.embed_tokens", Choice(OPTIONS, True), (), "bitwidths"),
        *(
            Decision(f"bitwidths/model.layers.{b}.{kind}", Choice(OPTIONS, True), (), "bitwidths", b)
            for b in range(6)
            for kind in ("self_attn.qkv", "mlp.down_proj")
        ),
    )
)
KL, MS, MB = Objective("kl"), Objective("decode_ms"), Objective("memory_mb")


def make_trial(number: int, candidate: Candidate | None = None, **values: float) -> Trial:
    rng = np.random.default_rng(number)
    chosen = candidate or Candidate.of({d.name: str(d.domain.sample(rng)) for d in SPACE})
    size = sum({"w2g64": 2, "w4g64": 4, "w8": 8, "w16": 16}[str(v)] for v in chosen.values.values())
    kl = float(2 ** (-size / 12) * rng.uniform(0.5, 2))
    metrics = {
        "kl": Estimate(values.get("kl", kl), 0.05 * kl),
        "decode_ms": Estimate(values.get("decode_ms", size / 10), 0.1),
        "memory_mb": Estimate(float(size)),
        "avg_bits": Estimate(size / len(SPACE)),
    }
    origin = "baseline" if candidate is not None else "hybrid"
    return Trial(number, chosen, Fidelity(), origin, Measurement(metrics, "cpu"))


def uniform(number: int, option: str) -> Trial:
    return make_trial(number, Candidate.of({d.name: option for d in SPACE}))


MANY = [*(uniform(i, o) for i, o in enumerate(OPTIONS)), *(make_trial(i) for i in range(4, 60))]
PLACE = {
    "references": 5,
    "drifts": True,
    "times": [0.0, 60.0, 120.0],
    "level": [10.0, 10.0, 12.0],
    "measured": [[0.0, 10.1, 0.1], [60.0, 9.9, 0.1], [60.0, 30.0, 0.1], [120.0, 12.0, float("nan")]],
}
NOISE = {
    "drift": {"decode_ms": {"": PLACE}, "prefill_ms": {"": {**PLACE, "references": 1}}},
    "words": ["the device became 20 % slower"],
}
FRONTS = {
    "none": ParetoFront((), (KL, MS)),
    "none feasible": ParetoFront.of(MANY, [KL, MS], [Constraint.parse("memory_mb <= 1")]),
    "one": ParetoFront.of(MANY[:1], [KL, MS]),
    "many": ParetoFront.of(MANY, [KL, MS]),
    "one objective": ParetoFront.of(MANY, [KL]),
    "three objectives": ParetoFront.of(MANY, [KL, MS, MB]),
    "maximize": ParetoFront.of(MANY, [Objective("kl", minimize=False), MS]),
    "zeros": ParetoFront.of([make_trial(i, kl=0.0, decode_ms=1.0) for i in range(3)], [KL, MS]),
}


@pytest.mark.parametrize("name", FRONTS)
def test_every_front_draws(name: str, tmp_path: Path) -> None:
    front = FRONTS[name]
    selected = front.front[0].trial if front.front else None
    png = plots.front_png(front, tmp_path / "deep" / "front.png", selected)
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 5000
    page = plots.front_page(front, selected)
    drawn = sum(len(t.x) for t in page.data if t.mode == "markers" and t.legendgroup != "selected")
    baselines = sum(report.is_baseline(p.trial) for p in front.points)
    assert drawn == (len(front.points) + baselines) * max(1, len(front.objectives) - 1)


def test_the_page_needs_no_network_and_names_everything(tmp_path: Path) -> None:
    front = FRONTS["many"]
    selected = front.select("min kl")
    path = plots.front_html(front, tmp_path / "front.html", selected)
    content = path.read_text()
    assert not re.search(r"<script[^>]+src=", content) and not re.search(r"<link[^>]+href=", content)
    page = plots.front_page(front, selected)
    names = {t.name for t in page.data if t.name}
    assert f"selected: #{selected.number}" in names and "uniform baseline (4)" in names
    hover = next(t for t in page.data if (t.name or "").startswith("front")).text[0]
    assert "avg_bits: " in hover and "memory_mb: " in hover and "±" in hover


def test_hover_escapes_names() -> None:
    trial = make_trial(99)
    odd = Trial(99, Candidate.of({"x/<b>": "<script>", "x/c": "y"}), Fidelity(), "<i>", trial.measurement)
    page = plots.front_page(ParetoFront.of([odd], [KL, MS]))
    assert all("<script>" not in text and "<i>" not in text for t in page.data for text in (t.text or ()))


def test_the_staircase_runs_through_the_front_by_value_only() -> None:
    front = FRONTS["many"]
    ((x, y),) = plots.panels(front)
    xs, ys = plots._staircase(front, x, y)
    assert xs == sorted(xs) and ys == sorted(ys, reverse=True)
    assert len(xs) == sum(p.label == "front" for p in front.points)
    assert plots._staircase(FRONTS["three objectives"], x, y) == ([], [])


def test_names_in_the_picture_do_not_overlap() -> None:
    figure = plots.front_figure(FRONTS["many"], FRONTS["many"].select("min kl"))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) >= 5
    clashes = [(i, j) for i in range(len(boxes)) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert not clashes


def test_axes_turn_logarithmic_only_for_wide_positive_values() -> None:
    (x, y), *_ = plots.panels(FRONTS["many"])
    assert y.log and not x.log
    (_, flat), *_ = plots.panels(FRONTS["zeros"])
    assert not flat.log


def test_an_exact_zero_keeps_the_logarithms_and_is_pointed_out() -> None:
    front = ParetoFront.of([*MANY, make_trial(99, kl=0.0)], [KL, MS])
    ((_, y),) = plots.panels(front)
    smallest = min(p.trial.value("kl") for p in front.points if p.trial.value("kl") > 0)
    zero = next(p.trial for p in front.points if p.trial.number == 99)
    assert y.log and 0 < y.value(zero) < smallest and "0 is drawn at" in y.title


@pytest.mark.parametrize("values", [[], [0.0], [0.1, 0.4, 0.4, 0.9]])
def test_hypervolume_draws(values: list[float], tmp_path: Path) -> None:
    assert plots.hypervolume_png(values, tmp_path / "hv.png").stat().st_size > 3000


def test_audit_draws_and_states_the_rank_correlation(tmp_path: Path) -> None:
    pairs = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 15.0], [4.0, 40.0]])
    title = plots._audit_title("kl", pairs)
    assert "Spearman 0.80" in title and "Kendall 0.67" in title and "n = 4" in title
    assert "no rank correlation" in plots._audit_title("kl", np.ones((5, 2)))
    nan = float("nan")
    for predicted, measured in (([], []), ([1.0], [nan]), ([1.0, nan, 1e4, 3], [2.0, 1.0, 2e4, 1])):
        assert plots.audit_png("kl", predicted, measured, tmp_path / "a.png").stat().st_size > 3000


def test_the_choice_map_has_a_cell_for_each_decision(tmp_path: Path) -> None:
    chart = choice_map.layout(SPACE)
    assert chart.rows == ("self_attn.qkv", "mlp.down_proj") and chart.blocks == tuple(range(6))
    assert len(chart.cells) == 12 and [d.name for d in chart.strip] == ["bitwidths/model.embed_tokens"]
    figure = choice_map.choice_map_figure(SPACE, make_trial(7).candidate)
    assert [len(ax.patches) for ax in figure.axes] == [12, 1]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [entry.split()[0] for entry in legend] == list(OPTIONS)
    assert choice_map.choice_map_png(SPACE, make_trial(7).candidate, tmp_path / "m.png").stat().st_size > 3000


def test_the_choice_map_takes_any_space(tmp_path: Path) -> None:
    decisions = (
        *(Decision(f"schedule/t{i}", Interval(0.0, 1.0, nullable=True), (), "schedule") for i in range(14)),
        *(Decision(f"experts/rows.{i}", Interval(0.0, 1.0), (), "experts", 4) for i in range(2)),
        *(Decision(f"attention/h.{b}.span", Choice((256, 1024, None)), (), "attention", b) for b in (0, 4)),
        *(Decision(f"attention/h.{b}.fixed", Choice((True,)), (), "attention", b) for b in (0, 4)),
    )
    space = SearchSpace(decisions)
    rng = np.random.default_rng(0)
    chart = choice_map.layout(space)
    assert chart.rows[:2] == ("experts: rows.0", "experts: rows.1")
    assert "attention: span" in chart.rows and chart.blocks == (0, 4)
    for i in range(3):
        assert choice_map.choice_map_png(space, space.sample(rng), tmp_path / f"{i}.png").exists()
    only_strip = SearchSpace(decisions[:3])
    assert len(choice_map.choice_map_figure(only_strip, only_strip.sample(rng)).axes) == 1


def test_the_choice_map_keeps_decisions_apart_that_look_alike() -> None:
    twins = tuple(Decision(f"s/{a}.0.x", Choice((1, 2)), (), "s", 0) for a in ("up", "down"))
    assert len(choice_map.layout(SearchSpace(twins)).cells) == 2


def test_the_choice_map_refuses_a_foreign_candidate() -> None:
    with pytest.raises(SpaceError):
        choice_map.choice_map_figure(SPACE, Candidate.of({"a": 1}))


def test_a_legend_of_many_options_lists_those_that_are_taken() -> None:
    options = tuple(f"w{i}" for i in range(13))
    space = SearchSpace(tuple(Decision(f"s/{b}.x", Choice(options), (), "s", b) for b in range(3)))
    candidate = Candidate.of({"s/0.x": "w4", "s/1.x": "w12", "s/2.x": "w4"})
    figure = choice_map.choice_map_figure(space, candidate)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["w4 (2)", "w12 (1)"]


def test_options_sort_by_the_numbers_in_their_labels() -> None:
    labels = ("w16", "w4g128", "w4g64", "w2", "dense", 256, 8)
    space = SearchSpace((Decision("a", Choice(labels)),))
    assert choice_map.option_order(space) == [8, 256, "dense", "w2", "w4g64", "w4g128", "w16"]


def test_descriptions_are_short() -> None:
    assert report.describe(uniform(0, "w4g64").candidate) == "w4g64"
    mixed = Candidate.of({"b/0": "w4", "b/1": "w4", "b/2": "w8", "a/0": "dense"})
    assert report.describe(mixed) == "dense | w4×2 w8×1"
    assert report.describe(Candidate.of({"b/0": 1, "b/1": 2, "b/2": 3}), longest=1) == "1×1 +2 more"
    floats = Candidate.of({"s/0": 0.25, "s/1": None, "s/2": 0.5, "s/3": "dpm"})
    assert report.describe(floats) == "2 values in 0.25..0.5 (1 unused), dpm"


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["dense/k16v16", "dense/k16v16"], "dense"),
        (["dense/k8v8"], "dense, k8v8"),
        (["a0b0.25s16/k8v4", "a0b0.25s16/k8v4"], "spans 25%, k8v4"),
        (["a512b0s16", "a512b0s16/k16v16", "a-64b0.0625s4"], "spans 512×2 6.25%-64×1"),
        (["a128b0.5s0/k8v4", "dense/k4v4", "dense/k4v4"], "spans dense×2 50%+128×1, k4v4×2 k8v4×1"),
        (["wide", "narrow", "wide"], "wide×2 narrow×1"),
    ],
)
def test_attention_is_described_by_spans_and_bits(labels: list[str], words: str) -> None:
    values = {f"attention/layers.{i}.kv0": label for i, label in enumerate(labels)}
    assert report.describe(Candidate.of(values)) == words
    assert report.describe(Candidate.of({**values, "b/0": "w4"})) == f"{words} | w4"


def test_uniform_means_one_option_a_space() -> None:
    assert report.is_uniform(Candidate.of({"a/0": 1, "a/1": 1, "b/0": "x", "b/1": "x"}))
    assert not report.is_uniform(Candidate.of({"a/0": 1, "a/1": 2, "b/0": "x", "b/1": "x"}))
    assert not report.is_uniform(Candidate.of({"a/0": 1})) and not report.is_uniform(Candidate.of({}))


def test_tables_show_the_cache_where_it_was_measured() -> None:
    trial = make_trial(70)
    assert trial.measurement is not None
    cache = {"density": Estimate(0.31), "kv_mb": Estimate(12.5)}
    metrics = {**trial.measurement.metrics, **cache}
    cached = Trial(71, trial.candidate, Fidelity(), "hybrid", Measurement(metrics, "cpu"))
    header = report.grid(ParetoFront.of([cached], [KL, MS])).header
    assert header[3:-1] == ("kl", "decode_ms", "avg_bits", "kv_mb", "density")
    assert not set(cache) & set(report.grid(ParetoFront.of([trial], [KL, MS])).header)


def test_the_text_table_is_aligned_and_marks_baselines_and_the_selection() -> None:
    front = FRONTS["many"]
    selected = front.select("memory_mb <= 60, min kl")
    lines = report.text(front, selected).splitlines()
    header, rows = lines[0], lines[2:-1]
    shown = [p for p in front.points if p.label != "dominated" or report.is_baseline(p.trial)]
    assert len(rows) == len(shown) and sum("*" in row.split()[0] + row.split()[1] for row in rows) == 4
    assert [row for row in rows if row.startswith(">")] == [rows[_index(shown, selected)]]
    end = header.index("decode_ms") + len("decode_ms")
    assert all(row[end - 1].isdigit() and row[end : end + 2] in ("  ", "") for row in rows)
    assert any(row.endswith(f"dominated by #{p.dominated_by}") for row, p in zip(rows, shown, strict=True))


def _index(shown: list[Any], trial: Trial) -> int:
    return next(i for i, p in enumerate(shown) if p.trial.number == trial.number)


def test_markdown_has_one_cell_a_column_and_escapes_bars() -> None:
    trial = make_trial(70)
    odd = Trial(70, Candidate.of({"a/0": "x", "b/0": "y"}), Fidelity(), "hybrid", trial.measurement)
    front = ParetoFront.of([odd], [KL, MS])
    lines = report.markdown(front, odd).splitlines()
    columns = len(re.findall(r"(?<!\\)\|", lines[0]))
    assert all(len(re.findall(r"(?<!\\)\|", line)) == columns for line in lines[:3])
    assert "x \\| y" in lines[2] and lines[2].startswith("| **70**")


def test_an_empty_table_says_what_to_do() -> None:
    assert "memory_mb <= 1" in report.text(FRONTS["none feasible"])
    assert "failures" in report.markdown(FRONTS["none"])
    assert report.rich_table(FRONTS["none"]).row_count == 0


def test_the_terminal_table_has_the_same_rows() -> None:
    front = FRONTS["three objectives"]
    assert report.rich_table(front, front.select("min kl")).row_count == len(report.grid(front).rows)


def test_artifacts_are_written_and_a_failing_drawing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from autocomp import run_files

    (tmp_path / "front.json").write_text("{}")
    audit = {"kl": {"predicted": [1.0, 2.0], "measured": [1.0, 3.0]}}
    result = cast(
        Any,
        SimpleNamespace(
            run_dir=tmp_path, front=FRONTS["many"], audit=audit, hypervolume=[0.1, 0.2], noise=NOISE
        ),
    )
    monkeypatch.setattr(run_files, "read_description", lambda _: SimpleNamespace(space=SPACE))
    names = {p.name for p in report.write_artifacts(result, maps=2)}
    fixed = {"front.json", "front.md", "front.html", "front.png", "hypervolume.png", "audit_kl.png"}
    fixed |= {"drift_decode_ms.png"}
    assert "- the device became 20 % slower" in (tmp_path / "front.md").read_text()
    assert names > fixed and len([n for n in names if n.startswith("choices_")]) == 2
    assert all((tmp_path / n).stat().st_size for n in names)

    monkeypatch.setattr(plots, "front_png", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with caplog.at_level(logging.WARNING, "autocomp"):
        again = {p.name for p in report.write_artifacts(result, maps=0)}
    assert again == fixed - {"front.png"} and "disk full" in caplog.text
