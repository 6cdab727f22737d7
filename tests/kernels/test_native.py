"""The builder of C sources, the thread pool, and operators with several implementations."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from autocomp.kernels import native
from autocomp.kernels.library import OPERATORS, Implementation, Operator

needs_compiler = pytest.mark.skipif(bool(native.unavailable("pool")), reason="needs a C compiler")
BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
ITEMS = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long, ctypes.c_long)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process."""
    run = [sys.executable, "-c", code]
    return subprocess.run(
        run, env=os.environ | environment, capture_output=True, text=True, timeout=240, check=False
    )


# The builder.


@needs_compiler
def test_a_library_is_built_once_for_its_sources_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path))
    first = native._built("pool")
    assert first.parent == tmp_path / "native" and os.listdir(first.parent) == [first.name]
    before = first.stat().st_mtime_ns
    assert native._built("pool") == first and first.stat().st_mtime_ns == before
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DOTHER"))
    assert native._built("pool") != first


@needs_compiler
def test_a_changed_header_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    (tmp_path / "pool.c").write_text('#include "other.c"\nint seven(void) { return SOME; }\n')
    (tmp_path / "other.c").write_text('#include <math.h>\n#include "some.h"\n')
    (tmp_path / "some.h").write_text("#define SOME 7\n")
    flags = (*native.FLAGS, *native._machine_flags())
    bare = native._key("pool", native._compiler(), flags)
    (tmp_path / "unused.h").write_text("#define UNUSED 1\n")
    assert native._key("pool", native._compiler(), flags) == bare
    (tmp_path / "some.h").write_text("#define SOME 8\n")
    assert native._key("pool", native._compiler(), flags) != bare


@needs_compiler
def test_a_source_that_does_not_compile_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path))
    (tmp_path / "broken.c").write_text("int seven(void) { return sevn; }\n")
    with pytest.raises(native.NativeUnavailable, match="sevn"):
        native._built("broken")
    assert os.listdir(tmp_path / "native") == []


@needs_compiler
def test_a_damaged_library_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path))
    library = native._built("pool")
    whole = library.stat().st_size
    library.write_bytes(b"not a library")
    assert native._opened("pool").ac_region is not None
    assert library.stat().st_size == whole


@needs_compiler
def test_the_next_folder_is_used_when_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("AUTOCOMP_CACHE", str(in_the_way))
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tmp_path))
    assert native._built("pool").parent == tmp_path / f"autocomp-native-{os.getuid()}"


@needs_compiler
def test_a_folder_of_somebody_else_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("AUTOCOMP_CACHE", str(in_the_way))
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "autocomp-native-12345").mkdir()
    if os.getuid() == 0:
        os.chown(tmp_path / "autocomp-native-12345", 54321, -1)
    monkeypatch.setattr(native.os, "getuid", lambda: 12345)
    with pytest.raises(native.NativeUnavailable, match="another user"):
        native._built("pool")


@needs_compiler
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    code = "from autocomp.kernels import native; print(native.load('pool')._name)"
    run = [sys.executable, "-c", code]
    environment = os.environ | {"AUTOCOMP_CACHE": str(tmp_path)}
    both = [subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=240)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0] and told[0] == told[1]
    assert os.listdir(tmp_path / "native") == [Path(told[0]).name]


WITHOUT = """
import logging, torch
logging.basicConfig(format="LINE %(message)s")
from autocomp.kernels import native, ops
from autocomp.quantize.scheme import Scheme
reason = native.unavailable("linear")
assert "WORD" in reason, reason
found = ops.capability(Scheme(4, 64), (64, 64), "cpu")
assert found.backend == "torch_int4" and found.native, found
w3 = ops.capability(Scheme(3, 64), (64, 64), "cpu")
assert not w3.native and "WORD" in w3.reason, w3
state = ops.prepack(ops.random_weight(Scheme(3, 64), (64, 64)), "cpu")
assert ops.linear_wna16(torch.ones(2, 64), state).shape == (2, 64)
"""


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("CC", "/nonexistent/cc", "no C compiler"),
        ("CC", "/bin/false", "does not work"),
        ("AUTOCOMP_NATIVE", "0", "turned off"),
    ],
)
def test_without_a_compiler_torch_takes_over_and_one_line_says_so(
    name: str, value: str, word: str, tmp_path: Path
) -> None:
    done = python(WITHOUT.replace("WORD", word), AUTOCOMP_CACHE=str(tmp_path), **{name: value})
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("LINE")]
    assert len(lines) == 1 and word in lines[0] and "torch's operators" in lines[0]


