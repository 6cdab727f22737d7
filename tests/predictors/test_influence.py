"""Influence of attention spans and cache bits against finite differences and against matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autocomp.attention import runtime
from autocomp.attention.plan import AttentionPlan, Keep, LayerPlan
from autocomp.errors import CapabilityError, SpaceError
from autocomp.kernels.attention_reference import kv_dequantize, kv_quantize
from autocomp.predictors.influence import (
    BLOCK,
    attention_neighbourhood,
    attention_sensitivity,
    curvature,
)
from autocomp.predictors.sensitivity import Rows, sampled_loss
from autocomp.profile import ProfileResult, mean, standard_error
from autocomp.search_spaces.base import ModelSite
from autocomp.space import Choice, Decision, Value
from autocomp.testing.models import tiny_network
from autocomp.workloads.base import Built

LAYER = {"llama": "model.layers.{}.self_attn", "gpt_neox": "gpt_neox.layers.{}.attention"}
GROUPS = {"llama": 2, "gpt_neox": 4}
DENSE = "dense/k16v16"
OPTIONS = (DENSE, "a6b0.25s2/k16v16", "a3b0s0/k16v16", "dense/k4v8", "a6b0.25s2/k4v8")
TOKENS = 70
"""Some blocks of the Fisher term, the last of them short."""

Alter = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, probabilities ``[1, H, N, N]``, keys, values ``[1, H, N, D]``) -> other probabilities, values."""


class Norm(torch.nn.Module):
    """RMS norm in float64; transformers' own goes through float32, too coarse for finite differences."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()


def built(kind: str = "llama", dtype: str = "float64") -> Built:
    model = tiny_network(kind, dtype=dtype)
    for path, module in list(model.named_modules()):
        if dtype == "float64" and hasattr(module, "variance_epsilon"):
            model.set_submodule(path, Norm(module))
    return Built(model, ModelSite("tiny", (), 0, ""), "cpu")


def made(kind: str = "llama", options: tuple[str, ...] = OPTIONS) -> list[Decision]:
    paths = [f"{LAYER[kind].format(i)}.kv{g}" for i in range(2) for g in range(GROUPS[kind])]
    return [Decision(f"attention/{p}", Choice(options), (p,)) for p in paths]


def all_dense(decisions: list[Decision]) -> dict[str, Value]:
    return {d.name: DENSE for d in decisions}


def tokens(rows: int = 1, length: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def costs(rows: Rows) -> dict[str, dict[Value, float]]:
    return {name: {o: mean(m) for o, m in row.items()} for name, row in rows.items()}


@contextmanager
def own_attention(model: Any, function: Callable[..., Tensor]) -> Iterator[None]:
    """``function(layer, q, k, v [1, H, N, D], scale) -> [1, H, N, D]`` instead of the model's attention."""
    from transformers import AttentionInterface

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        out = function(module.layer_idx, q, k, v, options.get("scaling") or q.shape[-1] ** -0.5)
        return out.transpose(1, 2).contiguous(), None

    former = model.config._attn_implementation
    AttentionInterface.register("influence_test", attend)
    model.set_attn_implementation("influence_test")
    try:
        yield
    finally:
        model.set_attn_implementation(former)
        AttentionInterface._global_mapping.pop("influence_test", None)


def probabilities(q: Tensor, k: Tensor, scale: float, seen: Tensor | None = None) -> Tensor:
    """``[1, H, N, N]``, causal and under ``seen``."""
    n = q.shape[2]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(
        ~(causal if seen is None else causal & seen), -1e300
    )
    return scores.softmax(-1)


def visible(keep: Keep, n: int) -> Tensor:
    """What the rule keeps of ``n`` tokens, written out."""
    span = keep.rule.span(n)
    window = n if span >= n else span - keep.rule.sink
    i, j = torch.arange(n).view(-1, 1), torch.arange(n)
    return (i - j < window) | (j < keep.rule.sink)


def quantized(x: Tensor, bits: int) -> Tensor:
    return x if bits == 16 else kv_dequantize(*kv_quantize(x.detach(), bits), bits).to(x.dtype)


def output(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Keep) -> Tensor:
    k, v = quantized(k, keep.key_bits), quantized(v, keep.value_bits)
    return probabilities(q, k, scale, visible(keep, q.shape[2])) @ v


