"""Which few sequences rank compressed language models as ten times as many do? FlashEval on language models.

    python proxy.py measure lm --candidates 120
    python proxy.py table lm

``measure`` runs ``autocomp proxy`` on ``NAME/proxy.yaml`` (continued in ``--run-dir`` when it was stopped)
and keeps the KL of every candidate on every sequence in ``results/proxy_NAME.json.gz``. ``table`` chooses
subsets of a tenth and a twentieth on random halves of the candidates and writes to
``results/proxy_NAME.json`` and to the screen how they rank the other halves: by both searches, against random
sets, for all candidates and for those on the predicted front alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau, spearmanr

from autocomp.job import Job
from autocomp.journal import read_records
from autocomp.predictors.proxy_scores import LogMeanScore
from autocomp.predictors.proxy_search import Ranking, frequency, match
from autocomp.proxy import choose_proxy
from autocomp.sequence_scores import SequenceScores

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NAMES = ("lm", "smollm2")
SHARES = (10, 20)
DRAWS = 200


def measure(args: argparse.Namespace) -> None:
    job = Job.from_yaml(HERE / args.name / "proxy.yaml", args.override)
    run_dir = args.run_dir or Path("runs") / f"proxy-{args.name}"
    out = RESULTS / f"proxy_{args.name}_subset.json"
    chosen = choose_proxy(job, out=out, candidates=args.candidates, run_dir=run_dir, say=print)
    print(chosen.text())
    keep(run_dir, scores_of(args.name))


def scores_of(name: str) -> Path:
    return RESULTS / f"proxy_{name}.json.gz"


def keep(run_dir: Path, path: Path) -> None:
    """The KL of a run's candidates on every sequence, to six digits."""
    scores = SequenceScores.of(read_records(run_dir))
    kept = {
        "data": dict(scores.data),
        "origins": scores.origins,
        "candidates": [c.to_json() for c in scores.candidates],
        "kl": [[float(f"{v:.6g}") for v in row] for row in scores.values["kl"]],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(kept).encode(), mtime=0))


def load(path: Path) -> tuple[LogMeanScore, list[str]]:
    """The KL of each candidate on each sequence, and how the candidates came about."""
    if not path.is_file():
        raise SystemExit(f"there is no {path.name}: run `measure` first")
    with gzip.open(path, "rt") as file:
        kept = json.load(file)
    return LogMeanScore(np.array(kept["kl"])), kept["origins"]


def agreement(score: LogMeanScore, sets: np.ndarray, margin: float) -> dict[str, float]:
    """Means over sets of the rank correlations with the full set's ranking, and the spread of the first."""
    values, full = score(sets), score.full
    clear = Ranking.of(score, margin).tau(values)
    return {
        "tau": float(clear.mean()),
        "tau_sd": float(clear.std()),
        "tau_all_pairs": float(np.mean([kendalltau(full, v).statistic for v in values])),
        "spearman": float(np.mean([spearmanr(full, v).statistic for v in values])),
        "log_error": float(
            np.mean((values - full - (values - full).mean(axis=1, keepdims=True)) ** 2) ** 0.5
        ),
    }


def held_out(score: LogMeanScore, size: int, half: int, margin: float) -> dict[str, dict[str, float]]:
    """How subsets chosen on one random half of the candidates rank the other one."""
    rng = np.random.default_rng(half)
    order = rng.permutation(score.models)
    seen, unseen = (score.of(np.sort(part)) for part in np.array_split(order, 2))
    sets = {
        "match": match(seen, size, rng)[None],
        "frequency": frequency(seen, size, rng, margin=margin)[None],
        "random": np.stack([rng.permutation(score.samples)[:size] for _ in range(DRAWS)]),
    }
    found = {name: agreement(unseen, rows, margin) for name, rows in sets.items()}
    for name in ("match", "frequency"):
        found[name]["tau_chosen_on"] = agreement(seen, sets[name], margin)["tau"]
        found[name]["random_sets_below"] = float(
            np.mean(Ranking.of(unseen, margin).tau(unseen(sets["random"])) < found[name]["tau"])
        )
    return found


def table(args: argparse.Namespace) -> None:
    score, origins = load(scores_of(args.name))
    kl = np.exp(score.full)
    print(f"{score.models} candidates, {score.samples} sequences, kl {kl.min():.3g} to {kl.max():.3g}")
    rows: list[dict[str, Any]] = []
    for share, kind in product(SHARES, ("all", "allocated")):
        some = score if kind == "all" else score.of(np.array([i for i, o in enumerate(origins) if o == kind]))
        halves = [held_out(some, score.samples // share, h, args.margin) for h in range(args.halves)]
        for name in ("match", "frequency", "random"):
            means = {k: round(float(np.mean([h[name][k] for h in halves])), 4) for k in halves[0][name]}
            spread = round(float(np.std([h[name]["tau"] for h in halves])), 4)
            rows.append(
                {"candidates": kind, "size": score.samples // share, "by": name, **means, "halves_sd": spread}
            )
    clear = len(Ranking.of(score, args.margin).sign)
    data = {
        "models": score.models,
        "sequences": score.samples,
        "halves": args.halves,
        "clear_pairs": clear,
        "rows": rows,
    }
    (RESULTS / f"proxy_{args.name}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| candidates | sequences | chosen by | tau, held out | tau, all pairs | Spearman | tau, chosen on |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        spread = r["tau_sd"] if r["by"] == "random" else r["halves_sd"]
        own = f"{r['tau_chosen_on']:.3f}" if "tau_chosen_on" in r else ""
        lines.append(
            f"| {r['candidates']} | {r['size']} | {r['by']} | {r['tau']:.3f} ± {spread:.3f} "
            f"| {r['tau_all_pairs']:.3f} | {r['spearman']:.3f} | {own} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["measure", "table"])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("-o", "--override", action="append", default=[], help="dotted override of the job")
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--run-dir", type=Path, help="default: runs/proxy-NAME")
    parser.add_argument("--halves", type=int, default=3, help="random halves of the candidates")
    parser.add_argument(
        "--margin", type=float, default=1.0, help="standard errors below which a pair is tied"
    )
    args = parser.parse_args()
    {"measure": measure, "table": table}[args.action](args)


if __name__ == "__main__":
    main()
