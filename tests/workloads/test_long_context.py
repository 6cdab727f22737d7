from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from autocomp.errors import JobError
from autocomp.registry import WORKLOADS
from autocomp.trial import Fidelity
from autocomp.workloads.base import Built
from autocomp.workloads.long_context import LongContext
from autocomp.workloads.long_scores import PromptScore, gather

Folder = Callable[[str], Path]
DATA = {"sequence_length": 32, "calibration": 6}
LONG: dict[str, Any] = {
    "lengths": [128, 192],
    "unseen": [256],
    "documents": {"calibration": 2, "proxy": 3, "selection": 2, "report": 3},
    "retrieval": {
        "pairs": 1,
        "digits": 2,
        "prompts": {"calibration": 2, "proxy": 1, "selection": 1, "report": 3},
        "passkeys": {"calibration": 0, "proxy": 0, "selection": 1, "report": 1},
    },
}


def workload(folder: Path, prose: list[str], seed: int = 0, data: Any = None, **changes: Any) -> LongContext:
    config = {
        "model": str(folder),
        "data": {**DATA, "text": prose, **(data or {})},
        "scenario": {"prompt_tokens": 16, "context_tokens": 16, "decode_tokens": 4, "repeats": 3},
        "long": {**LONG, **changes},
    }
    return LongContext(LongContext.Config.model_validate(config), seed)


@pytest.fixture(scope="module")
def loaded(tiny: Folder, prose: list[str]) -> tuple[LongContext, Built]:
    work = workload(tiny("llama"), prose)
    return work, work.load("cpu")


def damage(built: Built, size: float = 0.5) -> Callable[[], None]:
    """A noisy weight in place of the original; the result undoes it."""
    module: Any = built.model.get_submodule("model.layers.1.mlp.down_proj")
    original = module.weight
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(1)) * original.std() * size
    module.weight = torch.nn.Parameter(original.detach() + noise, requires_grad=False)
    built.changed.add("weights")

    def undo() -> None:
        module.weight = original
        built.changed.discard("weights")

    return undo


def test_each_split_has_documents_of_its_lengths(loaded: tuple[LongContext, Built]) -> None:
    work, built = loaded
    splits = built.state["splits"]
    shapes = {name: tuple(rows.shape) for name, rows in splits.items() if "profile" not in name}
    prompts = {name: shapes.pop(name) for name in list(shapes) if name.endswith("/prompts")}
    assert prompts == {
        "calibration@128/prompts": (2, 128), "calibration@192/prompts": (2, 192),
        "proxy@128/prompts": (1, 128), "proxy@192/prompts": (1, 192), "selection@256/prompts": (2, 256),
        "report@128/prompts": (4, 128), "report@192/prompts": (4, 192), "report@256/prompts": (4, 256),
    }  # fmt: skip
    assert shapes == {
        "calibration": (6, 32), "calibration@128": (2, 128), "calibration@192": (2, 192),
        "proxy": (3, 192), "proxy@128": (3, 128), "proxy@192": (3, 192),
        "selection": (2, 256), "selection@256": (2, 256),
        "report": (3, 256), "report@128": (3, 128), "report@192": (3, 192), "report@256": (3, 256),
    }  # fmt: skip
    # The report has documents of its own: none of its stretches is in another split.
    own = {tuple(row[i : i + 24].tolist()) for row in work.inputs(built, "report") for i in range(232)}
    for name in ("calibration", "calibration@192", "proxy", "selection"):
        rows = work.inputs(built, name)
        assert not any(tuple(r[i : i + 24].tolist()) in own for r in rows for i in range(r.shape[0] - 23))


