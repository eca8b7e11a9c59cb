"""Rows: the part of a share that a message carries or a tile reads, as runs of row numbers."""

from __future__ import annotations

Rows = tuple[tuple[int, int], ...]
"""Ascending half-open runs of rows: indices into the sequence dim of one share. No two touch."""


def num_rows(rows: Rows) -> int:
    """Return the number of rows."""
    return sum(stop - start for start, stop in rows)


def within(rows: Rows, start: int, stop: int) -> Rows:
    """Return those of `rows` that lie in [start, stop)."""
    return tuple((max(a, start), min(b, stop)) for a, b in rows if max(a, start) < min(b, stop))


def packed(held: Rows, rows: Rows) -> Rows:
    """Return the positions of `rows` in a tensor that has the rows `held` end to end; all of them must be held."""
    found: list[tuple[int, int]] = []
    at = 0  # rows of the runs before this one
    for first, last in held:
        for start, stop in within(rows, first, last):
            run = at + start - first, at + stop - first
            found[-1:] = [(found[-1][0], run[1])] if found and found[-1][1] == run[0] else [*found[-1:], run]
        at += last - first
    assert num_rows(tuple(found)) == num_rows(rows), f"rows {rows} are not all among {held}"
    return tuple(found)
