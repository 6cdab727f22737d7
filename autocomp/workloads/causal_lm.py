"""Workload ``causal_lm``: a decoder-only language model from a Hugging Face folder or a GGUF file.

Quality is divergence from the uncompressed model on held-out text; latency is that of the compressed model
serving one batch. Module level is import-light: the driver reads ``Config`` and never loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from autocomp.errors import CapabilityError, JobError
from autocomp.trial import Estimate, Fidelity
from autocomp.workloads.base import Built, Workload
from autocomp.workloads.subset import Facts, pool_facts, read_subset
from autocomp.workloads.text import (
    SPLITS,
    drop_repeats,
    read_documents,
    sequence_prefix,
    split_sequences,
    tokenize,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from autocomp.serving import LeanDecoder
    from autocomp.workloads.teacher import Teacher


class DataConfig(BaseModel):
    """Text and how much of it each split gets.

    Attributes:
        text: UTF-8 files; empty for built-in English prose (some 90 000 tokens).
        sequence_length: tokens of a sequence.
        calibration, proxy, selection, report: sequences of each split; the splits are disjoint.
        subset: file of ``autocomp proxy`` that names the few of the ``proxy`` sequences which are scored in a
            search (they rank candidates as all of them do); empty for all.
        teacher_mb: memory (10**6 bytes) for the uncompressed model's outputs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: list[str] = []
    sequence_length: int = Field(default=256, ge=8)
    calibration: int = Field(default=64, ge=1)
    proxy: int = Field(default=16, ge=1)
    selection: int = Field(default=48, ge=1)
    report: int = Field(default=96, ge=1)
    subset: str = ""
    teacher_mb: float = Field(default=512.0, gt=0)


class ScenarioConfig(BaseModel):
    """The deployment that latency is measured for.

    Attributes:
        prompt_tokens: length of the prompt that ``prefill_ms`` processes.
        context_tokens: tokens in the key/value cache when ``decode_ms`` is taken.
        decode_tokens: decode steps a timed call makes; ``decode_ms`` is their mean.
        batch: sequences served at once.
        threads: CPU threads; 0 for all that the worker has.
        repeats: timed calls, at least; the median is reported.
        seconds: decode steps are timed for at least so long: short ones need more samples.
        runtime: what decodes. ``lean`` is our decode path (one call into C per token, on the CPU), ``eager``
            the model's own forward; ``auto`` is lean where the model allows it, and says why where not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_tokens: int = Field(default=256, ge=1)
    context_tokens: int = Field(default=256, ge=1)
    decode_tokens: int = Field(default=16, ge=1)
    batch: int = Field(default=1, ge=1)
    threads: int = Field(default=0, ge=0)
    repeats: int = Field(default=5, ge=1)
    seconds: float = Field(default=0.7, ge=0)
    runtime: Literal["auto", "lean", "eager"] = "auto"


class CausalLMConfig(BaseModel):
    """What a job says under ``workload`` for ``kind: causal_lm``.

    Attributes:
        model: folder with ``config.json``, folder with one ``.gguf`` file, or a ``.gguf`` file.
        dtype: type the weights are held in; ``auto`` is the checkpoint's (bfloat16 for GGUF).
        trust_remote_code: run the Python code that some folders bring along.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    data: DataConfig = DataConfig()
    scenario: ScenarioConfig = ScenarioConfig()
    trust_remote_code: bool = False