def test_metrics_are_those_that_were_announced(loaded: tuple[LongContext, Built]) -> None:
    work, built = loaded
    metrics, tokens = work.score(built, Fidelity())
    kinds = ("kl", "text_kl", "answer_kl", "ppl", "top1", "retrieval")
    assert set(metrics) == {f"{m}{n}" for m in kinds for n in ("", "_128", "_192")}
    assert tokens == (3 + 1) * (128 + 192)  # documents and prompts
    report, _ = work.score(built, Fidelity("report", "report"))
    kinds = (*kinds, "passkey")
    assert set(report) == {f"{m}{n}" for m in kinds for n in ("", "_128", "_192", "_256")}
    assert set(report) == set(work.quality_metrics)
    assert work.quality_metrics["kl_256"] and not work.quality_metrics["retrieval_128"]
    for name, estimate in report.items():
        kind = name.removesuffix("_128").removesuffix("_192").removesuffix("_256")
        if kind.endswith("kl"):
            assert estimate.value == pytest.approx(0.0, abs=1e-6)
        if kind == "top1":
            assert estimate.value == 1.0
        expected = {"answer_kl": 4, "retrieval": 3, "passkey": 1}  # one length; all: three times as many
        assert estimate.n == (expected[kind] * (3 if kind == name else 1) if kind in expected else 3)
    assert report["retrieval"].value == 0.0  # random weights
    assert [(a.length, a.kind) for a in built.state["answers"][:3]] == [
        (128, "key_value"), (128, "passkey"), (128, "key_value")
    ]  # fmt: skip


@pytest.mark.parametrize("stride", [1, 4])
def test_means_and_standard_errors_are_over_documents(tiny: Folder, prose: list[str], stride: int) -> None:
    work = workload(tiny("llama"), prose, stride=stride)
    built = work.load("cpu")
    model: Any = built.model
    rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    work.ensure_teacher(built, "proxy")
    undo = damage(built)
    with torch.no_grad():
        for n in (128, 192):
            ids = work.inputs(built, f"proxy@{n}")
            after = model(input_ids=ids).logits.double().log_softmax(-1)
            undo()
            before = model(input_ids=ids).logits.double().log_softmax(-1)
            undo = damage(built)
            kl = (before.exp() * (before - after)).sum(-1)
            nll = -after[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            rows[n] = kl[:, ::stride].mean(-1), nll[:, ::stride].mean(-1)
    found, _ = work.score(built, Fidelity())
    for n, (kl, nll) in rows.items():
        assert found[f"text_kl_{n}"].value == pytest.approx(float(kl.mean()), rel=1e-4)
        assert found[f"ppl_{n}"].value == pytest.approx(math.exp(float(nll.mean())), rel=1e-4)
    kl = torch.stack([kl for kl, _ in rows.values()]).mean(0)
    nll = torch.stack([nll for _, nll in rows.values()]).mean(0)
    assert found["text_kl"].value == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found["text_kl"].stderr == pytest.approx(float(kl.std()) / 3**0.5, rel=1e-3)
    assert found["ppl"].value == pytest.approx(math.exp(float(nll.mean())), rel=1e-4)
    assert found["ppl"].stderr == pytest.approx(found["ppl"].value * float(nll.std()) / 3**0.5, rel=1e-3)


def test_fewer_documents_are_a_prefix(loaded: tuple[LongContext, Built]) -> None:
    work, built = loaded
    work.ensure_teacher(built, "proxy")
    undo = damage(built)
    few, tokens = work.score(built, Fidelity(sequences=2))
    undo()
    assert few["text_kl"].n == 2 and few["kl"].value > 0 and tokens == (2 + 1) * 320
    with pytest.raises(JobError, match=r"4 sequences.*has 3: raise long\.documents\.proxy"):
        work.score(built, Fidelity(sequences=4))
    # Calibration is counted in short sequences; of the documents there are fewer.
    assert work.score(built, Fidelity("sensitivity", "calibration", 6))[0]["text_kl"].n == 2
    assert len(built.state["teachers"]["calibration"]) == 6


def test_answers_are_compared_with_the_uncompressed_models(loaded: tuple[LongContext, Built]) -> None:
    work, built = loaded
    model: Any = built.model
    work.ensure_teacher(built, "selection")
    undo = damage(built)
    found, _ = work.score(built, Fidelity("selection", "selection"))
    ids = work.inputs(built, "selection@256/prompts")
    with torch.no_grad():
        after = model(input_ids=ids).logits.double().log_softmax(-1)
        undo()
        before = model(input_ids=ids).logits.double().log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1)
    rows = [row[p.positions].mean() for row, p in zip(kl, built.state["prompts"]["selection@256/prompts"])]
    expected = torch.stack(rows)
    assert found["answer_kl"].value == found["answer_kl_256"].value
    assert found["answer_kl"].value == pytest.approx(expected.mean().item(), rel=1e-4)
    assert found["answer_kl"].stderr == pytest.approx(expected.std().item() / 2**0.5, rel=1e-3)
    assert found["kl"].value == pytest.approx((found["text_kl"].value + found["answer_kl"].value) / 2)


