"""Reading the files of a run directory that other rooms than the study need."""

from __future__ import annotations

import json
from pathlib import Path

from autocomp.description import Description
from autocomp.errors import RunError
from autocomp.space import SearchSpace


def read_space(run_dir: str | Path) -> SearchSpace:
    """The search space of a run, from its ``description.json``.

    Raises:
        RunError: the file is missing or can't be read.
    """
    path = Path(run_dir) / "description.json"
    try:
        return Description.from_json(json.loads(path.read_text())).space
    except FileNotFoundError:
        raise RunError(
            f"{str(path)!r} is missing: a run writes it when its model is loaded; check the path"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"can't read {str(path)!r}: {error!r}; `autocomp resume` writes it again") from None
