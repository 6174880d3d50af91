"""Errors a user can act on: each names what was expected, what was found and what to do."""

from __future__ import annotations


class AutosegError(Exception):
    """Something the user can fix; the command line prints its message without a traceback and ends with exit code 2."""


class DatasetError(AutosegError):
    """The data set cannot be read or is inconsistent."""


class GeometryError(AutosegError):
    """Grids that must agree do not, or an image's geometry is unusable."""


class PlanError(AutosegError):
    """The plan is invalid or does not suit the data."""


class RecordError(AutosegError):
    """A JSON record of the work folder is missing, damaged or has an invalid value; the message holds the exact path."""


class PluginError(AutosegError):
    """A named choice (loss, planner, ...) is unknown or cannot be imported."""


class RunError(AutosegError):
    """A training run cannot start or go on."""


class CasesFailed(AutosegError):
    """Some cases failed and the rest is done; the command line ends with exit code 3."""
