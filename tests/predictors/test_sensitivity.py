"""Sensitivities against what they are defined as, computed the long way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from autocomp.errors import CapabilityError, SpaceError
from autocomp.predictors.grams import GramStore
from autocomp.predictors.sensitivity import (
    GRADIENT_METHODS,
    METHODS,
    activation_sensitivity,
    gradient_sensitivity,
    neighbourhood_sensitivity,
    sampled_loss,
)
from autocomp.profile import ProfileResult
from autocomp.profiling import Profiler
from autocomp.search_spaces.base import Part
from autocomp.search_spaces.weights import WeightSwapper
from autocomp.space import Candidate, Decision, Value
from autocomp.trial import Fidelity
from autocomp.worker import ModelWorker

MakeWorker = Callable[..., ModelWorker]
OPTIONS = ["w3g32", "w8", "w16"]


@pytest.fixture(params=["llama", "llama-tied", "gpt2", "opt"])
def worker(request: pytest.FixtureRequest, make_worker: MakeWorker) -> ModelWorker:
    tied = request.param != "llama"
    return make_worker(request.param, options=OPTIONS, **({"embeddings": ["w4g32", "w16"]} if tied else {}))


@pytest.fixture
def llama(make_worker: MakeWorker) -> ModelWorker:
    return make_worker("llama", options=OPTIONS)


def profile(worker: ModelWorker, kind: str, shard: int = 0, shards: int = 1, **more: Any) -> ProfileResult:
    request = {"kind": kind, "shard": shard, "shards": shards, **more}
    return ProfileResult.from_json(worker.profile(request))


def decisions(worker: ModelWorker) -> list[Decision]:
    return worker.decisions["bitwidths"]


def sequences(worker: ModelWorker) -> torch.Tensor:
    found: torch.Tensor = worker.built.state["splits"]["calibration"]
    return found


def weight_of(worker: ModelWorker, path: str) -> torch.nn.Parameter:
    found: torch.nn.Parameter = worker.built.model.get_submodule(path).weight
    return found


def change_of(worker: ModelWorker, path: str, label: Value) -> torch.Tensor:
    """W(label) - W as the module stores it (``Conv1D``: transposed)."""
    change = WeightSwapper.of(worker.built).move(path, "w16", str(label), "rtn")
    return change.T if type(worker.built.model.get_submodule(path)).__name__ == "Conv1D" else change


def gradients(worker: ModelWorker, path: str, ids: torch.Tensor, *, sampled: bool = False) -> torch.Tensor:
    """Gradient of the summed loss of one sequence by plain autograd: on its text, or on sampled labels."""
    weight = weight_of(worker, path)
    weight.requires_grad_(True)
    logits = worker.built.model(input_ids=ids[None], use_cache=False).logits
    text = F.cross_entropy(logits[0, :-1].float(), ids[1:], reduction="sum")
    loss = sampled_loss(logits, seed=int(ids.sum())) if sampled else text
    (found,) = torch.autograd.grad(loss, weight)
    weight.requires_grad_(False)
    return found.float()


def picked(worker: ModelWorker) -> list[Decision]:
    """A tied group, a single linear and the last decision (the embedding, where it is searched)."""
    found = decisions(worker)
    return [found[0], found[1], found[-1]]


def owned(worker: ModelWorker, decision: Decision) -> list[str]:
    return [p for p in decision.sites if not worker.built.site.part(p).shared_with]


def test_fisher_is_half_the_squared_gradients_times_the_squared_change(worker: ModelWorker) -> None:
    found, ids = profile(worker, "sensitivity:fisher"), sequences(worker)
    for decision in picked(worker):
        squares = {
            p: sum(gradients(worker, p, s, sampled=True).square() for s in ids)
            for p in owned(worker, decision)
        }
        for option in decision.options:
            cost = sum(float((g * change_of(worker, p, option).square()).sum()) for p, g in squares.items())
            n, total, _ = found.rows[decision.name][option]
            assert n == 4 and total / n == pytest.approx(0.5 * cost / ids.numel(), rel=1e-4, abs=1e-12)
        assert found.rows[decision.name]["w16"][1] == 0.0


def test_sampled_labels_give_the_fisher_information() -> None:
    """In the logits it is known: diag E[g g'] = p (1 - p)."""
    logits = (2 * torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))).requires_grad_(True)
    draws = 2000
    total = torch.zeros(1, 3, 5)
    for seed in range(draws):
        (slope,) = torch.autograd.grad(sampled_loss(logits, seed), logits)
        total += slope.square()
    p = logits.detach().softmax(-1)
    # Standard error of a mean of values in [0, 1]: at most 0.5 / sqrt(2000) = 0.011.
    torch.testing.assert_close(total / draws, p * (1 - p), rtol=0, atol=0.04)
    assert torch.equal(sampled_loss(logits, 1), sampled_loss(logits, 1))


