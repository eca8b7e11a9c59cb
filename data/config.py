"""What to prepare and in which order to train on it: frozen settings, checked when made."""

from dataclasses import dataclass, field
from typing import Literal

SourceKind = Literal["python_stdlib", "text", "json", "parquet", "hub", "disk"]
Method = Literal["decompose", "concat", "concat_masked", "best_fit"]
Cut = Literal["largest_first", "random"]
Rest = Literal["drop", "pack"]
Odds = Literal["uniform", "natural", "grow_linear", "grow_p2", "grow_p100", "shrink_p100"]
Draw = Literal["odds_times_left", "odds_times_batches", "odds"]

BYTES_AND_BOUNDARY = 257
"""The smallest byte-level vocabulary: 256 bytes and the boundary token."""


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where documents come from."""

    kind: SourceKind = "python_stdlib"
    """python_stdlib: this interpreter's own standard library, one document a module. text: one document a file.
    json: JSON lines or arrays, also .gz and .zst. parquet: one row each. hub: a data set on the Hugging Face Hub.
    disk: one written by `datasets`' save_to_disk."""

    path: str = ""
    """A file, a directory or a glob, local or as fsspec writes it (s3://...); for kind "hub" the data set's name.
    Unused, and empty, for python_stdlib."""

    text_field: str = "text"
    """Field that holds the document's text (json, parquet, hub, disk)."""

    tokens_field: str = ""
    """Field that holds token ids, of documents that data.tokenizer.path tokenized already. Empty: text."""

    subset: str = ""
    """Configuration of a hub data set that has several. Empty: its default."""

    split: str = "train"
    """Split of a hub or disk data set."""

    streaming: bool = True
    """Of a hub data set: read it as it arrives. false: download it to the library's cache first."""

    limit_documents: int = 0
    """Read only the first so many records; what follows is not read, so the ledger does not know it. 0: all.
    A source with a limit is one input shard, so one process reads it."""

    def __post_init__(self) -> None:
        if (self.kind == "python_stdlib") == bool(self.path):
            raise ValueError(
                f"data.source.path is {self.path!r} and data.source.kind {self.kind!r}; python_stdlib takes no path, "
                "every other kind needs one"
            )
        if self.tokens_field and self.kind in ("python_stdlib", "text"):
            raise ValueError(
                f"data.source.tokens_field is {self.tokens_field!r} and data.source.kind {self.kind!r}; whole files "
                "have no fields"
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

    knot_chunks: int = 0
    """Most chunks into which Untie the Knots cuts a document (the table `knots`), for which the vocabulary gets special
    tokens: 2 n + 3 for n. An existing tokenizer gets those it lacks. 0: none."""

    training_characters: int = 2**30
    """Most characters of each source that a tokenizer is trained on, from its start."""

    def __post_init__(self) -> None:
        if not self.boundary:
            raise ValueError('data.tokenizer.boundary is empty; name a special token, such as "<|endoftext|>"')
        if self.knot_chunks < 0 or self.knot_chunks == 1:
            raise ValueError(f"data.tokenizer.knot_chunks is {self.knot_chunks}; it must be at least 2, or 0 for none")
        least = BYTES_AND_BOUNDARY + (2 * self.knot_chunks + 3 if self.knot_chunks else 0)
        if not self.path and self.vocab_size < least:
            raise ValueError(
                f"data.tokenizer.vocab_size is {self.vocab_size}; 256 bytes, the boundary token and those of "
                f"data.tokenizer.knot_chunks = {self.knot_chunks} need at least {least}"
            )
        if self.training_characters < 1:
            raise ValueError(f"data.tokenizer.training_characters is {self.training_characters}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """In which order the sequence lengths are trained on (Dataset Decomposition, arXiv 2405.13226, section 3)."""

    odds: Odds | tuple[float, ...] = "grow_p2"
    """Odds of the n buckets, shortest first: a name, or n numbers. uniform and natural: 1, ..., 1. grow_linear: n,
    ..., 1. grow_p2: 2^(n-1), ..., 1. grow_p100: 100^(n-1), ..., 1. shrink_p100: 1, ..., 100^(n-1)."""

    draw: Draw = "odds_times_left"
    """A bucket's chance, while it lasts. odds_times_left: odds times the batches it has left in the cycle, so that
    buckets of unequal size end together under equal odds. odds_times_batches: times those it had, as the paper's code.
    odds: as the paper's algorithm 1. "natural" is a plain shuffle under each of them."""

    cycles: int = 1
    """How many times lengths go through the curriculum during the run. 1: once."""

    weights: dict[str, float] = field(default_factory=dict)
    """Shares of the trained tokens by source, relative to each other. Empty: as many as each source has."""

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ValueError(f"curriculum.cycles is {self.cycles}; it must be at least 1")
        if not isinstance(self.odds, str) and not (self.odds and all(0 < value < float("inf") for value in self.odds)):
            raise ValueError(f"curriculum.odds is {list(self.odds)}; odds are positive numbers, one for each bucket")
        for name, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"curriculum.weights.{name} is {weight}; a weight is a positive number")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How a rank reads its share of the prepared data. Only `window_tokens` decides what is read."""

    workers: int = 1
    """Threads that read ahead. 0: read when asked."""

    prefetch_batches: int = 8
    """Micro-batches held ready."""

    window_tokens: int = 0
    """Sequences are shuffled within windows of about so many tokens of a bucket, whose shards come in random order: a
    cache then holds one window. 0: one window, the whole bucket."""

    cache_directory: str = ""
    """Where shards of a remote data.directory are kept, on a disk of the machine itself."""

    cache_bytes: int = 2**38
    """Most bytes kept there; the shards least recently used go first."""

    def __post_init__(self) -> None:
        for key, least in (("workers", 0), ("prefetch_batches", 1), ("window_tokens", 0), ("cache_bytes", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"loader.{key} is {getattr(self, key)}; it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Everything that decides the content of a prepared directory."""

    directory: str
    """Where the prepared data goes; it appears there whole or not at all. To train, it may be remote (s3://...)."""

    source: SourceConfig = field(default_factory=SourceConfig)
    """Where the documents come from, when there is one source."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sources by name, in place of `source`."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """What makes tokens of them."""

    method: Method = "decompose"
    """How documents become sequences. decompose: Dataset Decomposition. The baselines have sequences of
    max_bucket_tokens only: concat (concat-and-chunk), concat_masked (the same, with document boundaries), best_fit
    (documents packed, with boundaries)."""

    cut: Cut = "largest_first"
    """How `decompose` cuts. random: a document of two largest buckets or more as the paper's released code does."""

    rest: Rest = "drop"
    """What `decompose` does with documents and tails shorter than min_bucket_tokens. drop: as the paper. pack: fill
    sequences of min_bucket_tokens with them, with document boundaries; nothing is lost."""

    min_bucket_tokens: int = 128
    """Shortest sequence, in tokens, a power of two."""

    max_bucket_tokens: int = 2048
    """Longest sequence, in tokens, a power of two. A longer document fills several of them."""

    held_out_fraction: float = 0.02
    """Part of the documents kept for evaluation, in [0, 1). 0: none."""

    max_bad_fraction: float = 0.05
    """Most records of an input shard that may be bad (broken, without text, empty), in [0, 1]; more stop the run."""

    input_shard_bytes: int = 2**28
    """Files of a source are taken together until they have so many bytes: the unit that a process prepares."""

    shard_tokens: int = 2**25
    """Most tokens in one tar shard."""

    seed: int = 0
    """Decides which documents are held out, and random cuts."""

    def __post_init__(self) -> None:
        if not self.directory:
            raise ValueError("data.directory is empty; name the directory for the prepared data")
        if self.sources and self.source != SourceConfig():
            raise ValueError("data.source and data.sources are both set; name the source among data.sources")
        for name in self.sources:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"data.sources.{name}: a source's name has letters, digits, '-' and '_' only")
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
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is {self.max_bad_fraction}; it must be in [0, 1] (0: none)")
        if self.input_shard_bytes < 1:
            raise ValueError(f"data.input_shard_bytes is {self.input_shard_bytes}; it must be at least 1")
        if self.shard_tokens < self.max_bucket_tokens:
            raise ValueError(
                f"data.shard_tokens is {self.shard_tokens} and data.max_bucket_tokens is {self.max_bucket_tokens}; "
                "a shard must hold at least one sequence"
            )
        if self.seed < 0:
            raise ValueError(f"data.seed is {self.seed}; it must be at least 0")
        if not self.tokenizer.path and any(source.tokens_field for source in self.named_sources.values()):
            raise ValueError("data.tokenizer.path is empty and a source has token ids; name the tokenizer they are of")

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources by name; a lone `source` is called "documents"."""
        return self.sources or {"documents": self.source}

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the sequences made, ascending: powers of two, a baseline's largest alone."""
        if self.method != "decompose":
            return (self.max_bucket_tokens,)
        low, high = self.min_bucket_tokens.bit_length(), self.max_bucket_tokens.bit_length()
        return tuple(1 << power for power in range(low - 1, high))

    @property
    def has_boundaries(self) -> bool:
        """Whether a sequence may hold several documents that attention must keep apart."""
        return self.method in ("concat_masked", "best_fit") or (self.method == "decompose" and self.rest == "pack")
