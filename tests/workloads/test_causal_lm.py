from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from autocomp.errors import JobError
from autocomp.testing.models import KINDS, tiny_tokenizer
from autocomp.trial import Fidelity
from autocomp.workloads import teacher as teaching
from autocomp.workloads.base import Built
from autocomp.workloads.causal_lm import CausalLM
from autocomp.workloads.teacher import Teacher, choose_mode, compare, finishing_steps

Folder = Callable[[str], Path]
DATA = {"sequence_length": 32, "calibration": 4, "proxy": 12, "selection": 4, "report": 4}
SCENARIO = {"prompt_tokens": 16, "context_tokens": 16, "decode_tokens": 4, "repeats": 3}


def workload(folder: Path, prose: list[str], seed: int = 0, **changes: Any) -> CausalLM:
    data = {**DATA, "text": prose, **changes.pop("data", {})}
    config = {"model": str(folder), "data": data, "scenario": SCENARIO, **changes}
    return CausalLM(CausalLM.Config.model_validate(config), seed)


def perturb(built: Built, path: str, size: float) -> None:
    """Replace a weight by a noisy one, as a space would: a new parameter, the old tensor untouched."""
    module: Any = built.model.get_submodule(path)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(module.weight.shape, generator=generator) * module.weight.float().std() * size
    module.weight = torch.nn.Parameter(module.weight + noise.to(module.weight.dtype), requires_grad=False)
    built.changed.add("weights")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_mb, mode", [(100.0, "log_probs"), (0.5, "hidden")])
def test_the_uncompressed_model_does_not_diverge_from_itself(
    tiny: Folder, prose: list[str], kind: str, teacher_mb: float, mode: str
) -> None:
    work = workload(tiny(kind), prose, data={"teacher_mb": teacher_mb})
    built = work.load("cpu")
    metrics, tokens = work.score(built, Fidelity())
    assert built.state["teachers"]["proxy"].mode == mode
    assert tokens == 12 * 32
    assert metrics["kl"].value == pytest.approx(0.0, abs=1e-6)
    assert metrics["top1"].value == 1.0
    assert metrics["ppl"].value > 1.0 and metrics["ppl"].stderr > 0.0
    assert {e.n for e in metrics.values()} == {12}


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "granite", "gemma2"])
def test_all_ways_to_keep_the_teacher_agree(tiny: Folder, prose: list[str], kind: str) -> None:
    """With a compressed head and body, also for tied weights: the teacher needs the original head."""
    values = {}
    for mode, limit in (("log_probs", 100.0), ("hidden", 0.5)):
        work = workload(tiny(kind), prose, data={"teacher_mb": limit})
        built = work.load("cpu")
        work.ensure_teacher(built, "proxy")
        assert built.state["teachers"]["proxy"].mode == mode
        for part in (built.site.parts[1], built.site.parts[-1]):
            perturb(built, part.path, 0.3)
        values[mode] = work.score(built, Fidelity())[0]
    assert values["log_probs"]["kl"].value > 0.01
    assert values["log_probs"]["top1"].value < 1.0
    for metric, estimate in values["log_probs"].items():
        assert values["hidden"][metric].value == pytest.approx(estimate.value, rel=1e-4)
        assert values["hidden"][metric].stderr == pytest.approx(estimate.stderr, rel=1e-3)


def test_metrics_match_their_definitions(tiny: Folder, prose: list[str]) -> None:
    work = workload(tiny("llama"), prose)
    built = work.load("cpu")
    tokens = work.inputs(built, "proxy")
    model: Any = built.model
    with torch.no_grad():
        before = model(input_ids=tokens).logits.double().log_softmax(-1)
        work.ensure_teacher(built, "proxy")
        perturb(built, "model.layers.1.mlp.down_proj", 0.5)
        after = model(input_ids=tokens).logits.double().log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).mean(-1)
    nll = -after[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].mean(-1)
    same = (before.argmax(-1) == after.argmax(-1)).double().mean(-1)
    found = work.score(built, Fidelity())[0]
    for name, rows in (("kl", kl), ("top1", same)):
        assert found[name].value == pytest.approx(float(rows.mean()), rel=1e-4)
        assert found[name].stderr == pytest.approx(float(rows.std()) / math.sqrt(12), rel=1e-3)
    assert found["ppl"].value == pytest.approx(math.exp(float(nll.mean())), rel=1e-4)
    assert found["ppl"].stderr == pytest.approx(found["ppl"].value * float(nll.std()) / 12**0.5, rel=1e-3)


def test_divergence_grows_with_the_damage_and_is_undone(tiny: Folder, prose: list[str]) -> None:
    work = workload(tiny("qwen3"), prose)
    built = work.load("cpu")
    path = "model.layers.0.mlp.up_proj"
    module: Any = built.model.get_submodule(path)
    work.ensure_teacher(built, "proxy")
    found = []
    for size in (0.05, 0.2, 0.8):
        module.weight = torch.nn.Parameter(built.originals[path], requires_grad=False)
        perturb(built, path, size)
        found.append(work.score(built, Fidelity())[0]["kl"].value)
    assert 0 < found[0] < found[1] < found[2]
    module.weight = torch.nn.Parameter(built.originals[path], requires_grad=False)
    assert work.score(built, Fidelity())[0]["kl"].value == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("teacher_mb", [100.0, 0.5])
