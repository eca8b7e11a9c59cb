"""The order of a run: any division and any restart reads the same batches, which hold the shares of their cycle."""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.config import LoaderConfig
from longring.data.curriculum_config import CurriculumConfig, RenewalConfig
from longring.data.format.bucket import Bucket, Part
from longring.data.format.shards import SHARD_DTYPE
from longring.data.read.batch_order import ORDER, STRIDE, BatchOrder, ReplicaShare
from longring.data.read.mix import Mix, bucket_order, order_of_mix, plan_mix

LENGTHS, STEPS = (8, 16, 32), 60
SHARDS = {"web": ([3, 3, 4], [3, 4], [5]), "books": ([], [2], [6, 5]), "code": ([9], [], [1])}
"""Sequences in the shards of each source, by bucket."""


def buckets(shards: Mapping[str, tuple[list[int], ...]] = SHARDS) -> tuple[Bucket, ...]:
    """Return buckets of LENGTHS; `shards` are the numbers of sequences in the shards of each source and bucket."""
    return tuple(
        bucket(length, {name: of[index] for name, of in shards.items()}) for index, length in enumerate(LENGTHS)
    )


def bucket(length: int, shards: dict[str, list[int]]) -> Bucket:
    """Return a bucket; `shards` are the numbers of sequences in each source's shards."""
    table = np.zeros(sum(map(len, shards.values())), dtype=SHARD_DTYPE)
    table["sequences"] = [count for counts in shards.values() for count in counts]
    parts, first = [], 0
    for name, counts in shards.items():
        parts.append(Part(source=name, first_shard=first, num_shards=len(counts), sequences=sum(counts)))
        first += len(counts)
    return Bucket(length=length, shards=table, parts=tuple(parts))


