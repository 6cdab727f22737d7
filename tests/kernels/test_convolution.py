"""Convolutions from packed weights, against torch's own with the weight that the packed one stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocomp.kernels import convolution
from autocomp.kernels.convolution import ConvForm, PackedConv2d, patches, refusal
from autocomp.kernels.modules import PackedLinear
from autocomp.kernels.ops import capability, linear_wna8, random_weight
from autocomp.measure.memory import weights_bytes
from autocomp.quantize.rounding import quantize
from autocomp.quantize.scheme import Scheme

KERNEL_ERROR = {torch.float32: 2e-4, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
LABELS = ["w4g32", "w3g64a", "w8", "w2g128", "w4g64o1"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(
    form: ConvForm, channels: int, rows: int, label: str = "w4g32", dtype: torch.dtype = torch.float32
) -> tuple[PackedConv2d, torch.Tensor]:
    """A packed convolution with a bias, and the weight ``[N, C, kh, kw]`` that it stands for."""
    kh, kw = form.kernel
    weight = random_weight(Scheme.parse(label), (rows, channels * kh * kw))
    module = PackedConv2d(weight, form, normal(rows, seed=1), dtype=dtype)
    return module, weight.dequantize(torch.float32).view(rows, channels, kh, kw)


def exact(module: PackedConv2d, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    assert module.bias is not None
    form = module.form
    return F.conv2d(x.double(), weight.double(), module.bias.double(), form.stride, form.padding)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@settings(max_examples=50, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    images=st.integers(1, 3),
    channels=st.integers(1, 20),
    rows=st.integers(1, 40),
    size=st.tuples(st.integers(5, 11), st.integers(5, 11)),
    label=st.sampled_from(LABELS),
    dtype=st.sampled_from(list(KERNEL_ERROR)),
)
def test_a_packed_convolution_is_the_convolution_with_the_dequantized_weight(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], images: int, channels: int,
    rows: int, size: tuple[int, int], label: str, dtype: torch.dtype,
) -> None:  # fmt: skip
    form = ConvForm(kernel, stride, padding)
    module, weight = packed(form, channels, rows, label, dtype)
    x = normal(images, channels, *size, seed=2, dtype=dtype)
    wanted = exact(module, weight, x)
    found = module(x)
    assert found.shape == wanted.shape and found.dtype == dtype and found.is_contiguous()
    assert found.shape[2:] == form.output(*size)
    assert relative(found, wanted) <= KERNEL_ERROR[dtype]


@given(
    kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 2), channels=st.integers(1, 5)
)
@settings(max_examples=25, deadline=None)
def test_patches_times_the_matrix_are_the_convolution(
    kernel: int, stride: int, padding: int, channels: int
) -> None:
    """In float64: the order of columns is that of ``weight.flatten(1)``."""
    form = ConvForm((kernel, kernel), (stride, stride), (padding, padding))
    x, weight = normal(2, channels, 6, 7).double(), normal(3, channels, kernel, kernel, seed=1).double()
    rows = patches(x, form)
    wanted = F.conv2d(x, weight, stride=stride, padding=padding)
    height, width = form.output(6, 7)
    assert rows.shape == (2 * height * width, channels * kernel**2) and rows.is_contiguous()
    found = (rows @ weight.flatten(1).T).view(2, height, width, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("form", [ConvForm((3, 3), (1, 1), (1, 1)), ConvForm((1, 1))])
def test_any_strides_and_single_images(form: ConvForm) -> None:
    module, _ = packed(form, 6, 9)
    x = normal(2, 6, 8, 5)
    wanted = module(x)
    assert torch.equal(module(x.to(memory_format=torch.channels_last)), wanted)
    assert torch.equal(module(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)), wanted)
    assert torch.allclose(module(x[1]), wanted[1], rtol=0, atol=1e-5)
    assert module(x[:0]).shape == (0, *wanted.shape[1:])


def test_few_patches_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = packed(ConvForm((3, 3), (2, 2), (1, 1)), 5, 8)
    x = normal(7, 5, 9, 9)
    wanted = module(x)
    calls: list[tuple[int, ...]] = []
    real = convolution._taps

    def seen(padded: torch.Tensor, form: ConvForm) -> torch.Tensor:
        calls.append(tuple(padded.shape[:2]))
        return real(padded, form)

    monkeypatch.setattr(convolution, "_taps", seen)

    def limited(elements: int) -> list[tuple[int, ...]]:
        """The pieces of the padded input (11 x 11) that are looked at when so many elements are allowed."""
        calls.clear()
        monkeypatch.setattr(convolution, "PATCH_ELEMENTS", {"cpu": elements})
        torch.testing.assert_close(module(x), wanted, rtol=0, atol=1e-5)
        return list(calls)

    row = 5 * 45  # 5 output positions of 45 inputs; 5 such rows an image
    assert limited(2 * 5 * row + 1) == [(2, 11), (2, 11), (2, 11), (1, 11)]
    assert limited(5 * row) == [(1, 11)] * 7
    assert limited(2 * row) == [(1, 5), (1, 5), (1, 3)] * 7, "output rows 0-1, 2-3 and 4"
    assert limited(1) == [(1, 3)] * 35


def test_activations_of_8_bits_are_rounded_by_patches() -> None:
    """A packed convolution is a packed linear on patches, also where its activations have 8 bits."""
    form = ConvForm((3, 3), (1, 1), (1, 1))
    module, weight = packed(form, 8, 16, "w8")
    if not hasattr(module.state.backend, "linear_a8"):
        pytest.skip("no kernel for 8-bit activations here")
    x = normal(2, 8, 6, 6)
    module.activation_bits = 8
    rows = linear_wna8(patches(x, form), module.state, module.bias)
    assert torch.equal(module(x), rows.view(2, 36, 16).transpose(1, 2).reshape(2, 16, 6, 6))
    assert 1e-3 < relative(module(x), exact(module, weight, x)) < 2e-2


def test_bytes_are_those_of_the_matrix_with_a_short_last_group() -> None:
    conv = nn.Conv2d(16, 24, 3)
    scheme = Scheme.parse("w4g64")
    weight = quantize(conv.weight.detach().flatten(1), scheme)  # 144 columns: groups of 64, 64 and 16
    assert weight.scale.shape == (24, 3)
    stored = {n: t for n, t in weight.to_state().items() if n != "weight_shape"}
    nbytes = sum(t.numel() * t.element_size() for t in stored.values())
    assert nbytes == scheme.weight_bytes(24, 144) == 24 * (144 // 2 + 2 * 3)
    module = PackedConv2d(weight, ConvForm.of(conv), conv.bias)
    linear = PackedLinear(weight, conv.bias)
    assert module.resident_bytes == linear.resident_bytes == weights_bytes(module)
    assert module.backend == linear.backend == capability(scheme, (24, 144), "cpu").backend


# -- which convolutions ------------------------------------------------------------------------------------


class Doubled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "2 groups of channels"),
        (nn.Conv2d(4, 4, 3, dilation=(1, 2)), r"dilation \(1, 2\)"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "'circular', not with zeros"),
        (nn.Conv2d(4, 4, 3, padding="same"), "padding is 'same'"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d is no plain Conv2d"),
        (nn.Conv1d(4, 4, 3), "Conv1d is no plain Conv2d"),
        (Doubled(4, 4, 3), "Doubled is no plain Conv2d"),
    ],
)
def test_what_is_run_otherwise_is_refused_with_the_reason(module: nn.Conv2d, reason: str) -> None:
    assert refusal(module)
    with pytest.raises(ValueError, match=reason):
        ConvForm.of(module)


def test_a_form_is_read_from_the_module_and_back_from_its_label() -> None:
    conv = nn.Conv2d(3, 8, (3, 1), stride=(2, 1), padding=(1, 0), bias=False)
    form = ConvForm.of(conv)
    assert form == ConvForm((3, 1), (2, 1), (1, 0)) and form.label == "k3x1s2x1p1x0"
    assert ConvForm.parse(form.label) == form
    assert form.output(7, 4) == conv(torch.zeros(1, 3, 7, 4)).shape[2:]
    for wrong in ("", "k3x1", "k3x1s0x1p0x0", "k3s1p1", "k0x3s1x1p1x1"):
        with pytest.raises(ValueError, match="k3x3s1x1p1x1"):
            ConvForm.parse(wrong)


def test_inputs_that_do_not_fit_are_refused() -> None:
    module, _ = packed(ConvForm((3, 3)), 4, 5)
    for shape in ((2, 5, 8, 8), (2, 4, 8), (4, 8), (1, 2, 4, 8, 8)):
        with pytest.raises(ValueError, match=r"takes \[B, 4, H, W\]"):
            module(torch.zeros(shape))
    with pytest.raises(ValueError, match="no room for k3x3s1x1p0x0"):
        module(torch.zeros(1, 4, 2, 8))
    with pytest.raises(ValueError, match="kernel of 9 taps"):
        PackedConv2d(random_weight(Scheme(8), (5, 32)), ConvForm((3, 3)))
    assert "36 -> 5, w4g32" in repr(module) and "k3x3s1x1p0x0" in repr(module)
