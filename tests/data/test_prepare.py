import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data import prepare as prepare_module
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.decompose import split_of
from longring.data.manifest import Manifest, open_prepared
from longring.data.prepare import prepare
from rich.console import Console
from tokenizers import Tokenizer

MakeConfig = Callable[..., DataConfig]
Words = Callable[..., str]


def tree(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def expected_streams(texts: list[str], tokenizer_file: Path) -> list[list[int]]:
    """B x1 ... xn B of every document, by the tokenizer's own one-at-a-time interface."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.encode_special_tokens = True
    return [[0, *tokenizer.encode(text).ids, 0] for text in texts]


def check_prepared(directory: Path, manifest: Manifest, config: DataConfig, streams: list[list[int]]) -> None:
    """Rebuild every document from the shards: each pair once, in one split, the ledger saying the same."""
    covered: list[Counter[int]] = [Counter() for _ in streams]
    targets: Counter[int] = Counter()
    for split, buckets in manifest.splits.items():
        for bucket in buckets:
            reader = manifest.reader(directory, bucket)
            rows, origins = reader.read(range(bucket.sequences)), reader.documents(range(bucket.sequences))
            assert rows.shape == (bucket.sequences, bucket.length + 1)
            for row, (document, offset) in zip(rows.tolist(), origins.tolist(), strict=True):
                assert row == streams[document][offset : offset + bucket.length + 1]
                assert split_of(document, config.seed, config.held_out_fraction) == split
                covered[document].update(range(offset, offset + bucket.length))
                if split == "train":
                    targets.update(row[1:])
    ledger = manifest.ledger
    assert ledger.documents_in == len(streams)
    kept = {"train": 0, "held_out": 0}
    dropped = {"empty": 0, "shorter_than_min_bucket": 0}
    for document, (stream, pairs) in enumerate(zip(streams, covered, strict=True)):
        num_pairs = 0 if len(stream) == 2 else len(stream) - 1
        assert set(pairs.values()) <= {1}
        assert sorted(pairs) == list(range(num_pairs - num_pairs % config.min_bucket_tokens))
        kept[split_of(document, config.seed, config.held_out_fraction)] += len(pairs)
        dropped["shorter_than_min_bucket"] += num_pairs - len(pairs)
    assert {split: books.sequence_tokens() for split, books in ledger.splits.items()} == kept
    assert sum((books.dropped_tokens for books in ledger.splits.values()), Counter()) == +Counter(dropped)
    assert ledger.tokens_in == sum(kept.values()) + sum(dropped.values())
    empty = sum(books.dropped_documents["empty"] for books in ledger.splits.values())
    assert empty == sum(len(stream) == 2 for stream in streams)
    assert [targets[token] for token in range(manifest.vocab_size)] == manifest.unigram(directory).tolist()


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


@settings(max_examples=25, deadline=None)
@given(documents=DOCUMENTS, seed=st.integers(0, 100), shard_tokens=st.integers(32, 300))
def test_every_token_is_where_the_ledger_says(documents: list[str], seed: int, shard_tokens: int, tokenizer_file: Path):
    # The last document makes sure that there is something to train on, and is longer than the largest bucket.
    texts = [*documents, *["the ring turns a token home " * 20] * 12]
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
            shard_tokens=shard_tokens,
            seed=seed,
        )
        made = prepare(config, Console(quiet=True))
        manifest = open_prepared(config.directory)
        assert manifest == made
        manifest.verify(Path(config.directory))
        check_prepared(Path(config.directory), manifest, config, expected_streams(texts, tokenizer_file))
        assert manifest.ledger.replaced_documents == sum("\ufffd" in text for text in texts)
        assert all(
            sum(block.rows for block in shard.blocks) * bucket.length <= shard_tokens
            for buckets in manifest.splits.values()
            for bucket in buckets
            for shard in bucket.shards
        )


def test_webdataset_reads_the_same_sequences(make_config: MakeConfig, words: Words, console: Console):
    config = make_config([words(60 + 9 * number, number) for number in range(30)])
    manifest = prepare(config, console)
    directory = Path(config.directory)
    assert all(len(buckets[-1].shards) > 1 for buckets in manifest.splits.values())
    for buckets in manifest.splits.values():
        for bucket in buckets:
            urls = [str(directory / shard.file) for shard in bucket.shards]
            samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
            reader = manifest.reader(directory, bucket)
            everything = np.arange(bucket.sequences)
            assert np.array_equal(np.concatenate([s["tokens.npy"] for s in samples]), reader.read(everything))
            assert np.array_equal(np.concatenate([s["documents.npy"] for s in samples]), reader.documents(everything))
            assert {s["tokens.npy"].dtype for s in samples} == {np.dtype("uint16")}


def test_trained_tokenizer_and_bytes_are_reproducible(
    make_config: MakeConfig, words: Words, console: Console, tmp_path: Path
):
    tokenizer = TokenizerConfig(vocab_size=290)
    config = make_config([words(100 + number, number) for number in range(20)], tokenizer=tokenizer)
    prepare(config, console)
    prepare(replace(config, directory=str(tmp_path / "again")), console)
    first = tree(Path(config.directory))
    assert first == tree(tmp_path / "again")
    assert sum(name.endswith(".tar") for name in first) > 10
    assert open_prepared(config.directory).vocab_size == 290


def test_tokenizer_never_sees_held_out_documents(make_config: MakeConfig, words: Words, console: Console):
    texts = [words(50)] * 40
    held_out = [number for number in range(40) if split_of(number, 0, 0.3) == "held_out"]
    for number in held_out:
        texts[number] = "zqzqzqzq " * 50
    config = make_config(texts, tokenizer=TokenizerConfig(vocab_size=400))
    manifest = prepare(config, console)
    assert not any("zq" in token for token in manifest.tokenizer(Path(config.directory)).tokenizer.get_vocab())


def test_identical_settings_are_reused_without_reading(make_config: MakeConfig, words: Words, tmp_path: Path):
    console = Console(width=200, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    config = make_config([words(200)] * 9)
    first = prepare(config, console)
    Path(config.source.path).unlink()
    before = tree(Path(config.directory))
    assert prepare(config, console) == first
    assert tree(Path(config.directory)) == before
    assert "already prepared" in console.export_text()


def test_other_settings_are_refused_with_key_and_values(make_config: MakeConfig, words: Words, console: Console):
    config = make_config([words(200)] * 9)
    prepare(config, console)
    before = tree(Path(config.directory))
    for changed, message in [
        (replace(config, max_bucket_tokens=64), "data.max_bucket_tokens = 32, not 64"),
        (replace(config, source=replace(config.source, limit_documents=3)), "data.source.limit_documents = 0, not 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(changed, console)
    assert tree(Path(config.directory)) == before


def test_moved_data_is_still_the_same(make_config: MakeConfig, words: Words, console: Console, tmp_path: Path):
    config = make_config([words(200)] * 9)
    first = prepare(config, console)
    Path(config.directory).rename(tmp_path / "moved")
    assert prepare(replace(config, directory=str(tmp_path / "moved")), console) == first


def test_a_directory_with_other_things_is_left_alone(make_config: MakeConfig, words: Words, console: Console):
    config = make_config([words(200)] * 9)
    Path(config.directory).mkdir()
    prepare(config, console)  # an empty directory may be filled
    Path(config.directory, "manifest.json").unlink()
    with pytest.raises(ValueError, match="prepared exists and is not prepared data"):
        prepare(config, console)


@pytest.mark.parametrize("texts", [[], ["", ""], ["short"] * 20])
def test_nothing_to_train_on(make_config: MakeConfig, console: Console, tmp_path: Path, texts: list[str]):
    config = make_config(texts)
    with pytest.raises(ValueError, match=rf"{len(texts)} documents .* data\.min_bucket_tokens = 8"):
        prepare(config, console)
    assert entries(tmp_path) == ["documents.jsonl"]


def test_all_held_out_is_nothing_to_train_on(make_config: MakeConfig, words: Words, console: Console):
    number = next(seed for seed in range(100) if split_of(0, seed, 0.3) == "held_out")
    with pytest.raises(ValueError, match="not one training"):
        prepare(make_config([words(100)], seed=number), console)


def test_a_document_that_breaks_midway_leaves_nothing(
    make_config: MakeConfig, words: Words, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # A million characters are encoded together: the first of them are in shards when the second file breaks.
    texts = [words(300, number) for number in range(800)]
    config = make_config(texts, max_bucket_tokens=512, shard_tokens=1_024)
    (tmp_path / "e.jsonl").write_text('{"text": "fine"}\n{"text": 12}\n')
    config = replace(config, source=replace(config.source, path=str(tmp_path / "*.jsonl")))
    removed: list[int] = []

    def remove(partial: Path, **options: bool) -> None:
        removed.append(len(list(partial.rglob("*.tar"))))
        rmtree(partial, **options)

    rmtree = prepare_module.shutil.rmtree
    monkeypatch.setattr(prepare_module.shutil, "rmtree", remove)
    with pytest.raises(ValueError, match=r"e\.jsonl.*row 2"):
        prepare(config, console)
    assert entries(tmp_path) == ["documents.jsonl", "e.jsonl"]
    assert removed[0] > 100


@pytest.fixture
def full_disk():
    """Let the system refuse to grow any file beyond 40,000 bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_old_data_good(
    make_config: MakeConfig, words: Words, console: Console, tmp_path: Path, request: pytest.FixtureRequest
):
    config = make_config([words(300, number) for number in range(300)], shard_tokens=2**20)
    small = replace(config, directory=str(tmp_path / "old"), source=replace(config.source, limit_documents=9))
    prepare(small, console)
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="File too large"):
        prepare(config, console)
    assert entries(tmp_path) == ["documents.jsonl", "old"]
    open_prepared(small.directory).verify(tmp_path / "old")


def test_an_interrupt_before_the_rename_leaves_nothing(
    make_config: MakeConfig, words: Words, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(path: Path) -> None:
        assert ".partial-" in str(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "_sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(make_config([words(200)] * 9), console)
    assert entries(tmp_path) == ["documents.jsonl"]


def test_what_dead_processes_left_is_removed(make_config: MakeConfig, words: Words, console: Console, tmp_path: Path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    host = socket.gethostname()
    dead = f"prepared.partial-{host}-{child.pid}"
    alive, elsewhere = f"prepared.partial-{host}-{os.getppid()}", f"prepared.partial-other-{child.pid}"
    for name in (dead, alive, elsewhere):
        (tmp_path / name / "train").mkdir(parents=True)
    prepare(make_config([words(200)] * 9), console)
    assert entries(tmp_path) == sorted(["documents.jsonl", "prepared", alive, elsewhere])
