from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from autocomp.errors import JobError
from autocomp.testing.models import tiny_tokenizer
from autocomp.workloads.retrieval import (
    MOST_PAIRS,
    WORDS,
    Prompt,
    key_value_sentence,
    make_prompts,
    passkey_sentence,
    right_answers,
)
from autocomp.workloads.teacher import forward
from autocomp.workloads.text import SPLITS

FILLER = np.arange(10_000, 10_700)  # unlike any token of a fact


def encode(text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def decode(ids: Any) -> str:
    return str(tiny_tokenizer().decode([int(i) for i in ids if i < 10_000]))


def prompts(kind: str = "key_value", split: str = "report", **changes: Any) -> list[Prompt]:
    given: dict[str, Any] = {"count": 3, "length": 512, "pairs": 4, "digits": 5, **changes}
    return make_prompts(encode, FILLER, kind, split, **given)


def test_every_fact_is_in_the_text_and_asked_once_with_its_own_answer() -> None:
    for prompt in prompts():
        assert prompt.ids.shape == (512,) and prompt.ids.dtype == np.int64
        assert len(prompt.answers) == 4
        first = min(a.start for a in prompt.answers)
        for answer in prompt.answers:
            number = decode(prompt.ids[answer.start : answer.stop]).strip()
            assert len(number) == 5 and number.isdigit()
            question = decode(prompt.ids[: answer.start]).rpartition("\n")[2]
            # The question with its answer is the sentence that stands in the text, at its depth.
            spot = round(answer.depth * 512)
            fact = key_value_sentence(encode, question.rpartition(" ")[2], int(number)).ids
            assert prompt.ids[spot : spot + len(fact)].tolist() == fact
            assert spot + len(fact) < first
            assert decode(prompt.ids).count(f" {number}.") == 2


def test_facts_are_spread_over_the_text_and_questions_are_shuffled() -> None:
    depths = [[a.depth for a in p.answers] for p in prompts(count=40, length=900)]
    room = 900 - 2 * 4 * 40  # about: words differ in length
    for row in depths:
        assert all(b - a > 0 for a, b in zip(sorted(row), sorted(row)[1:]))
    for k, column in enumerate(zip(*map(sorted, depths))):
        low, high = ((k * room / 4 + 30 * k) / 900, ((k + 1) * room / 4 + 60 * (k + 1)) / 900)
        assert all(low <= depth <= high for depth in column)
        assert max(column) - min(column) > 0.08  # jitter within a stretch
    assert sum(row == sorted(row) for row in depths) < 10  # by chance one in 24


def test_the_passkey_goes_through_all_depths() -> None:
    found = prompts("passkey", count=5)
    spots = [p.answers[0].depth for p in found]
    assert [len(p.answers) for p in found] == [1] * 5
    for i, depth in enumerate(spots):
        assert i / 5 * 0.8 <= depth <= (i + 1) / 5
    ids = found[0].ids
    number = int(decode(ids[found[0].answers[0].start : found[0].answers[0].stop]))
    assert ids[-len(passkey_sentence(encode, number).ids) :].tolist() == passkey_sentence(encode, number).ids


def test_the_rest_is_a_stretch_of_the_text() -> None:
    for prompt in prompts(prefix=[256]):
        assert prompt.ids[0] == 256
        text = prompt.ids[prompt.ids >= 10_000]
        assert ((text[1:] - text[:-1]) % 700 == 1).all()  # wraps around at the end
    assert len({int(p.ids[p.ids >= 10_000][0]) for p in prompts(count=8)}) > 4


def test_splits_share_neither_words_nor_numbers() -> None:
    assert len(set(WORDS)) == len(WORDS) == MOST_PAIRS * len(SPLITS)
    words: dict[str, set[str]] = {}
    for split in SPLITS:
        text = "".join(decode(p.ids) for p in prompts(split=split, count=6))
        words[split] = {line.split(":")[0].split()[-1] for line in text.split("\n\n") if ":" in line}
    for a in SPLITS:
        assert len(words[a]) > 8
        assert all(a == b or not words[a] & words[b] for b in SPLITS)
    assert [p.ids.tolist() for p in prompts()] == [p.ids.tolist() for p in prompts()]
    assert prompts()[0].ids.tolist() != prompts(seed=[1])[0].ids.tolist()
    assert len({tuple(p.ids.tolist()) for p in prompts(count=8)}) == 8


class Reader:
    """A model that reads: it writes what followed the last ``span`` tokens where they stood before."""

    def __init__(self, span: int, window: int = 10**6) -> None:
        self.span, self.window = span, window

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        ids = input_ids[0].tolist()
        logits = torch.zeros(1, len(ids), 11_000)
        for i in range(self.span - 1, len(ids)):
            key = ids[i + 1 - self.span : i + 1]
            for j in range(max(self.span - 1, i - self.window), i):
                if ids[j + 1 - self.span : j + 1] == key:
                    logits[0, i, ids[j + 1]] = 1.0
                    break

        class Output:
            pass

        found: Any = Output()
        found.logits = logits
        return found

    __call__ = forward

    def answers(self, prompt: Prompt) -> list[bool]:
        logits = forward(self, torch.from_numpy(prompt.ids)[None], torch.from_numpy(prompt.positions))[0]
        return right_answers(prompt, logits)


def test_a_model_that_looks_things_up_is_right_and_others_are_not() -> None:
    prompt = prompts(count=1, length=420)[0]
    assert Reader(10).answers(prompt) == [True] * 4
    # A window of 200 tokens holds some of the facts only: those that the window reaches.
    questions = [decode(prompt.ids[: a.start]).rpartition("\n\n")[2] for a in prompt.answers]
    near = [
        a.start - len(encode("\n\n" + question)) - a.depth * 420 <= 200
        for a, question in zip(prompt.answers, questions)
    ]
    assert Reader(10, 200).answers(prompt) == near and 0 < sum(near) < 4
    # One wrong token of an answer makes it wrong.
    changed = prompt.ids.copy()
    changed[prompt.answers[2].stop - 1] = encode("x")[0]
    found = Reader(10).answers(Prompt("key_value", changed, prompt.answers))
    assert found == [True, True, False, True]


def test_answers_can_not_be_guessed() -> None:
    """Without the fact nothing in the prompt tells the number."""
    rng = random.Random(0)
    found = []
    for prompt in prompts(count=6, length=420):
        ids = prompt.ids.copy()
        for answer in prompt.answers:
            spot = round(answer.depth * 420)
            ids[spot : spot + 60] = rng.choices(range(10_000, 10_700), k=60)
        found += Reader(3).answers(Prompt("key_value", ids, prompt.answers))
    assert sum(found) == 0


def test_a_prompt_without_room_for_text_is_refused() -> None:
    with pytest.raises(JobError, match=r"8 facts .* of a prompt's 400 tokens.*lower long\.retrieval\.pairs"):
        prompts(pairs=8, length=400)
