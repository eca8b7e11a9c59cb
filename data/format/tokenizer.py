"""Tokenizer of prepared data: documents to streams of token ids, by a Hugging Face `tokenizer.json`."""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .document import BadRecord, Document

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


class DocumentTokenizer:
    """Tokenizer that encloses every document in boundary tokens.

    Raises ValueError if `content` is not a `tokenizer.json` or lacks the boundary token.
    """

    def __init__(self, content: bytes, boundary: str):
        try:
            self.tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"data.tokenizer.path: not a readable tokenizer.json ({error}); name another, or none to train one"
            ) from error
        boundary_id = self.tokenizer.token_to_id(boundary)
        if boundary_id is None:
            special = [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
            raise ValueError(
                f"data.tokenizer.boundary = {boundary!r}: not in the tokenizer's vocabulary; name a special token "
                f"({', '.join(map(repr, special)) or 'it has none'})"
            )
        self.boundary = boundary
        self.boundary_id: int = boundary_id
        # One past the highest id, as an existing vocabulary may have gaps.
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self.sha256 = hashlib.sha256(content).hexdigest()
        # A tokenizer.json may ask for truncation or padding, which would change documents.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # Text that contains "<|endoftext|>" is encoded like any other, so that only real ends are boundaries.
        self.tokenizer.encode_special_tokens = True

    def streams(
        self, documents: Iterable[Document], reject: Callable[[str, BadRecord], None]
    ) -> Iterator[tuple[Document, NDArray[np.unsignedinteger]]]:
        """Yield each document with its stream B x1 ... xn B, [n + 2], of type `dtype`.

        Documents with token ids outside the vocabulary, or with a boundary inside, go to `reject`. Raises ValueError if
        a text encodes to the boundary token, which would then no longer be a boundary.
        """
        for batch in _by_size(documents):
            texts = [document.content for document in batch if isinstance(document.content, str)]
            encodings = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
            for document in batch:
                stream = self._from_ids(document.content) if not isinstance(document.content, str) else None
                if isinstance(stream, BadRecord):
                    reject(document.name, stream)
                    continue
                if stream is None:
                    # array reads a list three times as fast as numpy does.
                    ids = array("I", next(encodings).ids)
                    stream = np.full(len(ids) + 2, self.boundary_id, dtype=self.dtype)
                    stream[1:-1] = ids
                    if np.count_nonzero(stream == self.boundary_id) != 2:
                        raise ValueError(
                            f"data.tokenizer.boundary = {self.boundary!r}: text in {document.name} encodes to it; "
                            "name a special token that no text encodes to"
                        )
                yield document, stream

    def _from_ids(self, tokens: NDArray[np.int64]) -> NDArray[np.unsignedinteger] | BadRecord:
        """Return the stream of a document given as token ids [tokens], with or without boundaries at its ends."""
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            return BadRecord("bad_tokens", f"ids span [{tokens.min()}, {tokens.max()}], vocabulary {self.vocab_size}")
        # `inside` is the text without a boundary at either end; another boundary would end the document early.
        inside = tokens[int(tokens[0] == self.boundary_id) : len(tokens) - int(tokens[-1] == self.boundary_id)]
        if np.any(inside == self.boundary_id):
            return BadRecord("bad_tokens", f"the boundary token {self.boundary_id} is inside")
        if not inside.size:
            return BadRecord("empty", "")
        return np.concatenate([[self.boundary_id], inside, [self.boundary_id]]).astype(self.dtype)


def _by_size(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield lists of adjacent documents with about THREAD_CHARACTERS characters or token ids for each thread."""
    batch: list[Document] = []
    size = 0
    limit = THREAD_CHARACTERS * int(os.environ.get("RAYON_NUM_THREADS") or os.cpu_count() or 1)
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
