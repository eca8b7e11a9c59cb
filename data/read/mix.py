"""The mix of a run, cycle by cycle, and the order of training that follows from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ..config import LoaderConfig
from ..curriculum_config import CurriculumConfig
from ..format.bucket import Bucket, Part
from ..format.manifest import Manifest
from ..format.shards import SHARD_DTYPE
from .batch_order import BatchOrder
from .bucket_order import BucketOrder, Knot, source_parts
from .curriculum import cycle_begins, divide_slots, draw_slots
from .renewal import Renewal, check_renewals, renewed, trained_sources
from .shares import Cells, Shares, cycle_shares, integer_weights


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The shares that a run trains of each cell, cycle by cycle."""

    cells: Cells
    """Tokens of the data."""
    begins: tuple[int, ...]
    """Number of steps before each cycle, and of all steps at the end, [cycles + 1]."""
    shares: tuple[Shares, ...]
    """Shares of the trained tokens, [cycles][buckets][sources]."""


def buckets_in_use(manifest: Manifest, curriculum: CurriculumConfig) -> tuple[Bucket, ...]:
    """Return the buckets of the train split that a run uses, shortest first. Raises ValueError if there is none."""
    lengths = curriculum.lengths_in_use(manifest.lengths)
    return tuple(bucket for bucket in manifest.buckets("train") if bucket.length in lengths)


def plan_mix(buckets: Sequence[Bucket], curriculum: CurriculumConfig, steps: int, slots_per_step: int) -> Mix:
    """Return the mix of a run of `steps` steps over these buckets, as the recipe has it.

    Raises ValueError if the shares do not fit the data or each other.
    """
    cells = Cells.of(buckets)
    begins = cycle_begins(steps, curriculum.num_cycles(len(buckets), steps, slots_per_step))
    middles = [(first + last) / 2 / steps for first, last in pairwise(begins)]  # [cycles], in [0, 1]
    shares = cycle_shares(cells, curriculum, middles)
    return Mix(cells=cells, begins=tuple(begins), shares=tuple(shares))


def renew(mix: Mix, curriculum: CurriculumConfig, renewals: Sequence[Renewal]) -> Mix:
    """Return a mix of the recipe's shares in which those of each cycle follow the losses measured before it.

    A renewal counts if it was measured where a cycle ends, for the sources of this mix. Until the next one, it holds.
    """
    # Nothing follows the last cycle, so its end is not among these.
    ends, sources = set(mix.begins[1:-1]), set(trained_sources(mix.cells))
    counted = [renewal for renewal in renewals if renewal.step in ends and renewal.losses.keys() >= sources]
    counted.sort(key=lambda renewal: renewal.step)
    shares = (
        renewed(of_cycle, mix.cells, curriculum, [renewal for renewal in counted if renewal.step <= begin])
        for begin, of_cycle in zip(mix.begins, mix.shares, strict=False)
    )
    return replace(mix, shares=tuple(shares))