def planned(
    seed: int = 0,
    batch: int = 256,
    window: int = 0,
    steps: int = STEPS,
    of: tuple[Bucket, ...] | None = None,
    **settings: Any,
) -> tuple[BatchOrder, Mix]:
    """Return the order and the mix of a run."""
    config, of = CurriculumConfig(**settings), of or buckets()
    slot = config.tokens_of_slot(LENGTHS, batch)
    mix = plan_mix(of, config, steps, batch // slot)
    return order_of_mix(mix, of, config, LoaderConfig(window_tokens=window), batch // slot, slot, seed), mix


def order(**settings: Any) -> BatchOrder:
    return planned(**settings)[0]


def whole_batch(batches: BatchOrder, step: int) -> list[tuple[int, list[int]]]:
    """Return (length, sequences) of each stretch of a step."""
    return [(batches.lengths[s.bucket], batches.sequences(s).tolist()) for s in batches.batch(step)]


@pytest.mark.parametrize("settings", [{}, {"shares": {"books": 0.5}, "odds": "uniform"}], ids=["plain", "shares"])
def test_counts_alone_give_the_order_of_prepared_data(settings: dict[str, Any]):
    counts = {length: {name: sum(of[i]) for name, of in SHARDS.items()} for i, length in enumerate(LENGTHS)}
    found = bucket_order(counts, steps=STEPS, global_batch_tokens=256, curriculum=CurriculumConfig(**settings), seed=3)
    expected = order(seed=3, **settings)
    for step in range(1, STEPS + 1):
        assert whole_batch(found, step) == whole_batch(expected, step)


def ordered(sequences: dict[int, Any], *, steps: int = 4, seed: int = 0, **settings: Any) -> BatchOrder:
    curriculum = CurriculumConfig(**settings)
    return bucket_order(sequences, steps=steps, global_batch_tokens=64, curriculum=curriculum, seed=seed)


def test_a_count_may_be_a_number_of_numpy():
    assert whole_batch(ordered({8: np.int64(3)}), 1) == whole_batch(ordered({8: 3}), 1)


def test_a_source_without_sequences_of_a_length_may_be_left_out():
    some, all_named = (
        {8: {"web": 3}, 32: {"books": 5, "web": 2}},
        {8: {"web": 3, "books": 0}, 32: {"web": 2, "books": 5}},
    )
    found, expected = (ordered(of, shares={"books": 0.5}) for of in (some, all_named))
    for step in range(1, 5):
        assert whole_batch(found, step) == whole_batch(expected, step)


@pytest.mark.parametrize(
    ("advice", "wrong", "right"),
    [
        ("give the number of sequences of each length", ({}, {}), ({8: 3}, {})),
        ("steps = 0: .* give the number of steps of the run", ({8: 3}, {"steps": 0}), ({8: 3}, {"steps": 1})),
        ("= -3: must be at least 0; give the number of sequences that there are", ({8: -3}, {}), ({8: 3}, {})),
        (
            "'b': -1}: must be at least 0; give the number of sequences that there are",
            ({8: 9, 32: {"a": 2, "b": -1}}, {}),
            ({8: 9, 32: {"a": 2}}, {}),
        ),
        ("seed = -1: must be at least 0; give another whole number", ({8: 3}, {"seed": -1}), ({8: 3}, {"seed": 1})),
        ("leave this length out", ({8: 3, 12: 3, 32: 1}, {}), ({8: 3, 32: 1}, {})),
        (
            "shares follow losses in a run of `longring train` alone; set it to 0",
            ({8: 3}, {"renewal": RenewalConfig(rate=0.1)}),
            ({8: 3}, {"renewal": RenewalConfig()}),
        ),
    ],
    ids=["nothing", "steps", "negative", "negative of a source", "seed", "length", "renewal"],
)
def test_counts_that_give_no_order_are_refused(advice: str, wrong: Any, right: Any):
    with pytest.raises(ValueError, match=advice):
        ordered(wrong[0], **wrong[1])
    assert ordered(right[0], **right[1]).batch(1)


MIXED = {"mix": "micro_batch", "shares": {"books": ((0.0, 0.1), (1.0, 0.6)), "@8": 0.3}, "cycles": 4}


def test_known_answer():
    """The order is part of the format of a run: whoever changes these sequences raises ORDER."""
    assert ORDER == 3
    found = {step: whole_batch(order(batch=64, cycles=2), step) for step in (1, 2, 30, 60)}
    assert found == {
        1: [(32, [8, 1])],
        2: [(8, [2, 10, 1, 18, 9, 11, 7, 12])],
        30: [(32, [2, 7])],
        60: [(32, [12, 16])],
    }
    found = {step: whole_batch(order(batch=64, window=40, **MIXED), step) for step in (1, 60)}
    assert found == {1: [(32, [0]), (8, [9, 13, 7, 16])], 60: [(32, [12, 11])]}


@pytest.mark.parametrize("step", [0, -1, STEPS + 1])
def test_steps_count_from_1(step: int):
    with pytest.raises(IndexError, match=rf"step = {step}: must be in 1, \.\.\., {STEPS}; count the steps of the run"):
        order().batch(step)
    order().batch(min(max(step, 1), STEPS))


@pytest.mark.full
@settings(max_examples=40)
@given(
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([8, 16, 32]), st.integers(1, STEPS), st.integers(0, 9),
    st.sampled_from([{}, MIXED]), st.sampled_from([0, 40]),
)  # fmt: skip
def test_any_world_and_any_restart_reads_the_same(
    ranks: int, rank_tokens: int, step: int, seed: int, settings: dict[str, Any], window: int
):
    """A new BatchOrder gives the same batch at any step; the replicas' shares, in order, are the whole batch."""
    one, again = (order(seed=seed, window=window, **settings) for _ in range(2))
    for stretch, (length, sequences) in zip(again.batch(step), whole_batch(one, step), strict=True):
        degree = max(1, length // rank_tokens)
        count = max(1, rank_tokens // length)
        if degree > ranks:
            continue
        shares = [ReplicaShare(replica, ranks // degree, count) for replica in range(ranks // degree)]
        if one.slot_tokens % (ranks * rank_tokens):
            with pytest.raises(ValueError, match="divide; set it to a multiple of"):
                again.micro_batches(stretch, shares[0])
            continue
        rows = np.stack([again.micro_batches(stretch, share) for share in shares], axis=1)
        assert rows.ravel().tolist() == sequences


@pytest.mark.parametrize("replica", [2, -1])
def test_a_replica_outside_the_run(replica: int):
    batches = order()
    with pytest.raises(
        IndexError, match=rf"replica = {replica}: must be in 0, \.\.\., 1; count the replicas of the run"
    ):
        batches.micro_batches(batches.batch(1)[0], ReplicaShare(replica, 2, 1))
    for known in (0, 1):
        batches.micro_batches(batches.batch(1)[0], ReplicaShare(known, 2, 1))


def test_replicas_that_do_not_divide_a_batch():
    batches = order()
    with pytest.raises(
        ValueError, match=r"which 3 replicas with 2 sequences of \d+ tokens each do not divide"
    ) as error:
        batches.micro_batches(batches.batch(1)[0], ReplicaShare(2, 3, 2))
    found = re.search(r"set it to a multiple of (\d+)", str(error.value))
    assert found is not None
    right = order(batch=int(found[1]) * 32)
    assert right.micro_batches(right.batch(1)[0], ReplicaShare(2, 3, 2)).shape[1] == 2


@pytest.mark.parametrize("settings", [{}, MIXED], ids=["step", "micro_batch"])
@pytest.mark.parametrize("step", [0, 1, 7, STEPS])
def test_trained_counts_what_was_read(step: int, settings: dict[str, Any]):
    batches, of = order(batch=64, **settings), buckets()
    seen: dict[tuple[str, int], list[int]] = {}
    for earlier in range(1, step + 1):
        for length, sequences in whole_batch(batches, earlier):
            parts = of[LENGTHS.index(length)].parts
            names = np.repeat([part.source for part in parts], [part.sequences for part in parts])
            for number in sequences:
                seen.setdefault((names[number], length), []).append(number)
    cells = {(entry.source, entry.length): entry for entry in batches.trained(step)}
    assert {cell: sum(of[index]) for cell, of, index in _cells()} == {cell: e.available for cell, e in cells.items()}
    for (source, length), entry in cells.items():
        read = seen.get((source, length), [])
        assert (entry.sequences, entry.tokens) == (len(read), len(read) * length)
        assert entry.reached_tokens == len(set(read)) * length
        assert entry.repeated_tokens == (len(read) - len(set(read))) * length
        assert entry.reached_tokens + entry.not_reached_tokens == entry.available * length
        assert entry.passes == len(read) / entry.available


def _cells() -> list[tuple[tuple[str, int], tuple[list[int], ...], int]]:
    return [
        ((name, length), of, index) for index, length in enumerate(LENGTHS) for name, of in SHARDS.items() if of[index]
    ]


@st.composite
def shares(draw: st.DrawFn) -> dict[str, Any]:
    """Return shares that fit BUCKETS: of some sources, or of some buckets, constant or changing over the run."""
    names = draw(st.sampled_from([("web", "books"), ("@8", "@32"), ("books", "@8"), ("code",), ("web@16", "@8"), ()]))
    share = st.floats(0.01, 0.3)
    points = st.lists(st.tuples(st.floats(0, 1), share), min_size=1, max_size=3).map(lambda found: tuple(sorted(found)))
    return {name: draw(st.one_of(share, points)) for name in names}


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Return the settings of a run over BUCKETS."""
    mix, slot = draw(st.sampled_from([("step", 0), ("micro_batch", 0), ("micro_batch", 64)]))
    return {
        "steps": draw(st.integers(1, 60)),
        "batch": draw(st.sampled_from([64, 128, 256, 1024])),
        "window": draw(st.sampled_from([0, 40, 10_000])),
        "seed": draw(st.integers(0, 3)),
        "odds": draw(st.sampled_from(["natural", "grow_p2", "shrink_p100"])),
        "draw": draw(st.sampled_from(["odds", "odds_times_left", "odds_times_batches"])),
        "cycles": draw(st.integers(1, 12)),
        "mix": mix,
        "slot_tokens": slot,
        "shares": draw(shares()),
    }


def check_shares(settings: dict[str, Any]) -> None:
    """Check the tokens of every cell after every cycle against the sums of its shares, within the bound.

    The slots of B buckets are at most h = max(1 - 1/B, 1/2 + ... + 1/B) from their dues. Where a source's part w of its
    bucket changes by V in all, that is (w + V) h slots of the source, and the bucket's stream adds the error of its
    own: 1/2 + w (S + 2) sequences (`bucket_order`).
    """
    batches, mix = planned(**settings)
    most = max(1 - 1 / len(LENGTHS), sum(1 / k for k in range(2, len(LENGTHS) + 1)))
    of_all = np.array(mix.shares)  # [cycles, buckets, sources]
    of_bucket = of_all.sum(axis=2, keepdims=True)
    # In a cycle without slots of a bucket nothing changes.
    parts = np.divide(of_all, of_bucket, out=np.zeros_like(of_all), where=of_bucket > 0)
    target = np.zeros(of_all.shape[1:])
    for cycle, (first, last) in enumerate(pairwise(mix.begins)):
        target += (last - first) * batches.batch_tokens * of_all[cycle]
        counted = batches.given(last) * np.array(LENGTHS)[:, None]
        largest = parts[: cycle + 1].max(axis=0)
        changes = np.abs(np.diff(parts[: cycle + 1], axis=0)).sum(axis=0)
        margin = 0.5 + largest * (len(mix.cells.sources) + 2)
        bound = most * batches.slot_tokens * (largest + changes) + np.array(LENGTHS)[:, None] * margin
        assert (np.abs(counted - target) <= bound + 1e-6).all()
        assert counted.sum() == last * batches.batch_tokens


def check_first_difference(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Check the first step with another batch against a comparison of all batches."""
    a, b = order(**one), order(**other)
    last = min(one["steps"], other["steps"])
    unlike = (step for step in range(1, last + 1) if whole_batch(a, step) != whole_batch(b, step))
    assert a.first_difference(b, last) == b.first_difference(a, last) == next(unlike, None)


def check_pair(both: tuple[dict[str, Any], dict[str, Any]], changed: set[str]) -> None:
    """Check a configuration, and one that has other values of some settings."""
    one, new = both
    check_shares(one)
    other = {**one, **{key: new[key] for key in changed}}
    if other["mix"] == "step":
        other["slot_tokens"] = 0
    check_first_difference(one, {**other, "batch": one["batch"]})


KEYS = st.sets(st.sampled_from(["shares", "cycles", "steps", "window", "draw", "mix"]), max_size=2)


@settings(max_examples=10)
@given(st.tuples(configurations(), configurations()), KEYS)
def test_runs_hold_their_shares_and_first_differences(both, changed):
    check_pair(both, changed)


@pytest.mark.slow
@settings(max_examples=1_000)
@given(configurations())
def test_a_thousand_runs_hold_their_shares(one):
    check_shares(one)


@pytest.mark.slow
@settings(max_examples=200)
@given(st.tuples(configurations(), configurations()), KEYS)
def test_two_hundred_changes_of_runs_and_their_first_differences(both, changed):
    check_pair(both, changed)


def test_a_change_of_later_shares_leaves_the_steps_before_it():
    """A run whose shares were natural so far gets others for its last quarter."""
    later = {"books": ((0.0, 0.27), (0.75, 0.27), (0.75, 0.6))}
    one, other = order(steps=2 * STRIDE, shares={"books": 0.27}), order(steps=2 * STRIDE, shares=later)
    found = one.first_difference(other, 2 * STRIDE)
    assert found is not None
    assert 2 * STRIDE * 3 // 4 < found < 2 * STRIDE * 3 // 4 + 60


@pytest.mark.parametrize(("least", "most"), [(16, 0), (0, 16), (16, 16), (9, 31)])
def test_a_run_uses_the_buckets_it_names(least: int, most: int):
    config = CurriculumConfig(min_bucket_tokens=least, max_bucket_tokens=most)
    lengths = config.lengths_in_use(LENGTHS)
    assert lengths == tuple(length for length in LENGTHS if least <= length <= (most or 32))
    chosen = tuple(one for one in buckets() if one.length in lengths)
    mix = plan_mix(chosen, config, STEPS, 1)
    restricted = order_of_mix(mix, chosen, config, LoaderConfig(), 1, 64, 0)
    assert {length for step in range(1, STEPS + 1) for length, _ in whole_batch(restricted, step)} == set(lengths)


@pytest.mark.parametrize(
    ("settings", "message", "right"),
    [
        (
            {"min_bucket_tokens": 33},
            r"min_bucket_tokens = 33: leaves none of .* 8, 16, 32 tokens; set it to (\d+)",
            "min",
        ),
        ({"max_bucket_tokens": 7}, r"max_bucket_tokens = 7: leaves none of .*; set it to (\d+)", "max"),
        ({"min_bucket_tokens": 9, "max_bucket_tokens": 15}, r"min_bucket_tokens = 9: .*; set it to (\d+)", "min"),
    ],
)
def test_buckets_that_the_data_lacks(settings: dict[str, Any], message: str, right: str):
    with pytest.raises(ValueError, match=message) as error:
        CurriculumConfig(**settings).lengths_in_use(LENGTHS)
    found = re.search(message, str(error.value))
    assert found is not None
    assert CurriculumConfig(**{**settings, f"{right}_bucket_tokens": int(found[1])}).lengths_in_use(LENGTHS)


@pytest.mark.parametrize(("slot", "batch"), [(48, 192), (128, 192), (1000, 192), (8, 96), (96, 64)])
def test_slots_that_do_not_fit_name_one_that_does(slot: int, batch: int):
    with pytest.raises(ValueError, match=r"curriculum\.slot_tokens = \d+: .* set it to (\d+)") as error:
        CurriculumConfig(mix="micro_batch", slot_tokens=slot).tokens_of_slot(LENGTHS, batch)
    found = re.search(r"set it to (\d+)", str(error.value))
    assert found is not None
    right = CurriculumConfig(mix="micro_batch", slot_tokens=int(found[1]))
    assert right.tokens_of_slot(LENGTHS, batch) == int(found[1])


@pytest.mark.parametrize("batch", [0, 16, 48])
def test_global_batch_must_be_a_multiple_of_the_longest_bucket(batch: int):
    with pytest.raises(ValueError, match=rf"global_batch_tokens = {batch}: .* in use, 32 tokens; set it to (32|64)"):
        CurriculumConfig().tokens_of_slot(LENGTHS, batch)


def test_data_without_sequences():
    with pytest.raises(ValueError, match=r"no training sequence of 8 to 32 tokens; use other buckets, or prepare"):
        plan_mix(buckets({"web": ([], [], [])}), CurriculumConfig(), 10, 1)
