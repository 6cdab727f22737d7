"""How well can a schedule's Frechet distance be predicted from other schedules'?

``measure`` samples a chosen subset of images with schedules of the space ``schedules`` and writes a table,
``predictor_table.json.gz``; ``compare`` fits every kind of predictor to parts of it and writes Kendall's tau
on the rest to ``results/predictor.json``. The comparison needs no model.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
from lab import Lab
from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor

from autocomp.diffusion import surrogate
from autocomp.diffusion.noise import NoiseSchedule
from autocomp.measure.images import fd_estimate
from autocomp.predictors.audit import rank_correlations
from autocomp.predictors.choose import KINDS, make_predictor
from autocomp.predictors.sequence import SequenceEncoder, Sequences, Traits
from autocomp.search_spaces.base import ModelSite
from autocomp.search_spaces.schedules import Schedules, SchedulesConfig
from autocomp.searchers.evolution import Breeder
from autocomp.space import Candidate, SearchSpace, space_from_json, space_to_json
from autocomp.trial import Estimate, Fidelity, Measurement, Trial

HERE = Path(__file__).parent
TABLE = HERE / "predictor_table.json.gz"
METRIC = "fd"
COMPARED = ("ridge", "gp", "trees", "trees+", "ranking", "ranking+", "best+", "boosting", "forest")


def the_space(config: dict[str, object], slots: int) -> tuple[Schedules, SearchSpace, list[Candidate]]:
    """Four steps to ``slots``, everything but the model searched; and its baselines."""
    fields = ["time", "order", "prediction", "corrector", "relax", "guidance"]
    schedules = Schedules(SchedulesConfig(slots=slots, min_steps=4, search=fields))
    site = ModelSite("dit", (), 0, "", models=("",), steps=20, scheduler=config)
    decisions = schedules.decisions(site)
    space = SearchSpace(tuple(decisions), tuple(schedules.constraints(site, decisions)))
    return schedules, space, schedules.baselines(site, decisions)


def drawn(
    space: SearchSpace, baselines: list[Candidate], count: int, rng: np.random.Generator
) -> list[Candidate]:
    """Baselines, then as many random candidates as children of what there is (as an evolution's are)."""
    found = {c.fingerprint: c for c in baselines if not space.violations(c)}
    wild, tame = Breeder(space, mutation=8.0), list(found.values())
    while len(found) < count:
        random = space.sample(rng)
        if len(found) % 2:
            order = [tame[i] for i in rng.permutation(len(tame))]
            random = wild.child(order, rng)
            tame.append(random)
        if not space.violations(random):
            found[random.fingerprint] = random
    return list(found.values())[:count]


def measure(args: argparse.Namespace) -> None:
    lab = Lab(args.checkpoints, args.size)
    schedules, space, baselines = the_space(lab.config, args.slots)
    candidates = drawn(space, baselines, args.count, np.random.default_rng(args.seed))
    samples = json.loads(args.subset.read_text())["indices"]
    rows, began = [], time.time()
    for i, candidate in enumerate(candidates):
        try:
            schedule = schedules.schedule(candidate.values)
            assert schedule is not None
            found = fd_estimate(lab.sample(schedule, samples)[0], lab.real)
        except FloatingPointError as error:
            print(f"{i}: {error}", flush=True)
            continue
        rows.append({"candidate": candidate.to_json(), "value": found.value, "stderr": found.stderr})
        if i % 10 == 0:
            print(f"{i}: fd {found.value:.3f} +- {found.stderr:.3f}, {time.time() - began:.0f} s", flush=True)
            save(args, space, rows)
    save(args, space, rows)


def save(args: argparse.Namespace, space: SearchSpace, rows: list[dict[str, object]]) -> None:
    images = len(json.loads(args.subset.read_text())["indices"])
    data = {"model": args.size, "images": images, "space": space_to_json(space), "rows": rows}
    args.table.write_bytes(gzip.compress(json.dumps(data).encode(), mtime=0))


def load(table: Path) -> tuple[SearchSpace, list[Trial]]:
    """The space and the trials of a measured table."""
    data = json.loads(gzip.decompress(table.read_bytes()))
    trials = []
    for i, row in enumerate(data["rows"]):
        found = Measurement({METRIC: Estimate(row["value"], row["stderr"], data["images"])}, "cpu")
        trials.append(Trial(i, Candidate.of(row["candidate"]), Fidelity(), "random", found))
    return space_from_json(data["space"]), trials


def theory(args: argparse.Namespace) -> Traits:
    """What is known of a schedule without measuring it; see ``autocomp.diffusion.surrogate``."""
    folder = args.checkpoints / args.size / "scheduler"
    config = json.loads((folder / "scheduler_config.json").read_text())
    schedules, known = the_space(config, args.slots)[0], {}

    def traits(candidate: Candidate) -> list[float]:
        if candidate.fingerprint not in known:
            found = schedules.schedule(candidate.values)
            assert found is not None
            known[candidate.fingerprint] = surrogate.traits(NoiseSchedule.of(config), found)
        return known[candidate.fingerprint]

    return traits


def learned(
    kind: str, space: SearchSpace, train: list[Trial], test: list[Trial], traits: Traits
) -> np.ndarray:
    """Predictions for ``test``, by a predictor of the package (``+``: with what theory says), or by a forest
    on its features."""
    name, theory, _ = kind.partition("+")
    if name in KINDS:
        model = make_predictor(name, METRIC, None, space, traits if theory else None).fit(train)
        return model.predict([t.candidate for t in test]).mean
    encoder = SequenceEncoder(space)
    x, unseen = (flat(encoder([t.candidate for t in part])) for part in (train, test))
    y = np.log([t.value(METRIC) for t in train])
    if kind == "boosting":
        options = {"n_estimators": 200, "subsample": 0.7, "learning_rate": 0.05, "max_features": 0.3}
        return GradientBoostingRegressor(random_state=0, **options).fit(x, y).predict(unseen)
    forest = RandomForestRegressor(200, max_features=0.3, min_samples_leaf=2, random_state=0)
    return forest.fit(x, y).predict(unseen)


def flat(data: Sequences) -> np.ndarray:
    """Sums, means of squares and the first, second and last step of a sequence, and its whole, in one row."""
    count = data.used.sum(axis=1, keepdims=True)
    steps, last = data.steps, data.steps[np.arange(len(count)), count[:, 0] - 1]
    means = [steps.sum(axis=1) / count, np.square(steps).sum(axis=1) / count]
    return np.concatenate([*means, steps[:, 0], steps[:, 1], last, data.whole], axis=1)


def compare(args: argparse.Namespace) -> None:
    """Tau on held-out schedules, mean and spread over random divisions."""
    (space, trials), traits = load(args.table), theory(args)
    measured = np.array([t.value(METRIC) for t in trials])
    held, results = min(100, len(trials) // 3), []
    for size in [n for n in (50, 100, 200) if n + held <= len(trials)]:
        taus: dict[str, list[float]] = {k: [] for k in COMPARED}
        seconds = dict.fromkeys(taus, 0.0)
        for seed in range(args.repeats):
            order = np.random.default_rng(seed).permutation(len(trials))
            test, train = order[:held], order[held : held + size]
            parts = [trials[i] for i in train], [trials[i] for i in test]
            for kind in taus:
                began = time.process_time()
                taus[kind].append(rank_correlations(learned(kind, space, *parts, traits), measured[test])[1])
                seconds[kind] += (time.process_time() - began) / args.repeats
        for kind, found in taus.items():
            row = {
                "trials": size,
                "held_out": held,
                "predictor": kind,
                "tau": round(float(np.mean(found)), 3),
            }
            results.append(
                row | {"sd": round(float(np.std(found)), 3), "cpu_seconds": round(seconds[kind], 2)}
            )
            print(results[-1], flush=True)
    args.out.write_text(json.dumps({"repeats": args.repeats, "results": results}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["measure", "compare"])
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--checkpoints", type=Path, default=HERE / "checkpoints")
    parser.add_argument("--size", default="small")
    parser.add_argument("--slots", type=int, default=10)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--subset", type=Path, default=HERE / "flash_eval_subset.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "predictor.json")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    {"measure": measure, "compare": compare}[args.action](args)


if __name__ == "__main__":
    main()
