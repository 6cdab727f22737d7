"""Modules that stand in for a linear or an embedding and run from packed weights. Inference only."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from autocomp.kernels.backend import Backend, WeightState
from autocomp.kernels.ops import choose, linear_wna8, linear_wna16, prepack
from autocomp.kernels.reference import REFERENCE, to_quantized
from autocomp.quantize.tensor import QuantizedTensor


class PackedModule(nn.Module):
    """Holds packed weights outside of parameters and buffers.

    Their dtypes and layouts belong to a backend and a device, so ``.to()``, ``.half()`` and the like
    leave them alone; to move a packed model, pack it again.
    """

    state: WeightState

    def resident_tensors(self) -> Iterator[torch.Tensor]:
        """Every packed tensor that this module keeps in memory (shared ones too)."""
        yield from self.state.tensors.values()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the packed tensors and the bias, as truly held. A shared state counts in each holder;
        ``measure.memory.weights_bytes`` counts it once."""
        bias = getattr(self, "bias", None)
        tensors = [*self.resident_tensors(), *([bias] if isinstance(bias, torch.Tensor) else [])]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def backend(self) -> str:
        """Name of the backend that runs this module."""
        return self.state.backend.name


class PackedLinear(PackedModule):
    """A linear layer from a quantized weight ``[N, K]`` (of a transposed ``Conv1D``, hand over ``weight.T``).

    Args:
        weight: the quantized weight; it is not kept.
        bias: ``[N]`` or ``None``. Kept as it is when device and dtype already fit.
        device: where it will run.
        dtype: dtype of the bias. Outputs have the dtype of the inputs.

    Raises:
        ValueError: the bias doesn't have N elements, or the scheme is ``w16``.
    """

    #: 16, or 8 where the backend has ``linear_a8``; may be changed between calls, the weight is the same.
    activation_bits: int = 16

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: torch.Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self._set(prepack(weight, device), bias, dtype)

    @classmethod
    def sharing(cls, embedding: PackedEmbedding, bias: torch.Tensor | None = None) -> PackedLinear:
        """The output head tied to ``embedding``: one packed weight serves both wherever the layout allows,
        else the head gets its own (and both are counted)."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set(embedding.head_state(), bias, embedding.dtype)
        return self

    def _set(self, state: WeightState, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.state = state
        self.out_features, self.in_features = state.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias must have {self.out_features} elements; got shape {tuple(bias.shape)}")
        self.bias: torch.Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().to(state.device, dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` in any float dtype and strides -> ``[..., out]`` in the same dtype."""
        if self.activation_bits == 8:
            return linear_wna8(x, self.state, self.bias)
        return linear_wna16(x, self.state, self.bias)

    def extra_repr(self) -> str:
        scheme = self.state.scheme.label
        return f"{self.in_features} -> {self.out_features}, {scheme}, backend={self.backend}"


class PackedEmbedding(PackedModule):
    """An embedding whose rows are dequantized when they are looked up.

    The state is that of the backend a tied head would use, if rows can be read out of it; otherwise the
    reference's dense codes, which any scheme has.

    Args:
        weight: the quantized table ``[rows, width]``; it is not kept.
        device: where it will run.
        dtype: dtype of the rows that it returns.
        padding_idx: kept for callers that read it; the look-up doesn't use it.
        scale: factor on every row (models that scale their embedding inside of the module).
    """

    def __init__(
        self,
        weight: QuantizedTensor,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        padding_idx: int | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype, self.padding_idx, self.scale = dtype, padding_idx, scale
        self._head: Backend = choose(weight.scheme, weight.shape, device)
        self.state = self._head.prepack(weight, torch.device(device))
        if self._head.rows(torch.zeros(1, dtype=torch.int64, device=self.state.device), self.state) is None:
            self.state = REFERENCE.prepack(weight, torch.device(device))

    def head_state(self) -> WeightState:
        """The weight state for a tied output head: this module's own when the head's backend reads it."""
        if self.state.backend is self._head:
            return self.state
        return self._head.prepack(to_quantized(self.state), self.state.device)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """``index [...]`` int32 or int64 -> rows ``[..., width]``.

        Raises:
            IndexError: an index on the CPU outside of the table.
        """
        flat = index.reshape(-1).long()
        if flat.device.type == "cpu" and flat.numel():
            low, high = (int(end) for end in flat.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(f"embedding has {self.num_embeddings} rows; got indices {low} to {high}")
        rows = self.state.backend.rows(flat, self.state)
        assert rows is not None  # the constructor chose a state that can
        if self.scale != 1.0:
            rows = rows * self.scale
        return rows.to(self.dtype).view(*index.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        scheme = self.state.scheme.label
        return f"{self.num_embeddings}, {self.embedding_dim}, {scheme}, backend={self.backend}"
