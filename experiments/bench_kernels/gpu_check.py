"""Parity and speed of every CUDA kernel on the GPU at hand, in a few minutes: one JSON file and one table.

    PYTHONPATH=. python experiments/bench_kernels/gpu_check.py --out gpu.json

Needs torch, triton and this tree; gemlite and torchao are timed beside where they are installed. Modules
in ``MODULES`` give ``parity()``, tuples (name, call, exact result, bound), and ``cases()``, see ``gpu_case``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_case import Case, measured_peaks, relative_error, time_together

MODULES = ("gpu_linear", "gpu_attention")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--only", default="", help="only what has this text in its name")
    parser.add_argument("--seconds", type=float, default=540.0, help="start no new case after so long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device is visible to torch here: nothing was checked. Run it on a machine with a GPU.")
        return 1
    import autocomp.kernels.triton

    autocomp.kernels.triton.register()
    deadline = time.monotonic() + options.seconds
    modules = [importlib.import_module(name) for name in MODULES if _exists(name)]
    report: dict[str, Any] = {"device": _device(), "modules": [m.__name__ for m in modules]}
    with torch.inference_mode():
        report["parity"] = check_parity(modules, options.only, deadline)
        report["peaks"] = measured_peaks()
        report["times"] = measure(modules, options.only, deadline, report["peaks"])
    options.out.write_text(json.dumps(report, indent=1))
    failed = [row["name"] for row in (*report["parity"], *report["times"]) if row.get("problem")]
    print(f"{len(report['parity'])} parity checks, {len(report['times'])} timed cases -> {options.out}")
    print("all agree" if not failed else f"{len(failed)} DO NOT AGREE: {', '.join(failed[:20])}")
    return 1 if failed else 0


def _exists(name: str) -> bool:
    return (Path(__file__).parent / f"{name}.py").is_file()


def _device() -> dict[str, Any]:
    import triton

    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name, "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count, "l2_bytes": found.L2_cache_size,
        "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__,
    }  # fmt: skip


def check_parity(modules: list[Any], only: str, deadline: float) -> list[dict[str, Any]]:
    """Every parity case: its error, and that a second run gives the same bits."""
    rows = []
    for module in modules:
        for name, call, exact, bound in module.parity() if hasattr(module, "parity") else ():
            if only not in name:
                continue
            if time.monotonic() > deadline:
                print(f"out of time: parity stops before {name}", file=sys.stderr)
                return rows
            rows.append({"name": name, **_compared(call, exact, bound)})
            if rows[-1].get("problem"):
                print(f"  {name}: {rows[-1]['problem']}")
    return rows


def _compared(call: Any, exact: Any, bound: float) -> dict[str, Any]:
    try:
        first, second = call(), call()
        error = relative_error(first, exact())
    except Exception as problem:
        return {"problem": f"{type(problem).__name__}: {str(problem)[:200]}"}
    row: dict[str, Any] = {"error": error, "bound": bound}
    if not error <= bound:
        row["problem"] = f"relative error {error:.2g} is over {bound:.2g}"
    elif not torch.equal(first, second):
        row["problem"] = "a second run gives other bits"
    return row


def measure(modules: list[Any], only: str, deadline: float, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """Every timed case beside its baselines, as a table while it goes."""
    rows = []
    heads = f"{'us':>8} {'p10':>8} {'p90':>8} {'GB/s':>7} {'TFLOP/s':>8} {'of floor':>8}"
    print(f"{'case':46} {heads}  others (times ours)")
    for module in modules:
        for case in module.cases():
            if only not in case.name:
                continue
            if time.monotonic() > deadline:
                print(f"out of time: timing stops before {case.name}", file=sys.stderr)
                return rows
            rows.append(_measured(case, peaks))
            _print(rows[-1])
    return rows


def _measured(case: Case, peaks: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": case.name, "bytes": case.bytes, "flops": case.flops, "copies": case.copies}
    if case.reference is not None:
        row |= _compared(lambda: case.call(0), case.reference, case.error)
    times = time_together({"ours": case.call, **case.baselines}, case.copies)
    row |= {"times": times, "problem": row.get("problem") or times["ours"].get("failed")}
    if "median" in times["ours"]:
        seconds = times["ours"]["median"] * 1e-6
        floor = max(case.bytes / peaks["bytes"], case.flops / peaks.get(case.peak, peaks["bf16"]))
        row |= {"floor_us": floor * 1e6, "of_floor": floor / seconds}
        row |= {"gb_s": case.bytes / seconds / 1e9, "tflop_s": case.flops / seconds / 1e12}
    return row


def _print(row: dict[str, Any]) -> None:
    ours = row["times"]["ours"]
    if "median" not in ours:
        print(f"{row['name']:46} {row['problem']}")
        return
    others = ", ".join(
        f"{name} {t['median'] / ours['median']:.2f}" if "median" in t else f"{name} failed"
        for name, t in row["times"].items() if name != "ours"
    )  # fmt: skip
    microseconds = f"{ours['median']:8.1f} {ours['p10']:8.1f} {ours['p90']:8.1f}"
    figures = f"{microseconds} {row['gb_s']:7.0f} {row['tflop_s']:8.1f}"
    print(f"{row['name']:46} {figures} {row['of_floor']:8.0%}  {others} {row['problem'] or ''}")


if __name__ == "__main__":
    sys.exit(main())
