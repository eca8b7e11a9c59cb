import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.config import CurriculumConfig
from longring.data.format.bucket import Bucket, Part
from longring.data.format.shards import SHARD_DTYPE
from longring.data.read.batch_order import BatchOrder, ReplicaShare
from longring.data.read.bucket_order import BucketOrder, SourcePart, bucket_orders, bucket_tokens
from longring.data.read.curriculum import step_buckets

LENGTHS, SEQUENCES, STEPS = (8, 16, 32), (10, 7, 5), 60


def one_source(sequences: int, seed: int, bucket: int, windows: int = 1) -> BucketOrder:
    """Return the order of a bucket with one source, in shards of 3 sequences."""
    shards = tuple([3] * (sequences // 3) + [sequences % 3] * (sequences % 3 > 0))
    part = SourcePart(first_sequence=0, shard_sequences=shards, positions=sequences)
    return BucketOrder([part], windows, (seed, bucket))


def order(seed: int = 0, global_batch_tokens: int = 256, windows: int = 1) -> BatchOrder:
    orders = [one_source(count, seed, bucket, windows) for bucket, count in enumerate(SEQUENCES)]
    chosen = step_buckets(bucket_tokens(LENGTHS, orders), STEPS, CurriculumConfig(cycles=2), seed)
    return BatchOrder(LENGTHS, orders, chosen, global_batch_tokens)


def whole_batch(batches: BatchOrder, step: int) -> list[int]:
    [micro_batch] = batches.sequences(step, ReplicaShare(0, 1, batches.batch_sequences(step))).tolist()
    return micro_batch


@pytest.mark.full
@settings(max_examples=20)
@given(st.integers(0, 2**64), st.sampled_from([32, 64, 96, 256]), st.integers(1, 6))
def test_every_sequence_once_in_every_pass(seed: int, global_batch_tokens: int, windows: int):
    batches = order(seed, global_batch_tokens, windows)
    streams: list[list[int]] = [[], [], []]
    for step in range(1, STEPS + 1):
        batch = whole_batch(batches, step)
        assert len(batch) * LENGTHS[batches.bucket(step)] == global_batch_tokens
        streams[batches.bucket(step)] += batch
    for count, stream in zip(SEQUENCES, streams, strict=True):
        passes = [stream[start : start + count] for start in range(0, len(stream), count)]
        assert all(sorted(one) == list(range(count)) for one in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1])


@pytest.mark.full
def test_each_pass_and_each_seed_has_its_own_order():
    zero, one = ([whole_batch(order(seed), step) for step in range(1, STEPS + 1)] for seed in (0, 1))
    assert zero != one
    for windows in (1, 4):
        batches = BatchOrder((8,), [one_source(64, 0, 0, windows)], np.zeros(4, dtype=np.uint8), 8 * 64)
        assert len({tuple(whole_batch(batches, step)) for step in range(1, 5)}) == 4


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        (1, {1: [2, 0], 2: [3], 3: [1], 4: [1], 5: [3, 0], 30: [8, 2, 2, 3], 59: [3], 60: [4]}),
        (3, {1: [0, 1], 2: [4], 3: [1], 4: [0], 5: [5, 0], 30: [8, 7, 2, 4], 59: [2], 60: [4]}),
    ],
)
def test_known_answer(windows: int, expected: dict[int, list[int]]):
    """The order is part of the format of a run: replica 1 of 2 reads these sequences at these steps, for ever."""
    batches = order(0, 64, windows)
    assert {step: batches.sequences(step, ReplicaShare(1, 2, 1)).ravel().tolist() for step in expected} == expected


def test_known_answer_of_weighted_sources():
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    windowed, _ = bucket_orders(BUCKETS, weights, 50, 3)
    whole, _ = bucket_orders(BUCKETS, weights, 0, 3)
    assert stream(windowed, 12) == [16, 14, 1, 17, 15, 0, 18, 22, 19, 21, 3, 2]
    assert windowed.at(np.arange(10_000, 10_012)).tolist() == [7, 29, 9, 33, 32, 10, 30, 34, 31, 36, 11, 37]
    assert stream(whole, 12) == [30, 53, 2, 5, 28, 25, 34, 7, 16, 15, 51, 24]