def test_first_order_is_the_size_of_the_expected_change(worker: ModelWorker) -> None:
    found, ids = profile(worker, "sensitivity:first_order"), sequences(worker)
    for decision in picked(worker):
        for option in decision.options:
            samples = []
            for fold in range(4):
                mine = ids[fold::4]
                slopes = {p: sum(gradients(worker, p, s) for s in mine) for p in owned(worker, decision)}
                total = sum(float((g * change_of(worker, p, option)).sum()) for p, g in slopes.items())
                samples.append(abs(total) / mine.numel())
            n, total, squares = found.rows[decision.name][option]
            assert n == 4 and total == pytest.approx(sum(samples), rel=1e-3, abs=1e-7)
            assert squares == pytest.approx(sum(x * x for x in samples), rel=2e-3, abs=1e-9)


def test_activation_is_the_relative_output_error(worker: ModelWorker) -> None:
    found, ids, model = profile(worker, "sensitivity:activation"), sequences(worker), worker.built.model
    for decision in picked(worker):
        inputs: dict[str, torch.Tensor] = {}

        def keep(path: str, inputs: dict[str, torch.Tensor] = inputs) -> Callable[..., None]:
            return lambda module, args: inputs.__setitem__(path, args[0].detach())

        handles = [
            model.get_submodule(p).register_forward_pre_hook(keep(p)) for p in decision.sites
        ]  # fmt: skip
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        for option in decision.options:
            cost = 0.0
            for path in decision.sites:
                owner = worker.built.site.part(path).shared_with or path
                weight, change = weight_of(worker, owner).detach(), change_of(worker, owner, option)
                x = inputs[path]
                if worker.built.site.part(path).kind == "embedding":
                    cost += float(
                        F.embedding(x, change).square().sum() / F.embedding(x, weight).square().sum()
                    )
                elif type(model.get_submodule(path)).__name__ == "Conv1D":
                    cost += float((x @ change).square().sum() / (x @ weight).square().sum())
                else:
                    cost += float((x @ change.T).square().sum() / (x @ weight.T).square().sum())
            assert found.rows[decision.name][option][1] == pytest.approx(cost, rel=1e-3, abs=1e-12)


def test_measured_is_the_score_of_the_single_change(worker: ModelWorker) -> None:
    found = profile(worker, "sensitivity:measured")
    swapper = WeightSwapper.of(worker.built)
    level = Fidelity("any", "calibration", 8, timing=False)
    for decision in picked(worker):
        for option in decision.options:
            swapper.apply(dict.fromkeys(decision.sites, str(option)), method="rtn", serving=False)
            metrics, _ = worker.workload.score(worker.built, level)
            n, total, squares = found.rows[decision.name][option]
            assert n == 1 and total == pytest.approx(max(0.0, metrics["kl"].value), abs=1e-12)
            assert squares == total * total
    swapper.restore()


def test_costs_count_from_the_uncompressed_model_even_if_it_is_not_offered(make_worker: MakeWorker) -> None:
    whole, part = make_worker("llama", options=OPTIONS), make_worker("llama", options=["w3g32", "w8"])
    for method in METHODS:
        a, b = (profile(w, f"sensitivity:{method}") for w in (whole, part))
        for name, row in b.rows.items():
            for option, moments in row.items():
                assert moments == pytest.approx(a.rows[name][option], rel=1e-6), method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shards", [2, 4])
