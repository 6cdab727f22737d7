"""Times of a diffusion model's convolutions: the rows of a latency table.

The key ``conv/64x288/w4g64/k3x3s1x1p1x1@16x16`` is a convolution of 32 to 64 channels by a kernel of 3x3 (288
inputs with its taps) with stride and padding 1 over images of 16x16. It names everything the time depends on
except how many images there are.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from autocomp.errors import CapabilityError
from autocomp.kernels.convolution import ConvForm, PackedConv2d
from autocomp.kernels.ops import capability, random_weight
from autocomp.measure.timing import Timing, time_calls
from autocomp.quantize.scheme import Scheme

_KEY = re.compile(r"^conv/(\d+)x(\d+)/([a-z0-9.]+)/(k[^@]+)@(\d+)x(\d+)$")
MOST_COPIES = 8
"""Convolutions that take turns, as the layers of a model do."""


@dataclass(frozen=True)
class ConvOperation:
    """One call of a convolution.

    Attributes:
        shape: of its weight as a matrix, ``(N, C * kh * kw)``.
        scheme: of the weight.
        form: kernel, stride, padding.
        size: height and width of the images that it reads.
    """

    shape: tuple[int, int]
    scheme: Scheme
    form: ConvForm
    size: tuple[int, int]

    @property
    def key(self) -> str:
        (rows, columns), (height, width) = self.shape, self.size
        return f"conv/{rows}x{columns}/{self.scheme.label}/{self.form.label}@{height}x{width}"

    @property
    def channels(self) -> int:
        """Input channels."""
        return self.shape[1] // (self.form.kernel[0] * self.form.kernel[1])


def parse_conv_key(key: str) -> ConvOperation:
    """Inverse of ``ConvOperation.key``; raises ``ValueError`` with the form when ``key`` doesn't have it."""
    match = _KEY.match(key)
    if match is None:
        raise ValueError(
            f"{key!r} is not an operation key; of convolutions they look like"
            " 'conv/64x288/w4g64/k3x3s1x1p1x1@16x16'"
        )
    rows, columns, height, width = (int(match[i]) for i in (1, 2, 5, 6))
    form = ConvForm.parse(match[4])
    if rows < 1 or columns < 1 or columns % (form.kernel[0] * form.kernel[1]):
        raise ValueError(f"{key!r} is not an operation key: {columns} columns are not taps of {form.label}")
    if min(form.output(height, width)) < 1:
        raise ValueError(f"{key!r} is not an operation key: its image has no room for the kernel")
    return ConvOperation((rows, columns), Scheme.parse(match[3]), form, (height, width))


def time_conv(
    op: ConvOperation, images: int, dtype: torch.dtype, device: str, *, repeats: int, min_seconds: float,
    cold_bytes: int,
) -> Timing:  # fmt: skip
    """Time one call through the module that serves it (``F.conv2d`` for ``w16``).

    Args:
        images: rows of the model's input, both halves of a guided batch counted.
        cold_bytes: convolutions take turns until their weights add up to this, at most ``MOST_COPIES``.

    Raises:
        CapabilityError: the device can only simulate it, so it has no latency there.
    """
    found = capability(op.scheme, op.shape, torch.device(device).type)
    if not found.native:
        raise CapabilityError(f"{op.key} has no latency here: {found.reason}")
    with torch.inference_mode():
        calls = _calls(op, images, dtype, device, cold_bytes)

        def round_trip() -> None:
            for call in calls:
                call()

        return time_calls(
            round_trip, warmup=2, repeats=repeats, device=device, min_seconds=min_seconds, calls=len(calls)
        )


def _calls(
    op: ConvOperation, images: int, dtype: torch.dtype, device: str, cold_bytes: int
) -> list[Callable[[], torch.Tensor]]:
    """Equal calls, each with a weight of its own. A bias, which costs both alike, is left out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, op.channels, *op.size, generator=generator).to(device, dtype)
    count = max(1, min(MOST_COPIES, -(-cold_bytes // op.scheme.weight_bytes(*op.shape))))
    form = op.form
    if op.scheme.is_dense:
        weight = torch.randn(op.shape[0], op.channels, *form.kernel, generator=generator).to(device, dtype)
        return [
            partial(F.conv2d, x, weight.clone(), stride=form.stride, padding=form.padding)
            for _ in range(count)
        ]
    module = PackedConv2d(random_weight(op.scheme, op.shape), form, device=device, dtype=dtype)
    return [partial(copy.deepcopy(module), x) for _ in range(count)]
