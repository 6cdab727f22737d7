"""One pass of a model that tells how the outputs of attention would change, and what the loss makes of it.

Our own attention function computes what the model keeps now. When the gradient of a layer's output comes by
in the backward pass, the layer's attention is computed again under everything that is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autocomp.attention.plan import Keep, LayerPlan, Rule
from autocomp.attention.probe import own_window
from autocomp.attention.runtime import prompt_attention, simulated
from autocomp.errors import CapabilityError, SpaceError
from autocomp.kernels.attention import OPERATORS
from autocomp.space import Decision, Value

NAME = "autocomp_influence"
"""Our name in transformers' table of attention implementations, while a profile runs."""

Bits = tuple[int, int]
"""Of keys and of values."""

Costs = dict[str, Tensor]
"""Path of a group -> float64 ``[options]``, in the order of its decision's options."""

Reduce = Callable[[Tensor], Tensor]
"""t of every option and token, float64 ``[options, N]`` -> cost of every option."""


@dataclass
class Layer:
    """What is asked of one attention layer: group -> what it keeps now, and what is tried."""

    keeps: dict[int, Keep] = field(default_factory=dict)
    tried: dict[int, list[Keep]] = field(default_factory=dict)

    def plan(self, groups: int, window: int) -> LayerPlan:
        """The layer as it is now; what nobody asks about is dense."""
        rules = tuple(self.keeps.get(g, Keep()).rule for g in range(groups))
        return LayerPlan(rules, *self.bits, window)

    @property
    def bits(self) -> Bits:
        return next(((k.key_bits, k.value_bits) for k in self.keeps.values()), (16, 16))


def asked_layers(decisions: Sequence[Decision], current: Mapping[str, Value]) -> dict[str, Layer]:
    """Path of an attention module -> what is asked of it."""
    layers: dict[str, Layer] = {}
    for decision in decisions:
        for site in decision.sites:
            path, _, group = site.rpartition(".kv")
            if not path or not group.isdigit():
                raise SpaceError(f"{site!r} is no key/value group; those end in '.kv' and a number")
            layer = layers.setdefault(path, Layer())
            layer.keeps[int(group)] = Keep.parse(str(current[decision.name]))
            layer.tried[int(group)] = [Keep.parse(str(option)) for option in decision.options]
    for path, layer in layers.items():
        if len({(k.key_bits, k.value_bits) for k in layer.keeps.values()}) > 1:
            raise SpaceError(f"the groups of {path} keep different bits; a layer's bits are alike")
    return layers


class Watch:
    """The attention function of the pass, and what its backward pass finds."""

    def __init__(self, model: Any, layers: Mapping[str, Layer]) -> None:
        self.paths = {id(model.get_submodule(path)): path for path in layers}
        self.layers = layers
        self.reduce: Reduce = lambda t: t.sum(-1)
        self.costs: Costs = {}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Transformers' attention interface; no cache, no padding."""
        window, reason = own_window(module, options)
        if mask is not None or options.get("softcap"):
            reason = "it has a mask or a soft cap of its own"
        if reason:
            raise CapabilityError(f"attention of {type(module).__name__} can't be profiled: {reason}")
        path = self.paths.get(id(module), "")
        layer = self.layers[path] if path else Layer()
        scaling = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        plan = layer.plan(key.shape[1], window)
        kept = simulated(key, plan.key_bits), simulated(value, plan.value_bits)
        out = prompt_attention(query, *kept, plan, scale)
        if path and out.requires_grad:
            inputs = (query.detach(), key.detach(), value.detach())
            out.register_hook(lambda grad: self._see(path, _Attention(*inputs, plan, scale), grad))
        return out.transpose(1, 2).contiguous(), None

    def backward(self, loss: Tensor, reduce: Reduce, *, retain: bool = False) -> Costs:
        """Costs of every group's options by the gradient of ``loss``."""
        self.costs, self.reduce = {}, reduce
        torch.autograd.backward(loss, retain_graph=retain)
        missing = sorted(set(self.layers) - {path.rpartition(".kv")[0] for path in self.costs})
        if missing:
            raise CapabilityError(f"{missing[0]} does not call attention through transformers' interface")
        return self.costs

    @torch.no_grad()
    def _see(self, path: str, attention: _Attention, grad: Tensor) -> None:
        """Reduce one layer's changes as soon as its gradient ``[1, H, N, D]`` is there."""
        tried = self.layers[path].tried
        keeps = {keep for options in tried.values() for keep in options}
        rules, bits = attention.moved({k.rule for k in keeps}, {_bits(k) for k in keeps}, grad)
        for group, options in tried.items():
            moved = torch.stack([rules[k.rule][group] + bits[_bits(k)][group] for k in options])
            self.costs[f"{path}.kv{group}"] = self.reduce(moved.double()).cpu()


