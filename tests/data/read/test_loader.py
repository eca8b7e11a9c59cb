import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from longring.data.config import DataConfig, LoaderConfig
from longring.data.curriculum_config import CurriculumConfig, Mix
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.format.reader import SequenceReader
from longring.data.prepare.prepare import prepare
from longring.data.read.batch_order import ReplicaShare
from longring.data.read.loader import Loader, MicroBatch
from longring.data.read.mix import training_order
from rich.console import Console

STEPS, BATCH_TOKENS, TOKENS_PER_RANK = 24, 256, 32


@pytest.fixture(params=["decompose", "pack", "concat_masked"])
def manifest(
    make_config: Callable[..., DataConfig],
    words: Callable[..., str],
    console: Console,
    request: pytest.FixtureRequest,
) -> Manifest:
    settings = {
        "decompose": {},
        "pack": {"rest": "pack", "min_bucket_tokens": 32},
        "concat_masked": {"method": "concat_masked"},
    }[request.param]
    return prepare(make_config([words(20 + 9 * number, number) for number in range(40)], **settings), console)


def loader(
    manifest: Manifest, config: LoaderConfig, replica: int = 0, num_replicas: int = 1, mix: Mix = "step"
) -> Loader:
    curriculum = CurriculumConfig(cycles=2, mix=mix, slot_tokens=64 if mix == "micro_batch" else 0)
    order = training_order(manifest, curriculum, config, steps=STEPS, global_batch_tokens=BATCH_TOKENS, seed=5)
    return Loader(
        manifest, order, config, lambda length: ReplicaShare(replica, num_replicas, TOKENS_PER_RANK // length)
    )


@pytest.mark.parametrize("mix", ["step", "micro_batch"])
def test_every_number_of_workers_and_ranks_reads_the_same(manifest: Manifest, mix: Mix):
    worlds = (1, 2, 4, 8) if mix == "step" else (1, 2)  # as many as a slot of 64 tokens holds
    whole: dict[int, list] = {}
    for workers in (0, 1, 4):
        for world in worlds:
            ranks = [
                list(loader(manifest, LoaderConfig(workers=workers), rank, world, mix).batches(0, STEPS))
                for rank in range(world)
            ]
            assert all(
                [(b.step, b.micro_step) for b in batches] == [(b.step, b.micro_step) for b in ranks[0]]
                for batches in ranks
            )
            steps: dict[int, list] = {}
            for together in zip(*ranks, strict=True):
                for batch in together:
                    starts = batch.document_starts or [None] * len(batch.rows)
                    steps.setdefault(batch.step, []).extend(zip(batch.rows.tolist(), starts, strict=True))
            whole = whole or steps
            assert steps == whole
    tokens = [[len(row) - 1 for row, _ in rows] for rows in whole.values()]
    assert all(sum(lengths) == BATCH_TOKENS for lengths in tokens)
    several = any(len(set(lengths)) > 1 for lengths in tokens)
    assert several == (mix == "micro_batch" and len(manifest.lengths) > 1)
    assert all(lengths == sorted(lengths, reverse=True) for lengths in tokens), "the longest bucket first"


def test_rows_follow_the_order_and_starts_are_those_of_documents(manifest: Manifest):
    found = loader(manifest, LoaderConfig(workers=2))
    buckets = manifest.buckets("train")
    several = 0
    for batch in found.batches(0, STEPS):
        [stretch] = found.order.batch(batch.step)
        bucket = buckets[stretch.bucket]
        share = ReplicaShare(0, 1, TOKENS_PER_RANK // bucket.length)
        wanted = found.order.micro_batches(stretch, share)[batch.micro_step]
        assert batch.length == bucket.length
        assert np.array_equal(batch.rows, manifest.reader(bucket).read(wanted))
        assert (batch.document_starts is not None) == manifest.has_boundaries
        for row, starts in zip(batch.rows, batch.document_starts or [], strict=manifest.has_boundaries):
            assert starts[0] == 0
            assert list(starts) == sorted(set(starts))
            assert all(row[start] == manifest.boundary_id for start in starts[1:])
            several += len(starts) > 1
    assert bool(several) == manifest.has_boundaries


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_restart_after_any_step_reads_the_same_batches(manifest: Manifest, workers: int):
    whole = [batch.rows.tolist() for batch in loader(manifest, LoaderConfig(workers=workers)).batches(0, STEPS)]
    accumulation = BATCH_TOKENS // TOKENS_PER_RANK
    for step in range(0, STEPS, 5):
        again = loader(manifest, LoaderConfig(workers=workers)).batches(step, STEPS)
        assert [batch.rows.tolist() for batch in again] == whole[step * accumulation :]


def test_batches_are_those_of_the_steps_asked_for(manifest: Manifest):
    batches = loader(manifest, LoaderConfig(workers=1)).batches(3, 6)
    micro_steps = range(BATCH_TOKENS // TOKENS_PER_RANK)
    assert [(b.step, b.micro_step) for b in batches] == [(step, micro) for step in (4, 5, 6) for micro in micro_steps]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_an_error_in_reading_reaches_the_consumer(manifest: Manifest, workers: int):
    found = loader(manifest, LoaderConfig(workers=workers))
    for shard in Path(manifest.store.name).rglob("train*.tar"):
        shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"bytes with SHA-256 .* in the manifest; run `longring prepare RECIPE`"):
        list(found.batches(0, STEPS))


@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_in_the_order_reaches_the_consumer(manifest: Manifest, workers: int):
    order = loader(manifest, LoaderConfig()).order
    found = Loader(manifest, order, LoaderConfig(workers=workers), lambda length: ReplicaShare(0, 3, 1))
    with pytest.raises(ValueError, match="3 replicas with 1 sequences of .* tokens each do not divide"):
        list(found.batches(0, STEPS))


def test_threads_prepare_what_training_would_wait_for(manifest: Manifest):
    def prepare(length: int, num_rows: int, starts: object) -> tuple[str, int, int, object]:
        return threading.current_thread().name, length, num_rows, starts

    config, order = LoaderConfig(workers=2), loader(manifest, LoaderConfig()).order
    found = Loader(manifest, order, config, lambda length: ReplicaShare(0, 1, 64 // length), prepare=prepare)
    for batch in found.batches(0, STEPS):
        thread, *given = batch.prepared
        assert thread.startswith("loader")
        assert given == [batch.length, len(batch.rows), batch.document_starts]


def test_closing_early_ends_every_thread(manifest: Manifest):
    before = threading.active_count()
    batches = loader(manifest, LoaderConfig(workers=4, prefetch_batches=2)).batches(0, STEPS)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_reading_overlaps_with_the_model(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    """Workers read the next `prefetch_batches` before they are asked for; without workers nothing is read ahead."""
    read, done = SequenceReader.read, threading.Semaphore(0)

    def counted(*arguments, **options):
        rows = read(*arguments, **options)
        done.release()
        return rows

    monkeypatch.setattr(SequenceReader, "read", counted)
    batches = loader(manifest, LoaderConfig(workers=0)).batches(0, 5)
    for _ in range(10):
        next(batches)
        assert done.acquire(blocking=False)
        assert not done.acquire(blocking=False), "read before it is asked for"

    batches = loader(manifest, LoaderConfig(workers=1, prefetch_batches=3)).batches(0, 5)
    next(batches)
    for _ in range(1 + 3):
        assert done.acquire(timeout=60)
    for _ in range(10):
        next(batches)
        assert done.acquire(timeout=60), "one more batch is read while this one is trained"
        assert not done.acquire(blocking=False), "more batches are read than prefetch_batches"
    batches.close()


def test_a_micro_batch_has_plain_rows(manifest: Manifest):
    batch: MicroBatch = next(loader(open_prepared(manifest.store.name), LoaderConfig()).batches(2, 3))
    assert (batch.step, batch.micro_step) == (3, 0)
    assert batch.rows.dtype == np.uint16
    assert batch.rows.shape == (TOKENS_PER_RANK // batch.length, batch.length + 1)
