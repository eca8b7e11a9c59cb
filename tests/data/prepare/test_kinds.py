"""Each kind of source: the same documents give the same shards to the byte."""

import csv
import gzip
import io
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from helpers.containers import npy, tar
from helpers.lanes import by_lane
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.format.manifest import Manifest
from longring.data.format.tokenizer import TokenMarks
from longring.data.prepare.prepare import prepare
from longring.data.prepare.records import RecordReader
from longring.data.prepare.sources import input_shards
from rich.console import Console
from tokenizers import Tokenizer, processors

Words = Callable[..., str]
Ids = list[list[int]]

BOS, EOS = "<s>", "</s>"


@pytest.fixture(scope="module")
def family_tokenizer(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that has BOS and EOS beside the boundary, and whose template adds BOS."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_special_tokens([BOS, EOS])
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    file = tmp_path_factory.mktemp("family") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module")
def texts(words: Words) -> list[str]:
    """Documents with what formats treat in ways of their own, empty ones, and one of several spans."""
    odd = [
        'commas, "quotes", tabs\t and <s> </s> <|endoftext|>',
        "lines\r\nof\nall\rkinds\n\n",
        "",
        "日本語 and עברית and e\u0301 and 👋🏽",
        "[not an array]",
        "",
        "x",
        words(20_000),
    ]
    return [words(30, 1), *odd, *[words(10 + 7 * number, number) for number in range(30)]]


def settings(tokenizer: Path, **changed: Any) -> DataConfig:
    defaults: dict[str, Any] = {
        "directory": "unused",
        "tokenizer": TokenizerConfig(path=str(tokenizer)),
        "min_bucket_tokens": 8,
        "max_bucket_tokens": 64,
        "max_bad_fraction": 1.0,
        "shard_tokens": 2_048,
    }
    return DataConfig(**{**defaults, **changed})


def account(manifest: Manifest) -> dict[str, Any]:
    """Return the ledger without the names of records."""
    ledger = manifest.ledger.to_json()
    return {**ledger, "bad": ledger["bad"]["counts"], "word_cuts": ledger["word_cuts"]["count"]}


def shards(manifest: Manifest) -> list[Any]:
    """Return the table of shards, which has the SHA-256 of each."""
    return manifest.shards.tolist()


def csv_of(texts: list[str], delimiter: str = ",") -> bytes:
    content = io.StringIO(newline="")
    rows = csv.writer(content, delimiter=delimiter)
    rows.writerows([["number", "text"], *enumerate(texts)])
    return content.getvalue().encode()


def arrow_of(table: pyarrow.Table, new: Callable[..., Any]) -> bytes:
    content = io.BytesIO()
    with new(content, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return content.getvalue()


def parquet_of(table: pyarrow.Table) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content, row_group_size=7)
    return content.getvalue()


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def text_rows(texts: list[str]) -> list[dict[str, Any]]:
    return [{"text": text, "number": number} for number, text in enumerate(texts)]


def text_table(texts: list[str]) -> pyarrow.Table:
    return pyarrow.Table.from_pylist(text_rows(texts))


TEXT_FILES: dict[str, Callable[[list[str]], dict[str, bytes]]] = {
    "json": lambda texts: {"a.json": json.dumps(text_rows(texts)).encode()},
    "json gz": lambda texts: {"a.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + lines_of(text_rows(texts)))},
    "json zst": lambda texts: {"a.jsonl.zst": zstandard.compress(lines_of(text_rows(texts)))},
    "csv": lambda texts: {"a.csv": b"\xef\xbb\xbf" + csv_of(texts)},
    "csv tsv": lambda texts: {"a.tsv.gz": gzip.compress(csv_of(texts, "\t"))},
    "parquet": lambda texts: {"a.parquet": parquet_of(text_table(texts))},
    "arrow stream": lambda texts: {"a.arrow": arrow_of(text_table(texts), pyarrow.ipc.new_stream)},
    "arrow file": lambda texts: {"a.arrow": arrow_of(text_table(texts), pyarrow.ipc.new_file)},
    "webdataset txt": lambda texts: {"a.tar": tar([(f"{n:04d}.txt", text.encode()) for n, text in enumerate(texts)])},
    "webdataset json": lambda texts: {
        "a.tar.gz": gzip.compress(
            tar(
                [
                    member
                    for n, row in enumerate(text_rows(texts))
                    for member in ((f"x/{n}.png", b"\x89"), (f"x/{n}.json", json.dumps(row).encode()))
                ]
            )
        )
    },
    "text": lambda texts: {f"{n:04d}.txt": b"\xef\xbb\xbf" * (n % 2) + t.encode() for n, t in enumerate(texts)},
    "hub": lambda texts: {"a.jsonl": lines_of(text_rows(texts))},
}
"""Files of documents, by kind and variant."""


@pytest.fixture(scope="module")
def reference(
    texts: list[str], family_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Manifest]:
    """Return a function that prepares the texts as JSON lines."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "a.jsonl").write_bytes(lines_of(text_rows(texts)))
    source = SourceConfig(kind="json", path=str(folder / "a.jsonl"))
    done: dict[float, Manifest] = {}

    def make(held_out_fraction: float) -> Manifest:
        if held_out_fraction not in done:
            directory = str(folder / f"prepared{held_out_fraction}")
            changed: dict[str, Any] = {"directory": directory, "held_out_fraction": held_out_fraction}
            done[held_out_fraction] = prepare(settings(family_tokenizer, source=source, **changed), Console(quiet=True))
        return done[held_out_fraction]

    return make


@pytest.mark.parametrize("variant", by_lane([*TEXT_FILES, "disk"], quick=["csv", "arrow stream", "webdataset txt"]))
def test_each_kind_of_text_gives_the_same_bytes(
    reference: Callable[..., Manifest],
    texts: list[str],
    family_tokenizer: Path,
    tmp_path: Path,
    console: Console,
    variant: str,
):
    corpus = tmp_path / "corpus"
    if variant == "disk":
        datasets.Dataset.from_list(text_rows(texts)).save_to_disk(str(corpus))
    else:
        corpus.mkdir()
        for name, content in TEXT_FILES[variant](texts).items():
            (corpus / name).write_bytes(content)
    source = SourceConfig(kind=variant.split()[0], path=str(corpus))  # type: ignore[arg-type]
    config = settings(family_tokenizer, source=source, directory=str(tmp_path / "prepared"), held_out_fraction=0.3)
    made, expected = prepare(config, console), reference(0.3)
    assert shards(made) == shards(expected)
    assert account(made) == account(expected)
    assert made.ledger.bad.counts == {"empty": 2}


def flat(parts: Ids) -> list[int]:
    return [number for part in parts for number in part]


def in_rows(stream: list[int], length: int) -> Ids:
    """Cut a stream into rows of one length; the last may be shorter."""
    return [stream[start : start + length] for start in range(0, len(stream), length)]


def id_lines(rows: Ids) -> dict[str, bytes]:
    return {"a.jsonl": lines_of([{"ids": row} for row in rows])}


def id_table(rows: Ids, number: pyarrow.DataType) -> pyarrow.Table:
    return pyarrow.table({"ids": pyarrow.array(rows, type=pyarrow.list_(number))})


def raw(ids: list[int], dtype: str) -> bytes:
    return np.array(ids, dtype=dtype).tobytes()


def megatron_of(ids: Ids, dtype: str, pieces: int = 1) -> dict[str, bytes]:
    """Return the .bin and .idx of documents of `pieces` sequences each."""
    parts = [part.tolist() for one in ids for part in np.array_split(one, pieces)]
    lengths = np.array([len(part) for part in parts])
    pointers = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    bounds = range(0, len(parts) + 1, pieces)
    head = struct.pack("<9sQBQQ", b"MMIDIDX", 1, {"<u2": 8, "<i4": 4}[dtype], len(parts), len(bounds))
    index = head + raw([*lengths], "<i4") + raw([*pointers], "<i8") + raw([*bounds], "<i8")
    return {"a.bin": raw(flat(parts), dtype), "a.idx": index}


class Corpus(NamedTuple):
    """Documents as token ids [tokens], and the ids of BOS and EOS."""

    ids: Ids
    bos: int
    eos: int

    def ended(self) -> Ids:
        return [[*one, self.eos] for one in self.ids]

    def framed(self) -> Ids:
        return [[self.bos, *one, self.eos] for one in self.ids]

    def begun(self) -> Ids:
        return [[self.bos, *one] for one in self.ids]


Settings = dict[str, Any]
FIELD: Settings = {"tokens_field": "ids"}
ROWS: Settings = {**FIELD, "eos": EOS, "record_holds": "stream"}
TOKEN_FILES: dict[str, tuple[Callable[[Corpus], dict[str, bytes]], Settings]] = {
    "json": (lambda found: id_lines(found.ids), FIELD),
    "json framed": (lambda found: id_lines(found.framed()), {**FIELD, "eos": EOS}),
    "json documents": (
        lambda found: id_lines([flat(found.framed()[first : first + 5]) for first in range(0, len(found.ids), 5)]),
        {**FIELD, "eos": EOS, "record_holds": "documents"},
    ),
    "parquet rows": (
        lambda found: {"a.parquet": parquet_of(id_table(in_rows(flat(found.ended()), 64), pyarrow.uint16()))},
        ROWS,
    ),
    "arrow rows": (
        lambda found: {
            "a.arrow": arrow_of(id_table(in_rows(flat(found.framed()), 64), pyarrow.int64()), pyarrow.ipc.new_stream)
        },
        ROWS,
    ),
    "webdataset": (
        lambda found: {
            "a.tar": tar([(f"{n:05d}.ids.npy", npy(np.array(one, "u2"))) for n, one in enumerate(found.framed())])
        },
        {"tokens_field": "ids.npy", "eos": EOS},
    ),
    "tokens npy": (lambda found: {"a.npy": npy(np.array([found.eos, *flat(found.ended())]))}, {"eos": EOS}),
    "tokens npy of rows": (lambda found: {"a.npy": npy(np.array([flat(found.ended())], dtype="u4"))}, {"eos": EOS}),
    "tokens raw": (lambda found: {"a.npy": raw(flat(found.framed()), "<u2")}, {"eos": EOS}),
    "tokens raw uint32": (lambda found: {"a.bin": raw(flat(found.ended()), "<u4")}, {"eos": EOS, "dtype": "uint32"}),
    "tokens raw boundary": (lambda found: {"a.raw": raw(flat([[*one, 0] for one in found.ids]), "<u2")}, {}),
    "tokens raw bos": (lambda found: {"a.raw": raw(flat(found.begun()), "<u2")}, {"eos": BOS}),
    "megatron": (lambda found: megatron_of(found.framed(), "<u2"), {"eos": EOS}),
    "megatron pieces": (lambda found: megatron_of(found.ids, "<i4", pieces=3), {}),
}
"""Files of token ids, and the settings that say how they lie, by kind and variant."""


@pytest.mark.parametrize(
    "variant",
    by_lane([*TOKEN_FILES, "disk", "hub"], quick=["json framed", "parquet rows", "tokens raw", "megatron pieces"]),
)
def test_each_kind_of_token_ids_gives_the_bytes_of_text(
    reference: Callable[..., Manifest],
    texts: list[str],
    family_tokenizer: Path,
    tmp_path: Path,
    console: Console,
    variant: str,
):
    tokenizer = Tokenizer.from_file(str(family_tokenizer))
    tokenizer.encode_special_tokens = True
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    vocabulary = tokenizer.get_vocab()
    found = Corpus(ids, vocabulary[BOS], vocabulary[EOS])
    path = tmp_path / "corpus"
    path.mkdir()
    if variant == "disk":
        # What `group_texts` of Hugging Face's examples makes, but for the last row.
        rows, how = (
            in_rows(flat(found.framed()), 64),
            {"tokens_field": "input_ids", "eos": EOS, "record_holds": "stream"},
        )
        table = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
        datasets.Dataset.from_list(table).save_to_disk(str(path))
    else:
        make, how = TOKEN_FILES["json framed" if variant == "hub" else variant]
        for name, content in make(found).items():
            (path / name).write_bytes(content)
    source = SourceConfig(kind=variant.split()[0], path=str(path), **how)  # type: ignore[arg-type]
    config = settings(family_tokenizer, source=source, directory=str(tmp_path / "prepared"), held_out_fraction=0.0)
    made, expected = prepare(config, console), reference(0.0)
    assert account(made) | {"word_cuts": 0} == account(expected) | {"word_cuts": 0}
    assert shards(made) == shards(expected)


REMOTE = ["json zst", "csv", "text", "parquet", "arrow stream", "arrow file", "webdataset json", "disk"]


@pytest.mark.parametrize("variant", by_lane([*REMOTE, "tokens raw", "tokens npy", "megatron"], quick=["megatron"]))
def test_each_kind_is_read_from_a_store(texts: list[str], tmp_path: Path, variant: str):
    """The same documents through fsspec: by address, by glob, and from a folder in a folder."""
    store, folder = fsspec.filesystem("memory"), f"/{tmp_path.name}"
    kind, how = variant.split()[0], {}
    if variant == "disk":
        datasets.Dataset.from_list(text_rows(texts)).save_to_disk(str(tmp_path / "in"))
    else:
        files = TEXT_FILES[variant](texts) if variant in TEXT_FILES else TOKEN_FILES[variant][0](Corpus([[5, 6]], 1, 2))
        how = {} if variant in TEXT_FILES else {"eos": "</s>"}
        (tmp_path / "in").mkdir()
        for name, content in files.items():
            (tmp_path / "in" / name).write_bytes(content)
    store.put(str(tmp_path / "in"), f"{folder}/in", recursive=True)
    marks = TokenMarks(end=2, names={0: "", 1: BOS, 2: EOS}, dtype=np.dtype("<u2"))

    def read(path: str) -> list[bytes]:
        source = SourceConfig(kind=kind, path=path, **how)  # type: ignore[arg-type]
        inputs = input_shards(settings(tmp_path, source=source))
        return [one.digest for shard in inputs for one in RecordReader(shard, source, 1.0, marks).documents()]

    expected = read(str(tmp_path / "in"))
    assert len(expected) == (len([text for text in texts if text]) if variant not in TOKEN_FILES else 1)
    assert read(f"memory:/{folder}/in") == read(f"file://{tmp_path}/in") == expected
    if kind != "disk":
        assert read(f"memory:/{folder}/**/*") == expected


@pytest.mark.parametrize("variant", ["tokens raw", "megatron pieces"])
def test_a_large_file_of_ids_is_divided_into_input_shards(
    family_tokenizer: Path, tmp_path: Path, console: Console, variant: str
):
    """Input shards of one file hold each of its documents once, in order."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(3, 200, length).tolist() for length in draw.integers(0, 90, 200)]
    make, how = TOKEN_FILES[variant]
    (tmp_path / "corpus").mkdir()
    vocabulary = Tokenizer.from_file(str(family_tokenizer)).get_vocab()
    for name, content in make(Corpus(ids, vocabulary[BOS], vocabulary[EOS])).items():
        (tmp_path / "corpus" / name).write_bytes(content)
    source = SourceConfig(kind=variant.split()[0], path=str(tmp_path / "corpus"), **how)  # type: ignore[arg-type]
    config = settings(family_tokenizer, source=source, directory=str(tmp_path / "whole"), method="concat_masked")
    whole = prepare(config, console)
    parts = prepare(replace(config, directory=str(tmp_path / "parts"), input_shard_bytes=2_000), console, workers=1)
    assert whole.sources["documents"] == 1 and parts.sources["documents"] > 5
    assert parts.ledger.documents == whole.ledger.documents == sum(map(bool, ids))
    assert (parts.ledger.records, parts.ledger.tokens) == (whole.ledger.records, whole.ledger.tokens)
