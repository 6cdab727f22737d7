"""A convolution from a packed weight: its patches become rows, and the packed linear multiplies them.

The weight ``[N, C, kh, kw]`` is stored as the matrix ``[N, C * kh * kw]``, so every format, rounding and
kernel of linears serves it (im2col: Chellapilla et al. 2006, "High performance convolutional neural networks
for document processing"). Groups run along a row of that matrix, over the taps of one input channel and on to
the next; the last group of a row may be short, as in linears. Inference only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from autocomp.kernels.modules import PackedLinear
from autocomp.quantize.tensor import QuantizedTensor

PATCH_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""By device: patches are made for as many images, or rows of an image, at a time as stay below this. On a CPU
that was up to three times as fast as all at once (memory that comes anew from the system is slow to write),
and memory does not grow by the taps of a kernel."""

_LABEL = re.compile(r"^k(\d+)x(\d+)s(\d+)x(\d+)p(\d+)x(\d+)$")


@dataclass(frozen=True)
class ConvForm:
    """What a convolution does beside its weight; each pair is (height, width).

    Attributes:
        kernel: size of the window.
        stride: from one window to the next.
        padding: zeros on each side of the image.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, module: nn.Conv2d) -> ConvForm:
        """Raises ``ValueError``, with ``refusal``'s reason, for a convolution that is run otherwise."""
        reason = refusal(module)
        if reason:
            raise ValueError(f"this convolution can't run from a packed weight: {reason}")
        (kh, kw), (sh, sw), padding = module.kernel_size, module.stride, module.padding
        assert not isinstance(padding, str)  # refused above
        return cls((kh, kw), (sh, sw), (padding[0], padding[1]))

    @property
    def label(self) -> str:
        """``k3x3s1x1p1x1``."""
        pairs = {"k": self.kernel, "s": self.stride, "p": self.padding}
        return "".join(f"{name}{height}x{width}" for name, (height, width) in pairs.items())

    @classmethod
    def parse(cls, label: str) -> ConvForm:
        """Inverse of ``label``; raises ``ValueError`` with the form when it doesn't have it."""
        match = _LABEL.match(label)
        if match is None or "0" in match.groups()[:4]:
            raise ValueError(f"{label!r} says no kernel, stride and padding; they look like 'k3x3s1x1p1x1'")
        kh, kw, sh, sw, ph, pw = map(int, match.groups())
        return cls((kh, kw), (sh, sw), (ph, pw))

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an image of this size; below 1 where no window fits."""
        (kh, kw), (sh, sw), (ph, pw) = self.kernel, self.stride, self.padding
        return (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1


def refusal(module: nn.Module) -> str:
    """Why a convolution can't run from a packed weight; empty when it can."""
    if type(module) is not nn.Conv2d:
        return f"{type(module).__name__} is no plain Conv2d"
    if module.groups != 1:
        return f"it has {module.groups} groups of channels"
    if tuple(module.dilation) != (1, 1):
        return f"it has the dilation {tuple(module.dilation)}"
    if module.padding_mode != "zeros":
        return f"it pads with {module.padding_mode!r}, not with zeros"
    if isinstance(module.padding, str):
        return f"its padding is {module.padding!r}; give it as numbers"
    return ""


def patches(x: torch.Tensor, form: ConvForm) -> torch.Tensor:
    """What each output position sees: ``[B, C, H, W]`` -> contiguous ``[B * H' * W', C * kh * kw]``."""
    return _taps(_padded(x, form), form)


def _padded(x: torch.Tensor, form: ConvForm) -> torch.Tensor:
    """Images with their zeros around them and channels last: ``[B, H + 2 ph, W + 2 pw, C]``, contiguous."""
    ph, pw = form.padding
    return (F.pad(x, (pw, pw, ph, ph)) if ph or pw else x).permute(0, 2, 3, 1).contiguous()


def _taps(padded: torch.Tensor, form: ConvForm) -> torch.Tensor:
    """``patches`` of images that ``_padded`` gave, or of bands of them."""
    (kh, kw), (sh, sw) = form.kernel, form.stride
    height, width = (padded.shape[1] - kh) // sh + 1, (padded.shape[2] - kw) // sw + 1
    # Each tap is a shifted view: on a CPU 1.5 to 16 times as fast as F.unfold, and for any dtype.
    taps = [
        padded[:, i : i + sh * (height - 1) + 1 : sh, j : j + sw * (width - 1) + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    rows = taps[0] if len(taps) == 1 else torch.stack(taps, -1)
    return rows.reshape(-1, padded.shape[3] * kh * kw)


class PackedConv2d(PackedLinear):
    """A 2-D convolution (one group, no dilation, zero padding) from its weight as a matrix.

    Args:
        weight: the quantized weight ``[N, C * kh * kw]``; it is not kept.
        form: kernel, stride and padding.
        bias, device, dtype: as of ``PackedLinear``.

    Raises:
        ValueError: the weight's columns are no multiple of the kernel's taps, or as ``PackedLinear``.
    """

    def __init__(
        self,
        weight: QuantizedTensor,
        form: ConvForm,
        bias: torch.Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        taps = form.kernel[0] * form.kernel[1]
        if weight.shape[1] % taps:
            raise ValueError(
                f"a kernel of {taps} taps needs a multiple of them as columns; got {weight.shape[1]}"
            )
        super().__init__(weight, bias, device=device, dtype=dtype)
        self.form, self.in_channels = form, weight.shape[1] // taps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [B, C, H, W]`` or ``[C, H, W]`` in any float dtype and strides -> contiguous ``[B, N, H', W']``
        (or without B) in the same dtype.

        Raises:
            ValueError: another number of dimensions or channels, or an image without room for the kernel.
        """
        if x.ndim == 3:
            return self.forward(x[None])[0]
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"the packed convolution takes [B, {self.in_channels}, H, W]; got {tuple(x.shape)}"
            )
        size = self.form.output(*x.shape[-2:])
        if min(size) < 1:
            raise ValueError(f"images of {tuple(x.shape[-2:])} have no room for {self.form.label}")
        y = x.new_empty(len(x), self.out_features, *size)
        for images, band, piece in self._pieces(_padded(x, self.form), size):
            rows = super().forward(_taps(piece, self.form))
            values = rows.view(len(piece), -1, size[1], self.out_features)
            y[images, :, band].copy_(values.permute(0, 3, 1, 2))
        return y

    def _pieces(
        self, padded: torch.Tensor, size: tuple[int, int]
    ) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Which images, which rows of their outputs, and the part of the padded input that these see."""
        limit = PATCH_ELEMENTS[padded.device.type]
        rows = limit // (size[1] * self.in_features)
        images, rows = max(1, rows // size[0]), max(1, min(rows, size[0]))
        kernel, stride = self.form.kernel[0], self.form.stride[0]
        for i in range(0, len(padded), images):
            for r in range(0, size[0], rows):
                last = min(r + rows, size[0])
                piece = padded[i : i + images, r * stride : (last - 1) * stride + kernel]
                yield slice(i, i + images), slice(r, last), piece

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.form.label}"
