"""Untie the Knots (arXiv 2409.04774, appendix B): ordinary documents become a task of finding what belongs together.

Documents of a sequence are cut into chunks, the chunks of all of them mixed, and the model has to go on where each left
off. A chunk begins with its label and ends at a knot; the next chunk of that document begins with the knot's other end:

    <label> a1 </label> text <tail 1>  ...  <label> b2 </label> <head 2> text  ...  <trace> a1 <then> b2 </trace>

After a document's last chunk its labels are to be named in order. Marks of chunks are given, not learned: the loss
leaves them out. Which documents are cut where is a pure function of (seed, length, sequence number).

Two things are not the released code's. There the last document's backtrace names a wrong label and stands after a wrong
chunk, and as marks lengthen a sequence, whose end is then cut off, it mostly is not there at all; here as much text is
left out before instead, at the end of the last document, and the sequence is full to the token.
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
"""What a token is. LABEL: a label of a chunk with its marks. TRACE: what is to be named. OTHERS: of the document's part
in another sequence, where it is trained."""

NOT_AS_INPUT = (LABEL, KNOT, TRACE_END)
NOT_AS_TARGET = (LABEL, KNOT, TRACE_BEGIN, OTHERS)


class Marks(NamedTuple):
    """Ids of the special tokens."""

    label: int
    label_end: int
    trace: int
    then: int
    trace_end: int
    tails: tuple[int, ...]
    """Of chunks 1, 2, ..."""
    heads: tuple[int, ...]
    """Of chunks 2, 3, ..."""


class Tied(NamedTuple):
    """A document to be cut: its tokens [n] with what each is, and its chunks' labels."""

    tokens: NDArray[np.int64]
    roles: NDArray[np.int8]
    labels: list[list[int]]
    """Ids of each chunk's; one chunk has none, and is left as it is."""
    num_marks: int
    """Tokens that cutting it adds."""

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return max(1, len(self.labels))


