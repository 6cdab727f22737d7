"""The main job from end to end: search, front, export, reload, generate.

    python experiments/smollm2_bitwidths/demo.py --model models/SmolLM2-135M-Instruct

Prints the validated front, exports the point that ``--select`` names, loads the export in a new process
and lets it write a few sentences; then compares its decode latency and bytes with the uncompressed model.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

import autocomp
from autocomp import report
from autocomp.leave import leave
from autocomp.progress import make_display
from autocomp.trial import Trial

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--select", default="kl <= 0.05, min decode_ms")
    parser.add_argument("--prompt", default="Why is the sky blue? Answer in two sentences.")
    parser.add_argument("--out", type=Path, default=None, help="folder of the export")
    parser.add_argument("-o", "--override", action="append", default=[], help="dotted.key=value")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.perf_counter()
    overrides = [f"workload.model={args.model}", *args.override]
    with make_display(Console()) as display:
        result = autocomp.search(HERE / "job.yaml", overrides=overrides, on_event=display)
    if result.status != "finished":
        raise SystemExit(f"stopped; continue with: autocomp resume {result.run_dir}")
    picked = result.front.select(args.select)
    print(report.text(result.front, picked))
    out = args.out or result.run_dir / "export"
    autocomp.export(result.run_dir, args.select, out=out)
    base = next(p.trial for p in result.front.points if _is_uncompressed(p.trial))
    print(f"\nPicked trial {picked.number} by {args.select!r}, exported to {out}:")
    for metric, unit in (
        ("decode_ms", "ms/token"),
        ("prefill_ms", "ms"),
        ("memory_mb", "MB"),
        ("kl", "nats/token"),
    ):
        mine, full = picked.value(metric), base.value(metric)
        ratio = f"  ({mine / full:.2f}x)" if full else ""
        print(f"  {metric:10s} {mine:9.3f} against {full:9.3f} {unit} uncompressed{ratio}")
    print(f"\nReloaded in a new process, asked {args.prompt!r}:")
    subprocess.run([sys.executable, "-m", "autocomp", "generate", str(out), args.prompt], check=True)
    print(f"\nRun directory {result.run_dir}; whole demo {time.perf_counter() - started:.0f} s.")
    print("Look at the front: open front.html there, or `mlflow ui --backend-store-uri sqlite:///mlflow.db`.")


def _is_uncompressed(trial: Trial) -> bool:
    return set(trial.candidate.values.values()) == {"w16"}


if __name__ == "__main__":
    main()
    leave()
