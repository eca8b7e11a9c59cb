"""Files that are cut, damaged or not what their kind says: each is named, and bad records are counted by kind."""

import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from helpers.containers import npy, tar
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.format.tokenizer import TokenMarks
from longring.data.prepare.records import RecordReader
from longring.data.prepare.sources import input_shards

MARKS = TokenMarks(end=2, names={0: "<|endoftext|>", 2: "</s>"}, dtype=np.dtype("<u2"))


def readers(**settings: Any) -> list[RecordReader]:
    source = SourceConfig(**settings)
    config = DataConfig(directory="x", sources={"s": source}, tokenizer=TokenizerConfig(path="unused"))
    return [RecordReader(shard, source, 1.0, MARKS) for shard in input_shards(config)]


def read(**settings: Any) -> list[Any]:
    """Return the content of all documents."""
    documents = (document for reader in readers(**settings) for document in reader.documents())
    return [one.content if isinstance(one.content, str) else one.content.tolist() for one in documents]


def bad(**settings: Any) -> dict[str, list[str]]:
    """Return the names of the bad records of a source by their kind."""
    [reader] = readers(**settings)
    list(reader.documents())
    return reader.bad.examples


def arrow(new: Callable[..., Any]) -> bytes:
    content = io.BytesIO()
    table = pyarrow.table({"text": ["one", "two", "three"]})
    with new(content, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return content.getvalue()


def index(code: int = 8, lengths: tuple[int, int] = (2, 3), bounds: tuple[int, ...] = (0, 1, 2)) -> bytes:
    """Return the .idx of two documents, of 2 and 3 ids, whose second piece begins at byte 4."""
    head = struct.pack("<9sQBQQ", b"MMIDIDX", 1, code, 2, len(bounds))
    return head + struct.pack(f"<2i2q{len(bounds)}q", *lengths, 0, 4, *bounds)


SAMPLES = tar([("a.txt", b"one"), ("b.txt", b"two"), ("c.txt", b"three")])  # headers and contents of 512 bytes each
STREAM, FILE = arrow(pyarrow.ipc.new_stream), arrow(pyarrow.ipc.new_file)
IDS = np.array([5, 6, 2, 7, 8, 2], dtype="<u2")
BIN = np.array([5, 6, 7, 8, 9], dtype="<u2").tobytes()
CSV = b"id,text\r\n1,one\r\n2,two\r\n"

UNREADABLE: dict[str, tuple[str, str, bytes, bytes, str]] = {
    # kind, name, whole content, wrong content, words
    "tar without its end": ("webdataset", "a.tar", SAMPLES, SAMPLES[: 6 * 512], "no mark of the end"),
    "tar cut in a header": ("webdataset", "a.tar", SAMPLES, SAMPLES[: 4 * 512 + 100], "no mark of the end"),
    "tar cut in a text": ("webdataset", "a.tar", SAMPLES, SAMPLES[: 5 * 512 + 1], "end of data"),
    "tar damaged": ("webdataset", "a.tar", SAMPLES, SAMPLES[:1024] + b"x" * 512 + SAMPLES[1536:], "invalid header"),
    "tar of nothing": ("webdataset", "a.tar", SAMPLES, b"", "empty"),
    "arrow stream without its end": ("arrow", "a.arrow", STREAM, STREAM[:-8], "an Arrow stream without its end"),
    "arrow stream cut": ("arrow", "a.arrow", STREAM, STREAM[:-100], "an Arrow stream without its end"),
    "arrow file cut": ("arrow", "a.arrow", FILE, FILE[:-20], "Arrow"),
    "csv cut": ("csv", "a.csv.gz", gzip.compress(CSV), gzip.compress(CSV)[:-9], "end-of-stream"),
    "csv in UTF-16": ("csv", "a.csv", CSV, CSV.decode().encode("utf-16"), "it is UTF-16, and texts are read as UTF-8"),
    "npy cut": ("tokens", "a.npy", npy(IDS), npy(IDS)[:-2], "its header says [6] numbers of type uint16"),
    "npy of floats": ("tokens", "a.npy", npy(IDS), npy(IDS.astype(float)), "holds float64, not token ids"),
    "npy of objects": ("tokens", "a.npy", npy(IDS), npy(np.array([{}])), "holds object, not token ids"),
    "npy with another header": ("tokens", "a.npy", npy(IDS), b"\x93NUMPY\x01\x00\x05\x00{}{}{", "not one of an npy"),
    "raw cut": ("tokens", "a.bin", IDS.tobytes(), IDS.tobytes()[:-1], "not a multiple of the 2 bytes"),
    "bin cut": ("megatron", "a.bin", BIN, BIN[:-2], "it has 8 bytes, and"),
    "idx cut": ("megatron", "a.idx", index(), index()[:-1], "a.idx is cut, or describes more than texts"),
    "idx without its header": ("megatron", "a.idx", index(), index()[:20], "ends at byte 20"),
    "idx of floats": ("megatron", "a.idx", index(), index(code=7), "not an index of version 1 of integers"),
    "idx with images": ("megatron", "a.idx", index(), index() + bytes(2), "describes more than texts"),
    "idx out of order": ("megatron", "a.idx", index(), index(bounds=(0, 2, 1, 2)), "one soon after it, is not in"),
    "idx with a gap": ("megatron", "a.idx", index(), index(lengths=(1, 3)), "one soon after it, is not in the .bin"),
    "idx of a long piece": ("megatron", "a.idx", index(), index(lengths=(2, 2**31 - 1)), "it has 10 bytes, and"),
    "idx of no piece": ("megatron", "a.idx", index(), index(bounds=(0, 1, 2**62)), "one soon after it, is not in"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_is_cut_or_damaged_is_named(tmp_path: Path, case: str):
    kind, name, whole, wrong, words = UNREADABLE[case]
    if kind == "megatron":
        (tmp_path / "a.bin").write_bytes(BIN)
        (tmp_path / "a.idx").write_bytes(index())
    (tmp_path / name).write_bytes(wrong)
    how = {"eos": "</s>"} if kind == "tokens" else {}
    message = r"data\.source\.path = .*: cannot read .*; repair it or leave it out"
    with pytest.raises(ValueError, match=message) as error:
        read(kind=kind, path=str(tmp_path), **how)
    assert words in str(error.value)
    assert str(tmp_path / "a.") in str(error.value)
    (tmp_path / name).write_bytes(whole)
    expected = {"megatron": [[5, 6], [7, 8, 9]], "tokens": [[5, 6], [7, 8]]}.get(kind, ["one", "two", "three"])
    assert read(kind=kind, path=str(tmp_path), **how) == expected[: 2 if kind == "csv" else None]


@pytest.mark.parametrize("name", ["a.bin", "a.idx", "a", "*"])
def test_megatron_data_is_named_by_either_file_or_by_their_common_name(tmp_path: Path, name: str):
    (tmp_path / "a.bin").write_bytes(BIN)
    with pytest.raises(ValueError, match=r"cannot read .*a\.bin \(.*a\.idx.*\); repair it or leave it out"):
        read(kind="megatron", path=str(tmp_path / name))
    (tmp_path / "a.idx").write_bytes(index())
    assert read(kind="megatron", path=str(tmp_path / name)) == [[5, 6], [7, 8, 9]]


def test_ids_without_the_token_that_ends_documents(tmp_path: Path):
    (tmp_path / "a.npy").write_bytes(np.array([5, 6, 9, 7], dtype="<u2").tobytes())
    with pytest.raises(ValueError, match=r"data\.source\.eos = '': .*a\.npy has no token </s> of id 2") as error:
        read(kind="tokens", path=str(tmp_path))
    assert "set it to the token that ends documents, or data.source.dtype to the type of the ids" in str(error.value)
    (tmp_path / "a.npy").write_bytes(np.array([5, 6, 2, 7], dtype="<u2").tobytes())
    assert read(kind="tokens", path=str(tmp_path)) == [[5, 6], [7]]


@pytest.mark.parametrize(("dtype", "stored", "right"), [("", "<u4", "uint32"), ("uint32", "<i8", "int64")])
def test_ids_of_more_bytes_than_are_read(tmp_path: Path, dtype: str, stored: str, right: str):
    (tmp_path / "a.npy").write_bytes(np.array([5, 6, 2, 7] * 16, dtype=stored).tobytes())
    message = rf"data\.source\.dtype = '{dtype}': .*every second number of .* in it is 0; set it to '{right}'"
    with pytest.raises(ValueError, match=message):
        read(kind="tokens", path=str(tmp_path), dtype=dtype)
    assert read(kind="tokens", path=str(tmp_path), dtype=right)[:2] == [[5, 6], [7, 5, 6]]


def test_bad_rows_of_a_csv_are_named_by_their_line(tmp_path: Path):
    rows = b'id,text\r\n1,"two\r\nlines"\r\n2\r\n\r\n3,"a"b\r\n4,\xff\r\n5,\r\n6,good\r\n7,"open'
    (tmp_path / "a.csv").write_bytes(rows)
    assert read(kind="csv", path=str(tmp_path)) == ["two\r\nlines", "good"]
    found = bad(kind="csv", path=str(tmp_path))
    name = str(tmp_path / "a.csv")
    assert found["broken_csv"] == [
        f"{name}:4: 1 values for 2 columns",
        f"{name}:6: ',' expected after '\"'",
        f"{name}:10: unexpected end of data",
    ]
    assert found["invalid_utf8"] == [f"{name}:7: a lone surrogate at character 0"]
    assert found["empty"] == [f"{name}:8"]
    assert "no field 'body' among 'id', 'text'" in bad(kind="csv", path=name, text_field="body")["missing_field"][0]


def test_bad_samples_of_a_tar_are_named(tmp_path: Path):
    members = {
        "a/1.json": b'{"text": "one"}',
        "a/2.json": b'{"text"',
        "a/3.txt": b"\xff",
        "a/4.png": b"",
        "a/5.ids.npy": b"no npy",
        "a/__meta.txt": b"no sample",
    }
    (tmp_path / "a.tar").write_bytes(tar([*members.items()]))
    assert read(kind="webdataset", path=str(tmp_path)) == ["one"]
    found = bad(kind="webdataset", path=str(tmp_path))
    name = f"{tmp_path}/a.tar:a/"
    assert found["broken_json"][0].startswith(f"{name}2: ")
    assert found["invalid_utf8"] == [f"{name}3: byte 0"]
    assert found["missing_field"] == [f"{name}4: no field 'text' among 'png'"]
    assert found["bad_tokens"][0].startswith(f"{name}5: member .ids.npy: its header is not one of an npy file")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_with_bad_values_keeps_the_good_ones(tmp_path: Path, kind: str):
    offsets, texts = np.array([0, 1, 2, 3], np.int32), b"a\xffb"
    text = pyarrow.StringArray.from_buffers(3, pyarrow.py_buffer(offsets), pyarrow.py_buffer(texts))
    table = pyarrow.table({"text": text, "ids": pyarrow.array([[5], None, [6, None]])})
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    assert read(kind=kind, path=str(file)) == ["a", "b"]
    assert bad(kind=kind, path=str(file)) == {"invalid_utf8": [f"{file}:2: byte 0"]}
    assert read(kind=kind, path=str(file), tokens_field="ids") == [[5]]
    assert len(bad(kind=kind, path=str(file), tokens_field="ids")["wrong_type"]) == 2
