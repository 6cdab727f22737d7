"""Every built-in backend passes the suite that third parties run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from autocomp.kernels.ops import backends
from autocomp.kernels.reference import REFERENCE
from autocomp.testing.kernels import CHECKS, Check, check_backend, check_parity

BUILT_IN = {b.name: b for b in (*backends(), REFERENCE)}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("name", [n for n in BUILT_IN if n != "triton"])
def test_built_in_backends_on_the_cpu(name: str, check: Check) -> None:
    check(BUILT_IN[name], "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_backends_on_the_gpu(name: str) -> None:
    check_backend(BUILT_IN[name], "cuda")


def test_a_wrong_backend_is_found_out() -> None:
    class Wrong(type(REFERENCE)):  # type: ignore[misc]
        name = "wrong"

        def linear(self, x: torch.Tensor, state: object) -> torch.Tensor:
            return 1.01 * REFERENCE.linear(x, dataclasses.replace(state, backend=REFERENCE))  # type: ignore[type-var]

    with pytest.raises(AssertionError, match="relative error"):
        check_parity(Wrong(), "cpu")
