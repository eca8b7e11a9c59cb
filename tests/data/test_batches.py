from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.batches import Batches, BatchOrder
from longring.data.config import DataConfig
from longring.data.curriculum import schedule
from longring.data.prepare import prepare
from rich.console import Console

LENGTHS, SEQUENCES, STEPS = (8, 16, 32), (10, 7, 5), 60


def order(seed: int = 0, global_batch_tokens: int = 256) -> BatchOrder:
    tokens = [length * count for length, count in zip(LENGTHS, SEQUENCES, strict=True)]
    return BatchOrder(LENGTHS, SEQUENCES, schedule(tokens, STEPS, "grow_p2", 2, seed), global_batch_tokens, seed)


def whole_batch(batches: BatchOrder, step: int) -> list[int]:
    return batches.sequences(step, 0, 0, 1, batches.batch_sequences(step)).tolist()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**64), st.sampled_from([32, 64, 96, 256]))
def test_every_sequence_once_in_every_pass(seed: int, global_batch_tokens: int):
    batches = order(seed, global_batch_tokens)
    streams: list[list[int]] = [[], [], []]
    for step in range(STEPS):
        batch = whole_batch(batches, step)
        assert len(batch) * LENGTHS[batches.bucket(step)] == global_batch_tokens
        streams[batches.bucket(step)] += batch
    for count, stream in zip(SEQUENCES, streams, strict=True):
        passes = [stream[start : start + count] for start in range(0, len(stream), count)]
        assert all(sorted(one) == list(range(count)) for one in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1])


def test_passes_and_seeds_have_their_own_orders():
    assert [whole_batch(order(0), step) for step in range(STEPS)] != [
        whole_batch(order(1), step) for step in range(STEPS)
    ]
    lone = BatchOrder((8,), (64,), np.zeros(4, dtype=np.int64), 8 * 64, 0)
    assert len({tuple(whole_batch(lone, step)) for step in range(4)}) == 4


@pytest.mark.parametrize("num_replicas", [1, 2, 4, 8])
@pytest.mark.parametrize("sequences_per_replica", [1, 2, 4, 8])
def test_any_number_of_replicas_and_micro_steps_reads_the_same(num_replicas: int, sequences_per_replica: int):
    batches, per_micro_step = order(), num_replicas * sequences_per_replica
    for step in range(STEPS):
        size = batches.batch_sequences(step)
        if size % per_micro_step:
            with pytest.raises(ValueError, match=f"makes {size} sequences of step {step}; {num_replicas} replicas"):
                batches.sequences(step, 0, 0, num_replicas, sequences_per_replica)
            continue
        rows = [
            batches.sequences(step, micro_step, replica, num_replicas, sequences_per_replica)
            for micro_step in range(size // per_micro_step)
            for replica in range(num_replicas)
        ]
        assert np.concatenate(rows).tolist() == whole_batch(batches, step)


def test_a_restart_needs_nothing_but_the_step():
    before = [whole_batch(order(), step) for step in range(STEPS)]
    for step in reversed(range(STEPS)):
        assert whole_batch(order(), step) == before[step]


@pytest.mark.parametrize(("replica", "micro_step"), [(2, 0), (-1, 0), (0, 16), (0, -1)])
def test_outside_the_batch(replica: int, micro_step: int):
    lone = BatchOrder((8,), (10,), np.zeros(4, dtype=np.int64), 256, 0)
    with pytest.raises(IndexError, match=f"replica {replica} of 2, micro-step {micro_step} of 16"):
        lone.sequences(0, micro_step, replica, 2, 1)


@pytest.mark.parametrize("global_batch_tokens", [0, 16, 48])
def test_global_batch_must_be_a_multiple_of_the_largest_bucket(global_batch_tokens: int):
    with pytest.raises(ValueError, match=rf"train\.global_batch_tokens is {global_batch_tokens} .* 32"):
        order(global_batch_tokens=global_batch_tokens)


def test_a_scheduled_bucket_must_have_sequences():
    with pytest.raises(ValueError, match="bucket 16, which has no sequences"):
        BatchOrder((8, 16), (3, 0), np.array([0, 1]), 16, 0)


@pytest.mark.parametrize("step", [0, 1, 7, STEPS])
def test_trained_counts_what_was_read(step: int):
    batches = order(global_batch_tokens=32)
    seen: list[list[int]] = [[], [], []]
    for earlier in range(step):
        seen[batches.bucket(earlier)] += whole_batch(batches, earlier)
    for entry, length, count, read in zip(batches.trained(step), LENGTHS, SEQUENCES, seen, strict=True):
        assert (entry.length, entry.sequences, entry.tokens) == (length, len(read), len(read) * length)
        assert entry.reached_tokens == len(set(read)) * length
        assert entry.not_reached_tokens == (count - len(set(read))) * length
        assert entry.repeated_tokens == (len(read) - len(set(read))) * length
        assert entry.passes == pytest.approx(len(read) / count)


def test_read_gives_the_rows_of_the_bucket(
    make_config: Callable[..., DataConfig], words: Callable[..., str], console: Console
):
    config = make_config([words(100 + 5 * number, number) for number in range(20)])
    manifest = prepare(config, console)
    train = manifest.splits["train"]
    steps = schedule([bucket.tokens for bucket in train], 30, "uniform", 1, 0)
    batches = Batches(config.directory, manifest, steps, 64, 5)
    for step in range(30):
        bucket = train[steps[step]]
        everything = manifest.reader(Path(config.directory), bucket).read(range(bucket.sequences))
        size = 64 // bucket.length
        rows = np.concatenate([batches.read(step, 0, replica, 2, size // 2) for replica in range(2)])
        assert rows.shape == (size, bucket.length + 1)
        assert np.array_equal(rows, everything[whole_batch(batches.order, step)])
