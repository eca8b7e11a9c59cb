"""`SeqLayout`: the positions of the context that a tensor's sequence dim holds. All other packages share this value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch


@lru_cache(maxsize=64)  # many layouts have the documents of one context
def _ascend_from_0(starts: tuple[int, ...]) -> bool:
    """Return whether starts ascend strictly from 0."""
    return starts[:1] == (0,) and all(a < b for a, b in pairwise(starts))


@dataclass(frozen=True)
class SeqLayout:
    """The positions that a sequence dim holds, as ascending half-open runs `[start, stop)`, and the document starts.

    Plain integers, so that masks are computed on the host without a device synchronization. RoPE and masks read
    positions from here; `arange(local_length)` would be wrong on every rank but the first. Raises ValueError for runs
    that are empty or do not ascend, and for starts that do not ascend strictly from 0.
    """

    runs: tuple[tuple[int, int], ...]
    """Half-open intervals of positions, in the order of the sequence dim."""

    document_starts: tuple[int, ...] = (0,)
    """The positions at which documents of the whole context begin, ascending from 0; not only those held here."""

    position_starts: tuple[int, ...] = (0,)
    """The positions at which RoPE counts from 0 again. Masks ignore them and use the positions in the context."""

    def __post_init__(self) -> None:
        previous_stop = 0
        for start, stop in self.runs:
            if not previous_stop <= start < stop:
                raise ValueError(
                    f"layout.runs = {self.runs}: must be non-empty intervals in ascending order; sort them, and "
                    "leave out empty ones"
                )
            previous_stop = stop
        for name, starts in (("document_starts", self.document_starts), ("position_starts", self.position_starts)):
            if not _ascend_from_0(starts):
                shown = f"{starts[:8]}{'...' * (len(starts) > 8)}"
                raise ValueError(f"layout.{name} = {shown}: must ascend strictly from 0; sort them, each once, with 0")

    @classmethod
    def contiguous(cls, num_tokens: int) -> SeqLayout:
        """Return the layout of a whole context of `num_tokens`, in order, with one document."""
        return cls(((0, num_tokens),))

    @classmethod
    def packed(cls, document_tokens: tuple[int, ...]) -> SeqLayout:
        """Return the layout of a whole context that holds documents of these lengths end to end."""
        *starts, num_tokens = accumulate(document_tokens, initial=0)
        return cls(((0, num_tokens),), tuple(starts))

    @property
    def num_tokens(self) -> int:
        """The length of the sequence dim."""
        return sum(stop - start for start, stop in self.runs)

    def positions(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Return the positions in the context, int64 `[num_tokens]`."""
        positions = torch.cat([torch.arange(start, stop) for start, stop in self.runs])
        # From page-locked memory, so that the host does not wait for the copy to a GPU.
        on_gpu = device is not None and torch.device(device).type == "cuda"
        return (positions.pin_memory() if on_gpu else positions).to(device, non_blocking=True)

    def rotary_positions(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Return the positions for RoPE, int64 `[num_tokens]`, each counted from the last position start before it."""
        positions = self.positions(device)
        if self.position_starts == (0,):
            return positions
        # From page-locked memory, so that the host does not wait for the copy to a GPU.
        on_gpu = positions.device.type == "cuda"
        starts = torch.tensor(self.position_starts, pin_memory=on_gpu).to(positions.device, non_blocking=True)
        # right=True: a position that is itself a start counts from itself.
        return positions - starts[torch.searchsorted(starts, positions, right=True) - 1]

    def row_of(self, position: int) -> int:
        """Return the index of a position in the sequence dim. Raises ValueError if the position is not held here."""
        row = 0  # tokens of the runs before this one
        for start, stop in self.runs:
            if start <= position < stop:
                return row + position - start
            row += stop - start
        raise ValueError(
            f"position = {position}: must lie in the layout's runs {self.runs}; ask the layout that holds it"
        )

    def part(self, rows: Sequence[tuple[int, int]]) -> SeqLayout:
        """Return the layout of some rows of the sequence dim, given as ascending half-open runs."""
        runs, row = [], 0  # row: tokens of the runs before this one
        for start, stop in self.runs:
            found = ((max(start, start + a - row), min(stop, start + b - row)) for a, b in rows)
            runs += [(first, last) for first, last in found if first < last]
            row += stop - start
        return SeqLayout(tuple(runs), self.document_starts, self.position_starts)
