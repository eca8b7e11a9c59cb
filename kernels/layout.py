"""`SeqLayout`: which positions of the context a tensor's sequence dim holds. The one value all columns share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch


@dataclass(frozen=True)
class SeqLayout:
    """Positions held by a sequence dim, as ascending half-open runs `[start, stop)`, and where documents begin.

    Plain integers, so that masks are decided on the host without a device synchronisation. RoPE and masks read
    positions from here; `arange(local_length)` would be wrong on every rank but the first.
    """

    runs: tuple[tuple[int, int], ...]
    document_starts: tuple[int, ...] = (0,)
    """Positions of the whole context, ascending from 0, at which a document begins; not only those held here."""

    position_starts: tuple[int, ...] = (0,)
    """Positions from which RoPE counts from 0 again; the causal mask goes by the context's own positions."""

    def __post_init__(self) -> None:
        previous_stop = 0
        for start, stop in self.runs:
            if not previous_stop <= start < stop:
                raise ValueError(f"layout: runs must ascend and be non-empty, got {self.runs}")
            previous_stop = stop
        for kind, starts in (("document", self.document_starts), ("position", self.position_starts)):
            if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
                shown = f"{starts[:8]}{'...' * (len(starts) > 8)}"
                raise ValueError(f"layout: {kind} starts must ascend from 0, got {shown}")

    @classmethod
    def contiguous(cls, num_tokens: int) -> SeqLayout:
        """The whole of a context of `num_tokens`, in order, one document."""
        return cls(((0, num_tokens),))

    @classmethod
    def packed(cls, document_tokens: tuple[int, ...]) -> SeqLayout:
        """The whole of a context of several documents of these lengths, end to end."""
        *starts, num_tokens = accumulate(document_tokens, initial=0)
        return cls(((0, num_tokens),), tuple(starts))

    @property
    def num_tokens(self) -> int:
        """Length of the sequence dim."""
        return sum(stop - start for start, stop in self.runs)

    def positions(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Positions in the context, int64 `[num_tokens]`."""
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in self.runs])

    def rotary_positions(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Positions that RoPE turns by, int64 `[num_tokens]`: those since the last of `position_starts`."""
        positions = self.positions(device)
        if self.position_starts == (0,):
            return positions
        starts = torch.tensor(self.position_starts, device=device)
        return positions - starts[torch.searchsorted(starts, positions, right=True) - 1]

    def row_of(self, position: int) -> int:
        """Index into the sequence dim of a position held here. Raises ValueError for one that is not."""
        row = 0
        for start, stop in self.runs:
            if start <= position < stop:
                return row + position - start
            row += stop - start
        raise ValueError(f"layout: position {position} is not in {self.runs}")

    def part(self, start_row: int, stop_row: int) -> SeqLayout:
        """The positions of a range of rows."""
        runs, row = [], 0
        for start, stop in self.runs:
            first, last = max(start, start + start_row - row), min(stop, start + stop_row - row)
            if first < last:
                runs.append((first, last))
            row += stop - start
        return SeqLayout(tuple(runs), self.document_starts, self.position_starts)
