"""Decode and prefill of SmolLM2-135M on this machine's CPU: ours, transformers, llama.cpp, in turns.

    python experiments/bench_kernels/decode.py --model models/SmolLM2-135M-Instruct \
        --llama WORK/llama --gguf WORK/SmolLM2-135M-Instruct.Q4_1.gguf

``--llama`` is a folder with ``bench.mjs`` and its installed packages (``run.sh`` makes it); without it the
rows of llama.cpp are left out. Every round runs everything once in a random order, llama.cpp in a process of
its own that sleeps while others run. Greedy decoding of one sequence, the choice of the token included.
Writes ``decode_results.json`` and the README's table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if os.environ.get("GOMP_SPINCOUNT") != "0":  # OpenMP reads it when torch is loaded, so start over
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GOMP_SPINCOUNT": "0"})

import numpy as np
import report
import torch
from compare import ratio
from torch import nn

from autocomp.kernels.modules import PackedEmbedding, PackedLinear
from autocomp.measure.device import conditions, set_threads, software_versions
from autocomp.measure.memory import weights_bytes
from autocomp.measure.timing import summarize
from autocomp.quantize.rounding import quantize
from autocomp.quantize.scheme import Scheme
from autocomp.serving import LeanDecoder
from autocomp.serving.record import Unsupported
from autocomp.workloads.checkpoint import load_model, locate, quiet
from autocomp.workloads.serving import Server

LABELS = ("w16", "w8g64", "w4g32a", "w4g64", "w3g64", "w2g64")
"""Uniform schemes of the decoder's linears. ``w4g32a`` is what Q4_1 is: 4 bits, groups of 32, a minimum."""
HEAD = "w8g64"
"""Of the embedding with its tied head, unless all is ``w16``: the GGUF has Q8_0 there."""
LLAMA = "llama.cpp Q4_1"
Measure = Callable[[], float]
Runner = dict[str, Measure]
"""``prefill``: milliseconds of the prompt; ``decode``: milliseconds a token."""


def pack(model: Any, label: str) -> None:
    """Replace the decoder's linears by packed ones of ``label``, embedding and tied head by ``HEAD``."""
    embedding = model.get_input_embeddings()
    head = PackedEmbedding(quantize(embedding.weight.float(), Scheme.parse(HEAD)), dtype=model.dtype)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            weight = quantize(module.weight.float(), Scheme.parse(label))
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, PackedLinear(weight, module.bias, dtype=model.dtype))
    model.set_input_embeddings(head)
    model.set_output_embeddings(PackedLinear.sharing(head))


def decoder(model: Any, ids: torch.Tensor, steps: int, threads: int, *, verify: bool) -> tuple[Runner, str]:
    """The model through the decode step in C, or through its own eager loop when that can't run it; and what
    to add to its name in that case. ``verify``: as in ``LeanDecoder``, worth it on the uncompressed model."""
    length = ids.shape[1]
    try:
        lean = LeanDecoder(model, capacity=length + steps + 1, threads=threads, verify=verify)
    except Unsupported as error:
        print(f"  eager loop instead of the lean one: {error}")
        return eager(model, ids, steps, generate=False), ", eager loop"
    first = lean.prefill(ids).argmax(-1)

    def decode() -> None:
        lean.rewind(length)
        token = first
        for _ in range(steps):
            token = lean.step(token).argmax(-1)

    def prefill() -> None:
        lean.prefill(ids)

    return {"prefill": milliseconds(prefill), "decode": milliseconds(decode, steps)}, ""


def eager(model: Any, ids: torch.Tensor, steps: int, *, generate: bool = True) -> Runner:
    """The model through transformers: ``generate``, or a bare loop over its forward."""
    tokens = torch.cat([ids, ids[:, :steps]], dim=1)
    server = Server(model, tokens, prompt=ids.shape[1], context=ids.shape[1], steps=steps)
    server.prepare_decode()
    run = server.generate if generate else server.decode
    return {"prefill": milliseconds(server.prefill), "decode": milliseconds(run, steps)}


def milliseconds(call: Callable[[], Any], count: int = 1) -> Measure:
    """A measurement: wall time of ``call()`` divided by ``count``."""

    def measure() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3 / count

    return measure


