"""The worker's methods on tiny models: what it promises the driver, and what it does with bad luck."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from autocomp import worker as worker_module
from autocomp.description import Description
from autocomp.errors import CapabilityError, ExportError, JobError, SpaceError
from autocomp.history import timing_only
from autocomp.job import Job
from autocomp.predictors.latency import operation_keys
from autocomp.profile import ProfileResult, mean
from autocomp.search_spaces import weights as weights_module
from autocomp.search_spaces.weights import WeightSwapper
from autocomp.trial import Estimate, Fidelity
from autocomp.worker import ModelWorker, open_worker

MakeJob = Callable[..., dict[str, Any]]
MakeWorker = Callable[..., ModelWorker]
PROXY = asdict(Fidelity("proxy", "proxy"))
QUALITY_ONLY = asdict(Fidelity("proxy", "proxy", timing=False))


@pytest.fixture
def llama(make_worker: MakeWorker) -> ModelWorker:
    return make_worker("llama")


def described(worker: ModelWorker) -> Description:
    return Description.from_json(json.loads(json.dumps(worker.describe())))


def uniform(worker: ModelWorker, label: str) -> dict[str, Any]:
    return {d.name: label for d in worker.decisions["bitwidths"]}


def kl(worker: ModelWorker, candidate: dict[str, Any], split: str = "proxy") -> float:
    found = worker.measure(candidate, asdict(Fidelity("any", split, timing=False)))
    value: float = found["metrics"]["kl"]["value"]
    return value


# -- describe ---------------------------------------------------------------------------------------------


def test_a_description_is_whole_and_survives_json(llama: ModelWorker) -> None:
    found = described(llama)
    assert Description.from_json(found.to_json()) == found
    assert set(found.exact) == {"memory_mb", "avg_bits"} and found.exact["memory_mb"].covers(found.space)
    assert set(found.resources) == {d.name for d in found.space}
    assert found.profiles[-1] == "neighbourhood" and "sensitivity:fisher" in found.profiles
    assert not any(found.space.violations(b) for b in found.baselines)
    assert len(set(found.baselines)) == len(found.baselines)
    assert "thread" in found.device and found.versions["torch"]


def test_two_workers_describe_the_same(make_job: MakeJob, llama: ModelWorker) -> None:
    assert ModelWorker(make_job("llama")).describe() == llama.describe()


# -- measure ----------------------------------------------------------------------------------------------


def test_metrics_are_those_that_were_announced(llama: ModelWorker) -> None:
    found = llama.measure(uniform(llama, "w8"), PROXY)
    assert set(found["metrics"]) == set(described(llama).metrics)
    assert json.loads(json.dumps(found)) == found
    values = {name: e["value"] for name, e in found["metrics"].items()}
    assert values["decode_ms"] > 0 and values["prefill_ms"] > 0 and 0 < values["top1"] <= 1
    assert values["avg_bits"] == pytest.approx(8.0)
    assert found["metrics"]["kl"]["n"] == 6 and found["metrics"]["kl"]["stderr"] > 0
    assert found["tokens"] == 6 * 24 and found["seconds"] > 0
    assert found["device"] == described(llama).device and found["versions"] == described(llama).versions


def test_generate_is_a_detail_of_final_measurements_and_no_metric(llama: ModelWorker) -> None:
    found = llama.measure(uniform(llama, "w8"), asdict(Fidelity("report", "report")))
    assert found["details"]["generate_ms"] > 0
    assert "generate_ms" not in llama.measure(uniform(llama, "w8"), PROXY)["details"]
    assert not any("generate" in name for name in found["metrics"])


def test_what_nothing_executes_has_no_latency(make_worker: MakeWorker) -> None:
    worker = make_worker("llama", options=["w3g8", "w8"])
    candidate = uniform(worker, "w8")
    candidate[next(iter(candidate))] = "w3g8"
    found = worker.measure(candidate, PROXY)
    assert not set(found["metrics"]) & set(described(worker).timing)
    assert {"kl", "memory_mb"} <= set(found["metrics"]) and found["details"] == {}


def test_a_candidate_can_be_timed_alone(llama: ModelWorker) -> None:
    found = llama.measure(uniform(llama, "w8"), asdict(timing_only(3)))
    assert set(found["metrics"]) >= {"decode_ms", "prefill_ms"} and found["tokens"] == 0
    assert not {"kl", "ppl", "top1", "memory_mb"} & set(found["metrics"])
    assert found["metrics"]["decode_ms"]["stderr"] >= 0 and llama.built.pristine


def test_without_timing_there_is_none(llama: ModelWorker) -> None:
    found = llama.measure(uniform(llama, "w8"), QUALITY_ONLY)
    assert not set(found["metrics"]) & set(described(llama).timing)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
def test_the_uncompressed_model_diverges_from_itself_by_nothing(make_worker: MakeWorker, kind: str) -> None:
    worker = make_worker(kind)
    found = worker.measure(uniform(worker, "w16"), QUALITY_ONLY)["metrics"]
    assert found["kl"]["value"] == 0.0 and found["top1"]["value"] == 1.0


def test_the_same_candidate_scores_the_same_whatever_came_before(llama: ModelWorker) -> None:
    first = kl(llama, uniform(llama, "w4g32"))
    llama.measure(uniform(llama, "w8"), PROXY)
    llama.profile({"kind": "sensitivity:measured", "shard": 0, "shards": 1})
    llama.profile({"kind": "neighbourhood", "shard": 0, "shards": 1, "candidate": uniform(llama, "w3g32")})
    assert kl(llama, uniform(llama, "w4g32")) == first
    assert kl(llama, uniform(llama, "w3g32")) > first > kl(llama, uniform(llama, "w8")) > 0


def test_splits_differ_and_fewer_sequences_may_be_scored(llama: ModelWorker) -> None:
    candidate = uniform(llama, "w4g32")
    assert len({kl(llama, candidate, split) for split in ("proxy", "selection", "report")}) == 3
    two = llama.measure(candidate, asdict(Fidelity("tiny", "proxy", sequences=2, timing=False)))
    assert two["tokens"] == 2 * 24 and two["metrics"]["kl"]["n"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bitwidths/model.layers.0.mlp.down_proj": "w5"}, r"'w5' is not in \['w3g32'"),
        ({"bitwidths/layer.9": "w8"}, "unknown decisions"),
    ],
)
def test_an_invalid_candidate_is_refused(llama: ModelWorker, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        llama.measure({**uniform(llama, "w8"), **change}, PROXY)
    with pytest.raises(SpaceError, match="no value for"):
        llama.measure({}, PROXY)


def test_an_unknown_split_is_refused(llama: ModelWorker) -> None:
    with pytest.raises(JobError, match="unknown split 'exam'"):
        kl(llama, uniform(llama, "w8"), "exam")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_an_error(
    llama: ModelWorker, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.workload, "score", lambda built, level: ({"kl": Estimate(bad)}, 1))
    with pytest.raises(FloatingPointError, match=f"kl is {bad}"):
        llama.measure(uniform(llama, "w8"), QUALITY_ONLY)


def test_nan_from_the_model_itself_is_an_error(llama: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    kl(llama, uniform(llama, "w8"))  # the uncompressed outputs are kept
    norm = llama.built.model.get_submodule("model.norm").weight
    monkeypatch.setattr(norm, "data", torch.full_like(norm, math.nan))
    with pytest.raises(FloatingPointError):
        kl(llama, uniform(llama, "w8"))


@pytest.mark.parametrize("when", ["building", "timing"])
def test_after_a_failure_the_next_candidate_is_measured_rightly(
    llama: ModelWorker, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kl(llama, uniform(llama, "w4g32"))

    def fails(*args: Any, **options: Any) -> Any:
        raise MemoryError("out of memory")

    with monkeypatch.context() as patch:
        if when == "building":
            patch.setattr(weights_module, "PackedLinear", fails)
        else:
            patch.setattr(llama.workload, "time", fails)
        with pytest.raises(MemoryError):
            llama.measure(uniform(llama, "w8"), PROXY)
    assert kl(llama, uniform(llama, "w4g32")) == before
    assert kl(llama, uniform(llama, "w16")) == 0.0


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "qwen3"])
def test_exact_metrics_are_the_bytes_of_the_export(
    make_worker: MakeWorker, kind: str, tmp_path: Path
) -> None:
    """Every option's bytes: what is written, less the shape (two integers) stored with each packed weight."""
    from safetensors import safe_open

    labels = ["w2g32", "w3g32ao0.5", "w4g32a", "w5g64", "w8", "w16"]
    tied = kind != "llama"
    worker = make_worker(kind, options=labels, **({"embeddings": ["w4g32", "w16"]} if tied else {}))
    decisions = worker.decisions["bitwidths"]
    for i in range(len(labels)):
        candidate = {d.name: d.options[(i + n) % len(d.options)] for n, d in enumerate(decisions)}
        worker.export(candidate, "native", str(tmp_path / str(i)))
        written = 0
        for file in (tmp_path / str(i)).glob("*.safetensors"):
            with safe_open(file, "pt") as handle:
                names = [n for n in handle.keys() if not n.endswith("weight_shape")]  # noqa: SIM118
                written += sum(handle.get_tensor(n).nbytes for n in names)
        claimed = worker.measure(candidate, QUALITY_ONLY)["metrics"]["memory_mb"]["value"] * 1e6
        assert claimed == pytest.approx(written, abs=0.5)


