"""Untie the Knots (arXiv 2409.04774, appendix B): ordinary documents become a task of joining distant parts.

The documents of a sequence are cut into knot chunks, and the chunks of all documents are mixed; the model has to find
the chunk that each one continues. A chunk begins with its label and ends with the tail of a knot; the next chunk of
that document begins with the head of the same knot:

    <label> a1 </label> text <tail 1>  ...  <label> b2 </label> <head 2> text  ...  <trace> a1 <then> b2 </trace>

After the last chunk of a document comes its backtrace: its labels in order, which the model learns to predict. The
loss leaves out the marks of chunks. The cuts are a pure function of (seed, length, index of the sequence).

This module differs from the released code in two ways. There the backtrace of the last document names a wrong label and
follows a wrong chunk, and it is mostly missing, as marks lengthen a sequence and its end is then cut off.
Here text at the end of the last document makes room for the marks, so every sequence is complete and exactly full.
"""

import string
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..format.tokenizer import DocumentTokenizer, knot_tokens
from ..order_config import KnotsConfig

LABEL_CHARACTERS = string.ascii_letters + string.digits
LABEL_LENGTH = 6

TEXT, LABEL, KNOT, TRACE_BEGIN, TRACE, TRACE_END, OTHERS = range(7)
"""Roles of a token. LABEL: a chunk's label and its marks. KNOT: a head or tail. TRACE: a label or mark inside a
backtrace. OTHERS: the first input of a piece that begins inside its document, a target of another sequence."""

NOT_AS_INPUT = (LABEL, KNOT, TRACE_END)
"""Roles of inputs whose targets the loss leaves out."""
NOT_AS_TARGET = (LABEL, KNOT, TRACE_BEGIN, OTHERS)
"""Roles of targets that the loss leaves out."""


class Marks(NamedTuple):
    """Token ids of the special tokens."""

    label: int
    label_end: int
    trace: int
    then: int
    trace_end: int
    tails: tuple[int, ...]
    """Tails of chunks 1, 2, ..."""
    heads: tuple[int, ...]
    """Heads of chunks 2, 3, ..."""


class Tied(NamedTuple):
    """A document and the labels of the chunks into which it will be cut."""

    tokens: NDArray[np.int64]
    """Tokens of the document, [n]."""
    roles: NDArray[np.int8]
    """Role of each token, [n]."""
    labels: list[list[int]]
    """Token ids of each chunk's label; empty for a document that stays whole."""
    num_marks: int
    """Number of tokens that cutting adds."""

    @property
    def num_chunks(self) -> int:
        """Number of knot chunks; 1 for a document that stays whole."""
        return max(1, len(self.labels))


