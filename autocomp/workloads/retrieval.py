"""Retrieval prompts: facts spread over real text, asked for at the end, many answers in one forward pass.

A fact and its question are the same sentence, ``The code of the river: river 48213.``; the question ends
before the number. The key word stands directly before its number: small models, which continue what they
have seen, find it far better then than in ``The code of river is 48213.``. Answers are given (teacher
forcing), so later questions see earlier ones with their right answers, and one pass over the prompt scores
all of them: an answer is right when every one of its tokens is the most likely one, which is when greedy
decoding would have written it. A number can't be guessed: it is drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from autocomp.errors import JobError
from autocomp.space import content_hash
from autocomp.workloads.text import SPLITS

if TYPE_CHECKING:
    from torch import Tensor

_WORDS = """
anchor apple arrow badge bamboo banana barrel basin basket beach beacon bell bench berry blanket blossom boat
bottle bowl branch brick bridge bronze broom brush bucket button cabin cable cactus camel camera candle canoe
canvas canyon carpet carrot castle cave chain chair cherry chess chimney circus clock cloud clover coast
coffee comet compass copper coral cotton cradle crane crater crown crystal curtain desert diamond dolphin
donkey dragon drum eagle elbow engine falcon feather fence ferry finger flame flute forest fossil fountain
fox garden garlic ginger glacier glove goat gravel guitar hammer harbor harp hat hazel helmet hill honey hook
horn horse hotel island ivory jacket jewel jungle kettle kite kitten ladder lake lamp lantern laser lemon
lily lion lizard lotus magnet mango maple marble market mask meadow medal mirror monkey moon mosaic mountain
needle nest oak oasis ocean olive onion orange orchid oven owl oyster paddle palace panda parrot pearl pencil
pepper piano pigeon pillow pirate planet plum pocket pony
"""
#: Key words; each split has its own quarter.
WORDS = tuple(_WORDS.split())
MOST_PAIRS = len(WORDS) // len(SPLITS)

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Answer:
    """Where an answer stands in a prompt.

    Attributes:
        start, stop: its tokens.
        depth: where its fact stands, as a share of the prompt: 0 at the beginning, 1 at the end.
    """

    start: int
    stop: int
    depth: float


@dataclass(frozen=True)
class Prompt:
    """One prompt with all its answers.

    Attributes:
        kind: ``key_value`` (several facts, all asked) or ``passkey`` (one fact).
        ids: int64 ``[length]``.
        answers: in the order of the questions, which is not that of the facts.
    """

    kind: str
    ids: np.ndarray
    answers: tuple[Answer, ...]

    @property
    def positions(self) -> np.ndarray:
        """Positions whose next token belongs to an answer: int64, ascending."""
        return np.concatenate([np.arange(a.start - 1, a.stop - 1) for a in self.answers])


@dataclass(frozen=True)
class Sentence:
    """A fact in tokens: what the question shows, and the answer."""

    lead: list[int]
    answer: list[int]
    end: list[int]

    @property
    def ids(self) -> list[int]:
        return [*self.lead, *self.answer, *self.end]


def key_value_sentence(encode: Encode, word: str, number: int) -> Sentence:
    """``The code of the river: river 48213.``"""
    # In pieces: a fact and its question then have the same tokens, whatever the tokenizer does to spaces.
    return Sentence(encode(f"\n\nThe code of the {word}: {word}"), encode(f" {number}"), encode("."))


def passkey_sentence(encode: Encode, number: int) -> Sentence:
    """``Remember the pass key: pass key 48213.``"""
    return Sentence(encode("\n\nRemember the pass key: pass key"), encode(f" {number}"), encode("."))


def make_prompts(
    encode: Encode,
    filler: np.ndarray,
    kind: str,
    split: str,
    *,
    count: int,
    length: int,
    pairs: int,
    digits: int,
    seed: Sequence[object] = (),
    prefix: Sequence[int] = (),
) -> list[Prompt]:
    """Prompts of one kind and length.

    Facts of ``key_value`` are spread over the text: one at random in each of ``pairs`` equal stretches. The
    one fact of ``passkey`` is in one of ``count`` stretches, another in each prompt. Words are those of the
    split, so that no word of the report is in another split.

    Args:
        encode: text to token ids, without special tokens.
        filler: token ids of real text ``[>= 1]``, from where each prompt takes a stretch that begins at
            random (at the end it goes on at the beginning).
        count: number of prompts.
        length: tokens of a prompt.
        pairs: facts of a ``key_value`` prompt.
        digits: of a number.
        seed: of all that is random here, beside kind, split and length.
        prefix: tokens that every prompt begins with.

    Raises:
        JobError: facts and questions leave no room for text.
    """
    words = WORDS[SPLITS.index(split) :: len(SPLITS)]
    found = []
    for i in range(count):
        rng = random.Random(content_hash([list(seed), kind, split, length, i]))
        asked = rng.sample(words, pairs if kind == "key_value" else 1)
        numbers = rng.sample(range(10 ** (digits - 1), 10**digits), len(asked))
        if kind == "key_value":
            facts = [key_value_sentence(encode, w, n) for w, n in zip(asked, numbers)]
            spots = [(j + rng.random()) / pairs for j in range(pairs)]
        else:
            facts = [passkey_sentence(encode, numbers[0])]
            spots = [(i + rng.random()) / count]
        found.append(_assemble(kind, facts, spots, filler, length, prefix, rng))
    return found


def _assemble(
    kind: str,
    facts: Sequence[Sentence],
    spots: Sequence[float],
    filler: np.ndarray,
    length: int,
    prefix: Sequence[int],
    rng: random.Random,
) -> Prompt:
    """Prefix, text with each fact at its spot (ascending, shares of the text), questions in random order."""
    room = length - len(prefix) - 2 * sum(len(f.ids) for f in facts)
    if room < len(facts):
        raise JobError(
            f"{len(facts)} facts and their questions take {length - room} of a prompt's {length} tokens and "
            "leave no room for text: lower long.retrieval.pairs, or raise long.lengths"
        )
    text = np.resize(np.roll(filler, -rng.randrange(len(filler))), room)
    cuts = [int(spot * room) for spot in spots]
    ids, depths = list(prefix), []
    for start, stop, fact in zip([0, *cuts], cuts, facts):
        ids += [*text[start:stop].tolist(), *fact.ids]
        depths.append((len(ids) - len(fact.ids)) / length)
    ids += text[cuts[-1] :].tolist()
    answers = []
    for j in rng.sample(range(len(facts)), len(facts)):
        start = len(ids) + len(facts[j].lead)
        answers.append(Answer(start, start + len(facts[j].answer), depths[j]))
        ids += facts[j].ids
    return Prompt(kind, np.asarray(ids, dtype=np.int64), tuple(answers))


def right_answers(prompt: Prompt, logits: Tensor) -> list[bool]:
    """Whether greedy decoding gives each answer; ``logits`` ``[K, vocabulary]`` at ``prompt.positions``."""
    best = logits.argmax(-1).cpu().numpy()
    right = best == prompt.ids[prompt.positions + 1]
    found, start = [], 0
    for answer in prompt.answers:
        stop = start + answer.stop - answer.start
        found.append(bool(right[start:stop].all()))
        start = stop
    return found
