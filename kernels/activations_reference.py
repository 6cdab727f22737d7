"""What the linears on quantized activations compute, in plain torch: the oracle of every kernel.

Activations are quantized per token (row), symmetrically and dynamically: with ``a`` the largest magnitude
in the row, at least 1e-30, int8 takes ``q = round_half_even(x * (127 / a))`` and ``s = a / 127``, and e4m3
takes ``q = e4m3(x * (448 / a))`` and ``s = a / 448``, each operation rounded to float32. A row with a NaN or
an infinity gives NaN everywhere; no other row is touched. Products of codes are summed in float64 here:
those of integers exactly.
"""

from __future__ import annotations

import torch

from autocomp.kernels.packing import packed_words, unpack

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SMALLEST = 1e-30
"""Lower bound of a row's magnitude: a row of zeros gets this instead of a division by zero."""
INT8_MAX, E4M3_MAX = 127.0, 448.0
MOST_FEATURES = 1 << 16
"""With more, an int32 sum of products of codes could overflow in some implementation."""


def quantize_int8(x: torch.Tensor, x_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 ``[M, K]`` in -127..127 and scales float32 ``[M]`` of the rows of ``x [M, K]``.

    With ``x_scale`` (float32, one positive element) every row has that scale, values beyond 127 times it
    saturate (infinities too), and only a NaN makes a row NaN.
    """
    x = x.float()
    if x_scale is None:
        scale, factor = _row_scales(x, INT8_MAX)
    else:
        scale = torch.where(x.isnan().any(1), torch.nan, x_scale.reshape(1))
        factor = 1.0 / x_scale.reshape(1, 1)
    codes = (x * factor).nan_to_num().round().clamp(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scale


def quantize_e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values float8_e4m3fn ``[M, K]`` and scales float32 ``[M]`` of the rows of ``x [M, K]``."""
    x = x.float()
    scale, factor = _row_scales(x, E4M3_MAX)
    values = (x * factor).nan_to_num().clamp(-E4M3_MAX, E4M3_MAX)
    return values.to(torch.float8_e4m3fn), scale


def _row_scales(x: torch.Tensor, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``a / top`` as ``[M]``, NaN for rows that aren't finite, and ``top / a`` as ``[M, 1]``."""
    largest = x.abs().amax(dim=1).clamp_min(SMALLEST)
    factor = (
        torch.full_like(largest, top) / largest
    )  # `top / largest` would round twice: 1 / x, then the product
    return torch.where(largest.isfinite(), largest / top, torch.nan), factor.unsqueeze(1)


def w8a8(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[m, n] = x_scale[m] * scale[n] * sum_k q[m, k] codes[n, k] + bias[n]``."""
    refuse(w8a8_problem(x, codes, scale, bias, x_scale))
    q, row_scale = quantize_int8(x, x_scale)
    y = q.double() @ codes.double().T
    return finish(y * row_scale.double().unsqueeze(1) * scale.double(), bias, x.dtype)


def w4a8(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[m, n] = x_scale[m] * sum_k q[m, k] (code[n, k] - zero[n, g]) scale[n, g] + bias[n]``, g of k."""
    refuse(w4a8_problem(x, packed, scale, zero, group, bias))
    q, row_scale = quantize_int8(x)
    weight = dequantize(unpack(packed, 4, x.shape[1]), scale, zero, 4, group)
    return finish(q.double() @ weight.T * row_scale.double().unsqueeze(1), bias, x.dtype)


def fp8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``y[m, n] = x_scale[m] * scale[n] * sum_k q[m, k] weight[n, k] + bias[n]``."""
    refuse(fp8_problem(x, weight, scale, bias))
    q, row_scale = quantize_e4m3(x)
    y = q.double() @ weight.double().T
    return finish(y * row_scale.double().unsqueeze(1) * scale.double(), bias, x.dtype)


def low_rank_add(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``y + (x a^T) b^T``: the correction of EoRA (arXiv 2410.21271, section 3) on the output ``y``."""
    refuse(low_rank_problem(x, y, a, b))
    return (y.double() + (x.double() @ a.double().T) @ b.double().T).to(y.dtype)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, group: int
) -> torch.Tensor:
    """``(code - zero) * scale`` in float64: codes uint8 ``[N, K]``, scale and zero ``[N, G]``."""
    columns = codes.shape[1]
    which = torch.arange(columns, device=codes.device) // (group or columns)
    middle = 2 ** (bits - 1) if zero is None else zero[:, which].double()
    return (codes.double() - middle) * scale[:, which].double()


def finish(y: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Add the bias before the one rounding to the result's dtype."""
    return (y if bias is None else y + bias.to(y.dtype)).to(dtype)


# What is wrong with the arguments, empty when nothing is: for references, fakes and ``supports``.


def refuse(problem: str) -> None:
    """Raise ``ValueError`` with the problem if there is one."""
    if problem:
        raise ValueError(problem)


def w8a8_problem(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
) -> str:
    if codes.ndim != 2 or codes.dtype != torch.int8:
        return f"codes must be int8 [N, K]; got {_told(codes)}"
    if x_scale is not None and (x_scale.numel() != 1 or x_scale.dtype != torch.float32):
        return f"x_scale must be one float32; got {_told(x_scale)}"
    return _common_problem(x, codes.shape, bias) or _row_scale_problem(scale, codes.shape[0])


def w4a8_problem(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None = None,
) -> str:
    if packed.ndim != 2 or packed.dtype != torch.int32 or x.ndim != 2:
        return f"packed must be int32 [N, words] and x [M, K]; got {_told(packed)} and {_told(x)}"
    rows, columns = packed.shape[0], x.shape[1]
    if packed.shape[1] != packed_words(columns, 4):
        wanted = packed_words(columns, 4)
        return f"{columns} features of 4 bits fill {wanted} words a row; packed has {packed.shape[1]}"
    if group < 0:
        return f"group must be the features that share a scale, or 0 for a row; got {group}"
    groups = -(-columns // group) if group else 1
    if scale.shape != (rows, groups) or not scale.is_floating_point():
        return f"scale must be float [{rows}, {groups}] for groups of {group}; got {_told(scale)}"
    if zero is not None and (zero.shape != (rows, groups) or zero.dtype != torch.uint8):
        return f"zero must be uint8 [{rows}, {groups}] or None; got {_told(zero)}"
    return _common_problem(x, (rows, columns), bias)


def fp8_problem(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> str:
    if weight.ndim != 2 or weight.dtype != torch.float8_e4m3fn:
        return f"the weight must be float8_e4m3fn [N, K]; got {_told(weight)}"
    return _common_problem(x, weight.shape, bias) or _row_scale_problem(scale, weight.shape[0])


def low_rank_problem(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> str:
    if any(t.ndim != 2 or not t.is_floating_point() for t in (x, y, a, b)) or x.dtype != y.dtype:
        told = ", ".join(_told(t) for t in (x, y, a, b))
        return f"x [M, K] and y [M, N] must have one float dtype, a [r, K] and b [N, r] be float; got {told}"
    fits = y.shape == (x.shape[0], b.shape[0]) and a.shape == (b.shape[1], x.shape[1])
    shapes = ", ".join(str(list(t.shape)) for t in (x, y, a, b))
    return "" if fits else f"shapes must be x [M, K], y [M, N], a [r, K], b [N, r]; got {shapes}"


def _common_problem(x: torch.Tensor, shape: tuple[int, ...], bias: torch.Tensor | None) -> str:
    rows, columns = shape
    if x.ndim != 2 or x.dtype not in FLOATS:
        return f"x must be [M, K] in bfloat16, float16 or float32; got {_told(x)}"
    if x.shape[1] != columns or not 0 < columns <= MOST_FEATURES:
        return f"x has {x.shape[1]} features, the weight {columns}: must be equal and 1 to {MOST_FEATURES}"
    if bias is not None and (bias.shape != (rows,) or not bias.is_floating_point()):
        return f"bias must be float [{rows}]; got {_told(bias)}"
    return ""


def _row_scale_problem(scale: torch.Tensor, rows: int) -> str:
    fits = scale.shape == (rows,) and scale.dtype == torch.float32
    return "" if fits else f"scale must be float32 [{rows}], one a row; got {_told(scale)}"


def _told(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