def test_differentiable_divergence_is_the_same_number(
    tiny: Folder, prose: list[str], teacher_mb: float
) -> None:
    work = workload(tiny("granite"), prose, data={"teacher_mb": teacher_mb})
    built = work.load("cpu")
    work.ensure_teacher(built, "proxy")
    path = "model.layers.0.mlp.up_proj"
    perturb(built, path, 0.3)
    model: Any = built.model
    weight = model.get_submodule(path).weight.requires_grad_(True)
    tokens = work.inputs(built, "proxy")
    total = torch.zeros(())
    for i in range(len(tokens)):
        total = total + work.divergence(built, "proxy", model(tokens[i : i + 1]).logits, i)
    total.backward()
    expected = work.score(built, Fidelity())[0]["kl"].value
    assert total.item() / tokens.numel() == pytest.approx(expected, rel=1e-4)
    assert float(weight.grad.norm()) > 0


def test_fewer_sequences_are_a_prefix_and_have_more_noise(tiny: Folder, prose: list[str]) -> None:
    work = workload(tiny("llama"), prose, data={"proxy": 32, "calibration": 2})
    built = work.load("cpu")
    assert (work.inputs(built, "proxy", 8) == work.inputs(built, "proxy", 32)[:8]).all()
    work.ensure_teacher(built, "proxy")
    perturb(built, "model.layers.0.mlp.up_proj", 0.5)
    few = work.score(built, Fidelity(sequences=4))[0]["kl"]
    many = work.score(built, Fidelity(sequences=32))[0]["kl"]
    assert (few.n, many.n) == (4, 32) and many.stderr < few.stderr
    single = work.score(built, Fidelity(sequences=1))[0]["kl"]
    assert (single.n, single.stderr) == (1, 0.0) and math.isfinite(single.value)