def training_order(
    manifest: Manifest,
    curriculum: CurriculumConfig,
    loader: LoaderConfig,
    *,
    steps: int,
    global_batch_tokens: int,
    seed: int,
    renewals: Sequence[Renewal] = (),
) -> BatchOrder:
    """Return the order of a run of `steps` steps, a function of these arguments alone.

    Raises ValueError if the curriculum or the global batch does not fit the data.
    """
    buckets = buckets_in_use(manifest, curriculum)
    slot_tokens = curriculum.tokens_of_slot([bucket.length for bucket in buckets], global_batch_tokens)
    mix = plan_mix(buckets, curriculum, steps, global_batch_tokens // slot_tokens)
    if curriculum.renewal.rate:
        check_renewals(manifest, mix.cells, curriculum.renewal, len(mix.shares))
        mix = renew(mix, curriculum, renewals)
    return order_of_mix(mix, buckets, curriculum, loader, global_batch_tokens // slot_tokens, slot_tokens, seed)


def bucket_order(
    sequences: Mapping[int, int | Mapping[str, int]],
    *,
    steps: int,
    global_batch_tokens: int,
    curriculum: CurriculumConfig | None = None,
    seed: int = 0,
) -> BatchOrder:
    """Return the order in which a run of `steps` steps reads sequences that are stored anywhere.

    `sequences` has the number of sequences by their length in tokens, or the number by source for each length; a bucket
    numbers its sequences from 0, source after source. The order says which of them each step trains on, as
    `BatchOrder.batch` and `sequences` give them. It is a function of these arguments alone. `curriculum` (None: the
    defaults) says how much is trained at which length and when. Raises ValueError for a run of no steps, if there are
    no sequences or a negative number of them, if the curriculum or the global batch does not fit them, if a length does
    not divide the longest, if the seed is negative, or if the curriculum renews its shares.
    """
    curriculum = curriculum or CurriculumConfig()
    if curriculum.renewal.rate:
        raise ValueError(
            f"curriculum.renewal.rate = {curriculum.renewal.rate}: shares follow losses in a run of `longring train` "
            "alone; set it to 0"
        )
    if steps < 1:
        raise ValueError(f"steps = {steps}: a run has at least one step; give the number of steps of the run")
    if seed < 0:
        raise ValueError(f"seed = {seed}: must be at least 0; give another whole number")
    if not sequences:
        raise ValueError("sequences = {}: there is nothing to order; give the number of sequences of each length")
    # length → source → sequences
    counts = {length: of if isinstance(of, Mapping) else {"all": of} for length, of in sequences.items()}
    for length, of in counts.items():
        if min(of.values(), default=0) < 0:
            raise ValueError(
                f"sequences[{length}] = {sequences[length]}: must be at least 0; give the number of sequences that "
                "there are"
            )
    used = curriculum.lengths_in_use([*sequences])
    unfit = [length for length in used if length < 1 or used[-1] % length]
    if unfit:
        raise ValueError(
            f"sequences[{unfit[0]}]: every length must divide the longest, {used[-1]}; leave this length out"
        )
    sources = dict.fromkeys(source for length in used for source in counts[length])
    buckets = [_bucket(length, {source: counts[length].get(source, 0) for source in sources}) for length in used]
    slot_tokens = curriculum.tokens_of_slot(used, global_batch_tokens)
    slots = global_batch_tokens // slot_tokens
    mix = plan_mix(buckets, curriculum, steps, slots)
    return order_of_mix(mix, buckets, curriculum, LoaderConfig(window_tokens=0), slots, slot_tokens, seed)


def _bucket(length: int, by_source: Mapping[str, int]) -> Bucket:
    """Return a bucket of sequences that no shard of ours holds; each source counts as one shard."""
    shards = np.zeros(len(by_source), dtype=SHARD_DTYPE)
    shards["sequences"] = [*by_source.values()]
    parts = [
        Part(source=source, first_shard=number, num_shards=1, sequences=count)
        for number, (source, count) in enumerate(by_source.items())
    ]
    return Bucket(length=length, shards=shards, parts=tuple(parts))


def order_of_mix(
    mix: Mix,
    buckets: Sequence[Bucket],
    curriculum: CurriculumConfig,
    loader: LoaderConfig,
    slots_per_step: int,
    slot_tokens: int,
    seed: int,
) -> BatchOrder:
    """Return the order of a run with a mix; what its steps train on depends on their cycle and those before alone."""
    lengths = mix.cells.lengths
    by_bucket = [integer_weights([sum(bucket) for bucket in shares]) for shares in mix.shares]  # [cycles][buckets]
    counts = divide_slots([slots_per_step * (last - first) for first, last in pairwise(mix.begins)], by_bucket)
    slots = draw_slots(counts, lengths, curriculum, seed).reshape(-1, slots_per_step)  # [steps, slots of a step]
    orders = []
    for index, bucket in enumerate(buckets):
        # The weights of a cycle hold from the first position that its slots take.
        taken = np.cumsum([0, *(count[index] for count in counts)]) * (slot_tokens // bucket.length)
        knots = [
            Knot(position, integer_weights(shares[index]))
            for position, shares in zip(taken.tolist(), mix.shares, strict=False)
            if any(shares[index])  # else nothing to weigh: the mix before holds on
        ]
        orders.append(BucketOrder(source_parts(bucket, loader.window_tokens), knots, (seed, bucket.length)))
    return BatchOrder(lengths, orders, slots, slot_tokens)
