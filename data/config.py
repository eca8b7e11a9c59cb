"""What to prepare and in which order to train on it: frozen settings, checked when made."""

from dataclasses import dataclass, field
from typing import Literal

SourceKind = Literal["python_stdlib", "text", "json", "parquet", "hub"]
Odds = Literal["uniform", "natural", "grow_linear", "grow_p2"]

BYTES_AND_BOUNDARY = 257
"""The smallest byte-level vocabulary: 256 bytes and the boundary token."""


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the documents come from."""

    kind: SourceKind = "python_stdlib"
    """python_stdlib: this interpreter's own standard library, one document a module. text: one document a file.
    json: JSON lines or arrays, also compressed. parquet: one row each. hub: a data set on the Hugging Face Hub."""

    path: str = ""
    """A file, a directory or a glob; for kind "hub" the data set's name. Unused, and empty, for python_stdlib."""

    text_field: str = "text"
    """Column that holds the document's text (json, parquet, hub)."""

    subset: str = ""
    """Configuration of a hub data set that has several. Empty: its default."""

    split: str = "train"
    """Split of a hub data set."""

    limit_documents: int = 0
    """Read only the first so many documents; what follows is not read, so the ledger does not know it. 0: all."""

    def __post_init__(self) -> None:
        if (self.kind == "python_stdlib") == bool(self.path):
            raise ValueError(
                f"data.source.path is {self.path!r} and data.source.kind {self.kind!r}; python_stdlib takes no path, "
                "every other kind needs one"
            )
        if self.limit_documents < 0:
            raise ValueError(f"data.source.limit_documents is {self.limit_documents}; it must be at least 0 (0: all)")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """An existing tokenizer, or the size of one to train."""

    path: str = ""
    """A `tokenizer.json`, or a directory that holds one. Empty: train a byte-level BPE on the training documents."""

    vocab_size: int = 8192
    """Tokens in a trained vocabulary, boundary included; a small corpus may fill fewer. Unused when `path` is set."""

    boundary: str = "<|endoftext|>"
    """Name of the special token that opens and closes every document."""

    def __post_init__(self) -> None:
        if not self.boundary:
            raise ValueError('data.tokenizer.boundary is empty; name a special token, such as "<|endoftext|>"')
        if not self.path and self.vocab_size < BYTES_AND_BOUNDARY:
            raise ValueError(
                f"data.tokenizer.vocab_size is {self.vocab_size}; 256 bytes and the boundary token need at least "
                f"{BYTES_AND_BOUNDARY}"
            )


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """In which order the sequence lengths are trained on (Dataset Decomposition, arXiv 2405.13226, section 3)."""

    odds: Odds = "grow_p2"
    """Chances of the n buckets, shortest first, while they last. uniform: 1, ..., 1. grow_linear: n, ..., 1.
    grow_p2: 2^(n-1), ..., 1. natural: the batches a bucket has left, which is a plain shuffle."""

    cycles: int = 1
    """How many times lengths grow from short to long during the run. 1: once."""

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ValueError(f"curriculum.cycles is {self.cycles}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Everything that decides the content of a prepared directory."""

    directory: str
    """Where the prepared data goes; it appears there whole or not at all."""

    source: SourceConfig = field(default_factory=SourceConfig)
    """Where the documents come from."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """What makes tokens of them."""

    min_bucket_tokens: int = 128
    """Shortest sequence, in tokens, a power of two. What is left of a document below it is dropped and counted."""

    max_bucket_tokens: int = 2048
    """Longest sequence, in tokens, a power of two. A longer document fills several of them."""

    held_out_fraction: float = 0.02
    """Part of the documents kept for evaluation, in [0, 1). 0: none."""

    shard_tokens: int = 2**20
    """Most tokens in one tar shard."""

    seed: int = 0
    """Decides which documents are held out."""

    def __post_init__(self) -> None:
        if not self.directory:
            raise ValueError("data.directory is empty; name the directory for the prepared data")
        for key in ("min_bucket_tokens", "max_bucket_tokens"):
            if not _is_power_of_two(getattr(self, key)):
                raise ValueError(f"data.{key} is {getattr(self, key)}; bucket lengths are powers of two")
        if self.min_bucket_tokens > self.max_bucket_tokens:
            raise ValueError(
                f"data.min_bucket_tokens is {self.min_bucket_tokens} and data.max_bucket_tokens is "
                f"{self.max_bucket_tokens}; raise the second or lower the first"
            )
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"data.held_out_fraction is {self.held_out_fraction}; it must be in [0, 1) (0: none)")
        if self.shard_tokens < self.max_bucket_tokens:
            raise ValueError(
                f"data.shard_tokens is {self.shard_tokens} and data.max_bucket_tokens is {self.max_bucket_tokens}; "
                "a shard must hold at least one sequence"
            )
        if self.seed < 0:
            raise ValueError(f"data.seed is {self.seed}; it must be at least 0")
