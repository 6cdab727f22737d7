"""Times of a diffusion transformer's self-attention modules: the rows of a latency table for attention plans.

The key ``image_attention/196x2x32x64/w24`` is a module of 2 heads of 32 features over 196 tokens of width 64
that follows the rule ``w24``, projections included.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from autocomp.diffusion.attention_plan import FULL, LayerPlan, Rule
from autocomp.diffusion.state import SamplingState
from autocomp.measure.timing import Timing, time_calls

_KEY = re.compile(r"^image_attention/(\d+)x(\d+)x(\d+)x(\d+)/(.+)$")
MOST_COPIES = 8
"""Modules that take turns, as the layers of a model do."""


@dataclass(frozen=True)
class ImageAttentionOperation:
    """One call of a self-attention module at one step.

    Attributes:
        tokens: of one image; heads, dim: of the module and features a head; width: of the tokens.
        rule: what it does at that step.
    """

    tokens: int
    heads: int
    dim: int
    width: int
    rule: Rule

    @property
    def key(self) -> str:
        return f"image_attention/{self.tokens}x{self.heads}x{self.dim}x{self.width}/{self.rule.label}"


def parse_image_attention_key(key: str) -> ImageAttentionOperation:
    """Inverse of ``ImageAttentionOperation.key``.

    Raises:
        ValueError: it doesn't have the form, which the message gives.
        SpaceError: the rule is none.
    """
    match = _KEY.match(key)
    if match is None or min(int(match[i]) for i in range(1, 5)) < 1:
        raise ValueError(
            f"{key!r} is not an operation key; of an image's attention they look like"
            " 'image_attention/196x2x32x64/w24' (tokens, heads, features a head, width, rule)"
        )
    tokens, heads, dim, width = (int(match[i]) for i in range(1, 5))
    return ImageAttentionOperation(tokens, heads, dim, width, Rule.parse(match[5]))


def window_backend(device: str, dim: int, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """What executes attention in a window, and why nothing does: ``cpu`` (our C), ``triton``, or ``""``."""
    from autocomp.kernels.attention import attention_window_residual

    q = torch.zeros(1, 1, 4, dim, dtype=dtype, device=device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    backend = attention_window_residual.choose(q, q, q, one, 0, None, one)
    if backend != "reference":
        return backend, ""
    return "", f"no kernel here attends in windows with heads of {dim} features on {device}; offer 'reuse'"


def time_image_attention(
    op: ImageAttentionOperation, rows: int, dtype: torch.dtype, device: str, *, repeats: int,
    min_seconds: float, cold_bytes: int,
) -> Timing:  # fmt: skip
    """Time one call of diffusers' ``Attention`` module that follows the rule, after a full step.

    Args:
        rows: of the model's input, both halves of a guided batch counted; a rule that shares halves takes
            them for two halves.
        cold_bytes: modules take turns until their weights add up to this, at most ``MOST_COPIES``.

    Raises:
        ValueError: an odd number of rows for a rule that shares halves.
    """
    if op.rule.shared and rows % 2:
        raise ValueError(f"{op.rule.label} shares halves of a guided batch; {rows} rows have none")
    with torch.inference_mode():
        calls = _calls(op, rows, dtype, device, cold_bytes)

        def round_trip() -> None:
            for call in calls:
                call()

        return time_calls(
            round_trip, warmup=2, repeats=repeats, device=device, min_seconds=min_seconds, calls=len(calls)
        )


def _calls(
    op: ImageAttentionOperation, rows: int, dtype: torch.dtype, device: str, cold_bytes: int
) -> list[Callable[[], object]]:
    from diffusers.models.attention_processor import Attention

    first = Attention(query_dim=op.width, heads=op.heads, dim_head=op.dim, bias=True).to(device, dtype).eval()
    nbytes = sum(p.numel() for p in first.parameters()) * dtype.itemsize
    count = max(1, min(MOST_COPIES, -(-cold_bytes // nbytes)))
    x = torch.randn(rows, op.tokens, op.width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    modules = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
    return [_following(module, op, x) for module in modules]


def _following(module: torch.nn.Module, op: ImageAttentionOperation, x: torch.Tensor) -> Callable[[], object]:
    """A call of the module at the second of three steps, again and again."""
    from autocomp.diffusion.attention_processor import PlannedAttention

    if op.rule == FULL:
        return lambda: module(x)
    state = SamplingState(total=3, guided=op.rule.shared)
    plan = LayerPlan(((FULL,), (op.rule,), (op.rule,)))
    processor = PlannedAttention(plan, op.heads, state, module.processor)
    module.set_processor(processor)  # type: ignore[operator]
    module(x)
    state.index = 1
    module(x)

    def call() -> object:
        processor.again()
        return module(x)

    return call
