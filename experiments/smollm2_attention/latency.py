"""Decode latency and cache memory of attention plans on this machine, beside dense attention.

    python experiments/smollm2_attention/latency.py --plan NAME=PLAN.json ... --out latency.json

Attention alone: one token through all layers' attention over caches of N tokens, ours (the operator
`decode_attention_cache` over the plan's rings) beside torch's SDPA and beside two batched products over
transformers' dense layout. Whole model: a token of the lean decode path, and of transformers' eager loop with
its own cache. Memory: bytes of the cache's tensors, and what the process grew by when they were filled.
Caches are filled with random numbers: what they hold doesn't matter to the time. All variants are timed in
turns.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from autocomp.attention import runtime
from autocomp.attention.cache import new_cache
from autocomp.attention.plan import AttentionPlan, Keep, LayerPlan, uniform
from autocomp.attention.ring import Ring
from autocomp.measure.device import conditions, device_name, software_versions
from autocomp.serving import LeanDecoder
from autocomp.workloads import checkpoint

MODEL = "models/SmolLM2-135M-Instruct"


# What is freed goes back to the system at once, so that the process shrinks by it (glibc's M_MMAP_THRESHOLD).
ctypes.CDLL(None).mallopt(-3, 1 << 16)


def resident() -> int:
    """Bytes of physical memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def in_turns(calls: dict[str, Callable[[], None]], seconds: float) -> dict[str, dict[str, float]]:
    """Median and quartiles (ms) of every call, taken one after another in rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds * len(calls) or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    found = {}
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        found[name] = {"ms": middle, "q1": low, "q3": high, "n": len(taken)}
    return found


def rings_of(plan: AttentionPlan, heads: int, dim: int, tokens: int) -> list[Ring]:
    """Filled rings of every layer."""
    rings = []
    for layer in plan.layers.values():
        ring = Ring(
            layer, heads=heads, dim=dim, batch=1, tokens=tokens, capacity=tokens + 1, dtype=torch.bfloat16
        )
        k, v = (torch.randn(1, len(layer.rules), tokens, dim, dtype=torch.bfloat16) for _ in range(2))
        ring.fill(k, v)
        rings.append(ring)
    return rings


def attention_calls(
    plans: dict[str, AttentionPlan], heads: int, dim: int, tokens: int
) -> tuple[dict[str, Callable[[], None]], dict[str, dict[str, float]]]:
    """One token's attention through all layers, by name; and the memory of each."""
    calls: dict[str, Callable[[], None]] = {}
    memory: dict[str, dict[str, float]] = {}
    q = torch.randn(1, heads, 1, dim, dtype=torch.bfloat16)
    layers = next(iter(plans.values())).layers
    groups, scale = len(layers[0].rules), dim**-0.5
    before = resident()
    dense = [torch.randn(2, 1, groups, tokens, dim, dtype=torch.bfloat16) for _ in layers]
    memory["transformers, dense bf16"] = {
        "tensors_mb": sum(t.nbytes for t in dense) / 1e6, "process_mb": (resident() - before) / 1e6,
    }  # fmt: skip

    def sdpa() -> None:
        for k, v in dense:
            F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)

    def products() -> None:
        for k, v in dense:
            rows = q.view(1, groups, heads // groups, dim)
            ((rows @ k.transpose(-1, -2) * scale).float().softmax(-1).to(q.dtype) @ v).view(1, heads, 1, dim)

    calls["sdpa, dense bf16"], calls["two products, dense bf16"] = sdpa, products
    for name, plan in plans.items():
        before = resident()
        rings = rings_of(plan, heads, dim, tokens)
        memory[name] = {
            "tensors_mb": sum(r.nbytes for r in rings) / 1e6, "process_mb": (resident() - before) / 1e6,
        }  # fmt: skip
        calls[name] = lambda rings=rings: [ring.attend(q, scale) for ring in rings]  # type: ignore[misc]
    return calls, memory


def model_calls(model: Any, plans: dict[str, AttentionPlan], tokens: int, steps: int) -> dict[str, Any]:
    """``steps`` decode steps after ``tokens`` tokens, by name."""
    calls: dict[str, Any] = {}
    ids = torch.randint(10, 40_000, (1, tokens))
    for name, plan in plans.items():
        if plan.plain:
            runtime.remove(model)
        else:
            runtime.install(model, plan)
        decoder = LeanDecoder(model, capacity=tokens + steps, verify=False)
        decoder.load_cache(_filled(model, tokens), tokens)

        def run(decoder: LeanDecoder = decoder) -> None:
            for i in range(steps):
                decoder.step(ids[:, i])
            decoder.rewind(tokens, exact=False)

        calls[f"lean, {name}"] = run
    runtime.remove(model)
    cache = _filled(model, tokens)

    def eager() -> None:
        with torch.inference_mode():
            for i in range(steps):
                model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache.crop(tokens - cache.get_seq_length())

    calls["transformers, dense bf16"] = eager
    return calls


def _filled(model: Any, tokens: int) -> Any:
    """The cache that the model as it is would have after a prompt, with random contents."""
    config, cache = model.config, new_cache(model) or DynamicCache(config=model.config)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    for index in range(config.num_hidden_layers):
        k, v = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(2))
        marked, _ = cache.update(k, v, index)
        layer = getattr(marked, "autocomp_layer", None)
        if layer is not None:
            ring = Ring(
                layer.plan, heads=config.num_attention_heads, dim=config.head_dim, batch=1, tokens=tokens,
                capacity=tokens + 1, dtype=k.dtype,
            )  # fmt: skip
            ring.fill(k, v)
            layer.ring = ring
    return cache


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", nargs="*", default=[], help="NAME=FILE, FILE from pick.py")
    parser.add_argument("--contexts", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("latency.json"))
    args = parser.parse_args()
    model = checkpoint.load_model(checkpoint.locate(MODEL), "auto")
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    layers = range(config.num_hidden_layers)
    plans = {"ours, dense bf16": uniform(layers, groups, Keep())}
    for item in args.plan:
        name, _, file = item.partition("=")
        plan = AttentionPlan.from_json(json.loads(Path(file).read_text()))
        plans[name] = plan
        plans[f"{name}, k8v4"] = AttentionPlan(
            {i: LayerPlan(layer.rules, 8, 4, layer.window) for i, layer in plan.layers.items()}
        )
    result: dict[str, Any] = {
        "machine": device_name("cpu", torch.get_num_threads()), "versions": software_versions(),
        "conditions": conditions("cpu", torch.get_num_threads()), "contexts": {},
    }  # fmt: skip
    for tokens in args.contexts:
        with torch.inference_mode():
            calls, memory = attention_calls(plans, heads, config.head_dim, tokens)
            attention = in_turns(calls, args.seconds)
            del calls
        steps = 8
        whole = in_turns(model_calls(model, plans, tokens, steps), args.seconds)
        for row in whole.values():
            row.update({key: row[key] / steps for key in ("ms", "q1", "q3")})
        density = {name: plan.density(tokens) for name, plan in plans.items()}
        result["contexts"][tokens] = {
            "attention": attention, "model": whole, "memory": memory, "density": density,
        }  # fmt: skip
        print(json.dumps(result["contexts"][tokens], indent=1), flush=True)
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
