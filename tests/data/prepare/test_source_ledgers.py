"""The ledger by source, the length limits of a source, and data of format version 2, which had one ledger for all."""

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from longring.data.config import DataConfig, SourceConfig
from longring.data.files import sha256_of_json
from longring.data.format.document import SPLITS
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.inspect.ledger import print_ledgers
from longring.data.prepare.prepare import prepare
from rich.console import Console
from tokenizers import Tokenizer

QUIET = Console(quiet=True)
ALPHABETS = {"letters": "token ring home rank", "digits": "01 234 56 789"}


@pytest.fixture
def config(make_config: Callable[..., DataConfig], tmp_path: Path) -> DataConfig:
    """Return the settings of two sources of 60 documents each, in several input shards; they share no character."""
    for name, alphabet in ALPHABETS.items():
        (tmp_path / name).mkdir()
        words = alphabet.split()
        for part in range(3):
            texts = (" ".join(words[(n * n + part) % len(words)] for n in range(3 + 5 * k)) for k in range(20))
            lines = [json.dumps({"text": text}) + "\n" for text in texts] + ["[]\n"] * (name == "digits")
            (tmp_path / name / f"{part}.jsonl").write_text("".join(lines))
    sources = {name: SourceConfig(kind="json", path=str(tmp_path / name)) for name in ALPHABETS}
    return replace(make_config([]), source=SourceConfig(), sources=sources, input_shard_bytes=1)


def lengths(config: DataConfig, name: str) -> list[int]:
    """Return the tokens of each document of a source, its end included, by the tokenizer's own interface."""
    tokenizer = Tokenizer.from_file(config.tokenizer.path)
    files = sorted(Path(config.sources[name].path).iterdir())
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [len(tokenizer.encode(record["text"]).ids) + 1 for record in records if record]


@pytest.mark.parametrize("method", [{"rest": "pack"}, {"rest": "drop"}, {"method": "concat"}, {"method": "best_fit"}])
def test_sources_have_their_own_ledgers_rows_and_limits(config: DataConfig, method: dict[str, Any]):
    limited = replace(config.sources["digits"], min_tokens=30, max_tokens=100)
    config = replace(config, sources={**config.sources, "digits": limited}, **method)
    manifest = prepare(config, QUIET, workers=1)
    tokenizer = manifest.tokenizer().tokenizer
    for name, ledger in manifest.ledgers.items():
        ledger.check()
        found = lengths(config, name)
        kept = [count for count in found if 30 <= count <= 100] if name == "digits" else found
        assert (ledger.documents, ledger.tokens) == (len(kept), sum(kept))
        assert ledger.left_out_documents == Counter(
            [
                rule
                for count in found
                for rule, out in (
                    ("too_short", count < 30),
                    ("too_long", count > 100),
                )
                if name == "digits" and out
            ]
        )
        assert ledger.left_out_tokens.total() == sum(found) - sum(kept)
        assert ledger.records == len(found) + 3 * (name == "digits")
        assert ledger.bad.counts.total() == 3 * (name == "digits")
        # No row mixes sources, whatever the method.
        for split in SPLITS:
            for bucket in manifest.buckets(split):
                first = 0
                for part in bucket.parts:
                    if part.source == name:
                        assert ledger.splits[split].sequences[bucket.length] == part.sequences
                        for row in manifest.reader(bucket).read(range(first, first + part.sequences)).tolist():
                            text = tokenizer.decode([token for token in row if token])
                            assert set(text) <= {*ALPHABETS[name], "\ufffd"}
                    first += part.sequences
    assert manifest.ledger.records == sum(ledger.records for ledger in manifest.ledgers.values()) == 123


def as_version_2(directory: Path) -> None:
    """Rewrite a manifest as version 2 had it: one ledger, and none of the settings that came later."""
    manifest, file = open_prepared(directory), directory / "manifest.json"
    content = json.loads(file.read_text())
    del content["ledgers"], content["sha256"]
    ledger = manifest.ledger.to_json()
    del ledger["left_out_documents"], ledger["left_out_tokens"]
    for source in (content["config"]["source"], *content["config"]["sources"].values()):
        for key in ("min_tokens", "max_tokens"):
            del source[key]
    content |= {"format_version": 2, "ledger": ledger}
    content["sha256"] = sha256_of_json(json.loads(json.dumps(content)))
    file.write_text(json.dumps(content))


def test_data_of_version_2_is_used_as_it_is(config: DataConfig, monkeypatch: pytest.MonkeyPatch):
    before = prepare(config, QUIET, workers=1)
    as_version_2(Path(config.directory))
    found = prepare(config, QUIET, workers=1)
    assert found.files == before.files
    assert found.ledger == before.ledger
    assert [*found.ledgers] == ["letters, digits"]
    found.write(Path(config.directory))
    assert open_prepared(config.directory).ledgers == found.ledgers
    changed = {**config.sources, "digits": replace(config.sources["digits"], min_tokens=9)}
    with pytest.raises(ValueError, match=r"data\.sources\.digits\.min_tokens = 9: .* was made with 0; set it back"):
        prepare(replace(config, sources=changed), QUIET)


def shown(manifest: Manifest) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    print_ledgers(manifest, console)
    return console.export_text()


def test_the_ledger_by_source_is_shown_and_adds_up(config: DataConfig):
    sources = {**config.sources, "letters": replace(config.sources["letters"], min_tokens=20)}
    text = shown(prepare(replace(config, sources=sources), QUIET, workers=1))
    assert max(map(len, text.splitlines())) <= 80
    whole, by_source = text.split("Ledger by source")
    total = sum(sum(lengths(config, name)) for name in ALPHABETS)
    for part, num_tops in ((whole, 1), (by_source, 2)):
        # A row has tokens if it ends with their share; the rows of parts are indented.
        rows = [(line, int(line.split()[-2].replace(",", ""))) for line in part.splitlines() if line.endswith("%")]
        assert sum(tokens for line, tokens in rows if line.startswith(" ")) == total
        assert sum([tokens for line, tokens in rows if not line.startswith(" ")][:num_tops]) == total
    assert "left out: too short" in by_source
    lone = replace(config, sources={"letters": sources["letters"]}, directory=f"{config.directory}-lone")
    assert "Ledger by source" not in shown(prepare(lone, QUIET, workers=1))
