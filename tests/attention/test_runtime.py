"""A model that runs by a plan: with and without a cache, padded, in batches, in beams."""

from __future__ import annotations

import copy

import pytest
import torch

from autocomp.attention import runtime
from autocomp.attention.cache import SpanCache, new_cache
from autocomp.attention.plan import AttentionPlan, Keep, LayerPlan, Rule, uniform
from autocomp.attention.probe import attention_calls, refusal
from autocomp.errors import CapabilityError
from autocomp.testing.models import tiny_config, tiny_network

FAMILIES = ("llama", "qwen3", "gpt2", "gpt_neox", "opt", "mixtral")
NARROW, WIDE = Rule(7, 0.0, 2), Rule(20, 0.0, 3)
RAGGED = LayerPlan((NARROW, WIDE), 8, 4)


def groups(model: torch.nn.Module) -> int:
    return attention_calls(model)[0].groups


def mixed_plan(model: torch.nn.Module, bits: tuple[int, int] = (16, 16)) -> AttentionPlan:
    """Different rules in one layer, and a layer that drops nothing."""
    rules = ((NARROW, WIDE) * groups(model))[: groups(model)]
    dense = (Rule.parse("dense"),) * groups(model)
    return AttentionPlan({0: LayerPlan(rules, *bits), 1: LayerPlan(dense, *bits)})


def tokens(n: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 250, (batch, n), generator=torch.Generator().manual_seed(n))


def masked_reference(model: torch.nn.Module, plan: AttentionPlan, ids: torch.Tensor) -> torch.Tensor:
    """Logits by transformers' own eager attention with masks of ours, head by head."""
    from transformers import AttentionInterface

    def attend(module, q, k, v, mask, **options):  # type: ignore[no-untyped-def]
        size, layer = q.shape[2], plan.layers[module.layer_idx]
        i, j = torch.arange(size)[:, None], torch.arange(size)
        seen = [(j <= i) & ((i - j < (w or size)) | (j < s)) for w, s in layer.limits(size)]
        each = q.shape[1] // k.shape[1]
        allowed = torch.stack(seen).repeat_interleave(each, 0)
        k, v = (t.repeat_interleave(each, 1) for t in (k, v))
        scale = options.get("scaling") or q.shape[-1] ** -0.5
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked_for_test", attend)
    former = model.config._attn_implementation
    model.set_attn_implementation("masked_for_test")
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(former)
    AttentionInterface._global_mapping.pop("masked_for_test")
    return logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_scoring_equals_a_mask_per_head_and_removing_gives_the_model_back(kind: str) -> None:
    model, ids = tiny_network(kind), tokens(40)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
    expected = masked_reference(model, mixed_plan(model), ids)
    runtime.install(model, mixed_plan(model))
    with torch.no_grad():
        ours = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (ours - before).abs().max() > 1e-2, "the plan must matter"
    runtime.remove(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert runtime.installed(model) is None and "generate" not in model.__dict__


@pytest.mark.parametrize("kind", FAMILIES)
def test_cached_steps_equal_the_whole_sequence(kind: str) -> None:
    model, ids = tiny_network(kind), tokens(48, batch=2)
    runtime.install(model, mixed_plan(model))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = SpanCache(model)
        pieces = [model(input_ids=ids[:, :30], past_key_values=cache, use_cache=True).logits]
        for i in range(30, 44):
            pieces.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
        pieces.append(model(input_ids=ids[:, 44:], past_key_values=cache, use_cache=True).logits)  # a chunk
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=2e-4)
    assert cache.get_seq_length() == 48


