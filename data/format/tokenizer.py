"""Tokenizer of prepared data: documents to streams of token ids, by a Hugging Face `tokenizer.json`."""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .document import BadRecord, Document
from .spans import SPAN_CHARACTERS, spans
from .tokenizer_file import MAX_ENCODE_SECONDS, TokenizerError, ended_if_stuck, load_tokenizer, panics_caught

TOKENIZER_FILE = "tokenizer.json"
THREAD_CHARACTERS = 1 << 18
"""Number of characters per thread that are encoded together. They keep every thread busy and take some MB."""


def knot_tokens(max_chunks: int) -> list[str]:
    """Return the names of the special tokens for documents of up to `max_chunks` knot chunks (read/knots.py).

    The 2 `max_chunks` + 3 names are five marks of labels and of the backtrace, a tail for each chunk but the last, and
    a head for each chunk but the first. There are none if `max_chunks` is below 2.
    """
    if max_chunks < 2:
        return []
    cuts = range(1, max_chunks)
    marks = ["<|label|>", "<|/label|>", "<|trace|>", "<|then|>", "<|/trace|>"]
    return [*marks, *(f"<|tail_{cut}|>" for cut in cuts), *(f"<|head_{cut + 1}|>" for cut in cuts)]


class TokenMarks(NamedTuple):
    """Special tokens around the documents of a source of token ids, which are no part of their content."""

    end: int
    """Id of the token that ends a document of a stream."""

    names: dict[int, str]
    """Name of each mark by its id: the boundary, BOS and EOS."""

    dtype: np.dtype
    """Smallest type that holds the tokenizer's ids."""


