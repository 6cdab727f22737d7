"""Swapping weights: exact originals back from any state, exact values in, failures undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autocomp.errors import SpaceError
from autocomp.kernels.modules import PackedEmbedding, PackedLinear
from autocomp.quantize.bank import LayerBank
from autocomp.quantize.rounding import quantize
from autocomp.quantize.scheme import Scheme
from autocomp.search_spaces import weights as weights_module
from autocomp.search_spaces.weights import WeightSwapper
from autocomp.worker import ModelWorker
from autocomp.workloads.base import Built

MakeWorker = Callable[..., ModelWorker]
KINDS = ["llama", "llama-tied", "gpt2", "gpt_neox", "opt", "qwen3", "gemma2"]


@pytest.fixture
def built(make_worker: MakeWorker, request: pytest.FixtureRequest) -> Built:
    return make_worker(getattr(request, "param", "llama")).built


def swapper(built: Built, bank: LayerBank | None = None, **options: Any) -> WeightSwapper:
    return WeightSwapper(built, LayerBank() if bank is None else bank, **options)


def paths(built: Built) -> list[str]:
    return [p.path for p in built.site.parts if p.kind in ("linear", "embedding")]


def snapshot(built: Built) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in built.model.state_dict().items()}


def changed(built: Built, before: dict[str, torch.Tensor]) -> list[str]:
    """Names of weights and buffers that are not as they were, bit for bit."""
    now = built.model.state_dict()
    return [
        n for n in {*now, *before} if n not in now or n not in before or not torch.equal(now[n], before[n])
    ]


def with_borrowers(built: Built, labels: dict[str, str]) -> dict[str, str]:
    """A borrowed weight gets its owner's label, as decisions give it."""
    found = {p: label for p, label in labels.items() if not built.site.part(p).shared_with}
    borrowers = [p for p in built.site.parts if p.shared_with in found]
    return found | {p.path: found[p.shared_with] for p in borrowers}


def ids(built: Built) -> torch.Tensor:
    found: torch.Tensor = built.state["splits"]["report"][:2]
    return found


@torch.inference_mode()
def logits(built: Built) -> torch.Tensor:
    found: torch.Tensor = built.model(input_ids=ids(built), use_cache=False).logits
    return found.float()


@pytest.mark.parametrize("built", ["llama", "llama-tied", "gpt2"], indirect=True)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sequence_of_states_leads_back_to_the_original_bits(built: Built, data: st.DataObject) -> None:
    labels = st.dictionaries(st.sampled_from(paths(built)), st.sampled_from(["w3g32", "w4g32a", "w8", "w16"]))
    step = st.tuples(labels, st.sampled_from(["rtn", "mse"]), st.booleans(), st.booleans())
    steps = data.draw(st.lists(step, min_size=1, max_size=4))
    before, modules = snapshot(built), dict(built.model.named_modules())
    swap = swapper(built)
    for wanted, method, serving, restore in steps:
        swap.apply(with_borrowers(built, wanted), method=method, serving=serving)
        if restore:
            swap.restore()
    swap.restore()
    assert not changed(built, before)
    assert dict(built.model.named_modules()) == modules, "not the original modules"
    assert built.pristine and swap.labels == {}


@pytest.mark.parametrize("built", ["llama", "gpt2"], indirect=True)
@pytest.mark.parametrize("label", ["w2g16a", "w3g32o0.5", "w4g32", "w8"])
def test_scoring_weights_are_the_dequantized_ones(built: Built, label: str) -> None:
    swap = swapper(built)
    part = next(p for p in built.site.parts if p.role == "body")
    swap.apply({part.path: label}, method="rtn", serving=False)
    module = built.model.get_submodule(part.path)
    original = built.originals[part.path]
    turned = type(module).__name__ == "Conv1D"
    wanted = quantize(original.T if turned else original, Scheme.parse(label)).dequantize(torch.float32)
    found = module.weight.T if turned else module.weight
    assert wanted.shape == part.shape
    assert torch.equal(found, wanted) and not torch.equal(found, original.T if turned else original)
    swap.restore()


def test_scoring_weights_of_a_bfloat16_model_are_rounded_once(make_worker: MakeWorker) -> None:
    built = make_worker("llama", "bfloat16").built
    swap = swapper(built)
    path = next(p.path for p in built.site.parts if p.role == "body")
    swap.apply({path: "w4g32"}, method="rtn", serving=False)
    found = built.model.get_submodule(path).weight
    wanted = quantize(built.originals[path].float(), Scheme.parse("w4g32")).dequantize(torch.float32)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted.bfloat16())
    swap.restore()


@pytest.mark.parametrize("built", KINDS, indirect=True)
def test_serving_computes_what_was_scored(built: Built) -> None:
    swap = swapper(built)
    cycle = ["w4g32", "w3g32", "w8", "w16", "w4g32a"]
    labels = {p: cycle[i % 5] for i, p in enumerate(paths(built))}
    for part in built.site.parts:
        if part.kind == "embedding" or part.shared_with:
            labels[part.path] = "w8"
    swap.apply(labels, method="rtn", serving=False)
    scored = logits(built)
    swap.apply(labels, method="rtn", serving=True)
    assert isinstance(built.model.get_submodule(paths(built)[1]), PackedLinear)
    served = logits(built)
    swap.restore()
    # Native kernels round activations to bfloat16 (8 bits of mantissa, 2**-9 a value); the errors of a
    # hidden width of 64 over two layers stay within a few times that, far below those of the weights.
    spread = float(scored.std())
    assert float((served - scored).pow(2).mean().sqrt()) < 0.02 * spread
    assert float((logits(built) - scored).pow(2).mean().sqrt()) > 0.02 * spread


