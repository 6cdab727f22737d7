"""Denoisers of every family against direct calls of their models, as diffusers' pipelines make them."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor, nn

from autocomp.diffusion.denoiser import EMBEDDED_GUIDANCE, Denoiser
from autocomp.diffusion.state import state_of
from autocomp.errors import CapabilityError

ROWS, TIME = 3, 421.5
TEXT = {"encoder_hidden_states": (5, 12)}
POOLED = TEXT | {"pooled_projections": (14,)}


def build(kind: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    unet = {
        "sample_size": 8, "in_channels": 2, "out_channels": 2, "layers_per_block": 1,
        "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4,
    }  # fmt: skip
    plain = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    shape = {
        "sample_size": 8, "patch_size": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8,
    }  # fmt: skip
    crossed = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 12,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    builders = {
        "DiTTransformer2DModel": shape | {"in_channels": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 2},
        "UNet2DModel": unet | plain,
        "UNet2DConditionModel": unet | crossed,
        "PixArtTransformer2DModel": shape
        | {"in_channels": 2, "out_channels": 4, "cross_attention_dim": 16, "caption_channels": 12},
        "SD3Transformer2DModel": shape
        | {
            "in_channels": 2, "out_channels": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
            "pooled_projection_dim": 14, "pos_embed_max_size": 8,
        },
        "FluxTransformer2DModel": {
            "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2,
            "attention_head_dim": 8, "joint_attention_dim": 12, "pooled_projection_dim": 14,
            "axes_dims_rope": (2, 2, 4),
        },
    }  # fmt: skip
    model = getattr(diffusers, kind)(**builders[kind] | changes).eval()
    for parameter in model.parameters():  # outputs that depend on everything: some layers start as zeros
        nn.init.normal_(parameter, std=0.2)
    return model


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.manual_seed(1)
    return {n: torch.randn(ROWS, *s, generator=generator) for n, s in shapes.items()}


def labels() -> dict[str, Tensor]:
    return {"class_labels": torch.tensor([0, 3, 7])}


FAMILIES = [
    ("DiTTransformer2DModel", {}, "dit", labels()),
    ("DiTTransformer2DModel", {"out_channels": 4}, "dit", labels()),
    ("UNet2DModel", {}, "unet", {}),
    ("UNet2DModel", {"num_class_embeds": 11}, "unet", labels()),
    ("UNet2DConditionModel", {}, "unet-text", tensors(TEXT)),
    (
        "UNet2DConditionModel",
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 30,
        },
        "unet-text",
        tensors(TEXT | {"text_embeds": (6,), "time_ids": (6,)}),
    ),
    ("PixArtTransformer2DModel", {}, "pixart", tensors(TEXT)),
    (
        "PixArtTransformer2DModel",
        {"use_additional_conditions": True, "attention_head_dim": 12, "cross_attention_dim": 24},
        "pixart",
        tensors(TEXT),
    ),
    ("SD3Transformer2DModel", {}, "sd3", tensors(POOLED)),
    ("FluxTransformer2DModel", {}, "flux", tensors(POOLED)),
    ("FluxTransformer2DModel", {"guidance_embeds": True}, "flux", tensors(POOLED)),
]


def direct(model: nn.Module, x: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """The call that the family's pipeline makes."""
    kind, time = type(model).__name__, torch.full((len(x),), TIME)
    if kind == "FluxTransformer2DModel":
        pipeline, (_, _, height, width) = diffusers.FluxPipeline, x.shape
        tokens = pipeline._pack_latents(x, *x.shape)
        ids = pipeline._prepare_latent_image_ids(len(x), height // 2, width // 2, "cpu", x.dtype)
        guidance = torch.full((len(x),), EMBEDDED_GUIDANCE) if model.config.guidance_embeds else None
        positions = {"img_ids": ids, "txt_ids": torch.zeros(5, 3)}
        out = model(tokens, timestep=time / 1000, guidance=guidance, **positions, **conditions).sample
        return pipeline._unpack_latents(out, height * 8, width * 8, 8)
    if kind == "UNet2DConditionModel":
        text = conditions["encoder_hidden_states"]
        added = {n: c for n, c in conditions.items() if n != "encoder_hidden_states"}
        return model(x, time, text, added_cond_kwargs=added or None).sample
    if kind == "PixArtTransformer2DModel":
        size = {"resolution": None, "aspect_ratio": None}
        if model.use_additional_conditions:
            size = {"resolution": torch.full((len(x), 2), 64.0), "aspect_ratio": torch.ones(len(x), 1)}
        return model(x, timestep=time, added_cond_kwargs=size, **conditions).sample
    return model(x, timestep=time, **conditions).sample


@pytest.mark.parametrize("kind, changes, family, conditions", FAMILIES)
@torch.no_grad()
def test_a_denoiser_is_the_pipelines_call(kind, changes, family, conditions):
    model = build(kind, **changes)
    assert Denoiser.refusal(model) is None
    denoiser = Denoiser(model, (8, 8))
    assert (denoiser.family, denoiser.channels, denoiser.size) == (family, 2, (8, 8))
    assert denoiser.conditions == tuple(conditions)
    x = torch.randn(ROWS, 2, 8, 8)
    found = denoiser(x, TIME, conditions)
    assert found.shape == x.shape
    torch.testing.assert_close(found, direct(model, x, conditions)[:, :2], rtol=0, atol=0)
    for name, value in conditions.items():  # each condition matters, and so does the time
        changed = value.roll(1, 0)
        assert not torch.equal(denoiser(x, TIME, conditions | {name: changed}), found)
    assert not torch.equal(denoiser(x, TIME + 50, conditions), found)


def test_flux_without_a_size_takes_the_pipelines():
    denoiser = Denoiser(build("FluxTransformer2DModel"))
    assert denoiser.size == (128, 128)


@torch.no_grad()
def test_given_extras_are_used():
    x = torch.randn(ROWS, 2, 8, 8)
    flux = Denoiser(build("FluxTransformer2DModel", guidance_embeds=True))
    text = tensors(POOLED)
    default = flux(x, TIME, text)
    assert torch.equal(flux(x, TIME, text | {"guidance": torch.full((ROWS,), EMBEDDED_GUIDANCE)}), default)
    assert not torch.equal(flux(x, TIME, text | {"guidance": torch.ones(ROWS)}), default)
    pixart = Denoiser(build("PixArtTransformer2DModel"))
    text, mask = tensors(TEXT), torch.ones(ROWS, 5)
    masked = mask.clone()
    masked[:, 3:] = 0
    plain = pixart(x, TIME, text)
    torch.testing.assert_close(pixart(x, TIME, text | {"encoder_attention_mask": mask}), plain)
    assert (pixart(x, TIME, text | {"encoder_attention_mask": masked}) - plain).abs().max() > 1e-4


def test_samples_keep_their_dtype_in_a_half_model():
    denoiser = Denoiser(build("DiTTransformer2DModel").to(torch.bfloat16))
    with torch.no_grad():
        assert denoiser(torch.randn(ROWS, 2, 8, 8), TIME, labels()).dtype == torch.float32
    assert denoiser.dtype == torch.bfloat16


def test_null_conditions():
    dit, unet = Denoiser(build("DiTTransformer2DModel")), Denoiser(build("UNet2DModel", num_class_embeds=11))
    for denoiser in (dit, unet):
        assert denoiser.null(labels())["class_labels"].tolist() == [10, 10, 10]
    pixart = Denoiser(build("PixArtTransformer2DModel"))
    text, mask = tensors(TEXT), torch.ones(ROWS, 5)
    found = pixart.null(text | {"encoder_attention_mask": mask})
    assert found["encoder_hidden_states"].abs().max() == 0
    assert torch.equal(found["encoder_attention_mask"], mask)
    empty = torch.randn(1, 5, 12)
    found = pixart.null(text | {"null_encoder_hidden_states": empty})
    assert set(found) == {"encoder_hidden_states"}
    assert torch.equal(found["encoder_hidden_states"], empty.expand(ROWS, 5, 12))


def test_missing_conditions_are_named():
    denoiser = Denoiser(build("SD3Transformer2DModel"))
    with pytest.raises(CapabilityError, match="pooled_projections"):
        denoiser(torch.randn(ROWS, 2, 8, 8), TIME, tensors(TEXT))


def test_other_models_are_refused_with_the_reason():
    assert "configuration" in Denoiser.refusal(nn.Linear(2, 2))
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(CapabilityError, match=r"AutoencoderKL is called with .*sample"):
        Denoiser(vae)
    image = build("UNet2DConditionModel", class_embed_type="timestep")
    assert "class_embed_type" in Denoiser.refusal(image)
    assert "class_embed_type" in Denoiser.refusal(build("UNet2DModel", class_embed_type="timestep"))


def test_a_models_state_is_its_own():
    one, two = build("DiTTransformer2DModel"), build("DiTTransformer2DModel")
    assert state_of(one) is Denoiser(one).state and state_of(one) is not state_of(two)
    assert "_autocomp_sampling" not in one.state_dict()