# -- rounding by calibration data ---------------------------------------------------------------------------


def test_compensated_rounding_beats_the_nearest(make_worker: MakeWorker) -> None:
    """At 3 bits on text that neither has seen. Tiny random models have inputs without much structure, so
    the gain is modest, and it must show on the average over architectures."""
    gains = []
    for kind in ("llama", "gpt2", "opt"):
        found = {}
        for method in ("rtn", "gptq", "gptq-mse"):
            worker = make_worker(kind, options=["w3g32"], method=method)
            found[method] = kl(worker, uniform(worker, "w3g32"), "report")
        gains += [found["rtn"] / found["gptq"], found["rtn"] / found["gptq-mse"]]
    assert sum(map(math.log, gains)) / len(gains) > math.log(1.1), gains


def test_calibration_comes_from_the_original_whatever_the_state_before(make_job: MakeJob) -> None:
    def tensors(worker: ModelWorker, order: list[str]) -> dict[str, torch.Tensor]:
        swapper = WeightSwapper.of(worker.built)
        swapper.bank = type(swapper.bank)()  # nothing remembered, in memory or on disk
        for label in order:
            worker.measure(uniform(worker, label), QUALITY_ONLY)
        paths = [p.path for p in worker.built.site.parts if p.role == "body"]
        return {p: swapper.quantized(p, "w4g32", "gptq").codes for p in paths}

    job = make_job("llama", options=["w2g32", "w4g32"], method="gptq")
    one, other = ModelWorker(job), ModelWorker(job)
    straight, crooked = tensors(one, ["w4g32"]), tensors(other, ["w2g32", "w4g32", "w2g32"])
    assert all(torch.equal(straight[p], crooked[p]) for p in straight)