@pytest.mark.parametrize("step", [0, -1, STEPS + 1])
def test_steps_count_from_1(step: int):
    batches = order()
    for ask in (batches.bucket, batches.batch_sequences, lambda step: batches.sequences(step, ReplicaShare(0, 1, 1))):
        with pytest.raises(IndexError, match=rf"step = {step}: must be in 1, \.\.\., {STEPS}"):
            ask(step)


@pytest.mark.full
@settings(max_examples=40)
@given(
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.integers(1, STEPS), st.integers(0, 9),
    st.integers(1, 4),
)  # fmt: skip
def test_any_world_and_any_restart_reads_the_same(
    num_replicas: int, sequences: int, step: int, seed: int, windows: int
):
    """A new BatchOrder gives the same batch at any step; the replicas' shares, in order, are the whole batch."""
    expected = whole_batch(order(seed, windows=windows), step)
    batches = order(seed, windows=windows)
    size = batches.batch_sequences(step)
    shares = [ReplicaShare(replica, num_replicas, sequences) for replica in range(num_replicas)]
    if size % (num_replicas * sequences):
        with pytest.raises(ValueError, match=f"makes {size} sequences of step {step}, which {num_replicas} replicas"):
            batches.sequences(step, shares[0])
        return
    rows = np.stack([batches.sequences(step, share) for share in shares], axis=1)
    assert rows.ravel().tolist() == expected


@pytest.mark.parametrize("replica", [2, -1])
def test_a_replica_outside_the_run(replica: int):
    with pytest.raises(IndexError, match=rf"replica = {replica}: must be in 0, \.\.\., 1"):
        order().sequences(1, ReplicaShare(replica, 2, 1))


@pytest.mark.parametrize("global_batch_tokens", [0, 16, 48])
def test_global_batch_must_be_a_multiple_of_the_largest_bucket(global_batch_tokens: int):
    with pytest.raises(
        ValueError, match=rf"train\.global_batch_tokens = {global_batch_tokens}: .* 32 tokens; set it to (32|64)"
    ):
        order(global_batch_tokens=global_batch_tokens)


def test_a_bucket_of_the_curriculum_must_have_sequences():
    advice = "give no step to it, or prepare documents that fill it"
    filled, empty = [one_source(3, 0, 0), one_source(1, 0, 1)], [one_source(3, 0, 0), one_source(0, 0, 1)]
    with pytest.raises(ValueError, match=rf"step_buckets: bucket 16 has no sequences; {advice}"):
        BatchOrder((8, 16), empty, np.array([0, 1], dtype=np.uint8), 16)
    BatchOrder((8, 16), empty, np.array([0, 0], dtype=np.uint8), 16)
    BatchOrder((8, 16), filled, np.array([0, 1], dtype=np.uint8), 16)


@pytest.mark.parametrize("step", [1, STEPS])
def test_replicas_that_do_not_divide_a_batch(step: int):
    share = ReplicaShare(2, 3, 2)
    with pytest.raises(ValueError, match=r"which 3 replicas with 2 sequences each do not divide; set it to") as error:
        order().sequences(step, share)
    found = re.search(r"set it to a multiple of (\d+)", str(error.value))
    assert found is not None
    right = order(global_batch_tokens=math.lcm(int(found[1]), LENGTHS[-1]))
    assert right.sequences(step, share).shape[1] == 2


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("step", [0, 1, 7, STEPS])
def test_trained_counts_what_was_read(step: int, windows: int):
    batches = order(global_batch_tokens=32, windows=windows)
    seen: list[list[int]] = [[], [], []]
    for earlier in range(1, step + 1):
        seen[batches.bucket(earlier)] += whole_batch(batches, earlier)
    for entry, length, count, read in zip(batches.trained(step), LENGTHS, SEQUENCES, seen, strict=True):
        assert (entry.length, entry.sequences, entry.tokens) == (length, len(read), len(read) * length)
        assert entry.reached_tokens == len(set(read)) * length
        assert entry.not_reached_tokens == (count - len(set(read))) * length
        assert entry.repeated_tokens == (len(read) - len(set(read))) * length
        assert entry.passes == len(read) / count


