"""The diffusers format: the same images after reloading, and folders that diffusers itself reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import autocomp
from autocomp.diffusion.activations import installed
from autocomp.diffusion.loaded import DiffusionModel, grid_image
from autocomp.diffusion.scheduler import UnifiedScheduler
from autocomp.errors import ExportError
from autocomp.exporters.compressed_tensors import CompressedTensorsExporter
from autocomp.exporters.diffusers import DiffusersExporter
from autocomp.exporters.native import NativeExporter
from autocomp.kernels.convolution import PackedConv2d
from autocomp.kernels.modules import PackedLinear
from autocomp.space import Candidate
from autocomp.testing.diffusion import (
    SIZE,
    tiny_dit_folder,
    tiny_flux_folder,
    tiny_sd3_folder,
    tiny_unet_folder,
)
from autocomp.worker import ModelWorker
from autocomp.workloads.diffusion_discovery import quiet
from autocomp.workloads.diffusion_serving import zoo_serving

DATA = {"calibration": 2, "proxy": 2, "selection": 2, "report": 3, "batch": 4}
BITS = {"bitwidths": {"options": ["w3g32", "w4g64a", "w8", "w16"]}}
ACTIVATIONS = {"activations": {"bits": [4, 8, 16], "ranges": 2}}
SCHEDULES = {"schedules": {"steps": 3, "search": ["time", "order"]}}
MODELS = {"schedules": {"steps": 3, "search": ["model"]}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, apart: Path) -> Path:
    """A DiT with two checkpoints, a smaller one, and a UNet without labels."""
    del apart
    root = tmp_path_factory.mktemp("diffusion")
    tiny_dit_folder(root / "dit")
    tiny_dit_folder(root / "small", seed=1, layers=1)
    tiny_dit_folder(root / "other", seed=2)
    tiny_unet_folder(root / "unet")
    tiny_sd3_folder(root / "sd3", dual=True, rms=True)
    tiny_flux_folder(root / "flux")
    tiny_unet_folder(root / "unet2", seed=1)
    return root


def make_worker(folders: Path, *spaces: dict[str, Any], kind: str = "dit", **fields: Any) -> ModelWorker:
    if kind in ("sd3", "flux"):
        fields = {"conditions": str(folders / kind / "conditions.safetensors"), **fields}
    workload = {
        "kind": "diffusion", "model": str(folders / kind), "data": DATA, "guidance": 1.5,
        "sampler": {"steps": 3}, **fields,
    }  # fmt: skip
    return ModelWorker(
        {"workload": workload, "space": list(spaces), "objectives": ["min noise"], "device": "cpu"}
    )


def mixed(worker: ModelWorker) -> Candidate:
    """Every option of every space somewhere."""
    values = dict(worker._neutral().values)
    for row in worker.decisions.values():
        values |= {d.name: d.options[i % len(d.options)] for i, d in enumerate(row) if d.options}
    return Candidate.of(values)


def served(worker: ModelWorker, candidate: Candidate) -> torch.Tensor:
    """The report images of the candidate on the kernels that serve it."""
    worker.apply(candidate, serving=True)
    state = worker.built.state
    with zoo_serving(worker.built, state["schedule"].models):
        (_, images), *_ = worker.workload.pictures(worker.built, "report", range(3))  # type: ignore[attr-defined]
    worker.restore()
    return torch.as_tensor(images)


def export(worker: ModelWorker, candidate: Candidate, out: Path) -> Any:
    worker.export(candidate.to_json(), "diffusers", str(out))
    return autocomp.load(out, device="cpu")


CASES: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, Any]]] = {
    "weights and activations": ((BITS, ACTIVATIONS), {}),
    "a UNet": ((BITS, ACTIVATIONS), {"kind": "unet"}),
    "a UNet in bfloat16": ((BITS,), {"kind": "unet", "dtype": "bfloat16"}),
    "a UNet, merged checkpoints": (
        (BITS, {"checkpoints": {}}),
        {"kind": "unet", "snapshots": ["unet", "unet2"]},
    ),
    "a UNet, zoo": ((MODELS, BITS), {"kind": "unet", "zoo": {"own4": {"weights": "w4g64"}}}),
    "bfloat16": ((BITS,), {"dtype": "bfloat16"}),
    "attention": ((BITS, {"diffusion_attention": {"ranges": 3}}), {}),
    "attention of SD3": ((BITS, {"diffusion_attention": {"ranges": 3}}), {"kind": "sd3"}),
    "attention of Flux": (
        (BITS, {"diffusion_attention": {"ranges": 3}}),
        {"kind": "flux", "size": (SIZE, SIZE), "guidance": 1.0},
    ),
    "merged checkpoints": ((BITS, {"checkpoints": {}}), {"snapshots": ["other", "dit"]}),
    "a zoo": (
        (MODELS, BITS),
        {"zoo": {"small": "small", "own4": {"weights": "w4g64"}, "unused": "small"}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_reloaded_export_gives_the_same_images(folders: Path, tmp_path: Path, case: str) -> None:
    spaces, fields = CASES[case]
    fields = dict(fields)
    if "snapshots" in fields:
        fields["snapshots"] = [str(folders / s) for s in fields["snapshots"]]
    zoo = fields.get("zoo", {})
    fields |= {"zoo": {n: str(folders / m) if isinstance(m, str) else m for n, m in zoo.items()}}
    worker = make_worker(folders, *spaces, **fields)
    candidate = mixed(worker)
    if "merged" in case:
        candidate = candidate.replace({"checkpoints/weight.0": -0.25, "checkpoints/weight.1": 1.25})
    if case == "a zoo":
        names = ("small", "", "own4")
        candidate = candidate.replace({f"schedules/model.{i}": name for i, name in enumerate(names)})
    before = {n: t.clone() for n, t in worker.built.model.state_dict().items()}
    model = export(worker, candidate, tmp_path / "out")
    after = worker.built.model.state_dict()
    assert worker.built.pristine and all(torch.equal(before[n], after[n]) for n in before)
    wanted = served(worker, candidate)
    assert torch.equal(model.sample(3), wanted)
    plain = served(worker, worker.uncompressed)
    assert not torch.equal(wanted, plain), "the candidate does nothing that one could see"
    envelope = json.loads((tmp_path / "out" / "autocomp.json").read_text())
    assert Candidate.of(envelope["candidate"]) == candidate
    assert envelope["schedule"] == model.schedule.to_json()
    packed = {n for n, m in model.models[""].named_modules() if isinstance(m, PackedLinear)}
    assert packed == set(envelope["own"]["modules"]) and packed
    if case == "a zoo":
        assert set(model.models) == {"", "small", "own4"} == set(envelope["zoo"]) | {""}
        assert not (tmp_path / "out" / "zoo" / "unused").exists()
        assert any(isinstance(m, PackedLinear) for m in model.models["own4"].modules())
    if "UNet" in case:
        every = [m for called in model.models.values() for m in called.modules()]
        assert any(isinstance(m, PackedConv2d) for m in every)
        assert set(model.models) == ({"", "own4"} if "zoo" in case else {""})
    if "activations" in case:
        assert installed(model.models[""]) is not None


def test_diffusers_reads_what_was_not_quantized_bit_for_bit(folders: Path, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    worker = make_worker(folders, BITS, SCHEDULES)
    candidate = worker._neutral()
    wanted = served(worker, candidate)
    model = export(worker, candidate, tmp_path / "out")
    assert (
        torch.equal(model.sample(3), wanted) and not (tmp_path / "out" / "autocomp-0001.safetensors").exists()
    )
    with quiet():
        plain = DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
        DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler")  # the noise is in diffusers' own words
    scheduler = UnifiedScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert scheduler.schedule == model.schedule
    x = worker.workload.noise(worker.built, "report", range(3))  # type: ignore[attr-defined]
    labels = torch.tensor([0, 1, 2, 10, 10, 10])
    scheduler.set_timesteps(3)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            given = plain(torch.cat([x, x]), t.expand(6), labels).sample
            aimed, free = given.chunk(2)
            x = scheduler.step(free + 1.5 * (aimed - free), t, x).prev_sample
    assert torch.equal(x.clamp(-1, 1), wanted)


def test_diffusers_gets_the_values_that_packed_weights_stand_for(folders: Path, tmp_path: Path) -> None:
    worker = make_worker(folders, BITS)
    candidate = mixed(worker)
    export(worker, candidate, tmp_path / "out")
    worker.apply(candidate, serving=False)
    found = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[n], t) for n, t in worker.built.model.state_dict().items())


@pytest.fixture(scope="module")
def pipeline(folders: Path) -> Path:
    """A whole pipeline with a VAE, as ``save_pretrained`` writes it."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    model = DiTTransformer2DModel.from_pretrained(folders / "dit" / "transformer")
    scheduler = DDIMScheduler.from_pretrained(folders / "dit" / "scheduler")
    pipe = DiTPipeline(transformer=model, vae=vae, scheduler=scheduler, id2label={0: "zero", 1: "one"})
    with quiet():
        pipe.save_pretrained(folders / "pipeline")
    return folders / "pipeline"