def test_shards_together_are_the_whole(llama: ModelWorker, method: str, shards: int) -> None:
    whole = profile(llama, f"sensitivity:{method}")
    parts = [profile(llama, f"sensitivity:{method}", i, shards) for i in range(shards)]
    merged = ProfileResult.merge(parts)
    assert merged.rows.keys() == whole.rows.keys()
    for name, row in whole.rows.items():
        for option, moments in row.items():
            assert merged.rows[name][option] == pytest.approx(moments, rel=1e-6), (name, option)


@pytest.mark.parametrize("kind", ["sensitivity:fisher", "neighbourhood"])
def test_more_shards_than_sequences_are_no_trouble(llama: ModelWorker, kind: str) -> None:
    more = {"candidate": candidate(llama).to_json()} if kind == "neighbourhood" else {}
    parts = [profile(llama, kind, i, 11, **more) for i in range(11)]
    table = ProfileResult.merge(parts).table("kl")
    assert all(math.isfinite(c) for row in table.costs.values() for c in row.values())


def test_the_noise_is_estimated_from_folds(llama: ModelWorker) -> None:
    for method in GRADIENT_METHODS:
        table = profile(llama, f"sensitivity:{method}").table("sensitivity")
        for decision in decisions(llama):
            assert table.stderr[decision.name]["w3g32"] > 0.0
            assert table.stderr[decision.name]["w3g32"] < table.costs[decision.name]["w3g32"]


def test_fisher_predicts_the_measured_divergence(llama: ModelWorker) -> None:
    """Second order around the uncompressed model, in the unit of the metric: right within a factor of
    a few at 3 bits, and in its ranking."""
    fisher = profile(llama, "sensitivity:fisher").table("s").costs
    measured = profile(llama, "sensitivity:measured").table("s").costs
    names = [d.name for d in decisions(llama)]
    ratios = [fisher[n]["w3g32"] / measured[n]["w3g32"] for n in names]
    assert all(0.2 < r < 8.0 for r in ratios)
    ranks = [sorted(names, key=lambda n: table[n]["w3g32"]) for table in (fisher, measured)]
    assert set(ranks[0][-3:]) & set(ranks[1][-3:])


# -- around a candidate ---------------------------------------------------------------------------------


def candidate(worker: ModelWorker) -> Candidate:
    found = decisions(worker)
    return Candidate.of({d.name: d.options[i % 2] for i, d in enumerate(found)})


def divergence_at(worker: ModelWorker) -> float:
    """KL in nats a token over the calibration sequences, of the model as it is, in float64 sums."""
    ids, total = sequences(worker), 0.0
    with torch.no_grad():
        for i in range(len(ids)):
            logits = worker.built.model(input_ids=ids[i : i + 1], use_cache=False).logits
            total += float(worker.workload.divergence(worker.built, "calibration", logits, i))  # type: ignore[attr-defined]
    return total / ids.numel()


def test_the_neighbourhood_of_a_candidate(worker: ModelWorker) -> None:
    at = candidate(worker)
    found = profile(worker, "neighbourhood", candidate=at.to_json())
    table = found.table("kl")
    for decision in decisions(worker):
        assert table.costs[decision.name][at[decision.name]] == 0.0, "staying is free"
    worker.apply(at, serving=False)
    assert table.costs["base"]["kl"] == pytest.approx(divergence_at(worker), rel=1e-4)
    worker.restore()


def test_the_first_order_term_is_the_slope_of_the_divergence(worker: ModelWorker) -> None:
    at, step = candidate(worker), 1e-2
    profile(worker, "neighbourhood", candidate=at.to_json())  # the uncompressed outputs are kept now
    for decision in picked(worker):
        worker.apply(at, serving=False)
        target = decision.options[-1]

        def tiny(
            part: Part, here: Value, there: Value, only: Decision = decision, goal: Value = target
        ) -> torch.Tensor | None:
            change = (
                Profiler(worker).move(part, here, goal) if part.path in only.sites and there == goal else None
            )
            return None if change is None else step * change

        local = neighbourhood_sensitivity(
            worker.built, sequences(worker), [decision], at.values, tiny,
            lambda logits, i: worker.workload.divergence(worker.built, "calibration", logits, i),  # type: ignore[attr-defined]
            positions=range(8),
        ).table("kl")  # fmt: skip
        ends = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for path in owned(worker, decision):
                    change = Profiler(worker).move(worker.built.site.part(path), at[decision.name], target)
                    assert change is not None
                    turned = type(worker.built.model.get_submodule(path)).__name__ == "Conv1D"
                    weight = weight_of(worker, path)
                    weight.data = weight.data + sign * step * (change.T if turned else change)
            ends.append(divergence_at(worker))
            worker.built.state["swapper"].restore()
            worker.apply(at, serving=False)
        slope = (ends[0] - ends[1]) / 2  # of the step taken
        # The second-order part of the profile is step**2 times a cost: not above a few percent here.
        assert local.costs[decision.name][target] == pytest.approx(slope, rel=0.1, abs=2e-5)
    worker.restore()


