"""Losses and most likely tokens of rows, summed by part of a row or collected by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ...parallel.mesh import Mesh
from ...parallel.zero import DeepSpeedEngine
from ..build import BucketLayout
from ..together import on_all_ranks


class Row(NamedTuple):
    """One row of tokens that a model reads."""

    tokens: NDArray[np.int64]
    """Tokens `[length + 1]`; inputs are `[:-1]`, targets `[1:]`."""
    parts: NDArray[np.uint8]
    """Part of each target, `[length]`, from 0 on; part 0 is not summed."""
    starts: tuple[int, ...] = (0,)
    """Positions at which visibility starts anew: nothing before one is visible from it on. Ascending from 0."""
    accepted: NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)
    """Tokens that are as right as the target, int64 `[n, 2]` = (target's position, token)."""


class Forward(NamedTuple):
    """This rank's part of a micro-batch."""

    numbers: NDArray[np.int64]
    """Numbers of the rows, `[b]`; the number of all rows stands for none."""
    rows: list[Row]
    losses: Tensor
    """Loss of each target held here, fp64 `[b, s]`."""
    right: Tensor
    """Whether the target, or a token accepted in its stead, is the most likely one: bool `[b, s]`."""
    positions: Tensor
    """Positions held here, `[s]`."""


@dataclass(frozen=True)
class Scorer:
    """Scores of rows of one length, one rank's part; all ranks call its methods in the same order."""

    engine: DeepSpeedEngine
    mesh: Mesh
    layout: BucketLayout
    at: Callable[[str], None]
    """Records that an operation begins."""

    @cached_property
    def _masked(self) -> BucketLayout:
        """The layout under which `Row.starts` are masked, and positions count from the start of the row."""
        return replace(self.layout, document_masks=True, position_resets=False)

    def sums(self, num_rows: int, num_parts: int, row: Callable[[int], Row]) -> NDArray[np.float64]:
        """Return sums by part, fp64 `[num_rows, num_parts, 3]` = (loss, right tokens, tokens). Collective.

        `row` makes a row from its number, for the rows of this rank's replica alone; a ValueError that it raises is
        raised on every rank. A token is right if it, or one that is accepted for it, is the most likely one.
        """
        # Row `num_rows` takes the scores of the rows that fill up the last micro-batch, and is cut off below.
        found = torch.zeros(num_rows + 1, num_parts, 3, dtype=torch.float64, device=self.mesh.device)
        for forward in self._forwards(num_rows, row):
            numbers = torch.from_numpy(forward.numbers).to(found.device)[:, None]  # [b, 1]
            parts = torch.from_numpy(np.stack([one.parts for one in forward.rows])).to(found.device).long()
            parts = parts[:, forward.positions]  # [b, s]
            values = torch.stack([forward.losses, forward.right.double(), torch.ones_like(forward.losses)], -1)
            index = (numbers * num_parts + parts).flatten()  # [b s], among the rows of `found.view(-1, 3)`
            found.view(-1, 3).index_add_(0, index, values.flatten(0, 1))
        self.at("summing scores over the ranks")
        # The ranks of a tensor-parallel group have equal sums, so they are not added.
        dist.all_reduce(found, group=self.mesh.data_group)
        return found[:num_rows].cpu().numpy()

    def losses(self, num_rows: int, row: Callable[[int], Row]) -> Iterator[NDArray[np.float64]]:
        """Yield the losses `[length]` of each row in order, on all ranks. Collective.

        The losses of a micro-batch of all replicas are collected at once: 8 bytes a token on every rank.
        """
        layout, device = self.layout, self.mesh.device
        at_once, first = (
            layout.num_replicas * layout.sequences_per_replica,
            layout.replica * layout.sequences_per_replica,
        )
        left = num_rows  # rows not yielded yet; the rows that fill up the last micro-batch come after them
        for forward in self._forwards(num_rows, row):
            found = torch.zeros(at_once, layout.length, dtype=torch.float64, device=device)
            mine = torch.arange(first, first + layout.sequences_per_replica, device=device)
            found[mine[:, None], forward.positions] = forward.losses
            # One rank has each element, all others have 0 there: the sum collects them.
            dist.all_reduce(found, group=self.mesh.data_group)
            yield from found[:left].cpu().numpy()
            left -= at_once

    def _forwards(self, num_rows: int, row: Callable[[int], Row]) -> Iterator[Forward]:
        """Yield this rank's part of each micro-batch of the rows."""
        layout, device = self.layout, self.mesh.device
        for first in range(0, num_rows, layout.num_replicas * layout.sequences_per_replica):
            self.at(f"scoring row {first} of {num_rows} of length {layout.length}, and those after it")
            numbers = first + layout.replica * layout.sequences_per_replica + np.arange(layout.sequences_per_replica)
            # The last micro-batch is filled up with the last row, which then counts for row `num_rows`: no row.
            chosen = np.minimum(numbers, num_rows - 1).tolist()
            rows = on_all_ranks(self.mesh, lambda chosen=chosen: [row(number) for number in chosen])
            starts = [one.starts for one in rows] if any(one.starts != (0,) for one in rows) else None
            inputs = self._masked.model_inputs(np.stack([one.tokens for one in rows]).astype(np.uint32), starts, device)
            greedy = torch.empty_like(inputs[1])
            with torch.no_grad():
                losses = self.engine(*inputs, greedy=greedy)
            # Packed rows come back as one sequence of b = 1: [1, b s] -> [b, s].
            targets, losses, greedy = (found.view(len(rows), -1) for found in (inputs[1], losses.double(), greedy))
            positions = layout.positions(inputs[2], device)
            right = _right(rows, targets, greedy, positions, layout.length)
            yield Forward(np.minimum(numbers, num_rows), rows, losses, right, positions)


def _right(rows: Sequence[Row], targets: Tensor, greedy: Tensor, positions: Tensor, length: int) -> Tensor:
    """Return whether the most likely token is the target, or accepted in its stead: bool `[b, s]`."""
    right = greedy == targets
    held = torch.full((length,), -1, device=positions.device)  # index of each position among those held here, or -1
    held[positions] = torch.arange(len(positions), device=positions.device)
    for row, found, best in zip(rows, right, greedy, strict=True):
        if len(row.accepted):
            at, tokens = torch.from_numpy(row.accepted).to(held.device).unbind(1)  # [n] each
            here = held[at] >= 0  # other ranks of the ring hold the other positions
            at, tokens = held[at][here], tokens[here]
            found[at[best[at] == tokens]] = True
    return right
