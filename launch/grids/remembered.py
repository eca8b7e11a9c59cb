"""Grids and measured links of a run, kept in its directory: a start divided like an earlier one takes the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...data.files import write_text
from ...parallel.cp.cost import Speed
from ...parallel.cp.grid import CpGrid
from ...parallel.cp.topology import Fabric, Topology
from .choice import LayerKind

SIDES = ("inside", "across", "copies")
"""The fabrics of a topology."""


def recall_grids(file: Path, division: str) -> dict[LayerKind, CpGrid]:
    """Return the grids of an earlier start with the same division. Raises ValueError if the file is damaged."""
    with _damage_named(file):
        return {
            LayerKind(entry["sequence_tokens"], entry["window"]): CpGrid.parse(entry["grid"])
            for entry in _all_divisions(file).get(division, [])
        }


def remember_grids(file: Path, division: str, grids: Mapping[LayerKind, CpGrid]) -> None:
    """Record the grids of one division; the grids of other divisions stay in the file."""
    with _damage_named(file):
        kept = _all_divisions(file)
    kept[division] = [{**kind._asdict(), "grid": str(grid)} for kind, grid in grids.items()]
    write_text(file, json.dumps(kept, indent=2) + "\n")


def recall_links(file: Path, division: str) -> tuple[Topology, Speed] | None:
    """Return what a probe measured in an earlier start with the same division; None: there was none.

    Raises ValueError if the file is damaged.
    """
    with _damage_named(file):
        found = _all_divisions(file).get(f"links, {division}")
        if found is None:
            return None
        # A side that the topology lacks stays None, as `asdict` has written it.
        fabrics = {side: Fabric(**found["topology"][side]) for side in SIDES if found["topology"][side]}
        return Topology(**{**found["topology"], **fabrics}), Speed(**found["speed"])


def remember_links(file: Path, division: str, topology: Topology, speed: Speed) -> None:
    """Record what a probe measured for one division."""
    with _damage_named(file):
        kept = _all_divisions(file)
    kept[f"links, {division}"] = {"topology": asdict(topology), "speed": asdict(speed)}
    write_text(file, json.dumps(kept, indent=2) + "\n")


def _all_divisions(file: Path) -> dict[str, Any]:
    # division → its grids; "links, " + division → what a probe has measured for it
    return json.loads(file.read_text()) if file.exists() else {}


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """Raise ValueError where the file, or an entry of it, is not what a start has written."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file}: damaged: {error!r:.200}; remove it, and the next start chooses the grids again"
        ) from error
