"""CUDA implementations in Triton. Importing this package needs neither Triton nor a GPU."""

from __future__ import annotations


def register() -> None:
    """Make the Triton operators the first choice on CUDA. Where they can't run, they say so when they are
    asked, and others are chosen. (The backend for packed weights is in ``ops`` from the start.)"""
    from autocomp.kernels.triton import activations, attention_ops, moe

    activations.register()
    moe.register()
    attention_ops.register()
