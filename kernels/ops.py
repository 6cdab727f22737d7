"""Which backend runs which quantized weight on which device, asked before a search and used in serving.

Backends are tried in order of preference; the first that supports a case AND has passed its self-check in
this process takes it. The reference backend takes the rest, but its time is nobody's latency.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from autocomp.kernels import native
from autocomp.kernels.aten import Int4Backend, Int8Backend
from autocomp.kernels.backend import DECODE_TOKENS, Backend, WeightState
from autocomp.kernels.cpu_linear import CHUNK, CpuBackend
from autocomp.kernels.library import Operator
from autocomp.kernels.reference import REFERENCE
from autocomp.kernels.triton.linear import TRITON
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

SELF_CHECK_ERROR = 1.2e-2
"""Largest accepted relative Frobenius error against the reference (about 4 bfloat16 roundings)."""

A8_GROUP = CHUNK
"""Features of a token that share a scale when activations are rounded."""

_DEVICE_TYPES = ("cpu", "cuda")
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_REMEDIES = ("w4g128", "w4g64", "w4g32", "w8")
_backends: list[Backend] = [CpuBackend(), TRITON, Int4Backend(), Int8Backend()]
_checked: dict[tuple[str, str], str] = {}  # (backend, device type) -> outcome of its self-check


@dataclass(frozen=True)
class Capability:
    """Whether a device executes a scheme at decode (up to ``DECODE_TOKENS`` rows of activations).

    Attributes:
        backend: what runs it: ``torch`` (dense), a registered backend's name, or ``reference``.
        native: true when the measured time is the scheme's own; false when it is only simulated.
        reason: why it isn't native, with the remedy; empty when it is.
    """

    backend: str
    native: bool
    reason: str = ""


def register(backend: Backend) -> None:
    """Make ``backend`` the first choice for what it supports; one of the same name is replaced."""
    unregister(backend.name)
    _backends.insert(0, backend)
    _clear()


def unregister(name: str) -> None:
    """Forget the backend called ``name``; nothing happens when there is none."""
    _backends[:] = [b for b in _backends if b.name != name]
    _clear()


def _clear() -> None:
    capability.cache_clear()
    _checked.clear()


def backends() -> tuple[Backend, ...]:
    """Registered backends in order of preference, the reference last."""
    return (*_backends, REFERENCE)


@lru_cache(maxsize=4096)
def capability(scheme: Scheme, shape: tuple[int, int], device_type: str) -> Capability:
    """What executes ``scheme`` for a weight of ``shape`` (N, K) on ``cpu`` or ``cuda``. Cached."""
    device_type = device_type.split(":")[0]
    missing = _device_missing(device_type)
    if missing:
        return Capability("reference", False, missing)
    if scheme.is_dense:
        return Capability("torch", True)
    reasons = []
    for backend in _backends:
        reason = backend.supports(scheme, shape, device_type, DECODE_TOKENS)
        reason = reason or self_check(backend, device_type)
        if not reason and backend.native:
            return Capability(backend.name, True)
        reasons.append(f"{backend.name}: {reason or 'only simulates it'}")
    return Capability("reference", False, _no_kernel(scheme, shape, device_type, reasons))


def _device_missing(device_type: str) -> str:
    if device_type not in _DEVICE_TYPES:
        return f"no kernels for device {device_type!r}; use one of {', '.join(_DEVICE_TYPES)}"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible to torch here; use device cpu, or a worker with a GPU"
    return ""


def _no_kernel(scheme: Scheme, shape: tuple[int, int], device_type: str, reasons: list[str]) -> str:
    """The reason in words: what is missing, what each backend said, what would work for this shape."""
    working = [label for label in _REMEDIES if _native(Scheme.parse(label), shape, device_type)]
    remedy = f"use {' or '.join(working)}, or objectives without latency"
    if not working:
        remedy = "leave this layer at w16, or use objectives without latency"
    rows, columns = shape
    told = "; ".join(reasons) or "no backend is registered"
    return f"no native {device_type} kernel for {scheme.label} at {rows}x{columns}: {remedy} ({told})"


def _native(scheme: Scheme, shape: tuple[int, int], device_type: str) -> bool:
    return any(
        b.native
        and not b.supports(scheme, shape, device_type, DECODE_TOKENS)
        and not self_check(b, device_type)
        for b in _backends
    )


def self_check(backend: Backend, device_type: str) -> str:
    """Run the backend's probe cases, once per process, and compare with the exact product.

    Returns an empty string when it agrees, else what went wrong. Nothing escapes: a kernel that can't
    compile or load on this machine is a reason, not a crash.
    """
    key = (backend.name, device_type)
    if key not in _checked:
        _checked[key] = _run_probe(backend, device_type)
    return _checked[key]


def _run_probe(backend: Backend, device_type: str) -> str:
    for scheme, shape in getattr(backend, "probes", (backend.probe,)):
        unsupported = backend.supports(scheme, shape, device_type, DECODE_TOKENS)
        if unsupported:
            return f"self-check not run: {unsupported}"
        device = torch.device(device_type)
        try:
            worst = max(_probe_error(backend, scheme, shape, device, m) for m in (1, DECODE_TOKENS, 33))
        except Exception as error:
            return f"self-check of {scheme} raised {type(error).__name__}: {str(error)[:200]}"
        if not worst <= SELF_CHECK_ERROR:
            limit = f"relative; limit {SELF_CHECK_ERROR:g}"
            return f"self-check of {scheme} is off by {worst:.2g} ({limit})"
    return ""


def _probe_error(
    backend: Backend, scheme: Scheme, shape: tuple[int, int], device: torch.device, tokens: int
) -> float:
    """Relative Frobenius error of a probe case at ``tokens`` rows; NaN when it gives NaN."""
    weight = random_weight(scheme, shape, seed=tokens)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, shape[1], generator=generator).to(torch.bfloat16)
    with torch.inference_mode():
        found = backend.linear(x.to(device), backend.prepack(weight, device)).double().cpu()
        exact = x.double() @ weight.dequantize(torch.float32).double().T
    return float((found - exact).norm() / exact.norm())


def random_weight(scheme: Scheme, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor:
    """A quantized weight with uniform codes and plausible scales, for probes and for timing."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    groups, top = scheme.groups(columns), 2**scheme.bits
    codes = torch.randint(0, top, shape, generator=generator, dtype=torch.uint8)
    scale = (0.5 + torch.rand(rows, groups, generator=generator)) / (top * columns**0.5)
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(0, top, (rows, groups), generator=generator, dtype=torch.uint8)
    index = value = None
    count = scheme.outlier_count(rows, columns)
    if count:
        index = torch.randperm(rows * columns, generator=generator)[:count].sort().values.to(torch.int32)
        value = torch.randn(count, generator=generator).to(torch.bfloat16)
    return QuantizedTensor(scheme, shape, codes, scale.to(torch.bfloat16), zero, index, value)


