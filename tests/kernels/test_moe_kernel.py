"""The experts' linear: routing, pools of mixed schemes, merged and pruned experts, and C."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autocomp.kernels import cpu_moe, native
from autocomp.kernels.experts import GroupedWeights, load_builtin
from autocomp.kernels.library import Implementation
from autocomp.kernels.moe import moe_grouped_linear
from autocomp.kernels.ops import random_weight
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor
from autocomp.testing.operators import CHECKS, Check, check_implementation, check_parity

load_builtin()
Weight = QuantizedTensor | torch.Tensor
MISSING = native.unavailable("moe")
needs_c = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
LAYOUTS = ["canonical", pytest.param("cpu", marks=needs_c)]
A8 = 1.2e-2
"""Relative error (Frobenius norm) that quantized activations may bring."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that spin while they wait make small operators slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mixed(labels: str, shape: tuple[int, int] = (24, 96)) -> list[Weight]:
    """Random experts, one a label; ``w16`` is bfloat16, ``w32`` float32."""
    made: list[Weight] = []
    for seed, label in enumerate(labels.split()):
        dense = {"w16": torch.bfloat16, "w32": torch.float32}.get(label)
        normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5
        made.append(normal.to(dense) if dense else random_weight(Scheme.parse(label), shape, seed=seed))
    return made


def dense(weight: Weight) -> torch.Tensor:
    return weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize()


