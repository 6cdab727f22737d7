"""What error-compensated rounding gains: the search for size with RTN and with GPTQ, fronts side by side.

    python experiments/smollm2_bitwidths/size.py --model models/SmolLM2-135M-Instruct

Runs ``job_size.yaml`` once a rounding method; KL is on the report split, which no search saw. For each
point of the second front the table gives the best KL that the first reaches with no more bytes.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import autocomp
from autocomp.leave import leave
from autocomp.measure.device import device_name, software_versions
from autocomp.pareto import ParetoFront
from autocomp.progress import make_display

HERE = Path(__file__).parent


def search(model: str, method: str, overrides: Sequence[str]) -> tuple[ParetoFront, float]:
    """The validated front with one rounding method, and the seconds that it took."""
    changes = [f"workload.model={model}", f"space.0.bitwidths.method={method}", *overrides]
    with make_display(Console()) as display:
        result = autocomp.search(HERE / "job_size.yaml", overrides=changes, on_event=display)
    return result.front, result.seconds


def points(front: ParetoFront) -> list[dict[str, float]]:
    """MB, KL and average bits of the front, by size."""
    rows = [
        {m: p.trial.value(m) for m in ("memory_mb", "kl", "avg_bits")} | {"kl_stderr": p.trial.stderr("kl")}
        for p in front.front
    ]
    return sorted(rows, key=lambda row: row["memory_mb"])


def best_within(rows: Sequence[dict[str, float]], megabytes: float) -> float | None:
    """The lowest KL among points of at most that size."""
    return min((r["kl"] for r in rows if r["memory_mb"] <= megabytes + 1e-9), default=None)


def draw(fronts: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for method, rows in fronts.items():
        shown = [r for r in rows if r["kl"] > 0]
        ax.plot([r["memory_mb"] for r in shown], [r["kl"] for r in shown], "o-", label=method)
    ax.set(yscale="log", xlabel="weights, MB (everything counted)", ylabel="KL, nats/token (report split)")
    ax.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--methods", default="rtn,gptq-mse")
    parser.add_argument("-o", "--override", action="append", default=[])
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    record: dict[str, Any] = {
        "command": "python experiments/smollm2_bitwidths/size.py",
        "fronts": {},
        "seconds": {},
    }
    for method in args.methods.split(","):
        front, seconds = search(args.model, method, args.override)
        record["fronts"][method] = points(front)
        record["seconds"][method] = round(seconds)
    record |= {"machine": device_name("cpu"), "versions": dict(software_versions())}
    (HERE / "size_results.json").write_text(json.dumps(record, indent=1))
    draw(record["fronts"], HERE / "size.png")
    base, *others = record["fronts"]
    for method in others:
        print(f"| MB | average bits | KL {method} | KL {base} within the same bytes | ratio |")
        print("|---" * 5 + "|")
        for row in record["fronts"][method]:
            rival = best_within(record["fronts"][base], row["memory_mb"])
            ratio = f"{row['kl'] / rival:.2f}" if rival else "-"
            rival_text = f"{rival:.4f}" if rival is not None else "-"
            print(
                f"| {row['memory_mb']:.1f} | {row['avg_bits']:.2f} | {row['kl']:.4f} ± {row['kl_stderr']:.4f}"
                f" | {rival_text} | {ratio} |"
            )


if __name__ == "__main__":
    main()
    leave()
