"""A quantized weight matrix: codes, scales, zero points and outliers, and its packed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autocomp.kernels.packing import pack, pack_rows, packed_words, unpack, unpack_rows
from autocomp.quantize.grid import spans
from autocomp.quantize.scheme import Scheme

SCALE_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight of shape ``[N, K]`` (output, input features) as integers: ``w = (code - zero) * scale``.

    Attributes:
        scheme: how it is stored; never ``w16``.
        shape: ``(N, K)``.
        codes: uint8 ``[N, K]``, each in ``[0, 2**bits)``.
        scale: bfloat16 or float16 ``[N, G]`` with ``G = scheme.groups(K)``.
        zero: uint8 ``[N, G]``, the code that means 0; ``None`` when symmetric, where it is ``2**(bits-1)``.
        outlier_index: int32 ``[n]``, ascending flat positions ``row * K + column``; ``None`` without any.
        outlier_value: ``[n]`` in the dtype of ``scale``; replaces what the codes say at those positions.

    Raises:
        ValueError: a tensor whose shape or dtype contradicts ``scheme`` and ``shape``.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    outlier_index: Tensor | None = None
    outlier_value: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scheme.is_dense:
            raise ValueError("w16 means 'not quantized': keep the weight as it is")
        (rows, columns), groups = self.shape, self.scheme.groups(self.shape[1])
        count = self.scheme.outlier_count(rows, columns)
        if self.scale.dtype not in SCALE_DTYPES:
            raise ValueError(f"scale must be bfloat16 or float16; got {self.scale.dtype}")
        _expect("codes", self.codes, (rows, columns), torch.uint8)
        _expect("scale", self.scale, (rows, groups), self.scale.dtype)
        _expect("zero", self.zero, None if self.scheme.symmetric else (rows, groups), torch.uint8)
        _expect("outlier_index", self.outlier_index, (count,) if count else None, torch.int32)
        _expect("outlier_value", self.outlier_value, (count,) if count else None, self.scale.dtype)

    @property
    def zero_code(self) -> int:
        """The code that means 0 in a symmetric scheme."""
        return 1 << (self.scheme.bits - 1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[N, K]`` it stands for, computed in float32 with the stored scale, then cast."""
        out = self.codes.to(torch.float32)
        for span in spans(self.shape[1], self.scheme.group):
            block = out[:, span.columns].unflatten(1, (-1, span.width))  # a view: written in place
            zero = self.zero_code if self.zero is None else self.zero[:, span.groups, None]
            block.sub_(zero).mul_(self.scale[:, span.groups, None].to(torch.float32))
        if self.outlier_index is not None and self.outlier_value is not None:
            out.view(-1)[self.outlier_index.long()] = self.outlier_value.to(torch.float32)
        return out.to(dtype)

    def to_state(self) -> dict[str, Tensor]:
        """The packed form in the layout of compressed-tensors' ``pack-quantized``.

        ``weight_packed`` int32 ``[N, ceil(K*bits/32)]``, ``weight_scale`` ``[N, G]``, ``weight_shape`` int64
        ``[2]``; asymmetric: ``weight_zero_point`` int32 ``[ceil(N*bits/32), G]``, packed along N; and, of our
        own, ``outlier_index`` int32 ``[n]`` with ``outlier_value`` 16-bit ``[n]``.

        Both codes and zero points are stored unsigned; compressed-tensors computes with signed values and
        adds ``2**(bits-1)`` when it packs, which gives the same words.
        """
        bits = self.scheme.bits
        state = {
            "weight_packed": pack(self.codes, bits),
            "weight_scale": self.scale,
            "weight_shape": torch.tensor(self.shape, dtype=torch.int64),
        }
        if self.zero is not None:
            state["weight_zero_point"] = pack_rows(self.zero, bits)
        if self.outlier_index is not None and self.outlier_value is not None:
            state |= {"outlier_index": self.outlier_index, "outlier_value": self.outlier_value}
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
        """Read what :meth:`to_state` gave; raises ``ValueError`` where ``state`` does not fit ``scheme``."""
        needed = {"weight_packed", "weight_scale", "weight_shape"}
        needed |= set() if scheme.symmetric else {"weight_zero_point"}
        if missing := sorted(needed - state.keys()):
            raise ValueError(f"packed state for {scheme} lacks {missing}; it holds {sorted(state)}")
        rows, columns = (int(size) for size in state["weight_shape"])
        zero = None if scheme.symmetric else unpack_rows(state["weight_zero_point"], scheme.bits, rows)
        index = state.get("outlier_index")
        if (
            index is not None
            and index.numel()
            and not 0 <= int(index.min()) <= int(index.max()) < rows * columns
        ):
            raise ValueError(f"outlier_index has positions outside a weight of shape [{rows}, {columns}]")
        return cls(
            scheme=scheme,
            shape=(rows, columns),
            codes=unpack(state["weight_packed"], scheme.bits, columns),
            scale=state["weight_scale"],
            zero=zero,
            outlier_index=index,
            outlier_value=state.get("outlier_value"),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of :meth:`to_state` without ``weight_shape``, computed without packing."""
        bits = self.scheme.bits
        kept = (self.scale, self.outlier_index, self.outlier_value)
        total = 4 * self.shape[0] * packed_words(self.shape[1], bits)
        if self.zero is not None:
            total += 4 * packed_words(self.shape[0], bits) * self.zero.shape[1]
        return total + sum(part.nbytes for part in kept if part is not None)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same on another device."""
        names = ("codes", "scale", "zero", "outlier_index", "outlier_value")
        parts = {name: getattr(self, name) for name in names}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if part is not None})


def _expect(name: str, part: Tensor | None, shape: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    found = None if part is None else (tuple(part.shape), part.dtype)
    wanted = None if shape is None else (shape, dtype)
    if found != wanted:
        raise ValueError(f"{name} must be {wanted}; got {found}")
