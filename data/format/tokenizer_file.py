"""Loading of a `tokenizer.json` from outside: what it asks for is bounded before it meets a document."""

import base64
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
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
"""Longest time that the library may work on texts that take about a second; only the end of its process stops it."""

STUCK_STATUS = 2
"""Exit status of a process that has ended itself for this reason, after one line that says so."""

_standard_error = 2  # its descriptor, which is another one while it is muted


def odd_texts(length: int) -> tuple[str, ...]:
    """Return texts on which tokenizers fail or are slow, with runs of up to `length` equal characters."""
    runs = " " * length + "x", "a" * length + "!", "1" * length + "\n", "\n" * length, "e\u0301" * (length // 8)
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
            error = (
                f"{file}: takes more than {{:.1f}} s for {len(text):,} characters that begin with {text[:4]!r}; "
                "correct its pattern, or name another in data.tokenizer.path"
            )
            with ended_if_stuck(lambda error=error: error.format(MAX_ENCODE_SECONDS)):
                seconds = _encoding_seconds(tokenizer, text)
            if seconds > MAX_ODD_SECONDS:
                raise ValueError(error.format(MAX_ODD_SECONDS))
        length *= 8


def _encoding_seconds(tokenizer: Tokenizer, text: str) -> float:
    """Return the CPU time in which the tokenizer encodes a text, or fails on it."""
    began = time.process_time()
    with suppress(Exception), panics_caught():  # a document on which it fails is a bad record
        tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return time.process_time() - began


@contextmanager
def ended_if_stuck(describe: Callable[[], str]) -> Iterator[None]:
    """Print the error `describe()` and end this process if the context takes longer than MAX_ENCODE_SECONDS.

    Time in which the process is stopped does not count.
    """
    done = threading.Event()

    def watch() -> None:
        for _ in range(MAX_ENCODE_SECONDS):
            if done.wait(1):
                return
        with suppress(OSError):  # without a standard error
            os.write(_standard_error, f"error: {describe()}\n".encode(errors="replace"))
        os._exit(STUCK_STATUS)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


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
    global _standard_error
    try:
        kept = os.dup(2)
    except OSError:  # the process has none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        _standard_error = kept
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        _standard_error = 2
        os.close(kept)
        os.close(nowhere)


def _problems(settings: dict[str, Any], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield each request of the tokenizer that is refused, with a remedy."""
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
