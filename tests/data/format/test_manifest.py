import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from longring.data.config import DataConfig, LoaderConfig, SourceConfig
from longring.data.curriculum_config import CurriculumConfig
from longring.data.files import sha256_of
from longring.data.format.document import BadKind, BadRecord, BadRecords
from longring.data.format.ledger import Ledger
from longring.data.format.manifest import open_prepared
from longring.data.format.shards import shard_name
from longring.data.inspect.cost import PAPER_1B, ModelSize, attention_share, speed_up
from longring.data.inspect.inspect import average_context, inspect
from longring.data.prepare.prepare import prepare
from rich.console import Console


@pytest.fixture
def prepared(make_config: Callable[..., DataConfig], words: Callable[..., str], console: Console) -> Path:
    config = make_config([words(150 + number, number) for number in range(12)])
    prepare(config, console)
    return Path(config.directory)


def shard_of(directory: Path) -> Path:
    return min(directory.glob("shards/*/train*.tar"))


def refusal(directory: Path) -> str:
    with pytest.raises(ValueError, match="run `longring prepare RECIPE") as error:
        list(open_prepared(directory).verify())
    return str(error.value)


def test_load_gives_what_was_written(prepared: Path):
    manifest = open_prepared(prepared)
    before = (prepared / "manifest.json").read_bytes()
    manifest.write(prepared)
    assert (prepared / "manifest.json").read_bytes() == before
    assert list(manifest.verify())[-1] == sum(file.stat().st_size for file in prepared.rglob("*.tar"))


def test_the_table_is_every_shard_and_the_manifest_does_not_grow(prepared: Path):
    manifest = open_prepared(prepared)
    names = {shard_name(entry).path() for entry in manifest.shards}
    assert names == {str(file.relative_to(prepared)) for file in prepared.rglob("*.tar")}
    assert len(names) > 10
    assert (prepared / "shards.npy").stat().st_size <= 1_000 + 113 * len(names)
    assert (prepared / "manifest.json").stat().st_size < 5_000


def test_inputs_name_what_every_input_shard_read(prepared: Path):
    [line] = (prepared / "inputs.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["source"] == "documents"
    assert [Path(file).name for file in entry["files"]] == ["documents.jsonl"]
    ledger = open_prepared(prepared).ledger
    assert (entry["records"], entry["documents"], entry["tokens"]) == (12, 12, ledger.tokens)


def test_missing_shard(prepared: Path):
    shard = shard_of(prepared)
    size = shard.stat().st_size
    shard.unlink()
    assert f"{shard}: missing, {size} bytes" in refusal(prepared)


def test_truncated_shard(prepared: Path):
    shard = shard_of(prepared)
    size, expected = shard.stat().st_size, sha256_of(shard)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="SHA-256") as error:
        open_prepared(prepared)
    found = f"{size - 100} bytes with SHA-256 {sha256_of(shard)}"
    assert f"{shard}: {found}, {size} bytes with SHA-256 {expected} in the manifest" in str(error.value)


def test_one_changed_bit_is_found_by_verify(prepared: Path):
    shard = shard_of(prepared)
    content = bytearray(shard.read_bytes())
    content[3_000] ^= 1
    shard.write_bytes(content)
    expected = next(
        entry["sha256"].decode()
        for entry in open_prepared(prepared).shards
        if shard_name(entry).path() == str(shard.relative_to(prepared))
    )
    assert f"{shard}: SHA-256 is {sha256_of(shard)}, {expected} in the manifest; run `longring" in refusal(prepared)


@pytest.mark.parametrize("name", ["tokenizer.json", "unigram.npy", "shards.npy", "inputs.jsonl"])
def test_another_file_beside_the_manifest(prepared: Path, name: str):
    file = prepared / name
    expected = sha256_of(file)
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    with pytest.raises(ValueError, match="SHA-256") as error:
        open_prepared(prepared)
    assert f"{file}: SHA-256 is {sha256_of(file)}, {expected} in the manifest; delete {prepared}" in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "unigram.npy", "shards.npy", "inputs.jsonl", "manifest.json"])
def test_missing_file(prepared: Path, name: str):
    (prepared / name).unlink()
    assert str(prepared / name) in refusal(prepared)


def test_another_format_version(prepared: Path):
    file = prepared / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    assert f"{file}: format_version = 99, and this LongRing reads version 3" in refusal(prepared)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 2}', '{"format_version": 3}'])
def test_damaged_manifest(prepared: Path, content: str):
    (prepared / "manifest.json").write_text(content)
    assert f"{prepared / 'manifest.json'}: damaged" in refusal(prepared)