def text_loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("option", ["a6b0.25s2/k16v16", "a3b0s0/k16v16", "dense/k4v8"])
def test_first_order_is_the_slope_of_the_loss(kind: str, option: str) -> None:
    """Masked probabilities shrink by a share e, the others grow to a sum of 1: the loss's true change."""
    b, ids, keep = built(kind), tokens(), Keep.parse(option)
    decisions = made(kind)
    found = costs(
        attention_sensitivity(
            b, {TOKENS: (ids, None)}, decisions, all_dense(decisions), method="first_order", folds=1
        )
    )
    share = 4 // GROUPS[kind]
    for decision in decisions[1::2]:
        layer, group = (0 if ".0." in decision.name else 1), int(decision.name[-1])
        heads = (torch.arange(4) // share == group).view(1, -1, 1, 1)
        slope = (
            loss_towards(b, ids, keep, layer, heads, 1e-5) - loss_towards(b, ids, keep, layer, heads, -1e-5)
        ) / 2e-5
        assert abs(slope) > 1e-3
        assert found[decision.name][option] == pytest.approx(abs(slope) / (TOKENS - 1), rel=1e-4)
        assert found[decision.name][DENSE] == 0.0


def loss_towards(b: Built, ids: Tensor, keep: Keep, layer: int, heads: Tensor, share: float) -> float:
    """The text's loss when ``heads`` of one layer go ``share`` of the way to what ``keep`` gives."""

    def attend(at: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        here = probabilities(q, k, scale) @ v
        change = output(q, k, v, scale, keep) - here if at == layer else torch.zeros_like(here)
        return here + share * heads * change

    with torch.no_grad(), own_attention(b.model, attend):
        return float(text_loss(b.model, ids))


def attention_gradients(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Layer 1's probabilities and the text loss's gradient by them, ``[H, N, N]``."""
    kept: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        found = probabilities(q, k, scale)
        if layer == 1:
            found.retain_grad()
            kept.append(found)
        return found @ v

    with own_attention(model, attend):
        text_loss(model, ids).backward()
    model.zero_grad()
    assert kept[0].grad is not None
    return kept[0].detach()[0], kept[0].grad[0]


def test_one_masked_entry_has_the_influence_of_moa() -> None:
    """A span of N - 1 masks nothing but the last query's first key: E = A/(1-A) * ((dA*A)1 - dA)."""
    b, ids = built(), tokens()
    option = f"a{TOKENS - 1}b0s0/k16v16"
    decisions = made(options=(DENSE, option))
    rows = attention_sensitivity(
        b, {TOKENS: (ids, None)}, decisions, all_dense(decisions), method="first_order", folds=1
    )
    a, slope = attention_gradients(b.model, ids)
    influence = a / (1 - a) * ((slope * a).sum(-1, keepdim=True) - slope)
    for group in range(2):
        entry = influence[2 * group : 2 * group + 2, -1, 0].sum()
        found = costs(rows)[f"attention/{LAYER['llama'].format(1)}.kv{group}"][option]
        assert found == pytest.approx(abs(float(entry)) / (TOKENS - 1), rel=1e-6)


def test_a_joint_mask_has_the_renormalised_influence() -> None:
    """Rows with several masked entries: (m T - s)/(1 - m), which the sum of single influences is not."""
    b, ids = built(), tokens()
    option = "a9b0s2/k16v16"
    decisions = made(options=(DENSE, option))
    rows = attention_sensitivity(
        b, {TOKENS: (ids, None)}, decisions, all_dense(decisions), method="first_order", folds=1
    )
    a, slope = attention_gradients(b.model, ids)
    masked = ~visible(Keep.parse(option), TOKENS) & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    m, s = (a * masked).sum(-1), (a * slope * masked).sum(-1)
    joint = ((m * (a * slope).sum(-1) - s) / (1 - m)).sum(-1)
    for group in range(2):
        found = costs(rows)[f"attention/{LAYER['llama'].format(1)}.kv{group}"][option]
        wanted = abs(float(joint[2 * group : 2 * group + 2].sum())) / (TOKENS - 1)
        assert found == pytest.approx(wanted, rel=1e-6)


def moves(
    model: Any, ids: Tensor, keeps: Mapping[int, Keep], tried: Keep, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """t of both layers' heads for ``tried`` from ``keeps`` (layer -> now), ``[2, H, N]``; and the logits."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        now = keeps[layer]
        straight = [x + (quantized(x, b) - x).detach() for x, b in ((k, now.key_bits), (v, now.value_bits))]
        out = probabilities(q, straight[0], scale, visible(now, q.shape[2])) @ straight[1]
        out.retain_grad()
        seen[layer] = out, (output(q, k, v, scale, tried) - output(q, k, v, scale, now)).detach()
        return out

    with own_attention(model, attend):
        logits = model(input_ids=ids, use_cache=False).logits
        loss(logits).backward()
    model.zero_grad()
    grads = [seen[layer][0].grad for layer in (0, 1)]
    return torch.stack([(g * seen[i][1]).sum(-1)[0] for i, g in enumerate(grads) if g is not None]), logits


def test_influence_takes_absolute_values_of_blocks() -> None:
    b, ids, decisions = built(), tokens(), made()
    batches = {TOKENS: (ids, None)}
    found = costs(
        attention_sensitivity(b, batches, decisions, all_dense(decisions), method="influence", folds=1)
    )

    def text(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")

    heads, _ = moves(b.model, ids, {0: Keep(), 1: Keep()}, Keep.parse(OPTIONS[2]), text)
    groups = heads.view(2, 2, 2, -1).sum(2).flatten(0, 1)
    wanted = (groups[:, :64].sum(-1).abs() + groups[:, 64:].sum(-1).abs()) / (TOKENS - 1)
    for decision, cost in zip(decisions, wanted.tolist()):
        assert found[decision.name][OPTIONS[2]] == pytest.approx(cost, rel=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_fisher_is_half_the_squares_of_blocks_on_sampled_labels(masked: bool) -> None:
    b, ids = built(), tokens()
    counts = torch.arange(TOKENS) % 3 == 1 if masked else torch.ones(TOKENS, dtype=torch.bool)
    decisions = made()
    batches = {TOKENS: (ids, counts[None] if masked else None)}
    found = costs(attention_sensitivity(b, batches, decisions, all_dense(decisions), folds=1))
    dense = {0: Keep(), 1: Keep()}
    t = {}
    for option in OPTIONS[1:4]:
        loss = lambda logits: sampled_loss(logits[:, counts], seed=int(ids.sum()))  # noqa: E731
        heads, _ = moves(b.model, ids, dense, Keep.parse(option), loss)
        t[option] = heads.view(2, 2, 2, -1).sum(2)  # two query heads share a key head
    t[OPTIONS[4]] = t[OPTIONS[1]] + t[OPTIONS[3]]
    for option, moved in t.items():
        starts = range(0, TOKENS, BLOCK)
        blocks = torch.stack([moved[..., i : i + BLOCK].sum(-1) for i in starts], dim=-1)
        wanted = 0.5 * blocks.square().sum(-1) / counts.sum()
        for decision, cost in zip(decisions, wanted.flatten().tolist()):
            assert cost > 0
            assert found[decision.name][option] == pytest.approx(cost, rel=1e-4), option


def test_bits_of_a_layer_with_a_window_of_its_own() -> None:
    b, ids, option = built(), tokens(), OPTIONS[3]
    for layer in range(2):
        b.model.get_submodule(LAYER["llama"].format(layer)).sliding_window = 20
    decisions = made(options=(DENSE, option))
    found = costs(attention_sensitivity(b, {TOKENS: (ids, None)}, decisions, all_dense(decisions)))
    near = {i: Keep.parse("a20b0s0/k16v16") for i in range(2)}
    tried = Keep.parse("a20b0s0/k4v8")
    heads, _ = moves(b.model, ids, near, tried, lambda x: sampled_loss(x, seed=int(ids.sum())))
    wanted = curvature(heads.view(2, 2, 2, -1).sum(2)).flatten() / TOKENS
    for decision, cost in zip(decisions, wanted.tolist()):
        assert found[decision.name][option] == pytest.approx(cost, rel=1e-4)


def installed(b: Built, current: Mapping[str, Value]) -> None:
    layers = {}
    for i in range(2):
        keeps = [Keep.parse(str(o)) for name, o in current.items() if LAYER["llama"].format(i) in name]
        layers[i] = LayerPlan(tuple(k.rule for k in keeps), keeps[0].key_bits, keeps[0].value_bits)
    runtime.install(b.model, AttentionPlan(layers))


def test_around_a_candidate_the_slope_is_that_of_the_kl() -> None:
    b, ids = built(), tokens()
    teacher = b.model(input_ids=ids, use_cache=False).logits.detach().log_softmax(-1)

    def kl(logits: Tensor) -> Tensor:
        return (teacher.exp() * (teacher - logits.log_softmax(-1))).sum()

    decisions = made()
    now = {0: Keep.parse(OPTIONS[1]), 1: Keep.parse(OPTIONS[3])}
    current: dict[str, Value] = {d.name: OPTIONS[1] if ".0." in d.name else OPTIONS[3] for d in decisions}
    installed(b, current)
    with torch.no_grad():
        base = float(kl(b.model(input_ids=ids, use_cache=False).logits))
    rows = attention_neighbourhood(
        b, {TOKENS: (ids, None)}, decisions, current, lambda logits, length, row: kl(logits), folds=1
    )
    assert b.model.config._attn_implementation == runtime.NAME
    runtime.remove(b.model)
    found = costs(rows)
    assert found["base"]["kl"] == found[f"base@{TOKENS}"]["kl"] == pytest.approx(base / TOKENS, rel=1e-9)
    option = OPTIONS[2]  # changes the rule only, where the bits are 16; where they are not, both
    first, logits = moves(b.model, ids, now, Keep.parse(option), kl)
    second, _ = moves(b.model, ids, now, Keep.parse(option), lambda x: sampled_loss(x, seed=int(ids.sum())))
    wanted = first[0].sum(-1).view(2, 2).sum(-1) + curvature(second[0].view(2, 2, -1).sum(1))
    for group in range(2):
        name = decisions[group].name
        assert found[name][option] == pytest.approx(float(wanted[group]) / TOKENS, rel=1e-6)
        assert found[name][OPTIONS[1]] == 0.0
    assert float(base) > 0 and any(c < 0 for d in decisions for c in found[d.name].values())
    assert torch.allclose(kl(logits), torch.tensor(base, dtype=torch.float64))


def test_lengths_have_rows_of_their_own_and_a_mean() -> None:
    b, decisions = built(dtype="float32"), made()
    batches = {70: (tokens(2, 70), None), 100: (tokens(4, 100), None)}
    rows = attention_sensitivity(b, batches, decisions, all_dense(decisions))
    assert set(rows) == {d.name + end for d in decisions for end in ("", "@70", "@100")}
    found = costs(rows)
    for d in decisions:
        for option in OPTIONS:
            both = found[f"{d.name}@70"][option], found[f"{d.name}@100"][option]
            assert found[d.name][option] == pytest.approx(sum(both) / 2)
            assert rows[d.name][option][0] == 2
    assert standard_error(rows[decisions[0].name][OPTIONS[2]]) > 0


def test_shards_add_up_to_the_whole() -> None:
    b, decisions = built(dtype="float32"), made()
    ids, mask = tokens(4), torch.rand(4, TOKENS) > 0.5
    whole = attention_sensitivity(b, {TOKENS: (ids, mask)}, decisions, all_dense(decisions), folds=2)
    parts = [
        attention_sensitivity(b, {TOKENS: (ids[i::2], mask[i::2])}, decisions, all_dense(decisions), folds=1)
        for i in range(2)
    ]
    merged = ProfileResult.merge(ProfileResult("p", rows) for rows in parts).rows
    for name, row in whole.items():
        for option, moments in row.items():
            assert merged[name][option] == pytest.approx(moments, rel=1e-4, abs=1e-12)


def test_a_shard_without_a_length_adds_nothing_to_the_mean() -> None:
    b, decisions = built(dtype="float32"), made()
    batches = {TOKENS: (tokens(2), None), 90: (tokens(1, 90)[:0], None)}
    rows = attention_sensitivity(b, batches, decisions, all_dense(decisions))
    assert all(rows[d.name] == {} and rows[f"{d.name}@{TOKENS}"][OPTIONS[1]][0] == 2 for d in decisions)
    assert not any(name.endswith("@90") for name in rows)


def test_a_decision_over_groups_costs_their_sum() -> None:
    b, single = built(dtype="float32"), made()
    batches = {TOKENS: (tokens(), None)}
    joint = [Decision("attention/model", Choice(OPTIONS), tuple(d.sites[0] for d in single))]
    apart = costs(attention_sensitivity(b, batches, single, all_dense(single)))
    found = costs(attention_sensitivity(b, batches, joint, all_dense(joint)))["attention/model"]
    for option in OPTIONS:
        assert found[option] == pytest.approx(sum(apart[d.name][option] for d in single), rel=1e-5)


class Squares(TorchDispatchMode):
    """Whether any operation gave a tensor with ``n`` rows and ``n`` columns for a token pair each."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.found, self.calls = n, "", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.shape[-2:] == (self.n, self.n):
                self.found = str(func)
        return out


def test_no_square_of_the_tokens_is_kept() -> None:
    from autocomp.kernels.attention import OPERATORS

    x = torch.zeros(1, 1, 4, 16)
    span = torch.ones(1, dtype=torch.int32)
    if OPERATORS["attention_spans"].choose(x, x, x, span, span, 1.0) == "reference":
        pytest.skip("the reference, which has the matrix, is all there is without a C compiler")
    b, n = built(dtype="float32"), 450
    decisions = made()
    current: dict[str, Value] = all_dense(decisions) | {decisions[0].name: "a40b0s2/k16v16"}
    with Squares(n) as squares:
        attention_sensitivity(b, {n: (tokens(1, n), None)}, decisions, current)
    assert squares.calls > 100 and squares.found == ""


def test_the_model_is_left_as_it_was() -> None:
    b, decisions = built(dtype="float32"), made()
    frozen = next(b.model.parameters()).requires_grad_(False)
    before = b.model.config._attn_implementation
    reference = b.model(input_ids=tokens(), use_cache=False).logits
    attention_sensitivity(b, {TOKENS: (tokens(), None)}, decisions, all_dense(decisions))
    with pytest.raises(ZeroDivisionError):
        attention_neighbourhood(
            b,
            {TOKENS: (tokens(), None)},
            decisions,
            all_dense(decisions),
            lambda logits, n, row: logits / (1 // 0),
        )
    assert b.model.config._attn_implementation == before
    assert [p.requires_grad for p in b.model.parameters()].count(False) == 1 and not frozen.requires_grad
    assert all(p.grad is None for p in b.model.parameters())
    assert torch.equal(b.model(input_ids=tokens(), use_cache=False).logits, reference)


def test_what_can_not_be_profiled_is_refused() -> None:
    b, decisions = built(dtype="float32"), made()
    ids = tokens(2)
    with pytest.raises(SpaceError, match="'second' is no method"):
        attention_sensitivity(b, {TOKENS: (ids, None)}, decisions, all_dense(decisions), method="second")
    with pytest.raises(SpaceError, match="'model' is no key/value group"):
        other = [Decision("attention/x", Choice((DENSE,)), ("model",))]
        attention_sensitivity(b, {TOKENS: (ids, None)}, other, all_dense(other))
    with pytest.raises(SpaceError, match="a layer's bits are alike"):
        mixed = all_dense(decisions) | {decisions[0].name: "dense/k8v8"}
        attention_sensitivity(b, {TOKENS: (ids, None)}, decisions, mixed)
    with pytest.raises(SpaceError, match="no token of sequence 1"):
        mask = torch.tensor([[True] * TOKENS, [False] * TOKENS])
        attention_sensitivity(b, {TOKENS: (ids, mask)}, decisions, all_dense(decisions))
    with pytest.raises(CapabilityError, match="soft cap"):
        capped = Built(tiny_network("gemma2"), b.site, "cpu")
        attention_sensitivity(capped, {TOKENS: (ids, None)}, decisions, all_dense(decisions))
    assert attention_sensitivity(b, {TOKENS: (ids[:0], None)}, decisions, all_dense(decisions)) == {
        d.name: {} for d in decisions
    }
