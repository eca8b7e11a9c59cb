import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from helpers.files import tree
from helpers.lanes import by_lane
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.config import DataConfig, LoaderConfig, SourceConfig, TokenizerConfig
from longring.data.format.document import NO_DOCUMENT, SPLITS, Split
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.format.shards import shard_name
from longring.data.prepare.decompose import split_of
from longring.data.prepare.prepare import prepare
from rich.console import Console
from tokenizers import Tokenizer
from webdataset.compat import WebDataset

MakeConfig = Callable[..., DataConfig]
Words = Callable[..., str]


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def expected_streams(texts: list[str], tokenizer_file: Path) -> list[list[int]]:
    """Return B x1 ... xn B of every document, by the interface of the tokenizer for single texts."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.encode_special_tokens = True
    return [[0, *tokenizer.encode(text).ids, 0] for text in texts]


def check_prepared(manifest: Manifest, config: DataConfig, texts: list[str], streams: list[list[int]]) -> None:
    """Assert that the shards hold each target of each document once, in one split, as the ledger counts them."""
    covered: list[Counter[int]] = [Counter() for _ in streams]
    targets: Counter[int] = Counter()
    filler: Counter[Split] = Counter()
    for split in SPLITS:
        for bucket in manifest.buckets(split):
            reader = manifest.reader(bucket)
            rows, origins = reader.read(range(bucket.sequences)), reader.pieces(range(bucket.sequences))
            assert rows.shape == (bucket.sequences, bucket.length + 1)
            for row, pieces in zip(rows.tolist(), origins, strict=True):
                ends = [*pieces[1:, 3].tolist(), bucket.length]
                if split == "train":
                    targets.update(row[1:])
                for (_, document, offset, start), end in zip(pieces.tolist(), ends, strict=True):
                    if document == NO_DOCUMENT:
                        assert set(row[start : end + 1]) == {0}
                        filler[split] += end - start
                        continue
                    stream = streams[document]
                    assert split_of(digest(texts[document]), config.seed, config.held_out_fraction) == split
                    assert row[start + 1 : end + 1] == stream[offset + 1 : offset + end - start + 1]
                    # The input before may be a boundary where a packed part begins inside its document.
                    assert row[start] == stream[offset] or (config.has_boundaries and row[start] == 0)
                    covered[document].update(range(offset, offset + end - start))
    ledger = manifest.ledger
    assert (ledger.records, ledger.documents) == (len(texts), sum(map(bool, texts)))
    assert ledger.bad.counts["empty"] == sum(not text for text in texts)
    come, kept, dropped = Counter[Split](), Counter[Split](), Counter[str]()
    for text, stream, pairs in zip(texts, streams, covered, strict=True):
        num_pairs = len(stream) - 1 if text else 0
        assert set(pairs.values()) <= {1}
        split = split_of(digest(text), config.seed, config.held_out_fraction)
        kept[split] += len(pairs)
        come[split] += num_pairs
        if config.method == "decompose" and config.rest == "drop":
            assert sorted(pairs) == list(range(num_pairs - num_pairs % config.min_bucket_tokens))
            dropped["remainder" if pairs else "short_document"] += num_pairs - len(pairs)
        elif config.method in ("decompose", "best_fit"):
            assert len(pairs) == num_pairs, "nothing is lost"
    if config.method == "decompose" and config.rest == "drop":
        whole = sum(bool(text) and not pairs for text, pairs in zip(texts, covered, strict=True))
        assert sum(books.dropped_documents.total() for books in ledger.splits.values()) == whole
    for split, books in ledger.splits.items():
        assert books.tokens == come[split]
        assert books.filler_tokens == filler[split]
        assert books.sequence_tokens() == kept[split] + filler[split]
    lost = sum((books.dropped_tokens for books in ledger.splits.values()), Counter())
    if config.method.startswith("concat"):
        assert lost.total() == come.total() - kept.total()
        assert lost.total() < 2 * config.max_bucket_tokens
    else:
        assert +lost == +dropped
    assert [targets[token] for token in range(manifest.vocab_size)] == manifest.unigram().tolist()


DOCUMENTS = st.lists(
    st.one_of(
        st.just(""),
        st.just("a"),
        st.just("<|endoftext|>"),
        st.text(max_size=60),
        st.integers(1, 40).map(lambda times: "ring \ufffd token " * times),
    ),
    min_size=1,
    max_size=12,
)


METHODS: list[dict[str, Any]] = [
    {},
    {"cut": "random"},
    {"rest": "pack"},
    {"method": "concat"},
    {"method": "concat_masked"},
    {"method": "best_fit"},
]


@settings(max_examples=30)
@given(
    documents=DOCUMENTS, seed=st.integers(0, 100), shard_tokens=st.integers(32, 300), method=st.sampled_from(METHODS)
)
def test_every_token_is_where_the_ledger_says(
    documents: list[str], seed: int, shard_tokens: int, method: dict[str, Any], tokenizer_file: Path
):
    # The last documents make sure that there is something to train on, and are longer than the largest bucket.
    texts = [*documents, *[f"the ring turns a token home {number} " * 20 for number in range(12)]]
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "documents.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config = DataConfig(
            directory=f"{temporary}/prepared",
            source=SourceConfig(kind="json", path=str(source)),
            tokenizer=TokenizerConfig(path=str(tokenizer_file)),
            min_bucket_tokens=8,
            max_bucket_tokens=32,
            held_out_fraction=0.3,
            max_bad_fraction=1.0,
            shard_tokens=shard_tokens,
            seed=seed,
            **method,
        )
        prepare(config, Console(quiet=True))
        manifest = open_prepared(config.directory)
        list(manifest.verify())
        check_prepared(manifest, config, texts, expected_streams(texts, tokenizer_file))
        assert all(manifest.shards["sequences"] * manifest.shards["length"] <= shard_tokens)
        assert manifest.has_boundaries == (
            method.get("rest") == "pack" or method.get("method") in ("concat_masked", "best_fit")
        )


@pytest.mark.parametrize("workers", by_lane([1, 3], quick=[]))
def test_processes_make_the_same_bytes(
    make_config: MakeConfig, words: Words, console: Console, tmp_path: Path, workers: int
):
    """Two sources in many files, prepared by 1 or 3 processes: input shard and number identify every record."""
    texts = [words(30 + 3 * number, number) for number in range(60)]
    for part in range(6):
        for name, kept in (("a", texts[part * 6 : part * 6 + 6]), ("b", texts[36 + part * 4 : 40 + part * 4])):
            (tmp_path / name).mkdir(exist_ok=True)
            lines = "".join(json.dumps({"text": text}) + "\n" for text in kept)
            (tmp_path / name / f"{part}.jsonl").write_text(lines)
    sources = {name: SourceConfig(kind="json", path=str(tmp_path / name)) for name in "ab"}
    config = replace(make_config([]), source=SourceConfig(), sources=sources, input_shard_bytes=8_000)
    manifest = prepare(config, console, workers=workers)
    assert all(1 < count < 6 for count in manifest.sources.values())
    reference = replace(config, directory=str(tmp_path / "reference"))
    prepare(reference, console, workers=2)
    assert tree(config.directory) == tree(reference.directory)
    inputs = [json.loads(line) for line in Path(config.directory, "inputs.jsonl").read_text().splitlines()]
    tokenizer = manifest.tokenizer().tokenizer
    for bucket in manifest.buckets("train"):
        first = 0
        for part in bucket.parts:
            rows = manifest.reader(bucket)
            for number in range(first, first + part.sequences):
                [[input_shard, record, _, _]] = rows.pieces([number])[0].tolist()
                entry = inputs[input_shard]
                assert entry["source"] == part.source
                lines = [line for file in entry["files"] for line in Path(file).read_text().splitlines()]
                text = tokenizer.decode([token for token in rows.read([number])[0].tolist() if token])
                assert text.strip("\ufffd") in json.loads(lines[record])["text"]
            first += part.sequences


def test_documents_tokenized_already_become_the_same_sequences(
    make_config: MakeConfig, words: Words, console: Console, tmp_path: Path, tokenizer_file: Path
):
    texts = [words(30 + number, number) for number in range(20)]
    config = make_config(texts, held_out_fraction=0.0)
    prepare(config, console)
    streams = expected_streams(texts, tokenizer_file)
    lines = "".join(json.dumps({"ids": stream[1:]}) + "\n" for stream in streams)
    (tmp_path / "ids.jsonl").write_text(lines)
    given = SourceConfig(kind="json", path=str(tmp_path / "ids.jsonl"), tokens_field="ids")
    again = prepare(replace(config, source=given, directory=str(tmp_path / "given")), console)
    shards = {name: content for name, content in tree(config.directory).items() if name.endswith(".tar")}
    assert shards == {name: content for name, content in tree(tmp_path / "given").items() if name.endswith(".tar")}
    assert again.ledger.tokens == sum(len(stream) - 1 for stream in streams)


@pytest.mark.parametrize("rest", ["drop", "pack"])
def test_webdataset_reads_the_same_sequences(make_config: MakeConfig, words: Words, console: Console, rest: str):
    config = make_config([words(60 + 9 * number, number) for number in range(40)], rest=rest)
    manifest = prepare(config, console)
    for split in SPLITS:
        assert len(manifest.buckets(split)[-1].shards) > 1
        for bucket in manifest.buckets(split):
            urls = [f"{config.directory}/{shard_name(shard).path()}" for shard in bucket.shards]
            samples: list[Any] = [*WebDataset(urls, shardshuffle=False, empty_check=False).decode()]  # type: ignore[misc]
            reader = manifest.reader(bucket)
            everything = np.arange(bucket.sequences)
            assert np.array_equal(np.concatenate([s["tokens.npy"] for s in samples]), reader.read(everything))
            assert {s["tokens.npy"].dtype for s in samples} == {np.dtype("uint16")}
            pieces = [
                documents
                for sample in samples
                for documents in np.split(sample["documents.npy"], sample["rows.npy"][1:-1])
            ]
            expected = reader.pieces(everything)
            assert [one.tolist() for one in pieces] == [one[:, 1:].tolist() for one in expected]


def test_trained_tokenizer_and_bytes_are_reproducible(
    make_config: MakeConfig, words: Words, console: Console, tmp_path: Path
):
    tokenizer = TokenizerConfig(vocab_size=290)
    config = make_config([words(100 + number, number) for number in range(20)], tokenizer=tokenizer)
    prepare(config, console)
    prepare(replace(config, directory=str(tmp_path / "again")), console)
    first = tree(config.directory)
    assert first == tree(tmp_path / "again")
    assert sum(name.endswith(".tar") for name in first) > 5
    assert open_prepared(config.directory).vocab_size == 290


def test_tokenizer_never_sees_held_out_documents(make_config: MakeConfig, words: Words, console: Console):
    texts = [f"{words(50)} {number}" for number in range(40)]
    for number, text in enumerate(texts):
        if split_of(digest(strange := text + " zqzqzqzq" * 50), 0, 0.3) == "held_out":
            texts[number] = strange
    assert sum("zq" in text for text in texts) > 5
    config = make_config(texts, tokenizer=TokenizerConfig(vocab_size=400))
    manifest = prepare(config, console)
    assert not any("zq" in token for token in manifest.tokenizer().tokenizer.get_vocab())


def test_a_tokenizer_is_trained_on_no_more_than_asked(make_config: MakeConfig, words: Words, console: Console):
    texts = [words(50)] * 10 + ["zqzqzqzq " * 50] * 30
    tokenizer = TokenizerConfig(vocab_size=400, training_characters=len(texts[0]) * 3)
    manifest = prepare(make_config(texts, tokenizer=tokenizer, held_out_fraction=0.0), console)
    assert not any("zq" in token for token in manifest.tokenizer().tokenizer.get_vocab())


def test_identical_settings_are_reused_without_reading(make_config: MakeConfig, words: Words, tmp_path: Path):
    console = Console(width=200, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    config = make_config([words(200)] * 9)
    first = prepare(config, console)
    Path(config.source.path).unlink()
    before = tree(config.directory)
    assert prepare(config, console).files == first.files
    assert tree(config.directory) == before
    assert "already prepared" in console.export_text()


def test_other_settings_are_refused_with_key_and_values(make_config: MakeConfig, words: Words, console: Console):
    config = make_config([words(200)] * 9)
    prepare(config, console)
    before = tree(config.directory)
    for changed, message in [
        (replace(config, max_bucket_tokens=64), r"data\.max_bucket_tokens = 64: .* was made with 32; set it back"),
        (
            replace(config, source=replace(config.source, limit_documents=3)),
            r"data\.source\.limit_documents = 3: .* was made with 0; set it back",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(changed, console)
    assert tree(config.directory) == before


def test_moved_data_is_still_the_same(make_config: MakeConfig, words: Words, console: Console, tmp_path: Path):
    config = make_config([words(200)] * 9)
    first = prepare(config, console)
    Path(config.directory).rename(tmp_path / "moved")
    assert prepare(replace(config, directory=str(tmp_path / "moved")), console).files == first.files


def test_a_directory_with_other_things_is_left_alone(make_config: MakeConfig, words: Words, console: Console):
    config = make_config([words(200)] * 9)
    Path(config.directory).mkdir()
    prepare(config, console)  # an empty directory may be filled
    Path(config.directory, "manifest.json").unlink()
    with pytest.raises(ValueError, match="prepared: exists and is not prepared data"):
        prepare(config, console)


@pytest.mark.parametrize("texts", [[], ["", ""], ["short"] * 20])
def test_nothing_to_train_on(make_config: MakeConfig, console: Console, tmp_path: Path, texts: list[str]):
    config = make_config(texts)
    documents = sum(map(bool, texts))
    with pytest.raises(ValueError, match=rf"data\.min_bucket_tokens = 8: {documents} documents .* no training"):
        prepare(config, console)
    assert entries(tmp_path) == ["documents.jsonl"]


def test_all_held_out_is_nothing_to_train_on(make_config: MakeConfig, words: Words, console: Console):
    text = words(100)
    number = next(seed for seed in range(100) if split_of(digest(text), seed, 0.3) == "held_out")
    with pytest.raises(ValueError, match="no training sequence"):
        prepare(make_config([text], seed=number), console)


def test_too_many_bad_records_leave_nothing(make_config: MakeConfig, words: Words, console: Console, tmp_path: Path):
    config = make_config([words(200), "", ""], max_bad_fraction=0.5)
    with pytest.raises(ValueError, match=r"2 of 3 records of source 'documents' are bad \(2 empty\)"):
        prepare(config, console)
    assert entries(tmp_path) == ["documents.jsonl"]


def test_a_remote_directory_is_not_prepared(make_config: MakeConfig, words: Words, console: Console, tmp_path: Path):
    config = make_config([words(200)] * 2, directory="memory://prepared-there/data")
    advice = "prepare in a local directory, then copy it there"
    with pytest.raises(ValueError, match=rf"data\.directory = {config.directory}: is remote; {advice}"):
        prepare(config, console)
    local = prepare(replace(config, directory=str(tmp_path / "prepared")), console)
    fsspec.filesystem("memory").put(str(tmp_path / "prepared"), config.directory, recursive=True)
    remote = open_prepared(config.directory, LoaderConfig(cache_directory=str(tmp_path / "cache")))
    assert remote.files == local.files
