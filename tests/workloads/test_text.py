from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.errors import JobError
from autocomp.testing.models import END, tiny_tokenizer
from autocomp.workloads.text import (
    SPLITS,
    cut_regions,
    drop_repeats,
    read_documents,
    sequence_prefix,
    split_sequences,
    tokenize,
)

COUNTS = {"calibration": 3, "proxy": 2, "selection": 4, "report": 5}


def documents(sizes: list[int]) -> list[np.ndarray]:
    """Documents whose tokens are all different, so that every token tells where it came from."""
    stops = np.cumsum(sizes)
    return [np.arange(stop - size, stop) for stop, size in zip(stops, sizes)]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    needs=st.lists(st.integers(0, 40), min_size=1, max_size=5),
)
def test_regions_are_disjoint_cover_all_and_hold_what_is_needed(lengths: list[int], needs: list[int]) -> None:
    if sum(needs) > sum(lengths):
        return
    regions = cut_regions(lengths, needs)
    assert regions[0][0] == 0 and regions[-1][1] == sum(lengths)
    assert all(a[1] == b[0] for a, b in pairwise(regions))
    assert all(stop - start >= need for (start, stop), need in zip(regions, needs))


def test_regions_end_between_documents_when_they_can() -> None:
    assert cut_regions([30, 30, 30, 30], [10, 10, 10]) == [(0, 30), (30, 90), (90, 120)]
    # One long document has no boundary to cut at.
    assert cut_regions([90], [10, 10, 10]) == [(0, 30), (30, 60), (60, 90)]


@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(40, 90), min_size=4, max_size=8))
def test_splits_never_share_a_token(seed: int, sizes: list[int]) -> None:
    splits = split_sequences(documents(sizes), COUNTS, 8, seed)
    assert {name: rows.shape for name, rows in splits.items()} == {n: (c, 8) for n, c in COUNTS.items()}
    everything = np.concatenate([rows.ravel() for rows in splits.values()])
    assert len(np.unique(everything)) == len(everything)
    for rows in splits.values():
        assert (np.diff(rows, axis=1) == 1).all()  # each sequence is a stretch of the text


def test_the_seed_only_chooses_inside_a_region() -> None:
    text = documents([50] * 20)
    regions = dict(zip(SPLITS, cut_regions([50] * 20, [COUNTS[s] * 8 for s in SPLITS])))
    chosen = set()
    for seed in range(8):
        splits = split_sequences(text, COUNTS, 8, seed)
        chosen.add(splits["proxy"].tobytes())
        for name, (start, stop) in regions.items():
            assert splits[name].min() >= start and splits[name].max() < stop
    assert len(chosen) > 1


def test_same_text_and_seed_give_the_same_sequences() -> None:
    first, second = (split_sequences(documents([50] * 20), COUNTS, 8, seed=7) for _ in range(2))
    assert all((first[s] == second[s]).all() for s in SPLITS)


def test_every_sequence_starts_with_the_prefix() -> None:
    splits = split_sequences(documents([200]), COUNTS, 8, 0, prefix=[999])
    for name, rows in splits.items():
        assert rows.shape == (COUNTS[name], 8)
        assert (rows[:, 0] == 999).all() and (rows[:, 1:] < 200).all()


def test_too_little_text_names_the_numbers_and_the_remedy() -> None:
    with pytest.raises(JobError, match=r"has 100 tokens, but 112 are needed.*report 5.*sequence_length"):
        split_sequences(documents([100]), COUNTS, 8, 0)
    with pytest.raises(JobError, match="has 0 tokens"):
        split_sequences([], COUNTS, 8, 0)


def test_exactly_enough_text_is_enough() -> None:
    splits = split_sequences(documents([112]), COUNTS, 8, 0)
    assert sorted(np.concatenate([r.ravel() for r in splits.values()])) == list(range(112))


def test_repeated_paragraphs_are_kept_once() -> None:
    long, short = "a paragraph that is long enough to matter here", "short"
    first, second = f"{long}\n\n{short}", f"{long.replace(' ', '  ')}\n\nnew\n\n{short}"
    assert drop_repeats([first, second, long, "  \n\n "]) == [first, f"new\n\n{short}"]


def test_builtin_prose_is_there_and_long() -> None:
    texts = drop_repeats(read_documents([]))
    assert len(texts) > 50 and sum(map(len, texts)) > 300_000


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"missing\.txt"):
        read_documents([str(tmp_path / "missing.txt")])
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00 text")
    with pytest.raises(JobError, match="not UTF-8"):
        read_documents([str(binary)])


def test_tokens_end_with_the_end_mark_and_empty_documents_vanish() -> None:
    tokenizer = tiny_tokenizer()
    encoded = tokenize(tokenizer, ["ab", "", "c"])
    assert [len(e) for e in encoded] == [3, 2]
    assert all(e[-1] == tokenizer.convert_tokens_to_ids(END) and e.dtype == np.int64 for e in encoded)


def test_prefix_only_for_tokenizers_that_add_one() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    assert sequence_prefix(tokenizer) == []
    mark = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, mark)]
    )
    assert sequence_prefix(tokenizer) == [mark]