class DocumentTokenizer:
    """Tokenizer that encloses every document in boundary tokens.

    Raises ValueError, which names `file`, if `content` is not a `tokenizer.json` that may be used (tokenizer_file.py),
    or if it lacks the boundary token.
    """

    def __init__(self, content: bytes, boundary: str, file: str = TOKENIZER_FILE):
        self.tokenizer = load_tokenizer(content, file)
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        boundary_id = vocabulary.get(boundary)
        special = [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
        self._choices = f"name a special token ({', '.join(map(repr, special)) or 'it has none'})"
        if boundary_id is None:
            raise ValueError(
                f"data.tokenizer.boundary = {boundary!r}: not in the tokenizer's vocabulary; {self._choices}"
            )
        shared = [token for token, number in vocabulary.items() if number == boundary_id and token != boundary]
        if shared:
            raise ValueError(
                f"data.tokenizer.boundary = {boundary!r}: {shared[0]!r} of {file} has its id {boundary_id}; "
                f"{self._choices}"
            )
        self._file = file
        self.at = ""
        """Document, or the first of some short ones, that is being tokenized; for a long one, the byte of its text."""
        self.boundary = boundary
        self.boundary_id: int = boundary_id
        # One past the highest id, as an existing vocabulary may have gaps.
        self.vocab_size = 1 + max(vocabulary.values())
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self.sha256 = hashlib.sha256(content).hexdigest()
        # Text that contains "<|endoftext|>" is encoded like any other, so that only real ends are boundaries.
        self.tokenizer.encode_special_tokens = True

    def streams(
        self,
        documents: Iterable[Document],
        reject: Callable[[str, BadRecord], None],
        on_word_cut: Callable[[str, int], None],
    ) -> Iterator[tuple[Document, NDArray[np.unsignedinteger]]]:
        """Yield each document with its stream B x1 ... xn B, [n + 2], of type `dtype`.

        Long texts are tokenized in spans (spans.py); `on_word_cut` gets the document's name and the byte of its text
        at each cut where ids may differ from those of the whole. Documents on which the tokenizer fails, or with
        token ids outside the vocabulary, go to `reject`. Raises ValueError if a text encodes to the
        boundary token, which would then no longer be a boundary.
        """
        for batch in _by_size(documents):
            contents = [document.content for document in batch]
            whole = [content for content in contents if isinstance(content, str) and not _is_long(content)]
            self.at = batch[0].name
            # One result for each of `whole`, in the order in which the loop meets these documents.
            encodings = iter(self._encode_each(whole))
            for document in batch:
                if not isinstance(document.content, str):
                    stream = self._from_ids(document.content)
                else:
                    long = _is_long(document.content)
                    ids = self._encode_long(document, document.content, on_word_cut) if long else next(encodings)
                    stream = ids if isinstance(ids, BadRecord) else self._enclosed(document.name, ids)
                if isinstance(stream, BadRecord):
                    reject(document.name, stream)
                else:
                    yield document, stream

    def marks(self, bos: str, eos: str) -> TokenMarks:
        """Return the marks of documents given as token ids: the boundary, and `bos` and `eos` if they are not empty.

        Without `bos`, the special tokens that the tokenizer's template puts around a text are marks as well. Raises
        ValueError if a name is not in the vocabulary.
        """
        names = {self.boundary_id: self.boundary}
        if bos:
            names[self._id_of("bos", bos)] = bos
        else:
            template = self.tokenizer.encode("")
            names |= dict(zip(template.ids, template.tokens, strict=True))
        end = self._id_of("eos", eos) if eos else self.boundary_id
        return TokenMarks(end, {**names, end: eos or self.boundary}, self.dtype)

    def _id_of(self, key: str, name: str) -> int:
        if (found := self.tokenizer.token_to_id(name)) is None:
            raise ValueError(f"data.source.{key} = {name!r}: not in the tokenizer's vocabulary; {self._choices}")
        return found

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, with special tokens by name. Raises ValueError if the tokenizer fails on them."""
        try:
            with panics_caught():
                return self.tokenizer.decode(ids, skip_special_tokens=False)
        except TokenizerError as error:
            raise ValueError(
                f"{self._file}: cannot decode ({error}); prepare the data anew with another data.tokenizer.path"
            ) from error

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text. Raises TokenizerError if the tokenizer fails on any of them."""
        with ended_if_stuck(self._stuck):
            try:
                with panics_caught():
                    return [one.ids for one in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
            except (TokenizerError, MemoryError):
                raise
            except Exception as error:  # the library raises nothing more specific
                raise TokenizerError(" ".join(str(error).split())) from error

    def _stuck(self) -> str:
        """Return the error of texts that do not end."""
        return (
            f"{self._file}: has worked for {MAX_ENCODE_SECONDS} s on {self.at}, or on a document soon after it; delete "
            f"{Path(self._file).parent}, then leave the document out or name another data.tokenizer.path"
        )

    def _encode_each(self, texts: list[str]) -> Sequence["array[int] | BadRecord"]:
        """Return the ids of each text, or the failure of the tokenizer on it."""
        try:
            # array reads a list three times as fast as numpy does.
            return [array("I", ids) for ids in self._encode(texts)]
        except TokenizerError as error:
            if len(texts) == 1:
                return [BadRecord("not_tokenized", str(error))]
            # One text fails its whole batch; alone, each succeeds or fails by itself.
            return [one for text in texts for one in self._encode_each([text])]

    def _encode_long(
        self, document: Document, text: str, on_word_cut: Callable[[str, int], None]
    ) -> NDArray[np.unsignedinteger] | BadRecord:
        """Return the ids of a long text [n], a few spans at a time, or the failure of the tokenizer on one of them."""
        found, cuts, byte = [], [], 0
        left = spans(text, lambda part: self._encode([part])[0], SPAN_CHARACTERS)
        try:
            while batch := [*islice(left, THREAD_CHARACTERS // SPAN_CHARACTERS * _threads())]:
                self.at = f"{document.name}, byte {byte:,}"
                encodings = self._encode([span.context + span.text for span in batch])
                for span, ids in zip(batch, encodings, strict=True):
                    known = len(span.context_ids)
                    # With the span behind it the context may get other ids than when the cut was chosen.
                    exact = ids[:known] == span.context_ids
                    if not exact:
                        [ids], known = self._encode([span.text]), 0
                    if span.in_word or not exact:
                        cuts.append(byte)
                    byte += len(span.text.encode())  # of the next span
                    found.append(np.array(array("I", ids[known:]), dtype=self.dtype))
        except TokenizerError as error:
            return BadRecord("not_tokenized", str(error))
        # Only now: the cuts of a document that is rejected do not count.
        for cut in cuts:
            on_word_cut(document.name, cut)
        return np.concatenate(found)

    def _enclosed(self, name: str, ids: Sequence[int] | NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
        """Return the stream of the ids of a text. Raises ValueError if the boundary is among them."""
        stream = np.full(len(ids) + 2, self.boundary_id, dtype=self.dtype)
        stream[1:-1] = ids
        if np.count_nonzero(stream == self.boundary_id) != 2:
            raise ValueError(
                f"data.tokenizer.boundary = {self.boundary!r}: text in {name} encodes to it; name a special token that "
                "no text encodes to"
            )
        return stream

    def _from_ids(self, tokens: NDArray[np.int64]) -> NDArray[np.unsignedinteger] | BadRecord:
        """Return the stream of a document given as token ids [tokens], whose marks are removed."""
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            return BadRecord("bad_tokens", f"ids span [{tokens.min()}, {tokens.max()}], vocabulary {self.vocab_size}")
        return np.concatenate([[self.boundary_id], tokens, [self.boundary_id]]).astype(self.dtype)


def _threads() -> int:
    return int(os.environ.get("RAYON_NUM_THREADS") or os.cpu_count() or 1)


def _is_long(text: str) -> bool:
    return len(text) > SPAN_CHARACTERS


def _by_size(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield lists of adjacent documents with about THREAD_CHARACTERS characters or token ids for each thread."""
    batch: list[Document] = []
    size = 0
    limit = THREAD_CHARACTERS * _threads()
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
