"""The exit statuses of a start, the error that all ranks share, how an error is printed, and names of ranks in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape

from .redact import CONTROL, redact

GO_ON_LATER = 75
"""Exit status (EX_TEMPFAIL) of a start that saved and stopped early; the same command continues the run."""
USER_ERROR = 2
"""Exit status of an error that only a person can correct."""
NODE_USER_ERROR = 250
"""Exit status that stands for USER_ERROR at a node of a job: srun reports the highest status of all nodes, and 2 would
be hidden by that of a node that lost its peer. `slurm/train.sbatch` makes it 2 again."""
GPU_ERROR = 70
"""Exit status (EX_SOFTWARE) after a GPU reported an error, such as an illegal memory access; the next start may
succeed."""
IO_ERROR = 74
"""Exit status (EX_IOERR) after a file could not be read or written, or NCCL failed on a rank; the next start may
succeed."""


class CommonError(OSError):
    """An error that every rank raises identically; local rank 0 of each node prints it."""


class DamageError(ValueError):
    """A checkpoint whose content contradicts its hashes, or that lacks a file."""


def badness(error: Exception) -> int:
    """Return the severity of a rank's error, 0 for the worst: an index into (CommonError, ValueError, DamageError).

    An OSError is the worst, since the findings of other ranks on a failing file system are doubtful. Damage is the
    least, since a start can go on after it alone.
    """
    return 0 if isinstance(error, OSError) else 2 if isinstance(error, DamageError) else 1


def worst(errors: Iterable[tuple[int, str]]) -> tuple[int, str]:
    """Return the first of the worst errors (badness, text), given by rank: the one that all ranks raise."""
    return min(errors, key=lambda error: error[0])


def print_error(error: str) -> None:
    """Print one error to standard error, in one line without secrets and without control characters."""
    line = CONTROL.sub("?", re.sub(r"\s*\n\s*", " ", redact(error).strip()))
    Console(stderr=True, emoji=False).print(f"[bold red]error:[/] {escape(line)}", highlight=False, soft_wrap=True)


def rank_names(ranks: Sequence[int]) -> str:
    """Return `rank 3` or `ranks 0, 1, 2`, with at most eight named."""
    names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"
