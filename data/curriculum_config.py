"""Settings of the curriculum: how much a run trains of which length and source, and in which order of lengths.

The classes are frozen. Making one raises ValueError if a number is outside its range, or if settings do not fit each
other. The methods fit them to the buckets of data and to the size of a batch.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Interval

from .config import Fraction
from .ranges import check_ranges

Odds = Literal["uniform", "natural", "grow_linear", "grow_p2", "grow_p100", "shrink_p100"]
Draw = Literal["odds_times_left", "odds_times_batches", "odds"]
Mix = Literal["step", "micro_batch"]
Share = Fraction | tuple[tuple[Fraction, Fraction], ...]
"""A share of the trained tokens, or points [progress of the run, share] between which it goes in straight lines."""


@dataclass(frozen=True, kw_only=True)
class RenewalConfig:
    """Shares of the sources that follow their held-out losses, by the online rule of Skill-it (arXiv 2307.14430).

    After every cycle but the last, the losses are measured, and the next cycle has the shares that `curriculum.shares`
    and the data give it, with those of source i times exp(rate x sum over sources j of `graph[i][j]` x S_j). S_j is the
    sum of the last `window` losses of source j; before the first measurement it is 1.
    """

    rate: Annotated[float, Interval(ge=0, le=100)] = 0.0
    """Learning rate of the shares, eta of the paper, which has 0.1 to 0.5. 0: shares do not follow the losses."""
    window: Annotated[int, Interval(ge=1, le=1000)] = 3
    """Number of most recent measurements that are summed."""
    held_out_tokens: Annotated[int, Interval(ge=1, le=2**40)] = 2**18
    """Maximum number of held-out tokens of each source that a measurement reads."""
    graph: dict[str, dict[str, Fraction]] = field(default_factory=dict)
    """Skills graph: graph.books.code is how much training on books helps on code. Where nothing is named it is 1 from a
    source to itself, and 0 to another."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def check_sources(self, sources: Sequence[str]) -> None:
        """Raise ValueError unless the shares of `sources` can be renewed: several, with all that the graph names."""
        if not self.rate:
            return
        named = ", ".join(sources)
        if len(sources) < 2:
            raise ValueError(
                f"curriculum.renewal.rate = {self.rate}: shares of sources follow their losses, and the data has one "
                f"source to train, {named}; set it to 0, or prepare documents of several data.sources"
            )
        for name in sorted({*self.graph, *(name for row in self.graph.values() for name in row)} - {*sources}):
            raise ValueError(
                f"curriculum.renewal.graph: the data has no source {name!r} to train; its sources are {named}: rename "
                "or remove it"
            )


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Order in which sequence lengths are trained on (Dataset Decomposition, arXiv 2405.13226, section 3)."""

    odds: Odds | tuple[Annotated[float, Interval(ge=1e-60, le=1e60)], ...] = "grow_p2"
    """Odds of the n buckets, shortest first: a name, or n numbers. uniform and natural: 1, ..., 1. grow_linear: n,
    ..., 1. grow_p2: 2^(n-1), ..., 1. grow_p100: 100^(n-1), ..., 1. shrink_p100: 1, ..., 100^(n-1)."""

    draw: Draw = "odds_times_batches"
    """Chance of a bucket as long as it has batches left in the cycle. odds_times_batches: its odds times the batches it
    has in the whole cycle, as the paper's released code does; for buckets of one size this is its Algorithm 1. odds:
    its odds alone, as Algorithm 1 says. odds_times_left: its odds times the batches it has left, so that under equal
    odds buckets of unequal size end together. The odds "natural" are a plain shuffle under each of the three."""

    cycles: Annotated[int, Interval(ge=1, le=100_000)] = 8
    """Number of times the run goes through the curriculum. A run too short for them has fewer (`num_cycles`): at most
    one a step, and at most one for every n slots, n the number of buckets in use."""

    mix: Mix = "step"
    """Lengths in a step. step: one bucket, as in the paper. micro_batch: every slot of curriculum.slot_tokens has a
    bucket of its own, and the slots of a few steps have the buckets' shares as exactly as whole slots can."""

    slot_tokens: Annotated[int, Interval(ge=0, le=2**50)] = 0
    """Tokens of one slot of mix "micro_batch": a multiple of the longest bucket in use and of the tokens that all ranks
    hold at once, and a divisor of train.global_batch_tokens. 0: the longest bucket in use."""

    min_bucket_tokens: Annotated[int, Interval(ge=0, le=2**30)] = 0
    """Length of the shortest sequences that the run uses, in tokens. 0: that of the data."""

    max_bucket_tokens: Annotated[int, Interval(ge=0, le=2**30)] = 0
    """Length of the longest sequences that the run uses, in tokens. 0: that of the data."""

    shares: dict[str, Share] = field(default_factory=dict)
    """Shares of the trained tokens by name: "books" is a source, "@65536" a bucket, "books@65536" the sequences of a
    source in a bucket. A share is a number, or a list of points [progress, share] that are joined by straight lines,
    with progress from 0 to 1 over the run; it holds for a cycle at a time, as it is at the middle of the cycle. What
    has no name here keeps its proportions to the rest, those of its tokens."""

    renewal: RenewalConfig = field(default_factory=RenewalConfig)

    @staticmethod
    def translated(tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return settings in today's terms: earlier recipes have `weights`, which are empty where none are named.

        Raises ValueError if they name any.
        """
        if tree.get("weights"):
            raise ValueError(
                f"curriculum.weights = {tree['weights']!s:.200}: a setting of earlier versions; name the sources' "
                "shares of the trained tokens in curriculum.shares"
            )
        return {key: value for key, value in tree.items() if key != "weights"}

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.odds:
            raise ValueError("curriculum.odds = []: must not be empty; give one number for each bucket, shortest first")
        if 0 < self.max_bucket_tokens < self.min_bucket_tokens:
            raise ValueError(
                f"curriculum.min_bucket_tokens = {self.min_bucket_tokens}: exceeds curriculum.max_bucket_tokens = "
                f"{self.max_bucket_tokens}; lower the first or raise the second"
            )
        if self.slot_tokens and self.mix == "step":
            raise ValueError(
                f"curriculum.slot_tokens = {self.slot_tokens}: curriculum.mix = 'step' has one slot in a step; set it "
                "to 0, or set curriculum.mix = 'micro_batch'"
            )
        if self.renewal.rate and self.cycles < 2:
            raise ValueError(
                f"curriculum.renewal.rate = {self.renewal.rate}: shares are renewed between two cycles, and "
                f"curriculum.cycles = {self.cycles}; raise that to at least 2, or set the rate to 0"
            )
        for name, share in self.shares.items():
            points = [] if isinstance(share, int | float) else [progress for progress, _ in share]
            if not isinstance(share, int | float) and (not points or points != sorted(points)):
                raise ValueError(
                    f"curriculum.shares.{name} = {[list(point) for point in share]}: must be points [progress, share] "
                    "of ascending progress; sort them"
                )

    def lengths_in_use(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Return those of the data's bucket `lengths` that the run uses, ascending. Raises ValueError if none is."""
        least, most = self.min_bucket_tokens, self.max_bucket_tokens or max(lengths)
        found = tuple(sorted(length for length in lengths if least <= length <= most))
        if not found:
            # The key at fault: a maximum below all buckets, else a minimum above all that the maximum leaves.
            key = "max" if self.max_bucket_tokens and self.max_bucket_tokens < min(lengths) else "min"
            nearest = min(lengths) if key == "max" else max(length for length in lengths if length <= most)
            raise ValueError(
                f"curriculum.{key}_bucket_tokens = {getattr(self, f'{key}_bucket_tokens')}: leaves none of the data's "
                f"buckets, {', '.join(map(str, sorted(lengths)))} tokens; set it to {nearest}"
            )
        return found

    def tokens_of_slot(self, lengths: Sequence[int], global_batch_tokens: int) -> int:
        """Return the tokens of one slot for buckets of `lengths` in use: sequences of one bucket.

        Raises ValueError unless a slot holds whole sequences of every bucket, and a global batch whole slots.
        """
        longest = max(lengths)
        if global_batch_tokens < 1 or global_batch_tokens % longest:
            raise ValueError(
                f"train.global_batch_tokens = {global_batch_tokens}: must be a positive multiple of the longest bucket "
                f"in use, {longest} tokens; set it to {max(1, -(-global_batch_tokens // longest)) * longest}"
            )
        if self.mix == "step":
            return global_batch_tokens
        slot = self.slot_tokens or longest
        if slot % longest or global_batch_tokens % slot:
            raise ValueError(
                f"curriculum.slot_tokens = {slot}: must be a multiple of the longest bucket in use, {longest} tokens, "
                f"that divides train.global_batch_tokens = {global_batch_tokens}; set it to "
                f"{next_divisor(global_batch_tokens, longest, slot)}"
            )
        return slot

    def check_names(self, sources: Sequence[str], lengths: Sequence[int]) -> None:
        """Raise ValueError, as `cell_named` does, if a share names no source of these and no bucket in use.

        Raises ValueError also if the shares of these sources cannot be renewed.
        """
        for name in self.shares:
            cell_named(name, sources, lengths)
        self.renewal.check_sources(sources)

    def num_cycles(self, num_buckets: int, steps: int, slots_per_step: int) -> int:
        """Return the number of cycles of a run: at most one a step, and at most one for every `num_buckets` slots.

        A run of fewer slots is one cycle. In others, with one slot a step, every cycle has `num_buckets` slots or more.
        With several, a cycle, which is whole steps, may have fewer: 3 steps of 2 slots are 2 cycles for 3 buckets, and
        the first has 2 slots.
        """
        return max(1, min(self.cycles, steps, steps * slots_per_step // num_buckets))


def cell_named(name: str, sources: Sequence[str], lengths: Sequence[int]) -> tuple[str, int]:
    """Return the source and the bucket that a name of `curriculum.shares` stands for; "" is any source, 0 any bucket.

    Raises ValueError, with the name that is closest, unless they are among `sources` and the buckets `lengths` in use.
    """
    source, at, bucket = name.partition("@")
    key = f"curriculum.shares.{name}"
    if (source or not at) and source not in sources:  # "@65536" is a bucket of all sources
        close = difflib.get_close_matches(source, sources, n=1, cutoff=0.0)
        raise ValueError(
            f"{key}: the data has no source {source!r}; its sources are {', '.join(sources)}: did you mean "
            f"{close[0]}{at}{bucket}?"
        )
    if not at:
        return source, 0
    if bucket not in map(str, lengths):
        size = int(bucket) if bucket.isascii() and bucket.isdigit() else 0  # isdigit takes "²", and int does not
        close_to = min(lengths, key=lambda length: abs(length - size))
        raise ValueError(
            f"{key}: {bucket!r} is not a bucket in use; they are {', '.join(map(str, lengths))}: did you mean "
            f"{source}@{close_to}?"
        )
    return source, int(bucket)


def next_divisor(number: int, multiple: int, least: int) -> int:
    """Return the smallest divisor of `number` of at least `least` that is a multiple of `multiple`, or `number`."""
    times = number // multiple
    # Divisors up to 2^16 and the quotients by them: all of them if `times` is at most 2^32.
    small = [count for count in range(1, min(times, 2**16) + 1) if times % count == 0]
    counts = sorted({*small, *(times // count for count in small)})
    return next((multiple * count for count in counts if multiple * count >= least), number)
