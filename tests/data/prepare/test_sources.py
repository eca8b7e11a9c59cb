import gzip
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from longring.data.config import DataConfig, SourceConfig
from longring.data.format.document import BadRecords
from longring.data.format.tokenizer import TokenMarks
from longring.data.prepare.records import RecordReader
from longring.data.prepare.sources import InputShard, input_shards


def shards_of(source: SourceConfig, shard_bytes: int = 2**28) -> list[InputShard]:
    return input_shards(
        DataConfig(directory="x", sources={"s": source}, input_shard_bytes=shard_bytes, tokenizer=TOKENIZER)
    )


TOKENIZER = DataConfig(directory="x").tokenizer.__class__(path="unused")


MARKS = TokenMarks(end=0, names={0: "<|endoftext|>"}, dtype=np.dtype("<u2"))


def readers(source: SourceConfig, shard_bytes: int = 2**28, limit: float = 1.0) -> Iterator[RecordReader]:
    return (RecordReader(shard, source, limit, MARKS) for shard in shards_of(source, shard_bytes))


def read(shard_bytes: int = 2**28, **settings: Any) -> list[tuple[str, Any]]:
    """Return (name, content) of all documents."""
    return [
        (document.name, document.content)
        for reader in readers(SourceConfig(**settings), shard_bytes)
        for document in reader.documents()
    ]


def bad(**settings: Any) -> BadRecords:
    [reader] = readers(SourceConfig(**settings))
    list(reader.documents())
    return reader.bad


def test_standard_library_is_every_module_once_in_order():
    root = Path(sysconfig.get_paths()["stdlib"])
    found = read(kind="python_stdlib", limit_documents=40)
    names = [name for name, _ in found]
    assert names == sorted(names, key=Path)
    for name, text in found:
        assert Path(name).is_relative_to(root)
        assert "site-packages" not in name
        assert text == Path(name).read_bytes().decode()


def test_text_takes_whole_files_with_awkward_names(tmp_path: Path):
    texts = {"a[1].txt": "bracket", "b*.txt": "star", "c d.txt": "", "e/f.md": "line one\r\nline two\n", "g?.txt": "?"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / ".hidden").write_text("not read")
    assert {
        Path(name).relative_to(tmp_path).as_posix(): text for name, text in read(kind="text", path=str(tmp_path))
    } == {name: text for name, text in texts.items() if text}
    assert bad(kind="text", path=str(tmp_path)).examples == {"empty": [str(tmp_path / "c d.txt")]}
    assert read(kind="text", path=str(tmp_path / "a[1].txt")) == [(str(tmp_path / "a[1].txt"), "bracket")]
    assert [text for _, text in read(kind="text", path=str(tmp_path / "**" / "*.md"))] == ["line one\r\nline two\n"]


