"""The sampling schedules of a small DiT whose Frechet distance was measured (``experiments/fashion_dit``)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from autocomp.predictors.sequence import Traits
from autocomp.search_spaces.base import ModelSite
from autocomp.search_spaces.schedules import Schedules, SchedulesConfig
from autocomp.space import Candidate, SearchSpace, space_from_json
from autocomp.trial import Estimate, Fidelity, Measurement, Trial

FOLDER = Path(__file__).parent.parent / "fashion_dit"
METRIC = "fd"
NAMES = ("schedules", "schedules+")
"""Without and with traits."""
FIELDS = ["time", "order", "prediction", "corrector", "relax", "guidance"]


def load(name: str) -> tuple[SearchSpace, list[Trial], Traits | None]:
    """Space, trials and traits of the recorded table."""
    data = json.loads(gzip.decompress((FOLDER / "predictor_table.json.gz").read_bytes()))
    space = space_from_json(data["space"])
    trials = []
    for i, row in enumerate(data["rows"]):
        found = Measurement({METRIC: Estimate(row["value"], row["stderr"], data["images"])}, "cpu")
        trials.append(Trial(i, Candidate.of(row["candidate"]), Fidelity(), "random", found))
    return space, trials, _traits(data["model"]) if name.endswith("+") else None


def _traits(model: str) -> Traits:
    """What is known of a schedule without measuring it, each candidate once."""
    config = json.loads((FOLDER / "checkpoints" / model / "scheduler" / "scheduler_config.json").read_text())
    space = Schedules(SchedulesConfig(slots=10, min_steps=4, search=list(FIELDS)))
    site = ModelSite("dit", (), 0, "", models=("",), steps=20, scheduler=config, guided=True)
    known: dict[str, Any] = {}

    def traits(candidate: Candidate) -> list[float]:
        if candidate.fingerprint not in known:
            known[candidate.fingerprint] = list(space.traits(site, candidate.values))
        return list(known[candidate.fingerprint])

    return traits
