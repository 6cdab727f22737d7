"""Load a causal language model and its tokenizer from a local folder or a GGUF file; never from a hub."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from autocomp.errors import JobError

#: What transformers raises for files that it can't read (RuntimeError covers NotImplementedError).
_UNREADABLE = (
    OSError, ValueError, KeyError, IndexError, TypeError, EOFError, RuntimeError, ImportError,
    SafetensorError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a model lies: its folder and, for GGUF, the file in it."""

    folder: Path
    gguf: str = ""


def locate(model: str) -> Source:
    """Find the checkpoint that ``model`` names: a folder with ``config.json``, a folder with exactly one
    ``.gguf`` file, or a ``.gguf`` file.

    Raises:
        JobError: nothing there, or nothing loadable; says how to get a local folder.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.resolve().parent, path.name)
    if path.is_file():
        raise JobError(f"workload.model: {model} is a file but no .gguf; name the folder that holds it")
    if not path.is_dir():
        raise JobError(_missing_text(model))
    if (path / "config.json").is_file():
        return Source(path.resolve())
    files = sorted(f.name for f in path.glob("*.gguf"))
    if len(files) == 1:
        return Source(path.resolve(), files[0])
    found = f"{len(files)} .gguf files ({', '.join(files[:3])})" if files else "neither"
    raise JobError(
        f"workload.model: {model} needs a config.json or exactly one .gguf file; it has {found}. "
        "Name the file itself, or a folder written by save_pretrained"
    )


def _missing_text(model: str) -> str:
    text = f"workload.model: there is no folder or .gguf file {model!r} on this machine"
    looks_like_hub = model.count("/") == 1 and not model.startswith(("/", "~", "."))
    if looks_like_hub:
        name = model.rpartition("/")[2]
        return (
            f"{text}, and models are not downloaded during a run. Get it first with "
            f"`hf download {model} --local-dir ./{name}`, then set model: ./{name}"
        )
    return f"{text}; check the path (a relative one starts where the worker runs)"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers: its log below errors and its progress bars. What matters (missing weights) is
    checked by the callers and raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The GGUF reader's progress bar has no switch: it writes to whatever stderr is at the time.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_model(source: Source, dtype: str, *, trust_remote_code: bool = False) -> Any:
    """The model on the CPU, in evaluation mode, without gradients.

    Args:
        source: from ``locate``.
        dtype: ``auto`` (the checkpoint's; bfloat16 for GGUF) or a torch type name.
        trust_remote_code: run Python code that lies in the folder.

    Raises:
        JobError: the folder can't be read as a causal language model, or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    if dtype == "auto" and source.gguf:
        dtype = "bfloat16"
    options = {**_options(source, trust_remote_code), **_as_plain_weights(source)}
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                source.folder,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=True,
                **options,
            )
    except _UNREADABLE as error:
        raise JobError(
            f"workload.model: {source.folder / source.gguf} can't be loaded as a causal language model: "
            f"{type(error).__name__}: {error}"
        ) from error
    # Tied weights are legitimately absent from a checkpoint; transformers does not list them as missing.
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise JobError(
            f"workload.model: {source.folder} lacks {len(absent)} weights of {type(model).__name__} or has "
            f"them in another shape ({', '.join(absent[:3])}); the download may be incomplete"
        )
    if source.gguf:
        _forget_quantizer(model)
    return model.eval().requires_grad_(False)


def _as_plain_weights(source: Source) -> dict[str, Any]:
    """Options that make transformers unpack quantized weights; refuses what can't be unpacked exactly."""
    if source.gguf:
        import transformers

        # Newer versions would otherwise keep GGUF blocks packed, in layers of their own type.
        config = getattr(transformers, "GgufConfig", None)
        return {"quantization_config": config(dequantize=True)} if config else {}
    try:
        quantized = json.loads((source.folder / "config.json").read_text()).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise JobError(f"workload.model: {source.folder / 'config.json'} can't be read: {error}") from error
    if quantized:
        method = quantized.get("quant_method", "an unknown method")
        raise JobError(
            f"workload.model: {source.folder} is already quantized ({method}); give the original model, "
            "which is both what to compress and what to compare with"
        )
    return {}


def _forget_quantizer(model: Any) -> None:
    """Weights from a GGUF file are plain tensors now; what says otherwise would stop ``save_pretrained``."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that belongs to ``source``.

    Raises:
        JobError: there is none, or it can't be read.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source.folder, **_options(source, trust_remote_code))
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        ImportError,
        NotImplementedError,
        TypeError,
    ) as error:
        raise JobError(
            f"workload.model: no usable tokenizer in {source.folder}: {type(error).__name__}: {error}; "
            "put tokenizer.json and tokenizer_config.json beside the weights"
        ) from error


def _options(source: Source, trust_remote_code: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    return {**options, "gguf_file": source.gguf} if source.gguf else options


def fingerprint(model: torch.nn.Module) -> str:
    """64 hexadecimal digits: SHA-256 over the model's class and its weights' names, types, shapes and bytes.

    Independent of where the weights lie and how they were stored on disk; a weight under two names (tied)
    is read once. The model must be on the CPU for speed; elsewhere each tensor is copied.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    seen: set[tuple[int, int]] = set()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        place = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and place not in seen:
            seen.add(place)
            # Viewed as bytes: NumPy has no bfloat16.
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def save_assets(model: Any, tokenizer: Any, source: Source, folder: Path) -> None:
    """Write configuration, generation configuration, tokenizer and (for models that bring their own code)
    Python files to ``folder``, which is created; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    if not config.architectures:
        config.architectures = [type(model).__name__]
    with quiet():
        config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if getattr(config, "auto_map", None):
        for file in source.folder.glob("*.py"):
            shutil.copy2(file, folder / file.name)