def choose(scheme: Scheme, shape: tuple[int, int], device: torch.device | str) -> Backend:
    """The backend that will hold a weight: what ``capability`` names, else the reference.

    Raises:
        ValueError: ``w16``, which is no packed weight.
    """
    if scheme.is_dense:
        raise ValueError("w16 means 'not quantized': keep the plain linear instead of packing it")
    name = capability(scheme, shape, torch.device(device).type).backend
    return next(b for b in backends() if b.name == name)


def prepack(weight: QuantizedTensor, device: torch.device | str) -> WeightState:
    """``weight`` in the layout of the backend that will run it on ``device``."""
    return choose(weight.scheme, weight.shape, device).prepack(weight, torch.device(device))


def linear_wna16(x: torch.Tensor, weight: WeightState, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W.T + bias`` with a packed weight.

    Args:
        x: ``[..., K]``, bfloat16, float16 or float32, any strides, on the weight's device.
        weight: from ``prepack``.
        bias: ``[N]`` or ``None``.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        ValueError: the last dimension isn't K, or ``x`` lies on another device.
    """
    rows = weight.shape[0]
    flat = _rows_of(x, weight)
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], rows)
    traced = torch.compiler.is_compiling() or type(x) not in _PLAIN
    y = _traced(flat, weight) if traced else weight.backend.linear(flat, weight)
    if bias is not None:
        y.add_(bias)
    return y if flat is x else y.view(*x.shape[:-1], rows)


def _rows_of(x: torch.Tensor, weight: WeightState) -> torch.Tensor:
    """``x [..., K]`` as contiguous ``[M, K]``; raises ``ValueError`` where it does not fit the weight."""
    columns = weight.shape[1]
    if x.shape[-1] != columns:
        raise ValueError(f"the packed weight takes {columns} input features; got {tuple(x.shape)}")
    if x.device.type != weight.device.type:
        raise ValueError(f"input on {x.device}, packed weight on {weight.device}: pack again for that device")
    return x if x.ndim == 2 and x.is_contiguous() else x.reshape(-1, columns).contiguous()


def linear_wna8(x: torch.Tensor, weight: WeightState, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``linear_wna16`` on activations of 8 bits, from the same packed weight.

    Each token's features are rounded to int8 in groups of ``A8_GROUP``, with one scale a group: with ``a``
    the largest magnitude, ``s = a / 127`` and ``q = round_half_even(x * (127 / a))``. Not calibrated.
    Outliers of the weight meet the activations as they are. Not for graphs.

    Raises:
        ValueError: as ``linear_wna16``, or the weight's backend has no kernel for it.
    """
    run = getattr(weight.backend, "linear_a8", None)
    if run is None:
        raise ValueError(
            f"the {weight.backend.name} backend multiplies no 8-bit activations; use linear_wna16"
        )
    flat = _rows_of(x, weight)
    rows = weight.shape[0]
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], rows)
    y: torch.Tensor = run(flat, weight)
    if bias is not None:
        y.add_(bias)
    return y if flat is x else y.view(*x.shape[:-1], rows)