@pytest.mark.parametrize("built", ["llama-tied", "qwen3", "gpt2"], indirect=True)
def test_a_tied_head_shares_the_packed_weight(built: Built) -> None:
    head = next(p for p in built.site.parts if p.shared_with)
    labels = {head.shared_with: "w8", head.path: "w8"}
    swap = swapper(built)
    swap.apply(labels, method="rtn", serving=False)
    weights = [built.model.get_submodule(p).weight for p in labels]
    assert weights[0] is weights[1] and not torch.equal(weights[0], built.originals[head.path])
    swap.apply(labels, method="rtn", serving=True)
    embedding = built.model.get_submodule(head.shared_with)
    packed = built.model.get_submodule(head.path)
    assert isinstance(embedding, PackedEmbedding) and isinstance(packed, PackedLinear)
    rows = embedding(torch.arange(head.shape[0]))
    exact = quantize(built.originals[head.path], Scheme.parse("w8")).dequantize(torch.float32)
    assert torch.equal(rows, exact)
    swap.restore()
    assert built.model.get_submodule(head.path).weight is built.model.get_submodule(head.shared_with).weight


@pytest.mark.parametrize("serving", [True, False])
def test_a_failure_half_way_leaves_nothing_behind(
    built: Built, serving: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, modules = snapshot(built), dict(built.model.named_modules())
    swap = swapper(built)
    labels = dict.fromkeys([p.path for p in built.site.parts if p.role == "body"], "w4g32")
    calls = 0

    def third_fails(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise MemoryError("out of memory")
            return real(*args, **options)

        return call

    if serving:
        monkeypatch.setattr(weights_module, "PackedLinear", third_fails(PackedLinear))
    else:
        monkeypatch.setattr(WeightSwapper, "_set_dense", third_fails(WeightSwapper._set_dense))
    with pytest.raises(MemoryError):
        swap.apply(labels, method="rtn", serving=serving)
    assert not built.pristine, "a half-swapped model must not pass for the original"
    monkeypatch.undo()
    swap.restore()
    assert not changed(built, before) and dict(built.model.named_modules()) == modules
    assert built.pristine


def test_another_method_replaces_the_weights(built: Built) -> None:
    swap = swapper(built)
    path = next(p.path for p in built.site.parts if p.role == "body")
    swap.apply({path: "w3g32"}, method="rtn", serving=False)
    plain = built.model.get_submodule(path).weight.clone()
    swap.apply({path: "w3g32"}, method="mse", serving=False)
    assert not torch.equal(built.model.get_submodule(path).weight, plain)
    swap.restore()


def test_the_bank_of_the_state_is_used_even_when_it_is_empty(built: Built) -> None:
    bank = LayerBank()
    other = Built(built.model, built.site, built.device, built.originals, {"bank": bank})
    assert WeightSwapper.of(other).bank is bank
    assert WeightSwapper.of(other) is WeightSwapper.of(other)


def test_move_is_the_difference_of_two_options(built: Built) -> None:
    swap = swapper(built)
    path = next(p.path for p in built.site.parts if p.role == "body")
    there = quantize(built.originals[path], Scheme.parse("w3g32")).dequantize(torch.float32)
    here = quantize(built.originals[path], Scheme.parse("w8")).dequantize(torch.float32)
    assert torch.equal(swap.move(path, "w8", "w3g32", "rtn"), there - here)
    assert torch.equal(swap.move(path, "w16", "w3g32", "rtn"), there - built.originals[path])


def test_asking_for_an_entry_leaves_the_model_as_it_is(make_worker: MakeWorker) -> None:
    """Error-compensated rounding restores the model for its calibration pass; a profile of a compressed
    model that asks for such weights in between must find its model again."""
    built = make_worker("llama").built
    gram, first = built.state["hessian"], next(p for p in built.site.parts if p.role == "body")
    seen: list[bool] = []

    def hessian(path: str) -> torch.Tensor:
        seen.append(bool(torch.equal(first_weight(), built.originals[first.path])))
        found: torch.Tensor = gram(path)
        return found

    def first_weight() -> torch.Tensor:
        found: torch.Tensor = built.model.get_submodule(first.path).weight
        return found

    swap = swapper(built, hessian=hessian)
    swap.apply({first.path: "w3g32"}, method="gptq", serving=False)
    compressed = first_weight().clone()
    swap.move(built.site.parts[-2].path, "w4g32", "w8", "gptq")
    assert seen == [True] * len(seen) and len(seen) == 3
    assert torch.equal(first_weight(), compressed) and not built.pristine
    swap.restore()


def test_compensated_rounding_without_calibration_data_says_what_to_do(built: Built) -> None:
    path = next(p.path for p in built.site.parts if p.role == "body")
    with pytest.raises(SpaceError, match="method: mse"):
        swapper(built).quantized(path, "w4g32", "gptq")


def test_an_embedding_takes_the_clipped_rounding(make_worker: MakeWorker) -> None:
    built = make_worker("llama-tied").built
    path = next(p.path for p in built.site.parts if p.role == "embedding")
    bank = LayerBank()
    found = swapper(built, bank).quantized(path, "w3g32", "gptq")
    clipped = quantize(built.originals[path], Scheme.parse("w3g32"), method="mse")
    assert torch.equal(found.dequantize(), clipped.dequantize())