def test_json_lines_arrays_and_compressed(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    (tmp_path / "b.json").write_text('[{"text": "three"}, {"text": "four"}]')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "five"}', mtime=0))
    # Two frames: what several compressing threads, or appending, leave.
    frames = [zstandard.compress(text) for text in (b'{"text": "six"}\n', b'{"text": "seven"}\n')]
    (tmp_path / "c2.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "d.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("not JSON")
    found = read(kind="json", path=str(tmp_path))
    assert [text for _, text in found] == ["one", "two", "three", "four", "five", "six", "seven"]
    assert [name for name, _ in found][:3] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.json:1"]
    assert [text for _, text in read(kind="json", path=str(tmp_path), limit_documents=3)] == ["one", "two", "three"]


def test_parquet_and_json_with_other_fields(tmp_path: Path):
    table = pyarrow.table({"body": ["one", "two"], "score": [1.0, 2.0], "ids": [[5, 6], [7]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [text for _, text in read(kind="parquet", path=str(tmp_path), text_field="body")] == ["one", "two"]
    found = read(kind="parquet", path=str(tmp_path), tokens_field="ids")
    assert [ids.tolist() for _, ids in found] == [[5, 6], [7]]
    assert found[0][1].dtype == np.int64


def test_files_from_a_remote_store():
    files = fsspec.filesystem("memory")
    files.pipe("/corpus/a.jsonl", b'{"text": "one"}\n')
    files.pipe("/corpus/sub/b.jsonl.gz", gzip.compress(b'{"text": "two"}\n', mtime=0))
    files.pipe("/corpus/c.parquet", b"")
    assert [text for _, text in read(kind="json", path="memory://corpus")] == ["one", "two"]
    assert [name for name, _ in read(kind="json", path="memory://corpus/*.jsonl")] == ["memory:///corpus/a.jsonl:1"]


def test_a_data_set_on_disk_and_one_by_name(tmp_path: Path):
    rows = [{"text": f"row {number}"} for number in range(50)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"a": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "splits"))
    texts = [row["text"] for row in rows]
    for folder, split in (("plain", {}), ("splits", {"split": "a"})):
        settings: dict[str, Any] = {"path": str(tmp_path / folder), **split}
        assert [text for _, text in read(kind="disk", **settings)] == texts
        # In parts of 200 bytes each, in the same order.
        assert len(shards_of(SourceConfig(kind="disk", **settings), 200)) > 2
        assert [text for _, text in read(200, kind="disk", **settings)] == texts
    # A folder of files is what the library calls a data set by name; three files are three parts.
    for part in range(3):
        (tmp_path / "named").mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows[part * 17 : part * 17 + 17])
        (tmp_path / "named" / f"{part}.jsonl").write_text(lines)
    named = SourceConfig(kind="hub", path=str(tmp_path / "named"))
    assert len(shards_of(named)) == 3
    assert [text for _, text in read(kind="hub", path=str(tmp_path / "named"))] == texts


ONE = b'{"text": "one"}\n'
BAD_LINES = {
    b'{"text": \n': ("broken_json", "line 2 column 1"),
    b'{"body": "one", "id": 1}\n': ("missing_field", "no field 'text' among 'body', 'id'"),
    b'{"text": 5}\n': ("wrong_type", "'text' is int"),
    b'{"text": null}\n': ("wrong_type", "'text' is NoneType"),
    b'"text"\n': ("wrong_type", "the record is str"),
    b'{"text": "caf\xe9"}\n': ("invalid_utf8", "byte 13"),
    b'{"text": "\\ud800"}\n': ("invalid_utf8", "lone surrogate at character 0"),
    b'{"text": ""}\n': ("empty", ""),
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line.decode(errors="replace").strip())
def test_a_bad_record_is_named_by_kind_file_and_line(tmp_path: Path, line: bytes):
    file = tmp_path / "documents.jsonl"
    file.write_bytes(b'{"text": "one"}\n' + line + b'{"text": "two"}\n')
    kind, detail = BAD_LINES[line]
    assert [text for _, text in read(kind="json", path=str(file))] == ["one", "two"]
    found = bad(kind="json", path=str(file))
    assert found.counts == {kind: 1}
    [example] = found.examples[kind]
    assert example.startswith(f"{file}:2")
    assert detail in example


@pytest.mark.parametrize("ids", ["[1, 2.5]", '["a"]', "[[1], [2]]", "7", "[true]"])
def test_token_ids_of_another_type(tmp_path: Path, ids: str):
    (tmp_path / "a.jsonl").write_text(f'{{"ids": {ids}}}\n{{"ids": [1]}}\n')
    assert bad(kind="json", path=str(tmp_path), tokens_field="ids").counts == {"wrong_type": 1}


def test_a_missing_parquet_column_makes_every_row_bad(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one", "two"]}), tmp_path / "a.parquet")
    found = bad(kind="parquet", path=str(tmp_path))
    assert found.counts == {"missing_field": 2}
    assert "'body'" in found.examples["missing_field"][0]


def test_too_many_bad_records_stop_the_run(tmp_path: Path):
    good, broken = '{"text": "one"}\n', '{"text": 5}\n'
    file = tmp_path / "documents.jsonl"
    file.write_text(good * 19 + broken)
    [reader] = readers(SourceConfig(kind="json", path=str(file)), limit=0.05)
    assert len(list(reader.documents())) == 19
    file.write_text(good * 18 + broken * 2)
    [reader] = readers(SourceConfig(kind="json", path=str(file)), limit=0.05)
    with pytest.raises(ValueError, match=r"2 of 20 records of source 's' are bad \(2 wrong_type\)") as error:
        list(reader.documents())
    assert all(word in str(error.value) for word in ("data.max_bad_fraction = 0.05", f"{file}:19"))


def test_a_hopeless_file_stops_early(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("not JSON\n" * 50_000)
    [reader] = readers(SourceConfig(kind="json", path=str(tmp_path)), limit=0.05)
    with pytest.raises(ValueError, match="1000 of 1000 records of source 's' are bad"):
        list(reader.documents())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 1_000, mtime=0)[:-20]),
        ("a.jsonl.gz", b"no gzip"),
        ("a.jsonl.zst", b"no zst"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "one"}\n' * 1_000)[:-9]),
        ("a.parquet", b"no parquet"),
    ],
    ids=["gzip cut short", "no gzip", "no zst", "zst cut short", "no parquet"],
)
def test_a_file_that_cannot_be_read_to_its_end_is_named(tmp_path: Path, name: str, content: bytes):
    kind, ending = ("parquet", "parquet") if name.endswith("parquet") else ("json", name.partition(".")[2])
    good = {"jsonl.gz": gzip.compress(ONE), "jsonl.zst": zstandard.compress(ONE), "parquet": b""}[ending]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "one.parquet")
    good = good or (tmp_path / "one.parquet").read_bytes()
    for file, text in (("one." + ending, good), (name, content)):
        (tmp_path / file).write_bytes(text)
    advice = "repair it or leave it out"
    with pytest.raises(ValueError, match=rf"data\.source\.path = .*: cannot read .*{name} \(.*\); {advice}"):
        read(kind=kind, path=str(tmp_path))
    assert len(read(kind=kind, path=f"{tmp_path}/o*.{ending}")) == 1
    (tmp_path / name).write_bytes(good)
    assert len(read(kind=kind, path=str(tmp_path))) == 2


