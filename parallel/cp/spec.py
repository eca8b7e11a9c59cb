"""`AttentionSpec`: attention over a sequence that several ranks hold, with its plans and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...kernels.layout import SeqLayout
from ...kernels.mask import HostMasks, Mask, host_masks
from .compiled import CompiledPlan, compile_plan
from .grid import CpGrid
from .layout import position_layouts
from .plan import Pass, Tile
from .schedules import Schedule
from .visible import Visibility


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Attention over a sequence that several ranks hold: the values that all of these ranks have in common.

    Plans and masks are made once and kept here, for all layers and passes: keep the object as long as the documents of
    the sequence stay the same. `prepare` makes them ahead of the first pass, in any thread.
    """

    grid: CpGrid
    layouts: tuple[SeqLayout, ...]
    """Layout of each rank."""
    visibility: Visibility
    backend: str = "auto"
    """Attention kernels, as in `kernels.attention`."""
    narrow_results: bool = True
    """Send partial results in the dtype of the inputs; False: in fp32. Sums are fp32 in either case."""
    _compiled: dict[tuple[Pass, int], CompiledPlan] = field(default_factory=dict, repr=False)
    _prepared: dict[int, tuple[tuple[Tile, ...], HostMasks]] = field(default_factory=dict, repr=False)
    """Tiles of a rank, and their masks on the host."""
    _masks: dict[int, dict[Tile, Mask]] = field(default_factory=dict, repr=False)
    """Masks of a rank's tiles, on the device of its first inputs."""

    def schedule(self, direction: Pass) -> Schedule:
        """Return the schedule of a pass. Raises ValueError if there is not one layout for each rank."""
        return Schedule(self.grid, self.layouts, self.visibility, direction)

    def compiled(self, direction: Pass, rank: int) -> CompiledPlan:
        """Return the compiled plan of one rank; made once, then kept. Raises ValueError as `schedule` does."""
        if (direction, rank) not in self._compiled:
            forward, position = self.schedule("forward"), rank // self.grid.heads
            ranks = range(position * self.grid.heads, (position + 1) * self.grid.heads)
            layouts = {at: self.layouts[at] for at in ranks}
            for schedule in (forward, forward.turned("backward")):  # they share pieces and needed rows
                plan = compile_plan(schedule.plan(rank), schedule.layouts[position], layouts)
                self._compiled[schedule.direction, rank] = plan
        return self._compiled[direction, rank]

    def prepare(self, rank: int, *, pin_memory: bool = False) -> None:
        """Make all that the passes of a rank need on the host, masks in page-locked memory if `pin_memory`."""
        tiles = tuple(dict.fromkeys((*self.compiled("forward", rank).tiles, *self.compiled("backward", rank).tiles)))
        of_positions = position_layouts(self.layouts, self.grid.heads)
        sides = [sides_of(tile, of_positions) for tile in tiles]
        rules = {"causal": self.visibility.causal, "window": self.visibility.window}
        self._prepared[rank] = tiles, host_masks(sides, **rules, pin_memory=pin_memory)

    def masks(self, rank: int, device: torch.device) -> dict[Tile, Mask]:
        """Return the masks of a rank's tiles on a device; brought there once, then kept."""
        if rank not in self._masks:
            if rank not in self._prepared:
                self.prepare(rank)
            tiles, prepared = self._prepared.pop(rank)  # the masks on the host are not needed again
            self._masks[rank] = dict(zip(tiles, prepared.on(device), strict=True))
        return self._masks[rank]


def sides_of(tile: Tile, layouts: Sequence[SeqLayout]) -> tuple[SeqLayout, SeqLayout]:
    """Return the layouts of a tile's queries and keys; `layouts` has one layout for each grid position."""
    return layouts[tile.query_owner].part(tile.query_rows), layouts[tile.key_owner].part(tile.key_rows)
