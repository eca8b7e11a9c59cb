"""`SeqLayout`: which positions of the context a tensor's sequence dim holds. The one value all columns share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Relation = Literal["full", "causal", "none"]


@dataclass(frozen=True)
class SeqLayout:
    """Positions held by a sequence dim, as ascending half-open runs `[start, stop)`, in tokens.

    Plain integers, so that masks are decided on the host without a device synchronisation. RoPE and causal masks
    read positions from here; `arange(local_length)` would be wrong on every rank but the first.
    """

    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        previous_stop = 0
        for start, stop in self.runs:
            if not previous_stop <= start < stop:
                raise ValueError(f"layout: runs must ascend and be non-empty, got {self.runs}")
            previous_stop = stop

    @classmethod
    def contiguous(cls, num_tokens: int) -> SeqLayout:
        """The whole of a context of `num_tokens`, in order."""
        return cls(((0, num_tokens),))

    @property
    def num_tokens(self) -> int:
        """Length of the sequence dim."""
        return sum(stop - start for start, stop in self.runs)

    def positions(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Positions in the context, int64 `[num_tokens]`."""
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in self.runs])


def causal_relation(queries: SeqLayout, keys: SeqLayout) -> Relation:
    """How a causal mask by position falls on a tile: every pair, the lower triangle, or no pair.

    Raises ValueError for a tile that the mask cuts in any other way: schedules cut tiles along chunk edges.
    """
    if queries == keys:
        return "causal"
    if keys.runs[-1][1] <= queries.runs[0][0]:
        return "full"
    if queries.runs[-1][1] <= keys.runs[0][0]:
        return "none"
    raise ValueError(f"tile of queries {queries.runs} and keys {keys.runs} is neither full, diagonal nor empty")
