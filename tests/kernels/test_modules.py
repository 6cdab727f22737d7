"""Packed modules in place of linears and embeddings."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from autocomp.kernels import ops
from autocomp.kernels.aten import DENSE_TOKENS
from autocomp.kernels.modules import PackedEmbedding, PackedLinear
from autocomp.kernels.ops import random_weight
from autocomp.measure.memory import weights_bytes
from autocomp.quantize.scheme import Scheme

BF16_ERROR = 1.2e-2
LABELS = ["w4g64", "w4g32a", "w8", "w3g64", "w4g64o1", "w2"]


@pytest.fixture(autouse=True)
def torch_operators_first(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These tests are about torch's own operators and the reference; our C kernels would take most of it."""
    monkeypatch.setattr(ops, "_backends", [b for b in ops._backends if b.name != "cpu"])
    ops._clear()
    yield
    monkeypatch.undo()
    ops._clear()


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("tokens", [1, 8, 9, DENSE_TOKENS, DENSE_TOKENS + 1, 200])
def test_packed_linear_matches_a_linear_with_the_dequantized_weight(label: str, tokens: int) -> None:
    weight = random_weight(Scheme.parse(label), (96, 128))
    bias = torch.randn(96, generator=torch.Generator().manual_seed(1))
    packed = PackedLinear(weight, bias, dtype=torch.float32)
    dense = nn.Linear(128, 96)
    dense.weight.data, dense.bias.data = weight.dequantize(torch.float32), bias
    x = torch.randn(1, tokens, 128, generator=torch.Generator().manual_seed(2))
    y = packed(x)
    assert y.shape == (1, tokens, 96) and y.dtype == torch.float32
    assert relative_error(y, dense(x)) <= BF16_ERROR


def test_packed_linear_stands_in_for_a_transposed_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(96, 64)  # weight [in 64, out 96]
    weight = random_weight(Scheme(8), (96, 64))
    conv.weight.data = weight.dequantize(torch.float32).T
    conv.bias.data.normal_(generator=torch.Generator().manual_seed(0))
    packed = PackedLinear(weight, conv.bias, dtype=torch.float32)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(3))
    assert relative_error(packed(x), conv(x)) <= BF16_ERROR


@pytest.mark.parametrize("label", LABELS)
def test_a_chunked_wide_head_is_right(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from autocomp.kernels import aten

    monkeypatch.setattr(aten, "CHUNK_WEIGHTS", 1000)  # 15 rows at a time: the last piece is short
    weight = random_weight(Scheme.parse(label), (208, 64))
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert relative_error(PackedLinear(weight)(x), x.float() @ weight.dequantize().T) <= BF16_ERROR


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_embedding_looks_rows_up(label: str, dtype: torch.dtype) -> None:
    weight = random_weight(Scheme.parse(label), (176, 64))
    packed = PackedEmbedding(weight, dtype=dtype, padding_idx=3)
    index = torch.tensor([[0, 175, 3], [64, 63, 160]])
    rows = packed(index)
    assert rows.shape == (2, 3, 64) and rows.dtype == dtype and packed.padding_idx == 3
    assert relative_error(rows, weight.dequantize()[index]) <= 2.0**-8
    assert torch.equal(packed(index.int()), rows)
    assert packed(index[:, :0]).shape == (2, 0, 64)


def test_packed_embedding_scales_rows() -> None:
    weight = random_weight(Scheme(8), (32, 64))
    plain, scaled = (PackedEmbedding(weight, dtype=torch.float32, scale=s) for s in (1.0, 8.0))
    index = torch.tensor([1, 2])
    assert torch.equal(scaled(index), 8.0 * plain(index))


@pytest.mark.parametrize("bad", [-1, 176])
@pytest.mark.parametrize("label", ["w4g64", "w8", "w3g64"])
def test_an_index_outside_of_the_table_is_an_error(label: str, bad: int) -> None:
    packed = PackedEmbedding(random_weight(Scheme.parse(label), (176, 64)))
    with pytest.raises(IndexError, match=f"176 rows.*{bad}"):
        packed(torch.tensor([5, bad]))


@pytest.mark.parametrize("label", LABELS)
def test_a_tied_head_shares_the_embedding_and_counts_once(label: str) -> None:
    weight = random_weight(Scheme.parse(label), (176, 64))
    embedding = PackedEmbedding(weight)
    model = nn.ModuleDict({"embedding": embedding, "head": PackedLinear.sharing(embedding)})
    assert weights_bytes(model) == embedding.resident_bytes == model["head"].resident_bytes
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    assert relative_error(model["head"](x), x.float() @ weight.dequantize().T) <= BF16_ERROR


def test_a_head_whose_layout_hides_rows_has_its_own_copy_and_both_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from autocomp.kernels import aten

    monkeypatch.setattr(aten, "_int4_block", lambda: 0)
    weight = random_weight(Scheme(4, 64), (176, 64))
    embedding = PackedEmbedding(weight)
    head = PackedLinear.sharing(embedding)
    assert (embedding.backend, head.backend) == ("reference", "torch_int4")
    both = nn.ModuleList([embedding, head])
    assert weights_bytes(both) == embedding.resident_bytes + head.resident_bytes
    assert torch.equal(embedding(torch.tensor([170])), weight.dequantize(torch.bfloat16)[170:171])
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    assert relative_error(head(x), x.float() @ weight.dequantize().T) <= BF16_ERROR


def test_resident_bytes_include_the_bias_and_are_near_the_scheme() -> None:
    scheme = Scheme(4, 64)
    plain = PackedLinear(random_weight(scheme, (64, 128)))
    biased = PackedLinear(random_weight(scheme, (64, 128)), torch.zeros(64))
    assert biased.resident_bytes == plain.resident_bytes + 2 * 64 == weights_bytes(biased)
    # torch's layout keeps a shift beside every scale, nothing else.
    assert plain.resident_bytes == scheme.weight_bytes(64, 128) + 2 * 64 * scheme.groups(128)


def test_casting_a_model_leaves_packed_weights_alone() -> None:
    packed = PackedLinear(random_weight(Scheme(8), (32, 64)), torch.ones(32))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    before = packed(x)
    assert torch.equal(packed.float()(x), before)
    assert packed.bias is not None and packed.bias.dtype == torch.float32
    assert list(packed.state_dict()) == ["bias"]


def test_a_deep_copy_has_its_own_weights() -> None:
    embedding = PackedEmbedding(random_weight(Scheme(8), (32, 64)))
    twin = copy.deepcopy(embedding)
    assert weights_bytes(nn.ModuleList([embedding, twin])) == 2 * embedding.resident_bytes
    assert torch.equal(twin(torch.tensor([4])), embedding(torch.tensor([4])))
    assert PackedLinear.sharing(twin).state is twin.state


def test_a_bias_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="32 elements"):
        PackedLinear(random_weight(Scheme(8), (32, 64)), torch.zeros(31))


def test_repr_names_scheme_and_backend() -> None:
    assert "64 -> 32, w8, backend=torch_int8" in repr(PackedLinear(random_weight(Scheme(8), (32, 64))))
    assert "32, 64, w8, backend=torch_int8" in repr(PackedEmbedding(random_weight(Scheme(8), (32, 64))))