class Knots:
    """Transform that ties a share of the sequences. Raises ValueError if the tokenizer lacks the special tokens."""

    def __init__(self, config: KnotsConfig, tokenizer: DocumentTokenizer, seed: int):
        self._config = config
        self._tokenizer = tokenizer.tokenizer
        self._boundary_id = tokenizer.boundary_id
        self._seed = seed
        self._chances = np.cumsum(config.chunk_odds) / sum(config.chunk_odds)  # of at most 1, 2, ... chunks
        names = knot_tokens(config.max_chunks)
        ids = {name: found for name in names if (found := self._tokenizer.token_to_id(name)) is not None}
        if missing := [name for name in names if name not in ids]:
            raise ValueError(
                f"knots.chunk_odds = {list(config.chunk_odds)}: the tokenizer lacks {', '.join(missing)}; set "
                f"data.tokenizer.knot_chunks = {config.max_chunks} and prepare the data anew"
            )
        cuts = config.max_chunks - 1
        self.marks: Marks | None = None
        if cuts:
            # In the order of `knot_tokens`: five marks, the tails, the heads.
            label, label_end, trace, then, trace_end, *ends = ids.values()
            self.marks = Marks(label, label_end, trace, then, trace_end, tuple(ends[:cuts]), tuple(ends[cuts:]))

    def tie(self, row: NDArray[np.unsignedinteger], number: int) -> tuple[NDArray, NDArray[np.bool_]] | None:
        """Return the tied row of a sequence and the mask of its trained targets, or None if it is not tied.

        `row` and the tied row are [length + 1], the mask is [length]. `number` is the index of the sequence in its
        bucket: it decides the cuts, with the seed and the length.
        """
        length = len(row) - 1
        seeds = np.random.SeedSequence(self._seed, spawn_key=(length, number, 0))
        # Only random() is used: the one method of the generator whose values are the same in every version of numpy.
        generator = np.random.Generator(np.random.Philox(seeds))
        if length < self._config.min_sequence_tokens or generator.random() >= self._config.share:
            return None
        documents = fit_to_length([self._draw(*document, generator) for document in self._documents(row)], length)
        tokens, roles = self.mix(documents, generator)
        assert len(tokens) == length, "text and marks fill the sequence"
        tokens, roles = np.append(self._boundary_id, tokens), np.append(TEXT, roles)
        trained = ~(np.isin(roles[:-1], NOT_AS_INPUT) | np.isin(roles[1:], NOT_AS_TARGET))  # [length]
        return tokens.astype(row.dtype), trained

    def mix(self, documents: list[Tied], generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """Return the tokens [n] of the documents' chunks, mixed and marked, and the role of each token [n]."""
        owners = np.repeat(np.arange(len(documents)), [document.num_chunks for document in documents])  # [chunk]
        # If the last document does not end in this sequence, its last chunk stays at the end.
        pinned = int(documents[-1].tokens[-1] != self._boundary_id)
        slots = np.argsort(generator.random(len(owners) - pinned), kind="stable")  # [chunk], its position in the result
        slots = np.append(slots, np.arange(len(slots), len(owners)))
        if self._config.keep_order:
            # Owners ascend, so this sorts the slots within each document: its chunks keep their order.
            slots = slots[np.lexsort((slots, owners))]
        order = np.argsort(slots, kind="stable")  # [slot], the chunk at each position of the result
        chunks = [chunk for document in documents for chunk in self._cut(document, generator)]
        last_slots = {int(owners[chunk]): slot for slot, chunk in enumerate(order.tolist())}
        tokens, roles = [], []
        for slot, chunk in enumerate(order.tolist()):
            owner = int(owners[chunk])
            parts = [chunks[chunk]]
            if self._config.backtrace and documents[owner].labels and last_slots[owner] == slot:
                parts.append(self._backtrace(documents[owner].labels))
            for ids, kinds in parts:
                tokens.append(ids)
                roles.append(kinds)
        return np.concatenate(tokens), np.concatenate(roles)

    def _documents(self, row: NDArray[np.unsignedinteger]) -> list[tuple[NDArray[np.int64], NDArray[np.int8]]]:
        """Return the tokens [n] and roles [n] of each document of a row; a document ends with its boundary."""
        tokens = row.astype(np.int64)
        roles = np.full(len(tokens), TEXT, dtype=np.int8)
        if tokens[0] == self._boundary_id:
            tokens, roles = tokens[1:], roles[1:]
        else:
            roles[0] = OTHERS  # the first input of a piece that begins inside its document
        ends = np.flatnonzero(tokens[:-1] == self._boundary_id) + 1  # a last boundary begins no document
        return list(zip(np.split(tokens, ends), np.split(roles, ends), strict=True))

    def _draw(self, tokens: NDArray[np.int64], roles: NDArray[np.int8], generator: np.random.Generator) -> Tied:
        """Return the document with labels for a random number of chunks; a document too short for them stays whole."""
        count = 1 + int(np.searchsorted(self._chances, generator.random(), side="right"))
        if len(tokens) < max(count, self._config.min_document_tokens) or count == 1:
            return Tied(tokens, roles, [], 0)
        draws = (generator.random((count, LABEL_LENGTH)) * len(LABEL_CHARACTERS)).astype(np.int64)
        names = ["".join(LABEL_CHARACTERS[draw] for draw in draws[chunk]) for chunk in range(count)]
        encoded = self._tokenizer.encode_batch_fast(names, add_special_tokens=False)
        labels = [encoding.ids for encoding in encoded]
        # A label has a mark on either side, and a cut has a tail and a head. A backtrace has a mark before each label
        # and one at its end.
        num_marks = sum(len(label) + 2 for label in labels) + 2 * (count - 1)
        if self._config.backtrace:
            num_marks += sum(len(label) + 1 for label in labels) + 1
        return Tied(tokens, roles, labels, num_marks)

    def _cut(self, document: Tied, generator: np.random.Generator) -> list[tuple[NDArray[np.int64], NDArray[np.int8]]]:
        """Return the tokens [n] and roles [n] of each chunk of the document, with its marks."""
        if not document.labels:
            return [(document.tokens, document.roles)]
        assert self.marks is not None
        cuts = cut_points(len(document.tokens), len(document.labels), generator)
        texts = zip(np.split(document.tokens, cuts), np.split(document.roles, cuts), strict=True)
        found = []
        for chunk, (label, (text, roles)) in enumerate(zip(document.labels, texts, strict=True)):
            head = [self.marks.heads[chunk - 1]] if chunk else []
            tail = [self.marks.tails[chunk]] if chunk < len(cuts) else []
            begin = [self.marks.label, *label, self.marks.label_end]
            tokens = np.concatenate([np.array([*begin, *head], dtype=np.int64), text, np.array(tail, dtype=np.int64)])
            kinds = [LABEL] * len(begin) + [KNOT] * len(head)
            found.append((tokens, np.concatenate([kinds, roles, [KNOT] * len(tail)]).astype(np.int8)))
        return found

    def _backtrace(self, labels: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """Return the tokens [n] and roles [n] of the backtrace that names `labels`."""
        assert self.marks is not None
        named = [token for label in labels for token in (self.marks.then, *label)][1:]  # no <then> before the first
        tokens = np.array([self.marks.trace, *named, self.marks.trace_end], dtype=np.int64)
        return tokens, np.array([TRACE_BEGIN, *[TRACE] * len(named), TRACE_END], dtype=np.int8)


def fit_to_length(documents: list[Tied], length: int) -> list[Tied]:
    """Return the documents with text removed from the end until they and their marks have `length` tokens.

    The documents have at least `length` tokens of text. A document that would not keep one token for each of its chunks
    stays whole instead, which leaves more room for text.
    """
    kept, starts = list(documents), np.cumsum([0, *(len(document.tokens) for document in documents)]).tolist()
    # `room` is the number of tokens of text that fit; a document's text begins at its `starts`.
    room = length - sum(document.num_marks for document in documents)
    for number in reversed(range(len(kept))):
        if kept[number].labels:
            if starts[number] + kept[number].num_chunks <= room:
                break  # every document before this one fits too
            room += kept[number].num_marks
            kept[number] = kept[number]._replace(labels=[], num_marks=0)
    return [
        document._replace(tokens=document.tokens[: room - start], roles=document.roles[: room - start])
        for document, start in zip(kept, starts, strict=False)
        if start < room
    ]


def cut_points(size: int, count: int, generator: np.random.Generator) -> list[int]:
    """Return the count - 1 positions at which a document of `size` tokens is cut into `count` chunks.

    They are in 1, ..., size - 1, ascending; every choice is equally likely (R. Floyd's sampling without replacement).
    """
    chosen: set[int] = set()
    # After each round `chosen` is a uniform choice from range(largest + 1).
    for largest in range(size - count, size - 1):
        draw = int(generator.random() * (largest + 1))
        chosen.add(draw if draw not in chosen else largest)
    return sorted(position + 1 for position in chosen)