class Knots:
    """Ties a share of the sequences. Raises ValueError when the tokenizer lacks the special tokens."""

    def __init__(self, config: KnotsConfig, tokenizer: DocumentTokenizer, seed: int):
        self._config = config
        self._tokenizer = tokenizer.tokenizer
        self._boundary_id = tokenizer.boundary_id
        self._seed = seed
        self._chances = np.cumsum(config.chunk_odds) / sum(config.chunk_odds)
        names = knot_tokens(config.max_chunks)
        ids = {name: found for name in names if (found := self._tokenizer.token_to_id(name)) is not None}
        if missing := [name for name in names if name not in ids]:
            raise ValueError(
                f"knots: the tokenizer has no {', '.join(missing)}; set data.tokenizer.knot_chunks = "
                f"{config.max_chunks} and prepare the data anew"
            )
        cuts = config.max_chunks - 1
        self.marks: Marks | None = None
        if cuts:
            label, label_end, trace, then, trace_end, *ends = ids.values()
            self.marks = Marks(label, label_end, trace, then, trace_end, tuple(ends[:cuts]), tuple(ends[cuts:]))

    def tie(self, row: NDArray[np.unsignedinteger], number: int) -> tuple[NDArray, NDArray[np.bool_]] | None:
        """Return sequence `number` of its length [length + 1] tied, and which targets [length] are trained.

        None where it is left as it is.
        """
        length = len(row) - 1
        seeds = np.random.SeedSequence(self._seed, spawn_key=(length, number, 0))
        # random() is the generator's one method whose values no version of numpy changes.
        generator = np.random.Generator(np.random.Philox(seeds))
        if length < self._config.min_sequence_tokens or generator.random() >= self._config.share:
            return None
        documents = fitted([self._drawn(*one, generator) for one in self._documents(row)], length)
        tokens, roles = self.mixed(documents, generator)
        assert len(tokens) == length, "marks take the place of text"
        tokens, roles = np.append(self._boundary_id, tokens), np.append(TEXT, roles)
        trained = ~(np.isin(roles[:-1], NOT_AS_INPUT) | np.isin(roles[1:], NOT_AS_TARGET))
        return tokens.astype(row.dtype), trained

    def mixed(
        self, documents: list[Tied], generator: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """Return the documents' chunks, mixed and marked, and what each token is."""
        owners = np.repeat(np.arange(len(documents)), [document.num_chunks for document in documents])
        # A last document that has not ended goes on to the end of the sequence: its last chunk stays there.
        pinned = int(documents[-1].tokens[-1] != self._boundary_id)
        slots = np.argsort(generator.random(len(owners) - pinned), kind="stable")
        slots = np.append(slots, np.arange(len(slots), len(owners)))
        if self._config.keep_order:
            # Owners ascend, so this sorts the slots of each document.
            slots = slots[np.lexsort((slots, owners))]
        order = np.argsort(slots, kind="stable")
        chunks = [chunk for document in documents for chunk in self._cut(document, generator)]
        last = {int(owners[chunk]): place for place, chunk in enumerate(order.tolist())}
        tokens, roles = [], []
        for place, chunk in enumerate(order.tolist()):
            owner = int(owners[chunk])
            parts = [chunks[chunk]]
            if self._config.backtrace and documents[owner].labels and last[owner] == place:
                parts.append(self._backtrace(documents[owner].labels))
            for ids, kinds in parts:
                tokens.append(ids)
                roles.append(kinds)
        return np.concatenate(tokens), np.concatenate(roles)

    def _documents(self, row: NDArray[np.unsignedinteger]) -> list[tuple[NDArray[np.int64], NDArray[np.int8]]]:
        """Return the row's documents, each with the boundary that ends it, and what each token is."""
        tokens = row.astype(np.int64)
        roles = np.full(len(tokens), TEXT, dtype=np.int8)
        if tokens[0] == self._boundary_id:
            tokens, roles = tokens[1:], roles[1:]
        else:
            roles[0] = OTHERS  # the first input of a part that begins inside its document
        ends = np.flatnonzero(tokens[:-1] == self._boundary_id) + 1
        return list(zip(np.split(tokens, ends), np.split(roles, ends), strict=True))

    def _drawn(self, tokens: NDArray[np.int64], roles: NDArray[np.int8], generator: np.random.Generator) -> Tied:
        count = 1 + int(np.searchsorted(self._chances, generator.random(), side="right"))
        if len(tokens) < max(count, self._config.min_document_tokens) or count == 1:
            return Tied(tokens, roles, [], 0)
        draws = (generator.random((count, LABEL_LENGTH)) * len(LABEL_CHARACTERS)).astype(np.int64)
        names = ["".join(LABEL_CHARACTERS[draw] for draw in draws[chunk]) for chunk in range(count)]
        encoded = self._tokenizer.encode_batch_fast(names, add_special_tokens=False)
        labels = [one.ids for one in encoded]
        # Each label with two marks, two ends of a knot for each cut; labels again with a mark before each and one more.
        num_marks = sum(len(label) + 2 for label in labels) + 2 * (count - 1)
        if self._config.backtrace:
            num_marks += sum(len(label) + 1 for label in labels) + 1
        return Tied(tokens, roles, labels, num_marks)

    def _cut(self, document: Tied, generator: np.random.Generator) -> list[tuple[NDArray[np.int64], NDArray[np.int8]]]:
        """Return the document's chunks with their marks, and what each token is."""
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
        assert self.marks is not None
        named = [token for label in labels for token in (self.marks.then, *label)][1:]
        tokens = np.array([self.marks.trace, *named, self.marks.trace_end], dtype=np.int64)
        return tokens, np.array([TRACE_BEGIN, *[TRACE] * len(named), TRACE_END], dtype=np.int8)


def fitted(documents: list[Tied], length: int) -> list[Tied]:
    """Leave out text at the end until the documents and their marks have `length` tokens, of at least as much text.

    A document that would not keep a token for each of its chunks stays whole, so that more text is left.
    """
    kept, starts = list(documents), np.cumsum([0, *(len(one.tokens) for one in documents)]).tolist()
    room = length - sum(one.num_marks for one in documents)
    for number in reversed(range(len(kept))):
        if kept[number].labels:
            if starts[number] + kept[number].num_chunks <= room:
                break  # and so does every one before
            room += kept[number].num_marks
            kept[number] = kept[number]._replace(labels=[], num_marks=0)
    return [
        one._replace(tokens=one.tokens[: room - start], roles=one.roles[: room - start])
        for one, start in zip(kept, starts, strict=False)
        if start < room
    ]


def cut_points(size: int, count: int, generator: np.random.Generator) -> list[int]:
    """Return where a document of `size` tokens is cut into `count` chunks: count - 1 of 1, ..., size - 1, ascending.

    Each choice is equally likely (R. Floyd's sampling without replacement).
    """
    chosen: set[int] = set()
    for largest in range(size - count, size - 1):
        draw = int(generator.random() * (largest + 1))
        chosen.add(draw if draw not in chosen else largest)
    return sorted(place + 1 for place in chosen)
