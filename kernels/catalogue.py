"""All operators beside the packed linear, with their implementations registered."""

from __future__ import annotations

from autocomp.kernels.library import OPERATORS, Operator, load_cuda


def operators() -> list[Operator]:
    """Every operator of the library, by name. Importing their modules is what registers them."""
    import autocomp.kernels.activations
    import autocomp.kernels.attention
    import autocomp.kernels.moe  # noqa: F401
    from autocomp.kernels import experts

    experts.load_builtin()
    load_cuda()
    return [OPERATORS[name] for name in sorted(OPERATORS)]
