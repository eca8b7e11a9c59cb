"""How documents are put into one context, and how knots are tied: frozen settings, checked when made."""

from dataclasses import dataclass
from typing import Literal

from .config import DataConfig

Mode = Literal["off", "in_context", "fill_long_buckets"]
By = Literal["path", "random", "knn"]
LongDocuments = Literal["windows", "head"]

TRAINED_WITH = 1_024
"""Fewest documents that an approximate index is trained with: each of its codes has 256 values."""


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """Which documents come into one context (`longring order`)."""

    mode: Mode = "off"
    """off: training reads data.directory. in_context: all documents end to end along the path, cut into contexts of
    context_tokens, as the paper. fill_long_buckets: pieces of long_tokens or more are sequences of their own, as
    dataset decomposition makes them; shorter documents and tails are joined along the path to fill the long buckets."""

    directory: str = ""
    """Where the ordered data goes, which training then reads; it appears there whole or not at all."""

    work_directory: str = ""
    """Where the stages keep what they made, each under a name of its settings. Empty: data.directory + ".order"."""

    by: By = "path"
    """path: the paper's, along the most similar documents. Baselines: random; knn, each document with its nearest that
    are left."""

    context_tokens: int = 0
    """Length of a context of mode in_context, in tokens, a power of two. 0: data.max_bucket_tokens."""

    long_tokens: int = 0
    """Shortest bucket that mode fill_long_buckets keeps and fills, in tokens, a power of two. 0: a quarter of
    data.max_bucket_tokens."""

    document_masks: bool = False
    """Whether attention keeps the documents of a context apart. The paper does not."""

    position_resets: bool = False
    """Whether RoPE counts positions from each document's start. The paper does not. With document_masks it makes no
    difference, as RoPE sees distances only."""

    encoder: str = ""
    """A sentence-transformers or Hugging Face model, by name or directory (the paper's: facebook/contriever-msmarco).
    Empty: TF-IDF of hashed token n-grams, reduced by a truncated SVD; needs no download."""

    embedding_dimensions: int = 128
    """Of the default encoder; a model has its own."""

    long_documents: LongDocuments = "windows"
    """What of a document longer than a window is embedded. windows: all of them, averaged. head: the first, as the
    paper does."""

    window_tokens: int = 512
    """Tokens of a window of the default encoder; a model has its own limit."""

    neighbors: int = 20
    """Neighbours of a document in the graph."""

    exact_documents: int = 2**17
    """Up to so many documents of a split are searched exactly, more by IVF-PQ."""

    duplicate_similarity: float = 0.0
    """Pairs of at least this cosine are looked at as near-duplicates. 0: chosen from the corpus' histogram."""

    duplicate_overlap: float = 0.7
    """Shared part (Jaccard) of two documents' 5-token shingles from which one of them is left out. 0: none is."""

    seed: int = 0
    """Decides how contexts are shuffled, and the baselines' orders."""

    def __post_init__(self) -> None:
        if (self.mode == "off") != (not self.directory):
            raise ValueError(
                f"order.mode is {self.mode!r} and order.directory {self.directory!r}; name a directory for the ordered "
                "data, and none without a mode"
            )
        if "://" in self.directory + self.work_directory:
            raise ValueError(
                f"order.directory = {self.directory} and order.work_directory = {self.work_directory} must be on this "
                "machine; order here, then copy the directory"
            )
        for key, least in (
            ("embedding_dimensions", 1),
            ("window_tokens", 1),
            ("neighbors", 1),
            ("exact_documents", TRAINED_WITH),
            ("seed", 0),
        ):
            if getattr(self, key) < least:
                raise ValueError(f"order.{key} is {getattr(self, key)}; it must be at least {least}")
        for key in ("duplicate_similarity", "duplicate_overlap"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"order.{key} is {getattr(self, key)}; it must be in [0, 1]")

    def lengths(self, data: DataConfig) -> tuple[int, ...]:
        """Return the lengths of the ordered data's sequences, ascending."""
        if self.mode == "in_context":
            return (self.context_tokens or data.max_bucket_tokens,)
        least = self.long_tokens or max(data.max_bucket_tokens // 4, data.min_bucket_tokens)
        return tuple(length for length in data.lengths if length >= least)

    def check(self, data: DataConfig) -> None:
        """Raise ValueError unless data prepared by `data` can be ordered so."""
        if self.mode == "off":
            return
        if not (data.method == "best_fit" or (data.method == "decompose" and data.rest == "pack")):
            raise ValueError(
                f"order.mode = {self.mode!r} needs every document whole, and data.method = {data.method!r} with "
                f"data.rest = {data.rest!r} drops parts; set data.rest = 'pack' with data.method = 'decompose'"
            )
        if self.mode == "fill_long_buckets" and data.method != "decompose":
            raise ValueError(
                f"order.mode = 'fill_long_buckets' fills the buckets of data.method = 'decompose', not {data.method!r}"
            )
        for key in ("context_tokens", "long_tokens"):
            length = getattr(self, key)
            known = [1 << power for power in range(31) if data.min_bucket_tokens <= 1 << power]
            if length and (length > data.max_bucket_tokens or length not in known):
                raise ValueError(
                    f"order.{key} is {length}; it must be a power of two from data.min_bucket_tokens = "
                    f"{data.min_bucket_tokens} to data.max_bucket_tokens = {data.max_bucket_tokens}"
                )


@dataclass(frozen=True, kw_only=True)
class KnotsConfig:
    """Untie the Knots: documents of a sequence cut into chunks and mixed, for the loader (arXiv 2409.04774)."""

    share: float = 0.0
    """Part of the train sequences that are tied so, in [0, 1]; the paper's are 0.3 and 0.8. 0: none."""

    chunk_odds: tuple[float, ...] = (0.0, 1.0, 1.0)
    """Odds of a document becoming 1, 2, ... chunks; the paper finds 2 and 3 best."""

    min_document_tokens: int = 64
    """Documents with fewer tokens in the sequence stay whole."""

    min_sequence_tokens: int = 4096
    """Sequences of shorter buckets are left as they are."""

    keep_order: bool = True
    """Whether a document's chunks keep their order among the mixed ones; the paper finds it better."""

    backtrace: bool = True
    """Whether the labels of a document's chunks follow its last one, to be predicted."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"knots.share is {self.share}; it must be in [0, 1] (0: none)")
        odds = self.chunk_odds
        if not odds or not all(0 <= value < float("inf") for value in odds) or not sum(odds):
            raise ValueError(
                f"knots.chunk_odds is {list(odds)}; odds of 1, 2, ... chunks are numbers from 0 on, one above"
            )
        for key in ("min_document_tokens", "min_sequence_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"knots.{key} is {getattr(self, key)}; it must be at least 1")

    @property
    def max_chunks(self) -> int:
        """Most chunks of a document."""
        return max(number for number, odds in enumerate(self.chunk_odds, start=1) if odds)

    def check(self, data: DataConfig) -> None:
        """Raise ValueError unless the tokenizer of `data` has the special tokens that are needed."""
        if self.share and data.tokenizer.knot_chunks < self.max_chunks:
            raise ValueError(
                f"knots.chunk_odds allows {self.max_chunks} chunks and data.tokenizer.knot_chunks is "
                f"{data.tokenizer.knot_chunks}; the tokenizer needs its special tokens from the start: set it to "
                f"{self.max_chunks} and prepare the data anew"
            )
