"""What a running study shows: a live bar in a terminal, plain lines everywhere else.

A display is a context manager and is called with every ``autocomp.study.Event``. Bars garble the logs of
``ray job`` and of batch systems, so anything that is no terminal gets log lines, few enough to read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.console import Console

    from autocomp.study import Event

logger = logging.getLogger("autocomp.progress")


class Display(Protocol):
    """Shows events between ``__enter__`` and ``__exit__``."""

    def __call__(self, event: Event) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_display(console: Console, quiet: bool = False) -> Display:
    """The display for ``console``: silent, live, or plain."""
    if quiet:
        return SilentDisplay()
    return LiveDisplay(console) if console.is_terminal else PlainDisplay()


def duration_text(seconds: float | None) -> str:
    """``1:02:03``, ``4:05`` or ``?``."""
    if seconds is None or not 0 <= seconds < 1e9:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def best_text(best: Mapping[str, float]) -> str:
    """``best kl 0.012, decode_ms 3.4``: each objective's own best; empty before the first trial."""
    return "best " + ", ".join(f"{k} {v:.4g}" for k, v in best.items()) if best else ""


class SilentDisplay:
    """Shows nothing; warnings still reach the log."""

    def __call__(self, event: Event) -> None:
        del event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None


class PlainDisplay(SilentDisplay):
    """Log lines: every phase, message and failure at once, finished trials at most every ``period`` seconds.

    Args:
        period: seconds between two lines about trials; the last trial of a budget always gets one.
        clock: seconds that only grow; for tests.
    """

    def __init__(self, period: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._period, self._clock = period, clock
        self._next = clock()
        self._done = -1

    def __call__(self, event: Event) -> None:
        if event.kind == "trial" and event.trial is not None and not event.trial.ok:
            logger.warning("%s", event.text)
        elif event.kind != "trial":
            logger.info("%s", event.text)
        elif self._clock() >= self._next or self._done < event.done == event.total:
            self._next = self._clock() + self._period
            left = "" if event.eta_s is None else f"{duration_text(event.eta_s)} left"
            counts = f"{event.done}/{event.total} trials"
            parts = [counts, best_text(event.best), f"{event.busy} busy", left, event.text]
            logger.info("%s", "; ".join(p for p in parts if p))
        self._done = event.done


class LiveDisplay:
    """A bar with the phase, trials measured of the budget, best values, busy workers and time left.

    Phases, messages and failures scroll by above it.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[best]}", style="green"),
            TextColumn("{task.fields[busy]} busy"),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, best="", busy=0, left="")

    def __call__(self, event: Event) -> None:
        failed = event.trial is not None and not event.trial.ok
        if event.kind != "trial" or failed:
            style = "red" if failed else "bold" if event.kind == "phase" else ""
            self._progress.console.print(event.text, style=style, markup=False, highlight=False)
        self._progress.update(
            self._task,
            description=event.text[:44] if event.kind == "phase" else None,
            completed=event.done,
            total=event.total or None,
            best=best_text(event.best),
            busy=event.busy,
            left="" if event.eta_s is None else f"{duration_text(event.eta_s)} left",
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