def test_a_part_of_a_data_set_that_cannot_be_read(tmp_path: Path):
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_bytes(ONE)
    (tmp_path / "1.jsonl").write_text('{"text": \n')
    for mend in (lambda file: file.write_bytes(ONE), Path.unlink):
        with pytest.raises(ValueError, match=r"cannot read .*\[train\], part 1 of 2 .*; repair it or leave it out"):
            read(kind="hub", path=str(tmp_path))
        mend(tmp_path / "1.jsonl")
        assert {text for _, text in read(kind="hub", path=str(tmp_path))} == {"one"}
        (tmp_path / "1.jsonl").write_text('{"text": \n')


@pytest.fixture
def in_splits(tmp_path: Path) -> dict[str, Any]:
    """Return the settings of a data set on disk."""
    rows = datasets.Dataset.from_list([{"text": "one"}])
    datasets.DatasetDict({"a": rows}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "0.jsonl").write_bytes(ONE)
    return {"kind": "disk", "path": str(tmp_path / "splits"), "split": "a"}


DECLARED = "correct data.source.path, data.source.subset or data.source.split, or repair the data set"


def test_a_data_set_that_is_not_there(in_splits: dict[str, Any]):
    wrong: dict[str, Any] = in_splits | {"path": f"{in_splits['path']}-not"}
    with pytest.raises(ValueError, match=f"data.source.path = '{wrong['path']}': cannot read split .*; {DECLARED}"):
        read(**wrong)
    assert [text for _, text in read(**in_splits)] == ["one"]


def test_a_split_that_is_not_there(in_splits: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.source\.split = 'b': .* has the split 'a'; name one of them"):
        read(kind="disk", path=in_splits["path"], split="b")
    assert len(read(kind="disk", path=in_splits["path"], split="a")) == 1
    # A data set that was saved without the others still knows which split it is.
    rows = datasets.load_dataset("json", data_files=str(tmp_path / "named" / "0.jsonl"), split="train")
    rows.save_to_disk(str(tmp_path / "one"))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="has the split 'train'; name one of them"):
        read(kind="disk", path=str(tmp_path / "one"), split="test")
    assert len(read(kind="disk", path=str(tmp_path / "one"))) == 1


def test_a_subset_that_is_not_there(in_splits: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValueError, match=rf"cannot read split 'train' \(BuilderConfig 'other' not found.*; {DECLARED}"):
        read(kind="hub", path=str(tmp_path / "named"), subset="other")
    assert len(read(kind="hub", path=str(tmp_path / "named"), subset="default")) == 1


def test_a_data_set_that_is_damaged(in_splits: dict[str, Any]):
    [file] = Path(in_splits["path"]).glob("a/*.arrow")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"cannot read split 'a' \(.*\); {DECLARED}"):
        read(**in_splits)
    file.write_bytes(content)
    assert len(read(**in_splits)) == 1


@pytest.mark.parametrize("path", ["missing.jsonl", "*.jsonl", "."])
def test_no_file_matches(tmp_path: Path, path: str):
    with pytest.raises(ValueError, match=r"data\.source\.path = .*: matches no file") as error:
        read(kind="json", path=str(tmp_path / path))
    assert str(tmp_path) in str(error.value)
    assert ".jsonl" in str(error.value)


def test_an_unknown_store_is_named():
    with pytest.raises(ValueError, match=r"data\.source\.path = 'nosuch://x'"):
        read(kind="json", path="nosuch://x")


def test_runs_of_files(tmp_path: Path):
    for number, size in enumerate([40, 50, 20, 500, 10, 90]):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    runs = shards_of(SourceConfig(kind="text", path=str(tmp_path)), 100)
    assert [[Path(file).name[0] for file in run.files] for run in runs] == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    assert [run.size_bytes for run in runs] == [90, 20, 500, 100]


def test_hub_failure_names_the_data_set(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"data\.source\.path = 'owner/name': .* split 'train' \(Couldn't reach the Hub\)"
    ):
        read(kind="hub", path="owner/name")


def test_the_librarys_settings_are_given_back(tmp_path: Path):
    datasets.Dataset.from_list([{"text": "one"}]).save_to_disk(str(tmp_path / "a"))
    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    read(kind="disk", path=str(tmp_path / "a"))
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before
