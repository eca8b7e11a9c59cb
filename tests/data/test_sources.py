import gzip
import json
import sysconfig
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from longring.data.config import SourceConfig
from longring.data.sources import documents


def read(**settings) -> list[tuple[int, str, str]]:
    return [(document.number, document.name, document.text) for document in documents(SourceConfig(**settings))]


def test_standard_library_is_every_module_once_in_order():
    root = Path(sysconfig.get_paths()["stdlib"])
    found = read(kind="python_stdlib", limit_documents=40)
    names = [name for _, name, _ in found]
    assert names == sorted(names, key=Path)
    assert [number for number, _, _ in found] == list(range(40))
    for _, name, text in found:
        assert Path(name).is_relative_to(root)
        assert "site-packages" not in name
        assert text == Path(name).read_text(encoding="utf-8", errors="replace")


def test_text_takes_whole_files_with_awkward_names(tmp_path: Path):
    texts = {"a[1].txt": "bracket", "b*.txt": "star", "c d.txt": "", "e/f.md": "line one\nline two\n", "g?.txt": "?"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".hidden").write_text("not read")
    assert {
        Path(name).relative_to(tmp_path).as_posix(): text for _, name, text in read(kind="text", path=str(tmp_path))
    } == texts
    assert read(kind="text", path=str(tmp_path / "a[1].txt")) == [(0, str(tmp_path / "a[1].txt"), "bracket")]
    assert [text for _, _, text in read(kind="text", path=str(tmp_path / "**" / "*.md"))] == ["line one\nline two\n"]


def test_invalid_utf8_is_replaced_not_refused(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert read(kind="text", path=str(tmp_path))[0][2] == "caf\ufffd"


def test_json_lines_arrays_and_compressed(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "", "id": 3}\n')
    (tmp_path / "b.json").write_text('[{"text": "three"}, {"text": "four"}]')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "five"}\n'))
    (tmp_path / "c2.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "six"}\n'))
    (tmp_path / "d.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("not JSON")
    found = read(kind="json", path=str(tmp_path))
    assert [text for _, _, text in found] == ["one", "", "three", "four", "five", "six"]
    assert [name for _, name, _ in found][:3] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:2",
        f"{tmp_path}/b.json:1",
    ]
    assert [text for _, _, text in read(kind="json", path=str(tmp_path), limit_documents=3)] == ["one", "", "three"]


def test_parquet_with_another_text_field(tmp_path: Path):
    table = pyarrow.table({"body": ["one", "two"], "score": [1.0, 2.0]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [text for *_, text in read(kind="parquet", path=str(tmp_path), text_field="body")] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "one"}\n{"text": \n', ["cannot read", "documents.jsonl", "JSON"]),
        (
            '{"body": "one", "id": 1}\n',
            ["documents.jsonl", "no field 'text'", "data.source.text_field", "'body', 'id'"],
        ),
        ('{"text": 5}\n', ["documents.jsonl", "row 1", "'text' is int"]),
        ('{"text": "one"}\n{"text": null}\n', ["documents.jsonl", "row 2", "'text' is NoneType"]),
        ('{"text": "one"}\n{"id": 4}\n', ["documents.jsonl", "row 2", "'text' is NoneType"]),
    ],
)
def test_bad_json_names_file_and_way_out(tmp_path: Path, capfd: pytest.CaptureFixture, content: str, words: list[str]):
    (tmp_path / "documents.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"data\.source") as error:
        read(kind="json", path=str(tmp_path))
    assert all(word in str(error.value) for word in words), error.value
    assert capfd.readouterr() == ("", "")


def test_bad_parquet_names_the_file(tmp_path: Path):
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"cannot read .*bad\.parquet"):
        read(kind="parquet", path=str(tmp_path))


@pytest.mark.parametrize("path", ["missing.jsonl", "*.jsonl", "."])
def test_no_file_matches(tmp_path: Path, path: str):
    with pytest.raises(ValueError, match=r"data\.source\.path = .* matches no file") as error:
        read(kind="json", path=str(tmp_path / path))
    assert str(tmp_path) in str(error.value)
    assert ".jsonl" in str(error.value)


def test_hub_failure_names_the_data_set(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"data set 'owner/name', split 'train': Couldn't reach the Hub"):
        read(kind="hub", path="owner/name")


def test_the_librarys_settings_are_given_back(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}))
    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    read(kind="json", path=str(tmp_path))
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before
