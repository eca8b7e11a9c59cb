"""Tokenizer files from outside: each bad one ends in a line that names it, and no document meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.format import tokenizer_file
from longring.data.format.document import BadRecord, Document
from longring.data.format.tokenizer import DocumentTokenizer
from longring.data.format.tokenizer_file import (
    MAX_GROWTH,
    MAX_ID,
    STUCK_STATUS,
    check_speed,
    load_tokenizer,
    panics_caught,
)
from longring.data.prepare import train_tokenizer as train_module
from longring.data.prepare.train_tokenizer import make_tokenizer, train_tokenizer, with_knot_tokens
from rich.progress import Progress

END = "<|endoftext|>"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    return json.loads(train_tokenizer(["the ring turns a token home"], TokenizerConfig(vocab_size=280)))


def changed(good: dict[str, Any], change: Change) -> bytes:
    content = json.loads(json.dumps(good))
    change(content)
    return json.dumps(content).encode()


def pattern(expression: str) -> Change:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return lambda content: content.update(pre_tokenizer=split)


def normalizer(**settings: Any) -> Change:
    return lambda content: content.update(normalizer=settings)


def nested(content: dict[str, Any]) -> None:
    for _ in range(200):
        content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"] or {"type": "NFC"}]}


def word_piece(content: dict[str, Any]) -> None:
    content["model"] = {
        "type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "vocab": {"a": 1},
        "max_input_chars_per_word": 10**9,
    }  # fmt: skip


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BAD: dict[str, tuple[Change, str]] = {
    "an id of 4 billion": (
        lambda content: content["model"]["vocab"].update(far=4_000_000_000),
        f"the id 4000000000 of token 'far' is above {MAX_ID}; give it a lower one",
    ),
    "a negative id": (lambda content: content["model"]["vocab"].update(far=-1), "expected u32"),
    "an id of 33 bits": (lambda content: content["model"]["vocab"].update(far=2**33), "expected u32"),
    "an id that is no integer": (lambda content: content["model"]["vocab"].update(far=1.5), "expected u32"),
    "a merge of unknown tokens": (lambda content: content["model"]["merges"].append(["q!", "z!"]), "out of vocabulary"),
    "a pattern that backtracks": (pattern("(a+)+$"), "cannot tokenize 'aaaaaaaa' .*retry-limit-in-match over"),
    "a pattern that does not compile": (pattern("(("), "unmatched parenthesis"),
    "an empty pattern to replace": (
        normalizer(type="Replace", pattern={"String": ""}, content="b"), "cannot tokenize 'a b' .*out of bounds"
    ),
    "a character that becomes a million": (
        normalizer(type="Replace", pattern={"String": "a"}, content="b" * 10**6),
        f"turn one character into up to 2000000, more than {MAX_GROWTH}; shorten what they insert",
    ),
    "characters doubled again and again": (
        normalizer(type="Sequence", normalizers=[REPLACE] * 40), "turn one character into up to 2199023255552"
    ),
    "bytes as characters again and again": (
        normalizer(type="Sequence", normalizers=[{"type": "ByteLevel"}] * 30), "turn one character into up to"
    ),
    "a long prefix": (normalizer(type="Prepend", prepend="x" * 10**6), "turn one character into up to"),
    "a table cut short": (normalizer(type="Precompiled", precompiled_charsmap="AAAAAAAA"), "cannot tokenize 'a b'"),
    "a table of nonsense": (normalizer(type="Precompiled", precompiled_charsmap="//////////////////"), "Precompiled"),
    "random merges": (lambda content: content["model"].update(dropout=0.5), "model.dropout = 0.5: .*; remove it"),
    "words of any length": (word_piece, "max_input_chars_per_word = 1000000000: .*; set it to at most that"),
    "a deep normalizer": (nested, "recursion limit"),
    "no model": (lambda content: content.pop("model"), "Model missing"),
    "a model of another type": (lambda content: content.update(model=[]), "not a readable tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tokenizer_is_one_line_that_names_its_file(
    good: dict[str, Any], capfd: pytest.CaptureFixture[str], name: str
):
    change, words = BAD[name]
    content = changed(good, change)
    for _ in range(3):
        with pytest.raises(ValueError, match=f"(?s)^my.json: .*{words}.*name another in data.tokenizer.path") as error:
            DocumentTokenizer(content, END, "my.json")
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500
        with pytest.raises(ValueError, match=r"^my\.json: "):
            with_knot_tokens(content, 2, "my.json")
    assert capfd.readouterr().err == "", "the library prints a traceback of its own"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": ' * 5_000, b'{"version": "1.0"']
)
def test_not_a_tokenizer_at_all(content: bytes):
    with pytest.raises(ValueError, match=r"^my\.json: not a readable tokenizer\.json .*; name another"):
        load_tokenizer(content, "my.json")


def test_every_truncation_is_named(good: dict[str, Any]):
    content = json.dumps(good).encode()
    for length in range(0, len(content), 997):
        with pytest.raises(ValueError, match=r"^my\.json: not a readable tokenizer\.json"):
            load_tokenizer(content[:length], "my.json")
    load_tokenizer(content, "my.json")


def test_the_largest_id_and_a_vocabulary_with_gaps(good: dict[str, Any]):
    """An id is refused where it is above the limit; below it, gaps are rows that no token uses."""
    content = changed(good, lambda content: content["model"]["vocab"].update(far=70_000))
    assert DocumentTokenizer(content, END).vocab_size == 70_001
    for number, works in ((MAX_ID, True), (MAX_ID + 1, False)):
        content = changed(good, lambda content, number=number: content["model"]["vocab"].update(far=number))
        if works:
            load_tokenizer(content, "my.json")
        else:
            with pytest.raises(ValueError, match="give it a lower one"):
                load_tokenizer(content, "my.json")


def test_tokens_that_clash(good: dict[str, Any]):
    """A token with the boundary's id is refused; another added token with a known id or name gets an id of its own."""
    content = changed(good, lambda content: content["model"]["vocab"].update(far=0))
    with pytest.raises(
        ValueError, match=r"data\.tokenizer\.boundary = .* 'far' of my\.json has its id 0; name a special"
    ):
        DocumentTokenizer(content, END, "my.json")
    for change in ({"id": 5, "content": "<x>"}, {"id": 0, "content": "<x>"}, {"id": 7, "content": "a"}):
        content = changed(
            good, lambda content, c=change: content["added_tokens"].append({**content["added_tokens"][0], **c})
        )
        tokenizer = DocumentTokenizer(content, END, "my.json")
        [(_, stream)] = tokenizer.streams([Document(0, "name", "a <x>", bytes(16))], fail, fail)
        assert tokenizer.tokenizer.decode(stream[1:-1].tolist(), skip_special_tokens=False) == "a <x>"


