"""The exit statuses of a start, and the error that all ranks share."""

GO_ON_LATER = 75
"""Exit status (EX_TEMPFAIL) of a start that saved and stopped early; the same command continues the run."""
USER_ERROR = 2
"""Exit status of an error that only a person can correct."""
IO_ERROR = 74
"""Exit status (EX_IOERR) after a file could not be read or written; the next start may succeed."""


class CommonError(OSError):
    """An error that every rank raises identically; local rank 0 of each node prints it."""
