"""The bitwidths space: what it finds in a model, what its options cost, its baselines."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autocomp.description import Description
from autocomp.errors import JobError, SpaceError
from autocomp.job import Job
from autocomp.quantize.rounding import quantize
from autocomp.quantize.scheme import Scheme
from autocomp.search_spaces.base import ModelSite, Part, exact_tables
from autocomp.search_spaces.bitwidths import Bitwidths, BitwidthsConfig
from autocomp.space import Candidate, SearchSpace
from autocomp.worker import ModelWorker

MakeWorker = Callable[..., ModelWorker]


def block_parts(i: int) -> list[Part]:
    at = f"model.layers.{i}"
    qkv, gate_up = f"{at}.attn.q-k-v", f"{at}.mlp.gate-up"
    shapes = {"attn.q": (64, 64), "attn.k": (32, 64), "attn.v": (32, 64), "attn.o": (64, 64)}
    shapes |= {"mlp.gate": (128, 64), "mlp.up": (128, 64), "mlp.down": (64, 128)}
    ties = {"attn.q": qkv, "attn.k": qkv, "attn.v": qkv, "mlp.gate": gate_up, "mlp.up": gate_up}
    return [Part(f"{at}.{n}", "linear", s, i, ties.get(n, "")) for n, s in shapes.items()]


def site(tied: bool = False, blocks: int = 2) -> ModelSite:
    embedding = Part("model.embed", "embedding", (300, 64), role="embedding")
    head = Part("head", "linear", (300, 64), role="head", shared_with="model.embed" if tied else "")
    body = [p for i in range(blocks) for p in block_parts(i)]
    return ModelSite("llama", (embedding, *body, head), other_bytes=1000, fingerprint="f", itemsize=2)


def space(**options: Any) -> Bitwidths:
    return Bitwidths(BitwidthsConfig(**options))


def names(found: Any) -> list[str]:
    return [d.name.removeprefix("bitwidths/") for d in found]


def test_granularity_says_what_shares_a_choice() -> None:
    linear = space(granularity="linear").decisions(site())
    assert len(linear) == 14 and all(len(d.sites) == 1 for d in linear)
    tied = space(granularity="tied").decisions(site())
    assert names(tied)[:4] == [
        "model.layers.0.attn.q+k+v", "model.layers.0.attn.o", "model.layers.0.mlp.gate+up",
        "model.layers.0.mlp.down",
    ]  # fmt: skip
    assert [d.block for d in tied] == [0] * 4 + [1] * 4
    block = space(granularity="block").decisions(site())
    assert names(block) == ["model.layers.0", "model.layers.1"] and len(block[1].sites) == 7
    (model,) = space(granularity="model").decisions(site())
    assert names([model]) == ["model"] and len(model.sites) == 14 and model.block is None
    for granularity in ("linear", "tied", "block", "model"):
        found = space(granularity=granularity).decisions(site())
        assert len({d.name for d in found}) == len(found)
        every = [path for d in found for path in d.sites]
        assert sorted(every) == sorted(p.path for p in site().parts if p.role == "body")


def test_linears_that_share_a_weight_share_a_choice() -> None:
    borrower = Part("model.again", "linear", (64, 64), 1, tie="x", shared_with="model.layers.0.attn.o")
    whole = ModelSite("odd", (*site().parts, borrower), 0, "f")
    found = space(granularity="linear").decisions(whole)
    assert ("model.layers.0.attn.o", "model.again") in [d.sites for d in found]


def test_exclude_leaves_matching_linears_alone() -> None:
    found = space(granularity="linear", exclude=[r"\.mlp\.", r"layers\.0\.attn\.[qk]$"]).decisions(site())
    assert {d.sites[0] for d in found if d.block == 0} == {"model.layers.0.attn.v", "model.layers.0.attn.o"}
    assert sum(d.block == 1 for d in found) == 4


@pytest.mark.parametrize(
    ("options", "tied", "message"),
    [
        ({"exclude": ["layers"]}, False, "nothing to quantize in this llama model: 15 linears"),
        ({"exclude": ["down_prj"]}, False, "'down_prj' matches no part"),
        ({"head": ["w8"]}, True, "follows `embeddings`"),
    ],
)
def test_what_the_model_lacks_is_refused(options: dict[str, Any], tied: bool, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        space(**options).decisions(site(tied))


def test_embeddings_of_a_model_without_one_are_refused() -> None:
    bare = ModelSite("odd", tuple(p for p in site().parts if p.role != "embedding"), 0, "f")
    with pytest.raises(SpaceError, match="no plain embedding"):
        space(embeddings=["w8"]).decisions(bare)


def test_options_replace_bits_and_are_ordered_by_size() -> None:
    assert space(bits=[16, 4, 2], group=32, symmetric=False, outliers=0.5).config.labels() == [
        "w2g32ao0.5", "w4g32ao0.5", "w16",
    ]  # fmt: skip
    given = space(bits=[2], options=["w16", "w8", "w4g128", "w4g32", "w4g32"]).config.labels()
    assert given == ["w4g128", "w4g32", "w8", "w16"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": [7]}, "bits must be one of"),
        ({"group": 12}, "multiple of 8"),
        ({"options": ["4bit"]}, "can't read the scheme '4bit'"),
        ({"exclude": ["("]}, "not a regular expression"),
        ({"outlier": 1}, "unknown key.*outliers"),
    ],
)
def test_bad_settings_are_errors_of_the_job(options: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        Job.of({"workload": {"model": "none"}, "space": [{"bitwidths": options}]})


def test_the_ends_follow_embeddings_and_head() -> None:
    assert names(space().decisions(site()))[-1].endswith("mlp.down"), "untouched unless asked for"
    both = space(embeddings=["w8", "w16"], head=["w4g32"]).decisions(site())[-2:]
    assert [d.sites for d in both] == [("model.embed",), ("head",)]
    assert [d.options for d in both] == [("w8", "w16"), ("w4g32",)]
    shared = space(embeddings=["w8", "w16"]).decisions(site(tied=True))[-1]
    assert shared.sites == ("model.embed", "head")


def baselines(found: Bitwidths, where: ModelSite) -> list[tuple[str, ...]]:
    """Each baseline as (label of the body, labels of the ends)."""
    decisions = found.decisions(where)
    result = []
    for candidate in found.baselines(where, decisions):
        body = {str(candidate[d.name]) for d in decisions if where.part(d.sites[0]).role == "body"}
        ends = [str(candidate[d.name]) for d in decisions if where.part(d.sites[0]).role != "body"]
        assert len(body) == 1, "a baseline is uniform"
        result.append((*body, *ends))
    return result


@pytest.mark.parametrize("granularity", ["linear", "tied", "block", "model"])
@pytest.mark.parametrize("ends", [["w8", "w16"], ["w4g32", "w8", "w16"]])
def test_baselines_are_every_label_with_every_label_of_the_ends(granularity: str, ends: list[str]) -> None:
    labels = ["w4g32", "w8", "w16"]
    found = space(options=labels, embeddings=ends, granularity=granularity)
    wanted = set(itertools.product(labels, ends))
    assert set(baselines(found, site(tied=True))) == wanted
    assert len(baselines(found, site(tied=True))) == len(wanted)
    assert baselines(space(options=labels, granularity=granularity), site()) == [
        (o,) for o in labels
    ]  # fmt: skip


def test_ends_without_a_common_label_still_give_baselines() -> None:
    found = space(options=["w4g32", "w8"], embeddings=["w8"], head=["w4g32"])
    assert baselines(found, site()) == [("w8", "w8", "w4g32"), ("w4g32", "w8", "w4g32")]


def test_the_first_baseline_is_uncompressed_or_nearest_to_it(make_worker: MakeWorker) -> None:
    with_16 = Description.from_json(make_worker("llama").describe())
    assert set(with_16.baselines[0].values.values()) == {"w16"} and len(with_16.baselines) == 4
    without = Description.from_json(make_worker("llama", options=["w3g32", "w8"]).describe())
    assert [set(b.values.values()) for b in without.baselines] == [{"w8"}, {"w3g32"}]


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "opt", "mixtral"])
def test_uncompressed_memory_is_every_byte_of_the_model(make_worker: MakeWorker, kind: str) -> None:
    worker = make_worker(kind, "bfloat16", options=["w4g32", "w16"], embeddings=["w8", "w16"])
    described = Description.from_json(worker.describe())
    model = worker.built.model
    tensors = {(t.data_ptr(), t.numel()): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    whole = described.exact["memory_mb"].total(described.baselines[0])
    assert whole * 1e6 == pytest.approx(sum(tensors.values()), abs=0.5)


LABELS = ["w2g32", "w3g32a", "w4g32", "w4g32ao0.5", "w5g64", "w6", "w8", "w16"]


@pytest.mark.parametrize("label", LABELS)
def test_memory_and_bits_of_an_option_are_those_of_its_tensors(label: str) -> None:
    found = space(options=[label], embeddings=["w16"], granularity="tied")
    decisions = found.decisions(site(tied=True))
    first = next(d for d in decisions if len(d.sites) == 3)
    cost = found.resources(site(), first, label, "cpu")
    scheme = Scheme.parse(label)
    shapes = [(64, 64), (32, 64), (32, 64)]
    generator = torch.Generator().manual_seed(0)
    wanted = sum(
        2 * rows * columns
        if scheme.is_dense
        else quantize(torch.randn(rows, columns, generator=generator), scheme).nbytes
        for rows, columns in shapes
    )
    assert cost.metrics["memory_mb"] * 1e6 == pytest.approx(wanted, abs=1e-6)
    assert cost.metrics["code_bits"] == scheme.bits * 128 * 64 and cost.metrics["weights"] == 128 * 64
    assert sum(cost.ops.values()) == 3


def test_average_bits_weigh_layers_by_their_size() -> None:
    found = space(options=["w4g32", "w8"], granularity="linear")
    decisions = found.decisions(site())
    resources = {d.name: {o: found.resources(site(), d, o, "cpu") for o in d.options} for d in decisions}
    table = exact_tables(site(), resources)["avg_bits"]
    choice = {d.name: ("w8" if d.sites[0].endswith("mlp.down") else "w4g32") for d in decisions}
    small, large = 64 * 64 * 2 + 32 * 64 * 2 + 128 * 64 * 2, 64 * 128
    wanted = (4 * small + 8 * large) / (small + large)
    assert table.total(Candidate.of(choice)) == pytest.approx(wanted)


def test_a_tied_weight_is_counted_once_and_a_tied_head_is_a_kernel_call() -> None:
    found = space(options=["w8"], embeddings=["w8", "w16"])
    ends = found.decisions(site(tied=True))[-1]
    cost = found.resources(site(tied=True), ends, "w16", "cpu")
    assert cost.metrics == {
        "memory_mb": 300 * 64 * 2 / 1e6,
        "code_bits": 16.0 * 300 * 64,
        "weights": 300 * 64.0,
    }
    assert sum(cost.ops.values()) == 1


def test_what_nothing_executes_says_why() -> None:
    found = space(options=["w3g8", "w8"])
    first = found.decisions(site())[0]
    odd, plain = (found.resources(site(), first, o, "cpu") for o in ("w3g8", "w8"))
    assert odd.executes == "" and "no native cpu kernel for w3g8" in odd.reason
    assert plain.executes and plain.reason == ""


def test_a_site_without_weights_to_search_has_no_average() -> None:
    assert set(exact_tables(site(), {})) == {"memory_mb"}
    whole = exact_tables(site(), {})["memory_mb"].base * 1e6
    assert whole == 1000 + 2 * sum(p.numel for p in site().parts)


def test_sites_survive_json_and_name_unknown_parts() -> None:
    assert ModelSite.from_json(site(True).to_json()) == site(True)
    with pytest.raises(SpaceError, match=r"no part 'model\.layers\.9'"):
        site().part("model.layers.9")


def test_decisions_make_a_valid_space() -> None:
    found = space(options=["w4g32"]).decisions(site(blocks=1))
    only = SearchSpace(tuple(found)).uniform()
    assert len(only) == 1, "one option is a space, if a small one"
