"""The lean decode path against the models themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocomp.kernels.modules import PackedEmbedding, PackedLinear
from autocomp.kernels.ops import capability
from autocomp.quantize.rounding import quantize
from autocomp.quantize.scheme import Scheme
from autocomp.serving import LeanDecoder
from autocomp.serving.decoder import _recorded
from autocomp.serving.record import Unsupported, record
from autocomp.testing.models import KINDS, VOCABULARY, tiny_network

pytestmark = pytest.mark.skipif(
    not capability(Scheme(4, 64), (64, 64), "cpu").native, reason="no kernels on this CPU"
)


def prompt(batch: int = 1, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def pack(model: Any, scheme: str) -> None:
    """Every linear of the model on packed weights."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = quantize(module.weight.detach().float(), Scheme.parse(scheme), method="rtn")
            parent, _, name = path.rpartition(".")
            packed = PackedLinear(weight, module.bias, dtype=model.dtype)
            setattr(model.get_submodule(parent), name, packed)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_decodes_as_the_model_does(kind: str, batch: int) -> None:
    """Teacher forcing over 20 tokens, far from the prompt that the verification uses."""
    model = tiny_network(kind)
    decoder = LeanDecoder(model, batch=batch, threads=2, capacity=40)
    ids = prompt(batch, 32)
    with torch.no_grad():
        wanted = model(ids).logits
    found = [decoder.prefill(ids[:, :12])]
    found += [decoder.step(ids[:, i]).clone() for i in range(12, 32)]
    error = relative(torch.stack(found, 1), wanted[:, 11:])
    assert error < 1e-4, f"{kind}: {error}"


@pytest.mark.parametrize("family", ["cohere", "gemma3_text", "phi3", "qwen2_moe", "gpt_bigcode", "olmo2"])
def test_families_that_no_table_names(family: str) -> None:
    """Stacked rotary halves, norms after the blocks, fused projections, shared experts, one kv head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "gpt_bigcode":
        sizes |= {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "n_inner": 128}
    if family == "qwen2_moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        sizes |= {"shared_expert_intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    decoder = LeanDecoder(model, capacity=24)
    ids = prompt(1, 20)
    with torch.no_grad():
        wanted = model(ids).logits
    decoder.prefill(ids[:, :16])
    for i in range(16, 20):
        assert relative(decoder.step(ids[:, i]), wanted[:, i]) < 1e-4


@pytest.mark.parametrize("scheme", ["w8", "w6g64", "w5g64", "w4g64a", "w3g64", "w2g64", "w4g64o0.5"])
def test_packed_weights_decode_as_their_dequantized_ones(scheme: str) -> None:
    """Activations are rounded to 8 bits on the way, some 0.5 % a layer."""
    model: Any = tiny_network("llama", hidden=128)
    ids = prompt(1, 24)
    pack(model, scheme)
    decoder = LeanDecoder(model, threads=1, capacity=40)
    dense: Any = tiny_network("llama", hidden=128)
    for path, module in dense.named_modules():
        if isinstance(module, nn.Linear):
            weight = quantize(module.weight.detach().float(), Scheme.parse(scheme), method="rtn")
            dense.get_submodule(path).weight.data = weight.dequantize()
    with torch.no_grad():
        wanted = dense(ids).logits
    for i in range(24):
        assert relative(decoder.step(ids[:, i]), wanted[:, i]) < 6e-2


def test_one_packed_table_serves_embedding_and_head() -> None:
    model: Any = tiny_network("llama-tied", dtype="bfloat16")
    weight = quantize(model.lm_head.weight.detach().float(), Scheme.parse("w8"), method="rtn")
    embedding = PackedEmbedding(weight, dtype=torch.bfloat16)
    model.model.embed_tokens, model.lm_head = embedding, PackedLinear.sharing(embedding)
    decoder = LeanDecoder(model, capacity=30)
    ids = prompt(1, 20)
    with torch.no_grad():
        wanted = model(ids).logits.float()
    decoder.prefill(ids[:, :19])
    assert relative(decoder.step(ids[:, 19]), wanted[:, 19]) < 5e-2


def test_weights_are_shared_with_the_model_and_not_copied() -> None:
    model: Any = tiny_network("llama")
    decoder = LeanDecoder(model, capacity=30)
    token = torch.tensor([5])
    before = decoder.step(token).clone()
    model.model.layers[0].mlp.down_proj.weight.data.mul_(3.0)
    decoder.rewind(0)
    after = decoder.step(token).clone()
    with torch.no_grad():
        wanted = model(token.view(1, 1)).logits[:, -1]
    assert relative(after, before) > 1e-2 and relative(after, wanted) < 1e-4


def test_generation_equals_the_models_own() -> None:
    model: Any = tiny_network("qwen3")
    decoder = LeanDecoder(model, batch=2, capacity=64)
    ids = prompt(2, 9)
    wanted = ids
    with torch.no_grad():
        for _ in range(16):
            wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(decoder.generate(ids, 16), wanted)
    stop = int(wanted[0, 9])
    one = LeanDecoder(model, capacity=64)
    assert one.generate(ids[:1], 16, stop=(stop,)).shape == (1, 10)
    drawn = [one.generate(ids[:1], 16, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_rewinding_forgets_what_came_later() -> None:
    decoder = LeanDecoder(tiny_network("llama"), capacity=32)
    ids = prompt(1, 12)
    decoder.prefill(ids[:, :8])
    first = [decoder.step(ids[:, i]).clone() for i in range(8, 12)]
    decoder.rewind(8)
    decoder.step(torch.tensor([7]))
    decoder.rewind(8)
    again = [decoder.step(ids[:, i]).clone() for i in range(8, 12)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    with pytest.raises(ValueError, match="can't rewind to 13: 12 tokens"):
        decoder.rewind(13)


def test_any_number_of_threads_gives_the_same_logits() -> None:
    model = tiny_network("llama")
    found = [LeanDecoder(model, threads=t, capacity=8).step(torch.tensor([3])).clone() for t in (1, 2, 3, 7)]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_sliding_window_is_respected() -> None:
    model: Any = tiny_network("gemma2")
    model.config.sliding_window = 8
    for layer in model.model.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = 8
    decoder = LeanDecoder(model, capacity=40)
    ids = prompt(1, 30)
    with torch.no_grad():
        wanted = model(ids).logits
    decoder.prefill(ids[:, :20])
    for i in range(20, 30):
        assert relative(decoder.step(ids[:, i]), wanted[:, i]) < 1e-4


def test_bad_input_is_named() -> None:
    model = tiny_network("llama")
    decoder = LeanDecoder(model, capacity=8)
    with pytest.raises(ValueError, match="0 to 299; got 300 to 300"):
        decoder.step(torch.tensor([300]))
    with pytest.raises(ValueError, match="0 to 299; got -1 to 5"):
        decoder.prefill(torch.tensor([[5, -1]]))
    with pytest.raises(ValueError, match=r"must be \[1, length\]"):
        decoder.step(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="a prompt of 9 tokens"):
        decoder.prefill(prompt(1, 9))
    with pytest.raises(ValueError, match=r"6 \+ 3 tokens don't fit in a cache of 8"):
        decoder.generate(prompt(1, 6), 3)
    decoder.prefill(prompt(1, 8))
    with pytest.raises(ValueError, match="the cache is full"):
        decoder.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="batch must be 1 or more"):
        LeanDecoder(model, batch=0)


class _Looks(nn.Module):
    """Stands for a head that decides in Python by what it sees."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y if float(y.sum()) > 1e9 else y * 2


