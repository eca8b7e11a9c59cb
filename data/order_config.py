"""Settings for the order of documents in contexts and for knots.

The classes are frozen; making one raises ValueError if its settings do not fit each other. The range of a number stands
with its field, and launch/settings.py holds it for numbers of recipes.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from .config import BucketTokens, DataConfig, Fraction, Seed

Mode = Literal["off", "in_context", "fill_long_buckets"]
By = Literal["path", "random", "knn"]
LongDocuments = Literal["windows", "head"]

Bucket = Annotated[int, Interval(ge=0, le=2**30)]

TRAINED_WITH = 1_024
"""Minimum number of documents for an approximate index: each byte of its codes has 256 values to train."""


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """Settings of `longring order`, which puts related documents into one context."""

    mode: Mode = "off"
    """off: training reads data.directory. in_context: all documents are joined along the path and cut into contexts of
    context_tokens, as in In-Context Pretraining. fill_long_buckets: pieces of at least long_tokens are sequences of
    their own, as in dataset decomposition; shorter documents and tails are joined along the path to fill the long
    buckets."""

    directory: str = ""
    """Directory of the ordered data, which training then reads; it appears there whole or not at all."""

    work_directory: str = ""
    """Directory for the results of the stages, each in a folder named by its settings. Empty: data.directory +
    ".order"."""

    by: By = "path"
    """Order of the documents. path: along the most similar documents, as in the paper. Baselines: random; knn, each
    document followed by its nearest neighbours that are not yet in the order."""

    context_tokens: Bucket = 0
    """Length of a context of mode in_context, in tokens, a power of two. 0: data.max_bucket_tokens."""

    long_tokens: Bucket = 0
    """Shortest bucket that mode fill_long_buckets keeps and fills, in tokens, a power of two. 0: a quarter of
    data.max_bucket_tokens."""

    document_masks: bool = False
    """Mask attention between the documents of a context. The paper does not."""

    position_resets: bool = False
    """Count RoPE positions from the start of each document. The paper does not. With document_masks it makes no
    difference, as RoPE depends on distances only."""

    encoder: str = ""
    """Name or directory of a sentence-transformers or Hugging Face model (the paper's is facebook/contriever-msmarco).
    Empty: the default encoder, TF-IDF of hashed token n-grams reduced by a truncated SVD, which needs no download."""

    embedding_dimensions: Annotated[int, Interval(ge=1, le=2**16)] = 128
    """Dimensions of the default encoder's vectors; a model has its own."""

    long_documents: LongDocuments = "windows"
    """Embedding of a document that is longer than one encoder window. windows: the mean over all of its windows. head:
    its first window, as in the paper."""

    window_tokens: Annotated[int, Interval(ge=1, le=2**20)] = 512
    """Tokens of a window of the default encoder; a model has its own limit. Every window gets one vector."""

    neighbors: Annotated[int, Interval(ge=1, le=10_000)] = 20
    """Number of nearest neighbours that each document lists in the graph."""

    exact_documents: Annotated[int, Interval(ge=TRAINED_WITH, le=2**40)] = 2**17
    """Maximum number of documents of a split for an exact search; a larger split is searched by IVF-PQ."""

    duplicate_similarity: Fraction = 0.0
    """Minimum cosine at which two documents are compared as possible near-duplicates. 0: chosen from a histogram of the
    corpus."""

    duplicate_overlap: Fraction = 0.7
    """Minimum Jaccard similarity of two documents' 5-token shingles at which one of them is dropped. 0: none is
    dropped."""

    seed: Seed = 0
    """Seed of the order in which contexts are stored, and of the baselines."""

    def __post_init__(self) -> None:
        if (self.mode == "off") != (not self.directory):
            raise ValueError(
                f"order.directory = {self.directory!r}: order.mode is {self.mode!r}; "
                + ("remove it, or set order.mode" if self.directory else "set it to the directory of the ordered data")
            )
        if "://" in self.directory + self.work_directory:
            key = "directory" if "://" in self.directory else "work_directory"
            raise ValueError(
                f"order.{key} = {getattr(self, key)}: must be a local directory; name one, and copy the ordered data "
                "afterwards"
            )

    def lengths(self, data: DataConfig) -> tuple[int, ...]:
        """Return the lengths of the buckets of the ordered data, ascending, in tokens."""
        if self.mode == "in_context":
            return (self.context_tokens or data.max_bucket_tokens,)
        least = self.long_tokens or max(data.max_bucket_tokens // 4, data.min_bucket_tokens)
        return tuple(length for length in data.lengths if length >= least)

    def check(self, data: DataConfig) -> None:
        """Raise ValueError unless data prepared with the settings `data` can be ordered by these settings."""
        if self.mode == "off":
            return
        if not (data.method == "best_fit" or (data.method == "decompose" and data.rest == "pack")):
            raise ValueError(
                f"order.mode = {self.mode!r}: needs every document whole, and data.method = {data.method!r} with "
                f"data.rest = {data.rest!r} drops parts; set data.method = 'decompose' and data.rest = 'pack'"
            )
        if self.mode == "fill_long_buckets" and data.method != "decompose":
            raise ValueError(
                f"order.mode = 'fill_long_buckets': needs the buckets of dataset decomposition, and data.method is "
                f"{data.method!r}; set data.method = 'decompose' and data.rest = 'pack', or order.mode = 'in_context'"
            )
        for key in ("context_tokens", "long_tokens"):
            length = getattr(self, key)
            known = [
                1 << power for power in range(31) if data.min_bucket_tokens <= 1 << power <= data.max_bucket_tokens
            ]
            if length and length not in known:
                raise ValueError(
                    f"order.{key} = {length}: must be a power of two from data.min_bucket_tokens = "
                    f"{data.min_bucket_tokens} to data.max_bucket_tokens = {data.max_bucket_tokens}; set it to "
                    f"{max((one for one in known if one < length), default=known[0])}"
                )


@dataclass(frozen=True, kw_only=True)
class KnotsConfig:
    """Settings of Untie the Knots (arXiv 2409.04774): the loader cuts documents into chunks and mixes them."""

    share: Fraction = 0.0
    """Fraction of the train sequences that are tied, in [0, 1]; the paper uses 0.3 and 0.8. 0: none."""

    chunk_odds: tuple[Annotated[float, Interval(ge=0, le=1e9)], ...] = (0.0, 1.0, 1.0)
    """Odds that a document is cut into 1, 2, ... knot chunks; the paper finds 2 and 3 best."""

    min_document_tokens: BucketTokens = 64
    """Minimum tokens that a document has in a sequence to be cut; shorter ones stay whole."""

    min_sequence_tokens: BucketTokens = 4096
    """Minimum bucket whose sequences are tied, in tokens; shorter sequences stay as they are."""

    keep_order: bool = True
    """Keep the order of a document's chunks when the chunks of all documents are mixed; the paper finds it better."""

    backtrace: bool = True
    """Append to a document's last chunk the labels of all of its chunks, for the model to predict."""

    def __post_init__(self) -> None:
        if not any(self.chunk_odds):
            raise ValueError(
                f"knots.chunk_odds = {list(self.chunk_odds)}: must hold a number above 0; give the odds of 1, 2, ... "
                "chunks"
            )

    @property
    def max_chunks(self) -> int:
        """Maximum number of chunks of a document."""
        return max(number for number, odds in enumerate(self.chunk_odds, start=1) if odds)

    def check(self, data: DataConfig) -> None:
        """Raise ValueError unless the tokenizer of `data` has the special tokens that these knots need."""
        if self.share and data.tokenizer.knot_chunks < self.max_chunks:
            raise ValueError(
                f"data.tokenizer.knot_chunks = {data.tokenizer.knot_chunks}: knots.chunk_odds needs "
                f"{self.max_chunks}; set it to {self.max_chunks} and prepare the data anew, or set knots.share = 0"
            )
