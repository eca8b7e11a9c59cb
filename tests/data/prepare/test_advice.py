"""The advice of the errors of `longring prepare` works: after it is carried out, the error is gone."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from longring.data.config import DataConfig, TokenizerConfig
from longring.data.inspect.ledger import print_ledgers
from longring.data.prepare.prepare import prepare
from rich.console import Console

MakeConfig = Callable[..., DataConfig]
Words = Callable[..., str]


@pytest.fixture
def texts(words: Words) -> list[str]:
    return [words(60 + number, number) for number in range(9)]


def refused(config: DataConfig, console: Console, advice: str) -> None:
    """Assert that the preparation is refused with `advice`, at the second and third start as well."""
    for _ in range(3):
        with pytest.raises(ValueError, match=advice) as error:
            prepare(config, console)
        assert len(str(error.value).splitlines()) == 1
    assert not Path(f"{config.directory}.partial").exists()


def with_tokenizer(config: DataConfig, **settings: Any) -> DataConfig:
    return replace(config, tokenizer=TokenizerConfig(**settings))


@pytest.mark.parametrize("way", ["a file", "a directory", "training"])
def test_a_missing_tokenizer(
    make_config: MakeConfig, texts: list[str], console: Console, tmp_path: Path, tokenizer_file: Path, way: str
):
    missing = with_tokenizer(make_config(texts), path=str(tmp_path / "nowhere"))
    refused(
        missing,
        console,
        "data.tokenizer.path = .*name a tokenizer.json or a directory with one, or leave it empty to train",
    )
    settings = {"a file": {"path": str(tokenizer_file)}, "a directory": {"path": str(tokenizer_file.parent)}}
    prepare(with_tokenizer(missing, **settings.get(way, {"path": "", "vocab_size": 290})), console)


def damage(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(changes)


def far_token(number: int) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["model"]["vocab"].update(far=number)


def inserting(content: str) -> Callable[[dict[str, Any]], object]:
    return damage(normalizer={"type": "Replace", "pattern": {"String": "z"}, "content": content})


TOKENIZERS: dict[str, tuple[Callable[..., object], str, Callable[..., object]]] = {
    "an id that is too high": (far_token(4 * 10**9), "give it a lower one", far_token(299)),
    "dropout": (
        lambda content: content["model"].update(dropout=0.1),
        "remove it",
        lambda content: content["model"].pop("dropout"),
    ),
    "text that grows": (inserting("x" * 10**6), "shorten what they insert", inserting("x")),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_is_refused(
    make_config: MakeConfig, texts: list[str], console: Console, tmp_path: Path, tokenizer_file: Path, name: str
):
    wrong, advice, right = TOKENIZERS[name]
    file = tmp_path / "given.json"
    content = json.loads(tokenizer_file.read_text())
    wrong(content)
    file.write_text(json.dumps(content))
    config = with_tokenizer(make_config(texts), path=str(file))
    refused(config, console, f"^data.tokenizer.path = .*given.json': .*{advice}")
    right(content)
    file.write_text(json.dumps(content))
    prepare(config, console)


@pytest.mark.parametrize("way", ["another", "none"])
def test_a_tokenizer_that_is_damaged(
    make_config: MakeConfig, texts: list[str], console: Console, tmp_path: Path, tokenizer_file: Path, way: str
):
    file = tmp_path / "given.json"
    file.write_bytes(tokenizer_file.read_bytes()[:5_000])
    config = with_tokenizer(make_config(texts), path=str(file))
    refused(
        config, console, "not a readable tokenizer.json .*name another in data.tokenizer.path, or none to train one"
    )
    settings = {"another": {"path": str(tokenizer_file)}, "none": {"path": "", "vocab_size": 290}}
    prepare(with_tokenizer(config, **settings[way]), console)


def test_a_boundary_that_a_text_encodes_to(make_config: MakeConfig, texts: list[str], console: Console):
    config = make_config(texts, tokenizer=TokenizerConfig(path=str(make_config([]).tokenizer.path), boundary="e"))
    refused(config, console, "text in .*documents.jsonl:1 encodes to it; name a special token that no text encodes to")
    prepare(replace(config, tokenizer=replace(config.tokenizer, boundary="<|endoftext|>")), console)


def test_an_unknown_boundary_names_one_that_works(make_config: MakeConfig, texts: list[str], console: Console):
    config = make_config(texts, tokenizer=TokenizerConfig(path=str(make_config([]).tokenizer.path), boundary="</s>"))
    with pytest.raises(ValueError, match="name a special token") as error:
        prepare(config, console)
    named = re.search(r"name a special token \('(.*?)'", str(error.value))
    assert named is not None
    prepare(replace(config, tokenizer=replace(config.tokenizer, boundary=named[1])), console)


@pytest.mark.full
@pytest.mark.parametrize("way", ["lower", "add"])
@pytest.mark.parametrize(("method", "key", "lower"), [("decompose", "min", 2), ("concat", "max", 8)])
def test_documents_too_short_to_train_on(
    make_config: MakeConfig, texts: list[str], console: Console, method: str, key: str, lower: int, way: str
):
    config = make_config(["ring"] * 3, method=method, held_out_fraction=0.0)
    advice = "give no training sequence of this length; lower it, or add documents"
    refused(config, console, rf"data\.{key}_bucket_tokens = \d+: \d documents with \d+ tokens {advice}")
    if way == "lower":
        config = replace(config, **{f"{key}_bucket_tokens": lower})
    else:
        make_config([*texts, "ring"])
    assert prepare(config, console).ledger.splits["train"].sequences


@pytest.mark.parametrize("way", ["repair", "raise"])
def test_too_many_bad_records(make_config: MakeConfig, texts: list[str], console: Console, way: str):
    config = make_config([*texts, ""], max_bad_fraction=0.05)
    advice = "1 of 10 records .* are bad .*; repair them, or raise data.max_bad_fraction to leave them out"
    refused(config, console, advice)
    source = Path(config.source.path)
    if way == "repair":
        source.write_text(source.read_text().replace('""', '"the ring turns"'))
        assert prepare(config, console).ledger.documents == 10
    else:
        assert prepare(replace(config, max_bad_fraction=0.1), console).ledger.bad.counts == {"empty": 1}


def test_a_document_on_which_the_tokenizer_fails(
    make_config: MakeConfig, texts: list[str], console: Console, tmp_path: Path, tokenizer_file: Path
):
    """It is a bad record: named, and left out if the fraction allows it, though it is the last one of its file."""
    content = json.loads(tokenizer_file.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(z+)+$"}, "behavior": "Isolated", "invert": False}
    file = tmp_path / "given.json"
    file.write_text(
        json.dumps(
            {**content, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}}
        )
    )
    config = with_tokenizer(make_config([*texts, "z" * 40 + "y"], max_bad_fraction=0.05), path=str(file))
    refused(
        config, console, r"1 not_tokenized\), .*documents.jsonl:10: .*retry-limit-in-match over; repair them, or raise"
    )
    ledger = prepare(replace(config, max_bad_fraction=0.1), console).ledger
    assert ledger.bad.counts == {"not_tokenized": 1}
    assert ledger.documents == 9


def test_what_the_documents_do_not_give_is_said_at_the_end(make_config: MakeConfig, texts: list[str], tmp_path: Path):
    def said(**settings: Any) -> str:
        config = make_config(texts, directory=str(tmp_path / str(len(list(tmp_path.iterdir())))), **settings)
        printer = Console(width=300, record=True, file=io.StringIO())
        print_ledgers(prepare(config, printer), printer)
        return printer.export_text()

    none_held_out = "gives no held-out sequence, so there is nothing to evaluate on; raise it, or set it to 0"
    assert f"data.held_out_fraction = 1e-09: {none_held_out}" in said(held_out_fraction=1e-9)
    too_long = "so no step trains on this length; lower data.max_bucket_tokens, or add longer documents"
    assert f"No training sequence has 256 or 512 or 1,024 tokens, {too_long}" in said(
        max_bucket_tokens=1024, shard_tokens=1024
    )
    for settings in ({"held_out_fraction": 0.3}, {"held_out_fraction": 0.0}, {"max_bucket_tokens": 32}):
        assert not any(advice in said(**settings) for advice in (none_held_out, too_long))