def routed(tokens: int, top_k: int, experts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Different experts for a token, and weights that add up to 1."""
    made = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(experts, generator=made)[:top_k] for _ in range(tokens)])
    return chosen, torch.softmax(torch.randn(tokens, top_k, generator=made), dim=1)


def by_hand(
    x: torch.Tensor, expert: torch.Tensor, weights: list[Weight], place: list[int], route: torch.Tensor | None
) -> torch.Tensor:
    """One pair after the other, in float64."""
    tokens, top_k = expert.shape
    y = torch.zeros(tokens, top_k, len(dense(weights[0])), dtype=torch.float64)
    for t in range(tokens):
        for j in range(top_k):
            e = int(expert[t, j])
            if 0 <= e < len(place) and place[e] >= 0:
                row = x[t] if len(x) == tokens else x[t * top_k + j]
                y[t, j] = dense(weights[place[e]]).double() @ row.double()
    return y.flatten(0, 1) if route is None else (y * route.double().unsqueeze(2)).sum(1)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@needs_c
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_the_c_implementation(check: Check) -> None:
    check(moe_grouped_linear, "cpu", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_implementations_on_the_gpu() -> None:
    for implementation in moe_grouped_linear.implementations:
        if implementation.device_type == "cuda":
            check_implementation(moe_grouped_linear, implementation.name, "cuda")


def test_a_wrong_implementation_is_found_out() -> None:
    def unweighted(*args: torch.Tensor) -> torch.Tensor:  # forgets to weigh the experts
        ones = None if args[2] is None else torch.ones_like(args[2])
        y: torch.Tensor = moe_grouped_linear.reference(*args[:2], ones, *args[3:])
        return y

    former = list(moe_grouped_linear.implementations)
    moe_grouped_linear.register(Implementation("canonical", "cpu", unweighted))
    try:
        with pytest.raises(AssertionError, match="relative error"):
            check_parity(moe_grouped_linear, "canonical", "cpu")
    finally:
        moe_grouped_linear.implementations[:] = former


# ---- what it computes ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 6, 50])
@pytest.mark.parametrize("wide", [True, False], ids=["int64", "int32"])
def test_mixed_merged_and_pruned_experts(layout: str, tokens: int, wide: bool) -> None:
    weights = mixed("w4g32 w2g32a w3 w16 w8 w32 w6g64a w5g32")
    place = [3, 0, -1, 1, 2, 0, 5, 4, 6, 7]
    built = GroupedWeights.build(weights, place, layout=layout)
    expert, route = routed(tokens, 4, len(place), seed=tokens)
    expert = expert if wide else expert.int()
    assert built.layout == layout and len(set(built.bits)) == 7
    for per_pair in (False, True):
        x = torch.randn(tokens * (4 if per_pair else 1), 96, generator=torch.Generator().manual_seed(1))
        for weight in (None, route):
            y = built(x, expert, weight)
            bound = 1e-5 if layout == "canonical" else A8
            assert error(y, by_hand(x, expert, weights, place, weight)) < bound


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_without_tokens_and_all_tokens_to_one(layout: str) -> None:
    weights = mixed("w32 w32 w4g32")
    built = GroupedWeights.build(weights, layout=layout)
    x = torch.randn(80, 96, generator=torch.Generator().manual_seed(2))
    for tokens in (3, 80):  # in one call, and expert by expert
        for only in range(3):
            y = built(x[:tokens], torch.full((tokens, 1), only))
            assert error(y, x[:tokens] @ dense(weights[only]).T) < (A8 if only == 2 else 1e-5)
        nobody = built(x[:tokens], torch.full((tokens, 1), -1), torch.ones(tokens, 1))
        assert nobody.shape == (tokens, 24) and not nobody.any()
    assert built(x[:0], torch.empty(0, 2, dtype=torch.int64)).shape == (0, 24)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_number_that_is_no_expert_contributes_nothing(layout: str) -> None:
    """As in transformers, where the number of experts itself stands for an expert on another device."""
    built = GroupedWeights.build(mixed("w4g32 w32"), layout=layout)
    x, ones = torch.randn(2, 96), torch.ones(2, 2)
    for beside in (2, -1, 1 << 31, -(1 << 40)):
        expert = torch.tensor([[0, beside], [beside, 1]])
        alone = built(x, torch.tensor([[0], [1]]))
        torch.testing.assert_close(built(x, expert, ones), alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_experts_equal_copies(layout: str) -> None:
    weights = mixed("w4g32 w3 w16")
    merged = GroupedWeights.build(weights, [0, 1, 0, 2, 1], layout=layout)
    copies = GroupedWeights.build([weights[i] for i in (0, 1, 0, 2, 1)], layout=layout)
    x, (expert, route) = torch.randn(9, 96).bfloat16(), routed(9, 2, 5)
    assert torch.equal(merged(x, expert, route), copies(x, expert, route))
    spared = GroupedWeights.build(weights[:2], layout=layout)
    assert copies.nbytes - merged.nbytes == spared.nbytes - spared.remap.nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [4, 70])
def test_the_order_of_experts_and_of_classes_is_free(layout: str, tokens: int) -> None:
    weights = mixed("w4g32 w32 w2g32 w4g32 w8")
    order = [4, 2, 0, 3, 1]
    x, (expert, route) = torch.randn(tokens, 96), routed(tokens, 2, 5)
    former = GroupedWeights.build(weights, layout=layout)(x, expert, route)
    moved = GroupedWeights.build([weights[i] for i in order], layout=layout)
    where = torch.tensor([order.index(e) for e in range(5)])
    torch.testing.assert_close(moved(x, where[expert], route), former, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_it_replaces_the_experts_of_mixtral(layout: str, tokens: int) -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=48, intermediate_size=40, num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    x, (expert, route) = torch.randn(tokens, 48), routed(tokens, 2, 4)
    with torch.inference_mode():
        gate_up = GroupedWeights.build(list(experts.gate_up_proj.unbind()), layout=layout)
        down = GroupedWeights.build(list(experts.down_proj.unbind()), layout=layout)
        gate, up = gate_up(x, expert).chunk(2, dim=-1)
        y = down(experts.act_fn(gate) * up, expert, route)
        torch.testing.assert_close(y, experts(x, expert, route), rtol=1e-4, atol=1e-5)


# ---- C: both paths, threads, memory ----


@needs_c
def test_one_call_and_expert_by_expert_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    built = GroupedWeights.build(mixed("w4g32a w3g64 w16 w8 w32", (40, 200)), [0, 1, 2, -1, 3, 4, 0])
    x, (expert, route) = torch.randn(21, 200), routed(21, 3, 7)
    results = []
    for limit in (1, 1 << 30):
        monkeypatch.setattr(cpu_moe, "MANY_DENSE", limit)
        results.append(built(x, expert, route))
    assert error(*results) < A8


@needs_c
def test_the_number_of_threads_changes_nothing() -> None:
    built = GroupedWeights.build(mixed("w4g32a w3g64 w32 w8", (72, 200)))
    x, (expert, route) = torch.randn(7, 200).bfloat16(), routed(7, 2, 4)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(built(x, expert, route))
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_c
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_c_writes_nothing_beside_its_result(
    weighted: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = GroupedWeights.build(mixed("w4g32a w3 w16", (37, 100)), [0, 1, -1, 2])
    x, (expert, route) = torch.randn(5, 100).to(dtype), routed(5, 3, 4)
    kept = []

    def guarded(like: torch.Tensor, *shape: int) -> torch.Tensor:
        whole = torch.full((shape[0] * shape[1] + 256,), 7.0, dtype=like.dtype)
        kept.append(whole)
        return whole[128:-128].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    built(x, expert, route if weighted else None)
    (whole,) = kept
    assert bool((whole[:128] == 7).all()) and bool((whole[-128:] == 7).all())
    assert not bool((whole[128:-128] == 7).any())


@needs_c
def test_c_refuses_a_place_that_is_not_there() -> None:
    built = GroupedWeights.build(mixed("w4g32 w4g32"))
    built.remap[0, 1] = 2
    with pytest.raises(ValueError, match="a place that its pool does not have"):
        built(torch.randn(1, 96), torch.tensor([[1]]))


@needs_c
def test_only_rows_of_a_nan_are_nan() -> None:
    built = GroupedWeights.build(mixed("w4g32 w3"))
    x = torch.randn(6, 96)
    x[2, 50] = torch.nan
    y = built(x, torch.tensor([[0], [1], [0], [0], [1], [0]]))
    assert y.isnan().any(1).tolist() == [False, False, True, False, False, False]


# ---- the weights, and the operator ----


def test_bytes_that_are_held() -> None:
    built = GroupedWeights.build(mixed("w4g32 w4g32 w4g32a w16"), layout="canonical")
    packed, scale = 24 * 96 // 2, 24 * 3 * 2
    assert built.nbytes == 3 * (packed + scale) + 24 * 3 + 24 * 96 * 2 + 4 * 4 * 3
    assert built.remap.tolist() == [[0, 1, -1, -1], [-1, -1, 0, -1], [-1, -1, -1, 0]]


@needs_c
@pytest.mark.parametrize("labels", ["w4g32 w3", "w4g32 w16"])
def test_groups_that_c_can_not_take_fall_back(labels: str) -> None:
    assert GroupedWeights.build(mixed(labels)).layout == "cpu"
    built = GroupedWeights.build(mixed(labels + " w4g24"))
    assert built.layout == "canonical"
    x, expert = torch.randn(2, 96), torch.tensor([[2, 0], [1, 2]])
    wanted = by_hand(x, expert, mixed(labels + " w4g24"), [0, 1, 2], None)
    assert error(built(x, expert), wanted) < 1e-5


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: GroupedWeights.build([]), "need one shape"),
    (lambda: GroupedWeights.build([torch.ones(2, 3), torch.ones(2, 4)]), "need one shape"),
    (lambda: GroupedWeights.build(mixed("w4g32o1")), "can't have outliers"),
    (lambda: GroupedWeights.build(mixed("w16"), [0, 1]), "places must be -1 .pruned. to 0; got .1."),
    (lambda: GroupedWeights.build(mixed("w16"), layout="tape"), "no layout 'tape'"),
    (lambda: GroupedWeights.build(mixed("w4g24"), layout="cpu"), "multiples of 32|C kernels"),
]


@pytest.mark.parametrize("build, message", WRONG, ids=[m[:20] for _, m in WRONG])
def test_wrong_weights_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def operands(built: GroupedWeights) -> dict[str, object]:
    lists = {name: list(getattr(built, name)) for name in ("codes", "scale", "zero", "bits", "group")}
    return {"remap": built.remap, **lists, "rows": built.shape[0], "layout": built.layout}


BAD: list[tuple[str, object, str]] = [
    ("x", torch.ones(2, 3, 4), "x must be .T, K. or"),
    ("x", torch.ones(5, 96), "a row a token or a row a pair of expert .3, 2.; got 5 rows"),
    ("expert", torch.ones(3, 2), "expert must be int32 or int64"),
    ("route_weight", torch.ones(3, 1), "route_weight must be float .3, 2. or None"),
    ("remap", torch.zeros(1, 2, dtype=torch.int32), "remap must be int32 .2 classes"),
    ("bits", [4], "one entry a class; got .2, 2, 2, 1, 2."),
    ("bits", [4, 9], "bits 1 to 8, or 16"),
    ("rows", 23, "codes of 4 bits must be int32 .P, 23, 12.; got int32 .1, 24, 12."),
    ("zero", [torch.ones(1), torch.ones(0)], "zero must be uint8"),
    ("scale", [torch.ones(1, 24, 2), torch.ones(0)], "scale must be float .1, 24, 3. for groups of 32"),
    ("layout", "tape", "packed as 'tape', which can't run here"),
]


@pytest.mark.parametrize("name, value, message", BAD, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BAD)])
def test_wrong_arguments_are_refused(name: str, value: object, message: str) -> None:
    built = GroupedWeights.build(mixed("w4g32 w16"), layout="canonical")
    given = {"x": torch.ones(3, 96), "expert": torch.zeros(3, 2, dtype=torch.int64), "route_weight": None}
    with pytest.raises(ValueError, match=message):
        moe_grouped_linear(**{**given, **operands(built), name: value})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_torch_accepts_the_operator(layout: str, weighted: bool) -> None:
    built = GroupedWeights.build(mixed("w4g32 w3 w16"), layout=layout)
    expert, route = routed(4, 2, 3)
    args = (torch.randn(4, 96), expert, route if weighted else None, *operands(built).values())
    torch.library.opcheck(torch.ops.autocomp.moe_grouped_linear.default, args)
    with FakeTensorMode() as mode:

        def faked(value: object) -> object:
            if isinstance(value, list):
                return [faked(item) for item in value]
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        fake = moe_grouped_linear(*(faked(a) for a in args))
    assert fake.shape == moe_grouped_linear(*args).shape == ((4, 24) if weighted else (8, 24))
