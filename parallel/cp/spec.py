"""`AttentionSpec`: attention over a sequence that several ranks hold, with its plans and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...kernels.layout import SeqLayout
from ...kernels.mask import HostMasks, Mask, host_masks
from .compiled import CompiledPlan, compile_plan
from .grid import CpGrid
from .plan import Pass, RankPlan, Tile
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
    _made: dict[tuple[Pass, int], tuple[Schedule, RankPlan]] = field(default_factory=dict, repr=False)
    _compiled: dict[tuple[Pass, int], CompiledPlan] = field(default_factory=dict, repr=False)
    _prepared: dict[int, tuple[tuple[Tile, ...], HostMasks]] = field(default_factory=dict, repr=False)
    """Tiles of a rank, and their masks on the host."""
    _masks: dict[int, dict[Tile, Mask]] = field(default_factory=dict, repr=False)
    """Masks of a rank's tiles, on the device of its first inputs."""

    def plan(self, direction: Pass, rank: int) -> tuple[Schedule, RankPlan]:
        """Return the schedule of a pass and the plan of one rank; made once, then kept.

        Raises ValueError if there is not one layout for each rank.
        """
        if (direction, rank) not in self._made:
            schedule = Schedule(self.grid, self.layouts, self.visibility, direction)
            self._made[direction, rank] = (schedule, schedule.plan(rank))
        return self._made[direction, rank]

    def compiled(self, direction: Pass, rank: int) -> CompiledPlan:
        """Return the compiled plan of one rank; made once, then kept. Raises ValueError as `plan` does."""
        if (direction, rank) not in self._compiled:
            schedule, plan = self.plan(direction, rank)
            first = plan.position * self.grid.heads
            ranks = {at: schedule.rank_layouts[at] for at in range(first, first + self.grid.heads)}
            self._compiled[direction, rank] = compile_plan(plan, schedule.layouts[plan.position], ranks)
        return self._compiled[direction, rank]

    def prepare(self, rank: int, *, pin_memory: bool = False) -> None:
        """Make all that the passes of a rank need on the host, masks in page-locked memory if `pin_memory`."""
        tiles = tuple(dict.fromkeys((*self.compiled("forward", rank).tiles, *self.compiled("backward", rank).tiles)))
        sides = [sides_of(tile, self.plan("forward", rank)[0].layouts) for tile in tiles]
        rules = {"causal": self.visibility.causal, "window": self.visibility.window}
        self._prepared[rank] = tiles, host_masks(sides, **rules, pin_memory=pin_memory)

    def masks(self, rank: int, device: torch.device) -> dict[Tile, Mask]:
        """Return the masks of a rank's tiles on a device; brought there once, then kept."""
        if rank not in self._masks:
            if rank not in self._prepared:
                self.prepare(rank)
            tiles, prepared = self._prepared.pop(rank)
            self._masks[rank] = dict(zip(tiles, prepared.on(device), strict=True))
        return self._masks[rank]


def sides_of(tile: Tile, layouts: Sequence[SeqLayout]) -> tuple[SeqLayout, SeqLayout]:
    """Return the layouts of a tile's queries and keys; `layouts` has one layout for each grid position."""
    return layouts[tile.query_owner].part(*tile.query_rows), layouts[tile.key_owner].part(*tile.key_rows)