def fail(*arguments: object) -> None:
    raise AssertionError(arguments)


def test_a_document_on_which_the_tokenizer_panics_is_left_out(good: dict[str, Any], capfd: pytest.CaptureFixture[str]):
    """The pattern is as good as any other until a document has 40 z's: that one alone is rejected, whatever is long."""
    tokenizer = DocumentTokenizer(changed(good, pattern("(z+)+$")), END)
    texts = ["one", "z" * 40 + "y", "two", "z" * 40 + "y " * 50_000, "three " * 20_000]
    rejected: dict[str, BadRecord] = {}
    documents = [Document(number, str(number), text, bytes(16)) for number, text in enumerate(texts)]
    for _ in range(3):
        found = [document.number for document, _ in tokenizer.streams(documents, rejected.__setitem__, fail)]
        assert found == [0, 2, 4]
    assert {name: bad.kind for name, bad in rejected.items()} == {"1": "not_tokenized", "3": "not_tokenized"}
    assert all("retry-limit-in-match over" in bad.detail for bad in rejected.values())
    assert capfd.readouterr().err == ""


QUADRATIC = "[a ]+(?![a! x])"
"""At every letter of a run of a's, the rest of the run is matched and given back, letter by letter."""


def test_a_pattern_whose_time_grows_with_the_square_of_a_text_is_refused(
    good: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """The whole check takes some 30 s for it; a fiftieth of the limit finds it at a shorter length."""
    slow = load_tokenizer(changed(good, pattern(QUADRATIC)), "my.json")
    monkeypatch.setattr(tokenizer_file, "MAX_ODD_SECONDS", 0.1)
    with pytest.raises(ValueError, match=r"^my.json: takes more than 0.1 s for [\d,]+ characters that begin with '"):
        check_speed(slow, "my.json", 1 << 16)
    monkeypatch.undo()
    for content in (json.dumps(good).encode(), changed(good, pattern("[a ]+")), changed(good, pattern("(z+)+$"))):
        check_speed(load_tokenizer(content, "my.json"), "my.json", 1 << 16)


def test_the_size_and_the_speed_of_the_tokenizer_of_a_recipe_are_checked(tmp_path: Path, good: dict[str, Any]):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(good))
    tokenizer = TokenizerConfig(path=str(file))
    config = DataConfig(
        directory=str(tmp_path / "data"), source=SourceConfig(kind="json", path=str(tmp_path)), tokenizer=tokenizer
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_module.MAX_BYTES, "tokenizer.json", 100)
        with pytest.raises(ValueError, match=rf"^data.tokenizer.path = '{file}': .* has more than 100 bytes; name"):
            make_tokenizer(config, [], Progress())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_file, "MAX_ODD_SECONDS", -1)
        with pytest.raises(ValueError, match=rf"^data.tokenizer.path = '{file}': takes more than -1.0 s for 3"):
            make_tokenizer(config, [], Progress())
    assert json.loads(make_tokenizer(config, [], Progress()))["model"] == good["model"]


