"""Loading of a `tokenizer.json` from outside: what it asks for is bounded before it meets a document."""

import base64
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tokenizers import Tokenizer

MAX_ID = (1 << 24) - 1
"""Highest id of a vocabulary. The embedding and the counts of targets have a row for each id, used or not."""

MAX_GROWTH = 64
"""Maximum number of characters into which normalizer and pre-tokenizer may turn one."""

MAX_WORD_CHARACTERS = 1_000
"""Maximum length of the words that a WordPiece model may search, in time cubic in it; longer ones are unknown to it."""

MAX_ODD_SECONDS = 5.0
"""Maximum CPU time for one of `odd_texts` of up to a span's length, which ordinary tokenizers encode in 0.1 s."""

MAX_ENCODE_SECONDS = 600
"""Time after which a process that encodes some texts of a second's work ends: nothing else can end the library."""


def odd_texts(length: int) -> tuple[str, ...]:
    """Return texts on which tokenizers fail or are slow, with runs of `length` equal characters."""
    runs = " " * length + "x", "a" * length + "!", "1" * length + "\n", "\n" * length, "e\u0301" * (length // 2)
    return "a b", "\x00", "\U0001f44b\r\n", *runs


class TokenizerError(Exception):
    """Failure of a tokenizer on one text."""


def load_tokenizer(content: bytes, file: str) -> Tokenizer:
    """Return the tokenizer of the `tokenizer.json` `content`, without truncation and padding.

    Raises ValueError, which names `file`, if it is not readable, has an id above MAX_ID, asks for random or unbounded
    work, or fails on one of `odd_texts`.
    """
    other = "name another in data.tokenizer.path, or none to train one"
    try:
        settings = json.loads(content)
        with panics_caught():
            tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{file}: not a readable tokenizer.json ({_line(error)}); {other}") from error
    for problem in _problems(settings, tokenizer):
        raise ValueError(f"{file}: {problem}, or {other}")
    # Both would change documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in odd_texts(64):
        try:
            with panics_caught():
                tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
        except TokenizerError as error:
            raise ValueError(f"{file}: cannot tokenize {text[:8]!r} ({error}); {other}") from error
        except Exception:
            continue  # a character that is not in the vocabulary fails the documents that have it
    return tokenizer


def check_speed(tokenizer: Tokenizer, file: str, max_characters: int) -> None:
    """Raise ValueError, which names `file`, if encoding one of `odd_texts` takes more than MAX_ODD_SECONDS.

    The texts grow up to `max_characters`, since a pattern may take time that grows with a power of the length.
    """
    length = 1 << 10
    while length <= max_characters:
        for text in odd_texts(length):
            began = time.process_time()
            with suppress(Exception), panics_caught():  # what it fails on is a bad record
                tokenizer.encode_batch_fast([text], add_special_tokens=False)
            if (seconds := time.process_time() - began) > MAX_ODD_SECONDS:
                raise ValueError(
                    f"{file}: takes {seconds:.0f} s for {len(text):,} characters that begin with {text[:4]!r}, which "
                    "its pattern repeats too often; correct the pattern, or name another in data.tokenizer.path"
                )
        length *= 4


@contextmanager
def ended_if_slow() -> Iterator[None]:
    """End this process with status 2 if the context takes longer than MAX_ENCODE_SECONDS."""
    timer = threading.Timer(MAX_ENCODE_SECONDS, os._exit, (2,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def panics_caught() -> Iterator[None]:
    """Raise TokenizerError for a panic of the library, such as a pattern that backtracks beyond its limit.

    The library also prints a panic on standard error, which is muted meanwhile.
    """
    with _muted():
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of pyo3; not an Exception, and in no module
                raise
            raise TokenizerError(_line(error)) from error


@contextmanager
def _muted() -> Iterator[None]:
    """Send what is written to standard error to nowhere."""
    try:
        kept = os.dup(2)
    except OSError:  # the process has none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _problems(settings: dict[str, Any], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield what the tokenizer must not ask for, each with a remedy."""
    model = settings["model"]
    token, highest = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1], default=("", 0))
    if highest > MAX_ID:
        yield f"the id {highest} of token {token[:40]!r} is above {MAX_ID}; give it a lower one"
    if model.get("dropout"):
        yield f"model.dropout = {model['dropout']}: the same text would get other ids each time; remove it"
    longest_word = model.get("max_input_chars_per_word") or 0
    if longest_word > MAX_WORD_CHARACTERS:
        yield (
            f"model.max_input_chars_per_word = {longest_word}: is above {MAX_WORD_CHARACTERS}; set it to at most that"
        )
    growth = _growth(settings.get("normalizer")) * _growth(settings.get("pre_tokenizer"))
    if growth > MAX_GROWTH:
        yield (
            f"normalizer and pre_tokenizer turn one character into up to {growth}, more than {MAX_GROWTH}; "
            "shorten what they insert"
        )


def _growth(step: dict[str, Any] | None) -> int:
    """Return the largest number of characters into which a normalizer or pre-tokenizer turns one."""
    match step or {}:
        case {"type": "Sequence", **kept}:
            growth = 1
            for inner in kept.get("normalizers") or kept.get("pretokenizers") or []:
                growth *= _growth(inner)
            return growth
        case {"type": "Replace", "content": content, "pattern": pattern}:
            # A regular expression may match between characters and so leaves them beside what it inserts.
            return max(1, len(content) + ("Regex" in pattern))
        case {"type": "Prepend", "prepend": content}:
            return 1 + len(content)
        case {"type": "ByteLevel"}:
            return 2  # one for each byte, and bytes of other scripts count twice
        case {"type": "Precompiled", "precompiled_charsmap": encoded}:
            return _longest_in_charsmap(encoded)
    return 1


def _longest_in_charsmap(encoded: str) -> int:
    """Return the number of characters of the longest replacement in SentencePiece's table: size of a trie, trie, text.

    The replacements follow each other, with a zero byte after each.
    """
    content = base64.b64decode(encoded)
    replacements = content[4 + int.from_bytes(content[:4], "little") :]
    return max(len(one.decode(errors="replace")) for one in replacements.split(b"\0"))


def _line(error: BaseException) -> str:
    """Return the message of an error as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
