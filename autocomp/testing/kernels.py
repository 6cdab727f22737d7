"""Conformance checks of kernel backends, for the built-in ones and for yours.

    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
    def test_mine(check):
        check(MyBackend(), "cpu")

A check takes a backend and a device type and raises ``AssertionError`` with what went wrong. Schemes and
shapes that the backend refuses are left out; one that refuses everything fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from autocomp.kernels.backend import DECODE_TOKENS, Backend
from autocomp.kernels.ops import random_weight
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor

Check = Callable[[Backend, str], None]

LABELS = "w2g64 w3g64 w3g32a w4g32 w4g64a w4g128 w4 w4g64o0.5 w5g64 w6g64a w8 w8g64"
SCHEMES = tuple(Scheme.parse(label) for label in LABELS.split())
SHAPES = ((64, 128), (192, 576), (17, 72), (256, 1536), (1, 64), (33, 200))
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Largest relative error (Frobenius norm) against float64 on the dequantized weight, by activation dtype.
A backend that computes in bfloat16 inside is held to that bound whatever comes in."""


def cases(backend: Backend, device_type: str) -> Iterator[tuple[QuantizedTensor, torch.Tensor]]:
    """Random weights that the backend supports, with their dequantized float64 matrices."""
    for scheme in SCHEMES:
        for shape in SHAPES:
            if scheme.group > shape[1] or backend.supports(scheme, shape, device_type, DECODE_TOKENS):
                continue
            weight = random_weight(scheme, shape)
            yield weight, weight.dequantize(torch.float64)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def check_parity(backend: Backend, device_type: str) -> None:
    """Every supported case, for decode and prefill row counts and three dtypes, against float64."""
    tried = 0
    for weight, dense in cases(backend, device_type):
        state = backend.prepack(weight.to(device_type), torch.device(device_type))
        for dtype in BOUND:
            for tokens in (1, 3, DECODE_TOKENS, DECODE_TOKENS + 1, 33):
                x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(tokens)).to(
                    dtype
                )
                y = backend.linear(x.to(device_type), state)
                where = f"{backend.name} {weight.scheme} {weight.shape} x [{tokens}] {dtype}"
                assert y.shape == (tokens, weight.shape[0]) and y.dtype == dtype, (
                    f"{where}: {y.shape} {y.dtype}"
                )
                error = _error(y, x.double() @ dense.T)
                bound = max(BOUND[dtype], BOUND[torch.bfloat16] if backend.native else 0.0)
                assert error <= bound, f"{where}: relative error {error:.2g} is over {bound:.2g}"
                tried += 1
    assert tried, f"{backend.name} supports none of the cases on {device_type}"


def check_rows(backend: Backend, device_type: str) -> None:
    """Rows that can be read out are the dequantized ones."""
    for weight, dense in cases(backend, device_type):
        state = backend.prepack(weight.to(device_type), torch.device(device_type))
        index = torch.arange(0, weight.shape[0], 3)
        rows = backend.rows(index.to(device_type), state)
        if rows is not None:
            assert _error(rows, dense[index]) <= BOUND[torch.bfloat16], (
                f"{backend.name} {weight.scheme}: rows"
            )


def check_memory(backend: Backend, device_type: str) -> None:
    """``nbytes`` counts what is held, and a packed weight is smaller than a 16-bit one."""
    for weight, _ in cases(backend, device_type):
        state = backend.prepack(weight.to(device_type), torch.device(device_type))
        held = sum(t.untyped_storage().nbytes() for t in state.tensors.values())
        assert held <= state.nbytes * 1.01 + 64, f"{backend.name}: holds {held} bytes, says {state.nbytes}"
        if weight.scheme.bits <= 4 and backend.native and min(weight.shape) >= 64:
            assert state.nbytes < weight.shape[0] * weight.shape[1], f"{backend.name}: no smaller than 8 bits"


def check_independence(backend: Backend, device_type: str) -> None:
    """A row's result does not depend on the rows beside it, and inputs are left alone."""
    for weight, _ in cases(backend, device_type):
        state = backend.prepack(weight.to(device_type), torch.device(device_type))
        x = (
            torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0))
            .bfloat16()
            .to(device_type)
        )
        before = x.clone()
        together = backend.linear(x, state)
        alone = torch.cat([backend.linear(x[i : i + 1], state) for i in range(4)])
        assert torch.equal(x, before), f"{backend.name}: changes its input"
        assert _error(alone, together.double().cpu()) <= BOUND[torch.bfloat16], (
            f"{backend.name}: rows interact"
        )


def check_refusal(backend: Backend, device_type: str) -> None:
    """``supports`` answers in words for anything, and refuses a device that does not exist."""
    for scheme in SCHEMES:
        for shape in (*SHAPES, (3, 8), (0, 64)):
            reason = backend.supports(scheme, shape, device_type, 1)
            assert isinstance(reason, str), f"{backend.name}: supports() must return a string"
    assert backend.name and isinstance(backend.native, bool)


CHECKS: dict[str, Check] = {
    "parity": check_parity,
    "rows": check_rows,
    "memory": check_memory,
    "independence": check_independence,
    "refusal": check_refusal,
}


def check_backend(backend: Backend, device_type: str = "cpu") -> None:
    """All checks."""
    for check in CHECKS.values():
        check(backend, device_type)
