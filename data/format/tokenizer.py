"""Text to tokens with a Hugging Face tokenizer: one that exists, or a byte-level BPE trained on the documents."""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..config import TokenizerConfig
from .document import BadRecord, Document

TOKENIZER_FILE = "tokenizer.json"
THREAD_CHARACTERS = 1 << 18
"""Documents are encoded together up to so many characters for each thread: enough to keep every thread busy, some MB
of memory."""


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """Return the `tokenizer.json` of a byte-level BPE; the same texts give the same bytes.

    Nothing is normalised and every byte is in the alphabet, so any text is encoded without loss.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.boundary, *knot_tokens(config.knot_chunks)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer.to_str(pretty=True).encode()


def read_tokenizer(path: str) -> bytes:
    """Return the bytes of the `tokenizer.json` that `data.tokenizer.path` names, itself or its directory."""
    file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(
            f"data.tokenizer.path = {path!r}: {file} does not exist; name a tokenizer.json or a directory with one, "
            "or leave it empty to train one"
        )
    return file.read_bytes()


def knot_tokens(max_chunks: int) -> list[str]:
    """Return the names of the special tokens that documents of up to so many chunks need (order/knots.py).

    Five marks of labels and of the backtrace, the ends of chunks 1, 2, ..., the beginnings of chunks 2, 3, ...
    """
    if max_chunks < 2:
        return []
    cuts = range(1, max_chunks)
    marks = ["<|label|>", "<|/label|>", "<|trace|>", "<|then|>", "<|/trace|>"]
    return [*marks, *(f"<|tail_{cut}|>" for cut in cuts), *(f"<|head_{cut + 1}|>" for cut in cuts)]


def with_knot_tokens(content: bytes, max_chunks: int) -> bytes:
    """Return the `tokenizer.json` with those special tokens that it lacks, behind its own."""
    if max_chunks < 2:
        return content
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.add_special_tokens([name for name in knot_tokens(max_chunks) if tokenizer.token_to_id(name) is None])
    return tokenizer.to_str(pretty=True).encode()


class DocumentTokenizer:
    """A tokenizer and the boundary token that encloses every document.

    Raises ValueError when `content` is no `tokenizer.json` or does not know the boundary token.
    """

    def __init__(self, content: bytes, boundary: str):
        try:
            self.tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"data.tokenizer.path is not a readable tokenizer.json: {error}") from error
        boundary_id = self.tokenizer.token_to_id(boundary)
        if boundary_id is None:
            special = [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
            raise ValueError(
                f"data.tokenizer.boundary = {boundary!r} is not in the tokenizer's vocabulary; "
                f"its special tokens are {', '.join(map(repr, special)) or 'none'}"
            )
        self.boundary = boundary
        self.boundary_id: int = boundary_id
        # One past the highest id: an existing vocabulary may have gaps.
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self.sha256 = hashlib.sha256(content).hexdigest()
        # A file may ask for these; they would cut documents short or fill them up.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # A document that merely contains "<|endoftext|>" has not ended: its characters are encoded like any other.
        self.tokenizer.encode_special_tokens = True

    def streams(
        self, documents: Iterable[Document], reject: Callable[[str, BadRecord], None]
    ) -> Iterator[tuple[Document, NDArray[np.unsignedinteger]]]:
        """Yield each document with its stream B x1 ... xn B, [n + 2], of this vocabulary's dtype.

        Token ids that are not this vocabulary's go to `reject`. Raises ValueError when a text encodes to the boundary
        token, which would then no longer be a boundary.
        """
        for batch in _by_size(documents):
            texts = [document.content for document in batch if isinstance(document.content, str)]
            encodings = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
            for document in batch:
                stream = self._given(document.content) if not isinstance(document.content, str) else None
                if isinstance(stream, BadRecord):
                    reject(document.name, stream)
                    continue
                if stream is None:
                    # Through array, which reads a list three times as fast as numpy does.
                    ids = array("I", next(encodings).ids)
                    stream = np.full(len(ids) + 2, self.boundary_id, dtype=self.dtype)
                    stream[1:-1] = ids
                    if np.count_nonzero(stream == self.boundary_id) != 2:
                        raise ValueError(
                            f"data.tokenizer.boundary = {self.boundary!r} also stands for text in {document.name}; "
                            "choose a special token that no text encodes to"
                        )
                yield document, stream

    def _given(self, tokens: NDArray[np.int64]) -> NDArray[np.unsignedinteger] | BadRecord:
        """Return the stream of a document tokenized already, with or without boundaries at its ends."""
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            return BadRecord("bad_tokens", f"ids span [{tokens.min()}, {tokens.max()}], vocabulary {self.vocab_size}")
        inside = tokens[int(tokens[0] == self.boundary_id) : len(tokens) - int(tokens[-1] == self.boundary_id)]
        if np.any(inside == self.boundary_id):
            return BadRecord("bad_tokens", f"the boundary token {self.boundary_id} stands inside")
        if not inside.size:
            return BadRecord("empty", "")
        return np.concatenate([[self.boundary_id], inside, [self.boundary_id]]).astype(self.dtype)


def _by_size(documents: Iterable[Document]) -> Iterator[list[Document]]:
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