def test_the_head_is_calibrated_on_every_token(make_worker: MakeWorker) -> None:
    worker = make_worker("llama", options=["w8"], head=["w3g32", "w16"], method="gptq")
    worker.restore()
    gram = worker.built.state["hessian"]("lm_head")
    assert int(torch.linalg.matrix_rank(gram)) == 64, "one token a sequence would give rank 8"
    rounded = kl(worker, {**uniform(worker, "w8"), "bitwidths/lm_head": "w3g32"})
    assert 0.0 < rounded < 1.0


# -- kernels' times -----------------------------------------------------------------------------------------


def test_operations_are_timed_for_every_metric(llama: ModelWorker) -> None:
    keys = operation_keys(described(llama))[:3]
    request = {
        "kind": "operations",
        "shard": 0,
        "shards": 1,
        "keys": keys,
        "metrics": {"decode_ms": 1, "prefill_ms": 8},
    }
    found = ProfileResult.from_json(llama.profile(request))
    assert list(found.rows) == keys
    for row in found.rows.values():
        assert set(row) == {"decode_ms", "prefill_ms"} and all(mean(m) > 0 for m in row.values())
    halves = [llama.profile({**request, "shard": i, "shards": 2}) for i in range(2)]
    merged = ProfileResult.merge(map(ProfileResult.from_json, halves))
    assert set(merged.rows) == set(keys)


# -- export -------------------------------------------------------------------------------------------------


def test_export_refuses_what_is_in_the_way(llama: ModelWorker, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    (tmp_path / "plain").write_text("precious")
    for name in ("full", "plain"):
        with pytest.raises(ExportError, match="not an empty folder"):
            llama.export(uniform(llama, "w8"), "native", str(tmp_path / name))
    assert (tmp_path / "full" / "file").read_text() == (tmp_path / "plain").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    found = llama.export(uniform(llama, "w8"), "native", str(tmp_path / "empty"))
    assert Path(found["folder"], "autocomp.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_a_crash_in_the_middle_leaves_no_half_export(
    llama: ModelWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, format: str
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("autocomp.exporters.base.save_file", fails)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else ExportError
    with pytest.raises(expected):
        llama.export(uniform(llama, "w8"), format, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_unknown_formats_and_invalid_candidates_are_refused(llama: ModelWorker, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="unknown exporter 'gguf'; known: compressed-tensors, diffusers,"):
        llama.export(uniform(llama, "w8"), "gguf", str(tmp_path / "out"))
    with pytest.raises(SpaceError):
        llama.export(uniform(llama, "w7"), "native", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


# -- the machine --------------------------------------------------------------------------------------------


def test_a_missing_gpu_is_said_plainly(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CapabilityError, match="no CUDA device"):
        ModelWorker({**make_job("llama"), "device": "cuda"})
    assert worker_module._device("auto") == "cpu"


def test_each_device_has_its_own_timing_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, first, second = (worker_module._lock_path(d) for d in ("cpu", "cuda:0", "cuda:1"))
    assert len({cpu, first, second}) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert worker_module._lock_path("cuda:0") != first, "cuda:0 is another device for this process"
    assert worker_module._lock_path("cpu") == cpu


def test_a_worker_for_one_call_gives_the_collector_back(make_job: MakeJob, apart: Path) -> None:
    import gc

    with open_worker(Job.of(make_job("llama")), threads=1) as found:
        assert gc.get_freeze_count() > 0 and found.device == "cpu"
    assert gc.get_freeze_count() == 0
