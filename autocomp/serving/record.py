"""Write down what a model does with one new token: a straight list of tensor operations.

The model runs once, for real, on one token per sequence and without a cache, while a dispatch mode notes
every ATen operation that depends on the token or on its position. Three things are noted as a whole:
attention (through transformers' attention interface: the keys it is given are the new token's, and the cache
is the runtime's business), packed weights, and experts picked by a router. So a new architecture needs no
entry in a table; what can't be expressed raises ``Unsupported`` with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autocomp.attention.probe import own_window
from autocomp.kernels.modules import PackedEmbedding, PackedLinear

ATTENTION = "autocomp_lean"
"""Our name in transformers' table of attention implementations, while recording."""

# Keyword arguments of attention calls that change nothing here.
_HARMLESS = {"dropout", "scaling", "sliding_window", "softcap", "is_causal", "position_ids", "cache_position"}


# Operations that read the shape of a tensor and none of its values.
_SHAPE_ONLY = {
    "ones_like",
    "zeros_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
}


class Unsupported(Exception):
    """The model does something at decoding that the lean path can't express; the message says what."""


@dataclass
class Note:
    """One operation.

    Attributes:
        name: ATen name with overload (``add.Tensor``), or ``attention``, ``packed_linear``, ``packed_rows``,
            ``pick_linear``.
        args: as called; tensors are the real ones, whose storage, offset and strides say where they lie.
        out: what it gave.
        extra: named facts of the special operations.
    """

    name: str
    args: tuple[Any, ...]
    out: Any
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recording:
    """A recorded decode step.

    Attributes:
        notes: operations in order.
        dynamic: addresses of the storages that change from token to token; everything else is constant.
        ids, positions: the inputs, int64 ``[batch, 1]``.
        logits: the output, ``[batch, 1, vocabulary]`` or with fewer dimensions of size 1.
    """

    notes: list[Note]
    dynamic: set[int]
    ids: Tensor
    positions: Tensor
    logits: Tensor


def storage(tensor: Tensor) -> int:
    """Address of the memory that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


def record(model: Any, ids: Tensor, position: int) -> Recording:
    """Record one decode step of ``model`` (in evaluation mode, on the CPU).

    Args:
        ids: int64 ``[batch, 1]``.
        position: of these tokens, the same in every sequence.

    Raises:
        Unsupported: see the class.
    """
    positions = torch.full_like(ids, position)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise Unsupported(f"{type(model).__name__} takes no position_ids, so its positions can't be given")
    recorder = _Recorder(ids, positions)
    with ExitStack() as stack:
        # Inside of inference mode the dispatcher would show us operations before they are taken apart.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_our_attention(model, recorder))
        stack.enter_context(_our_modules(model, recorder))
        stack.enter_context(recorder)
        try:
            output = model(input_ids=ids, position_ids=positions, use_cache=False)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            NotImplementedError,
        ) as error:
            told = f"{type(error).__name__}: {str(error)[:200]}"
            raise Unsupported(f"it does not run on one token without a cache ({told})") from error
    if not any(note.name == "attention" for note in recorder.notes):
        raise Unsupported(f"{type(model).__name__} does not call attention through transformers' interface")
    if storage(output.logits) not in recorder.dynamic:
        raise Unsupported("the logits don't depend on the token")
    return Recording(recorder.notes, recorder.dynamic, ids, positions, output.logits)


class _Recorder(TorchDispatchMode):
    def __init__(self, ids: Tensor, positions: Tensor) -> None:
        super().__init__()
        self.notes: list[Note] = []
        self.dynamic = {storage(ids), storage(positions)}
        self._paused = False
        #: Everything stays alive: a freed storage would come back under the same address.
        self._alive: list[Any] = [ids, positions]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._paused:
            self._see(func, args, kwargs, out)
        return out

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self._alive += [*inputs, *outputs]
        dynamic = any(storage(t) in self.dynamic for t in inputs)
        if func is torch.ops.aten._local_scalar_dense.default and dynamic:
            raise Unsupported("Python decides by a value of the computation (.item()) what comes next")
        if not dynamic or func._schema.name.removeprefix("aten::") in _SHAPE_ONLY:
            return
        if not outputs:
            raise Unsupported(f"operation {func} gives no tensor")
        if func._schema.is_mutable and any(storage(t) not in self.dynamic for t in outputs):
            raise Unsupported(f"operation {func} writes over a constant")
        before = {storage(t) for t in inputs}
        is_view = all(storage(t) in before for t in outputs) and not func._schema.is_mutable
        if not is_view:
            self.note(str(func).removeprefix("aten."), args, out, **kwargs)
        self.dynamic.update(storage(t) for t in outputs)

    def note(self, name: str, args: tuple[Any, ...], out: Any, **extra: Any) -> None:
        self._alive.append(out)
        self.dynamic.update(storage(t) for t in tree_leaves(out) if isinstance(t, Tensor))
        self.notes.append(Note(name, args, out, extra))

    @contextmanager
    def paused(self) -> Iterator[None]:
        former, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = former


@contextmanager
def _our_attention(model: Any, recorder: _Recorder) -> Iterator[None]:
    """Attention goes to the recorder; masks are not made for an implementation that transformers doesn't
    know (which is ours to take care of)."""
    from transformers import AttentionInterface

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        if mask is not None:
            raise Unsupported("attention is given a mask of the model's own")
        unknown = {k for k, v in options.items() if k not in _HARMLESS and isinstance(v, Tensor)}
        if unknown:
            raise Unsupported(f"attention takes {', '.join(sorted(unknown))}")
        if key.shape[2] != 1 or value.shape[-1] != key.shape[-1]:
            raise Unsupported("keys and values are not one per token and head, of one width")
        with recorder.paused():
            # One key: its weight is 1, so the result is the value itself.
            out = value.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(1, 2).contiguous()
        scaling = options.get("scaling")
        recorder.note(
            "attention", (query, key, value), out,
            layer=int(getattr(module, "layer_idx", -1)),
            scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=float(options.get("softcap") or 0.0), window=_window(module, options),
        )  # fmt: skip
        return out, None

    former = model.config._attn_implementation
    AttentionInterface.register(ATTENTION, attend)
    try:
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            raise Unsupported(f"{type(model).__name__} does not let its attention be replaced")
        yield
    finally:
        model.set_attn_implementation(former)
        AttentionInterface._global_mapping.pop(ATTENTION, None)


def _window(module: nn.Module, options: Mapping[str, Any]) -> int:
    """Tokens that this layer looks back, its own included; 0 for all."""
    window, reason = own_window(module, options)
    if reason:
        raise Unsupported(reason)
    return window


@contextmanager
def _our_modules(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Packed weights and experts are noted as a whole: their forward is replaced on the instance."""
    replaced: list[tuple[nn.Module, str]] = []
    try:
        for module in model.modules():
            forward = _replacement(module, recorder)
            # A remark on padding that reads the token ids in Python.
            for name, function in (("forward", forward), (_PADDING_REMARK, _silent)):
                if function is not None and hasattr(module, name):
                    module.__dict__[name] = function
                    replaced.append((module, name))
        yield
    finally:
        for module, name in replaced:
            del module.__dict__[name]


