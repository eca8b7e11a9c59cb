"""The exit statuses of a start, the error that all ranks share, how an error is printed, and names of ranks in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from .redact import CONTROL, redact

GO_ON_LATER = 75
"""Exit status (EX_TEMPFAIL) of a start that saved and stopped early; the same command continues the run."""
USER_ERROR = 2
"""Exit status of an error that only a person can correct."""
IO_ERROR = 74
"""Exit status (EX_IOERR) after a file could not be read or written; the next start may succeed."""


class CommonError(OSError):
    """An error that every rank raises identically; local rank 0 of each node prints it."""


class DamageError(ValueError):
    """A checkpoint whose content contradicts its hashes, or that lacks a file."""


def print_error(error: str) -> None:
    """Print one error to standard error, in one line without secrets and without control characters."""
    line = CONTROL.sub("?", re.sub(r"\s*\n\s*", " ", redact(error).strip()))
    Console(stderr=True).print(f"[bold red]error:[/] {escape(line)}", highlight=False, soft_wrap=True)


def rank_names(ranks: Sequence[int]) -> str:
    """Return `rank 3` or `ranks 0, 1, 2`, with at most eight named."""
    names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"
