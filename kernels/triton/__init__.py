"""CUDA implementations in Triton. Importing this package needs neither Triton nor a GPU."""

from __future__ import annotations


def register() -> None:
    """Make the Triton linears and grouped experts the first choice on CUDA. Where they can't run, they say so
    when they are asked, and others are chosen."""
    from autocomp.kernels import ops
    from autocomp.kernels.triton import activations, linear, moe

    ops.register(linear.TRITON)
    activations.register()
    moe.register()
