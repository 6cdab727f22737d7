"""Ending a process without the page of "leaked" objects that Triton's bindings print at a normal exit."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys


def leave(code: int = 0) -> None:
    """End the process with ``code`` at once when Triton is loaded; without Triton this does nothing.

    Exit handlers (Ray's, MLflow's, logging's) run first and streams are flushed.
    """
    if "triton" not in sys.modules:
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads the pipe any more
            stream.flush()
    os._exit(code)
