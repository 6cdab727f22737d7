"""Is the lean path right for this model? Compared with the model itself, computed in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autocomp.attention.runtime import installed
from autocomp.kernels.modules import PackedEmbedding, PackedModule
from autocomp.serving.lower import Lowering
from autocomp.serving.program import Program
from autocomp.serving.record import Unsupported

LIMIT, LIMIT_PACKED = 1e-2, 1e-1
"""Largest relative difference of the logits, without and with packed weights. Rounding gives some 1e-6;
packed weights round activations to 15 bits, which a model of 2-bit weights was seen to amplify to 0.02. A
wrong order of operations or a forgotten factor gives about 1."""
TOKENS = 24


@torch.no_grad()
def verify(model: Any, lowered: Lowering) -> None:
    """Decode a few random tokens both ways: by steps with a float32 cache, and by one float32 forward pass.

    Raises:
        Unsupported: the logits differ by more than the limit.
    """
    text = model.config.get_text_config()
    length = min(TOKENS, int(getattr(text, "max_position_embeddings", 0) or TOKENS))
    batch = lowered.recording.ids.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(text.vocab_size), (batch, length), generator=generator)
    program = Program(lowered, length, torch.float32, threads=1)  # no waiting for busy cores
    found = torch.stack([program.run(ids[:, i], i, 1).clone() for i in range(length)], dim=1)
    with in_float32(model), _without_plan(model):
        wanted: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    spread = (wanted - wanted.mean(-1, keepdim=True)).norm()
    error = float((found - wanted).norm() / spread)
    packed = any(isinstance(m, PackedModule) for m in model.modules())
    limit = LIMIT_PACKED if packed else LIMIT
    if not error <= limit:
        raise Unsupported(
            f"its logits are off by {error:.2g} from the model's own (relative; limit {limit:g})"
        )


@contextmanager
def _without_plan(model: Any) -> Iterator[None]:
    """Inside, a model that runs by an attention plan keeps everything. What a plan keeps is the rings'
    business; rounding keys and values would turn small differences into large ones."""
    if installed(model) is None:
        yield
        return
    former = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(former)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes in float32 whatever its weights are held in. Weights are converted module by
    module while they are used, so that a large model needs no second copy."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, PackedEmbedding):
                stack.enter_context(_float32_rows(module))
            tensors: list[Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            own = [t for t in tensors if t.dtype in (torch.bfloat16, torch.float16)]
            if own:
                stack.enter_context(_widened_while_used(module, own))
        yield


@contextmanager
def _float32_rows(module: PackedEmbedding) -> Iterator[None]:
    former, module.dtype = module.dtype, torch.float32
    try:
        yield
    finally:
        module.dtype = former


@contextmanager
def _widened_while_used(module: nn.Module, own: list[Tensor]) -> Iterator[None]:
    originals = [t.data for t in own]

    def widen(*call: Any) -> None:
        del call
        for tensor in own:
            tensor.data = tensor.data.float()

    def narrow(*call: Any) -> None:
        del call
        for tensor, original in zip(own, originals):
            tensor.data = original

    before = module.register_forward_pre_hook(widen)
    after = module.register_forward_hook(narrow, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
        narrow()
