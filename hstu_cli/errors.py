"""The errors that a user can cause, each with the exit code that it ends the command with.

Their messages are complete sentences for the person at the terminal: what was wrong, and the way out.
Anything else that is raised is a bug in this package and keeps its traceback.
"""


class HstuError(Exception):
    """Base of all errors that are reported as one message instead of a traceback."""

    exit_code = 1


class RunError(HstuError):
    """The run itself failed or its result is invalid: full disk, lost connection, lock held (exit 1)."""


class UsageError(HstuError, ValueError):
    """The command line alone is wrong: unknown name, value out of range, impossible combination (exit 2)."""

    exit_code = 2


class UnavailableError(HstuError):
    """A device or an optional package is absent (exit 3)."""

    exit_code = 3


class InputError(HstuError, ValueError):
    """A file, folder or archive is missing, unreadable or wrong (exit 4)."""

    exit_code = 4
