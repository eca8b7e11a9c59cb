"""Agreement of all ranks on what they are about to do, before they join: all go on, or all raise the same error.

The ranks talk through the key-value store by which they meet, so neither devices nor process groups have to agree yet.
Every rank sends and asks a few keys; rank 0, which gives the verdict, asks one of each rank.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from .errors import CommonError, badness, rank_names, worst

LAST_SAVED = "last checkpoint in run_directory"
"""Entry in which ranks may differ for a moment, since a network file system may show them different states."""
_LAST_READER = timedelta(seconds=30)
_KNOWN = (ValueError, OSError)
_UNSET = "unset"


def agree(store: Store, rank: int, world_size: int, mine: Mapping[str, Any] | Exception) -> dict[str, Any]:
    """Return the entries of rank 0, in which every rank agrees. Collective.

    `mine` are this rank's entries, or the error that kept it from having any. An entry that is None on this rank is
    taken from rank 0. All ranks raise the worst error that any rank has, or else one for the first entry that differs:
    CommonError if the same command may succeed later, and ValueError if it will not. A rank whose own error is neither
    ValueError nor OSError, and so not the user's, raises that one, with its traceback.
    """
    # Calls are counted within the store, which may serve several of them.
    at = f"agreement/{store.add(f'agreement/{rank}', 1)}"
    error = mine if isinstance(mine, Exception) else None
    if rank == 0:
        store.set(f"{at}/entries", json.dumps({} if isinstance(mine, Exception) else mine))
    entries = json.loads(store.get(f"{at}/entries"))  # `get` waits until rank 0 has set them
    store.set(f"{at}/finding/{rank}", json.dumps(_finding(mine, entries)))
    if rank == 0:
        findings = [json.loads(store.get(f"{at}/finding/{other}")) for other in range(world_size)]
        store.set(f"{at}/verdict", json.dumps(_verdict(findings, entries)))
    verdict = json.loads(store.get(f"{at}/verdict"))
    # The store may live in the process of rank 0, which therefore leaves last.
    if store.add(f"{at}/readers", 1) == world_size:
        store.set(f"{at}/read", "")
    if rank == 0:
        with contextlib.suppress(dist.DistError):
            store.wait([f"{at}/read"], _LAST_READER)
    if error is not None and not isinstance(error, _KNOWN):
        raise error
    if verdict:
        raise (CommonError if verdict["passes"] else ValueError)(verdict["error"]) from error
    return entries


def _finding(mine: Mapping[str, Any] | Exception, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return this rank's error, the first entry in which it differs from rank 0, or nothing."""
    if isinstance(mine, Exception):
        return {"error": str(mine) if isinstance(mine, _KNOWN) else repr(mine), "badness": badness(mine)}
    # Without entries rank 0 has an error, which counts before any difference.
    for key in [*mine, *entries] if entries else []:
        if mine.get(key, _UNSET) not in (None, entries.get(key, _UNSET)):
            return {"key": key, "value": mine.get(key, _UNSET)}
    return {}


def _verdict(findings: Sequence[Mapping[str, Any]], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the error that all ranks raise and whether it may pass by itself, or nothing if all ranks agree."""
    if failed := [rank for rank, found in enumerate(findings) if "error" in found]:
        kind, text = worst((findings[rank]["badness"], findings[rank]["error"]) for rank in failed)
        same = [rank for rank in failed if findings[rank]["error"] == text]
        named = "" if len(same) == len(findings) else f"{rank_names(same)}: "  # an error of all ranks names none
        return {"error": named + text, "passes": kind == 0}
    differing = [rank for rank, found in enumerate(findings) if found]
    if not differing:
        return {}
    key = findings[differing[0]]["key"]
    ranks_of: dict[str, list[int]] = {}  # value → ranks that differ in the same key as the first
    for rank in differing:
        if findings[rank]["key"] == key:
            ranks_of.setdefault(_text(findings[rank]["value"]), []).append(rank)
    others = ", ".join(f"{value} on {rank_names(ranks)}" for value, ranks in ranks_of.items())
    found = f"{key} = {_text(entries.get(key, _UNSET))} on rank 0, {others}"
    if key == LAST_SAVED:
        return {
            "error": f"{found}: the ranks see different checkpoints; mount the same directory on all machines, and the "
            "same command continues the run",
            "passes": True,
        }
    return {
        "error": f"{found}: all ranks must train the same; start them with one recipe, the same settings, data and "
        "code",
        "passes": False,
    }


def _text(value: Any) -> str:
    return _UNSET if value == _UNSET else repr(value)