def a8_unavailable(device_type: str) -> str:
    """Why ``linear_wna8`` runs no weight on a device; empty when it runs those of our C backend."""
    device_type = device_type.split(":")[0]
    if device_type != "cpu":
        return (
            f"8-bit activations with packed weights run on the CPU only, on {device_type} they are simulated;"
            " use a16, or objectives without latency"
        )
    return native.unavailable("linear") or native.unavailable("linear_a8")


def _traced(x: torch.Tensor, weight: WeightState) -> torch.Tensor:
    """The same as one node of a graph (``torch.compile``, export, fake tensors)."""
    scheme = weight.scheme
    names, tensors = list(weight.tensors), list(weight.tensors.values())
    keys, values = list(weight.meta), list(weight.meta.values())
    form = (scheme.bits, scheme.group, scheme.symmetric, scheme.outliers)
    y: torch.Tensor = LINEAR_WNA16(x, tensors, names, weight.backend.name, *form, *weight.shape, keys, values)
    return y


def _run_traced(
    x: torch.Tensor,
    tensors: list[torch.Tensor],
    names: list[str],
    backend: str,
    bits: int,
    group: int,
    symmetric: bool,
    outliers: float,
    rows: int,
    columns: int,
    keys: list[str],
    values: list[int],
) -> torch.Tensor:
    holder = next((b for b in backends() if b.name == backend), None)
    if holder is None:
        known = ", ".join(b.name for b in backends())
        raise ValueError(f"the graph needs the kernel backend {backend!r}; register it (known: {known})")
    scheme = Scheme(bits, group, symmetric, outliers)
    state = WeightState(holder, scheme, (rows, columns), dict(zip(names, tensors)), dict(zip(keys, values)))
    return holder.linear(x.contiguous(), state)


def _fake_traced(
    x: torch.Tensor,
    tensors: list[torch.Tensor],
    names: list[str],
    backend: str,
    bits: int,
    group: int,
    symmetric: bool,
    outliers: float,
    rows: int,
    *rest: object,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], rows)


LINEAR_WNA16 = Operator(
    "linear_wna16(Tensor x, Tensor[] tensors, str[] names, str backend, int bits, int group, bool symmetric, "
    "float outliers, SymInt rows, SymInt columns, str[] keys, int[] values) -> Tensor",
    _run_traced,
    _fake_traced,
)
"""``torch.ops.autocomp.linear_wna16``: a packed linear on ``x [M, K]`` as graphs see it."""
