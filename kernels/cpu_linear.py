"""Packed linears on the CPU by our own C (``cpu/linear.c``): any width, any number of rows.

Activations become 15-bit integers with one float32 scale per 64 features and row, in two int8 planes, and are
multiplied with the codes exactly, in integers; scales join in float32. For normal activations the error
against exact arithmetic is about 5e-5 of the result's norm; one huge activation can only hurt the 64 features
around it. A NaN or infinity makes its row of outputs NaN.

Many rows (prefill) run the same way, except where the CPU multiplies bfloat16 much faster than bytes: there
the weight is turned to bfloat16 in pieces that fit the cache, and torch's dense linear is used.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from autocomp.kernels import native
from autocomp.kernels.backend import WeightState
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

BLOCK = 16
"""Rows of a weight that lie together; N is padded to it."""
PIECE = 32
"""Features that lie together; groups are multiples of it."""
CHUNK = 64
"""Features that share a scale of the activations; K is padded to it."""
PIECE_WEIGHTS = 1 << 20
"""Weights that are turned to bfloat16 at a time: 2 MiB, which stay in the cache."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of dtypes in the C code."""


class AcWeight(ctypes.Structure):
    """``ac_weight`` of ``cpu/linear.h``: sizes and pointers, nothing is owned."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("type", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("outlier_start", ctypes.c_void_p),
        ("outlier_column", ctypes.c_void_p),
        ("outlier_change", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


_WEIGHT = ctypes.POINTER(AcWeight)
_ARGUMENTS: dict[str, list[Any]] = {
    "ac_linear": [_WEIGHT, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int],
    "ac_weight_bf16": [_WEIGHT, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int],
    "ac_weight_rows": [_WEIGHT, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int],
    "ac_linear_variant": [],
}
_ARGUMENTS["ac_linear_a8"] = _ARGUMENTS["ac_linear"]
_RESULTS = {
    "ac_linear": ctypes.c_int,
    "ac_linear_a8": ctypes.c_int,
    "ac_linear_variant": ctypes.c_char_p,
}


@cache
def _function(name: str) -> Any:
    """A function of the C libraries with its types declared."""
    function = getattr(native.load("linear_a8" if name.endswith("_a8") else "linear"), name)
    function.argtypes, function.restype = _ARGUMENTS[name], _RESULTS.get(name)
    return function


@cache
def _dense_rows() -> int:
    """Rows of activations from which dense bfloat16 on a dequantized weight is faster: never, unless the CPU
    has matrix units (AMX), or the C code no instructions for bytes."""
    if torch.cpu._is_amx_tile_supported():
        return 32
    return 4 if variant() == "plain" else 1 << 62


class CpuBackend:
    """``linear_wna16`` by ``cpu/linear.c``: all widths, groups in multiples of 32 or whole rows, with and
    without zero points and outliers."""

    name = "cpu"
    native = True
    probe = (Scheme(3, 32, symmetric=False, outliers=1.0), (72, 200))
    probes = (probe, *((Scheme(bits, 64), (48, 192)) for bits in (2, 4, 5, 6, 8)))

    def supports(self, scheme: Scheme, shape: tuple[int, int], device_type: str, tokens: int) -> str:
        del tokens
        rows, columns = shape
        if device_type != "cpu":
            return f"it runs on the CPU, not on {device_type}"
        if scheme.is_dense:
            return "w16 is not a packed weight; use a plain linear"
        if scheme.group % PIECE and scheme.group < columns:
            return (
                f"it needs groups in multiples of {PIECE}, or whole rows; got {scheme.label} and K={columns}"
            )
        if rows < 1 or columns < 1:
            return f"the weight is empty: {rows}x{columns}"
        return native.unavailable("linear")

    def prepack(self, weight: QuantizedTensor, device: torch.device) -> WeightState:
        """Codes in planes, scales and zeros in blocks of 16 rows (see ``cpu/linear.c``), outliers by row."""
        if device.type != "cpu":
            raise ValueError(f"the C kernels run on the CPU; got device {device}")
        weight = weight.to("cpu")
        tensors = {"codes": _pack_codes(weight.codes, weight.scheme.bits), "scale": _by_block(weight.scale)}
        if weight.zero is not None:
            tensors["zero"] = _by_block(weight.zero)
        if weight.outlier_index is not None and weight.outlier_value is not None:
            tensors |= _outlier_rows(weight, weight.outlier_index.long(), weight.outlier_value)
        return WeightState(self, weight.scheme, weight.shape, tensors)

    def linear(self, x: torch.Tensor, state: WeightState) -> torch.Tensor:
        if len(x) >= _dense_rows():
            return _linear_by_pieces(x.to(torch.bfloat16), state).to(x.dtype)
        return _multiply("ac_linear", x, state)

    def linear_a8(self, x: torch.Tensor, state: WeightState) -> torch.Tensor:
        """``linear`` on activations of 8 bits (see ``ops.linear_wna8``), from the same state."""
        return _multiply("ac_linear_a8", x, state)

    def rows(self, index: torch.Tensor, state: WeightState) -> torch.Tensor:
        index = index.to(torch.int64).contiguous()
        out = torch.empty(len(index), state.shape[1])
        threads = torch.get_num_threads() if len(index) > 16 else 1
        run, weight = _function("ac_weight_rows"), native_weight(state)
        run(weight, index.data_ptr(), len(index), out.data_ptr(), threads)
        return out


def _multiply(name: str, x: torch.Tensor, state: WeightState) -> torch.Tensor:
    """``x @ W.T`` for contiguous ``x [M, K]`` by the C function called ``name``."""
    if x.dtype is torch.float16:
        return _multiply(name, x.float(), state).to(torch.float16)
    rows = len(x)
    y = x.new_empty(rows, state.shape[0])
    run, weight = _function(name), native_weight(state)
    if run(weight, x.data_ptr(), y.data_ptr(), rows, TYPES[x.dtype], torch.get_num_threads()):
        raise MemoryError(f"no memory for the work space of {rows} rows of activations; use fewer")
    return y


def native_weight(state: WeightState) -> AcWeight:
    """The C struct of a state of :class:`CpuBackend`. It points into the state's tensors: keep the state as
    long as you use it. Cached, since making it takes longer than a small linear."""
    codes = state.tensors["codes"]
    found = _structs.get(id(codes))
    return found[1] if found else _remember(codes, _weight_struct(state))


_structs: dict[int, tuple[weakref.ref[torch.Tensor], AcWeight]] = {}  # by identity of the codes


def _remember(codes: torch.Tensor, struct: AcWeight) -> AcWeight:
    key = id(codes)
    _structs[key] = (weakref.ref(codes, lambda gone: _structs.pop(key, None)), struct)
    return struct


def _weight_struct(state: WeightState) -> AcWeight:
    (rows, columns), tensors = state.shape, state.tensors
    group = state.scheme.group
    whole = group == 0 or group >= columns
    struct = AcWeight(rows, columns, state.scheme.bits, columns if whole else group)
    struct.type = TYPES[tensors["scale"].dtype]
    for name in ("codes", "scale", "zero", "outlier_start", "outlier_column", "outlier_change"):
        if name in tensors:
            setattr(struct, name, tensors[name].data_ptr())
    return struct


def dense_weight(weight: torch.Tensor, bias: torch.Tensor | None = None) -> AcWeight:
    """The C struct of a dense weight.

    Args:
        weight: contiguous ``[N, K]`` on the CPU, float32, bfloat16 or float16.
        bias: contiguous float32 ``[N]``, or ``None``.

    Returns:
        A struct that points into both: keep them as long as you use it.

    Raises:
        ValueError: another dtype, layout or device.
    """
    if weight.dtype not in TYPES or weight.ndim != 2 or not weight.is_contiguous() or weight.is_cuda:
        found = f"{weight.dtype} {list(weight.shape)} on {weight.device}"
        raise ValueError(
            f"a dense weight must be contiguous [N, K] float32, bfloat16 or float16 on the CPU; got {found}"
        )
    fits = bias is None or (
        bias.dtype is torch.float32 and bias.shape == weight.shape[:1] and bias.is_contiguous()
    )
    if bias is not None and not fits:
        raise ValueError(
            f"bias must be contiguous float32 [{len(weight)}]; got {bias.dtype} {list(bias.shape)}"
        )
    rows, columns = weight.shape
    bits = 8 * weight.element_size()
    struct = AcWeight(rows, columns, bits, columns, TYPES[weight.dtype], weight.data_ptr())
    struct.bias = None if bias is None else bias.data_ptr()
    return struct


def variant() -> str:
    """What the C code was compiled to: ``avx512-vnni``, ``avx512``, ``avx2-vnni``, ``avx2`` or ``plain``.

    Raises:
        NativeUnavailable: it can't be had here.
    """
    name: bytes = _function("ac_linear_variant")()
    return name.decode()


PLANES = {
    2: ((0, 2),),
    3: ((0, 2), (2, 1)),
    4: ((0, 4),),
    5: ((0, 4), (4, 1)),
    6: ((0, 4), (4, 2)),
    8: ((0, 8),),
}
"""The planes that codes of a width are split into: first bit and number of bits of each."""


def _pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``[N, K]`` as ``cpu/linear.c`` wants them: uint8 ``[N / 16, K / 32, bits, 64]``, rounded up."""
    rows, columns = codes.shape
    padded = codes.new_zeros(rows + -rows % BLOCK, columns + -columns % CHUNK)
    padded[:rows, :columns] = codes
    # Four features of a row stay together: move them as one word.
    words = padded.view(torch.int32).view(-1, BLOCK, padded.shape[1] // PIECE, PIECE // 4)
    vectors = words.permute(0, 2, 3, 1).contiguous().view(torch.uint8)
    return torch.cat([_plane(vectors, first, width) for first, width in PLANES[bits]], dim=2)


def _plane(vectors: torch.Tensor, first: int, width: int) -> torch.Tensor:
    """Bits ``first .. first + width`` of the 8 vectors of every piece, side by side in ``width`` vectors."""
    per_byte = 8 // width
    fields = ((vectors >> first) & ((1 << width) - 1)).unflatten(2, (width, per_byte))
    plane = fields[:, :, :, 0].clone()
    for i in range(1, per_byte):
        plane |= fields[:, :, :, i] << (width * i)
    return plane


def _by_block(values: torch.Tensor) -> torch.Tensor:
    """Scales or zeros ``[N, G]`` as ``[N / 16, G, 16]``, missing rows zero."""
    rows, groups = values.shape
    padded = values.new_zeros(rows + -rows % BLOCK, groups)
    padded[:rows] = values
    return padded.view(-1, BLOCK, groups).transpose(1, 2).contiguous()


def _outlier_rows(
    weight: QuantizedTensor, index: torch.Tensor, value: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Outliers by row: where each row's begin, int32 ``[N + 1]``; their columns, int32; and what must be
    added to the dequantized code there, float32."""
    rows, columns = weight.shape
    row, column = index // columns, index % columns
    width = weight.scheme.group or columns
    zero: torch.Tensor | int = weight.zero_code
    if weight.zero is not None:
        zero = weight.zero[row, column // width].float()
    scale = weight.scale[row, column // width].float()
    coded = (weight.codes[row, column].float() - zero) * scale
    start = torch.searchsorted(row, torch.arange(rows + 1))
    return {
        "outlier_start": start.to(torch.int32),
        "outlier_column": column.to(torch.int32),
        "outlier_change": value.float() - coded,
    }


def _linear_by_pieces(x: torch.Tensor, state: WeightState) -> torch.Tensor:
    """The dense product in bfloat16; the weight is turned to bfloat16 piece by piece in one small buffer."""
    rows, columns = state.shape
    step = max(BLOCK, PIECE_WEIGHTS // columns // BLOCK * BLOCK)
    buffer = x.new_empty(min(step, rows), columns)
    struct, function, threads = native_weight(state), _function("ac_weight_bf16"), torch.get_num_threads()
    y = x.new_empty(len(x), rows)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        function(struct, first, last, buffer.data_ptr(), threads)
        y[:, first:last] = F.linear(x, buffer[: last - first])
    return y
