from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autocomp.errors import CapabilityError, JobError
from autocomp.testing.models import tiny_network
from autocomp.workloads.causal_lm import CausalLM
from autocomp.workloads.serving import Server, cpu_threads, measure

Folder = Callable[[str], Path]
TOKENS = torch.arange(2 * 40).view(2, 40)


def server(model: Any, **changes: int) -> Server:
    return Server(model, TOKENS, **{"prompt": 24, "context": 16, "steps": 4, **changes})


def test_the_workload_times_its_scenario(tiny: Folder, prose: list[str]) -> None:
    scenario = {
        "prompt_tokens": 16, "context_tokens": 24, "decode_tokens": 4, "repeats": 2, "batch": 2, "threads": 1,
    }  # fmt: skip
    data = {"text": prose, "sequence_length": 8, "calibration": 2, "proxy": 1, "selection": 1, "report": 1}
    config = {"model": str(tiny("llama")), "data": data, "scenario": scenario}
    work = CausalLM(CausalLM.Config.model_validate(config))
    built = work.load("cpu")
    before = torch.get_num_threads()
    metrics, details = work.time(built)
    assert set(metrics) == set(work.timing_metrics)
    assert torch.get_num_threads() == before and details["threads"] == 1
    assert all(e.value > 0 and math.isfinite(e.stderr) for e in metrics.values())
    weights = sum(p.numel() * p.element_size() for p in built.model.parameters()) / 1e6
    assert metrics["peak_mb"].value >= weights
    assert details["generate_ms"] > 0 and "generate_error" not in details
    assert details["prefill_logits"] == "last"
    rewinds = {"lean": "position", "eager": "crop"}
    assert details["decode"]["rewind"] == rewinds[details["decode"]["runtime"]]


def _workload(tiny: Folder, prose: list[str], kind: str, runtime: str) -> tuple[CausalLM, Any]:
    scenario = {
        "prompt_tokens": 16, "context_tokens": 24, "decode_tokens": 4, "repeats": 2, "threads": 1,
        "runtime": runtime,
    }  # fmt: skip
    data = {"text": prose, "sequence_length": 8, "calibration": 2, "proxy": 1, "selection": 1, "report": 1}
    config = {"model": str(tiny(kind)), "data": data, "scenario": scenario}
    work = CausalLM(CausalLM.Config.model_validate(config))
    return work, work.load("cpu")


def test_the_runtime_can_be_chosen(tiny: Folder, prose: list[str]) -> None:
    work, built = _workload(tiny, prose, "llama", "eager")
    assert work.runtime(built) == ("eager", "the job asks for the eager loop")
    _, details = work.time(built, thorough=False)
    assert details["decode"]["runtime"] == "eager" and "asks for" in details["why_eager"]


def test_a_model_that_cannot_be_recorded_is_timed_eagerly_and_says_why(
    tiny: Folder, prose: list[str]
) -> None:
    work, built = _workload(tiny, prose, "llama", "auto")
    layer: Any = built.model.get_submodule("model.layers.0")
    plain = layer.mlp.forward
    layer.mlp.forward = lambda x: plain(x) if float(x.sum()) < 1e9 else x
    runtime, reason = work.runtime(built)
    assert runtime == "eager" and "decides by a value" in reason
    _, details = work.time(built, thorough=False)
    assert details["why_eager"] == reason
    insisting, other = _workload(tiny, prose, "llama", "lean")
    other.model.get_submodule("model.layers.0").mlp.forward = layer.mlp.forward
    with pytest.raises(JobError, match="runtime: lean is not possible here: Python decides by a value"):
        insisting.runtime(other)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mixtral"])
def test_decode_continues_the_context_and_rewinds(kind: str) -> None:
    """What a decode step computes after two rewinds equals the uncached forward pass at that position."""
    model: Any = tiny_network(kind)
    served = server(model)
    logits = []
    with torch.inference_mode():
        served.prepare_decode()
        assert served.rewinding == "crop"
        handle = model.register_forward_hook(lambda *call: logits.append(call[-1].logits[:, -1]))
        served.decode()
        served.decode()
        handle.remove()
        expected = model(TOKENS[:, :20]).logits[:, 16:20]
    assert len(logits) == 8
    for i, found in enumerate(logits):
        torch.testing.assert_close(found, expected[:, i % 4], rtol=1e-3, atol=1e-4)


def test_full_sliding_windows_are_copied_instead_of_cropped() -> None:
    model: Any = tiny_network("gemma2")
    model.config.sliding_window = 8
    assert model.config.layer_types[0] == "sliding_attention"
    served = server(model)
    seen: list[int] = []
    with torch.inference_mode():
        served.prepare_decode()
        assert served.rewinding == "copy"
        handle = model.register_forward_hook(
            lambda *call: seen.append(call[-1].past_key_values.get_seq_length())
        )
        served.decode()
        served.decode()
        handle.remove()
    assert seen == [17, 18, 19, 20] * 2


def test_prefill_computes_the_last_logits_only() -> None:
    model: Any = tiny_network("llama")
    shapes: list[tuple[int, ...]] = []
    handle = model.register_forward_hook(lambda *call: shapes.append(tuple(call[-1].logits.shape)))
    with torch.inference_mode():
        server(model).prefill()
    handle.remove()
    assert shapes == [(2, 1, 300)]


def test_a_model_without_a_cache_is_refused() -> None:
    model: Any = tiny_network("llama")
    forward = model.forward
    model.forward = lambda **kwargs: forward(**{**kwargs, "use_cache": False})
    with (
        torch.inference_mode(),
        pytest.raises(CapabilityError, match="LlamaForCausalLM returns no key/value"),
    ):
        server(model).prepare_decode()


def test_a_failing_generate_does_not_fail_the_measurement() -> None:
    model: Any = tiny_network("llama")

    def broken(**kwargs: object) -> None:
        raise ValueError("no generation here")

    model.generate = broken
    metrics, details = measure(server(model), repeats=2, threads=0, device="cpu")
    assert details["generate_ms"] is None and details["generate_error"] == "ValueError: no generation here"
    assert metrics["decode_ms"].value > 0


def test_a_failing_forward_restores_the_threads() -> None:
    model: Any = tiny_network("llama")
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="boom"), cpu_threads(before + 1) as count:
        assert count == before + 1 == torch.get_num_threads()
        model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
        server(model).prefill()
    assert torch.get_num_threads() == before