STUCK = """
import sys
from longring.data.format import tokenizer, tokenizer_file
slow = tokenizer.DocumentTokenizer(sys.stdin.buffer.read(), "<|endoftext|>", "data.partial/tokenizer.json")
slow.at = "a.jsonl:7"
tokenizer_file.MAX_ENCODE_SECONDS = tokenizer.MAX_ENCODE_SECONDS = 1
print("begun", flush=True)
slow._encode([sys.argv[1]])
"""
ENDLESS = "a" * 65_536 + "!"


def test_a_process_that_is_stuck_in_a_text_says_so_and_ends(good: dict[str, Any]):
    """The texts would take hours; time in which the process is stopped does not count."""
    command = [sys.executable, "-c", STUCK.replace("[sys.argv[1]]", f"[{ENDLESS!r}] * 900")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(changed(good, pattern(QUADRATIC)))
        process.stdin.close()
        assert process.stdout.readline() == b"begun\n"
        error = process.stderr.read().decode()
        assert process.wait() == STUCK_STATUS
    assert error == (
        "error: data.partial/tokenizer.json: has worked for 1 s on a.jsonl:7, or on a document soon after it; delete "
        "data.partial, then leave the document out or name another data.tokenizer.path\n"
    )


@pytest.mark.full
def test_a_process_that_was_stopped_goes_on(good: dict[str, Any]):
    """It has six seconds for about one second's work, in the middle of which it is stopped for seven."""
    command = [sys.executable, "-c", STUCK.replace("SECONDS = 1", "SECONDS = 6"), "a" * 12_000 + "!"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdin.write(changed(good, pattern(QUADRATIC)))
        process.stdin.close()
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(7)
        process.send_signal(signal.SIGCONT)
        assert process.wait() == 0


def test_a_character_that_the_vocabulary_lacks_rejects_its_document(good: dict[str, Any]):
    model = {"type": "Unigram", "vocab": [[END, -9.0], ["a", -1.0]], "unk_id": None, "byte_fallback": False}
    tokenizer = DocumentTokenizer(changed(good, lambda content: content.update(model=model, pre_tokenizer=None)), END)
    rejected: dict[str, BadRecord] = {}
    documents = [Document(number, str(number), text, bytes(16)) for number, text in enumerate(["aa", "b", "a"])]
    assert [one.number for one, _ in tokenizer.streams(documents, rejected.__setitem__, fail)] == [0, 2]
    assert "unk_id" in rejected["1"].detail


def test_other_exceptions_pass_and_standard_error_is_given_back(capfd: pytest.CaptureFixture[str]):
    with panics_caught():
        os.write(2, b"lost")
    with pytest.raises(KeyboardInterrupt), panics_caught():
        raise KeyboardInterrupt
    os.write(2, b"told")
    assert capfd.readouterr().err == "told"


def test_a_process_without_standard_error(tmp_path: Path, good: dict[str, Any]):
    """`longring prepare RECIPE 2>&-` has no descriptor 2 to keep."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(good))
    code = (
        "import sys; from longring.data.format.tokenizer_file import load_tokenizer;"
        "load_tokenizer(open(sys.argv[1], 'rb').read(), 'x'); print('loaded')"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" "$2" 2>&-', sys.executable, code, str(tmp_path / "tokenizer.json")]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout == "loaded\n"