def test_accuracies_and_what_kl_is_about() -> None:
    """Standard errors are over prompts: answers of one prompt are not independent."""
    documents = {128: torch.tensor([[0.1, 2.0, 0.9], [0.3, 2.0, 0.9]], dtype=torch.float64)}
    prompts = [
        PromptScore(128, "key_value", 1.0, (True, True), (0.1, 0.6)),
        PromptScore(128, "key_value", 3.0, (True, False), (0.2, 0.7)),
        PromptScore(128, "passkey", 2.0, (True,), (0.5,)),
    ]
    for about, kl in (("text", 0.2), ("retrieval", 2.0), ("mixed", 1.1)):
        found = gather(documents, prompts, about)
        assert found["kl"].value == found["kl_128"].value == pytest.approx(kl)
        assert (found["text_kl"].value, found["answer_kl"].value) == pytest.approx((0.2, 2.0))
    assert (found["retrieval"].value, found["retrieval"].n) == (0.75, 2)
    assert found["retrieval"].stderr == pytest.approx(0.25)
    assert found["kl"].stderr == pytest.approx(math.hypot(0.1, 1 / 3**0.5) / 2)
    assert found["passkey_128"].value == 1.0
    assert set(gather(documents, [], "text")) == {
        f"{m}{n}" for m in ("kl", "ppl", "top1") for n in ("", "_128")
    }


def test_without_prompts_there_is_text_only(tiny: Folder, prose: list[str]) -> None:
    none = dict.fromkeys(("calibration", "proxy", "selection", "report"), 0)
    retrieval = {"prompts": none, "passkeys": none}
    work = workload(tiny("llama"), prose, retrieval=retrieval, calibrate_on="text")
    names = {f"{m}{n}" for m in ("kl", "ppl", "top1") for n in ("", "_128", "_192", "_256")}
    assert set(work.quality_metrics) == names
    assert set(work.score(work.load("cpu"), Fidelity("report", "report"))[0]) == names


def test_the_teacher_must_come_from_the_uncompressed_model(tiny: Folder, prose: list[str]) -> None:
    work = workload(tiny("llama"), prose)
    built = work.load("cpu")
    damage(built)
    with pytest.raises(RuntimeError, match="proxy@128"):
        work.score(built, Fidelity())


@pytest.mark.parametrize("on", ["text", "continuation", "retrieval", "mixed"])
def test_calibration_marks_what_counts(tiny: Folder, prose: list[str], on: str) -> None:
    work = workload(tiny("llama"), prose, calibrate_on=on)
    built = work.load("cpu")
    assert work.profile_lengths() == built.site.lengths == (128, 192)
    for n, (ids, mask) in work.profile_batches(built).items():
        documents = work.inputs(built, f"calibration@{n}")
        rows = {"text": 2, "continuation": 2, "retrieval": 2, "mixed": 4}[on]
        assert ids.shape == mask.shape == (rows, n) and mask.dtype == torch.bool
        assert not mask[:, -1].any()
        if on in ("text", "mixed"):
            assert (ids[:2] == documents).all() and mask[:2, :-1].all()
        if on == "continuation":
            half = n // 2
            assert (ids[:, :half] == documents[:, :half]).all() and (ids != documents).any()
            assert mask[:, half - 1 : -1].all() and not mask[:, : half - 1].any()
        prompts = built.state["prompts"][f"calibration@{n}/prompts"]
        for prompt, row, counted in zip(prompts, ids[-2:], mask[-2:]):
            if on in ("retrieval", "mixed"):
                assert row.tolist() == prompt.ids.tolist()
                assert counted.nonzero().flatten().tolist() == prompt.positions.tolist()
        again = work.calibration_sequences(built, n)
        assert again[0] is ids
    with pytest.raises(JobError, match=r"100 tokens: add it to long\.lengths"):
        work.calibration_sequences(built, 100)


