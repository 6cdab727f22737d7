"""The lean decode path with attention plans: ragged rings, quantized keys and values, sliding windows."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from autocomp.attention.cache import SpanCache
from autocomp.attention.plan import DENSE, AttentionPlan, Keep, LayerPlan, Rule, uniform
from autocomp.attention.ring import Ring
from autocomp.attention.runtime import install, remove, simulated
from autocomp.kernels import cpu_step, native
from autocomp.kernels.attention_reference import attend as masked_attention
from autocomp.kernels.attention_reference import spans_mask
from autocomp.serving import LeanDecoder
from autocomp.serving.generate import _Eager
from autocomp.serving.record import Unsupported
from autocomp.testing.models import VOCABULARY, tiny_network

pytestmark = pytest.mark.skipif(bool(native.unavailable("step")), reason="no C kernels here")
RULES = (DENSE, Rule(7, 0.0, 2), Rule(0, 0.5, 1), Rule(4, 0.0, 0))
WINDOW = 9


def network(family: str) -> Any:
    """A tiny float32 model; its spread logits make a wrong token matter."""
    if family in ("llama", "gpt_neox", "qwen3"):
        return tiny_network(family)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "mistral":
        sizes["sliding_window"] = WINDOW
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return model


def plan_for(model: Any) -> AttentionPlan:
    """Other rules in every group, other bits in every layer; a window of the model's own stays."""
    groups = int(getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads)
    if model.config.model_type == "mistral":
        rules, window = [(DENSE,) * groups] * 2, WINDOW
    else:
        rules, window = [tuple(RULES[(g + i) % 4] for g in range(groups)) for i in range(2)], 0
    bits = [(8, 4), (16, 8)]
    return AttentionPlan({i: LayerPlan(rules[i], *bits[i], window=window) for i in range(2)})


