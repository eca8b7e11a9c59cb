"""The mix of a run: the share of the trained tokens that each cell, a source in a bucket, has in every cycle.

`curriculum.shares` names the shares of sources, of buckets and of cells. The rest keeps its proportions: the shares are
those nearest to the natural ones, the cells' own tokens, in relative entropy. Iterative proportional fitting finds
them (Deming and Stephan 1940; Csiszar 1975): it scales the cells of each named source and bucket in turn, and all
cells, until every sum is right. Sums are exactly rounded (math.fsum), so all processors find the same shares.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum

from ..curriculum_config import CurriculumConfig, Share, cell_named
from ..format.bucket import Bucket

TOLERANCE = 1e-3
"""Largest error of a named share. Only shares that leave some cell next to nothing come near it: there the fitting
converges slowly."""
CONVERGED = 1e-13
SWEEPS = 2_000
"""Maximum number of rounds of the fitting; some 20 are usual."""
WEIGHT_SUM = 1 << 44
"""Sum of the integer weights of a mix. In the first 2^42 positions of a stream, far more than any run has, the rounding
of a weight adds up to less than half a sequence."""

Shares = tuple[tuple[float, ...], ...]
"""Shares of the trained tokens, [bucket][source]; they sum to 1."""
Cell = tuple[int, int]
"""Indices of a bucket and of a source."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Tokens of the data that a run uses, by bucket and source."""

    lengths: tuple[int, ...]
    """Lengths of the buckets in use, ascending."""
    sources: tuple[str, ...]
    """Names of the sources."""
    tokens: Shares | tuple[tuple[int, ...], ...]
    """Tokens of each cell, [bucket][source]."""

    @classmethod
    def of(cls, buckets: Sequence[Bucket]) -> "Cells":
        """Return the cells of these buckets. Raises ValueError if they have no sequences."""
        tokens = tuple(tuple(bucket.length * part.sequences for part in bucket.parts) for bucket in buckets)
        lengths = tuple(bucket.length for bucket in buckets)
        if not any(map(sum, tokens)):
            raise ValueError(
                f"curriculum.max_bucket_tokens = {max(lengths)}: the data has no training sequence of "
                f"{min(lengths)} to {max(lengths)} tokens; use other buckets, or prepare documents that fill these"
            )
        return cls(lengths=lengths, sources=tuple(part.source for part in buckets[0].parts), tokens=tokens)

    def named(self, name: str) -> list[Cell]:
        """Return the cells with tokens that a name of `curriculum.shares` stands for.

        Raises ValueError if the name is no source and no bucket in use, or if it has no sequences.
        """
        source, bucket = cell_named(name, self.sources, self.lengths)
        cells = [
            (b, s)
            for b, length in enumerate(self.lengths)
            for s, known in enumerate(self.sources)
            if self.tokens[b][s] and source in ("", known) and bucket in (0, length)
        ]
        if not cells:
            raise ValueError(
                f"curriculum.shares.{name}: has no training sequences; remove it, or prepare documents that fill it"
            )
        return cells


def cycle_shares(cells: Cells, config: CurriculumConfig, middles: Iterable[float]) -> list[Shares]:
    """Return the shares of each cycle; `middles` are the points of the run, in [0, 1], in the middle of each.

    Raises ValueError for a name that the data does not have, and as `fit` does.
    """
    found: dict[tuple[float, ...], Shares] = {}
    result = []
    for middle in middles:
        values = {name: share_at(share, middle) for name, share in config.shares.items()}
        key = tuple(values.values())
        if key not in found:  # cycles of equal shares are fitted once
            changes = not all(isinstance(share, int | float) for share in config.shares.values())
            found[key] = fit(cells, values, f" at progress {middle:.3g}" if changes else "")
        result.append(found[key])
    return result


def share_at(share: Share, progress: float) -> float:
    """Return a share at a point of the run; before its first and after its last point it is constant."""
    if isinstance(share, int | float):
        return share
    before = [point for point in share if point[0] <= progress]
    after = [point for point in share if point[0] > progress]
    if not before or not after:
        return (before[-1:] or after)[0][1]
    (start, first), (stop, last) = before[-1], after[0]
    return first + (last - first) * ((progress - start) / (stop - start))  # start <= progress < stop


