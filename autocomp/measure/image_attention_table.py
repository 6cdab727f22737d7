"""Times of a diffusion transformer's attention modules: the rows of a latency table for attention plans.

The key ``image_attention/196x2x32x64/w24`` is a module of 2 heads of 32 features over 196 tokens of width 64
that follows the rule ``w24``, projections included; ``image_attention/196+77x2x32x64/joint/w24`` one of SD3
whose sequence holds a text of 77 tokens, too (``flux``, ``flux_single``: of Flux's blocks). Norms of queries
and keys that a model may have are in the times of Flux alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from autocomp.diffusion.attention_plan import FULL, LayerPlan, Rule
from autocomp.diffusion.state import SamplingState
from autocomp.measure.timing import Timing, time_calls

if TYPE_CHECKING:
    from autocomp.search_spaces.base import Part

_KEY = re.compile(r"^image_attention/(\d+)(?:\+(\d+))?x(\d+)x(\d+)x(\d+)/(?:(joint|flux|flux_single)/)?(.+)$")
MOST_COPIES = 8
"""Modules that take turns, as the layers of a model do."""


@dataclass(frozen=True)
class ImageAttentionOperation:
    """One call of an attention module at one step.

    Attributes:
        tokens: of one image; heads, dim: of the module and features a head; width: of the tokens.
        rule: what it does at that step.
        text: tokens of a text in the same sequence.
        form: name of the module's ``Form``.
    """

    tokens: int
    heads: int
    dim: int
    width: int
    rule: Rule
    text: int = 0
    form: str = "attention"

    @classmethod
    def of(cls, part: Part, rule: Rule) -> ImageAttentionOperation:
        """That of a part of kind ``image_attention``."""
        heads, dim, tokens, *text = part.shape
        return cls(tokens, heads, dim, heads * dim, rule, sum(text), part.role if text else "attention")

    @property
    def key(self) -> str:
        text = f"+{self.text}" if self.text else ""
        form = f"{self.form}/" if self.text else ""
        sizes = f"{self.tokens}{text}x{self.heads}x{self.dim}x{self.width}"
        return f"image_attention/{sizes}/{form}{self.rule.label}"


def parse_image_attention_key(key: str) -> ImageAttentionOperation:
    """Inverse of ``ImageAttentionOperation.key``.

    Raises:
        ValueError: it doesn't have the form, which the message gives.
        SpaceError: the rule is none.
    """
    match = _KEY.match(key)
    sizes = [] if match is None else [int(n) for n in match.groups()[:5] if n is not None]
    if match is None or min(sizes) < 1 or (match[2] is None) != (match[6] is None):
        raise ValueError(
            f"{key!r} is not an operation key; of an image's attention they look like"
            " 'image_attention/196x2x32x64/w24' (tokens, heads, features a head, width, rule), with a text"
            " like 'image_attention/196+77x2x32x64/joint/w24'"
        )
    heads, dim, width = sizes[-3:]
    form = match[6] or "attention"
    return ImageAttentionOperation(
        sizes[0], heads, dim, width, Rule.parse(match[7]), int(match[2] or 0), form
    )


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
    """Time one call of diffusers' attention module that follows the rule, after a full step.

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
    first = _module(op).to(device, dtype).eval()
    nbytes = sum(p.numel() for p in first.parameters()) * dtype.itemsize
    count = max(1, min(MOST_COPIES, -(-cold_bytes // nbytes)))
    modules = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
    inputs = _inputs(op, rows, dtype, device)
    return [_following(module, op, inputs) for module in modules]


def _module(op: ImageAttentionOperation) -> torch.nn.Module:
    """As the blocks of the form's models make it, with random weights."""
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

    sizes: dict[str, Any] = {"query_dim": op.width, "heads": op.heads, "dim_head": op.dim, "bias": True}
    text = {"added_kv_proj_dim": op.width, "context_pre_only": False}
    if op.form == "attention":
        return Attention(**sizes)
    if op.form == "joint":
        return Attention(**sizes, **text, processor=JointAttnProcessor2_0())
    from diffusers.models.transformers.transformer_flux import FluxAttention

    return FluxAttention(**sizes, **({"pre_only": True} if op.form == "flux_single" else text))


def _inputs(op: ImageAttentionOperation, rows: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> torch.Tensor:
        return torch.randn(rows, count, op.width, generator=generator).to(device, dtype)

    found: dict[str, Any] = {"hidden_states": tokens(op.tokens + op.text * (op.form == "flux_single"))}
    if op.form in ("joint", "flux"):
        found["encoder_hidden_states"] = tokens(op.text)
    if op.form in ("flux", "flux_single"):
        angles = torch.randn(op.tokens + op.text, op.dim, generator=generator).to(device)
        found["image_rotary_emb"] = (angles.cos(), angles.sin())
    return found


def _following(
    module: torch.nn.Module, op: ImageAttentionOperation, inputs: dict[str, Any]
) -> Callable[[], object]:
    """A call of the module at the second of three steps, again and again."""
    from autocomp.diffusion.attention_forms import FORMS
    from autocomp.diffusion.attention_processor import PlannedAttention

    if op.rule == FULL:
        return lambda: module(**inputs)
    owner: Any = module
    state = SamplingState(total=3, guided=op.rule.shared, text=op.text)
    plan = LayerPlan(((FULL,), (op.rule,), (op.rule,)))
    processor = PlannedAttention(plan, op.heads, state, owner.processor, FORMS[op.form])
    owner.set_processor(processor)
    module(**inputs)
    state.index = 1
    module(**inputs)

    def call() -> object:
        processor.again()
        return module(**inputs)

    return call
