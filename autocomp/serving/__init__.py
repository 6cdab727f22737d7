"""Serving a (compressed) language model without Python in its way; see ``decoder.LeanDecoder``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocomp.serving.decoder import LeanDecoder

__all__ = ["LeanDecoder"]


def __getattr__(name: str) -> Any:
    if name == "LeanDecoder":
        from autocomp.serving.decoder import LeanDecoder

        return LeanDecoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
