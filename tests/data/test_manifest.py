import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from longring.data.config import DataConfig
from longring.data.inspect import inspect
from longring.data.ledger import Ledger
from longring.data.manifest import Manifest, open_prepared
from longring.data.prepare import prepare
from rich.console import Console


@pytest.fixture
def prepared(make_config: Callable[..., DataConfig], words: Callable[..., str], console: Console) -> Path:
    config = make_config([words(150 + number, number) for number in range(12)])
    prepare(config, console)
    return Path(config.directory)


def shard_of(directory: Path) -> Path:
    return next(iter(sorted(directory.glob("train/*/*.tar"))))


def refusal(directory: Path) -> str:
    with pytest.raises(ValueError, match="run longring prepare again") as error:
        open_prepared(directory).verify(directory)
    return str(error.value)


def test_load_gives_what_was_saved(prepared: Path, tmp_path: Path):
    manifest = Manifest.load(prepared)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest


def test_missing_shard(prepared: Path):
    shard = shard_of(prepared)
    size = shard.stat().st_size
    shard.unlink()
    assert f"{shard} is missing, {size} bytes" in refusal(prepared)


def test_truncated_shard(prepared: Path):
    shard = shard_of(prepared)
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard} has {size - 100} bytes, {size} in the manifest" in refusal(prepared)


def test_one_changed_bit_is_found_by_verify(prepared: Path):
    shard = shard_of(prepared)
    content = bytearray(shard.read_bytes())
    content[3_000] ^= 1
    shard.write_bytes(content)
    open_prepared(prepared)
    assert f"{shard} has SHA-256" in refusal(prepared)


def test_changed_unigram_is_found_by_verify(prepared: Path):
    file = prepared / "unigram.npy"
    file.write_bytes(file.read_bytes()[:-8] + b"\xff" * 8)
    assert f"{file} has SHA-256" in refusal(prepared)


def test_another_tokenizer(prepared: Path):
    file = prepared / "tokenizer.json"
    expected = open_prepared(prepared).tokenizer_sha256
    file.write_text(file.read_text() + " ")
    assert f"{file} has SHA-256" in (message := refusal(prepared))
    assert expected in message


@pytest.mark.parametrize("name", ["tokenizer.json", "unigram.npy", "manifest.json"])
def test_missing_file(prepared: Path, name: str):
    (prepared / name).unlink()
    assert str(prepared / name) in refusal(prepared)


def test_another_format_version(prepared: Path):
    file = prepared / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    assert f"{file} has format version 99, this LongRing reads 1" in refusal(prepared)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 1}'])
def test_damaged_manifest(prepared: Path, content: str):
    (prepared / "manifest.json").write_text(content)
    assert f"{prepared / 'manifest.json'} is damaged" in refusal(prepared)


def test_ledger_that_does_not_add_up_is_our_own_mistake(prepared: Path):
    ledger = open_prepared(prepared).ledger
    ledger.check()
    for wrong in (
        replace(ledger, tokens_in=ledger.tokens_in + 1),
        replace(ledger, documents_in=ledger.documents_in - 1),
        replace(ledger, splits={**ledger.splits, "train": replace(ledger.splits["train"], kept_documents=0)}),
        replace(ledger, splits={**ledger.splits, "train": replace(ledger.splits["train"], sequences={8: 1})}),
    ):
        with pytest.raises(AssertionError):
            wrong.check()
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


def test_inspect_fits_a_terminal_and_shows_the_books(prepared: Path):
    console = Console(width=100, record=True, file=(prepared.parent / "screen").open("w"))
    inspect(prepared, console)
    text = console.export_text()
    manifest = open_prepared(prepared)
    assert max(map(len, text.splitlines())) <= 100
    assert f"{manifest.ledger.tokens_in:,}" in text
    assert all(f"{bucket.tokens:,}" in text for bucket in manifest.splits["train"])
    assert "every SHA-256 is the manifest's" in text
    assert "<|endoftext|>" in text
    train = manifest.splits["train"]
    lengths = [bucket.length for bucket in train for _ in range(bucket.sequences)]
    earlier = sum(place for length in lengths for place in range(length)) / sum(lengths)
    assert f"sees {earlier:,.0f} earlier tokens" in text