@contextlib.contextmanager
def llama(
    folder: Path, gguf: Path, *, threads: int, context: int, steps: int
) -> Iterator[tuple[Any, Runner]]:
    """llama.cpp in a Node process: what it says of itself, and its runner."""
    sizes = {"threads": threads, "context": context, "steps": steps}
    command = ["node", "bench.mjs", str(gguf.resolve()), "--serve"]
    command += [part for name, n in sizes.items() for part in (f"--{name}", str(n))]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def answer() -> dict[str, Any]:
        line = stdout.readline()
        if not line:
            raise SystemExit(
                f"llama.cpp gave no answer; try it alone: (cd {folder} && {' '.join(command[:3])})"
            )
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(kind: str) -> float:
        stdin.write(f"{kind}\n")
        stdin.flush()
        return float(answer()["ms"])

    try:
        yield answer(), {"prefill": lambda: ask("prefill"), "decode": lambda: ask("decode")}
    finally:
        stdin.close()
        process.wait(timeout=60)


def take_turns(runners: dict[str, Runner], rounds: int, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Milliseconds by name and kind, one a round; the first, uncounted, round warms up."""
    rng = np.random.default_rng(seed)
    jobs = [(name, kind) for name, runner in runners.items() for kind in runner]
    times = {name: {kind: np.zeros(rounds) for kind in runner} for name, runner in runners.items()}
    for i in range(-1, rounds):
        for j in rng.permutation(len(jobs)):
            name, kind = jobs[j]
            took = runners[name][kind]()
            if i >= 0:
                times[name][kind][i] = took
        print(f"  round {i + 1} of {rounds}", flush=True)
    return times


def rows(times: dict[str, dict[str, np.ndarray]], context: int) -> list[dict[str, Any]]:
    """One row a runner: medians with standard errors, and ratios to llama.cpp where it ran."""
    rng = np.random.default_rng(0)
    found = []
    for name, kinds in times.items():
        row: dict[str, Any] = {"name": name}
        for kind, samples in kinds.items():
            timing = summarize(samples.tolist())
            tokens = context if kind == "prefill" else 1
            row[kind] = {"ms": timing.median_ms, "stderr_ms": timing.stderr_ms, "rounds": samples.tolist()}
            row[kind]["tokens_per_s"] = 1e3 * tokens / timing.median_ms
            if LLAMA in times:
                row[kind]["speedup"] = ratio(times[LLAMA][kind], samples, rng).__dict__
        found.append(row)
    return found


def make_runners(args: argparse.Namespace, ids: torch.Tensor) -> tuple[dict[str, Runner], dict[str, float]]:
    """Ours by scheme and transformers, and the MB (10**6 bytes) of their weights."""
    runners, megabytes = {}, {}
    for label in args.labels.split(","):
        with quiet():
            model = load_model(locate(str(args.model)), "bfloat16").eval()
        if label == "w16":
            runners["transformers generate, bf16"] = eager(model, ids, args.steps)
        else:
            pack(model, label)
        runner, remark = decoder(model, ids, args.steps, args.threads, verify=label == "w16")
        runners[f"ours {label}{remark}"] = runner
        megabytes[f"ours {label}{remark}"] = weights_bytes(model) / 1e6
    return runners, megabytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--llama", type=Path, help="folder with bench.mjs and its packages")
    parser.add_argument("--gguf", type=Path, help="the file that llama.cpp runs")
    parser.add_argument("--labels", default=",".join(LABELS), help=f"like {','.join(LABELS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=report.DECODE)
    args = parser.parse_args()
    if (args.llama is None) != (args.gguf is None):
        raise SystemExit("--llama and --gguf go together: give both, or neither to leave llama.cpp out")
    set_threads(args.threads)
    record: dict[str, Any] = {
        "command": " ".join(["python", "experiments/bench_kernels/decode.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "conditions": conditions(),
        "versions": software_versions(), "head": HEAD,
        **{key: getattr(args, key) for key in ("threads", "context", "steps", "rounds")},
    }  # fmt: skip
    for warning in record["conditions"]["warnings"]:
        print(warning)
    ids = torch.randint(1000, 40000, (1, args.context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        runners, record["weights_mb"] = make_runners(args, ids)
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        if args.llama is not None:
            sizes = {"threads": args.threads, "context": args.context, "steps": args.steps}
            record["llama"], runner = stack.enter_context(llama(args.llama, args.gguf, **sizes))
            runners = {LLAMA: runner} | runners
        times = take_turns(runners, args.rounds)
    record["rows"] = rows(times, args.context)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(report.decode_table(record))
    if args.out.resolve() == report.DECODE:
        report.write_all()


if __name__ == "__main__":
    main()
