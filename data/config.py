"""Settings of prepared data and of the loader.

The classes are frozen; making one raises ValueError if its settings do not fit each other. The range of a number stands
with its field, and launch/settings.py holds it for numbers of recipes. `LoaderConfig`, which is public, holds its own.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Interval

from .ranges import check_ranges

SourceKind = Literal[
    "python_stdlib", "text", "json", "csv", "parquet", "arrow", "webdataset", "tokens", "megatron", "hub", "disk"
]
Method = Literal["decompose", "concat", "concat_masked", "best_fit"]
Cut = Literal["largest_first", "random"]
Rest = Literal["drop", "pack"]

BucketTokens = Annotated[int, Interval(ge=1, le=2**30)]
Bytes = Annotated[int, Interval(ge=1, le=2**60)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Seed = Annotated[int, Interval(ge=0, lt=2**63)]

_WITHOUT_IDS: tuple[SourceKind, ...] = ("python_stdlib", "text", "csv", "tokens", "megatron")
"""Kinds whose records have no field with token ids."""

_WITHOUT_FIELDS: tuple[SourceKind, ...] = ("python_stdlib", "text", "tokens", "megatron")
"""Kinds whose documents have no fields."""

BYTES_AND_BOUNDARY = 257
"""Smallest byte-level vocabulary: 256 bytes and the boundary token."""


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0  # no bit is left without the lowest


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents."""

    kind: SourceKind = "python_stdlib"
    """Format of the source. python_stdlib: the standard library of this interpreter, one document per module.
    text: one document per file. json: JSON lines or a JSON array. csv: a header, then one document per row.
    parquet, arrow (IPC files and streams): one document per row. webdataset: tar files, one document per sample.
    tokens: files that are one stream of token ids each, .npy or without a header. megatron: .bin with .idx.
    hub: a data set of the Hugging Face Hub. disk: a data set written by `datasets`' save_to_disk.
    text, json, csv and webdataset may be compressed, .gz or .zst."""

    path: str = ""
    """File, directory or glob, local or as fsspec addresses it (s3://...); the data set's name for kind "hub".
    Empty for python_stdlib, required for every other kind."""

    text_field: str = "text"
    """Field that holds the text of a document (json, csv, parquet, arrow, webdataset, hub, disk)."""

    tokens_field: str = ""
    """Field that holds the token ids of documents already tokenized by data.tokenizer.path (json, parquet, arrow,
    webdataset, hub, disk). Empty: tokenize text_field."""

    record_holds: Literal["document", "documents", "stream"] = "document"
    """Content of the token ids of one record. document: one document. documents: whole documents, each but the last
    ended by `eos`. stream: a part of a stream of documents, each ended by `eos`, which the next record of the same file
    continues; rows of one length usually are. kind "tokens" holds streams anyway."""

    bos: str = ""
    """Special token with which documents of token ids may begin. Empty: the one that the tokenizer's template adds, if
    it adds one."""

    eos: str = ""
    """Special token with which documents of token ids may end, and which separates those of a stream. Empty:
    data.tokenizer.boundary."""

    dtype: Literal["", "uint16", "uint32", "int32", "int64"] = ""
    """Data type of the ids in files of kind "tokens" without a header, little endian. Empty: uint16 if the tokenizer's
    ids fit in it, else uint32."""

    subset: str = ""
    """Configuration of a hub data set that has several. Empty: its default."""

    split: str = "train"
    """Split of a hub or disk data set."""

    streaming: bool = True
    """Read a hub data set as it arrives. false: download it to the library's cache first."""

    limit_documents: Annotated[int, Interval(ge=0, le=10**15)] = 0
    """Number of records to read from the start of the source; later records are neither read nor counted in the
    ledger. 0: all. A source with a limit is one input shard, so a single process reads it."""

    score_field: str = ""
    """Field that holds a number that says how good a document is (json, csv, parquet, arrow, webdataset, hub, disk). A
    record without one is bad. Empty: none."""

    score_edges: tuple[Annotated[float, Interval(ge=-1e300, le=1e300)], ...] = ()
    """Ascending scores that divide the source NAME into sources NAME.0 (below the first edge), NAME.1 (from the first
    edge on), and so on, each with a ledger and a share of its own. Empty: one source."""

    sample_fraction: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Fraction of the source's documents that are kept. They are drawn without replacement with odds
    exp(score / score_temperature), as in QuRating, and with equal odds without a score_field."""

    score_temperature: Annotated[float, Interval(ge=1e-9, le=1e9)] = 1.0
    """Difference of scores that makes a document e times as likely to be drawn. QuRating uses 2 standard deviations;
    towards 0 the best documents are taken."""

    min_tokens: Annotated[int, Interval(ge=0, le=2**50)] = 0
    """Minimum number of tokens of a document, its end included; shorter documents are left out. 0: no minimum."""

    max_tokens: Annotated[int, Interval(ge=0, le=2**50)] = 0
    """Maximum number of tokens of a document, its end included; longer documents are left out. 0: no maximum."""

    def __post_init__(self) -> None:
        if self.kind == "python_stdlib" and self.path:
            raise ValueError(
                f"data.source.path = {self.path!r}: data.source.kind = 'python_stdlib' reads no path; leave the path "
                "empty, or set data.source.kind to the format of the files"
            )
        if self.kind != "python_stdlib" and not self.path:
            raise ValueError(
                f"data.source.path = '': data.source.kind = {self.kind!r} needs a path; set it to a file, a directory, "
                "a glob or a data set's name"
            )
        if self.tokens_field and self.kind in _WITHOUT_IDS:
            raise ValueError(
                f"data.source.tokens_field = {self.tokens_field!r}: data.source.kind = {self.kind!r} has no fields "
                "with token ids; leave it empty, or use a kind with fields, such as 'json'"
            )
        if 0 < self.max_tokens < self.min_tokens:
            raise ValueError(
                f"data.source.max_tokens = {self.max_tokens}: is below data.source.min_tokens = {self.min_tokens}, "
                "which leaves no document; raise it, or lower data.source.min_tokens"
            )
        if self.score_field and (self.kind in _WITHOUT_FIELDS or self.record_holds != "document"):
            raise ValueError(
                f"data.source.score_field = {self.score_field!r}: data.source.kind = {self.kind!r} with "
                f"data.source.record_holds = {self.record_holds!r} has no field beside each document; leave it empty, "
                "or use a kind with fields, such as 'json', of one document each"
            )
        # As a set: between two equal edges there would be a bin without scores.
        if self.score_edges and (not self.score_field or list(self.score_edges) != sorted(set(self.score_edges))):
            raise ValueError(
                f"data.source.score_edges = {list(self.score_edges)}: divides the scores of data.source.score_field = "
                f"{self.score_field!r}; name the field, and give the edges in ascending order"
            )
        for key in ("record_holds", "bos", "eos", "dtype"):
            value, default = getattr(self, key), type(self).__dataclass_fields__[key].default
            if value != default and not self.holds_tokens:
                raise ValueError(
                    f"data.source.{key} = {value!r}: says how token ids lie, and this source holds text; leave it out, "
                    "or name the field of the ids in data.source.tokens_field"
                )

    def bins(self, name: str) -> dict[str, int | None]:
        """Return the names under which the source `name` is prepared, with the score bin of each; None without bins."""
        if not self.score_edges:
            return {name: None}
        return {f"{name}.{number}": number for number in range(len(self.score_edges) + 1)}

    @property
    def holds_tokens(self) -> bool:
        """Whether the documents are token ids and not text."""
        return bool(self.tokens_field) or self.kind in ("tokens", "megatron")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Existing tokenizer to use, or the size of a new one to train."""

    path: str = ""
    """A `tokenizer.json`, or a directory that holds one. Empty: train a byte-level BPE on the training documents."""

    vocab_size: Annotated[int, Interval(ge=1, le=2**24)] = 8192
    """Number of tokens of a trained tokenizer, special tokens included; a small corpus may yield fewer. Unused when
    `path` is set."""

    boundary: str = "<|endoftext|>"
    """Name of the special token that opens and closes every document."""

    knot_chunks: Annotated[int, Interval(ge=0, le=1024)] = 0
    """Largest number of chunks into which Untie the Knots may cut a document (table `knots`). The vocabulary gets
    2 n + 3 special tokens for n chunks; an existing tokenizer gets the ones it lacks. 0: none."""

    training_characters: Annotated[int, Interval(ge=1, le=2**50)] = 2**30
    """Maximum number of characters, from the start of each source, on which a tokenizer is trained."""

    def __post_init__(self) -> None:
        if not self.boundary:
            raise ValueError(
                "data.tokenizer.boundary = '': a boundary token is needed; name a special token, such as "
                '"<|endoftext|>"'
            )
        if self.knot_chunks == 1:
            raise ValueError(
                f"data.tokenizer.knot_chunks = {self.knot_chunks}: must be 0 or at least 2; set it to 0 for no knots"
            )
        # 2 n + 3 marks, as `knot_tokens` (format/tokenizer.py) names them.
        least = BYTES_AND_BOUNDARY + (2 * self.knot_chunks + 3 if self.knot_chunks else 0)
        if not self.path and self.vocab_size < least:
            raise ValueError(
                f"data.tokenizer.vocab_size = {self.vocab_size}: 256 bytes, the boundary token and the tokens of "
                f"data.tokenizer.knot_chunks = {self.knot_chunks} do not fit; set it to at least {least}"
            )


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Reading of the prepared data by a rank; only `window_tokens` decides which sequences are read."""

    workers: Annotated[int, Interval(ge=0, le=1024)] = 1
    """Number of threads that read ahead. 0: read on demand."""

    prefetch_batches: Annotated[int, Interval(ge=1, le=2**16)] = 8
    """Number of micro-batches kept ready."""

    window_tokens: Annotated[int, Interval(ge=0, le=2**50)] = 0
    """Size of a shuffle window, in tokens. The shards of a bucket come in random order, and sequences are shuffled
    among adjacent shards of about this many tokens, so that a cache needs to hold one window only. 0: the whole bucket
    is one window."""

    hash_bytes_per_s: Annotated[int, Interval(ge=0, le=2**60)] = 2**26
    """Maximum rate at which a rank reads shards to compare their SHA-256 with the manifest while it trains, in bytes a
    second. Each shard of a local directory is hashed once in a start, by one rank, when a step first reads it.
    0: shards are not hashed."""

    cache_directory: str = ""
    """Directory, on a local disk of each machine, for the shards of a remote data.directory."""

    cache_bytes: Bytes = 2**38
    """Maximum size of the cached shards of one data.directory, in bytes; the least recently used are removed first."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """All settings that decide the content of a prepared directory."""

    directory: str
    """Directory of the prepared data, which appears there whole or not at all. Training may read a remote one
    (s3://...)."""

    source: SourceConfig = field(default_factory=SourceConfig)
    """The source of the documents, if there is one source only."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sources by name, instead of `source`."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer of the documents."""

    method: Method = "decompose"
    """Way in which documents become sequences. decompose: Dataset Decomposition. The baselines make sequences of
    max_bucket_tokens only. concat: concat-and-chunk. concat_masked: the same, with document boundaries. best_fit:
    best-fit packing, with document boundaries."""

    cut: Cut = "largest_first"
    """Way in which `decompose` cuts. largest_first: the largest bucket that fits, repeatedly. random: while a document
    has two largest buckets or more left, buckets are drawn at random, as the paper's released code does."""

    rest: Rest = "drop"
    """Use of the documents and tails shorter than min_bucket_tokens that `decompose` leaves. drop: they are dropped, as
    in the paper. pack: they fill sequences of min_bucket_tokens, with document boundaries, and nothing is lost."""

    min_bucket_tokens: BucketTokens = 128
    """Length of the shortest sequences, in tokens; a power of two."""

    max_bucket_tokens: BucketTokens = 2048
    """Length of the longest sequences, in tokens; a power of two. A longer document fills several sequences."""

    held_out_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.02
    """Fraction of the documents kept for evaluation, in [0, 1). 0: none."""

    max_bad_fraction: Fraction = 0.05
    """Maximum fraction of the records of an input shard that may be bad (broken, without text, empty), in [0, 1]; the
    preparation stops at a larger fraction."""

    input_shard_bytes: Bytes = 2**28
    """Maximum size in bytes of the adjacent files of a source that form one input shard, which one process prepares. A
    larger file is an input shard of its own."""

    shard_tokens: Annotated[int, Interval(ge=1, le=2**40)] = 2**25
    """Maximum number of tokens in one tar shard."""

    seed: Seed = 0
    """Seed of the choice of held-out documents and of random cuts."""

    def __post_init__(self) -> None:
        if not self.directory:
            raise ValueError("data.directory = '': a directory is needed; name the one for the prepared data")
        # A recipe that names no `source` has the default one.
        if self.sources and self.source != SourceConfig():
            raise ValueError(
                f"data.source.kind = {self.source.kind!r}: data.sources is set as well, and only one may be; "
                "move data.source to data.sources under a name"
            )
        for name in self.sources:
            if "@" in name:
                raise ValueError(
                    f"data.sources.{name}: '@' stands before a bucket in curriculum.shares; name it "
                    f"{name.replace('@', '-')}"
                )
            if "." in name:
                raise ValueError(
                    f"data.sources.{name}: has a dot, and NAME.0 is a score bin of the source NAME; rename it, as "
                    f"{name.replace('.', '-')}"
                )
        for key in ("min_bucket_tokens", "max_bucket_tokens"):
            if not _is_power_of_two(length := getattr(self, key)):
                below = 1 << max(length, 1).bit_length() - 1
                raise ValueError(f"data.{key} = {length}: must be a power of two; set it to {below} or {2 * below}")
        if self.min_bucket_tokens > self.max_bucket_tokens:
            raise ValueError(
                f"data.min_bucket_tokens = {self.min_bucket_tokens}: exceeds data.max_bucket_tokens = "
                f"{self.max_bucket_tokens}; lower the first or raise the second"
            )
        if self.shard_tokens < self.max_bucket_tokens:
            raise ValueError(
                f"data.shard_tokens = {self.shard_tokens}: a shard holds at least one sequence; set it to "
                f"data.max_bucket_tokens = {self.max_bucket_tokens} or more"
            )
        if not self.tokenizer.path and any(source.holds_tokens for source in self.named_sources.values()):
            raise ValueError(
                "data.tokenizer.path = '': a source holds token ids; set it to the tokenizer that made them"
            )

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources by name; a lone `source` is called "documents"."""
        return self.sources or {"documents": self.source}

    @property
    def prepared_sources(self) -> tuple[str, ...]:
        """Names of the sources of the prepared data, score bins included."""
        return tuple(part for name, source in self.named_sources.items() for part in source.bins(name))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Bucket lengths, ascending: every power of two in the range, or only the largest for a baseline."""
        if self.method != "decompose":
            return (self.max_bucket_tokens,)
        low, high = self.min_bucket_tokens.bit_length(), self.max_bucket_tokens.bit_length()  # 2^p has p + 1 bits
        return tuple(1 << power for power in range(low - 1, high))

    @property
    def has_boundaries(self) -> bool:
        """Whether a sequence may hold several documents that attention must keep apart."""
        return self.method in ("concat_masked", "best_fit") or (self.method == "decompose" and self.rest == "pack")
