"""Errors that name the value and the remedy. All derive from ``AutocompError``."""

from __future__ import annotations


class AutocompError(Exception):
    """Base of every error that a user can cause and mend; the CLI prints it without a stack trace."""


class JobError(AutocompError):
    """A job file is wrong: a key, a value, a path, an override, or a budget that nothing can meet."""


class SpaceError(AutocompError):
    """A decision, a constraint or a candidate does not fit its search space."""


class ObjectiveError(AutocompError):
    """An objective, constraint or selection string can't be read, or names a metric nobody measures."""


class CapabilityError(AutocompError):
    """This machine or this installation can't do what was asked; the message says what is missing."""


class RunError(AutocompError):
    """A run directory is missing, foreign, locked by another process, or damaged beyond its last line."""


class ExportError(AutocompError):
    """A candidate can't be written in the wanted format, or a folder can't be loaded."""


class InfeasibleError(AutocompError):
    """No candidate meets the constraints; the message gives the nearest reachable values."""
