"""Work that some ranks may fail at, and the decision about it that all of them share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..parallel.mesh import Mesh
from .errors import CommonError, DamageError, badness, worst

log = logging.getLogger(__name__)

_T = TypeVar("_T")


def on_all_ranks(mesh: Mesh, work: Callable[[], _T]) -> _T:
    """Return what `work` returns on this rank; raise on every rank the worst error that any rank met. Collective.

    These errors are OSError, which is raised as CommonError, and ValueError; any other ends this rank alone.
    """
    result: Any = None
    mine: tuple[int, str] | None = None
    try:
        result = work()
    except (OSError, ValueError) as error:
        mine = badness(error), str(error)
        log.exception("on this rank")
    gathered: list[tuple[int, str] | None] = [None] * mesh.world_size  # by rank
    dist.all_gather_object(gathered, mine)
    if met := [error for error in gathered if error is not None]:
        kind, text = worst(met)
        raise (CommonError, ValueError, DamageError)[kind](text)  # in the order of `badness`
    return result


def first_of_any(found: str | None) -> str | None:
    """Return what the first rank has found, on every rank; None: no rank has found anything. Collective."""
    gathered: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return next((text for text in gathered if text is not None), None)


def on_rank_0(mesh: Mesh, work: Callable[[], _T]) -> _T:
    """Return on every rank what `work` returns on rank 0, the only rank that calls it; raise its error on all of them.

    Its errors are OSError, which is raised as CommonError, and ValueError; any other ends rank 0 alone. Collective. A
    shared file system may show other ranks an older state of a directory, and a file has one writer.
    """
    return from_rank_0(on_all_ranks(mesh, work if mesh.rank == 0 else lambda: None))


def from_rank_0(value: Any) -> Any:
    """Return on every rank the value that rank 0 passes; those of other ranks do not count. Collective."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