def test_left_padding_changes_nothing_for_a_sequence() -> None:
    model = tiny_network("llama")
    runtime.install(model, mixed_plan(model))
    long, short = tokens(36), tokens(25)
    ids = torch.cat([long, torch.cat([torch.full((1, 11), 257), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 257}
    both = model.generate(ids, attention_mask=mask, **options)
    alone = [model.generate(x, attention_mask=torch.ones_like(x), **options) for x in (long, short)]
    assert torch.equal(both[:1], alone[0])
    assert torch.equal(both[1:, 11:], alone[1])


@pytest.mark.parametrize("bits", [(16, 16), (8, 4)])
def test_generation_holds_what_the_plan_says_and_no_more(bits: tuple[int, int]) -> None:
    model, ids = tiny_network("llama"), tokens(200)
    plan = uniform((0, 1), 2, Keep(Rule(50, 0.0, 4), *bits))
    runtime.install(model, plan)
    cache = SpanCache(model)
    model.generate(ids, past_key_values=cache, max_new_tokens=30, min_new_tokens=30, do_sample=False)
    # two layers, two groups, 50 tokens of 16 features; window, sink and starts are a few bytes more
    expected = 2 * 2 * 50 * Keep(Rule(50, 0.0, 4), *bits).token_bytes(16, itemsize=4)
    assert expected <= cache.nbytes <= expected + 200
    assert cache.get_seq_length() == 229


def test_quantized_caches_give_what_scoring_simulates() -> None:
    """Scoring quantizes all keys and values; decoding token by token into the cache sees the same."""
    model, ids = tiny_network("llama"), tokens(24)
    runtime.install(model, AttentionPlan(dict.fromkeys((0, 1), RAGGED)))
    with torch.no_grad():
        scored = model(input_ids=ids, use_cache=False).logits
        cache = SpanCache(model)
        steps = [
            model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            for i in range(24)
        ]
    plain = AttentionPlan({i: LayerPlan((NARROW, WIDE)) for i in (0, 1)})
    runtime.install(model, plain)
    with torch.no_grad():
        exact = model(input_ids=ids, use_cache=False).logits
    effect = (scored - exact).abs().mean()
    # Not zero: the first token is a prompt, which attends to itself unquantized.
    assert (torch.cat(steps, 1)[:, 8:] - scored[:, 8:]).abs().mean() < 0.3 * effect
    assert effect > 0.05, "quantization must show"


def test_beams_and_several_sequences_per_prompt() -> None:
    model, ids = tiny_network("llama"), tokens(30, batch=2)
    runtime.install(model, mixed_plan(model))
    with torch.no_grad():
        found = model.generate(ids, num_beams=3, max_new_tokens=6, do_sample=False)
        scores = model(input_ids=found, use_cache=False).logits.log_softmax(-1)
        greedy = model.generate(ids, max_new_tokens=6, do_sample=False)
        rival = model(input_ids=greedy, use_cache=False).logits.log_softmax(-1)

    def likelihood(logs: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return logs[:, 29:-1].gather(-1, text[:, 30:, None]).sum((1, 2))

    assert found.shape == greedy.shape
    assert bool((likelihood(scores, found) >= likelihood(rival, greedy) - 1e-3).all())
    assert model.generate(ids, num_return_sequences=2, do_sample=True, max_new_tokens=3).shape[0] == 4


def test_layers_with_a_window_of_their_own() -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama").to_dict() | {"model_type": "mistral", "sliding_window": 9}
    config.pop("architectures", None)
    from transformers import AutoConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=1.5 / p.shape[-1] ** 0.5)
    ids = tokens(40)
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
    plan = AttentionPlan({i: LayerPlan((Rule.parse("dense"),) * 2, 16, 16, window=9) for i in (0, 1)})
    runtime.install(model, plan)
    with torch.no_grad():
        ours = model(input_ids=ids, use_cache=False).logits
        cache = SpanCache(model)
        steps = [model(input_ids=ids[:, :20], past_key_values=cache, use_cache=True).logits]
        steps += [
            model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            for i in range(20, 40)
        ]
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(steps, 1), own, rtol=1e-4, atol=2e-4)
    with pytest.raises(CapabilityError, match="sliding window of 9"):
        runtime.install(model, uniform((0, 1), 2, Keep(NARROW)))


def test_gradients_flow_through_a_plan() -> None:
    model, ids = tiny_network("llama"), tokens(32)
    runtime.install(model, mixed_plan(model, (8, 8)))
    weight = model.model.layers[0].self_attn.k_proj.weight
    model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    assert weight.grad is not None and bool(torch.isfinite(weight.grad).all())
    assert float(weight.grad.abs().sum()) > 0


def test_a_copy_of_a_model_runs_by_the_plan_too() -> None:
    model, ids = tiny_network("llama"), tokens(30)
    runtime.install(model, mixed_plan(model))
    with torch.no_grad():
        cache = SpanCache(model)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        one = model(input_ids=ids[:, :1], past_key_values=copy.deepcopy(cache), use_cache=True).logits
        two = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
    assert torch.equal(one, two)


def test_what_can_not_be_planned_says_why() -> None:
    gemma = tiny_network("gemma2")
    assert "soft-capped" in refusal(gemma)
    with pytest.raises(CapabilityError, match="soft-capped"):
        runtime.install(gemma, uniform((0, 1), 2, Keep(NARROW)))
    model = tiny_network("llama")
    with pytest.raises(CapabilityError, match="3 rules for layer 0, which has 2"):
        runtime.install(model, uniform((0, 1), 3, Keep(NARROW)))
    with pytest.raises(CapabilityError, match="the model has"):
        runtime.install(model, uniform((0,), 2, Keep(NARROW)))
    with pytest.raises(CapabilityError, match="no attention plan"):
        SpanCache(model)
    assert new_cache(model) is None
    runtime.install(model, uniform((0, 1), 2, Keep(NARROW)))
    with pytest.raises(CapabilityError, match="SpanCache"), torch.no_grad():
        out = model(input_ids=tokens(9), use_cache=True)
        model(input_ids=tokens(1), past_key_values=out.past_key_values, use_cache=True)
    cache = SpanCache(model)
    right_padded = torch.ones(1, 9, dtype=torch.long)
    right_padded[0, -2:] = 0
    with pytest.raises(CapabilityError, match="padding_side"), torch.no_grad():
        model(input_ids=tokens(9), attention_mask=right_padded, past_key_values=cache, use_cache=True)
    with pytest.raises(CapabilityError, match="can't be cropped"):
        cache.crop(3)
