"""Reading the files of a run directory that other rooms than the study need."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from autocomp.description import Description
from autocomp.errors import RunError
from autocomp.space import SearchSpace


def read_space(run_dir: str | Path) -> SearchSpace:
    """The search space of a run. Raises as ``read_description`` does."""
    return read_description(run_dir).space


def read_description(run_dir: str | Path) -> Description:
    """What a run's worker told about model and space: its ``description.json``.

    Raises:
        RunError: the file is missing or can't be read.
    """
    path = Path(run_dir) / "description.json"
    try:
        return Description.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        raise RunError(
            f"{str(path)!r} is missing: a run writes it when its model is loaded; check the path"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"can't read {str(path)!r}: {error!r}; `autocomp resume` writes it again") from None


def read_context(run_dir: str | Path, description: Description) -> int:
    """Tokens in a run's caches: those of the attention space's own option, else of the workload's scenario.

    Raises:
        RunError: ``job.yaml`` is missing or can't be read.
    """
    path = Path(run_dir) / "job.yaml"
    try:
        entries = yaml.safe_load(path.read_text())["space"]
        named = [int(entry["attention"].get("context", 0)) for entry in entries if "attention" in entry]
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"can't read the spaces of {str(path)!r}: {error!r}") from None
    return next((n for n in named if n), description.site.context)