class CausalLM(Workload):
    """Decoder-only language models (Llama, Qwen, GPT-2, GPT-NeoX, OPT, Gemma, Granite, Mixtral, ...).

    ``built.state`` holds ``tokenizer``, ``splits`` (split -> int64
    ``[n, sequence_length]`` on the device), ``source`` and ``teachers`` (split -> ``Teacher``).
    """

    kind: ClassVar[str] = "causal_lm"
    Config: ClassVar[type[BaseModel]] = CausalLMConfig
    quality_metrics: Mapping[str, bool] = {"kl": True, "ppl": True, "top1": False}
    sequence_metrics: ClassVar[tuple[str, ...]] = ("kl", "ppl", "top1")
    timing_metrics: ClassVar[Mapping[str, str]] = {
        "prefill_ms": "ms for one batch of prompts",
        "decode_ms": "ms for one token of every sequence in the batch",
        "resident_mb": "10**6 bytes of weights as the kernels hold them",
        "cache_mb": "10**6 bytes of keys and values that are held when decoding starts",
        "peak_mb": "10**6 bytes while serving: weights, caches, activations",
    }
    config: CausalLMConfig

    def load(self, device: str) -> Built:
        """Load model and tokenizer, cut the text into splits, find the model's parts.

        Raises:
            JobError: a path, a format, too little text, or a scenario longer than the model's context.
        """
        from autocomp.workloads import _gguf, checkpoint, discovery

        source = checkpoint.locate(self.config.model)
        if source.gguf:
            source = _gguf.convert(source, self.config.dtype)
        trust = self.config.trust_remote_code
        tokenizer = checkpoint.load_tokenizer(source, trust_remote_code=trust)
        splits = self._splits(tokenizer)
        if self.config.data.subset:
            rows = read_subset(self.config.data.subset, self._facts(splits["proxy"]))
            splits["proxy"] = splits["proxy"][rows]
        model = checkpoint.load_model(source, self.config.dtype, trust_remote_code=trust)
        self._check_lengths(model.config.get_text_config())
        _check_vocabulary(model, splits)
        fingerprint = checkpoint.fingerprint(model)  # before the move: hashing reads host memory
        model.to(device)
        s = self.config.scenario
        site = replace(
            discovery.discover(model, fingerprint),
            context=s.context_tokens,
            batch=s.batch,
            lengths=self.profile_lengths(),
        )
        built = Built(model, site, device)
        for part in site.parts:
            if part.kind in ("linear", "embedding"):
                built.originals[part.path] = model.get_submodule(part.path).weight.detach()
        built.state |= {"tokenizer": tokenizer, "source": source}
        built.state["splits"] = {name: tokens.to(device) for name, tokens in splits.items()}
        self.prepare(built)
        return built

    def prepare(self, built: Built) -> None:
        """Declare ``built`` uncompressed and forget outputs of an earlier model; ``load`` ends with it."""
        built.changed.clear()
        built.state["teachers"] = {}

    def profile_lengths(self) -> tuple[int, ...]:
        """Lengths of the sequences that profiles look at."""
        return (self.config.data.sequence_length,)

    def inputs(self, built: Built, split: str, n: int = 0) -> Tensor:
        """The first ``n`` sequences of ``split`` (0: all): int64 ``[n, sequence_length]`` on the device.

        Raises:
            JobError: no such split, or it has fewer sequences.
        """
        splits: Mapping[str, Tensor] = built.state["splits"]
        if split not in splits:
            raise JobError(f"unknown split {split!r}; known: {', '.join(splits)}")
        tokens = splits[split]
        if not 0 <= n <= len(tokens):
            raise JobError(
                f"{n} sequences asked of split {split!r}, which has {len(tokens)}: {self._more(split)}"
            )
        return tokens[: n or len(tokens)]

    def _more(self, split: str) -> str:
        """How a job gets more sequences of ``split``."""
        if split == "proxy" and self.config.data.subset:
            return "choose a larger data.subset"
        return f"raise {self._size_key(split)}"

    def _size_key(self, split: str) -> str:
        """The key of the job that says how many sequences ``split`` has."""
        return f"data.{split}"

    def calibration_batches(self, built: Built, n: int = 0) -> list[Tensor]:
        """The calibration sequences in batches ``[b, sequence_length]`` whose logits fit in memory."""
        from autocomp.workloads.teacher import batches

        return [b for _, b in batches(self.inputs(built, "calibration", n), vocabulary_size(built))]

    def ensure_teacher(self, built: Built, split: str, sequences: int = 0) -> None:
        """Record the uncompressed model's outputs on the first ``sequences`` of ``split`` (0: all), unless
        they are recorded already.

        Raises:
            RuntimeError: outputs are missing and the model is not in its original state.
            JobError: the outputs don't fit ``data.teacher_mb``, or the uncompressed model gives NaN.
        """
        tokens = self.inputs(built, split, sequences)
        teacher: Teacher | None = built.state["teachers"].get(split)
        if teacher is not None and len(teacher) >= len(tokens):
            return
        if not built.pristine:
            raise RuntimeError(
                f"the uncompressed model's outputs on {split!r} are not recorded and the model is "
                "compressed: restore the originals, then call ensure_teacher"
            )
        done = 0 if teacher is None else len(teacher)
        self._record(built, split, tokens, done)

    def _passes(
        self, built: Built, split: str, tokens: Tensor, done: int
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Forward passes over the rows of ``split``'s ``tokens`` from ``done`` on: int64 ``[b, L]``, and the
        positions that are wanted, int64 ``[K]`` (``None``: all)."""
        from autocomp.workloads.teacher import batches

        del split
        return [(batch, None) for _, batch in batches(tokens[done:], vocabulary_size(built))]

    def _record(self, built: Built, split: str, tokens: Tensor, done: int) -> None:
        import torch

        from autocomp.workloads.teacher import forward_with_hidden

        with torch.inference_mode():
            for batch, kept in self._passes(built, split, tokens, done):
                logits, hidden = forward_with_hidden(built.model, batch, kept)
                # The maximum is NaN or infinite when any logit is NaN or +inf; -inf rules a token out.
                if not torch.isfinite(logits.amax(-1)).all():
                    raise JobError(
                        f"the uncompressed model gives NaN or infinity on {split!r} in {logits.dtype}; set "
                        "workload.dtype: float32 (or bfloat16 instead of float16)"
                    )
                if split not in built.state["teachers"]:
                    built.state["teachers"][split] = self._new_teacher(built, logits, hidden)
                built.state["teachers"][split].add(logits, hidden)

    def _new_teacher(self, built: Built, logits: Tensor, hidden: Tensor | None) -> Teacher:
        """A teacher in the fastest mode that fits, sized for all splits so that none starves another."""
        from autocomp.workloads.teacher import Teacher, choose_mode, match_head

        head = None if hidden is None else match_head(built.model, hidden, logits)
        width = 0 if hidden is None else hidden.shape[-1]
        tokens = self._teacher_tokens(built)
        limit = int(self.config.data.teacher_mb * 1e6)
        return Teacher(choose_mode(tokens, width, logits.shape[-1], limit, head), head)

    def _teacher_tokens(self, built: Built) -> int:
        """Positions of all splits together whose outputs may be recorded."""
        return sum(t.numel() for t in built.state["splits"].values())

    def score(self, built: Built, fidelity: Fidelity) -> tuple[dict[str, Estimate], int]:
        """``kl``, ``ppl`` and ``top1`` of the model as it is; see ``teacher.summarize``.

        Raises:
            RuntimeError: see ``ensure_teacher``.
            FloatingPointError: the model gives NaN or infinity.
        """
        from autocomp.workloads.teacher import summarize

        scores, tokens = self._scores(built, fidelity.split, fidelity.sequences)
        return summarize(scores), tokens

    def _scores(self, built: Built, split: str, sequences: int) -> tuple[Tensor, int]:
        """``teacher.sequence_scores`` of the first sequences of a split, and their tokens."""
        from autocomp.workloads.teacher import sequence_scores

        self.ensure_teacher(built, split, sequences)
        tokens = self.inputs(built, split, sequences)
        teacher = built.state["teachers"][split]
        return sequence_scores(built.model, tokens, teacher, vocabulary_size(built)), tokens.numel()

    def sequence_values(self, built: Built) -> tuple[dict[str, list[float]], Facts]:
        """See ``Workload.sequence_values``; ``ppl`` stands for its logarithm.

        Raises:
            JobError: the job scores a subset already.
            RuntimeError, FloatingPointError: see ``score``.
        """
        if self.config.data.subset:
            raise JobError(
                "workload.data.subset is set: a subset is chosen from the whole proxy split; unset it"
            )
        scores, _ = self._scores(built, "proxy", 0)
        values = dict(zip(self.sequence_metrics, scores.T.tolist(), strict=True))
        return values, self._facts(built.state["splits"]["proxy"])

    def _facts(self, pool: Tensor) -> Facts:
        return pool_facts(pool.cpu().numpy(), self.config.data, self.seed)

    def divergence(self, built: Built, split: str, logits: Tensor, index: int) -> Tensor:
        """KL(uncompressed || ``logits``) summed over the tokens of sequence ``index``: a scalar, in nats,
        with a gradient. ``logits``: ``[1, L, vocabulary]``; ``ensure_teacher`` must have seen the split."""
        from autocomp.workloads.teacher import summed_divergence

        return summed_divergence(logits[0], built.state["teachers"][split], index)

    def profile_batches(self, built: Built) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Sequences that profiles of attention use: length -> ids int64 ``[n, length]``, and bool of the same
        shape for positions whose next-token loss counts (``None``: all)."""
        ids = self.inputs(built, "calibration")
        return {ids.shape[1]: (ids, None)}

    def ensure_profile_teacher(self, built: Built) -> None:
        """Record the uncompressed model's outputs on ``profile_batches``."""
        self.ensure_teacher(built, "calibration")

    def profile_divergence(self, built: Built, logits: Tensor, length: int, row: int) -> Tensor:
        """KL(uncompressed || ``logits [1, length, vocabulary]``) on one row of ``profile_batches``, summed
        over the positions that count: a scalar with a gradient."""
        del length
        return self.divergence(built, "calibration", logits, row)

    def kernel_rows(self, built: Built) -> Mapping[str, tuple[int, float]]:
        """One token of each sequence, or all of the prompts, in one pass."""
        s = self.config.scenario
        return {"decode_ms": (s.batch, 1.0), "prefill_ms": (s.batch * s.prompt_tokens, 1.0)}

    def runtime(self, built: Built) -> tuple[str, str]:
        """What decodes this model, ``lean`` or ``eager``, and in the latter case why. Decided once, best
        while the model is uncompressed; every candidate is then timed the same way.

        Raises:
            JobError: the scenario insists on ``lean`` and the model or the machine doesn't allow it.
        """
        if "runtime" not in built.state:
            reason = self._why_not_lean(built)
            if reason and self.config.scenario.runtime == "lean":
                raise JobError(f"workload.scenario.runtime: lean is not possible here: {reason}; use auto")
            built.state["runtime"] = ("eager", reason) if reason else ("lean", "")
        found: tuple[str, str] = built.state["runtime"]
        return found

    def _why_not_lean(self, built: Built) -> str:
        from autocomp.serving.record import Unsupported

        if self.config.scenario.runtime == "eager":
            return "the job asks for the eager loop"
        try:
            self._decoder(built, verify=True)
        except Unsupported as error:
            return str(error)
        return ""

    def _decoder(self, built: Built, *, verify: bool) -> LeanDecoder:
        from autocomp.serving import LeanDecoder

        s = self.config.scenario
        room = s.context_tokens + s.decode_tokens
        return LeanDecoder(built.model, batch=s.batch, capacity=room, threads=s.threads, verify=verify)

    def time(self, built: Built, *, thorough: bool = True) -> tuple[dict[str, Estimate], dict[str, Any]]:
        """The timing metrics; see ``serving.measure``. ``thorough`` adds ``generate_ms``.

        Raises:
            CapabilityError: this candidate can't be decoded as the uncompressed model is, so that their
                latencies could not be compared.
        """
        from autocomp.serving.record import Unsupported
        from autocomp.workloads.serving import Server, measure

        runtime, why_eager = self.runtime(built)
        try:
            decoder = self._decoder(built, verify=False) if runtime == "lean" else None
        except Unsupported as error:
            raise CapabilityError(
                f"this candidate can't take the lean decode path that the uncompressed model takes: {error};"
                " set workload.scenario.runtime: eager to time all of them the same way"
            ) from error
        s = self.config.scenario
        longest = max(s.prompt_tokens, s.context_tokens) + s.decode_tokens
        text = self.inputs(built, "calibration").flatten()
        tokens = text.repeat(-(-s.batch * longest // len(text)))[: s.batch * longest].view(s.batch, longest)
        server = Server(
            built.model, tokens, prompt=s.prompt_tokens, context=s.context_tokens, steps=s.decode_tokens,
            decoder=decoder,
        )  # fmt: skip
        metrics, details = measure(
            server,
            repeats=s.repeats,
            seconds=s.seconds,
            threads=s.threads,
            device=built.device,
            generate=thorough,
        )
        return metrics, details | ({"why_eager": why_eager} if why_eager else {})

    def save(self, built: Built, folder: Path) -> None:
        """Write configuration, generation configuration and tokenizer files to ``folder``; no weights."""
        from autocomp.workloads.checkpoint import save_assets

        save_assets(built.model, built.state["tokenizer"], built.state["source"], folder)

    def _splits(self, tokenizer: Any) -> dict[str, Tensor]:
        import torch

        data = self.config.data
        documents, prefix = self._documents(tokenizer)
        counts = {name: getattr(data, name) for name in SPLITS}
        rows = split_sequences(documents, counts, data.sequence_length, self.seed, prefix)
        return {name: torch.from_numpy(array) for name, array in rows.items()}

    def _documents(self, tokenizer: Any) -> tuple[list[np.ndarray], list[int]]:
        """Token ids of each document, and what every sequence begins with."""
        from autocomp.workloads.checkpoint import quiet

        texts = drop_repeats(read_documents(self.config.data.text))
        with quiet():  # "longer than the model's maximum": the stream is cut afterwards
            return tokenize(tokenizer, texts), sequence_prefix(tokenizer)

    def _lengths(self) -> dict[str, int]:
        """Key of the job -> tokens that the model must be able to read."""
        s = self.config.scenario
        return {
            "data.sequence_length": self.config.data.sequence_length,
            "scenario.prompt_tokens": s.prompt_tokens,
            "scenario.context_tokens + decode_tokens": s.context_tokens + s.decode_tokens,
        }

    def _check_lengths(self, config: Any) -> None:
        limit = getattr(config, "max_position_embeddings", None)
        for name, length in self._lengths().items():
            if limit is not None and length > limit:
                raise JobError(f"{name} is {length}, but the model's context is {limit} tokens: lower it")


def vocabulary_size(built: Built) -> int:
    return int(built.model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]


def _check_vocabulary(model: Any, splits: Mapping[str, Tensor]) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(int(tokens.max()) for tokens in splits.values())
    if largest >= rows:
        raise JobError(
            f"the tokenizer gives token {largest}, but the model's embedding has {rows} rows: "
            "tokenizer and weights do not belong together"
        )