class _Sorts(_Looks):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sort(self.inner(x)).values


@pytest.mark.parametrize(("wrapper", "reason"), [(_Looks, "decides by a value"), (_Sorts, "sort")])
def test_what_cannot_be_expressed_is_named(wrapper: type[_Looks], reason: str) -> None:
    model: Any = tiny_network("llama")
    model.model.layers[1].mlp = wrapper(model.model.layers[1].mlp)
    with pytest.raises(Unsupported, match=reason):
        LeanDecoder(model, capacity=16)


def test_a_model_that_changes_with_the_position_is_refused() -> None:
    model: Any = tiny_network("llama")
    plain = model.model.rotary_emb.forward

    def stretched(x: Tensor, position_ids: Tensor) -> Any:
        cos, sin = plain(x, position_ids)
        return (cos, sin) if position_ids.shape[1] > 1 else (cos * factor, sin)

    factor = 1.0
    model.model.rotary_emb.forward = stretched
    low = _recorded(model, 1, 1)
    factor = 1.5
    other = _recorded(model, 1, 9)
    from autocomp.serving.decoder import _same_at_another_position

    with pytest.raises(Unsupported, match="differently at different positions"):
        _same_at_another_position(low, other)


def test_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with the model catches a rule that is wrong."""
    from autocomp.serving import rules

    monkeypatch.setitem(rules.RULES, "silu.default", rules._unary("relu"))
    with pytest.raises(Unsupported, match="logits are off by"):
        LeanDecoder(tiny_network("llama"), capacity=32)


def test_recording_leaves_the_model_as_it_was() -> None:
    model: Any = tiny_network("mixtral")
    before = model.config._attn_implementation
    ids = prompt(1, 6)
    with torch.no_grad():
        wanted = model(ids).logits
    record(model, torch.tensor([[1]]), 3)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
    assert model.config._attn_implementation == before
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_activations_are_close_to_torchs() -> None:
    """The C approximations over the range that matters, extreme values included."""
    from autocomp.kernels import cpu_step

    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-1e4, 1e4, 0.0, -0.0, 1e-6, -1e-3])])
    functions = {
        "exp": torch.exp, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "cos": torch.cos, "relu": F.relu,
    }  # fmt: skip
    for kind, function in functions.items():
        inputs = x.clamp(-80, 80) if kind == "exp" else x
        found = torch.empty_like(inputs)
        op = cpu_step.AcOp(kind=cpu_step.KINDS[kind], a=inputs.data_ptr(), out=found.data_ptr(), alpha=1.0)
        op.size[:] = (1, 1, 1, len(inputs))
        op.stride_a[:] = op.stride_out[:] = (0, 0, 0, 1)
        made = cpu_step.program([op])
        cpu_step.run(made, 1)
        torch.testing.assert_close(found, function(inputs), rtol=3e-6, atol=2e-6, msg=kind)


def test_nan_is_not_hidden() -> None:
    model: Any = tiny_network("llama")
    decoder = LeanDecoder(model, capacity=8)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    assert decoder.step(torch.tensor([1])).isnan().any()