def test_the_neighbourhood_predicts_single_moves_better_than_the_origin(llama: ModelWorker) -> None:
    at = candidate(llama)
    local = profile(llama, "neighbourhood", candidate=at.to_json()).table("kl")
    origin = profile(llama, "sensitivity:fisher").table("kl")
    level = Fidelity("any", "calibration", 8, timing=False)

    def measured(where: Candidate) -> float:
        llama.apply(where, serving=False)
        return llama.workload.score(llama.built, level)[0]["kl"].value

    base, near, far = measured(at), 0.0, 0.0
    for decision in decisions(llama):
        here, there = at[decision.name], "w8" if at[decision.name] != "w8" else "w16"
        truth = measured(at.replace({decision.name: there})) - base
        near += (local.costs[decision.name][there] - truth) ** 2
        costs = origin.costs[decision.name]
        far += (costs[there] - costs[here] - truth) ** 2
    llama.restore()
    assert near < far


def test_with_compensated_rounding_the_candidate_stays_in_place(make_worker: MakeWorker) -> None:
    """The weights of the neighbours are made during the profile, which needs the original model at times;
    later sequences must still see the candidate."""
    fresh = make_worker("llama", options=["w2g32", "w4g32"], method="gptq")
    at = Candidate.of({d.name: "w2g32" for d in decisions(fresh)})
    fresh.built.state["bank"] = WeightSwapper.of(fresh.built).bank = type(fresh.built.state["bank"])()
    first = profile(fresh, "neighbourhood", candidate=at.to_json())
    again = profile(fresh, "neighbourhood", candidate=at.to_json())
    assert first.rows == again.rows


# -- side effects ---------------------------------------------------------------------------------------


@pytest.fixture
def untouched(worker: ModelWorker) -> Iterator[ModelWorker]:
    """Fails when flags, gradients, hooks or weights differ afterwards."""
    worker.restore()
    model = worker.built.model
    before = {n: (p.requires_grad, p.grad, p.detach().clone()) for n, p in model.named_parameters()}
    yield worker
    for name, parameter in model.named_parameters():
        flag, gradient, value = before[name]
        assert (parameter.requires_grad, parameter.grad) == (flag, gradient)
        assert torch.equal(parameter, value) and not parameter._post_accumulate_grad_hooks
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", [*(f"sensitivity:{m}" for m in METHODS), "neighbourhood"])
def test_the_model_is_as_before(untouched: ModelWorker, kind: str) -> None:
    profile(untouched, kind, candidate=candidate(untouched).to_json())
    untouched.restore()


def test_flags_come_back_after_a_failure(llama: ModelWorker) -> None:
    llama.restore()

    def broken(logits: torch.Tensor, index: int) -> torch.Tensor:
        raise MemoryError("out of memory")

    some = llama.built.model.get_submodule(decisions(llama)[0].sites[0]).weight
    some.requires_grad_(True)
    some.grad = torch.ones_like(some)
    with pytest.raises(MemoryError):
        neighbourhood_sensitivity(
            llama.built, sequences(llama), decisions(llama), candidate(llama).values,
            Profiler(llama).move, broken, positions=range(8),
        )  # fmt: skip
    assert some.requires_grad and torch.equal(some.grad, torch.ones_like(some))
    some.grad = None
    llama.built.model.requires_grad_(False)


