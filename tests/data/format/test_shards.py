from pathlib import Path

import numpy as np
import pytest
from longring.data.format import reader as reader_module
from longring.data.format import shards
from longring.data.format.reader import SequenceReader
from longring.data.format.shards import BucketWriter, ShardName, shard_name
from longring.data.format.store import LocalStore


def write(root: Path, sequences: np.ndarray, shard_tokens: int, dtype: str = "<u2") -> SequenceReader:
    """Write `sequences` and return their reader.

    Sequence i comes from document 3 i at offset 5 i, and every third one also from document 3 i + 1.
    """
    length = sequences.shape[1] - 1
    folder = root / "shards" / "000007"
    folder.mkdir(parents=True)
    with BucketWriter(folder, ShardName(7, "train", length, 0), np.dtype(dtype), shard_tokens) as writer:
        for number, sequence in enumerate(sequences):
            writer.append(sequence.astype(dtype), pieces(number))
    return SequenceReader(LocalStore(root), length, writer.shards(), np.dtype(dtype), 1 << 16)


def pieces(number: int) -> list[tuple[int, int, int]]:
    first = (3 * number, 5 * number, 0)
    return [first] if number % 3 else [first, (3 * number + 1, 0, 4)]


@pytest.mark.parametrize(("rows", "shards_made"), [(0, 0), (1, 1), (7, 1), (8, 1), (9, 2), (41, 6)])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_any_order_of_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, shards_made: int, dtype: str):
    monkeypatch.setattr(shards, "SAMPLE_TOKENS", 3 * 16)
    sequences = np.random.default_rng(0).integers(0, 60_000, (rows, 17))
    reader = write(tmp_path, sequences, shard_tokens=8 * 16, dtype=dtype)
    assert (reader.length, reader.sequences, len(list(tmp_path.rglob("*.tar")))) == (16, rows, shards_made)
    indices = np.random.default_rng(1).permutation(rows)
    assert np.array_equal(reader.read(indices), sequences[indices])
    for index, found in zip(indices.tolist(), reader.pieces(indices), strict=True):
        assert found.tolist() == [[7, *piece] for piece in pieces(index)]
    assert reader.document_starts(indices) == [(0,) if index % 3 else (0, 4) for index in indices.tolist()]
    assert reader.read([]).shape == (0, 17)
    out = np.zeros((rows, 17), dtype=np.uint64)
    assert reader.read(indices, out=out) is out
    assert np.array_equal(out, sequences[indices])


def test_equal_input_gives_equal_bytes(tmp_path: Path):
    sequences = np.arange(40 * 9).reshape(40, 9)
    for name in ("a", "b"):
        write(tmp_path / name, sequences, shard_tokens=64)
    files = [file.relative_to(tmp_path / "a") for file in sorted((tmp_path / "a").rglob("*.tar"))]
    assert len(files) == 5
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_few_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 3)
    sequences = np.arange(40 * 9).reshape(40, 9)
    reader = write(tmp_path, sequences, shard_tokens=16)
    inside = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        assert np.array_equal(reader.read(range(40)), sequences)
    assert len(list(Path("/proc/self/fd").iterdir())) <= inside + 3


def test_bytes_per_token_of_a_full_shard(tmp_path: Path):
    write(tmp_path, np.zeros((2**20 // 256, 257), dtype=np.uint16), shard_tokens=2**20)
    [file] = tmp_path.rglob("*.tar")
    assert file.stat().st_size / 2**20 < 2.15


@pytest.mark.parametrize("index", [-1, 5])
def test_index_outside(tmp_path: Path, index: int):
    reader = write(tmp_path, np.zeros((5, 9)), 64)
    with pytest.raises(IndexError, match=rf"{index}.*bucket 8, which has 5 sequences; leave out those outside"):
        reader.read([0, index])
    assert len(reader.read([0])) == 1


def test_an_appended_array_may_change_afterwards(tmp_path: Path):
    tokens = np.arange(9, dtype=np.uint16)
    with BucketWriter(tmp_path, ShardName(0, "train", 8, 0), np.dtype("<u2"), 64) as writer:
        writer.append(tokens, [(0, 0, 0)])
        tokens[:] = 0
    [entry] = writer.shards()
    folder = tmp_path / Path(shard_name(entry).path()).parent
    folder.mkdir(parents=True)
    next(tmp_path.glob("*.tar")).rename(folder / Path(shard_name(entry).path()).name)
    reader = SequenceReader(LocalStore(tmp_path), 8, writer.shards(), np.dtype("<u2"), 1 << 16)
    assert reader.read([0]).tolist() == [list(range(9))]


def test_a_shard_cut_short_while_in_use_is_named_with_both_hashes(tmp_path: Path):
    reader = write(tmp_path, np.zeros((5, 9)), 64)
    [file] = tmp_path.rglob("*.tar")
    expected = shards.sha256_of(file)
    file.write_bytes(file.read_bytes()[:-512])
    with pytest.raises(ValueError, match="SHA-256") as error:
        reader.read([0])
    assert all(word in str(error.value) for word in (str(file), expected, shards.sha256_of(file)))