def prompt(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def lean_logits(decoder: LeanDecoder, ids: Tensor, length: int) -> Tensor:
    found = [decoder.prefill(ids[:, :length])]
    found += [decoder.step(ids[:, i]).clone() for i in range(length, ids.shape[1])]
    return torch.stack(found, 1)


@contextmanager
def by_masks(model: Any, plan: AttentionPlan, length: int) -> Iterator[None]:
    """Inside, one pass over all tokens computes what a prompt of ``length`` and single tokens after it should
    see: plain attention under masks, with rounded keys and values for what comes after the prompt."""

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        layer = plan.layers[module.layer_idx]
        groups, tokens = q.shape[1] // len(layer.rules), q.shape[2]
        limits = torch.tensor([(w or tokens, s) for w, s in layer.limits(length)], dtype=torch.int32)
        seen = spans_mask(*limits.repeat_interleave(groups, 0).unbind(1), tokens)
        first = masked_attention(q, k, v, seen, options["scaling"])
        k, v = simulated(k, layer.key_bits), simulated(v, layer.value_bits)
        later = masked_attention(q, k, v, seen, options["scaling"])
        return torch.cat([first[:, :, :length], later[:, :, length:]], 2).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_masks", attention)
    former = model.config._attn_implementation
    model.set_attn_implementation("by_masks")
    try:
        yield
    finally:
        model.set_attn_implementation(former)
        AttentionInterface._global_mapping.pop("by_masks")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox", "mistral"])
def test_steps_see_what_the_plan_keeps(family: str, batch: int) -> None:
    """Against masks and rounding in plain torch, and against the model's own steps with a SpanCache."""
    model = network(family)
    plan, ids, length = plan_for(model), prompt(batch, 36), 17
    with torch.no_grad(), by_masks(model, plan, length):
        wanted = model(ids, use_cache=False).logits[:, length - 1 :]
    install(model, plan)
    decoder = LeanDecoder(model, batch=batch, capacity=40, threads=2)
    found = lean_logits(decoder, ids, length)
    # A difference of 1e-6 may round a number to the next of 16 codes.
    assert relative(found, wanted) < 5e-3
    eager = _Eager(model)
    with torch.no_grad():
        steps = [eager.prefill(ids[:, :length]), *(eager.step(ids[:, i]) for i in range(length, 36))]
    assert relative(found, torch.stack(steps, 1)) < 5e-3
    remove(model)
    dense = LeanDecoder(model, batch=batch, capacity=40, threads=1, verify=False)
    if family != "mistral":
        assert relative(lean_logits(dense, ids, length), wanted) > 0.1, "this plan changes nothing"


def test_one_decoder_serves_prompts_of_any_length() -> None:
    """N of the rules is the prompt's length: rings are made anew under the same operations."""
    model = network("llama")
    plan = uniform(range(2), 2, Keep(Rule(0, 0.5, 1), 8, 16))
    install(model, plan)
    decoder = LeanDecoder(model, capacity=40, threads=1)
    bytes_ = []
    for length in (30, 8, 21, 30):
        ids = prompt(1, length + 6, seed=length)
        with torch.no_grad(), by_masks(model, plan, length):
            wanted = model(ids, use_cache=False).logits[:, length - 1 :]
        assert relative(lean_logits(decoder, ids, length), wanted) < 5e-3
        bytes_.append(decoder.cache_bytes)
    assert bytes_[1] < bytes_[2] < bytes_[0] == bytes_[3] < decoder.nbytes
    slots = 2 * 15  # of a layer: half of 30 in each of two groups
    assert bytes_[0] == 2 * (slots * (16 + 8 + 4 * 16) + 3 * 8 + 4 * 4)


def test_bfloat16_models_keep_bfloat16() -> None:
    model: Any = tiny_network("llama", dtype="bfloat16")
    plan = plan_for(model)
    install(model, plan)
    decoder = LeanDecoder(model, capacity=40, threads=1)
    ids = prompt(1, 30)
    found = lean_logits(decoder, ids, 17)
    remove(model)
    wide = model.float()
    with torch.no_grad(), by_masks(wide, plan, 17):
        wanted = wide(ids, use_cache=False).logits[:, 16:]
    assert relative(found, wanted) < 0.1


def test_generation_is_the_models_own() -> None:
    model = network("llama")
    install(model, plan_for(model))
    ids = prompt(2, 14)
    decoder = LeanDecoder(model, batch=2, capacity=32, threads=1)
    wanted = model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(decoder.generate(ids, 16), wanted)


def test_caches_of_both_kinds_are_taken_over() -> None:
    """A SpanCache with other room, and a plain cache under a plan that only the decoder has."""
    model = network("llama")
    plan, ids = plan_for(model), prompt(1, 24)
    with torch.no_grad():
        plain = model(ids[:, :16], use_cache=True).past_key_values
    install(model, plan)
    decoder = LeanDecoder(model, capacity=24, threads=1)
    lean_logits(decoder, ids[:, :20], 16)
    wanted = decoder.step(ids[:, 20]).clone()
    cache = SpanCache(model)
    with torch.no_grad():
        model(ids[:, :16], past_key_values=cache, use_cache=True)
        for i in range(16, 20):
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    decoder.load_cache(cache, 20)
    assert decoder.position == 20 and relative(decoder.step(ids[:, 20]), wanted) < 5e-3
    remove(model)
    alone = LeanDecoder(model, capacity=24, threads=1, plan=plan)
    alone.load_cache(plain, 16)
    assert alone.cache_bytes == decoder.cache_bytes
    full = LeanDecoder(model, capacity=24, threads=1)
    full.load_cache(plain, 16)
    assert full.cache_bytes > alone.cache_bytes
    assert relative(alone.step(ids[:, 16]).clone(), full.step(ids[:, 16])) > 1e-2


def test_a_rewind_never_gives_damaged_text() -> None:
    model = network("llama")
    install(model, uniform(range(2), 2, Keep(Rule(6, 0.0, 1))))
    decoder, ids = LeanDecoder(model, capacity=24, threads=1), prompt(1, 20)
    first = lean_logits(decoder, ids, 12)
    with pytest.raises(ValueError, match=r"can't rewind to 12: after 20 tokens, spans have dropped"):
        decoder.rewind(12)
    decoder.rewind(12, exact=False)
    decoder.step(ids[:, 12])
    with pytest.raises(ValueError, match="spans have dropped"):
        decoder.rewind(13)
    assert torch.equal(lean_logits(decoder, ids, 12), first)  # a prompt mends it
    short = prompt(1, 4)
    lean_logits(decoder, short, 3)
    decoder.rewind(3)  # nothing was dropped: a prompt of 3 is kept whole


def test_what_does_not_fit_is_named() -> None:
    model = network("llama")
    three = uniform(range(2), 3, Keep())
    with pytest.raises(Unsupported, match=r"layer 0 has 3 key/value groups .* the model 2"):
        LeanDecoder(model, capacity=8, verify=False, plan=three)
    with pytest.raises(Unsupported, match="nothing of layer 1"):
        LeanDecoder(model, capacity=8, verify=False, plan=uniform([0], 2, Keep()))
    install(model, plan_for(model))
    with pytest.raises(ValueError, match="runs by another attention plan"):
        LeanDecoder(model, capacity=8, verify=False, plan=uniform(range(2), 2, Keep()))
    decoder = LeanDecoder(model, batch=2, capacity=16, verify=False)
    padded, mask = prompt(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :4] = 0
    cache = SpanCache(model)
    with torch.no_grad():
        model(padded, attention_mask=mask, past_key_values=cache, use_cache=True)
    with pytest.raises(Unsupported, match=r"must all have 12 tokens, not \[12, 8\]"):
        decoder.load_cache(cache, 12)
    with pytest.raises(ValueError, match="a prompt of 17 tokens doesn't fit in a cache of 16"):
        decoder.load_cache(cache, 17)


LAYERS = [
    LayerPlan((DENSE,), 16, 16),
    LayerPlan((DENSE, Rule(20, 0.0, 2), Rule(9, 0.0, 0)), 16, 16),
    LayerPlan((Rule(9, 0.0, 0), DENSE, Rule(20, 0.0, 2)), 8, 4),
    LayerPlan((Rule(33, 0.0, 4),) * 8, 16, 8),
]


@pytest.mark.parametrize("plan", LAYERS)
def test_threads_share_the_tokens_of_all_heads(plan: LayerPlan) -> None:
    """One attention operation on any number of threads, more than there are tokens to share included."""
    for batch, tokens, threads in itertools.product((1, 2), (0, 1, 17, 300), (1, 2, 3, 7)):
        groups = len(plan.rules)
        generator = torch.Generator().manual_seed(tokens)
        rings = [
            Ring(
                plan,
                heads=2 * groups,
                dim=24,
                batch=batch,
                tokens=max(tokens, 1),
                capacity=tokens + 1,
                dtype=torch.float32,
            )
            for _ in range(2)
        ]
        k, v = torch.randn(2, batch, groups, tokens + 1, 24, generator=generator)
        q = torch.randn(batch, 2 * groups, 1, 24, generator=generator)
        for ring in rings:
            ring.fill(k[:, :, :tokens], v[:, :, :tokens])
        rings[0].append(k[:, :, tokens], v[:, :, tokens])
        wanted = rings[0].attend(q, 0.2, softcap=3.0)
        out, struct = torch.full_like(q, torch.nan), rings[1].struct
        new = [x[:, :, tokens].contiguous() for x in (k, v)]
        op = cpu_step.AcOp(kind=cpu_step.KINDS["attend"], sync=1, shared=1, alpha=0.2, beta=3.0)
        op.a, op.b, op.c, op.out = q.data_ptr(), new[0].data_ptr(), new[1].data_ptr(), out.data_ptr()
        op.object = ctypes.addressof(struct)
        made = cpu_step.program([op], [struct], threads)
        made.position = tokens
        cpu_step.run(made, threads)
        torch.testing.assert_close(out, wanted, rtol=2e-5, atol=2e-5)