def test_bfloat16_models_are_profiled_in_float32(make_worker: MakeWorker) -> None:
    half, full = (make_worker("llama", dtype, options=OPTIONS) for dtype in ("bfloat16", "float32"))
    for method in ("fisher", "activation", "measured"):  # first order: a difference of large terms
        a, b = (profile(w, f"sensitivity:{method}").table("s").costs for w in (half, full))
        for decision in decisions(half):
            # bfloat16 keeps 8 bits: forward and backward differ by a few percent, not by factors, but
            # some sampled labels differ.
            assert a[decision.name]["w3g32"] == pytest.approx(b[decision.name]["w3g32"], rel=0.3), method


def test_a_weight_that_no_sequence_reaches_costs_nothing(llama: ModelWorker) -> None:
    """An expert that got no tokens: no gradient, and inputs that are all zero."""
    model, site = llama.built.model, llama.built.site
    llama.restore()
    path = "model.layers.1.mlp.down_proj"
    real = model.get_submodule(path)

    class Idle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = real.weight, None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., :64] * 0.0

    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.down_proj = Idle()
    mine = [d for d in decisions(llama) if d.block == 1]
    try:
        for method in GRADIENT_METHODS:
            found = gradient_sensitivity(
                llama.built, sequences(llama), mine, Profiler(llama).delta, method=method
            )  # fmt: skip
            rows = {d.name: found.rows[d.name]["w3g32"][1] for d in mine}
            assert rows[f"bitwidths/{path}"] == 0.0 and sum(rows.values()) > 0.0
        mlp.down_proj = real
        gram = GramStore(llama.built, sequences(llama))
        assert gram("model.layers.0.mlp.down_proj").any()

        def nothing(path: str) -> torch.Tensor:
            return torch.zeros(site.part(path).shape[1], site.part(path).shape[1])

        idle = activation_sensitivity(llama.built, mine, Profiler(llama).delta, nothing)
        assert all(m[1] == 0.0 for row in idle.rows.values() for m in row.values())
    finally:
        mlp.down_proj = real


def test_unknown_profiles_are_refused(llama: ModelWorker) -> None:
    with pytest.raises(CapabilityError, match="unknown profile 'sensitivity:magic'"):
        profile(llama, "sensitivity:magic")
    with pytest.raises(SpaceError, match="no gradient method"):
        gradient_sensitivity(llama.built, sequences(llama), [], Profiler(llama).delta, method="measured")


# -- second moments of the inputs -------------------------------------------------------------------------


def test_grams_are_sums_over_every_token(worker: ModelWorker) -> None:
    worker.restore()
    ids, model = sequences(worker), worker.built.model
    store = GramStore(worker.built, ids)
    for part in (p for p in worker.built.site.parts if p.kind == "linear"):
        seen: list[torch.Tensor] = []
        module = model.get_submodule(part.path)
        handle = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))  # type: ignore[misc]
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        handle.remove()
        x = seen[0].flatten(0, -2).double()
        assert len(x) == ids.numel()
        torch.testing.assert_close(store(part.path).double(), x.T @ x, rtol=1e-4, atol=1e-4)
    embedding = next(p for p in worker.built.site.parts if p.kind == "embedding")
    counts = store(embedding.path)
    assert counts.shape == (300,) and counts.sum() == ids.numel()
    assert counts[int(ids[0, 0])] == (ids == ids[0, 0]).sum()


def test_grams_hold_few_matrices_and_share_them_within_a_tie(llama: ModelWorker) -> None:
    llama.restore()
    store = GramStore(llama.built, sequences(llama), max_bytes=3 * 4 * 64 * 64)
    at = "model.layers.0.self_attn"
    assert store(f"{at}.q_proj") is store(f"{at}.k_proj")
    assert 1 < len(store._grams) <= 3
    first = store(f"{at}.q_proj").clone()
    store("model.layers.1.mlp.down_proj")
    assert len(store._grams) == 1 and torch.equal(store(f"{at}.q_proj"), first)


def test_grams_of_a_compressed_model_are_refused(llama: ModelWorker) -> None:
    llama.apply(candidate(llama), serving=False)
    store = GramStore(llama.built, sequences(llama))
    with pytest.raises(SpaceError, match="restore it first"):
        store("model.layers.0.mlp.down_proj")
    llama.restore()
