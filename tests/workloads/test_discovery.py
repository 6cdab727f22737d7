from __future__ import annotations

import pytest
import torch
from torch import nn

from autocomp.errors import JobError
from autocomp.search_spaces.base import ModelSite, Part
from autocomp.testing.models import KINDS, tiny_network
from autocomp.workloads.discovery import discover, unique_bytes, weight_shape


def site(kind: str) -> ModelSite:
    return discover(tiny_network(kind), "0")


def ties(found: ModelSite) -> list[set[str]]:
    """Groups of body linears that are tied, by the last part of their paths, in block 0."""
    groups: dict[str, set[str]] = {}
    for p in found.parts:
        if p.tie and p.block == 0:
            groups.setdefault(p.tie, set()).add(p.path.rpartition(".")[2])
    return list(groups.values())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral", "granite", "gemma2"])
def test_separate_projections_that_read_one_input_are_tied(kind: str) -> None:
    gated = [] if kind == "mixtral" else [{"gate_proj", "up_proj"}]
    assert ties(site(kind)) == [{"q_proj", "k_proj", "v_proj"}, *gated]


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_fused_projections_stay_alone(kind: str) -> None:
    assert ties(site(kind)) == []


def test_opt_ties_its_projections_with_biases() -> None:
    found = site("opt")
    assert ties(found) == [{"q_proj", "k_proj", "v_proj"}]
    assert {p.role for p in found.parts if "self_attn" in p.path} == {"body"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_is_found_once_with_its_block(kind: str) -> None:
    model = tiny_network(kind, layers=3)
    found = discover(model, "0")
    paths = [p.path for p in found.parts]
    assert len(set(paths)) == len(paths)
    expected = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert {p.path for p in found.parts if p.kind == "linear"} == expected
    for part in found.parts:
        inside = [int(s) for s in part.path.split(".") if s.isdigit()]
        assert part.block == (inside[0] if inside else None)
    assert {p.block for p in found.parts} == {None, 0, 1, 2}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_the_rest_add_up_to_the_whole_model(kind: str) -> None:
    model = tiny_network(kind)
    found = discover(model, "0")
    counted = sum(4 * p.numel for p in found.parts if p.kind in ("linear", "embedding") and not p.shared_with)
    assert counted + found.other_bytes == unique_bytes([*model.parameters(), *model.buffers()])
    assert found.other_bytes > 0


def test_conv1d_shapes_are_output_by_input() -> None:
    model = tiny_network("gpt2")
    found = discover(model, "0")
    assert found.part("transformer.h.0.attn.c_attn").shape == (192, 64)
    assert found.part("transformer.h.0.mlp.c_proj").shape == (64, 128)
    conv = model.get_submodule("transformer.h.0.attn.c_attn")
    assert tuple(conv.weight.shape) == (64, 192) and weight_shape(conv) == (192, 64)


def test_tied_head_borrows_the_embedding() -> None:
    found = site("llama-tied")
    embedding, head = found.parts[0], found.parts[-1]
    assert (embedding.path, embedding.kind, embedding.role) == (
        "model.embed_tokens",
        "embedding",
        "embedding",
    )
    assert (head.path, head.role, head.shared_with) == ("lm_head", "head", "model.embed_tokens")
    assert head.tie == embedding.tie != ""
    untied = site("llama").parts[-1]
    assert (untied.role, untied.shared_with, untied.tie) == ("head", "", "")


def test_parts_come_in_execution_order() -> None:
    names = [p.path.rpartition(".")[2] for p in site("llama").parts]
    block = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert names == ["embed_tokens", *block, *block, "lm_head"]


def test_mixtral_keeps_routers_and_experts_out_of_the_linears() -> None:
    parts = site("mixtral").parts
    routers = [p for p in parts if p.role == "router"]
    experts = [p for p in parts if p.kind == "experts"]
    assert [p.shape for p in routers] == [(4, 64)] * 2 and {p.kind for p in routers} == {"router"}
    assert [p.shape for p in experts] == [(4, 256, 64), (4, 64, 128)] * 2
    assert [p.block for p in experts] == [0, 0, 1, 1]
    assert not any("experts" in p.path or p.path.endswith("gate") for p in parts if p.kind == "linear")


def test_site_survives_json() -> None:
    found = site("mixtral")
    assert ModelSite.from_json(found.to_json()) == found


class Parallel(nn.Module):
    """Attention and MLP on one input, odd call order, an in-place change, a list of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("q", "k", "v")})
        self.up = nn.Linear(8, 8)
        self.late = nn.Linear(8, 8)
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x) + self.attention["v"](x)
        y = y + self.attention["k"](x.view(-1, 8)).view_as(y) + self.attention["q"](x)
        weight = self.gate(x).softmax(-1)[..., :1]
        x += y  # the same buffer with other content
        return self.late(x) + weight * self.experts[1](x)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.blocks = nn.ModuleList(Parallel() for _ in range(2))
        self.head = nn.Linear(8, 32, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_ties_follow_the_tensor_not_the_name_or_the_call_order() -> None:
    found = discover(Odd(), "0")
    assert ties(found) == [{"q", "k", "v"}]  # neither `up` (other parent) nor `late` (changed in place)
    assert found.part("blocks.0.attention.q").tie == "blocks.0.attention.q-k-v"


def test_a_list_of_experts_is_not_taken_for_the_blocks() -> None:
    found = discover(Odd(), "0")
    experts = [p for p in found.parts if ".experts." in p.path]
    assert [p.block for p in experts if p.path.startswith("blocks.1")] == [1, 1, 1]
    assert all(p.kind == "linear" and p.tie == "" for p in experts)
    gates = [p for p in found.parts if p.path.endswith("gate")]
    assert [(p.kind, p.role) for p in gates] == [("router", "router")] * 2


def test_what_the_probe_does_not_reach_comes_last() -> None:
    found: list[Part] = list(discover(Odd(), "0").parts)
    assert {p.path for p in found[-4:]} == {f"blocks.{b}.experts.{e}" for b in (0, 1) for e in (0, 2)}


def test_models_that_do_not_fit_say_why() -> None:
    class NeedsMore(Odd):
        def forward(self, input_ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self.head(self.embed(input_ids) + pixels)

    with pytest.raises(JobError, match=r"NeedsMore.*decoder-only"):
        discover(NeedsMore(), "0")

    class NoLinear(Odd):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList(), nn.Identity()  # type: ignore[assignment]

    with pytest.raises(JobError, match="no linear layer"):
        discover(NoLinear(), "0")


def test_hooks_are_gone_afterwards() -> None:
    model = tiny_network("llama")
    discover(model, "0")
    assert not any(m._forward_pre_hooks for m in model.modules())
