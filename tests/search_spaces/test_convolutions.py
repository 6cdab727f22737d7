"""Weight bits of the convolutions of a UNet: what is found, what it costs, what runs, and a search."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

import autocomp
from autocomp.description import Description
from autocomp.diffusion import activations
from autocomp.diffusion.activations import ActivationPlan
from autocomp.diffusion.denoiser import Denoiser
from autocomp.errors import SpaceError
from autocomp.job import Job
from autocomp.kernels.convolution import ConvForm, PackedConv2d
from autocomp.measure.conv_table import ConvOperation
from autocomp.measure.memory import weights_bytes
from autocomp.measure.op_table import parse_op_key
from autocomp.plan import make_plan
from autocomp.quantize.rounding import quantize
from autocomp.quantize.scheme import Scheme
from autocomp.search_spaces.base import ModelSite
from autocomp.search_spaces.bitwidths import Bitwidths, BitwidthsConfig
from autocomp.search_spaces.weights import WeightSwapper
from autocomp.testing.diffusion import tiny_dit_folder, tiny_unet_folder
from autocomp.testing.fakes import InlineExecutor
from autocomp.worker import ModelWorker
from autocomp.workloads.base import Built
from autocomp.workloads.diffusion_discovery import discover

DATA = {"calibration": 2, "proxy": 2, "selection": 2, "report": 3, "batch": 4}
DOWN = "down_blocks.0.downsamplers.0.conv"
MakeWorker = Callable[..., ModelWorker]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, apart: Path) -> Path:
    del apart
    root = tmp_path_factory.mktemp("unets")
    tiny_unet_folder(root / "unet")
    tiny_dit_folder(root / "dit")
    return root


def job(folders: Path, model: str = "unet", dtype: str = "float32", **options: Any) -> dict[str, Any]:
    workload = {
        "kind": "diffusion", "model": str(folders / model), "data": DATA, "sampler": {"steps": 2},
        "dtype": dtype, "scenario": {"batch": 2, "threads": 1, "repeats": 2},
    }  # fmt: skip
    bits = {"options": ["w3g32", "w4g64a", "w8", "w16"], "granularity": "linear", **options}
    return {
        "workload": workload, "space": [{"bitwidths": bits}], "objectives": ["min noise", "min memory_mb"],
        "device": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="module")
def make(folders: Path) -> Iterator[MakeWorker]:
    """``make(model="unet", dtype="float32", **bitwidths)``: equal orders get the same worker."""
    found: dict[str, ModelWorker] = {}

    def worker(**options: Any) -> ModelWorker:
        key = json.dumps(options, sort_keys=True)
        if key not in found:
            found[key] = ModelWorker(job(folders, **options), threads=1)
        assert found[key].built.pristine
        return found[key]

    yield worker
    gc.unfreeze()


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {p: m for p, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def output(worker: ModelWorker) -> torch.Tensor:
    """What the model says about fixed noise at one time."""
    own = worker.built.state["denoisers"][""]
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found: torch.Tensor = own(x, 500.0, {})
    return found


def output_sizes(built: Built) -> dict[str, torch.Size]:
    """Path of a convolution -> height and width of its output for one image."""
    sizes: dict[str, torch.Size] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, y: torch.Tensor) -> None:
            del module, args
            sizes[path] = y.shape[2:]

        return hook

    handles = [m.register_forward_hook(watch(p)) for p, m in convolutions(built.model).items()]
    built.state["denoisers"][""](torch.zeros(1, 1, 8, 8), 500.0, {})
    for handle in handles:
        handle.remove()
    return sizes


# -- what is found -----------------------------------------------------------------------------------------


def test_every_convolution_of_a_unet_is_a_part(make: MakeWorker) -> None:
    built = make().built
    site, modules = built.site, convolutions(built.model)
    found = {p.path: p for p in site.parts if p.kind == "conv"}
    assert set(found) == set(modules) and len(found) >= 12 and "conv" not in site.lacking
    sizes = output_sizes(built)
    for path, part in found.items():
        weight = built.originals[path]
        assert part.shape == (weight.shape[0], weight[0].numel()) and (part.role, part.tie) == ("body", "")
        assert part.rows == sizes[path].numel()
        assert part.conv.startswith(ConvForm.of(modules[path]).label + "@")
    assert (found[DOWN].conv, found[DOWN].rows, found[DOWN].shape) == ("k3x3s2x2p1x1@8x8", 16, (16, 144))
    order = [p.path for p in site.parts]
    assert order[0] == "conv_in" or order[0].startswith("time_embedding")
    assert order.index("conv_in") < order.index(DOWN) < order.index("conv_out") == len(order) - 1
    held = sum(p.numel for p in site.parts) * site.itemsize + site.other_bytes
    assert held == weights_bytes(built.model)
    assert site.other_bytes < 0.05 * held, "norms and biases are all that is left"
    assert ModelSite.from_json(json.loads(json.dumps(site.to_json()))) == site


def test_a_convolution_that_cannot_be_packed_stays_and_is_named(folders: Path) -> None:
    model: Any = UNet2DModel.from_pretrained(folders / "unet" / "unet")
    block: Any = model.get_submodule("down_blocks.0.resnets.0")
    block.conv1 = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
    block.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=4)
    model.add_module("unused", nn.Conv2d(4, 4, 1))
    called = Denoiser(model)
    site = discover(called, "f", lambda: called(torch.zeros(1, 1, 8, 8), 500.0, {}))
    assert {p.path for p in site.parts if p.kind == "conv"} == set(convolutions(model)) - {
        "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv2", "unused",
    }  # fmt: skip
    (note,) = Bitwidths(BitwidthsConfig()).notes(site)
    assert f"3 of {len(convolutions(model))} convolutions stay as they are" in note
    assert "conv1: it pads with 'reflect'" in note and "conv2: it has 4 groups" in note
    assert "unused: a call of the model does not reach it" in note
    assert sum(p.numel for p in site.parts) * 4 + site.other_bytes == weights_bytes(model)


def test_the_patch_embedding_of_a_transformer_stays_and_the_plan_says_so(make: MakeWorker) -> None:
    worker = make(model="dit")
    assert all(p.kind == "linear" for p in worker.built.site.parts)
    description = Description.from_json(worker.describe())
    objectives = Job.of(worker.job.resolved()).parsed_objectives()
    (note,) = make_plan(description, objectives, ()).notes
    assert "pos_embed.proj: it cuts the image into patches" in note


def test_convolutions_can_be_excluded(make: MakeWorker) -> None:
    decisions = make(exclude=["conv"]).decisions["bitwidths"]
    sites = {path for d in decisions for path in d.sites}
    assert sites and not any("conv" in path for path in sites)


# -- what it costs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["w3g32", "w4g64a", "w8"])
def test_bytes_are_exact(make: MakeWorker, label: str) -> None:
    worker = make()
    built, swapper = worker.built, WeightSwapper.of(worker.built)
    description = Description.from_json(worker.describe())
    uniform = description.baselines[0].replace({d.name: label for d in description.space})
    stored = built.site.other_bytes
    for part in built.site.parts:
        state = swapper.quantized(part.path, label, "rtn").to_state()
        stored += sum(t.numel() * t.element_size() for n, t in state.items() if n != "weight_shape")
    assert description.exact["memory_mb"].total(uniform) == pytest.approx(stored / 1e6, abs=1e-9)
    assert description.exact["avg_bits"].total(uniform) == pytest.approx(Scheme.parse(label).bits)


def test_an_option_names_the_call_that_runs_it(make: MakeWorker) -> None:
    worker = make()
    description = Description.from_json(worker.describe())
    row = description.resources[f"bitwidths/{DOWN}"]
    assert row["w4g64a"].ops == {"conv/16x144/w4g64a/k3x3s2x2p1x1@8x8": 1}
    assert row["w4g64a"].executes == "cpu" and row["w16"].executes == "torch"
    for part in worker.built.site.parts:
        (key,) = description.resources[f"bitwidths/{part.path}"]["w8"].ops
        op = parse_op_key(key)
        assert op.key == key and isinstance(op, ConvOperation) == (part.kind == "conv")
    assert description.rows["image_ms"] == (2, 1.0), "two images a call, two steps, shared by two images"


def test_what_no_kernel_runs_is_left_out_of_searches_with_latency(make: MakeWorker) -> None:
    worker = make(options=["w4g8", "w8", "w16"])
    row = Description.from_json(worker.describe()).resources[f"bitwidths/{DOWN}"]
    assert not row["w4g8"].executes and "no native cpu kernel for w4g8 at 16x144" in row["w4g8"].reason


# -- what runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring_computes_the_dequantized_weights_and_serving_the_same(make: MakeWorker, dtype: str) -> None:
    worker = make(dtype=dtype)
    built = worker.built
    before, modules = output(worker), dict(built.model.named_modules())
    weights = {n: t.clone() for n, t in built.model.state_dict().items()}
    labels = dict(zip((p.path for p in built.site.parts), ["w3g32", "w4g64a", "w8", "w16"] * 99))
    swapper = WeightSwapper.of(built)
    swapper.apply(labels, method="rtn", serving=False)
    for path, module in convolutions(built.model).items():
        original = built.originals[path]
        wanted = original
        if labels[path] != "w16":
            rows = quantize(original.flatten(1).float(), Scheme.parse(labels[path]))
            wanted = rows.dequantize(original.dtype).view(original.shape)
        assert torch.equal(module.weight, wanted), path
    scored = output(worker)
    swapper.apply(labels, method="rtn", serving=True)
    packed = {p for p, m in built.model.named_modules() if isinstance(m, PackedConv2d)}
    assert packed == {p.path for p in built.site.parts if p.kind == "conv" and labels[p.path] != "w16"}
    served = output(worker)
    swapper.restore()
    assert all(torch.equal(weights[n], t) for n, t in built.model.state_dict().items())
    assert dict(built.model.named_modules()) == modules and built.pristine
    assert torch.equal(output(worker), before)
    moved = float((scored - before).norm() / before.norm())
    assert moved > 0.05
    assert float((served - scored).norm() / scored.norm()) < (1e-3 if dtype == "float32" else 0.3 * moved)


def test_a_move_is_the_difference_of_matrices(make: MakeWorker) -> None:
    built = make().built
    rows = built.originals[DOWN].flatten(1)
    change = WeightSwapper.of(built).move(DOWN, "w16", "w3g32", "rtn")
    assert change.shape == built.site.part(DOWN).shape
    assert torch.equal(change, quantize(rows, Scheme.parse("w3g32")).dequantize(torch.float32) - rows)
    with pytest.raises(SpaceError, match="use method: mse"):
        WeightSwapper.of(built).quantized(DOWN, "w4g32", "gptq")


def test_activation_plans_of_convolutions_are_refused(make: MakeWorker) -> None:
    built = make().built
    with pytest.raises(SpaceError, match=r"inputs of convolutions are not rounded.*downsamplers"):
        activations.install(built.model, ActivationPlan({DOWN: (8, 16)}))
    WeightSwapper.of(built).apply({DOWN: "w8"}, method="rtn", serving=True)
    with pytest.raises(SpaceError, match="name linears"):
        activations.install(built.model, ActivationPlan({DOWN: (8, 16)}))
    WeightSwapper.of(built).restore()


# -- the whole ---------------------------------------------------------------------------------------------


def test_a_search_with_latency_and_an_export_with_the_same_images(folders: Path, tmp_path: Path) -> None:
    wanted = job(folders, granularity="block", options=["w4g64", "w16"]) | {
        "objectives": ["min noise", "min image_ms"],
        "constraints": ["avg_bits <= 12"],
        "sensitivity": {"method": "measured"},
        "searcher": {"name": "evolution"},
        "budget": {"trials": 4},
        "validation": {"audit": 1, "promote": 1, "report": 1},
        "executor": {"name": "local", "workers": 1, "threads": 1},
        "tracking": {"uri": "", "optuna": False},
    }
    worker = ModelWorker(Job.of(wanted).resolved(), threads=1)
    result = autocomp.search(wanted, run_dir=tmp_path / "run", executor=InlineExecutor(worker))
    assert result.status == "finished"
    chosen = min((p.trial for p in result.front.points), key=lambda t: t.value("memory_mb"))
    assert chosen.value("image_ms") > 0 and chosen.value("noise") > 0 and chosen.value("avg_bits") <= 12
    worker.export(chosen.candidate.to_json(), "diffusers", str(tmp_path / "out"))
    model: Any = autocomp.load(tmp_path / "out", device="cpu")
    worker.apply(chosen.candidate, serving=True)
    (_, images), *_ = worker.workload.pictures(worker.built, "report", range(3))  # type: ignore[attr-defined]
    assert torch.equal(model.sample(3), images)
    loaded = {p: m for p, m in model.models[""].named_modules() if isinstance(m, PackedConv2d)}
    serving = {p: m for p, m in worker.built.model.named_modules() if isinstance(m, PackedConv2d)}
    assert loaded and {p: m.form for p, m in loaded.items()} == {p: m.form for p, m in serving.items()}
    worker.restore()
    gc.unfreeze()
