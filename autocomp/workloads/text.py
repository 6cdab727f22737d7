"""Text to token sequences in disjoint splits.

Documents become one token stream; each split owns a contiguous region of it, cut between documents where
that leaves every split enough, and holds non-overlapping sequences of its region only. Regions depend on
the text alone; the seed merely picks and orders sequences inside a region, so that a sequence of the
report split can never have been a proxy sequence under another seed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from autocomp.errors import JobError
from autocomp.space import content_hash

#: Split names in the order of their regions; the report region lies apart at the end.
SPLITS = ("calibration", "proxy", "selection", "report")

#: Paragraphs at least this long (characters) are kept once: a repeat could sit in two splits.
REPEAT_LENGTH = 40


def read_documents(files: Sequence[str]) -> list[str]:
    """The texts of ``files`` (UTF-8, one document a file), or built-in English prose when there are none.

    Raises:
        JobError: a file is missing or is no text; the built-in prose is not installed.
    """
    if not files:
        return _builtin_documents()
    documents = []
    for name in files:
        path = Path(name).expanduser()
        try:
            documents.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise JobError(f"data.text: {name} is not UTF-8 text ({error}); convert it first") from error
        except OSError as error:
            reason = error.strerror or error
            raise JobError(f"data.text: can't read {name} ({reason}); check the path") from error
    return documents


def _builtin_documents() -> list[str]:
    """Python's own language reference, part of the standard library: some 700 000 characters of prose."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise JobError(
            "this Python lacks pydoc_data, the built-in text; name text files in data.text"
        ) from error
    return [text for _, text in sorted(topics.items())]


def drop_repeats(documents: Iterable[str]) -> list[str]:
    """Documents without paragraphs that an earlier one (or the same one) already had; empty ones go."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", document):
            key = " ".join(paragraph.split())
            if key and not (len(key) >= REPEAT_LENGTH and key in seen):
                paragraphs.append(paragraph)
            seen.add(key)
        if paragraphs:
            kept.append("\n\n".join(paragraphs))
    return kept


def tokenize(tokenizer: Any, documents: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each document (int64), without special tokens but for an end-of-text mark, if any."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return [np.asarray(ids + end, dtype=np.int64) for ids in encoded if ids]


def sequence_prefix(tokenizer: Any) -> list[int]:
    """The beginning-of-text token when the tokenizer puts one before every text, else nothing."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and len(ids) > 1 and ids[0] == bos else []


def cut_regions(lengths: Sequence[int], needs: Sequence[int]) -> list[tuple[int, int]]:
    """Cut a stream of documents into consecutive regions ``[start, stop)``, one for each need.

    Regions get shares in proportion to ``needs``; each cut is moved to the nearest document boundary that
    leaves every region what it needs, and stays inside a document only when there is no such boundary.

    Args:
        lengths: tokens of each document.
        needs: least tokens of each region; their sum must not exceed the sum of ``lengths``.
    """
    boundaries = np.array([0, *accumulate(lengths)])
    total, asked = int(boundaries[-1]), sum(needs)
    cuts = [0]
    for i in range(1, len(needs)):
        low, high = cuts[-1] + needs[i - 1], total - sum(needs[i:])
        ideal = min(max(round(total * sum(needs[:i]) / max(1, asked)), low), high)
        fitting = boundaries[(boundaries >= low) & (boundaries <= high)]
        cuts.append(int(fitting[np.abs(fitting - ideal).argmin()]) if fitting.size else ideal)
    return list(zip(cuts, [*cuts[1:], total]))


def split_sequences(
    documents: Sequence[np.ndarray],
    counts: Mapping[str, int],
    sequence_length: int,
    seed: int,
    prefix: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """Sequences of each split: int64 ``[counts[split], sequence_length]``.

    A split's rows are in seeded random order, so that the first k of them are a sample of the split for
    every k, and contained in the first 2k (common random numbers between fidelities).

    Args:
        documents: token ids, one array a document.
        counts: split -> number of sequences, for the names in ``SPLITS``.
        sequence_length: tokens of a sequence, ``prefix`` included.
        seed: picks and orders the sequences inside each region.
        prefix: tokens put before every sequence (beginning of text).

    Raises:
        JobError: the text is too short; says how many tokens there are and how many are needed.
    """
    body = sequence_length - len(prefix)
    sizes = ", ".join(f"{s} {counts[s]}" for s in SPLITS)
    regions = split_regions(
        documents,
        {s: counts[s] * body for s in SPLITS},
        f"{sizes} sequences of {body} tokens",
        "data.sequence_length or the number of sequences",
    )
    return {
        name: pick_sequences(region, counts[name], sequence_length, [seed, name], prefix)
        for name, region in regions.items()
    }


def split_regions(
    documents: Sequence[np.ndarray], needs: Mapping[str, int], asked: str, remedy: str
) -> dict[str, np.ndarray]:
    """The tokens that each split owns: split -> int64 ``[>= needs[split]]``; see ``cut_regions``.

    Args:
        documents: token ids, one array a document.
        needs: split -> least tokens, in the order of the regions.
        asked: what ``needs`` stands for, in words.
        remedy: what could be lowered, in words.

    Raises:
        JobError: the text is too short; says how many tokens there are and how many are needed.
    """
    total, least = sum(map(len, documents)), sum(needs.values())
    if total < least:
        raise JobError(
            f"the text has {total} tokens, but {least} are needed ({asked}): "
            f"add files to data.text, or lower {remedy}"
        )
    stream = np.concatenate([*documents, np.empty(0, np.int64)])
    cuts = cut_regions([len(d) for d in documents], list(needs.values()))
    return {name: stream[start:stop] for name, (start, stop) in zip(needs, cuts)}


def pick_sequences(
    region: np.ndarray, count: int, sequence_length: int, seed: Sequence[object], prefix: Sequence[int] = ()
) -> np.ndarray:
    """``count`` of the non-overlapping sequences of ``region`` in seeded random order: int64
    ``[count, sequence_length]``, each beginning with ``prefix``. The region must hold so many."""
    body = sequence_length - len(prefix)
    available = len(region) // body
    chunks = region[: available * body].reshape(available, body)
    # Hashed: neighbouring seeds and splits get unrelated permutations, alike on every platform.
    rng = np.random.default_rng(int(content_hash(list(seed)), 16))
    chosen = chunks[rng.permutation(available)[:count]]
    head = np.broadcast_to(np.asarray(prefix, np.int64), (len(chosen), len(prefix)))
    return np.concatenate([head, chosen], axis=1)
