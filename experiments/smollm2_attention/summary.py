"""The tables, plans and pictures of this experiment from its runs.

    python experiments/smollm2_attention/summary.py quality --group RUN --group25 RUN --layer RUN
        --layer25 RUN
    python experiments/smollm2_attention/summary.py joint --joint RUN --weights RUN --spans RUN --kv RUN
    python experiments/smollm2_attention/summary.py latency

Each prints its table and keeps its numbers in results.json; ``quality`` also writes plans/*.json and
spans_*.png, ``joint`` joint.png; ``latency`` reads what latency.py left in latency.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autocomp.api import front_of
from autocomp.attention.plan import AttentionPlan, Keep, LayerPlan
from autocomp.errors import InfeasibleError
from autocomp.journal import read_records
from autocomp.pareto import hypervolume
from autocomp.run_files import read_space
from autocomp.space import Candidate, SearchSpace
from autocomp.span_map import span_map_png
from autocomp.trial import Trial

HERE = Path(__file__).parent
CONTEXT = 4096
LENGTHS = (1024, 2048, 4096)
QUALITY = ["density", "kv_mb", *(f"{m}_{n}" for m in ("retrieval", "text_kl", "ppl") for n in LENGTHS)]


def plan_of(space: SearchSpace, candidate: Candidate) -> AttentionPlan:
    """The plan of a candidate of the attention space; a decision over whole layers counts for their heads."""
    keeps: dict[int, dict[int, Keep]] = {}
    for decision in space:
        if decision.space == "attention":
            for site in decision.sites:
                module, _, group = site.rpartition(".kv")
                layer = next(int(piece) for piece in module.split(".") if piece.isdigit())
                keeps.setdefault(layer, {})[int(group)] = Keep.parse(str(candidate[decision.name]))
    return AttentionPlan(
        {
            layer: LayerPlan(tuple(row[g].rule for g in sorted(row)), row[0].key_bits, row[0].value_bits)
            for layer, row in sorted(keeps.items())
        }
    )


def keep(part: str, numbers: Any, runs: Mapping[str, Path]) -> None:
    """Put one part's numbers into results.json, with the machine and the versions that they are from."""
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    results["command"] = "experiments/smollm2_attention/run.sh"
    for run in runs.values():
        description = json.loads((run / "description.json").read_text())
        results |= {"machine": description["device"], "versions": description["versions"]}
    file.write_text(json.dumps(results | {part: numbers}, indent=1))


def numbers(trial: Trial, metrics: list[str]) -> dict[str, list[float]]:
    assert trial.measurement is not None
    found = trial.measurement.metrics
    return {m: [found[m].value, found[m].stderr] for m in metrics if m in found}


def trials_of(run: Path, split: str) -> list[Trial]:
    """Finished trials on one split. A front leaves out what misses the job's constraints: the dense model."""
    trials = [Trial.from_json(r["trial"]) for r in read_records(run) if r["kind"] == "trial"]
    return [t for t in trials if t.ok and t.fidelity.name == split]