# The pool.


@pytest.fixture(scope="module")
def pool() -> ctypes.CDLL:
    reason = native.unavailable("pool")
    if reason:
        pytest.skip(reason)
    return native.load("pool")


def seen_by_region(pool: ctypes.CDLL, threads: int) -> list[tuple[int, int]]:
    """(thread, threads) of every thread that ran a region, sorted."""
    seen: list[tuple[int, int]] = []
    pool.ac_region(threads, BODY(lambda context, thread, count: seen.append((thread, count))), None)
    return sorted(seen)


def runs_of_each(pool: ctypes.CDLL, threads: int, total: int, unit: int) -> list[tuple[int, int]]:
    """The runs [first, last) that the items were given out in, sorted."""
    runs: list[tuple[int, int]] = []
    body = ITEMS(lambda context, first, last: runs.append((first, last)))
    pool.ac_each(ctypes.c_int(threads), ctypes.c_long(total), ctypes.c_long(unit), body, None)
    return sorted(runs)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_thread_of_a_region_runs_once(pool: ctypes.CDLL, threads: int) -> None:
    for _ in range(20):
        assert seen_by_region(pool, threads) == [(i, threads) for i in range(threads)]


def test_a_region_is_not_larger_than_the_limit(pool: ctypes.CDLL) -> None:
    limit = 256
    assert len(seen_by_region(pool, limit + 9)) <= limit
    assert seen_by_region(pool, 0) == seen_by_region(pool, -5) == [(0, 1)]


def test_a_barrier_separates_phases(pool: ctypes.CDLL) -> None:
    threads, rounds = 3, 50
    counts = [0] * rounds
    lock, wrong = threading.Lock(), []

    def body(context: int, thread: int, count: int) -> None:
        for i in range(rounds):
            with lock:
                counts[i] += 1
            pool.ac_barrier(count)
            if counts[i] != count or (i + 1 < rounds and counts[i + 1] > count):
                wrong.append(i)
            pool.ac_barrier(count)

    pool.ac_region(threads, BODY(body), None)
    assert counts == [threads] * rounds and not wrong


def test_a_region_inside_of_a_region_runs_alone(pool: ctypes.CDLL) -> None:
    inner: list[tuple[int, int]] = []
    nested = BODY(lambda context, thread, count: inner.append((thread, count)))
    pool.ac_region(3, BODY(lambda context, thread, count: pool.ac_region(4, nested, None)), None)
    assert inner == [(0, 1)] * 3


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
@pytest.mark.parametrize(("total", "unit"), [(0, 1), (1, 1), (5, 4), (16, 16), (17, 16), (100, 1), (1000, 7)])
def test_items_are_shared_out_completely_and_once(
    pool: ctypes.CDLL, threads: int, total: int, unit: int
) -> None:
    for _ in range(10):
        runs = runs_of_each(pool, threads, total, unit)
        assert all(first % unit == 0 and first < last for first, last in runs)
        assert [i for first, last in runs for i in range(first, last)] == list(range(total))


