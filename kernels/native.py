"""Our C kernels: compiled on first use with the system's compiler, kept, loaded with ctypes.

One shared library per source file in ``cpu/``. The cache key is everything that the machine code depends
on: sources and headers, compiler, flags, and what ``-march=native`` means on this CPU. Without a compiler
nothing breaks: ``load`` raises ``NativeUnavailable``, callers fall back and say so once.

Environment: ``CC`` names the compiler, ``AUTOCOMP_MARCH`` replaces ``native`` (``x86-64-v3`` builds the AVX2
variants), ``AUTOCOMP_NATIVE=0`` turns these kernels off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger("autocomp")
SOURCES = Path(__file__).resolve().parent / "cpu"
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
)
REQUIRES = {"pool": (), "linear": ("pool",), "attention": ("pool",), "activations": ("pool",)}
REQUIRES |= {"attention_tiles": ("pool",), "linear_a8": ("pool",)}
REQUIRES |= {"moe": ("pool", "linear"), "step": ("pool", "linear", "attention")}
"""Source -> sources whose functions it calls; these are loaded first."""
COMPILE_SECONDS = 300


class NativeUnavailable(RuntimeError):
    """The C kernels can't be had here; the message says why and what to do."""


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The library of ``cpu/{name}.c``, built when it has to be.

    Raises:
        NativeUnavailable: they are turned off, there is no compiler, or it fails.
    """
    for other in REQUIRES.get(name, ()):
        load(other)
    reason = _failed.get(name)
    if reason:
        raise NativeUnavailable(reason)
    try:
        return _opened(name)
    except (NativeUnavailable, OSError) as error:
        _failed[name] = f"C kernels ({name}): {error}"
        logger.warning("%s; torch's operators are used instead", _failed[name])
        raise NativeUnavailable(_failed[name]) from error


_failed: dict[str, str] = {}


def _opened(name: str) -> ctypes.CDLL:
    """Global, so that a library finds the functions of those loaded before it."""
    library = _built(name)
    try:
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        logger.warning("%s is damaged (%s) and built again", library, error)
        library.unlink(missing_ok=True)
        return ctypes.CDLL(str(_built(name)), mode=ctypes.RTLD_GLOBAL)


def unavailable(name: str) -> str:
    """Why the library can't be used; empty when it can."""
    try:
        load(name)
    except NativeUnavailable as error:
        return str(error)
    return ""


def threads() -> int:
    """Threads that a kernel should use: as many as torch's."""
    return torch.get_num_threads()


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Address of a tensor's data; null for ``None``."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _built(name: str) -> Path:
    if os.environ.get("AUTOCOMP_NATIVE") == "0":
        raise NativeUnavailable("turned off by AUTOCOMP_NATIVE=0")
    compiler = _compiler()
    flags = (*FLAGS, *_machine_flags())
    for folder in (_cache_folder(), Path(tempfile.gettempdir()) / f"autocomp-native-{os.getuid()}"):
        library = folder / f"{name}-{_key(name, compiler, flags)}.so"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid not in (0, os.getuid()):
                raise OSError("it belongs to another user, who could put any code there")
            if library.is_file():
                return library
            return _compile(name, compiler, flags, library)
        except OSError as error:
            refused = f"{folder}: {error}"
    raise NativeUnavailable(f"no folder to build in ({refused}); set AUTOCOMP_CACHE to one")


def _cache_folder() -> Path:
    root = os.environ.get("AUTOCOMP_CACHE") or Path.home() / ".cache" / "autocomp"
    return Path(root) / "native"


def _compiler() -> str:
    wanted = os.environ.get("CC")
    for name in [wanted] if wanted else ["cc", "gcc", "clang"]:
        path = shutil.which(name)
        if path:
            return path
    raise NativeUnavailable(f"no C compiler ({wanted or 'cc, gcc or clang'}); apt install build-essential")


def _machine_flags() -> tuple[str, ...]:
    march = os.environ.get("AUTOCOMP_MARCH", "native")
    known = platform.machine().lower() in ("x86_64", "amd64", "aarch64", "arm64")
    return (f"-march={march}",) if known else ()


@functools.cache
def _identity(compiler: str) -> str:
    """What the compiler is and what ``native`` means to it on this CPU."""
    asked = [compiler, *_machine_flags(), "-dM", "-E", "-x", "c", os.devnull]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"the compiler {compiler} does not work: {error}") from error


def _key(name: str, compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256("\0".join([*flags, _identity(compiler)]).encode())
    for file in _sources(f"{name}.c"):
        digest.update((SOURCES / file).read_bytes())
    return digest.hexdigest()[:20]


def _sources(name: str) -> list[str]:
    """A source file and all that it includes of our own, in order of first use."""
    found = [name]
    for file in found:
        included = re.findall(r'^#include "([^"]+)"', (SOURCES / file).read_text(), re.MULTILINE)
        found += [other for other in dict.fromkeys(included) if other not in found]
    return found


def _compile(name: str, compiler: str, flags: tuple[str, ...], library: Path) -> Path:
    """Compile beside the target and rename, so that two processes never see half a file."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    command = [compiler, *flags, f"-I{SOURCES}", str(SOURCES / f"{name}.c"), "-o", temporary, "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
        if done.returncode:
            told = (done.stderr or done.stdout).strip().splitlines()
            errors = [line for line in told if "error" in line] or told or ["no message"]
            raise NativeUnavailable(f"{compiler} failed: {errors[0][:300]}")
        os.replace(temporary, library)
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"{compiler} took over {COMPILE_SECONDS} s") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library
