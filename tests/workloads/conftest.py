from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from autocomp.testing.models import tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by kind, built once a session."""
    root = tmp_path_factory.mktemp("tiny")
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tiny_model(kind, root / kind)
        return folders[kind]

    return folder


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of small, different documents: enough for splits of a few dozen short sequences."""
    root = tmp_path_factory.mktemp("prose")
    sentence = "the cat saw seven green ships under a cold moon while nobody spoke of rain"
    words = sentence.split()
    files = []
    for d in range(12):
        lines = [
            " ".join(words[(d * 7 + i * i + j * (d + 1)) % len(words)] for j in range(12)) + f" {d}.{i}"
            for i in range(12)
        ]
        path = root / f"{d:02}.txt"
        path.write_text("\n\n".join(lines), encoding="utf-8")
        files.append(str(path))
    return files