def fit(cells: Cells, named: Mapping[str, float], where: str = "") -> Shares:
    """Return the shares nearest to the natural ones in which each name has its share.

    Raises ValueError if a name is unknown or has no sequences, if the shares sum to more than 1, or to less where
    nothing else is left, or if they contradict each other; `where` says at which point of the run.
    """
    groups = {name: cells.named(name) for name in named}
    # A name of a cell fixes its share; the fitting scales the free cells beside it.
    fixed = {group[0]: named[name] for name, group in groups.items() if "@" in name[1:]}
    every = {(b, s) for b, row in enumerate(cells.tokens) for s, tokens in enumerate(row) if tokens}
    for axis, kind in ((1, "sources"), (0, "buckets")):
        _check_sum(groups, named, every, axis, kind, where)
    total = sum(map(sum, cells.tokens))
    shares = {cell: cells.tokens[cell[0]][cell[1]] / total for cell in sorted(every - fixed.keys())}
    # Each constraint: the free cells of a name, and what they have to sum to beside the fixed ones; "" is all cells.
    constraints = [
        (name, [cell for cell in group if cell in shares], value - fsum(fixed.get(cell, 0.0) for cell in group))
        for (name, value), group in zip([*named.items(), ("", 1.0)], [*groups.values(), sorted(every)], strict=True)
        if "@" not in name[1:]
    ]
    # Each scaling makes one sum right and may disturb those before; `worst` is the largest error of a sweep.
    for _ in range(SWEEPS):
        worst = 0.0
        for _, group, target in constraints:
            found = fsum(shares[cell] for cell in group)
            worst = max(worst, abs(found - target))
            # Fixed cells alone may exceed a share: the target is then negative, and _check_fitted raises.
            scale = max(0.0, target) / found if found else 0.0
            for cell in group:
                shares[cell] *= scale
        if worst < CONVERGED:
            break
    _check_fitted(constraints, shares, named, where)
    shares.update(fixed)
    whole = fsum(shares.values())
    return tuple(
        tuple(shares.get((b, s), 0.0) / whole for s in range(len(cells.sources))) for b in range(len(cells.lengths))
    )


def _check_sum(
    groups: Mapping[str, list[Cell]], named: Mapping[str, float], every: set[Cell], axis: int, kind: str, where: str
) -> None:
    """Raise ValueError if the named shares along an axis, with the cells beside them, do not fit into 1."""
    # Names along the axis, and those of cells that none of these names covers.
    lines = {name for name in groups if ("@" not in name if axis else name.startswith("@"))}
    covered = {cell for name in lines for cell in groups[name]}
    counted = lines | {name for name, group in groups.items() if "@" in name[1:] and group[0] not in covered}
    covered |= {cell for name in counted for cell in groups[name]}
    total = fsum(named[name] for name in counted)
    text = f"curriculum.shares = {{{', '.join(f'{name} = {named[name]:.6g}' for name in named if name in counted)}}}"
    if total > 1 + TOLERANCE:
        raise ValueError(f"{text}: these shares of {kind} sum to {total:.6g}{where}; lower them to at most 1 in all")
    if covered == every and total < 1 - TOLERANCE:
        raise ValueError(
            f"{text}: these shares of {kind} sum to {total:.6g}{where}, and no other tokens are left to fill the "
            "rest; raise them to 1 in all, or leave one out"
        )


def _check_fitted(
    constraints: Sequence[tuple[str, list[Cell], float]],
    shares: Mapping[Cell, float],
    named: Mapping[str, float],
    where: str,
) -> None:
    """Raise ValueError, naming the share that is furthest from what it should be, if any is too far."""
    errors = [(abs(fsum(shares[cell] for cell in group) - target), name) for name, group, target in constraints]
    error, name = max(errors)
    if error > TOLERANCE:
        name = name or next(iter(named))
        others = ", ".join(other for other in named if other != name)
        raise ValueError(
            f"curriculum.shares.{name} = {named[name]:.6g}: cannot hold{where} together with the shares of {others}, "
            "for want of sequences outside of them; remove it, or change the others"
        )


def integer_weights(shares: Sequence[float]) -> tuple[int, ...]:
    """Return integers in proportion to `shares` that sum to WEIGHT_SUM; the largest share takes the rounding."""
    total = fsum(shares)
    weights = [round(share / total * WEIGHT_SUM) for share in shares]
    weights[weights.index(max(weights))] += WEIGHT_SUM - sum(weights)
    return tuple(weights)