def test_a_pipeline_comes_out_as_a_pipeline(folders: Path, pipeline: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    worker = make_worker(folders, BITS, SCHEDULES, kind="pipeline")
    candidate = mixed(worker)
    wanted = served(worker, candidate)
    model = export(worker, candidate, tmp_path / "out")
    images = model.sample(3)
    assert images.shape == (3, 1, 2 * SIZE, 2 * SIZE) and torch.equal(images, wanted)
    with quiet():
        pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(pipe).__name__ == "DiTPipeline" and isinstance(pipe.scheduler, UnifiedScheduler)
    pipe.set_progress_bar_config(disable=True)
    made = pipe([0, 1], guidance_scale=1.0, num_inference_steps=50, output_type="np").images
    assert made.shape == (2, 2 * SIZE, 2 * SIZE, 1) and len(pipe.scheduler.timesteps) == 3


# -- what a loaded model does --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    worker = make_worker(folders, BITS)
    return export(worker, mixed(worker), tmp_path_factory.mktemp("loaded") / "out")


def test_an_image_depends_on_its_seed_and_label(loaded: DiffusionModel) -> None:
    images = loaded.sample(4, seed=5)
    assert images.shape == (4, 1, SIZE, SIZE) and images.dtype == torch.float32 and images.abs().max() <= 1
    assert torch.equal(loaded.sample(4, labels=[0, 1, 2, 3], seed=5), images)
    assert not torch.equal(loaded.sample(4, labels=[0, 1, 2, 4], seed=5)[3], images[3])
    assert not torch.equal(loaded.sample(4, seed=6), images)
    assert torch.allclose(loaded.sample(4, seed=5, batch=3), images, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "labels", "message"),
    [
        (0, None, "1 or more"),
        (2, [1], "2 labels from 0 to 9"),
        (1, [10], "labels from 0 to 9"),
        (1, [-1], "labels"),
    ],
)
def test_wrong_orders_are_refused(loaded: DiffusionModel, n: int, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaded.sample(n, labels)


def test_a_model_without_classes_takes_no_labels(folders: Path, tmp_path: Path) -> None:
    worker = make_worker(folders, BITS, kind="unet")
    model = export(worker, mixed(worker), tmp_path / "out")
    with pytest.raises(ValueError, match="no class labels"):
        model.sample(1, [0])


def test_a_grid_has_a_class_a_column(loaded: DiffusionModel, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    path = loaded.save_grid(tmp_path / "grid.png", 15, seed=3)
    picture = np.asarray(Image.open(path))
    assert picture.shape == (2 * SIZE, 10 * SIZE)
    images = loaded.sample(15, seed=3)
    cell = ((images[12, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
    assert np.array_equal(picture[SIZE:, 2 * SIZE : 3 * SIZE], cell)
    assert not picture[SIZE:, 5 * SIZE :].any(), "no image there"
    assert grid_image(torch.zeros(1, 3, 4, 4), 1).mode == "RGB"
    with pytest.raises(ExportError, match="can't write the picture"):
        loaded.save_grid(tmp_path / "nowhere" / "grid.png", 1)


# -- what can't be held, and folders that are not what they should be --------------------------------------


def test_language_formats_refuse_diffusion_models_and_the_other_way_round(
    folders: Path, make_worker_: Callable[..., ModelWorker]
) -> None:
    worker = make_worker(folders, BITS)
    candidate = mixed(worker)
    for exporter in (NativeExporter(), CompressedTensorsExporter()):
        (reason,) = exporter.supports(worker, candidate)
        assert "--format diffusers" in reason
    assert DiffusersExporter().supports(worker, candidate) == []
    language = make_worker_("llama")
    (reason,) = DiffusersExporter().supports(language, language.uncompressed)
    assert "use native" in reason


@pytest.fixture
def make_worker_(request: pytest.FixtureRequest) -> Callable[..., ModelWorker]:
    found: Callable[..., ModelWorker] = request.getfixturevalue("make_worker")
    return found


def test_choices_of_other_spaces_are_refused(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pruning:
        name = "pruning"

    worker = make_worker(folders, BITS)
    candidate = mixed(worker)
    monkeypatch.setattr(worker, "spaces", [*worker.spaces, Pruning()])
    (reason,) = DiffusersExporter().supports(worker, candidate)
    assert "pruning" in reason


def test_names_that_are_no_folders_are_refused(folders: Path) -> None:
    worker = make_worker(folders, BITS, zoo={"../other": str(folders / "small")})
    (reason,) = DiffusersExporter().supports(worker, mixed(worker))
    assert "../other" in reason and "rename" in reason


@pytest.fixture(scope="module")
def exported(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    worker = make_worker(folders, BITS, ACTIVATIONS)
    out = tmp_path_factory.mktemp("exported") / "out"
    worker.export(mixed(worker).to_json(), "diffusers", str(out))
    return out


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    envelope = json.loads((folder / "autocomp.json").read_text())
    edit(envelope)
    (folder / "autocomp.json").write_text(json.dumps(envelope))


def drop(folder: Path) -> None:
    tensors = load_file(folder / "autocomp-0001.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, folder / "autocomp-0001.safetensors")


def first(mapping: dict[str, Any]) -> str:
    return next(iter(mapping))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a newer version": (lambda f: change(f, lambda e: e.update(version=2)), "format version 2.*upgrade it"),
    "a version in words": (lambda f: change(f, lambda e: e.update(version="one")), "damaged"),
    "no schedule": (lambda f: change(f, lambda e: e.pop("schedule")), "lacks .'schedule'"),
    "a rising schedule": (lambda f: change(f, lambda e: e["schedule"]["steps"].reverse()), "times must fall"),
    "an unknown model": (
        lambda f: change(f, lambda e: e["schedule"]["steps"][0].update(model="large")),
        "calls the models",
    ),
    "half an envelope": (lambda f: os.truncate(f / "autocomp.json", 100), "can't read"),
    "no envelope": (lambda f: (f / "autocomp.json").unlink(), "has no autocomp.json"),
    "another scheme": (
        lambda f: change(f, lambda e: e["own"]["modules"].update({first(e["own"]["modules"]): "w6"})),
        "is damaged",
    ),
    "an unknown module": (
        lambda f: change(f, lambda e: e["own"]["modules"].update(nowhere="w8")),
        "is damaged",
    ),
    "an unknown activation": (
        lambda f: change(f, lambda e: e["own"]["activations"]["bits"].update(nowhere=[8, 8])),
        "the model lacks",
    ),
    "bits that there are not": (
        lambda f: change(f, lambda e: e["own"]["activations"]["bits"].update(proj_out_2=[8, 7])),
        "activations have",
    ),
    "no packed weights": (
        lambda f: (f / "autocomp-0001.safetensors").unlink(),
        "can't read the packed weights",
    ),
    "half the packed weights": (
        lambda f: os.truncate(f / "autocomp-0001.safetensors", 5000),
        "can't read the packed weights",
    ),
    "a tensor less": (drop, "lacks the tensors"),
    "no model": (lambda f: shutil.rmtree(f / "transformer"), "is damaged"),
    "half a model": (
        lambda f: os.truncate(f / "transformer" / "diffusion_pytorch_model.safetensors", 9000),
        "can't be loaded",
    ),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_named_with_the_reason(exported: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    do, message = DAMAGE[damage]
    do(folder)
    with pytest.raises(ExportError, match=message) as caught:
        autocomp.load(folder)
    assert "out" in str(caught.value)
