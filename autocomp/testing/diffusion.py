"""Tiny random diffusion models, an image classifier and real images, saved as the folders that jobs name.

Everything is 8 x 8 pixels, one channel, ten classes: a sampling of a few images takes milliseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

SIZE = 8
CLASSES = 10
TEXT_WIDTH, POOLED_WIDTH = 12, 14
"""Features of a text's token and of a whole text, of models that read text."""


def tiny_dit_folder(
    path: Path, *, seed: int = 0, layers: int = 2, heads: int = 4, patch: int = 2,
    learned_variance: bool = False, prediction: str = "v_prediction", dtype: str = "float32",
) -> Path:  # fmt: skip
    """Save a class-conditional random DiT (width 16 a head, ``(8 / patch)**2`` tokens) with its scheduler.

    Args:
        path: folder, created when missing; gets ``transformer/`` and ``scheduler/``.
        seed: of the random weights.
        layers, heads, patch: of the transformer.
        learned_variance: twice as many output channels as input channels.
        prediction: what the model predicts. A random model that predicts the velocity gives images of
            ordinary contrast; as a noise predictor its images are all black or white.
        dtype: storage type of the weights.
    """
    import torch
    from diffusers import DDPMScheduler, DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiTTransformer2DModel(
            sample_size=SIZE, patch_size=patch, in_channels=1, out_channels=2 if learned_variance else 1,
            num_layers=layers, num_attention_heads=heads, attention_head_dim=16,
            num_embeds_ada_norm=CLASSES, norm_num_groups=1,
        )  # fmt: skip
    scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type=prediction)
    return _save(path, "transformer", model.to(getattr(torch, dtype)), scheduler)


def tiny_unet_folder(
    path: Path, *, seed: int = 0, classes: int = 0, prediction: str = "v_prediction"
) -> Path:
    """Save a random UNet with one attention layer and its scheduler; ``classes`` 0 for one without labels.

    A UNet with labels has one embedding more than ``classes``: the last row stands for no label.
    """
    import torch
    from diffusers import DDPMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet2DModel(
            sample_size=SIZE, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=16, norm_num_groups=8, num_class_embeds=classes + 1 if classes else None,
        )  # fmt: skip
    scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type=prediction)
    return _save(path, "unet", model, scheduler)


def tiny_sd3_folder(
    path: Path, *, seed: int = 0, layers: int = 2, heads: int = 4, dual: bool = False, rms: bool = False
) -> Path:
    """Save a random SD3 transformer (width 16 a head, 16 image tokens beside the text's) with its scheduler,
    and ``conditions.safetensors`` (see ``text_conditions``).

    Args:
        dual: the first block attends over the image's tokens alone, too, as those of SD3.5 medium.
        rms: queries and keys are normalized, as those of SD3.5.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    model = tiny_sd3(seed=seed, layers=layers, heads=heads, dual=dual, rms=rms)
    found = _save(path, "transformer", model, FlowMatchEulerDiscreteScheduler(shift=3.0))
    text_conditions(found / "conditions.safetensors")
    return found


def tiny_sd3(
    *, seed: int = 0, layers: int = 2, heads: int = 4, dual: bool = False, rms: bool = False
) -> nn.Module:
    """See ``tiny_sd3_folder``."""
    import torch
    from diffusers import SD3Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = SD3Transformer2DModel(
            sample_size=SIZE, patch_size=2, in_channels=1, out_channels=1, num_layers=layers,
            num_attention_heads=heads, attention_head_dim=16, joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=16 * heads, pooled_projection_dim=POOLED_WIDTH, pos_embed_max_size=SIZE,
            dual_attention_layers=(0,) if dual else (), qk_norm="rms_norm" if rms else None,
        )  # fmt: skip
    return model.eval()


def tiny_flux_folder(path: Path, *, seed: int = 0) -> Path:
    """Save the model of ``tiny_flux`` with its scheduler and ``conditions.safetensors``. A job must name the
    size of its samples: the configuration doesn't."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    found = _save(path, "transformer", tiny_flux(seed=seed), FlowMatchEulerDiscreteScheduler(shift=3.0))
    text_conditions(found / "conditions.safetensors")
    return found


def tiny_flux(*, seed: int = 0, double: int = 1, single: int = 2, heads: int = 4) -> nn.Module:
    """A random guidance-distilled Flux transformer (width 16 a head) for samples of one channel."""
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = FluxTransformer2DModel(
            in_channels=4, num_layers=double, num_single_layers=single, num_attention_heads=heads,
            attention_head_dim=16, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH,
            axes_dims_rope=(4, 6, 6), guidance_embeds=True,
        )  # fmt: skip
    return model.eval()


def text_conditions(path: Path, *, rows: int = 4, tokens: int = 5, seed: int = 0) -> Path:
    """Write random conditions of SD3 and Flux models, with the tensors of the unguided half."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    shapes = {"encoder_hidden_states": (tokens, TEXT_WIDTH), "pooled_projections": (POOLED_WIDTH,)}
    found = {name: torch.randn(rows, *shape, generator=generator) for name, shape in shapes.items()}
    found |= {f"null_{n}": torch.randn(1, *s, generator=generator) for n, s in shapes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, path)
    return path


def _save(path: Path, part: str, model: Any, scheduler: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path / part)
    scheduler.save_pretrained(path / "scheduler")
    return path


def tiny_classifier_folder(path: Path, *, seed: int = 0, channels: int = 1) -> Path:
    """Save a random ``ResNetForImageClassification`` of ten classes whose pooled features have width 32."""
    path.mkdir(parents=True, exist_ok=True)
    tiny_classifier(seed=seed, channels=channels).save_pretrained(path)  # type: ignore[operator]
    return path


def tiny_classifier(*, seed: int = 0, channels: int = 1) -> nn.Module:
    """See ``tiny_classifier_folder``. Its head is spread enough that classes differ from image to image."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNetForImageClassification(
            ResNetConfig(
                num_channels=channels, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
                layer_type="basic", num_labels=CLASSES,
            )
        )  # fmt: skip
        torch.nn.init.normal_(model.classifier[1].weight, std=1.0)
    return model.eval()


def digits_npz(path: Path, count: int = 0) -> Path:
    """Write scikit-learn's handwritten digits: ``images`` uint8 ``[n, 8, 8]`` and ``labels`` int64 ``[n]``.

    Args:
        path: the ``.npz`` file.
        count: images to keep; 0 for all 1,797.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    keep = count or len(images)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images=images[:keep], labels=digits.target[:keep].astype(np.int64))
    return path
