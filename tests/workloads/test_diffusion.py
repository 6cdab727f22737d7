"""The diffusion workload on tiny random models: what it finds, scores, times, refuses; and a whole study."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import autocomp
from autocomp.description import Description
from autocomp.diffusion.schedule import Schedule, Step, uniform_schedule, uniform_times
from autocomp.errors import JobError, ObjectiveError, SpaceError
from autocomp.job import Job
from autocomp.measure.images import MAX_PSNR, frechet, gaussian
from autocomp.measure.memory import weights_bytes
from autocomp.plan import make_plan, make_problem
from autocomp.profile import ProfileRequest, ProfileResult
from autocomp.quantize.scheme import Scheme
from autocomp.search_spaces.base import ModelSite
from autocomp.search_spaces.weights import WeightSwapper
from autocomp.testing.diffusion import digits_npz, tiny_classifier_folder, tiny_dit_folder, tiny_unet_folder
from autocomp.testing.fakes import InlineExecutor
from autocomp.trial import Estimate, Fidelity
from autocomp.workloads.base import Built
from autocomp.workloads.diffusion import Diffusion
from autocomp.workloads.diffusion_config import DiffusionConfig

PROXY = Fidelity()
Json = dict[str, Any]
Make = Callable[..., tuple[Diffusion, Built]]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("diffusion")
    return {
        "dit": str(tiny_dit_folder(root / "dit")),
        "small": str(tiny_dit_folder(root / "small", seed=1, layers=1)),
        "noise": str(tiny_dit_folder(root / "noise", prediction="epsilon")),
        "unet": str(tiny_unet_folder(root / "unet")),
        "classes": str(tiny_classifier_folder(root / "classes")),
        "colours": str(tiny_classifier_folder(root / "colours", channels=3)),
        "real": str(digits_npz(root / "real.npz", 200)),
    }


@pytest.fixture
def options(folders: dict[str, str]) -> Json:
    return {
        "model": folders["dit"],
        "guidance": 1.5,
        "sampler": {"name": "ddim", "steps": 4},
        "features": folders["classes"],
        "data": {
            "real": folders["real"], "calibration": 5, "proxy": 12, "selection": 8, "report": 8, "batch": 5,
        },
        "scenario": {"batch": 2, "threads": 1, "repeats": 2},
    }  # fmt: skip


@pytest.fixture
def make(options: Json, apart: Path) -> Make:
    """``make(key=value)``: workload and model, with keys of the configuration replaced (mappings merged)."""

    def build(**changes: Any) -> tuple[Diffusion, Built]:
        merged = {**options}
        for key, value in changes.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = {**merged[key], **value} if both else value
        workload = Diffusion(DiffusionConfig.model_validate(merged))
        return workload, workload.load("cpu")

    return build


def compress(built: Built, label: str) -> None:
    """Every linear at one label; ``w16`` brings the originals back."""
    paths = {p.path: label for p in built.site.parts}
    WeightSwapper.of(built).apply(paths, method="rtn", serving=False)


# -- what is found ------------------------------------------------------------------------------------------


def test_site_of_a_transformer(make: Make) -> None:
    _, built = make()
    site = built.site
    assert (site.family, site.models, site.steps, site.snapshots, site.batch) == ("dit", ("",), 4, 0, 2)
    assert site.scheduler["prediction_type"] == "v_prediction"
    query = site.part("transformer_blocks.1.attn1.to_q")
    assert (query.shape, query.block, query.role) == ((64, 64), 1, "body")
    assert query.tie == site.part("transformer_blocks.1.attn1.to_v").tie != ""
    assert site.part("transformer_blocks.1.attn1.to_out.0").tie == ""
    order = [p.path for p in site.parts]
    assert order.index("transformer_blocks.0.ff.net.2") < order.index("transformer_blocks.1.attn1.to_q")
    (first, _) = site.image_attention
    assert (first.path, first.kind) == ("transformer_blocks.0.attn1", "image_attention")
    assert (first.shape, first.block) == ((4, 16, 16), 0)
    held = sum(p.numel for p in site.parts) * site.itemsize
    assert held + site.other_bytes == weights_bytes(built.model)
    assert ModelSite.from_json(json.loads(json.dumps(site.to_json()))) == site


def test_site_of_a_unet(make: Make, folders: dict[str, str]) -> None:
    _, built = make(model=folders["unet"])
    assert built.site.family == "unet"
    assert not built.site.image_attention
    assert "it normalizes over groups" in built.site.lacking["image_attention"]
    assert sum(p.numel for p in built.site.parts) * 4 + built.site.other_bytes == weights_bytes(built.model)


def test_a_model_without_attention_says_so(make: Make, tmp_path: Path) -> None:
    from diffusers import DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, add_attention=False, **blocks,
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    _, built = make(model=str(tmp_path))
    assert not built.site.image_attention
    assert "no attention module" in built.site.lacking["image_attention"]


# -- scores -------------------------------------------------------------------------------------------------


def test_the_uncompressed_model_does_not_differ_from_itself(make: Make) -> None:
    workload, built = make()
    metrics, images = workload.score(built, PROXY)
    values = {name: e.value for name, e in metrics.items()}
    assert images == 12
    assert (values["mse"], values["psnr"], values["noise"]) == (0.0, MAX_PSNR, 0.0)
    assert values["ssim"] == pytest.approx(1.0)
    assert (values["nfe"], values["evaluations"]) == (4.0, 8.0)
    assert set(values) == {*workload.quality_metrics, *workload.counts}


def test_scores_follow_compression(make: Make) -> None:
    workload, built = make()
    workload.ensure_teacher(built, "proxy", 12)
    scores = []
    for label in ("w8g64", "w4g64", "w2g64"):
        compress(built, label)
        scores.append({n: e.value for n, e in workload.score(built, PROXY)[0].items()})
    for metric, smaller_is_better in workload.quality_metrics.items():
        if metric in ("mse", "psnr", "ssim", "noise"):
            row = [s[metric] for s in scores]
            assert row == sorted(row, reverse=not smaller_is_better), metric
    compress(built, "w16")
    assert workload.score(built, PROXY)[0]["mse"].value == 0.0


def test_fd_is_the_distance_of_features_to_the_real_ones(make: Make, folders: dict[str, str]) -> None:
    workload, built = make()
    found = workload.score(built, PROXY)[0]["fd"]
    features = workload.features_of(built, PROXY)
    assert features.shape == (12, 32) and features.dtype == np.float32
    real = torch.from_numpy(np.load(folders["real"])["images"]).float()[:, None] / 127.5 - 1
    model = built.state["extractor"].model
    with torch.no_grad():
        wanted = model.base_model(real).pooler_output.flatten(1).numpy()
    assert found.value == pytest.approx(frechet(gaussian(features), gaussian(wanted)), rel=1e-5)
    assert found.stderr > 0 and found.n == 12


def test_without_real_images_the_uncompressed_model_is_the_reference(make: Make) -> None:
    workload, built = make(data={"real": ""})
    assert workload.score(built, PROXY)[0]["fd"].value == 0.0
    compress(built, "w2g64")
    assert workload.score(built, PROXY)[0]["fd"].value > 0.0


def test_content_is_the_share_of_images_of_their_label(make: Make) -> None:
    workload, built = make()
    images = torch.cat([x for _, x in workload.pictures(built, "proxy", range(12))])
    with torch.no_grad():
        classes = built.state["extractor"].model(pixel_values=images).logits.argmax(1)
    expected = (classes == torch.arange(12) % 10).float().mean().item()
    assert workload.score(built, PROXY)[0]["content"].value == pytest.approx(expected)


def test_content_without_labels_is_agreement(make: Make, folders: dict[str, str]) -> None:
    workload, built = make(model=folders["unet"])
    metrics, _ = workload.score(built, PROXY)
    assert metrics["content"].value == 1.0
    assert metrics["evaluations"].value == 4.0, "a model without conditions is never doubled"


def test_grey_images_are_repeated_for_a_classifier_of_colours(make: Make, folders: dict[str, str]) -> None:
    workload, built = make(features=folders["colours"])
    image = next(iter(workload.pictures(built, "proxy", range(3))))[1]
    with torch.no_grad():
        expected = built.state["extractor"].model(pixel_values=image.repeat(1, 3, 1, 1)).logits
    torch.testing.assert_close(built.state["extractor"](image)[1], expected)


def test_a_preprocessor_and_a_fixed_size_are_followed(
    make: Make, folders: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "classes"
    shutil.copytree(folders["classes"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_size": 16}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.3], "image_std": [0.2]}))
    workload, built = make(features=str(folder))
    image = next(iter(workload.pictures(built, "proxy", range(3))))[1]
    larger = torch.nn.functional.interpolate(image, (16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = built.state["extractor"].model(pixel_values=((larger + 1) / 2 - 0.3) / 0.2).logits
    torch.testing.assert_close(built.state["extractor"](image)[1], expected)


def test_guidance_of_one_is_no_guidance(make: Make) -> None:
    workload, built = make(guidance=1.0)
    assert workload.score(built, PROXY)[0]["evaluations"].value == 4.0


# -- common random numbers ----------------------------------------------------------------------------------


def test_a_sample_is_itself_in_every_batch_and_split_size(make: Make) -> None:
    workload, built = make()
    every = torch.cat([x for _, x in workload.pictures(built, "proxy", range(12))])
    some = torch.cat([x for _, x in workload.pictures(built, "proxy", [7, 2, 11])])
    torch.testing.assert_close(some, every[[7, 2, 11]], atol=1e-5, rtol=1e-5)
    other = workload.noise(built, "report", range(3))
    assert (workload.noise(built, "proxy", range(3)) - other).abs().max() > 0.1
    assert abs(float(other.std()) - 1.0) < 0.2
    reseeded = Diffusion(
        workload.config.model_copy(update={"data": workload.config.data.model_copy(update={"seed": 1})})
    )
    assert not torch.equal(reseeded.noise(built, "report", range(3)), other)


def test_a_subset_is_scored_in_place_of_the_first_samples(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "subset.json"
    path.write_text(json.dumps({"indices": [3, 30, 8]}))
    whole, built = make()
    expected = whole.features_of(built, PROXY)[[3, 8]]
    workload, built = make(data={"subset": str(path)})
    metrics, images = workload.score(built, PROXY)
    assert images == 3 and metrics["fd"].n == 3
    np.testing.assert_allclose(workload.features_of(built, PROXY)[[0, 2]], expected, atol=1e-4)


# -- noise of outputs ---------------------------------------------------------------------------------------


def test_noise_is_the_error_of_outputs_on_the_uncompressed_models_way(make: Make) -> None:
    workload, built = make()
    own, calls = built.state["denoisers"][""], []
    conditions = built.state["conditions"].of(range(5), "cpu")

    def see(state: Any, x: Any, time: float, given: Any, output: Any) -> None:
        calls.append((x.clone(), time, given, output.clone()))

    workload.sampler(built)(workload.noise(built, "calibration", range(5)), conditions, see)
    workload.ensure_teacher(built, "proxy")
    compress(built, "w3g64")

    def guided(output: Any) -> Any:
        aimed, free = output.chunk(2)
        return free + workload.config.guidance * (aimed - free)

    with torch.no_grad():
        pairs = [(guided(own(x, time, given)), guided(output)) for x, time, given, output in calls]
    above = sum(float((new - old).square().sum()) for new, old in pairs)
    below = sum(float(old.square().sum()) for _, old in pairs)
    found = workload.score(built, PROXY)[0]["noise"]
    assert found.value == pytest.approx(above / below, rel=1e-4)
    assert 0 < found.stderr < found.value and found.n == 5


def test_a_replay_goes_through_the_steps_in_order_and_voids_caches(make: Make) -> None:
    workload, built = make(data={"calibration": 7})
    workload.ensure_teacher(built, "proxy")
    state, seen = built.state["denoisers"][""].state, []
    handle = built.model.register_forward_pre_hook(
        lambda *_: seen.append((state.started, state.index, state.total, state.guided, round(state.time, 2)))
    )
    built.state["trajectories"].noise(built.state["denoisers"][""])
    handle.remove()
    first = seen[0][0]
    times = [1.0, 0.75, 0.5, 0.25]
    assert seen == [(first + b, i, 4, True, times[i]) for b in range(2) for i in range(4)]


def test_the_schedule_in_force_decides_images_but_not_noise(make: Make) -> None:
    workload, built = make()
    workload.ensure_teacher(built, "proxy")
    built.state["schedule"] = Schedule((Step(1.0), Step(0.5, guidance=False)))
    metrics, _ = workload.score(built, PROXY)
    assert (metrics["nfe"].value, metrics["evaluations"].value, metrics["noise"].value) == (2.0, 3.0, 0.0)
    assert metrics["mse"].value > 0


# -- protocol -----------------------------------------------------------------------------------------------


def test_a_compressed_model_is_no_teacher(make: Make) -> None:
    workload, built = make()
    workload.ensure_teacher(built, "proxy", 4)
    compress(built, "w4g64")
    workload.score(built, Fidelity(sequences=4))
    with pytest.raises(RuntimeError, match="restore the originals"):
        workload.score(built, PROXY)
    compress(built, "w16")
    workload.ensure_teacher(built, "proxy")
    assert workload.score(built, PROXY)[0]["mse"].value == 0.0


def test_drift_is_taken_on_as_many_images_as_fit(make: Make) -> None:
    each = 4 * 64 * 8 / 1e6  # an image's float32 pixels, a quarter of half of the memory for each split
    needed = 16 * 5 * 4 * 64 * 2 / 1e6  # calls
    workload, built = make(data={"teacher_mb": max(3.5 * each, needed)})
    kept = int(max(3.5 * each, needed) / each)
    metrics, _ = workload.score(built, Fidelity(sequences=12))
    assert metrics["fd"].n == 12
    assert metrics["mse"].n == min(12, kept)


def test_broken_models_are_named(make: Make) -> None:
    workload, built = make()
    weight = built.originals["transformer_blocks.0.attn1.to_q"]
    kept = weight.clone()
    workload.ensure_teacher(built, "proxy")
    weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        workload.score(built, PROXY)
    workload.prepare(built)
    with pytest.raises(JobError, match=r"uncompressed model gives NaN.*float32"):
        workload.ensure_teacher(built, "proxy")
    weight.copy_(kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no-such-folder"}, "no folder 'no-such-folder'"),
        ({"model": "org/name"}, "hf download org/name"),
        ({"model": "{classes}"}, "holds no diffusion model"),
        ({"zoo": {"other": "{noise}"}}, "workload.zoo.other.*other noise"),
        ({"zoo": {"other": "{unet}"}}, "workload.zoo.other: its conditions"),
        ({"snapshots": ["nowhere"]}, "snapshots: there is no 'nowhere'"),
        ({"features": "nowhere"}, "workload.features: 'nowhere'"),
        ({"features": "{dit}/transformer"}, "workload.features.*image classifier"),
        ({"conditions": "{real}"}, "class labels|can't be read"),
        ({"data": {"real": "nowhere.npz"}}, "data.real: 'nowhere.npz'"),
        ({"data": {"subset": "nowhere.json"}}, "data.subset: 'nowhere.json'"),
        ({"sampler": {"name": "euler"}}, "euler is for flow models"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    make: Make, folders: dict[str, str], changes: Json, message: str
) -> None:
    text = json.dumps(changes)
    for name, folder in folders.items():
        text = text.replace("{" + name + "}", folder)
    with pytest.raises(JobError, match=message):
        make(**json.loads(text))


def test_folders_that_lack_something_are_named(make: Make, folders: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders["dit"], tmp_path, dirs_exist_ok=True)
    config = tmp_path / "transformer" / "config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps({**data, "_class_name": "NoSuchModel"}))
    with pytest.raises(JobError, match="'NoSuchModel', no model class of diffusers"):
        make(model=str(tmp_path))
    config.write_text(json.dumps({**data, "_class_name": "AutoencoderKL"}))
    with pytest.raises(JobError, match=r"can't be loaded|lacks"):
        make(model=str(tmp_path))
    config.write_text(json.dumps({**data, "num_layers": 3}))
    with pytest.raises(JobError, match=r"lacks .* weights of DiTTransformer2DModel"):
        make(model=str(tmp_path))
    config.write_text(json.dumps(data))
    shutil.rmtree(tmp_path / "scheduler")
    with pytest.raises(JobError, match=r"no scheduler/scheduler_config\.json"):
        make(model=str(tmp_path))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 9, 9), np.uint8), r"\(1, 9, 9\).*\(1, 8, 8\)"),
        (np.zeros((4, 8, 8, 3), np.uint8), r"\(3, 8, 8\).*\(1, 8, 8\)"),
        (np.zeros((4, 8, 8), np.float32), "float32"),
        (np.zeros((1, 8, 8), np.uint8), "at least two"),
    ],
)
def test_real_images_must_fit(make: Make, tmp_path: Path, images: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "real.npz", images=images)
    with pytest.raises(JobError, match=message):
        make(data={"real": str(tmp_path / "real.npz")})


@pytest.mark.parametrize("content", ["[1, 1]", "[0]", "[0, -1]", '{"rows": [0, 1]}', "no JSON"])
def test_subsets_must_be_indices(make: Make, tmp_path: Path, content: str) -> None:
    (tmp_path / "subset.json").write_text(content)
    with pytest.raises(JobError, match=r"data\.subset"):
        make(data={"subset": str(tmp_path / "subset.json")})


def test_more_images_than_a_split_has_are_refused(make: Make) -> None:
    workload, built = make()
    with pytest.raises(JobError, match=r"13 images asked of split 'proxy', which has 12: raise data.proxy"):
        workload.score(built, Fidelity(sequences=13))
    with pytest.raises(JobError, match="unknown split 'test'"):
        workload.score(built, Fidelity(split="test"))
    with pytest.raises(JobError, match="two or more images"):
        workload.score(built, Fidelity(sequences=1))
    with pytest.raises(JobError, match=r"raise data\.teacher_mb"):
        small, built = make(data={"teacher_mb": 1e-3})
        small.score(built, PROXY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": ""}, "data.real needs features"),
        ({"zoo": {"": {"model": "x"}}}, "give this one a name"),
        ({"zoo": {"a": {"weights": "w99"}}}, "w99"),
        ({"sampler": {"name": "heun"}}, "sampler"),
    ],
)
def test_configurations_that_make_no_sense(options: Json, changes: Json, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionConfig.model_validate({**options, **changes})


# -- other models -------------------------------------------------------------------------------------------


def text_model(folder: Path) -> Path:
    from diffusers import DDPMScheduler, PixArtTransformer2DModel

    torch.manual_seed(0)
    PixArtTransformer2DModel(
        sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4,
        out_channels=8,
        cross_attention_dim=16, caption_channels=12, norm_num_groups=1, use_additional_conditions=False,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    return folder


def test_conditions_come_from_a_file_and_latents_go_through_a_vae(make: Make, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    model = str(text_model(tmp_path))
    with pytest.raises(JobError, match="needs the tensors encoder_hidden_states"):
        make(model=model, data={"real": ""})
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1).save_pretrained(
        tmp_path / "vae"
    )
    text = torch.randn(3, 5, 12)
    file = tmp_path / "text.safetensors"
    save_file({"other": text}, file)
    with pytest.raises(JobError, match="lacks encoder_hidden_states"):
        make(model=model, data={"real": ""}, conditions=str(file))
    save_file({"encoder_hidden_states": text, "null_encoder_hidden_states": text[:1] * 0 + 2}, file)
    workload, built = make(
        model=model, features="", conditions=str(file), data={"real": ""},
        snapshots=[str(tmp_path / "transformer")],
    )  # fmt: skip
    assert built.site.snapshots == 1
    vae = built.state["vae"]
    assert built.site.other_bytes > weights_bytes(vae)
    given = built.state["conditions"].of([4, 2], "cpu")
    torch.testing.assert_close(given["encoder_hidden_states"], text[[1, 2]])
    assert set(workload.quality_metrics) == {"mse", "psnr", "ssim", "noise"}
    (_, images) = next(iter(workload.pictures(built, "proxy", [4, 2])))
    latents = workload.sampler(built)(workload.noise(built, "proxy", [4, 2]), given)
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images, expected)
    assert workload.score(built, PROXY)[0]["evaluations"].value == 8.0
    (tmp_path / "saved").mkdir()
    workload.save(built, tmp_path / "saved")
    assert AutoencoderKL.from_pretrained(tmp_path / "saved" / "vae") is not None


def test_a_flow_model_is_sampled_by_euler(make: Make, tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

    tiny_dit_folder(tmp_path)
    shutil.rmtree(tmp_path / "scheduler")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "scheduler")
    workload, built = make(model=str(tmp_path), sampler={"name": "euler"}, guidance=1.0)
    noise = workload.noise(built, "proxy", range(3))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = [step.time for step in built.state["default_schedule"].steps]
    scheduler.set_timesteps(sigmas=[t / (3.0 - 2.0 * t) for t in times])
    model, x = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer"), noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model(x, timestep=t.expand(3), class_labels=torch.arange(3)).sample
            x = scheduler.step(output, t, x).prev_sample
    (_, images) = next(iter(workload.pictures(built, "proxy", range(3))))
    torch.testing.assert_close(images, x.clamp(-1, 1), atol=2e-4, rtol=2e-4)


def test_a_schedule_may_call_the_zoo(make: Make, folders: dict[str, str]) -> None:
    workload, built = make(zoo={"small": folders["small"], "own-w4": {"weights": "w4g64"}})
    assert built.site.models == ("", "small", "own-w4")
    workload.ensure_teacher(built, "proxy")
    times, whole = uniform_times(4), uniform_schedule(uniform_times(4))
    held, drift = {}, {}
    for name in built.site.models:
        built.state["schedule"] = Schedule(tuple(Step(t, model=name) for t in times))
        drift[name] = workload.score(built, PROXY)[0]["mse"].value
        held[name] = workload.time(built)[0]["resident_mb"].value
    assert drift[""] == 0.0 < drift["own-w4"] < drift["small"]
    assert held["small"] == pytest.approx(weights_bytes(built.state["zoo"]["small"].model) / 1e6)
    linears = sum(Scheme.parse("w4g64").weight_bytes(*p.shape) for p in built.site.parts)
    assert held["own-w4"] == pytest.approx((linears + built.site.other_bytes) / 1e6, rel=0.02)
    mixed = [Step(s.time, model="small" if i < 2 else "") for i, s in enumerate(whole.steps)]
    built.state["schedule"] = Schedule(tuple(mixed))
    metrics, details = workload.time(built)
    assert metrics["resident_mb"].value == pytest.approx(held[""] + held["small"])
    assert Schedule.from_json(details["schedule"]) == built.state["schedule"]


def test_memory_is_that_of_the_models_that_are_called(make: Make, folders: dict[str, str]) -> None:
    workload, built = make(zoo={"small": folders["small"], "own-w4": {"weights": "w4g64"}})
    tables = {"memory_mb": Estimate(0.5), "avg_bits": Estimate(4.0)}
    assert workload.exact(built, tables) == tables

    def memory(*names: str) -> float:
        steps = [Step(t, model=name) for t, name in zip(uniform_times(len(names)), names)]
        built.state["schedule"] = Schedule(tuple(steps))
        found = workload.exact(built, tables)
        assert found["avg_bits"] == tables["avg_bits"]
        return found["memory_mb"].value

    small = weights_bytes(built.state["zoo"]["small"].model) / 1e6
    packed = sum(Scheme.parse("w4g64").weight_bytes(*p.shape) for p in built.site.parts)
    packed = (packed + built.site.other_bytes) / 1e6
    assert memory("small", "small") == pytest.approx(small)
    assert memory("small", "", "small") == pytest.approx(0.5 + small)
    assert memory("own-w4", "small") == pytest.approx(packed + small)


# -- time and files -----------------------------------------------------------------------------------------


def test_time_of_an_image_is_that_of_its_steps(make: Make) -> None:
    workload, built = make()
    metrics, details = workload.time(built)
    values = {name: e.value for name, e in metrics.items()}
    assert set(values) == set(workload.timing_metrics)
    assert values["image_ms"] * 2 == pytest.approx(values["step_ms"] * 4) and values["image_ms"] > 0
    assert values["resident_mb"] == pytest.approx(weights_bytes(built.model) / 1e6)
    assert values["peak_mb"] >= values["resident_mb"]
    assert (details["threads"], details["sampling"]["n"] + details["sampling"]["dropped"]) == (1, 2)


def test_saved_assets_hold_everything_but_weights(make: Make, tmp_path: Path) -> None:
    from diffusers import DDPMScheduler, DiTTransformer2DModel

    workload, built = make()
    workload.save(built, tmp_path)
    model = DiTTransformer2DModel.from_config(DiTTransformer2DModel.load_config(tmp_path / "transformer"))
    assert model.config.num_layers == 2
    assert DDPMScheduler.from_pretrained(tmp_path / "scheduler").config.prediction_type == "v_prediction"
    assert not list(tmp_path.rglob("*.safetensors"))


# -- the whole ----------------------------------------------------------------------------------------------


@pytest.fixture
def job(options: Json) -> Json:
    return {
        "workload": {"kind": "diffusion", **options},
        "space": [{"bitwidths": {"options": ["w3g64", "w4g64", "w16"], "granularity": "block"}}],
        "objectives": ["min mse", "min memory_mb"],
        "sensitivity": {"method": "measured"},
        "device": "cpu",
        "searcher": {"name": "evolution"},
        "budget": {"trials": 8},
        "validation": {"audit": 1, "promote": 3, "report": 2},
        "executor": {"name": "local", "workers": 1, "threads": 1},
        "tracking": {"uri": "", "optuna": False},
    }


@pytest.fixture
def make_diffusion_worker(apart: Path) -> Iterator[Callable[[Json], Any]]:
    import gc

    from autocomp.worker import ModelWorker

    yield lambda job: ModelWorker(Job.of(job).resolved(), threads=1)
    gc.unfreeze()


def test_content_has_sensitivities_of_its_own(job: Json, make_diffusion_worker: Any) -> None:
    job["objectives"] = ["min fd", "max content", "min memory_mb", "min evaluations"]
    worker = make_diffusion_worker(job)
    description = Description.from_json(json.loads(json.dumps(worker.describe())))
    assert description.profiles == ("sensitivity:measured",)
    request = vars(ProfileRequest("sensitivity:measured"))
    result = ProfileResult.from_json(json.loads(json.dumps(worker.profile(request))))
    names = [d.name for d in description.space]
    assert set(result.rows) == {*names, *(f"{n}@content" for n in names)}
    checked = Job.of(job)
    plan = make_plan(description, checked.parsed_objectives(), ())
    profiles = {"sensitivity": result.table("sensitivity")}
    problem = make_problem(plan, description, checked.parsed_objectives(), (), profiles, 0)
    for name in names:
        noise, content = result.rows[name], result.rows[f"{name}@content"]
        assert problem.tables["fd"].costs[name]["w3g64"] == noise["w3g64"][1] > noise["w16"][1] == 0.0
        assert problem.tables["content"].costs[name]["w3g64"] == -content["w3g64"][1]
        assert 0 < content["w3g64"][1] < 1
    assert "evaluations" not in problem.tables, "no sensitivity stands for a count"


def test_error_compensated_rounding_is_refused_in_words(job: Json, make_diffusion_worker: Any) -> None:
    job["space"] = [{"bitwidths": {"options": ["w4g64", "w16"], "method": "gptq"}}]
    worker = make_diffusion_worker(job)
    names = [d.name for d in worker.decisions["bitwidths"]]
    with pytest.raises(SpaceError, match="use method: mse"):
        worker.measure(dict.fromkeys(names, "w4g64"), vars(PROXY))


def test_metrics_that_need_a_classifier_are_refused_without_one(
    job: Json, make_diffusion_worker: Any
) -> None:
    job["workload"] |= {"features": "", "data": {"proxy": 4, "calibration": 2}}
    job["objectives"] = ["min fd", "min memory_mb"]
    with pytest.raises(JobError, match=r"the job asks for fd: it needs workload\.features"):
        make_diffusion_worker(job).describe()
    worker = make_diffusion_worker({**job, "objectives": ["min kl"]})
    description = Description.from_json(worker.describe())
    with pytest.raises(ObjectiveError, match="unknown metric 'kl'"):
        make_plan(description, Job.of({**job, "objectives": ["min kl"]}).parsed_objectives(), ())


@pytest.mark.parametrize("executor", ["inline", pytest.param("local", marks=pytest.mark.slow)])
def test_a_study_ends_with_a_validated_front(
    job: Json, make_diffusion_worker: Any, tmp_path: Path, executor: str
) -> None:
    given = InlineExecutor(make_diffusion_worker(job)) if executor == "inline" else None
    result = autocomp.search(job, run_dir=tmp_path / "run", executor=given)
    assert result.status == "finished"
    trials = [p.trial for p in result.front.points]
    assert all(t.fidelity.name == "report" for t in trials)
    found = sorted((t.value("memory_mb"), t.value("mse")) for t in trials)
    assert found[-1][1] == 0.0 < found[0][1], "the uncompressed model and the smallest one are there"
