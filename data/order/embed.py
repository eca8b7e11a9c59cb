"""Encoders, which turn documents into unit vectors; the inner product of two vectors is their cosine.

An encoder is a sentence-transformers or Hugging Face model, or the default, which needs no download: counts of hashed
token n-grams, weighted by TF-IDF and reduced by a truncated SVD (latent semantic analysis), fitted on sampled
documents.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from threadpoolctl import threadpool_limits

from ..order_config import LongDocuments, OrderConfig
from .documents import Documents, load

FEATURES_BITS = 18
"""Number of bits of a feature: tokens and pairs of adjacent tokens are hashed to 2^18 features."""

FIT_DOCUMENTS = 20_000
"""Number of train documents, evenly spaced, on which the TF-IDF weights and the SVD are fitted."""

FIT_TOKENS = 1 << 20
"""Number of tokens from the start of each of these documents that count."""

BATCH_TOKENS = 1 << 20
"""Number of tokens at which a batch of documents is embedded; a longer document is embedded in runs of that size."""

BATCH_WINDOWS = 32
"""Number of encoder windows that a model encodes at once."""


class Encoder(Protocol):
    """A function from documents to unit vectors."""

    def encode(self, documents: Documents, numbers: Iterable[int]) -> Iterator[NDArray[np.float32]]:
        """Yield the vectors of documents `numbers` in order, in batches [documents of the batch, dimensions].

        A document without any known feature has the zero vector, whose cosine with every other is 0.
        """
        ...


class HashedEncoder:
    """The default encoder: hashed n-grams with TF-IDF and a truncated SVD, as `fit` wrote them to `file`.

    Raises ValueError if the file is damaged.
    """

    def __init__(self, file: Path, long_documents: LongDocuments, window_tokens: int):
        with load(file) as fitted:
            self._weights, self._components = fitted["idf"], fitted["components"]  # [features], [features, dimensions]
        self._window_tokens = window_tokens
        self._most_tokens = window_tokens if long_documents == "head" else None

    def encode(self, documents: Documents, numbers: Iterable[int]) -> Iterator[NDArray[np.float32]]:
        """Yield the unit vectors of documents `numbers` in order, in batches [documents of the batch, dimensions]."""
        for batch in _in_batches(documents, numbers):
            sums = np.zeros((len(batch), self._components.shape[1]), dtype=np.float32)
            for run, owners in _runs(documents, batch, self._window_tokens, self._most_tokens):
                counts, slots = _counts(run, self._window_tokens)
                counts.data = (1 + np.log(counts.data)) * self._weights[counts.indices]
                # [windows, features] @ [features, dimensions]
                np.add.at(sums, owners[slots], unit(counts @ self._components))
            yield unit(sums)


def fit(documents: Documents, train: NDArray[np.integer], config: OrderConfig, file: Path) -> None:
    """Fit the default encoder on a sample of the documents `train` [n] and write it to `file`."""
    sample = train[np.unique(np.linspace(0, len(train) - 1, min(len(train), FIT_DOCUMENTS)).astype(np.int64))]
    most_tokens = config.window_tokens if config.long_documents == "head" else FIT_TOKENS
    runs = _runs(documents, sample.tolist(), config.window_tokens, most_tokens)
    counts = sparse.vstack([_counts(run, config.window_tokens)[0] for run, _ in runs], format="csr")
    # With one thread the sums are the same on any number of cores.
    with threadpool_limits(1):
        tfidf = TfidfTransformer(sublinear_tf=True)
        weighted = tfidf.fit_transform(counts)
        dimensions = min(config.embedding_dimensions, *weighted.shape)
        svd = TruncatedSVD(dimensions, n_iter=4, random_state=0).fit(weighted)
    components = np.ascontiguousarray(svd.components_, dtype=np.float32).T
    with file.open("wb") as out:
        np.savez(out, idf=tfidf.idf_.astype(np.float32), components=components)


class ModelEncoder:
    """A sentence-transformers model, or any Hugging Face encoder with the mean over its last hidden states.

    Raises ValueError if the model cannot be loaded.
    """

    def __init__(self, name: str, long_documents: LongDocuments, device_number: int):
        import torch
        from sentence_transformers import SentenceTransformer  # seconds, and only for this encoder

        device = f"cuda:{device_number % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            torch.set_num_threads(1)  # the processes share the cores, and sums are the same on any number of them
        try:
            self._model = SentenceTransformer(name, device=device)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"order.encoder = {name!r}: cannot be loaded ({error}); name a model that this machine can download, "
                "or a directory with one, or remove it for the default encoder"
            ) from error
        self._head = long_documents == "head"
        tokenizer = self._model.tokenizer
        limit = self._model.max_seq_length or tokenizer.model_max_length
        self._window = limit - tokenizer.num_special_tokens_to_add()

    def encode(self, documents: Documents, numbers: Iterable[int]) -> Iterator[NDArray[np.float32]]:
        """Yield the unit vectors of documents `numbers` in order, in batches [documents of the batch, dimensions]."""
        for batch in _in_batches(documents, numbers):
            windows, owners = [], []  # [windows]: the text of each, and the index of its document in the batch
            for owner, number in enumerate(batch):
                for text in documents.text_parts(number):
                    cuts = self._cut(text)
                    windows += cuts
                    owners += [owner] * len(cuts)
                    if self._head:
                        break
            vectors = self._model.encode(windows, batch_size=BATCH_WINDOWS, show_progress_bar=False)
            yield _averaged(np.asarray(vectors, dtype=np.float32), np.array(owners), len(batch))

    def _cut(self, text: str) -> list[str]:
        """Return the text of each encoder window of a document; of the first one alone for long_documents = "head"."""
        spans = self._model.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )["offset_mapping"]
        windows = [spans[first : first + self._window] for first in range(0, len(spans), self._window)]
        cuts = [text[window[0][0] : window[-1][1]] for window in windows] or [text]
        return cuts[:1] if self._head else cuts


def make_encoder(config: OrderConfig, fitted: Path, device_number: int) -> Encoder:
    """Return the encoder that `config` names; `fitted` is the file of the default encoder.

    A model runs on the GPU `device_number` modulo their number. Raises ValueError if it cannot be loaded.
    """
    if config.encoder:
        return ModelEncoder(config.encoder, config.long_documents, device_number)
    return HashedEncoder(fitted, config.long_documents, config.window_tokens)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `vectors` [n, d] scaled to length 1; zero vectors stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _averaged(windows: NDArray[np.float32], owners: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """Return the unit vector of the mean direction of each document's encoder windows, [count, d].

    `windows` is [windows, d], `owners` [windows] the index of each window's document.
    """
    sums = np.zeros((count, windows.shape[1]), dtype=np.float32)
    np.add.at(sums, owners, unit(windows))
    return unit(sums)


def _in_batches(documents: Documents, numbers: Iterable[int]) -> Iterator[list[int]]:
    """Yield documents `numbers` in batches of some BATCH_TOKENS tokens."""
    batch, size = [], 0
    for number in numbers:
        batch.append(int(number))
        size += int(documents.entry(int(number))["pairs"])
        if size >= BATCH_TOKENS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _runs(
    documents: Documents, numbers: Iterable[int], window_tokens: int, most_tokens: int | None
) -> Iterator[tuple[list[NDArray[np.unsignedinteger]], NDArray[np.int64]]]:
    """Yield runs of whole encoder windows of documents `numbers`, with some BATCH_TOKENS tokens each.

    A run has the tokens [n] of one document or several, without the boundaries at their ends, and the index of each
    array's document in `numbers`. With `most_tokens`, only as many from the start of each document are taken.
    """
    limit = max(BATCH_TOKENS // window_tokens, 1) * window_tokens
    run, owners, size = [], [], 0
    for owner, number in enumerate(numbers):
        tokens = documents.tokens(number)[1:-1][:most_tokens]
        for start in range(0, max(len(tokens), 1), limit):
            run.append(tokens[start : start + limit])
            owners.append(owner)
            size += len(run[-1])
            if size >= limit:
                yield run, np.array(owners)
                run, owners, size = [], [], 0
    if run:
        yield run, np.array(owners)


def _counts(batch: list[NDArray[np.unsignedinteger]], window_tokens: int) -> tuple[sparse.csr_array, NDArray[np.int64]]:
    """Return the counts of hashed n-grams of each encoder window, sparse [windows, 2^18], and its index in `batch`.

    `batch` has arrays of tokens; a window has up to `window_tokens` of one of them. The indices are [windows].
    """
    sizes = np.array([len(tokens) for tokens in batch], dtype=np.int64)  # [documents]
    num_windows = np.maximum(-(-sizes // window_tokens), 1)
    owners = np.repeat(np.arange(len(batch)), num_windows)
    first_window = np.cumsum(num_windows) - num_windows
    tokens = np.concatenate(batch).astype(np.uint64)
    # [tokens]: the document of each token, its position in it, and its window.
    document = np.repeat(np.arange(len(batch)), sizes)
    inside = np.arange(len(tokens)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    window = first_window[document] + inside // window_tokens
    # Fibonacci hashing: the upper bits of a product with an odd number, another one for the second token of a pair.
    shift = np.uint64(64 - FEATURES_BITS)
    single = tokens * np.uint64(0x9E3779B97F4A7C15)
    [together] = np.nonzero(window[1:] == window[:-1])
    pairs = single[together] * np.uint64(0xD6E8FEB86659FD93) + tokens[together + 1] * np.uint64(0xBF58476D1CE4E5B9)
    features = np.concatenate([single, pairs]) >> shift
    # A key is (window, feature), so the sorted distinct keys are the rows of a CSR array in order.
    rows = np.concatenate([window, window[together]]).astype(np.uint64)
    keys, counts = np.unique(rows << np.uint64(FEATURES_BITS) | features, return_counts=True)
    shape = len(owners), 1 << FEATURES_BITS
    columns = (keys & np.uint64((1 << FEATURES_BITS) - 1)).astype(np.int32)
    starts = np.searchsorted(keys >> np.uint64(FEATURES_BITS), np.arange(len(owners) + 1, dtype=np.uint64))
    return sparse.csr_array((counts.astype(np.float32), columns, starts.astype(np.int32)), shape=shape), owners
