"""Maps of what key/value groups keep: which cell holds what, and where the files of a run come from."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from autocomp import choice_map, cli, span_map
from autocomp.attention.plan import Keep
from autocomp.description import Description
from autocomp.errors import RunError, SpaceError
from autocomp.objective import Objective
from autocomp.pareto import ParetoFront
from autocomp.run_files import read_context
from autocomp.search_spaces.base import ModelSite, Part
from autocomp.space import AdditiveTable, AtMostDistinct, Candidate, Choice, Decision, SearchSpace
from autocomp.span_layout import is_attention, layout, without_attention
from autocomp.trial import Fidelity, Trial

KEEPS = (
    "dense/k16v16",
    "dense/k8v4",
    "a0b0.25s4/k16v16",
    "a0b0.25s4/k8v4",
    "a100b0s4/k16v16",
    "a100b0s4/k8v4",
)


def sites(layer: int, groups: int) -> tuple[str, ...]:
    return tuple(f"model.layers.{layer}.self_attn.kv{g}" for g in range(groups))


def attention(
    groups: dict[int, int], granularity: str = "group", keeps: tuple[str, ...] = KEEPS
) -> SearchSpace:
    """``groups``: layer -> key/value groups."""
    paths = {layer: sites(layer, n) for layer, n in groups.items()}
    if granularity == "model":
        everything = tuple(p for own in paths.values() for p in own)
        return SearchSpace((Decision("attention/model", Choice(keeps), everything, "attention"),))
    if granularity == "layer":
        cut = [(own[0].rpartition(".")[0], own, layer) for layer, own in paths.items()]
    else:
        cut = [(path, (path,), layer) for layer, own in paths.items() for path in own]
    return SearchSpace(
        tuple(Decision(f"attention/{n}", Choice(keeps), own, "attention", block) for n, own, block in cut)
    )


def uniform(space: SearchSpace, keep: str, **changes: str) -> Candidate:
    return Candidate.of({d.name: keep for d in space}).replace(changes)


WEIGHTS = tuple(
    Decision(f"bitwidths/model.layers.{b}.mlp", Choice(("w4", "w16")), (), "bitwidths", b) for b in range(2)
)


def test_a_cell_for_each_group_holds_the_share_that_is_kept() -> None:
    space = attention({10: 2, 9: 3})
    candidate = uniform(
        space,
        "a0b0.25s4/k16v16",
        **{
            "attention/model.layers.10.self_attn.kv1": "a100b0s4/k16v16",
            "attention/model.layers.9.self_attn.kv2": "dense/k16v16",
        },
    )
    chart = layout(space, candidate, 1000)
    assert chart.labels == ("9", "10") and not chart.whole
    np.testing.assert_allclose(chart.shares, [[0.25, 0.25], [0.25, 0.1], [1.0, np.nan]])
    assert chart.density == pytest.approx((3 * 0.25 + 0.1 + 1) / 5)
    assert chart.bits == ((16, 16), (16, 16))
    assert layout(space, candidate, 80).shares[1, 1] == 1.0  # 100 tokens are all of 80


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_one_row_shows_groups_that_share_a_decision(granularity: str) -> None:
    space = attention({0: 4, 1: 4, 2: 1}, granularity)
    chart = layout(space, uniform(space, "a0b0.25s4/k8v4"), 400)
    assert chart.whole and chart.labels == ("0", "1", "2") and chart.shares.shape == (4, 3)
    figure = span_map.span_map_figure(space, uniform(space, "a0b0.25s4/k8v4"), 400)
    kept = cast(Any, figure.axes[0].collections[0]).get_array()
    np.testing.assert_allclose(kept.reshape(-1), [0.25] * 3)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["all groups"]


def test_a_layers_own_window_is_its_share_but_not_a_loss() -> None:
    space = attention({0: 1, 1: 1})
    candidate = uniform(
        space, "dense/k16v16", **{"attention/model.layers.1.self_attn.kv0": "a100b0s4/k16v16"}
    )
    windows = {"model.layers.0.self_attn.kv0": 50, "model.layers.1.self_attn.kv0": 0}
    chart = layout(space, candidate, 200, windows)
    np.testing.assert_allclose(chart.shares, [[0.25, 0.5]])
    assert chart.density == pytest.approx((1 + 0.5) / 2)
    figure = span_map.span_map_figure(space, candidate, 200, windows=windows)
    assert len(figure.axes[0].patches) == 1  # hatched
    assert "the layer's own window" in [t.get_text() for t in figure.legends[0].get_texts()]


def test_the_picture_tells_bits_density_and_megabytes() -> None:
    space = attention({0: 2, 1: 2})
    last = {f"attention/{s}": "dense/k16v16" for s in sites(1, 2)}
    candidate = uniform(space, "a100b0s4/k8v4", **last)
    figure = span_map.span_map_figure(space, candidate, 1000, kv_mb=12.25)
    shares, strip, scale = figure.axes
    drawn = [cast(Any, mesh).get_array().reshape(2, 2).filled(0) for mesh in shares.collections]
    np.testing.assert_allclose(drawn[0], [[0.1, 0], [0.1, 0]])
    np.testing.assert_allclose(drawn[1], [[0, 1], [0, 1]])  # dense has a colour of its own
    assert [t.get_text() for t in strip.texts] == ["8/4", "16/16"]
    assert [t.get_text() for t in scale.get_xticklabels()] == ["25", "10"]
    assert [t.get_text() for t in figure.legends[0].get_texts()][1:] == ["k16v16 (1)", "k8v4 (1)"]
    title = figure.get_suptitle()
    assert "55.0% of 1,000 tokens" in title and "12.25 MB" in title


def test_one_pair_of_bits_needs_no_strip() -> None:
    space = attention({0: 2}, keeps=("dense/k8v4", "a100b0s4/k8v4"))
    figure = span_map.span_map_figure(space, uniform(space, "dense/k8v4"), 1000)
    assert len(figure.axes) == 2 and "keys in 8 and values in 4 bits" in figure.get_suptitle()


@pytest.mark.parametrize(("layers", "groups"), [(4, 1), (4, 64), (30, 3), (100, 8)])
def test_nothing_is_cut_or_overlaps(layers: int, groups: int, tmp_path: Path) -> None:
    pairs = [f"dense/k{k}v{v}" for k in (16, 8, 4) for v in (16, 8, 4)]
    close = [f"a{tokens}b0s4/k8v4" for tokens in (110, 120, 130, 2100, 2200)]
    space = attention(
        dict.fromkeys(range(layers), groups), keeps=tuple(dict.fromkeys((*KEEPS, *close, *pairs)))
    )
    rng = np.random.default_rng(0)
    labels = rng.choice([*KEEPS[1::2], *close], len(space))
    candidate = Candidate.of({d.name: str(v) for d, v in zip(space, labels, strict=True)})
    title, windows = "#3: " + "spans and more words " * 12, dict.fromkeys(sites(0, groups), 512)
    figure = span_map.span_map_figure(space, candidate, 8192, title, kv_mb=1234.5, windows=windows)
    figure.savefig(tmp_path / "map.png")
    width, height = figure.get_size_inches() * figure.dpi
    legend = figure.legends[0].get_window_extent()
    title = figure._suptitle.get_window_extent()  # type: ignore[attr-defined]
    for box in [legend, title, *(ax.get_tightbbox() for ax in figure.axes)]:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
    for ax in figure.axes:
        names = [t.get_window_extent() for t in ax.get_xticklabels() if t.get_text() and t.get_visible()]
        names.sort(key=lambda box: box.x0)
        lowered = ax.xaxis.get_tick_params().get("labelbottom", True)
        assert not lowered or all(a.x1 < b.x0 for a, b in pairwise(names))


def test_what_does_not_belong_is_refused() -> None:
    space = attention({0: 2})
    with pytest.raises(SpaceError, match="no value"):
        span_map.span_map_figure(space, Candidate.of({}), 100)
    with pytest.raises(SpaceError, match="not in"):
        layout(space, uniform(space, "a1b0s0/k16v16"), 100)
    with pytest.raises(SpaceError, match="0 tokens"):
        layout(space, uniform(space, KEEPS[0]), 0)
    with pytest.raises(SpaceError, match="0 decisions"):
        layout(SearchSpace(WEIGHTS), uniform(SearchSpace(WEIGHTS), "w4"), 100)
    mixed = uniform(space, "dense/k8v4", **{"attention/model.layers.0.self_attn.kv1": "dense/k16v16"})
    with pytest.raises(SpaceError, match=r"layers\.0\.self_attn.*different bits"):
        span_map.span_map_figure(space, mixed, 100)


def test_the_choice_map_leaves_attention_to_the_span_map() -> None:
    alone = attention({0: 2, 1: 2})
    names = [d.name for d in alone]
    limits = (AtMostDistinct(tuple(names), 1, field=1), AtMostDistinct((WEIGHTS[0].name,), 1))
    joint = SearchSpace((*WEIGHTS, *alone), limits)
    rest = without_attention(joint)
    assert rest.decisions == WEIGHTS and rest.constraints == limits[1:]
    assert without_attention(alone) is alone and without_attention(SearchSpace(WEIGHTS)).decisions == WEIGHTS
    candidate = Candidate.of({**uniform(alone, KEEPS[3]).values, **{d.name: "w4" for d in WEIGHTS}})
    figure = choice_map.choice_map_figure(joint, candidate)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["w4 (2)", "w16 (0)"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["mlp"]
    with pytest.raises(SpaceError):
        choice_map.choice_map_figure(joint, uniform(SearchSpace(WEIGHTS), "w4"))


def test_only_sites_of_groups_make_a_decision_attention() -> None:
    own = Decision("attention/h.0", Choice((256, 1024)), ("h.0",), "attention", 0)
    assert not is_attention(own) and is_attention(attention({0: 1}).decisions[0])


def write_run(folder: Path, space: SearchSpace, options: dict[str, Any], context: int = 1000) -> Path:
    parts = tuple(
        Part(site, "kv_group", (2, 64), d.block, site.rpartition(".")[0], "attention")
        for d in space
        for site in d.sites
    )
    site = ModelSite("llama", (), 0, "f", context=context, kv_groups=parts)
    costs = {d.name: {o: float(len(str(o))) for o in d.options} for d in space if is_attention(d)}
    exact = {"kv_mb": AdditiveTable("kv_mb", 0.0, costs, exact=True)}
    told = Description(site, space, (), exact, {}, {"kl": True}, ())
    (folder / "description.json").write_text(json.dumps(told.to_json()))
    (folder / "job.yaml").write_text(json.dumps({"space": [{"bitwidths": {}}, {"attention": options}]}))
    return folder


def test_a_run_gets_the_maps_that_its_spaces_ask_for(tmp_path: Path) -> None:
    alone = attention({0: 2, 1: 2})
    for space, names in (
        (alone, ["spans_7.png"]),
        (SearchSpace(WEIGHTS), ["choices_7.png"]),
        (SearchSpace((*WEIGHTS, *alone)), ["choices_7.png", "spans_7.png"]),
    ):
        values = {d.name: d.options[0] for d in space}
        trial = Trial(7, Candidate.of(values), Fidelity(), "hybrid", None)
        maps = choice_map.maps_of(write_run(tmp_path, space, {}), trial)
        assert list(maps) == names
        for name, draw in maps.items():
            draw(tmp_path / name)
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_runs_span_map_is_of_its_context_and_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = attention({0: 2})
    trial = Trial(7, uniform(space, "a100b0s4/k8v4"), Fidelity(), "hybrid", None)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(span_map, "span_map_png", lambda *args, **more: asked.update(more, tokens=args[2]))
    for options, tokens in (({}, 1000), ({"context": 0}, 1000), ({"context": 400}, 400)):
        (draw,) = choice_map.maps_of(write_run(tmp_path, space, options), trial).values()
        draw(tmp_path / "spans.png")
        assert asked["tokens"] == tokens and asked["kv_mb"] == 2 * len("a100b0s4/k8v4")
    assert set(asked["windows"]) == set(sites(0, 2))


def test_front_writes_the_spans_beside_the_choices(tmp_path: Path) -> None:
    alone = attention({0: 2})
    front = ParetoFront((), (Objective("kl"),))
    for space, names in (
        (alone, {"map.png"}),
        (SearchSpace((*WEIGHTS, *alone)), {"map.png", "map_spans.png"}),
    ):
        trial = Trial(7, Candidate.of({d.name: d.options[0] for d in space}), Fidelity(), "hybrid", None)
        cli._draw(write_run(tmp_path, space, {}), front, trial, None, None, tmp_path / "map.png")
        assert {p.name for p in tmp_path.glob("*.png")} == names


def test_a_run_without_a_readable_job_says_so(tmp_path: Path) -> None:
    told = Description.from_json(
        json.loads((write_run(tmp_path, attention({0: 1}), {}) / "description.json").read_text())
    )
    (tmp_path / "job.yaml").write_text("space: 3")
    with pytest.raises(RunError, match=r"job\.yaml"):
        read_context(tmp_path, told)


def test_labels_of_the_tests_are_those_of_the_plan() -> None:
    assert [Keep.parse(k).label for k in KEEPS] == list(KEEPS)
