"""Operators with one signature and several implementations, registered with ``torch.library``.

Each has a plain torch reference, which runs anywhere and is the oracle of the parity tests, and any number
of implementations: C on the CPU, Triton on CUDA, torch's own operators. A call goes to the first one of the
tensors' device that is available and supports the arguments; the reference takes the rest. Because it is a
``torch.ops.autocomp`` operator with a fake, ``torch.compile`` and export see one node.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

logger = logging.getLogger("autocomp")
NAMESPACE = "autocomp"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
OPERATORS: dict[str, Operator] = {}


@dataclass
class Implementation:
    """One way to run an operator.

    Attributes:
        name: ``cpu`` (our C), ``triton``, ``torch``; unique for its operator.
        device_type: ``cpu`` or ``cuda``: of the tensors it takes.
        run: same arguments and results as the reference.
        available: why it can't run in this process (no compiler, no GPU); empty when it can. Asked once.
        supports: why it can't take these arguments; empty when it can. Must be cheap.
        check: a self-check: why its numbers are not to be trusted; empty when they are. Run once.
    """

    name: str
    device_type: str
    run: Callable[..., Any]
    available: Callable[[], str] = lambda: ""
    supports: Callable[..., str] = lambda *args, **kwargs: ""
    check: Callable[[], str] = lambda: ""
    _state: str | None = field(default=None, repr=False)

    def unusable(self) -> str:
        """``available`` and then ``check``, asked once; an exception is a reason and no crash."""
        if self._state is None:
            try:
                self._state = self.available() or self.check()
            except Exception as error:
                self._state = f"{type(error).__name__}: {str(error)[:200]}"
            if self._state:
                logger.debug("kernel %s on %s is not used: %s", self.name, self.device_type, self._state)
        return self._state


class Operator:
    """``torch.ops.autocomp.{name}`` and its implementations.

    Args:
        schema: as torch writes it, ``name(Tensor x, int bits) -> Tensor``; no argument is mutated unless the
            schema says so.
        reference: plain torch on any device.
        fake: the same signature, giving empty results of the right shape and dtype.
    """

    def __init__(self, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.name = schema.partition("(")[0]
        self.reference = reference
        self.implementations: list[Implementation] = []
        self._forced = ""
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self._dispatch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_LIBRARY)
        self._op = getattr(torch.ops.autocomp, self.name).default
        OPERATORS[self.name] = self

    def register(self, implementation: Implementation) -> None:
        """Make ``implementation`` the first choice on its device; one of the same name is replaced."""
        key = (implementation.name, implementation.device_type)
        self.implementations = [i for i in self.implementations if (i.name, i.device_type) != key]
        self.implementations.insert(0, implementation)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._op(*args, **kwargs)

    def choose(self, *args: Any, **kwargs: Any) -> str:
        """Name of the implementation that a call with these arguments runs; ``reference`` if none does."""
        found = self._choose(args, kwargs)
        return found.name if found else "reference"

    @contextlib.contextmanager
    def forced(self, name: str) -> Iterator[None]:
        """Inside, only the implementation ``name`` (or ``reference``) is used; a call it can't take raises
        ``NotImplementedError`` with the reason. For tests and benchmarks."""
        former, self._forced = self._forced, name
        try:
            yield
        finally:
            self._forced = former

    def _dispatch(self, *args: Any, **kwargs: Any) -> Any:
        found = self._choose(args, kwargs)
        return (found.run if found else self.reference)(*args, **kwargs)

    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Implementation | None:
        device = next(
            (a.device.type for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), "cpu"
        )
        if device == "cuda":
            load_cuda()
        reasons = []
        for implementation in self.implementations:
            if implementation.device_type != device or self._forced not in ("", implementation.name):
                continue
            reason = implementation.unusable() or implementation.supports(*args, **kwargs)
            if not reason:
                return implementation
            reasons.append(f"{implementation.name}: {reason}")
        if self._forced not in ("", "reference"):
            told = "; ".join(reasons) or f"no such implementation on {device}"
            raise NotImplementedError(f"{self.name} can't be forced to {self._forced!r}: {told}")
        return None


@functools.cache
def load_cuda() -> None:
    """Register the implementations for CUDA, at the first such call: they import the operators."""
    from autocomp.kernels import triton

    triton.register()
