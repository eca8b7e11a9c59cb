"""Odd documents: whatever a text is, its prepared tokens decode to it, and a cut inside a word is counted and named."""

import io
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.format.document import NO_DOCUMENT
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.format.spans import SPAN_CHARACTERS
from longring.data.inspect.ledger import print_ledgers
from longring.data.prepare import progress as progress_module
from longring.data.prepare import train_tokenizer as module
from longring.data.prepare.merge import ledger_file
from longring.data.prepare.prepare import prepare
from longring.data.prepare.progress import progress_file, shown
from longring.data.prepare.train_tokenizer import TRAINING_CHARACTERS, train_tokenizer
from rich.console import Console
from rich.progress import Progress

MakeConfig = Callable[..., DataConfig]
DRAW = random.Random(14)
WORD = "".join(DRAW.choices("abcdefghijklmnopqrstuvwxyz", k=3 * SPAN_CHARACTERS))
ODD = {
    "a word of many letters": WORD,
    "one repeated character": "a" * (2 * SPAN_CHARACTERS + 5),
    "one repeated character after a sentence": "the ring " + "-" * (2 * SPAN_CHARACTERS),
    "spaces": " " * (2 * SPAN_CHARACTERS),
    "lines": "\r\n" * SPAN_CHARACTERS,
    "random bytes": DRAW.randbytes(2 * SPAN_CHARACTERS).decode("latin-1"),
    "nothing but zero bytes": "\x00" * (SPAN_CHARACTERS + 1),
    "combining marks": "e" + "\u0301\u0323" * SPAN_CHARACTERS,
    "right to left": "\u202e\u05d0\u05d1 \u0645\u0631\u062d " * (SPAN_CHARACTERS // 7),
    "emoji joined": "\U0001f469\u200d" * SPAN_CHARACTERS,
    "byte order marks": "\ufeff" * (SPAN_CHARACTERS + 9),
    "ordinary": "the ring turns a token home\n" * (SPAN_CHARACTERS // 9),
}


def texts_of(manifest: Manifest) -> dict[int, str]:
    """Return the text of each record, decoded from its prepared sequences."""
    parts: dict[int, list[tuple[int, np.ndarray]]] = {}
    for split in ("train", "held_out"):
        for bucket in manifest.buckets(split):
            reader = manifest.reader(bucket)
            rows, origins = reader.read(range(bucket.sequences)), reader.pieces(range(bucket.sequences))
            for row, origin in zip(rows, origins, strict=True):
                ends = [*origin[1:, 3].tolist(), bucket.length]
                for (_, record, offset, start), end in zip(origin.tolist(), ends, strict=True):
                    parts.setdefault(record, []).append((offset, row[start + 1 : end + 1]))
    tokenizer = manifest.tokenizer().tokenizer
    texts = {}
    for record, found in parts.items():
        if record == NO_DOCUMENT:
            continue
        found.sort(key=lambda part: part[0])
        ids = np.concatenate([targets for _, targets in found])  # x1 ... xn and the boundary
        assert [offset for offset, _ in found] == np.cumsum([0, *(len(targets) for _, targets in found[:-1])]).tolist()
        assert ids[-1] == manifest.boundary_id
        texts[record] = tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False)
    return texts


def note(manifest: Manifest) -> str:
    console = Console(width=1_000, record=True, file=io.StringIO())
    print_ledgers(manifest, console)
    return console.export_text()


@pytest.mark.parametrize("name", ODD)
def test_an_odd_document_comes_back_and_its_cuts_are_named(make_config: MakeConfig, console: Console, name: str):
    config = make_config(["first", ODD[name]], rest="pack", max_bucket_tokens=1024, shard_tokens=2**20)
    for again in range(3):
        manifest = prepare(config, console)
        assert texts_of(manifest)[1] == ODD[name]
        cuts = manifest.ledger.word_cuts
        words = note(manifest)
        if name in ("ordinary", "right to left", "random bytes"):  # white space is never far
            assert cuts == 0
            assert "cuts inside words" not in words
        else:
            long = len(ODD[name]) - 9 * ("sentence" in name)
            assert cuts >= (long - 1) // SPAN_CHARACTERS
            assert (
                f"{cuts:,} cuts inside words too long to tokenize as a whole, first at {config.source.path}:2, byte"
                in words
            )
        if again == 0:
            for shard in list(Path(config.directory).glob("shards/*/*.tar"))[:1]:
                shard.unlink()  # the second start makes it again, the third finds it


def test_a_cut_is_named_by_the_byte_of_its_text(make_config: MakeConfig, console: Console):
    """The word begins at byte 11; the first span ends before it, and each cut after that is inside it."""
    text = "ä\u4e16 spaces " + WORD
    manifest = prepare(make_config([text], max_bucket_tokens=1024, shard_tokens=2**20, held_out_fraction=0.0), console)
    assert manifest.ledger.word_cuts == 3
    named = [int(example.rpartition(" ")[2].replace(",", "")) for example in manifest.ledger.word_cut_examples]
    start = len("ä\u4e16 spaces".encode())
    for number, byte in enumerate(named, start=1):
        assert start + number * SPAN_CHARACTERS - 64 <= byte <= start + number * SPAN_CHARACTERS + 1


def test_many_cuts_of_many_documents_are_all_counted(make_config: MakeConfig, console: Console):
    config = make_config(
        [f"{number} {WORD}" for number in range(5)], max_bucket_tokens=1024, shard_tokens=2**20, input_shard_bytes=1
    )
    ledger = prepare(config, console).ledger
    assert ledger.word_cuts == 15
    assert len(ledger.word_cut_examples) == 3
    assert open_prepared(config.directory).ledger == ledger


TEXT = st.one_of(
    st.text(max_size=80),
    st.sampled_from(["\x00", "\ufeff", "\r\n", "\u0301", "\u202e", "\u2028", "<|endoftext|>", "\U0001f469\u200d"]),
    st.tuples(st.text(min_size=1, max_size=2), st.integers(1, 300)).map(lambda drawn: drawn[0] * drawn[1]),
)


@settings(max_examples=25)
@given(texts=st.lists(st.lists(TEXT, min_size=1, max_size=6).map("".join), min_size=1, max_size=5))
def test_any_texts_come_back_and_the_counts_add_up(texts: list[str], tokenizer_file: Path):
    """Spans of 50 characters, so that hypothesis' texts are long ones."""
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setattr("longring.data.format.tokenizer.SPAN_CHARACTERS", 50)
        source = Path(temporary, "documents.jsonl")
        texts = [*texts, "the ring turns a token home " * 9]
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config = DataConfig(
            directory=f"{temporary}/prepared",
            source=SourceConfig(kind="json", path=str(source)),
            tokenizer=TokenizerConfig(path=str(tokenizer_file)),
            rest="pack",
            min_bucket_tokens=8,
            max_bucket_tokens=32,
            held_out_fraction=0.0,
            max_bad_fraction=1.0,
        )
        manifest = prepare(config, Console(quiet=True))
        expected = {number: text for number, text in enumerate(texts) if text}
        assert texts_of(manifest) == expected
        ledger = manifest.ledger
        assert (ledger.records, ledger.documents) == (len(texts), len(expected))
        ledger.check()
        assert ledger.word_cuts >= sum(len(text) > 50 and not any(map(str.isspace, text)) for text in texts)


def test_a_lone_surrogate_and_a_long_number_are_bad_records(make_config: MakeConfig, console: Console):
    config = make_config([], held_out_fraction=0.0)
    lines = [b'{"text": "one"}', b'{"text": "' + b"x" * 2_000_000 + b'\\ud800"}', b'{"text": ' + b"1" * 5_000 + b"}"]
    Path(config.source.path).write_bytes(b"\n".join([*lines, b'{"text": "' + b"the ring " * 50 + b'"}\n']))
    bad = prepare(config, console).ledger.bad
    assert bad.counts == {"invalid_utf8": 1, "broken_json": 1}
    assert bad.examples["invalid_utf8"] == [f"{config.source.path}:2: a lone surrogate at character 2000000"]


def test_a_tokenizer_is_trained_on_long_words():
    """Words of ordinary text are counted as before; a longer one is cut, and any text still comes back."""
    ordinary = "the ring turns a token home\n\n  and  x = 12 ; " * 400
    assert len(ordinary) > 4 * TRAINING_CHARACTERS
    config = TokenizerConfig(vocab_size=290)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TRAINING_CHARACTERS", len(ordinary))
        whole = train_tokenizer([ordinary], config)
    assert train_tokenizer([ordinary], config) == whole
    train_tokenizer([WORD, "a" * 10**6, " " * 10**6], TokenizerConfig(vocab_size=400))


def test_the_last_counts_of_an_input_shard_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It ends while it is looked at: what it has written last counts at the next look."""
    reported, file, ledger = progress_module._reported, progress_file(tmp_path, 0), ledger_file(tmp_path, 0)

    def reported_before_its_end(read: Path):
        found = reported(read)
        file.write_text("9 900 ")
        ledger.touch()
        return found

    for path in (file, ledger):
        path.parent.mkdir(parents=True)
    file.write_text("5 700 corpus/a.jsonl:6")
    monkeypatch.setattr(progress_module, "_reported", reported_before_its_end)
    with Progress(disable=True) as bar:
        with shown(tmp_path, [0], 1, bar):
            time.sleep(0.5)
        assert bar.tasks[0].fields["line"].startswith("9 documents  900 tokens")


def test_a_document_without_progress_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The document that the tokenizer is at stays the same for longer than SLOW_SECONDS: it is named once."""
    monkeypatch.setattr(progress_module, "SLOW_SECONDS", 0)
    file = progress_file(tmp_path, 0)
    file.parent.mkdir(parents=True)
    file.write_text("5 700 corpus/a b.jsonl:6, byte 65,536")
    console = Console(width=200, record=True, file=io.StringIO())
    with Progress(console=console) as bar, shown(tmp_path, [0], 1, bar):
        for _ in range(200):
            if "no progress" in console.export_text(clear=False):
                break
            time.sleep(0.05)
    named = "no progress for 0 s at corpus/a b.jsonl:6, byte 65,536 or soon after it; if there is none for 600 s"
    assert console.export_text().count(named) == 1