def quality(runs: Mapping[str, Path]) -> None:
    """One row a method at densities 1, 0.5 and 0.25, all measured on the report split."""
    rows: dict[str, Any] = {}
    picks: dict[tuple[str, float], tuple[float, Trial, SearchSpace]] = {}
    (HERE / "plans").mkdir(exist_ok=True)
    for name, run in runs.items():
        granularity, space = name.rstrip("0123456789"), read_space(run)
        # Picked by the length that no search saw.
        unseen = {t.candidate.fingerprint: t.value("kl") for t in trials_of(run, "selection")}
        for trial in trials_of(run, "report"):
            labels = {str(v) for v in trial.candidate.values.values()}
            if trial.origin == "baseline" and len(labels) == 1:
                rows[f"uniform {labels.pop().partition('/')[0]}"] = numbers(trial, QUALITY)
                continue
            for share in (0.5, 0.25):
                kl = unseen.get(trial.candidate.fingerprint, math.inf)
                best = picks.get((granularity, share), (math.inf,))[0]
                if trial.value("density") <= share + 1e-9 and kl < best:
                    picks[granularity, share] = (kl, trial, space)
    for (granularity, share), (_, trial, space) in sorted(picks.items(), key=lambda p: (-p[0][1], p[0][0])):
        rows[f"per {granularity}, {share:.0%}"] = numbers(trial, QUALITY)
        plan = plan_of(space, trial.candidate)
        (HERE / "plans" / f"{granularity}_{share:g}.json").write_text(json.dumps(plan.to_json(), indent=1))
        title = f"SmolLM2-135M, per {granularity}, at most {share:.0%}"
        out = HERE / f"spans_{granularity}_{share:g}.png"
        span_map_png(space, trial.candidate, CONTEXT, out, title, kv_mb=trial.value("kv_mb"))
    keep("quality", rows, runs)
    columns = [m for m in QUALITY if any(m in row for row in rows.values())]
    print("| method | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        cells = [f"{row[m][0]:.3g} ± {row[m][1]:.2g}" if row[m][1] else f"{row[m][0]:.3g}" for m in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


def joint(runs: Mapping[str, Path]) -> None:
    """Hypervolume of each kind's front (kl, memory_mb) under one reference, best kl within memory budgets."""
    from matplotlib.figure import Figure

    points: dict[str, list[tuple[float, float]]] = {}
    for kind, run in runs.items():
        trials = [p.trial for p in front_of(run).points]
        points[kind] = sorted((t.value("memory_mb"), t.value("kl")) for t in trials)
    reference = (max(m for row in points.values() for m, _ in row), 2.0)
    floor = 1e-3  # on a log scale; below, it is the noise of 16-bit arithmetic
    volumes = {
        kind: hypervolume(
            np.array([[m, math.log10(max(kl, floor))] for m, kl in row if kl <= reference[1]]),
            np.array([reference[0], math.log10(reference[1])]),
        )
        for kind, row in points.items()
    }
    budgets = [80, 125, 150, 200, 250, 300, 350]
    within = {
        kind: {b: min((kl for m, kl in row if m <= b), default=None) for b in budgets}
        for kind, row in points.items()
    }
    result = {
        "reference": reference, "kl_floor": floor, "hypervolume": volumes, "best_kl_within_mb": within,
        "points": points,
    }  # fmt: skip
    keep("joint", result, runs)
    print("| front | hypervolume | " + " | ".join(f"{b} MB" for b in budgets) + " |")
    print("|---" * (len(budgets) + 2) + "|")
    for kind in points:
        cells = ["-" if kl is None else f"{kl:.3g}" for kl in within[kind].values()]
        print(f"| {kind} | {volumes[kind]:.1f} | " + " | ".join(cells) + " |")
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for (kind, row), marker in zip(points.items(), "osv^", strict=False):
        best, stair = math.inf, []
        for m, kl in row:
            if kl < best:
                best = kl
                stair.append((m, max(kl, floor)))
        axes.plot(*zip(*stair, strict=True), marker=marker, markersize=5, drawstyle="steps-post", label=kind)
    axes.set_yscale("log")
    axes.set_xlabel(f"weights and cache at {CONTEXT} tokens (MB)")
    axes.set_ylabel("KL to the uncompressed model (nats a token)")
    axes.set_title("SmolLM2-135M: one budget for weights, spans and cache bits", fontsize=11)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(HERE / "joint.png", dpi=130)


def latency() -> None:
    """The table of latency.json: attention alone, the whole model and the cache, by context."""
    found = json.loads((HERE / "latency.json").read_text())
    keep("latency", found, {})
    contexts = found["contexts"]
    print("| | " + " | ".join(f"{n} tokens" for n in contexts) + " |\n|---" + "|---" * len(contexts) + "|")
    for what in ("attention", "model"):
        for name in next(iter(contexts.values()))[what]:
            cells = []
            for row in contexts.values():
                cell = f"{row[what][name]['ms']:.2f} ms"
                memory = row["memory"].get(name) if what == "attention" else None
                if memory:
                    cell += f", {memory['tensors_mb']:.1f} MB ({memory['process_mb']:.1f})"
                cells.append(cell)
            print(f"| {what}: {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parts = parser.add_subparsers(dest="what", required=True)
    for what, names in (
        ("quality", ("group", "group25", "layer", "layer25")),
        ("joint", ("joint", "weights", "spans", "kv")),
    ):
        part = parts.add_parser(what)
        for name in names:
            part.add_argument(f"--{name}", type=Path)
    parts.add_parser("latency")
    args = vars(parser.parse_args())
    what = args.pop("what")
    args = {name: run for name, run in args.items() if run is not None}
    try:
        if what == "latency":
            latency()
        else:
            (quality if what == "quality" else joint)(args)
    except InfeasibleError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
