"""Find the compressible parts of a model from its graph, not from module names.

Linears are found by type, repeated blocks as the outermost module list that holds most parameters, and
groups that read one input (q/k/v, gate/up) by watching which tensor object reaches which module in one
tiny forward pass. New architectures therefore need no entry in a table here. ``discover`` is for causal
language models; ``diffusion_discovery`` uses the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from autocomp.attention.probe import attention_calls, refusal
from autocomp.errors import JobError
from autocomp.search_spaces.base import ModelSite, Part

PROBE_TOKENS = 8


@dataclass
class Probe:
    """What one forward pass showed: the order of first calls, and which input each call read."""

    order: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    #: Inputs stay alive during the pass: a freed buffer would be reused and two inputs look like one.
    alive: list[torch.Tensor] = field(default_factory=list)

    def see(self, path: str, tensor: torch.Tensor) -> None:
        # The version counter tells a buffer from itself after an in-place change (``x += attention``).
        key = (tensor.data_ptr(), tensor.numel(), tensor.shape[-1], tensor._version)
        self.order.setdefault(path, len(self.order))
        self.inputs[path].append(key)
        self.alive.append(tensor)


def discover(model: nn.Module, fingerprint: str) -> ModelSite:
    """Parts of a causal language model in execution order.

    Kinds and roles: ``linear`` (``nn.Linear`` or transformers' ``Conv1D``; shape always ``(out, in)``) with
    role ``body`` or ``head``; ``embedding`` (the input embedding); ``router`` (matrix that chooses experts)
    and ``experts`` (a 3-D parameter, its path is the parameter's), both left uncompressed.
    ``other_bytes`` counts every parameter and buffer except the weights of ``linear`` and ``embedding``.

    Raises:
        JobError: the model has no linear layer, or does not run on token ids alone.
    """
    modules = dict(model.named_modules())
    head, embedding = _end_paths(model, modules)
    roles = dict.fromkeys(_router_paths(modules), "router")
    linears = [p for p, m in modules.items() if is_linear(m) and p not in roles]
    if not linears:
        raise JobError(f"{type(model).__name__} has no linear layer that could be compressed")
    roles |= {p: "head" if p == head else "body" for p in linears}
    if embedding:
        roles = {embedding: "embedding", **roles}

    experts = dict(_expert_parameters(modules))
    watched = {p: modules[p] for p in [*roles, *map(_parent, experts)]}
    probe = run_probe(watched, lambda: _read_tokens(model))
    parts = matrix_parts(modules, roles, ties(probe, linears))
    block = block_finder(modules)
    parts += [Part(p, "experts", tuple(t.shape), block(p), role="experts") for p, t in experts.items()]
    last = len(probe.order)  # what the pass did not reach (an expert without tokens) comes at the end
    parts.sort(key=lambda p: probe.order.get(_parent(p.path) if p.kind == "experts" else p.path, last))

    groups, reason = _kv_groups(model, block)
    counted: list[Any] = [modules[p.path].weight for p in parts if p.kind in ("linear", "embedding")]
    other_bytes = unique_bytes([*model.parameters(), *model.buffers()]) - unique_bytes(counted)
    config: Any = getattr(model, "config", None)
    family = str(getattr(config, "model_type", type(model).__name__))
    return ModelSite(
        family, tuple(parts), other_bytes, fingerprint, counted[0].element_size(),
        kv_groups=tuple(groups), lacking={"kv_group": reason} if reason else {},
    )  # fmt: skip


def _kv_groups(model: Any, block: Callable[[str], int | None]) -> tuple[list[Part], str]:
    """A part for every key/value head, or none and why attention can't be planned for this model."""
    reason = refusal(model)
    if reason:
        return [], reason
    return [
        Part(f"{call.path}.kv{g}", "kv_group", (call.heads // call.groups, call.dim), block(call.path),
             call.path, "attention", window=call.window)
        for call in attention_calls(model)
        for g in range(call.groups)
    ], ""  # fmt: skip


def matrix_parts(modules: dict[str, nn.Module], roles: dict[str, str], tied: dict[str, str]) -> list[Part]:
    """Parts that are modules with one weight matrix; ``roles``: path -> role, the embedding first."""
    block = block_finder(modules)
    shared = _shared_weights(modules, [p for p, role in roles.items() if role != "router"])
    for borrower, owner in shared.items():
        tied = {**tied, borrower: owner, owner: owner}
    kinds = {"body": "linear", "head": "linear"}
    return [
        Part(path, kinds.get(role, role), weight_shape(modules[path]), block(path), tied.get(path, ""), role,
             shared.get(path, ""))
        for path, role in roles.items()
    ]  # fmt: skip


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def is_linear(module: nn.Module) -> bool:
    """True for ``nn.Linear`` and for GPT-2's ``Conv1D`` (a linear layer whose weight is ``[in, out]``)."""
    return isinstance(module, nn.Linear | Conv1D)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a linear layer whichever way it stores its weight, and of a convolution with the taps
    of its kernel among the inputs; ``(rows, width)`` otherwise."""
    if isinstance(module, nn.Conv2d):
        return module.weight.shape[0], module.weight[0].numel()
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def unique_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of ``tensors``, each storage position counted once (tied weights)."""
    sizes = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors if t.numel()}
    return sum(sizes.values())


def _end_paths(model: Any, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """Paths of the output head and the input embedding; empty where the model has none."""
    by_id = {id(m): p for p, m in modules.items()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head_path = by_id.get(id(head), "") if head is not None and is_linear(head) else ""
    return head_path, by_id.get(id(embedding), "") if isinstance(embedding, nn.Embedding) else ""


def _expert_parameters(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """3-D parameters ``[experts, ., .]``; convolutions hold 3-D weights too and are none."""
    for path, module in modules.items():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                yield f"{path}.{name}", parameter


def _router_paths(modules: dict[str, nn.Module]) -> list[str]:
    """Modules whose 2-D weight has one row an expert (or a single row: the gate of a shared expert) and
    that sit beside the experts, be those one module with 3-D parameters or a list of modules."""
    stacked: dict[str, int] = {}
    for name, parameter in _expert_parameters(modules):
        stacked[_parent(name)] = parameter.shape[0]
    stacked |= {p: len(m) for p, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) > 1}
    routers = []
    for path, count in stacked.items():
        parent = _parent(path)
        for name, child in modules[parent].named_children():
            weight = getattr(child, "weight", None)
            is_matrix = isinstance(weight, nn.Parameter) and weight.ndim == 2
            if is_matrix and not isinstance(child, nn.Embedding) and weight_shape(child)[0] in (1, count):
                routers.append(f"{parent}.{name}" if parent else name)
    return routers


def block_finder(modules: dict[str, nn.Module]) -> Callable[[str], int | None]:
    """A function path -> index of the repeated block it lies in. The blocks are the outermost module list
    that holds most parameters (longest on a tie)."""
    lists = [p for p, m in modules.items() if isinstance(m, nn.ModuleList)]
    outer = [p for p in lists if not any(p.startswith(q + ".") for q in lists)]

    def size(path: str) -> tuple[int, int]:
        parameters = list(modules[path].parameters())
        return sum(p.numel() for p in parameters), len(list(modules[path].children()))

    prefix = max(outer, key=size) + "." if outer else ""

    def find(path: str) -> int | None:
        inside = bool(prefix) and path.startswith(prefix)
        return int(path[len(prefix) :].partition(".")[0]) if inside else None

    return find


def _shared_weights(modules: dict[str, nn.Module], paths: list[str]) -> dict[str, str]:
    """Borrower -> owner for weights in one storage; the first in ``paths`` owns."""
    owners: dict[int, str] = {}
    shared = {}
    for path in paths:
        owner = owners.setdefault(modules[path].weight.data_ptr(), path)  # type: ignore[operator]
        if owner != path:
            shared[path] = owner
    return shared


def run_probe(watched: dict[str, nn.Module], call: Callable[[], Any]) -> Probe:
    """Watch which tensor reaches which of the modules (path -> module) while ``call`` runs the model once."""
    probe = Probe()

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            first = next(tensors, None)
            if first is not None:
                probe.see(path, first)

        return hook

    handles = [m.register_forward_pre_hook(watch(p), with_kwargs=True) for p, m in watched.items()]
    try:
        # no_grad, not inference_mode: inference tensors have no version counter.
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return probe


def _read_tokens(model: Any) -> None:
    tokens = torch.arange(PROBE_TOKENS, device=next(model.parameters()).device)[None]
    try:
        model(input_ids=tokens, use_cache=False)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        name = type(model).__name__
        raise JobError(
            f"{name} does not run on token ids alone ({type(error).__name__}: {error}); "
            "the workload causal_lm needs a decoder-only text model"
        ) from error


def ties(probe: Probe, linears: list[str]) -> dict[str, str]:
    """Linears of one parent module that read the same inputs in all their calls -> a common name.

    The parent matters: in a parallel block (Phi, GPT-J) q/k/v and the MLP read one tensor, but no engine
    fuses across attention and MLP.
    """
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for path in linears:
        if probe.inputs.get(path):
            groups[_parent(path), *probe.inputs[path]].append(path)
    found: dict[str, str] = {}
    for (parent, *_), members in groups.items():
        if len(members) > 1:
            # Named in definition order, so that a model that calls them in another order agrees.
            leaves = "-".join(m.rpartition(".")[2] for m in members)
            found |= dict.fromkeys(members, f"{parent}.{leaves}")
    return found