def test_the_profile_divergence_counts_what_is_marked(tiny: Folder, prose: list[str]) -> None:
    work = workload(tiny("llama"), prose)
    built = work.load("cpu")
    model: Any = built.model
    work.ensure_profile_teacher(built)
    batches = work.profile_batches(built)
    with torch.no_grad():
        before = {n: model(input_ids=ids).logits.double().log_softmax(-1) for n, (ids, _) in batches.items()}
    damage(built)
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    module.weight.requires_grad_(True)
    for n, (ids, mask) in batches.items():
        assert mask is not None
        for row in (0, 3):
            logits = model(input_ids=ids[row : row + 1]).logits
            found = work.profile_divergence(built, logits, n, row)
            after = logits[0].double().log_softmax(-1)
            kl = (before[n][row].exp() * (before[n][row] - after)).sum(-1)
            assert found.item() == pytest.approx(kl[mask[row]].sum().item(), rel=1e-4)
            found.backward()
    assert float(module.weight.grad.norm()) > 0


def test_continuations_are_the_uncompressed_models(tiny: Folder, prose: list[str]) -> None:
    work = workload(tiny("llama"), prose, calibrate_on="continuation")
    built = work.load("cpu")
    ids, _ = work.calibration_sequences(built, 128)
    other = work.load("cpu")
    assert (work.calibration_sequences(other, 128)[0] == ids).all()  # sampled, but repeatable
    model: Any = built.model
    with torch.no_grad():
        chances = model(input_ids=ids).logits.log_softmax(-1)
    taken = chances[:, 63:-1].gather(-1, ids[:, 64:, None]).mean()
    assert float(taken) > float(chances[:, 63:-1].mean()) + 1.0  # far above a random token's
    damage(other)
    with pytest.raises(RuntimeError, match="restore the originals"):
        work.calibration_sequences(other, 192)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lengths": []}, "long.lengths"),
        ({"lengths": [192, 128]}, "ascending"),
        ({"unseen": [4]}, "8 tokens"),
        ({"retrieval": {"prompts": {"selection": 0}}}, r"for selection: raise .*selection, or .*: text"),
        ({"retrieval": {"pairs": 41}}, "40"),
    ],
)
def test_a_wrong_configuration_is_refused(prose: list[str], changes: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        workload(Path("x"), prose, **changes)


def test_too_little_text_and_too_short_a_context(tiny: Folder, prose: list[str]) -> None:
    with pytest.raises(JobError, match=r"report 25600\).*lower long\.documents"):
        workload(tiny("llama"), prose, documents={"report": 100}).load("cpu")
    with pytest.raises(JobError, match=r"long\.unseen is 600, but the model's context is 512"):
        workload(tiny("llama"), prose, unseen=[600], documents={"selection": 1, "report": 1}).load("cpu")


def test_the_built_in_text_suffices_for_the_defaults() -> None:
    """Sixteen documents of up to 4096 tokens, with room for tokenizers that need fewer tokens."""
    from autocomp.workloads.text import drop_repeats, read_documents

    config = LongContext.Config.model_validate({"model": "x"}).long
    needed = sum(getattr(config.documents, s) * config.of(s)[-1] for s in ("proxy", "selection", "report"))
    characters = sum(map(len, drop_repeats(read_documents([]))))
    assert needed + 64 * 256 < characters / 5  # English prose has 4 to 5 characters a token


def test_it_is_registered_and_import_light() -> None:
    assert WORKLOADS.get("long_context") is LongContext
    code = "import sys, autocomp.workloads.long_context; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