_PADDING_REMARK = "warn_if_padding_and_no_attention_mask"


def _silent(*args: Any) -> None:
    del args


def _replacement(module: nn.Module, recorder: _Recorder) -> Any:
    if isinstance(module, PackedLinear | PackedEmbedding):
        plain, name = module.forward, "packed_linear" if isinstance(module, PackedLinear) else "packed_rows"

        def whole(x: Tensor) -> Tensor:
            with recorder.paused():
                out = plain(x)
            recorder.note(name, (x,), out, module=module)
            return out

        return whole
    if _is_experts(module):
        return lambda hidden, index, weights: _run_experts(recorder, module, hidden, index, weights)
    return None


def _is_experts(module: nn.Module) -> bool:
    """Transformers' stacked experts: two 3-D parameters and a router's choice as arguments."""
    names = {name for name, _ in module.named_parameters()}
    takes = list(inspect.signature(module.forward).parameters)
    return names == {"gate_up_proj", "down_proj"} and takes == [
        "hidden_states",
        "top_k_index",
        "top_k_weights",
    ]


def _run_experts(recorder: _Recorder, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts' sum, written with a linear whose weight is picked by an index."""
    rows = []
    for t in range(hidden.shape[0]):
        total: Tensor | None = None
        for j in range(index.shape[1]):
            pick = index[t, j]
            both = _pick_linear(recorder, module.gate_up_proj, hidden[t : t + 1], pick)
            gate, up = both.chunk(2, dim=-1)
            down = _pick_linear(recorder, module.down_proj, module.act_fn(gate) * up, pick)
            part = down * weights[t, j]
            total = part if total is None else total + part
        assert total is not None
        rows.append(total)
    return torch.cat(rows)


def _pick_linear(recorder: _Recorder, table: Tensor, x: Tensor, pick: Tensor) -> Tensor:
    with recorder.paused():
        out = F.linear(x, table[int(pick)])
    recorder.note("pick_linear", (x, table, pick), out)
    return out
