"""Choosing the few sequences that a search scores (FlashEval, arXiv 2403.16379): ``autocomp proxy``.

A few dozen candidates are scored on every sequence of the proxy split, and the subset is searched whose
ranking of them is that of all sequences. A job that names its file in ``workload.data.subset`` then scores
these sequences only. Selection and report splits are not touched, here or there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from autocomp.api import JobLike, as_job, make_executor, new_run_dir
from autocomp.errors import JobError, RunError
from autocomp.executors.base import Executor
from autocomp.job import Job
from autocomp.journal import Journal
from autocomp.registry import WORKLOADS
from autocomp.sequence_scores import Say, Scoring

if TYPE_CHECKING:
    from autocomp.predictors.proxy_set import ProxySet


def choose_proxy(
    job: JobLike,
    *,
    out: str | Path,
    size: int = 0,
    candidates: int = 30,
    metric: str = "",
    overrides: Sequence[str] = (),
    run_dir: str | Path | None = None,
    executor: Executor | None = None,
    say: Say = lambda text: None,
) -> ProxySet:
    """Write the sequences that rank candidates as the whole proxy split does.

    Args:
        job: its ``workload.data.proxy`` sequences are what is chosen from.
        out: the file to write, for ``workload.data.subset``.
        size: sequences to choose; 0 for a tenth.
        candidates: how many are scored on all sequences. Half of them check what the others chose.
        metric: whose ranking counts; empty for the job's first objective that has one.
        run_dir: keeps what was scored; a folder of an earlier call with the same job is continued.
        executor: replaces what the job names.
        say: told what is going on.

    Raises:
        JobError: the workload has no scores of single sequences, or a number makes no sense.
        RunError: a worker failed, or ``run_dir`` belongs to something else.
        SpaceError: too few candidates could be scored.
    """
    from autocomp.predictors.proxy_set import choose_and_check

    checked = as_job(job, overrides)
    wanted = _metric(checked, metric)
    checked = Job.of(checked, ["workload.data.subset=''"])  # chosen from all sequences
    pool = int(checked.workload["data"]["proxy"])
    size = size or max(2, pool // 10)
    if not 1 < size < pool:
        raise JobError(
            f"{size} of {pool} sequences is no subset; raise workload.data.proxy, or change the size"
        )
    if candidates < 6:
        raise JobError(
            f"{candidates} candidates are too few: three choose and three check; 30 is a good number"
        )
    folder = Path(run_dir) if run_dir is not None else new_run_dir(checked)
    with Journal(folder) as journal:
        running = executor if executor is not None else make_executor(checked)
        try:
            scores = Scoring(checked, journal, running, wanted, say).run(candidates)
        finally:
            running.close()
    chosen = replace(choose_and_check(scores.score(wanted), size, seed=checked.seed), data=scores.data)
    try:
        chosen.save(Path(out).expanduser())
    except OSError as error:
        raise RunError(f"can't write {str(out)!r} ({error}); what was scored is in {folder}") from None
    return chosen


def _metric(job: Job, asked: str) -> str:
    """The metric that counts. Raises ``JobError`` for one that is no mean over sequences."""
    kind = job.workload["kind"]
    known = WORKLOADS.get(kind).sequence_metrics
    if not known:
        raise JobError(f"workload {kind} is not scored by single sequences: no subset of them can be chosen")
    if asked and asked not in known:
        raise JobError(f"metric {asked!r} is no mean over sequences; use one of {', '.join(known)}")
    named = (o.metric for o in job.parsed_objectives() if o.metric in known)
    return asked or next(named, known[0])
