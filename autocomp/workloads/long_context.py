"""Workload ``long_context``: a language model judged on long texts and by what it finds in them.

Perplexity and divergence are taken on long documents at several lengths, retrieval by prompts with facts
spread over the context (``retrieval``). Candidates are searched at ``long.lengths`` and picked at
``long.unseen``, which no search has looked at: what was tuned at some lengths need not hold at a longer one
(MoA, arXiv 2406.14909, section 4.2). Module level is import-light: the driver reads ``Config``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from autocomp.errors import JobError
from autocomp.trial import Estimate, Fidelity
from autocomp.workloads.base import Built
from autocomp.workloads.causal_lm import CausalLM, vocabulary_size
from autocomp.workloads.long_config import LongContextConfig
from autocomp.workloads.retrieval import Prompt, make_prompts, right_answers
from autocomp.workloads.text import SPLITS, pick_sequences, sequence_prefix, split_regions

if TYPE_CHECKING:
    from torch import Tensor

    from autocomp.workloads.long_scores import PromptScore


class LongContext(CausalLM):
    """Long-context quality: the metrics of ``long_scores.gather``, over a split's lengths and at each
    (``kl_1024``, ``retrieval_4096``, ...).

    ``built.state["splits"]`` holds a split's whole documents under its name (under ``calibration`` the short
    sequences of ``data``), those cut to N tokens under ``name@N`` and its prompts under ``name@N/prompts``.
    ``prompts`` says what is asked in them (the same names), ``answers`` how the last score went in each
    (``PromptScore``), for a plot by depth.
    """

    kind: ClassVar[str] = "long_context"
    Config: ClassVar[type[BaseModel]] = LongContextConfig
    sequence_metrics: ClassVar[tuple[str, ...]] = ()  # a document counts at several lengths
    config: LongContextConfig

    def __init__(self, config: BaseModel, seed: int = 0) -> None:
        super().__init__(config, seed)
        r = self.config.long.retrieval
        scored = ("proxy", "selection", "report")
        metrics = dict(CausalLM.quality_metrics)
        for name, kind in (("retrieval", "key_value"), ("passkey", "passkey")):
            if any(r.count(kind, s) for s in scored):
                metrics |= {name: False, "text_kl": True, "answer_kl": True}
        self.quality_metrics = metrics | {
            f"{m}_{n}": smaller for n in self.config.long.of("report") for m, smaller in metrics.items()
        }

    def load(self, device: str) -> Built:
        """See ``CausalLM.load``; also builds the retrieval prompts.

        Raises:
            JobError: as there, and where a prompt's facts leave no room for text.
        """
        import torch

        built = super().load(device)
        built.state["prompts"] = {}
        for split in SPLITS:
            for n in self.config.long.of(split):
                prompts = self._prompts(built, split, n)
                if prompts:
                    rows = torch.stack([torch.from_numpy(p.ids) for p in prompts])
                    built.state["splits"][f"{split}@{n}/prompts"] = rows.to(device)
                    built.state["prompts"][f"{split}@{n}/prompts"] = prompts
        return built

    def _prompts(self, built: Built, split: str, length: int) -> list[Prompt]:
        """Both kinds in turn, so that the first few are a sample of both."""
        r, tokenizer = self.config.long.retrieval, built.state["tokenizer"]
        prefix = sequence_prefix(tokenizer)
        documents = built.state["splits"][f"{split}@{self.config.long.of(split)[-1]}"]
        found: list[tuple[int, Prompt]] = []
        for kind in ("key_value", "passkey"):
            prompts = make_prompts(
                lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
                documents[:, len(prefix) :].flatten().cpu().numpy(),
                kind,
                split,
                count=r.count(kind, split),
                length=length,
                pairs=r.pairs,
                digits=r.digits,
                seed=[self.seed],
                prefix=prefix,
            )
            found += enumerate(prompts)
        return [prompt for _, prompt in sorted(found, key=lambda pair: pair[0])]

    def _splits(self, tokenizer: Any) -> dict[str, Tensor]:
        import torch

        data, long = self.config.data, self.config.long
        documents, prefix = self._documents(tokenizer)
        longest = {s: long.of(s)[-1] for s in SPLITS}
        counts = {s: getattr(long.documents, s) for s in SPLITS}
        needs = {s: counts[s] * (longest[s] - len(prefix)) for s in SPLITS}
        # Weights may be profiled on the same text as attention: both are calibration.
        short = data.calibration * (data.sequence_length - len(prefix))
        needs["calibration"] = max(needs["calibration"], short)
        asked = ", ".join(f"{s} {n}" for s, n in needs.items())
        regions = split_regions(documents, needs, asked, "long.documents, long.lengths or long.unseen")
        found: dict[str, Tensor] = {}
        for s in SPLITS:
            rows = torch.from_numpy(pick_sequences(regions[s], counts[s], longest[s], [self.seed, s], prefix))
            found |= {s: rows} | {f"{s}@{n}": rows[:, :n] for n in long.of(s)}
        few = pick_sequences(
            regions["calibration"], data.calibration, data.sequence_length, [self.seed, "short"], prefix
        )
        return found | {"calibration": torch.from_numpy(few)}

    def _lengths(self) -> dict[str, int]:
        long = self.config.long
        return super()._lengths() | {"long.lengths": long.lengths[-1], "long.unseen": long.unseen[-1]}

    def _size_key(self, split: str) -> str:
        name, _, length = split.partition("@")
        return f"long.documents.{name}" if length or name != "calibration" else "data.calibration"

    def _passes(
        self, built: Built, split: str, tokens: Tensor, done: int
    ) -> list[tuple[Tensor, Tensor | None]]:
        import torch

        passes = super()._passes(built, split, tokens, done)
        if split in built.state["prompts"]:
            asked = [torch.from_numpy(p.positions) for p in built.state["prompts"][split]]
            return [(tokens[i : i + 1], asked[i].to(tokens.device)) for i in range(done, len(tokens))]
        kept = self._kept(split, tokens)
        return passes if kept is None else [(batch, kept) for batch, _ in passes]

    def _kept(self, split: str, tokens: Tensor) -> Tensor | None:
        """Positions of documents ``[n, L]`` that are scored."""
        import torch

        stride = self.config.long.stride
        # Profiles look at all positions: their masks say which ones count.
        if stride == 1 or "@" not in split or split.startswith("profile@"):
            return None
        return torch.arange(0, tokens.shape[-1], stride, device=tokens.device)

    def _teacher_tokens(self, built: Built) -> int:
        long, prompts = self.config.long, built.state["prompts"]
        profiled = sum(
            (long.documents.calibration + len(prompts.get(f"calibration@{n}/prompts", ()))) * n
            for n in long.lengths
        )
        documents = sum(getattr(long.documents, s) * sum(long.of(s)) for s in SPLITS) // long.stride
        answers = sum(len(p.positions) for row in prompts.values() for p in row)
        short = self.config.data.calibration * self.config.data.sequence_length
        return documents + answers + short + profiled

    def ensure_teacher(self, built: Built, split: str, sequences: int = 0) -> None:
        """See ``CausalLM.ensure_teacher``; a split's name stands for its documents and prompts at all of its
        lengths (and, for ``calibration``, for the short sequences)."""
        if split not in SPLITS or split == "calibration":
            super().ensure_teacher(built, split, sequences)
        if split in SPLITS:
            for name in self._scored(built, split):
                super().ensure_teacher(built, name, self._few(built, name, sequences))

    def _scored(self, built: Built, split: str) -> list[str]:
        """Names of the documents and prompts of a split."""
        names = [f"{split}@{n}{what}" for n in self.config.long.of(split) for what in ("", "/prompts")]
        return [name for name in names if name in built.state["splits"]]

    def _few(self, built: Built, name: str, sequences: int) -> int:
        """Rows that are scored where ``sequences`` were asked for. That is a number of documents (for
        ``calibration`` one of short sequences), and there may be fewer prompts."""
        fewer = name in built.state["prompts"] or name.startswith("calibration")
        return min(sequences, len(built.state["splits"][name])) if fewer else sequences

    def score(self, built: Built, fidelity: Fidelity) -> tuple[dict[str, Estimate], int]:
        """The quality metrics on ``fidelity.split``, of its first ``fidelity.sequences`` documents and as
        many prompts (0: all) at each length; see ``long_scores.gather``.

        Raises:
            RuntimeError: see ``ensure_teacher``.
            FloatingPointError: the model gives NaN or infinity.
        """
        from autocomp.workloads.long_scores import gather
        from autocomp.workloads.teacher import sequence_scores

        split = fidelity.split
        self.ensure_teacher(built, split, fidelity.sequences)
        documents: dict[int, Tensor] = {}
        prompts: list[PromptScore] = []
        count = 0
        for name in self._scored(built, split):
            tokens = self.inputs(built, name, self._few(built, name, fidelity.sequences))
            count += tokens.numel()
            if name in built.state["prompts"]:
                prompts += self._answers(built, name, tokens)
                continue
            teacher, kept = built.state["teachers"][name], self._kept(name, tokens)
            scores = sequence_scores(built.model, tokens, teacher, vocabulary_size(built), kept)
            documents[tokens.shape[1]] = scores
        built.state["answers"] = prompts
        about = self.config.long.calibrate_on
        return gather(documents, prompts, "text" if about == "continuation" else about), count

    def _answers(self, built: Built, name: str, tokens: Tensor) -> list[PromptScore]:
        import torch

        from autocomp.workloads.long_scores import PromptScore
        from autocomp.workloads.teacher import forward, score_sequence

        teacher, found = built.state["teachers"][name], []
        passes = self._passes(built, name, tokens, 0)
        for i, (prompt, (ids, asked)) in enumerate(zip(built.state["prompts"][name], passes)):
            logits = forward(built.model, ids, asked)[0]
            with torch.inference_mode():
                kl, _, _ = score_sequence(logits, ids[0], teacher, i, asked)
            depths = tuple(answer.depth for answer in prompt.answers)
            right = tuple(right_answers(prompt, logits))
            found.append(PromptScore(tokens.shape[1], prompt.kind, kl, right, depths))
        return found

    # -- profiles ---------------------------------------------------------------------------------

    def profile_lengths(self) -> tuple[int, ...]:
        """Lengths of the sequences that profiles of attention look at."""
        return self.config.long.lengths

    def profile_batches(self, built: Built) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Sequences for profiles of attention; see ``LongConfig.calibrate_on``."""
        return {n: self.calibration_sequences(built, n) for n in self.config.long.lengths}

    def calibration_sequences(self, built: Built, length: int) -> tuple[Tensor, Tensor]:
        """Calibration sequences int64 ``[n, length]`` and bool ``[n, length]``: positions whose next-token
        loss counts. Text comes before prompts.

        Raises:
            JobError: ``length`` is none of ``long.lengths``.
            RuntimeError: the model has to continue texts and is compressed.
        """
        from autocomp.workloads.long_calibration import calibration_rows

        if length not in self.config.long.lengths:
            raise JobError(f"no calibration at {length} tokens: add it to long.lengths")
        name = f"profile@{length}"
        if name not in built.state["splits"]:
            ids, mask = calibration_rows(built, self.config.long.calibrate_on, length, self.seed)
            built.state["splits"][name] = ids
            built.state.setdefault("masks", {})[name] = mask
        return built.state["splits"][name], built.state["masks"][name]

    def ensure_profile_teacher(self, built: Built) -> None:
        """Record the uncompressed model's outputs on ``profile_batches``."""
        self.profile_batches(built)
        for n in self.config.long.lengths:
            super().ensure_teacher(built, f"profile@{n}")

    def profile_divergence(self, built: Built, logits: Tensor, length: int, row: int) -> Tensor:
        """KL(uncompressed || ``logits [1, length, vocabulary]``) on one row of ``profile_batches``, summed
        over the positions that count: a scalar with a gradient."""
        from autocomp.workloads.teacher import summed_divergence

        name = f"profile@{length}"
        mask = built.state["masks"][name][row]
        return summed_divergence(logits[0], built.state["teachers"][name], row, mask)
