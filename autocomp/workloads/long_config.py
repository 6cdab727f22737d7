"""What a job says under ``workload`` for ``kind: long_context``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from autocomp.workloads.causal_lm import CausalLMConfig
from autocomp.workloads.retrieval import MOST_PAIRS
from autocomp.workloads.text import SPLITS


class Documents(BaseModel):
    """Long documents of each split. A document at a shorter length is its beginning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calibration: int = Field(default=2, ge=1)
    proxy: int = Field(default=2, ge=1)
    selection: int = Field(default=4, ge=1)
    report: int = Field(default=8, ge=1)


class Prompts(BaseModel):
    """Retrieval prompts of each split, for each of its lengths; 0 for none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calibration: int = Field(default=2, ge=0)
    proxy: int = Field(default=1, ge=0)
    selection: int = Field(default=4, ge=0)
    report: int = Field(default=8, ge=0)


class RetrievalConfig(BaseModel):
    """Facts to be found in real text.

    Attributes:
        prompts: prompts with several facts, all of which are asked for.
        passkeys: prompts with a single fact.
        pairs: facts of a prompt with several.
        digits: of a fact's number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: Prompts = Prompts()
    passkeys: Prompts = Prompts(calibration=0, proxy=0, selection=0, report=4)
    pairs: int = Field(default=8, ge=1, le=MOST_PAIRS)
    digits: int = Field(default=5, ge=2, le=12)

    def count(self, kind: str, split: str) -> int:
        """Prompts of ``kind`` (``key_value``, ``passkey``) for each length of ``split``."""
        found: int = getattr(self.prompts if kind == "key_value" else self.passkeys, split)
        return found


class LongConfig(BaseModel):
    """Lengths, and how much of each split there is at each of them.

    Attributes:
        lengths: tokens, of ``calibration`` and ``proxy``: what profiles and the search see.
        unseen: tokens, of ``selection``: what the search has not seen. ``report`` has all lengths.
        documents: how many documents.
        stride: every so many-th position of a document is scored. The output head and the softmax then work
            less: with 49 152 tokens in the vocabulary they are a third of a score's cost.
        retrieval: prompts with facts to be found.
        calibrate_on: what profiles of attention look at, and what ``kl`` is about. ``text``: documents;
            ``retrieval``: prompts, of which only the answers count; ``mixed``: both (equal weights in ``kl``,
            every sequence alike in profiles); ``continuation``: ``kl`` of documents, and profiles on first
            halves of documents, continued by the uncompressed model, of which only the continuation counts
            (as MoA does).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lengths: tuple[int, ...] = (1024, 2048)
    unseen: tuple[int, ...] = (4096,)
    documents: Documents = Documents()
    stride: int = Field(default=4, ge=1)
    retrieval: RetrievalConfig = RetrievalConfig()
    calibrate_on: Literal["text", "continuation", "retrieval", "mixed"] = "mixed"

    @model_validator(mode="after")
    def _check(self) -> LongConfig:
        for name, lengths in (("lengths", self.lengths), ("unseen", self.unseen)):
            if not lengths or min(lengths) < 8 or list(lengths) != sorted(set(lengths)):
                raise ValueError(
                    f"long.{name} is {list(lengths)}: give ascending lengths of 8 tokens or more"
                )
        r = self.retrieval
        without = [s for s in SPLITS if not r.count("key_value", s)]
        if without and self.calibrate_on in ("retrieval", "mixed"):
            raise ValueError(
                f"long.calibrate_on is {self.calibrate_on}, but there are no prompts for "
                f"{', '.join(without)}: raise long.retrieval.prompts.{without[0]}, or use calibrate_on: text"
            )
        return self

    def of(self, split: str) -> tuple[int, ...]:
        """Lengths of a split, ascending."""
        if split == "report":
            return tuple(sorted({*self.lengths, *self.unseen}))
        return self.unseen if split == "selection" else self.lengths


class LongContextConfig(CausalLMConfig):
    """What a job says under ``workload`` for ``kind: long_context``: all of ``causal_lm``, and ``long``.

    Of the numbers of sequences in ``data`` only ``calibration`` is used: short sequences, for the profiles
    and the rounding of weights.
    """

    long: LongConfig = LongConfig()

    @model_validator(mode="after")
    def _no_subset(self) -> LongContextConfig:
        if self.data.subset:
            raise ValueError(
                "data.subset is for causal_lm: long_context scores whole documents; leave it out"
            )
        return self