def bucket(length: int, shards: dict[str, list[int]]) -> Bucket:
    """Return a bucket; `shards` are the numbers of sequences in each source's shards."""
    table = np.zeros(sum(map(len, shards.values())), dtype=SHARD_DTYPE)
    table["sequences"] = [count for counts in shards.values() for count in counts]
    parts, first = [], 0
    for name, counts in shards.items():
        parts.append(Part(source=name, first_shard=first, num_shards=len(counts), sequences=sum(counts)))
        first += len(counts)
    return Bucket(length=length, shards=table, parts=tuple(parts))


BUCKETS = (bucket(8, {"a": [5, 9], "b": [40], "c": []}), bucket(16, {"a": [3], "b": [6, 1], "c": [8]}))
# Tokens: a 160, b 432, c 128; 720 in all.


def stream(chosen: BucketOrder, positions: int) -> list[int]:
    return chosen.at(np.arange(positions)).tolist()


@pytest.mark.parametrize("window_tokens", [0, 50, 10_000])
def test_sources_without_weights_come_once_each(window_tokens: int):
    for chosen, entry in zip(bucket_orders(BUCKETS, {}, window_tokens, 3), BUCKETS, strict=True):
        assert chosen.positions == entry.sequences
        two = stream(chosen, 2 * entry.sequences)
        assert sorted(two[: entry.sequences]) == sorted(two[entry.sequences :]) == list(range(entry.sequences))
        assert two[: entry.sequences] != two[entry.sequences :]


@pytest.mark.parametrize("window_tokens", [0, 50])
def test_weights_are_shares_of_tokens(window_tokens: int):
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    tokens: Counter[str] = Counter()
    for chosen, entry in zip(bucket_orders(BUCKETS, weights, window_tokens, 3), BUCKETS, strict=True):
        # Six passes: each sequence of a source comes equally often, up to one.
        seen = Counter(stream(chosen, 6 * chosen.positions))
        assert chosen.reached(6 * chosen.positions) == len(seen)
        first = 0
        for part in entry.parts:
            counts = [seen[number] for number in range(first, first + part.sequences)]
            assert not counts or max(counts) - min(counts) <= 1
            tokens[part.source] += sum(counts) * entry.length
            first += part.sequences
    assert tokens.total() == pytest.approx(6 * 720, rel=0.03)
    for name, weight in weights.items():
        assert tokens[name] / tokens.total() == pytest.approx(weight / 4, abs=0.02)


def test_every_shuffle_window_holds_its_share_of_every_source():
    """A source has its share of every run of positions, up to one sequence."""
    [chosen, _] = bucket_orders((bucket(8, {"a": [300], "b": [50] * 14}), BUCKETS[1]), {}, 400, 0)
    is_a = np.array(stream(chosen, 1_000)) < 300
    for start in range(0, 1_000, 50):
        assert abs(is_a[start : start + 50].sum() - 15) <= 1


def test_a_shuffle_window_reads_few_shards():
    parts = [SourcePart(first_sequence=0, shard_sequences=(10,) * 50, positions=500)]
    numbers = np.array(stream(BucketOrder(parts, 25, (0, 0)), 500)) // 10
    assert max(len(set(numbers[start : start + 20])) for start in range(0, 500, 20)) == 2
    assert numbers[::10].tolist() != sorted(numbers[::10].tolist()), "shards come in an order of their own"
    assert len(set(np.array(stream(BucketOrder(parts, 1, (0, 0)), 20)) // 10)) > 10


def test_reached_counts_distinct_sequences_of_a_repeated_source():
    chosen, _ = bucket_orders(BUCKETS, {"a": 5.0, "b": 1.0, "c": 1.0}, 0, 0)
    for positions in (0, 1, 10, 50, 100, 1_000):
        assert chosen.reached(positions) == len(set(stream(chosen, positions)))


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}])
def test_weights_name_every_source(weights: dict[str, float]):
    with pytest.raises(ValueError, match=re.escape(f"curriculum.weights = {weights}: ") + ".* are a, b, c;"):
        bucket_orders(BUCKETS, weights, 0, 0)


def test_the_curriculum_follows_the_weighted_tokens():
    """Source c has sequences in the long bucket alone, so its weight gives that bucket more tokens."""
    even, weighted = (
        bucket_tokens((8, 16), bucket_orders(BUCKETS, weights, 0, 0))
        for weights in ({}, {"a": 1.0, "b": 1.0, "c": 8.0})
    )
    assert even == [432, 288]
    assert weighted[1] > 500
