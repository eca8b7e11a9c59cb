from pathlib import Path

import numpy as np
import pytest
from longring.data import shards
from longring.data.shards import Bucket, BucketWriter, SequenceReader


def write(root: Path, sequences: np.ndarray, shard_tokens: int, dtype: str = "<u2") -> Bucket:
    """Sequence number i comes from document 3 i at offset 5 i."""
    length = sequences.shape[1] - 1
    with BucketWriter(root, "train", length, np.dtype(dtype), shard_tokens) as writer:
        for number, sequence in enumerate(sequences):
            writer.append(sequence.astype(dtype), 3 * number, 5 * number)
    return writer.bucket()


@pytest.mark.parametrize(("rows", "shards_made"), [(0, 0), (1, 1), (7, 1), (8, 1), (9, 2), (41, 6)])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_any_order_of_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, shards_made: int, dtype: str):
    monkeypatch.setattr(shards, "BLOCK_TOKENS", 3 * 16)
    sequences = np.random.default_rng(0).integers(0, 60_000, (rows, 17))
    bucket = write(tmp_path, sequences, shard_tokens=8 * 16, dtype=dtype)
    assert (bucket.length, bucket.sequences, bucket.tokens, len(bucket.shards)) == (16, rows, 16 * rows, shards_made)
    reader = SequenceReader(tmp_path, bucket, np.dtype(dtype))
    indices = np.random.default_rng(1).permutation(rows)
    assert np.array_equal(reader.read(indices), sequences[indices])
    assert np.array_equal(reader.documents(indices), np.stack([3 * indices, 5 * indices], axis=1))
    assert reader.read([]).shape == (0, 17)
    assert reader.read(indices).dtype == np.int64


def test_few_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 3)
    sequences = np.arange(40 * 9).reshape(40, 9)
    reader = SequenceReader(tmp_path, write(tmp_path, sequences, shard_tokens=16), np.dtype("<u2"))
    inside = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        assert np.array_equal(reader.read(range(40)), sequences)
    assert len(list(Path("/proc/self/fd").iterdir())) <= inside + 3


def test_bytes_per_token_of_a_full_shard(tmp_path: Path):
    bucket = write(tmp_path, np.zeros((2**20 // 256, 257), dtype=np.uint16), shard_tokens=2**20)
    assert len(bucket.shards) == 1
    assert bucket.shards[0].size_bytes / bucket.tokens < 2.1


@pytest.mark.parametrize("index", [-1, 5])
def test_index_outside(tmp_path: Path, index: int):
    reader = SequenceReader(tmp_path, write(tmp_path, np.zeros((5, 9)), 64), np.dtype("<u2"))
    with pytest.raises(IndexError, match=rf"{index}.*bucket 8, which has 5"):
        reader.read([0, index])


def test_an_appended_array_may_change_afterwards(tmp_path: Path):
    tokens = np.arange(9, dtype=np.uint16)
    with BucketWriter(tmp_path, "train", 8, np.dtype("<u2"), 64) as writer:
        writer.append(tokens, 0, 0)
        tokens[:] = 0
    assert SequenceReader(tmp_path, writer.bucket(), np.dtype("<u2")).read([0]).tolist() == [list(range(9))]