def test_results_do_not_depend_on_batches_or_chunks(
    tiny: Folder, prose: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = workload(tiny("llama"), prose)
    built = work.load("cpu")
    work.ensure_teacher(built, "proxy", 5)  # extended by the score below
    work.ensure_teacher(built, "proxy")
    perturb(built, "lm_head", 0.3)
    whole = work.score(built, Fidelity())[0]
    monkeypatch.setattr(teaching, "CHUNK_BYTES", 7 * 4 * 300)
    monkeypatch.setattr(teaching, "BATCH_BYTES", 1)
    pieces = work.score(built, Fidelity())[0]
    for name, estimate in whole.items():
        assert pieces[name].value == pytest.approx(estimate.value, rel=1e-5)
    assert len(work.calibration_batches(built)) == 4


def test_the_teacher_must_come_from_the_uncompressed_model(tiny: Folder, prose: list[str]) -> None:
    work = workload(tiny("llama"), prose)
    built = work.load("cpu")
    work.ensure_teacher(built, "proxy", 4)
    perturb(built, "lm_head", 0.1)
    assert work.score(built, Fidelity(sequences=4))[0]["kl"].value > 0
    for fidelity in (Fidelity(sequences=5), Fidelity("report", "report")):
        with pytest.raises(RuntimeError, match="restore the originals"):
            work.score(built, fidelity)


def test_writing_into_the_original_head_is_noticed(tiny: Folder, prose: list[str]) -> None:
    work = workload(tiny("llama"), prose, data={"teacher_mb": 0.5})
    built = work.load("cpu")
    work.ensure_teacher(built, "proxy")
    model: Any = built.model
    model.get_output_embeddings().weight.data.mul_(1.01)
    with pytest.raises(RuntimeError, match="overwritten in place"):
        work.score(built, Fidelity())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_a_floating_point_error(tiny: Folder, prose: list[str], value: float) -> None:
    work = workload(tiny("llama"), prose)
    built = work.load("cpu")
    work.ensure_teacher(built, "proxy")
    module: Any = built.model.get_submodule("model.layers.1.mlp.down_proj")
    module.weight.data[3, 5] = value
    built.changed.add("weights")
    with pytest.raises(FloatingPointError, match=r"sequence 0 hold NaN or infinity at \d+ of 32"):
        work.score(built, Fidelity())
    work.prepare(built)  # were the broken model the uncompressed one, the user must hear about it
    with pytest.raises(JobError, match="dtype: float32"):
        work.score(built, Fidelity())


def test_bfloat16_is_scored_and_recomputed_exactly(tiny: Folder, prose: list[str]) -> None:
    work = workload(tiny("llama-tied"), prose, dtype="bfloat16", data={"teacher_mb": 0.3})
    built = work.load("cpu")
    metrics, _ = work.score(built, Fidelity())
    assert built.state["teachers"]["proxy"].mode == "hidden"
    assert built.originals["lm_head"].dtype == torch.bfloat16
    assert metrics["kl"].value == pytest.approx(0.0, abs=1e-5) and metrics["top1"].value == 1.0


def test_a_head_that_can_not_be_reproduced_falls_back(
    tiny: Folder, prose: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does something unknown after its head: half-precision outputs, or an error."""
    work = workload(tiny("gemma2"), prose, data={"teacher_mb": 0.5})
    built = work.load("cpu")
    monkeypatch.setattr(teaching, "finishing_steps", lambda config: finishing_steps(config)[:1])
    work.ensure_teacher(built, "proxy")
    teacher = built.state["teachers"]["proxy"]
    assert teacher.mode == "half" and teacher.head is None
    metrics = compare(built.model, work.inputs(built, "proxy"), teacher, 300)
    assert 0 <= metrics["kl"].value < 1e-5 and metrics["top1"].value > 0.99

    built.state["teachers"].clear()
    small = workload(tiny("gemma2"), prose, data={"teacher_mb": 0.01})
    with pytest.raises(JobError, match=r"teacher_mb = 0\.01: raise it"):
        small.ensure_teacher(built, "proxy")


def test_modes_by_memory(tiny: Folder, prose: list[str]) -> None:
    built = workload(tiny("llama"), prose).load("cpu")
    model: Any = built.model
    head = teaching.Head.of(model.get_output_embeddings(), lambda x: x)
    assert choose_mode(10, 64, 300, 12_000, head) == "log_probs"
    assert choose_mode(10, 64, 300, 11_999, head) == "hidden"
    assert choose_mode(10, 64, 300, 6_000, None) == "half"
    with pytest.raises(JobError, match="10 tokens"):
        choose_mode(10, 64, 300, 2_000, head)


def test_a_token_that_the_teacher_rules_out_costs_nothing() -> None:
    def model(input_ids: torch.Tensor, use_cache: bool) -> Any:
        class Output:
            logits = torch.zeros(*input_ids.shape, 4)

        return Output

    teacher = Teacher("log_probs", None)
    teacher.add(torch.tensor([[[0.0, 0.0, 0.0, -math.inf]] * 3]), None)
    found = compare(model, torch.tensor([[0, 1, 2]]), teacher, 4)
    assert found["kl"].value == pytest.approx(math.log(4 / 3), rel=1e-5)
    assert found["ppl"].value == pytest.approx(4.0, rel=1e-5)


def test_splits_are_disjoint_and_repeatable(tiny: Folder, prose: list[str]) -> None:
    first, again = (workload(tiny("llama"), prose, seed=3).load("cpu") for _ in range(2))
    other = workload(tiny("llama"), prose, seed=4).load("cpu")
    rows: list[tuple[int, ...]] = []
    for name, tokens in first.state["splits"].items():
        assert tokens.shape == (DATA[name], 32) and tokens.dtype == torch.int64
        assert (tokens == again.state["splits"][name]).all()
        rows += map(tuple, tokens.tolist())
    assert len(set(rows)) == len(rows)
    assert any((tokens != other.state["splits"][n]).any() for n, tokens in first.state["splits"].items())


def test_asking_for_what_is_not_there(tiny: Folder, prose: list[str]) -> None:
    work = workload(tiny("llama"), prose)
    built = work.load("cpu")
    with pytest.raises(JobError, match="known: calibration, proxy, selection, report"):
        work.inputs(built, "test")
    with pytest.raises(JobError, match=r"13 sequences.*has 12.*data\.proxy"):
        work.score(built, Fidelity(sequences=13))


def test_too_little_text_and_too_long_scenarios(tiny: Folder, prose: list[str]) -> None:
    with pytest.raises(JobError, match=r"tokens, but \d+ are needed"):
        workload(tiny("llama"), prose[:1], data={"report": 400}).load("cpu")
    with pytest.raises(JobError, match=r"prompt_tokens is 600, but the model's context is 512"):
        workload(tiny("llama"), prose, scenario={**SCENARIO, "prompt_tokens": 600}).load("cpu")
    with pytest.raises(JobError, match=r"decode_tokens is 520, but .* 512"):
        workload(tiny("gpt2"), prose, scenario={"context_tokens": 510, "decode_tokens": 10}).load("cpu")


def test_a_tokenizer_of_another_model_is_refused(tiny: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "copy")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<{i}>" for i in range(100)]})
    tokenizer.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"<99> word {i}\n\n" for i in range(200)))
    with pytest.raises(JobError, match="token 357, but the model's embedding has 300 rows"):
        workload(folder, [str(text)]).load("cpu")


def test_configuration_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValidationError, match="prompt_token"):
        CausalLM.Config.model_validate({"model": "x", "scenario": {"prompt_token": 3}})
    with pytest.raises(ValidationError, match="sequence_length"):
        CausalLM.Config.model_validate({"model": "x", "data": {"sequence_length": 1}})
    with pytest.raises(ValidationError, match="float8"):
        CausalLM.Config.model_validate({"model": "x", "dtype": "float8"})


def test_the_module_is_import_light() -> None:
    code = "import sys, autocomp.workloads.causal_lm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
