"""Time every kernel of this machine's CPU beside what it replaces, and write the README's tables.

    python experiments/bench_kernels/bench.py                  # all sections, about ten minutes
    python experiments/bench_kernels/bench.py --only linear    # one section; the others' results stay
    python experiments/bench_kernels/bench.py --quick          # under a minute, prints and writes nothing

A section's results go to ``results.json`` with its conditions: machine, load, versions, command, and the
rates that the floors are made of, measured in the same minute. What can't run here is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

if os.environ.get("GOMP_SPINCOUNT") != "0":  # OpenMP reads it when torch is loaded, so start over
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GOMP_SPINCOUNT": "0"})

import cases_attention
import cases_linear
import cases_moe
import cases_other
import report
import torch
from compare import Case, ceilings, compare

from autocomp.kernels import catalogue, native
from autocomp.measure.device import conditions, set_threads, software_versions

SECTIONS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "linear": cases_linear.decode,
    "prefill": cases_linear.prefill,
    "activations": cases_other.activations,
    "low_rank": cases_other.low_rank,
    "moe": cases_moe.cases,
    "kv": cases_attention.kv,
    "spans_decode": cases_attention.spans_decode,
    "spans": cases_attention.spans,
    "window_residual": cases_attention.window_residual,
    "block_sparse": cases_attention.block_sparse,
}


def run_section(name: str, threads: list[int], *, seconds: float, quick: bool) -> dict[str, Any]:
    """Measure one section; its rows with everything that they depend on."""
    make = SECTIONS[name]
    former = set_threads(max(threads))
    record: dict[str, Any] = {
        "about": (make.__doc__ or "").strip().replace("``", "`"),
        "conditions": conditions(), "versions": software_versions(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "ceilings": {}, "rows": [],
        "command": " ".join(["python", "experiments/bench_kernels/bench.py", *sys.argv[1:]]),
    }  # fmt: skip
    for warning in record["conditions"]["warnings"]:
        print(f"{name}: {warning}")
    limits = {}
    for count in threads:
        set_threads(count)
        limits[count] = ceilings()
        record["ceilings"][str(count)] = limits[count].__dict__
    with torch.inference_mode():
        for case in make(quick):
            for count in threads:
                set_threads(count)
                rows = compare(case, limits[count], seconds=seconds)
                record["rows"] += rows
                print_rows(name, rows)
    set_threads(former)
    return record


def print_rows(section: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{section}: {rows[0]['case']}, {rows[0]['threads']} threads, {rows[0]['rounds']} rounds")
    for row in rows:
        ratio = row["speedup"]
        told = f"x{ratio['value']:6.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        if "speedup_best" in row:
            told += f"  x{row['speedup_best']['value']:.2f} {row['best']}"
        share = f"{row['floor_percent']:4.0f} % of floor" if "floor_percent" in row else ""
        print(f"  {row['variant']:28s} {row['ms']:9.4f} ms  {share:15s} {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a section; may be repeated")
    parser.add_argument("--quick", action="store_true", help="few cases, short, nothing is written")
    parser.add_argument("--threads", default="", help="like 1,2 (the default; 2 with --quick)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for one case (longer for slow ones)")
    parser.add_argument("--flex", action="store_true", help="time flex_attention too (compiles for minutes)")
    args = parser.parse_args()
    threads = [int(n) for n in (args.threads or ("2" if args.quick else "1,2")).split(",")]
    cases_attention.FLEX = args.flex
    catalogue.operators()  # registers them
    reason = native.unavailable("linear")
    if reason:
        print(f"without our C kernels: {reason}")
    began = time.perf_counter()
    sections = args.only or list(SECTIONS)
    for name in sections:
        seconds = 0.2 if args.quick else args.seconds
        section = run_section(name, threads, seconds=seconds, quick=args.quick)
        if not args.quick:
            keep(name, section)
    print(f"\n{len(sections)} sections in {time.perf_counter() - began:.0f} s")


def keep(name: str, section: dict[str, Any]) -> None:
    """Store a section's results and render everything anew; the other sections keep theirs."""
    results = report.read(report.RESULTS) or {"sections": {}}
    found = results["sections"] | {name: section}
    results["sections"] = {n: found[n] for n in SECTIONS if n in found}
    report.RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report.write_all()


if __name__ == "__main__":
    main()