@dataclass(frozen=True)
class _Attention:
    """One layer's attention as it was called: q ``[1, H, N, D]``, and k, v ``[1, Hkv, N, D]`` before any
    quantization."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: LayerPlan
    scale: float

    def moved(
        self, rules: set[Rule], bits: set[Bits], grad: Tensor
    ) -> tuple[dict[Rule, Tensor], dict[Bits, Tensor]]:
        """t of each token, ``[Hkv, N]``, when all groups change to a rule, and to bits.

        In float32 (float64 for a float64 model): the change is often smaller than what bfloat16 resolves.
        """
        wide = torch.float64 if self.q.dtype == torch.float64 else torch.float32
        qkv = (self.q.to(wide), self.k.to(wide), self.v.to(wide))
        groups, tokens = self.k.shape[1:3]
        now, width = self.plan.limits(tokens), (self.plan.key_bits, self.plan.value_bits)
        here = self._output(qkv, now, width)

        def dots(limits: list[tuple[int, int]], to: Bits) -> Tensor:
            if (limits, to) == (now, width):
                return grad.new_zeros(groups, tokens, dtype=wide)
            change = self._output(qkv, limits, to).sub_(here).mul_(grad)
            return change.sum(-1).view(groups, -1, tokens).sum(1)

        own = self.plan.window
        by_rule = {r: dots([(own, 0) if own else _limits(r, tokens)] * groups, width) for r in rules}
        return by_rule, {b: dots(now, b) for b in bits}

    def _output(self, qkv: tuple[Tensor, ...], limits: list[tuple[int, int]], bits: Bits) -> Tensor:
        """``[1, H, N, D]`` with (window, sink) of each group; window 0 is unbounded."""
        q, k, v = qkv
        tokens, shared = q.shape[2], q.shape[1] // k.shape[1]
        spans = torch.tensor([(w or tokens, s) for w, s in limits], dtype=torch.int32, device=q.device)
        window, sink = spans.repeat_interleave(shared, dim=0).T.contiguous().unbind(0)
        k, v = simulated(k, bits[0]), simulated(v, bits[1])
        out: Tensor = OPERATORS["attention_spans"](q, k, v, window, sink, self.scale)
        return out


def _bits(keep: Keep) -> Bits:
    return keep.key_bits, keep.value_bits


def _limits(rule: Rule, tokens: int) -> tuple[int, int]:
    window = rule.window(tokens)
    return window, rule.sink if window else 0


@contextmanager
def watching(model: Any, layers: Mapping[str, Layer]) -> Iterator[Watch]:
    """The model with our attention, gradients of activations only; as it was at the end."""
    from transformers import AttentionInterface

    watch = Watch(model, layers)
    former = model.config._attn_implementation
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    AttentionInterface.register(NAME, watch.attend)
    # Weights need no gradients; what the embedding gives must, or nothing would flow back.
    handle = model.get_input_embeddings().register_forward_hook(lambda *args: args[-1].requires_grad_(True))
    try:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise CapabilityError(f"{type(model).__name__} does not let its attention be replaced")
        for parameter in flags:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield watch
    finally:
        handle.remove()
        model.set_attn_implementation(former)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        AttentionInterface._global_mapping.pop(NAME, None)