def test_callers_of_several_threads_take_turns(pool: ctypes.CDLL) -> None:
    wrong: list[object] = []

    def call(size: int) -> None:
        for _ in range(30):
            if seen_by_region(pool, size) != [(i, size) for i in range(size)]:
                wrong.append(size)
            runs = runs_of_each(pool, size, 40, 1)
            if [i for first, last in runs for i in range(first, last)] != list(range(40)):
                wrong.append(runs)

    callers = [threading.Thread(target=call, args=(size,)) for size in (2, 3, 4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


FORK = """
import ctypes, os, sys
from autocomp.kernels import native
pool = native.load("pool")
body_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
def run():
    seen = []
    pool.ac_region(3, body_type(lambda context, thread, count: seen.append(thread)), None)
    return sorted(seen)
assert run() == [0, 1, 2]
child = os.fork()
if child == 0:
    os._exit(0 if run() == [0, 1, 2] and run() == [0, 1, 2] else 3)
assert run() == [0, 1, 2]
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_compiler
def test_a_forked_child_has_threads_of_its_own() -> None:
    done = python(FORK)
    assert done.returncode == 0, done.stderr


# Operators with several implementations.


def _fake(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.fixture
def operator() -> Iterator[Operator]:
    name = f"times_{len(OPERATORS)}_{os.getpid()}_{_count[0]}"
    _count[0] += 1
    yield Operator(f"{name}(Tensor x, float factor) -> Tensor", lambda x, factor: x * factor, _fake)
    del OPERATORS[name]


_count = [0]


def doubled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Stands for an implementation; told from the reference by its result."""
    return 2 * x * factor


def test_an_operator_runs_the_last_registered_implementation_that_can(operator: Operator) -> None:
    x = torch.arange(4.0)
    assert operator.choose(x, 3.0) == "reference" and torch.equal(operator(x, 3.0), 3 * x)
    operator.register(Implementation("old", "cpu", doubled))
    operator.register(Implementation("elsewhere", "cuda", doubled))
    positive = Implementation(
        "new", "cpu", lambda x, factor: 10 * x, supports=lambda x, factor: "" if factor > 0 else "negative"
    )
    operator.register(positive)
    assert operator.choose(x, 3.0) == "new" and torch.equal(operator(x, 3.0), 10 * x)
    assert operator.choose(x, -1.0) == "old" and torch.equal(operator(x, -1.0), -2 * x)
    operator.register(Implementation("new", "cpu", doubled))  # replaced, not added
    assert torch.equal(operator(x, 3.0), 6 * x)
    assert [i.name for i in operator.implementations] == ["new", "elsewhere", "old"]


def test_an_implementation_can_be_forced(operator: Operator) -> None:
    x = torch.ones(2)
    operator.register(
        Implementation("mine", "cpu", doubled, supports=lambda x, factor: "" if factor else "0")
    )
    with operator.forced("reference"):
        assert torch.equal(operator(x, 1.0), x)
    with operator.forced("mine"):
        assert torch.equal(operator(x, 1.0), 2 * x)
        with pytest.raises(NotImplementedError, match="'mine': mine: 0"):
            operator(x, 0.0)
    with operator.forced("other"), pytest.raises(NotImplementedError, match="no such implementation on cpu"):
        operator(x, 1.0)
    assert torch.equal(operator(x, 1.0), 2 * x)


@pytest.mark.parametrize("stage", ["available", "check"])
def test_what_cannot_run_is_asked_once_and_skipped(operator: Operator, stage: str) -> None:
    asked: list[int] = []

    def broken() -> str:
        asked.append(1)
        raise OSError("libmine.so is missing")

    mine = Implementation("mine", "cpu", doubled, **{stage: broken})
    operator.register(mine)
    x = torch.ones(2)
    assert torch.equal(operator(x, 1.0), x) and operator.choose(x, 1.0) == "reference"
    assert asked == [1] and mine.unusable() == "OSError: libmine.so is missing"


def test_operators_are_nodes_of_graphs(operator: Operator) -> None:
    x = torch.randn(3)
    operator.register(Implementation("mine", "cpu", doubled))
    graph = make_fx(lambda x: operator(x, 2.0) + 1, tracing_mode="fake")(x)
    assert operator._op in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(x), 4 * x + 1)
    torch.library.opcheck(operator._op, (x, 2.0))
