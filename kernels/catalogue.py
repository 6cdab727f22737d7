"""All operators beside the packed linear, with their implementations registered."""

from __future__ import annotations

from autocomp.kernels.library import OPERATORS, Operator


def operators() -> list[Operator]:
    """Every operator of the library, by name. Importing their modules is what registers them."""
    import autocomp.kernels.activations
    import autocomp.kernels.attention
    import autocomp.kernels.moe  # noqa: F401

    return [OPERATORS[name] for name in sorted(OPERATORS)]