def test_ledger_that_does_not_add_up_is_our_own_mistake(prepared: Path):
    ledger = open_prepared(prepared).ledger
    ledger.check()
    train = ledger.splits["train"]
    wrong_accounts = (
        replace(train, tokens=train.tokens + 1),
        replace(train, documents=train.documents - 1),
        replace(train, sequences=Counter({8: 1})),
        replace(train, filler_tokens=1),
        replace(train, document_lengths=Counter()),
    )
    for wrong in (
        replace(ledger, records=ledger.records + 1),
        replace(ledger, bad=BadRecords(counts=Counter[BadKind](["empty"]))),
        *(replace(ledger, splits={**ledger.splits, "train": account}) for account in wrong_accounts),
    ):
        with pytest.raises(AssertionError):
            wrong.check()
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


def test_ledgers_add_up():
    one, two = Ledger(records=3), Ledger(records=4)
    for ledger, tokens in ((one, 5), (two, 70)):
        ledger.splits["train"].enter(tokens)
        ledger.splits["train"].drop("short_document", tokens, whole=True)
        for name in "abc":
            ledger.bad.enter(f"{name}{tokens}", BadRecord("empty", ""))
    two.splits["held_out"].enter(8)
    one.add(two)
    assert (one.records, one.documents, one.tokens) == (7, 3, 83)
    assert one.splits["train"].dropped_tokens == {"short_document": 75}
    assert one.splits["train"].dropped_documents == {"short_document": 2}
    assert one.splits["held_out"].document_lengths == {3: 1}
    assert one.bad.counts == {"empty": 6}
    assert one.bad.examples == {"empty": ["a5", "b5", "c5"]}


@pytest.mark.parametrize("width", [80, 100])
def test_inspect_fits_a_terminal_and_shows_the_ledger(prepared: Path, width: int):
    console = Console(width=width, record=True, file=(prepared.parent / "screen").open("w"))
    manifest = open_prepared(prepared)
    options = {"curriculum": CurriculumConfig(cycles=2), "loader": LoaderConfig(), "steps": 200, "seed": 0}
    picture = inspect(manifest, console, model=PAPER_1B, **options)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= max(width, len(f"picture: {picture}"))
    assert f"{manifest.ledger.tokens:,}" in text
    train = manifest.buckets("train")
    assert all(f"{bucket.tokens:,}" in text for bucket in train)
    assert "every SHA-256 is the manifest's" in text
    assert "<|endoftext|>" in text
    lengths = [bucket.length for bucket in train for _ in range(bucket.sequences)]
    earlier = sum(position for length in lengths for position in range(length)) / sum(lengths)
    assert f"sees {earlier:,.0f} earlier tokens" in text
    assert "200 steps of grow_p2 in 2 cycles" in text
    assert "documents.jsonl" in "".join(text.split())  # a long path is cut where the line ends
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def test_average_context_of_packed_sequences(
    make_config: Callable[..., DataConfig], words: Callable[..., str], console: Console
):
    config = make_config([words(number % 23) for number in range(200)], rest="pack", min_bucket_tokens=32)
    manifest = prepare(config, console)
    [bucket] = manifest.buckets("train")
    assert bucket.sequences < 256, "all are looked at"
    seen, tokens = 0, 0
    for starts in manifest.reader(bucket).document_starts(range(bucket.sequences)):
        for first, last in zip(starts, [*starts[1:], 32], strict=True):
            seen += sum(range(last - first))
            tokens += last - first
    assert average_context(manifest, bucket) == pytest.approx(seen / tokens)
    assert seen / tokens < 12


def test_cost_is_counted_by_hand():
    """The FLOPs of one layer of width 2 with 10 parameters and 3 tokens: every matrix product of both passes."""
    model = ModelSize(name="tiny", parameters=10, num_layers=1, attention_width=2)
    visible = 1 + 2 + 3
    products = 3 * 2 * 10 * 3 + 3 * visible * (2 * 2 + 2 * 2)
    assert model.token_flops(3)[0] * 3 == products
    assert attention_share(model, [3], [3]) == pytest.approx(3 * visible * 8 / products)
    assert speed_up(model, [5, 5], [3, 3]) == 1
    short, long = model.token_flops(3)[0], model.token_flops(9)[0]
    assert speed_up(model, [30, 10], [3, 9]) == pytest.approx(40 * long / (30 * short + 10 * long))


def test_a_record_is_named_by_its_file_where_a_file_is_a_document(
    make_config: Callable[..., DataConfig], words: Callable[..., str], tmp_path: Path
):
    """A record is named also if a limit leaves later files unread."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(words(100, ord(name)))
    source = SourceConfig(kind="text", path=f"{tmp_path}/*.txt", limit_documents=2)
    manifest = prepare(make_config([], source=source, held_out_fraction=0.0), Console(quiet=True), workers=1)
    assert manifest.ledger.records == 2
    assert manifest.origin(0, 1) == f"record 1 of source 'documents', input shard 0: {tmp_path}/b.txt"
