"""Converted copies of GGUF files: reading one takes Python tens of seconds, and every worker start pays it.

The first load writes an ordinary folder (safetensors, tokenizer) to the cache, later ones read that. The
key holds the file's content, so a changed file is converted anew. Without a writable cache the file itself
is read each time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from autocomp.workloads.checkpoint import Source, load_model, load_tokenizer, quiet

_log = logging.getLogger(__name__)


def convert(source: Source, dtype: str) -> Source:
    """The folder with ``source``'s weights in ``dtype`` (``auto``: bfloat16), made when it is not there;
    ``source`` itself when none can be written.

    Raises:
        JobError: the file can't be read as a causal language model with a tokenizer.
    """
    dtype = "bfloat16" if dtype == "auto" else dtype
    folder = converted_folder(source.folder / source.gguf, dtype)
    if (folder / "config.json").is_file() or _store(
        load_model(source, dtype), load_tokenizer(source), folder
    ):
        return Source(folder)
    return source


def converted_folder(file: Path, dtype: str) -> Path:
    """Where the copy of ``file`` in ``dtype`` lies or would lie: under ``$AUTOCOMP_CACHE/gguf``, or
    ``gguf`` in the user's cache folder. Raises ``OSError`` when the file can't be read."""
    import transformers

    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    # Another version of transformers may convert differently.
    digest.update(f"{dtype} {transformers.__version__}".encode())
    root = os.environ.get("AUTOCOMP_CACHE") or Path.home() / ".cache" / "autocomp"
    return Path(root).expanduser() / "gguf" / digest.hexdigest()[:24]


def _store(model: Any, tokenizer: Any, folder: Path) -> bool:
    """Write the converted model to ``folder``, whole or not at all; False where that fails (a full disk,
    no permission)."""
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        with quiet():
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        scratch.rename(folder)
    except (OSError, RuntimeError) as error:
        if (folder / "config.json").is_file():
            return True  # another worker was faster
        _log.warning(
            "can't keep the converted GGUF model in %s (%s); each start will convert it", folder, error
        )
        return False
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return True
