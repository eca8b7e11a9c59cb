"""Cutting of long texts into spans that are tokenized one by one, so that memory and time follow the bytes.

A cut stands before white space if there is any in the span. It is exact if the tokenizer gives the characters before
it the same ids whether those after it follow or not; the span after it is then tokenized with that context, whose ids
are left out again. So the ids are those of the whole text for every tokenizer whose decision at a character depends on
at most CONTEXT_CHARACTERS to either side; for one that never joins a word to the white space after it (ByteLevel,
Metaspace, WhitespaceSplit, Bert, and their usual patterns) whatever the text is.
"""

import re
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import NamedTuple

SPAN_CHARACTERS = 1 << 16
"""Maximum number of characters of a span, without its context."""

CONTEXT_CHARACTERS = 256
"""Number of characters on each side that decide whether a cut is exact, and with which a span is tokenized."""

TRIES = 16
"""Number of positions before white space, and then of others, that are tried for an exact cut."""

TAIL_CHARACTERS = 1 << 12
"""Number of characters at the end of a span that are searched first for white space."""

BREAK = re.compile(r"(?<=\S)(?=\s)")

Encode = Callable[[str], list[int]]


class Span(NamedTuple):
    """Part of a text from character `start` on."""

    start: int

    text: str
    """Characters of the span, without its context."""

    context: str
    """Characters before the span with which it is tokenized; empty for the first span, or if the cut is not exact."""

    context_ids: list[int]
    """Ids with which those of `context` + `text` begin."""

    in_word: bool
    """Whether the cut at `start` is inside a word or a run of white space, or is not exact: ids may differ there."""


def spans(text: str, encode: Encode, limit: int) -> Iterator[Span]:
    """Yield the spans of `text`, of at most `limit` characters each; one span if it is not longer.

    `encode` returns the ids of a text, without special tokens.
    """
    start, context, context_ids, in_word = 0, "", [], False
    # Invariant: text[:start] has been yielded; `context`, if any, is the characters before `start`.
    while len(text) - start > limit:
        stop, known, next_in_word = _find_cut(text, start, start + limit, encode)
        yield Span(start, text[start:stop], context, context_ids, in_word)
        start, in_word = stop, next_in_word
        context, context_ids = (text[max(stop - CONTEXT_CHARACTERS, 0) : stop], known) if known else ("", [])
    yield Span(start, text[start:], context, context_ids, in_word)


def breaks(text: str, start: int, stop: int) -> Iterator[int]:
    """Yield the positions in (start, stop] between a word and the white space after it, the last one first."""
    middle = max(stop - TAIL_CHARACTERS, start)
    for low, high in ((middle, stop), (start, middle)):
        # A match is seen with the character before and the one after it.
        found = BREAK.finditer(text, low, min(high + 1, len(text)))
        yield from (match.start() for match in reversed([*found]) if low < match.start() <= high)


def _find_cut(text: str, start: int, limit: int, encode: Encode) -> tuple[int, list[int], bool]:
    """Return the best cut in (start, limit]: position, ids of its context, and whether it is inside a word.

    Without an exact cut among those tried the ids are empty.
    """
    spaces = [*islice(breaks(text, start, limit), TRIES)]
    inside = range(limit, max(limit - TRIES, start), -1)  # also inside words
    for position in chain(spaces, inside):
        low = max(position - CONTEXT_CHARACTERS, 0)
        before, both = encode(text[low:position]), encode(text[low : position + CONTEXT_CHARACTERS])
        # The cut is exact: what follows it does not change the ids before it.
        if before and both[: len(before)] == before:
            return position, before, position not in spaces
    return (spaces[0] if spaces else limit), [], True
